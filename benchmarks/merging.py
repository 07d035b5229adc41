"""Whole merges of 0.5B-parameter models: our command, mergekit's and plain copying, in one run on one machine.

    python -m venv ../mergekit && ../mergekit/bin/pip install mergekit       # in an environment of its own
    python benchmarks/merging.py --python ../mergekit/bin/python [--runs 3] [--only bfloat16 ties] [--work FOLDER]

The models are Llamas of 494 million random weights with tied embeddings (the largest tensor has 136 million), three changed
from a base by a twentieth; made in FOLDER (12 GB for both dtypes) unless they are there. Everything is read once before, so
it is in the page cache if memory suffices. Each command has one torch thread (more cost mergekit CPU time); ours works on as
many tensors at a time as there are cores. Every run is a process of its own, so imports count. "copy" reads all parents
(`cat`), copies one (`cp`) and waits for the disk, as ours does and mergekit does not.

CPU: user and system seconds of the process. Peak: its resident memory. Read, written: what it asked the system for; mergekit
maps its parents into memory, which is not counted; what `cat` throws away counts as written. Medians of the runs, which take
turns. Writes benchmarks/results/merging.json and prints the table of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HIDDEN, INNER, LAYERS, WORDS, HEADS, KEY_VALUE = 896, 4864, 24, 151936, 14, 128
PARENTS = ("base", "one", "two", "three")
DTYPES = ("bfloat16", "float32")
DENSITY = 0.3
# How much less CPU time than mergekit; how much longer than copying; bytes above twice the largest tensor
GOALS = {"linear": 8.0, "ties": 5.0}
CLOCK, ABOVE = 1.3, 300e6
RESULTS = Path(__file__).parent / "results" / "merging.json"
BIN = Path(sys.executable).parent


def make(folder: Path, dtype: str) -> None:
    """The parents of one dtype; in a process of its own, since peak memory is inherited."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        rows = {"q": HIDDEN, "k": KEY_VALUE, "v": KEY_VALUE, "o": HIDDEN}
        shapes |= {f"{at}self_attn.{name}_proj.weight": (count, HIDDEN) for name, count in rows.items()}
        shapes |= {f"{at}mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (HIDDEN, INNER)}
        shapes |= {f"{at}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KEY_VALUE * HEADS // HIDDEN,
        "vocab_size": WORDS, "tie_word_embeddings": True, "torch_dtype": dtype, "max_position_embeddings": 2048,
    }  # fmt: skip
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    base: dict[str, Any] = {}
    for seed, parent in enumerate(PARENTS):
        chance = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, shape in shapes.items():
            drawn = torch.randn(shape, generator=chance).mul_(0.02)
            tensors[name] = (drawn if parent == "base" else drawn.mul_(0.05).add_(base[name])).to(getattr(torch, dtype))
        base = tensors if parent == "base" else base
        at_last = folder / parent
        at_last.mkdir(parents=True, exist_ok=True)
        save_file(tensors, at_last / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(at_last)
        (at_last / "config.json").write_text(json.dumps(config))


def commands(folder: Path, method: str, count: int, out: Path, python: str | None) -> dict[str, list[str]]:
    """who -> the command that merges `count` parents into `out`."""
    parents = [str(folder / parent) for parent in PARENTS[1 : count + 1]]
    files = [f"{parent}/model.safetensors" for parent in parents]
    ours = [str(BIN / "trimtab"), "merge", method, "--models", *parents, "--out", str(out)]
    settings: dict[str, Any] = {"weight": 1.0}
    theirs: dict[str, Any] = {"merge_method": method, "dtype": folder.name}
    if method == "ties":
        ours += ["--base", str(folder / "base"), "--density", str(DENSITY)]
        theirs["base_model"] = str(folder / "base")
        settings["density"] = DENSITY
        files.append(str(folder / "base" / "model.safetensors"))
    theirs["models"] = [{"model": parent, "parameters": settings} for parent in parents]
    config = out.with_suffix(".yaml")
    config.write_text(json.dumps(theirs))  # JSON is YAML
    copy = f'cat "$@" > /dev/null && mkdir "{out}" && cp "$1" "{out}/copy" && sync "{out}/copy"'
    found = {"trimtab": ours, "copy": ["sh", "-c", copy, "sh", *files]}
    if python is not None:
        found["mergekit"] = [str(Path(python).parent / "mergekit-yaml"), str(config), str(out)]
    return found


def measure(command: Sequence[str]) -> dict[str, float]:
    """Runs a command and takes its measure from the kernel's own accounts."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(["sync"], check=True)  # an earlier run's writes are not this one's
    start = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        wall = time.monotonic() - start
        accounts = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{said.read().decode(errors='replace')[-3000:]}")
    return {
        "wall_seconds": wall, "cpu_seconds": usage.ru_utime + usage.ru_stime, "user_seconds": usage.ru_utime,
        "system_seconds": usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024.0,
        "read_bytes": float(accounts["rchar"]), "written_bytes": float(accounts["wchar"]),
    }  # fmt: skip


def case(folder: Path, method: str, count: int, runs: int, python: str | None) -> dict[str, dict[str, float]]:
    """who -> medians."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        out = Path(root) / "out"
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(runs):
            for who, command in commands(folder, method, count, out, python).items():
                found.setdefault(who, []).append(measure(command))
                shutil.rmtree(out)
    return {who: {key: statistics.median(run[key] for run in rows) for key in rows[0]} for who, rows in found.items()}


def versions(python: str | None) -> str:
    import importlib.metadata

    asked = "import importlib.metadata as m; print('mergekit', m.version('mergekit'), 'with torch', m.version('torch'))"
    its = (
        subprocess.run([python, "-c", asked], capture_output=True, text=True).stdout.strip()
        if python
        else "no mergekit"
    )
    here = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{here}, {memory:.0f} GB, torch {importlib.metadata.version('torch')}; {its}"


def table(rows: list[dict[str, Any]]) -> str:
    """Of all that was measured, in Markdown."""
    heads = (
        "merge",
        "who",
        "wall s",
        "CPU s (user + system)",
        "peak GB",
        "read GB",
        "written GB",
        "CPU against mergekit",
    )
    lines = [f"| {' | '.join(heads)} | wall against copy |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        theirs, copy = row["of"].get("mergekit"), row["of"]["copy"]
        for who, one in row["of"].items():
            fewer = f"{theirs['cpu_seconds'] / one['cpu_seconds']:.1f}x less" if theirs and who == "trimtab" else ""
            slower = f"{one['wall_seconds'] / copy['wall_seconds']:.1f}x" if who != "copy" else ""
            cells = [f"{row['method']}, {row['models']} models, {row['dtype']}", who, f"{one['wall_seconds']:.1f}"]
            cells.append(f"{one['cpu_seconds']:.1f} ({one['user_seconds']:.1f} + {one['system_seconds']:.1f})")
            cells.append(f"{one['peak_bytes'] / 1e9:.2f}")
            cells += [f"{one[key] / 1e9:.1f}" for key in ("read_bytes", "written_bytes")]
            lines.append(f"| {' | '.join([*cells, fewer, slower])} |")
    return "\n".join(lines)


def goals(rows: list[dict[str, Any]]) -> list[str]:
    """Which are met, and by how much."""
    found = []
    for row in rows:
        ours, theirs, copy = row["of"]["trimtab"], row["of"].get("mergekit"), row["of"]["copy"]
        room = 2 * WORDS * HIDDEN * (2 if row["dtype"] == "bfloat16" else 4) + ABOVE
        told = [("wall against copy", ours["wall_seconds"] / copy["wall_seconds"], "<=", CLOCK)]
        told.append(("peak GB", ours["peak_bytes"] / 1e9, "<=", room / 1e9))
        if theirs:
            told.append(
                ("CPU against mergekit", theirs["cpu_seconds"] / ours["cpu_seconds"], ">=", GOALS[row["method"]])
            )
        for what, value, sign, goal in told:
            met = value <= goal if sign == "<=" else value >= goal
            name = f"{row['method']}, {row['models']} models, {row['dtype']}"
            found.append(f"{'met   ' if met else 'MISSED'} {name}: {what} {value:.2f} (goal {sign} {goal:.2f})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="the python of an environment that has mergekit; without it, ours and copying")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="cases with all of these words: ties 2 float32"
    )
    parser.add_argument(
        "--work", type=Path, default=None, help="where the models are made and kept (a temporary folder)"
    )
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(Path(args.make[0]), args.make[1])
        return
    cases = [(dtype, method, count) for dtype in DTYPES for method in GOALS for count in (2, 3)]
    cases = [one for one in cases if all(word in map(str, one) for word in args.only)]
    print(versions(args.python), flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        for dtype in dict.fromkeys(dtype for dtype, _, _ in cases):
            if not (work / dtype / PARENTS[-1] / "config.json").exists():
                subprocess.run([sys.executable, __file__, "--make", str(work / dtype), dtype], check=True)
            for path in (work / dtype).glob("*/model.safetensors"):
                subprocess.run(["cat", str(path)], stdout=subprocess.DEVNULL, check=True)
            for one in (one for one in cases if one[0] == dtype):
                rows.append({"dtype": dtype, "method": one[1], "models": one[2]})
                rows[-1]["of"] = case(work / dtype, one[1], one[2], args.runs, args.python)
                print(*table(rows[-1:]).splitlines()[2:], sep="\n", flush=True)
            if args.work is None:
                shutil.rmtree(work / dtype)
    if not args.only:
        found = {"schema": 1, "machine": versions(args.python), "runs": args.runs, "rows": rows, "goals": goals(rows)}
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(table(rows))
    print("\n".join(goals(rows)))


if __name__ == "__main__":
    main()
