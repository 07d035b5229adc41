"""CPU seconds of the command line's start: `trimtab --help`, each verb's help, and peers, all in this run.

    python benchmarks/command_line.py [--repeats 5]

User and system time of the process and its children, the median of the repeats (wall time depends on what else runs).
The floor is `python -c pass`. Goals: 0.15 s for --help, 0.5 s for a verb's help, neither with torch.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from trimtab.cli import VERBS

BIN = Path(sys.executable).parent


def cpu_seconds(command: list[str]) -> float:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return spent() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    commands = {"python -c pass": [sys.executable, "-c", "pass"], "trimtab --help": [str(BIN / "trimtab"), "--help"]}
    commands |= {f"trimtab {verb} --help": [str(BIN / "trimtab"), verb, "--help"] for verb in VERBS}
    peers = {"transformers --help": ["transformers", "--help"], "trl sft --help": ["trl", "sft", "--help"]}
    commands |= {name: [str(BIN / words[0]), *words[1:]] for name, words in peers.items() if (BIN / words[0]).exists()}
    print(f"{platform.machine()}, Python {platform.python_version()}, median of {repeats}, user + system seconds")
    times: dict[str, float] = {}
    for name, command in commands.items():
        # Once more, not counted: bytecode is compiled and files are read from disk only the first time.
        cpu_seconds(command)
        times[name] = statistics.median(cpu_seconds(command) for _ in range(repeats))
        against = f"  {times[name] / times['trimtab --help']:6.1f}x trimtab --help" if name in peers else ""
        print(f"  {name:26} {times[name]:7.3f} s{against}", flush=True)


if __name__ == "__main__":
    main()
