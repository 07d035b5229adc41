"""Keeps the output shown in README.md real: `python docs/outputs.py` runs what it shows and writes the answers in.

A block to fill follows a comment that says what makes it:

    <!-- output of: trimtab methods -->       the output of a command
    <!-- measured by: trimtab quickstart -->  the same, but another machine prints other digits: run only with --all
    <!-- measured by: the code above -->      what the Python block before it prints

With --check nothing is written, and a block that is out of date ends with exit code 1 and a diff.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"<!-- (?P<kind>output of|measured by): (?P<what>.+?) -->\n+```text\n(?P<text>.*?)```", re.DOTALL)
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def produced(what: str, before: str) -> str:
    """What a command, or the last Python block of the text before, prints to stdout."""
    command = [sys.executable, "-c", CODE.findall(before)[-1]] if what == "the code above" else shlex.split(what)
    if command[0] == "trimtab":
        command = [sys.executable, "-m", *command]
    environment = {**os.environ, "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{what!r} in README.md failed:\n{done.stderr}")
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()) + "\n"


def filled(text: str, everything: bool) -> str:
    """The text with its blocks made anew (measured ones only if `everything`)."""

    def replace(match: re.Match[str]) -> str:
        if match["kind"] == "measured by" and not everything:
            return match[0]
        made = produced(match["what"], text[: match.start()])
        return match[0].removesuffix(f"{match['text']}```") + f"{made}```"

    return BLOCK.sub(replace, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--all", action="store_true", help="also what is measured (minutes)")
    args = parser.parse_args()
    before = README.read_text()
    after = filled(before, args.all)
    if args.check and before != after:
        print("".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), "README.md", "now")))
        return 1
    if not args.check:
        README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
