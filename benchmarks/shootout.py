"""Every test-time method at equal cost: three budgets of tokens on two models, one report.

    python benchmarks/shootout.py               # make shootout; resumes where it stopped
    python benchmarks/shootout.py --quick       # few prompts, one budget: does everything run?

`pocket`: pocket/base under pocket/reward, judged by pocket/judge (gold, which no method sees). `stories`: stories260k in
shared/models, VADER sentiment, no gold. A budget is tokens forwarded an answer, those of every model counted, the reward
model's too; methods with nothing to size run once and stand beside every budget. The comparisons are run directories
in runs/shootout; figures go to benchmarks/results/shootout.json, the tables and pictures to docs/shootout.md by
shootout_report.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trimtab import pocket
from trimtab.compare import run_compare
from trimtab.prompts import read_prompts

ROOT = Path(__file__).resolve().parent.parent
STORIES = ROOT.parent / "shared" / "models" / "stories260k"
OPENINGS = ROOT / "benchmarks" / "openings"

# What a budget sizes.
SIZED = [
    "best-of-n",
    "majority-vote",
    "mbr",
    "mbr:weighted=true",
    "infalign:draws=0",
    "qalign",
    "qalign:beta=0.5,select=last",
    "args",
    "args:select=sample",
    "cd-fudge",
    "cd-q",
    "cd-blockwise",
    "transfer-q",
    "deal",
    "best-of-n over natural-control",
]
# What answers at one price. args:weight=0 is greedy decoding: what every greedy method has for nothing.
FIXED = ["args:weight=0", "natural-control", "re-control", "best-of-n:n=4 over natural-control"]
ALIGNED = [  # with other models, or with a prompt of its own
    "nudging:nudger=pocket/nano",
    "proxy-tuning:expert=pocket/chat,anti=pocket/base,weight=0.5",
    "ensemble:models=pocket/nano",
    "core:models=pocket/nano",
    "byte-level:models=pocket/nano",
    "p-aligner",
    "guide-align",
    "prompt-complement",
    "model:path=pocket/nano",
    "model:path=pocket/chat",
]

ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # the models are too small for two threads to be faster than one


def worlds(quick: bool) -> dict[str, dict[str, Any]]:
    """Model, rewards, prompts, policies and budgets of each world that is here."""
    count = 8 if quick else 96
    found: dict[str, dict[str, Any]] = {
        "pocket": {
            "model": "pocket/base",
            "reward": "pocket/reward",
            "gold": "pocket/judge",
            "prompts": pocket.prompts("test", count, seed=7),
            "fit_prompts": pocket.prompts("train", 16 if quick else 128, seed=7),
            "max_new_tokens": 64,
            "samples": 1,
            "budgets": [400] if quick else [250, 1000, 4000],
            "sized": SIZED,
            "fixed": [*FIXED, *ALIGNED],
        }
    }
    if STORIES.is_dir():
        found["stories"] = {
            "model": str(STORIES),
            "reward": "sentiment",
            "gold": None,
            "prompts": read_prompts(OPENINGS / "test.txt")[: 8 if quick else None],
            "fit_prompts": read_prompts(OPENINGS / "fit.txt"),
            "max_new_tokens": 48,
            "samples": 1 if quick else 2,
            "budgets": [400] if quick else [150, 600, 2400],
            "sized": SIZED,
            "fixed": FIXED,
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few prompts and one budget")
    parser.add_argument(
        "--only", metavar="WORLD", help="pocket or stories; default: both, each in a process of its own"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "shootout")
    args = parser.parse_args()
    start = time.perf_counter()
    if args.only is None:
        running = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--only", name], env={**os.environ, **ONE_THREAD}
            )
            for name in worlds(args.quick)
        ]
        failed = [process.args for process in running if process.wait()]
        print(f"all: {time.perf_counter() - start:.0f} s")
        return 1 if failed else 0
    world = worlds(args.quick)[args.only]
    out = args.out.with_name(args.out.name + "-quick") if args.quick else args.out
    budgets, sized, fixed = world.pop("budgets"), world.pop("sized"), world.pop("fixed")
    for budget, policies in [(None, fixed), *((f"tokens={tokens}", sized) for tokens in budgets)]:
        folder = out / f"{args.only}-{(budget or 'fixed').replace('=', '-')}"
        began = time.perf_counter()
        run_compare(policies=policies, out=folder, budget=budget, coherence=False, progress=say, **world)
        print(f"{folder.name}: {time.perf_counter() - began:.0f} s", flush=True)
    print(f"{args.only}: {time.perf_counter() - start:.0f} s", flush=True)
    return 0


def say(message: str) -> None:
    print(f"  {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
