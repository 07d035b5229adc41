"""Sentiment by task arithmetic: fine-tunes of a story model for happy and for sad stories, merged at many weights.

    python benchmarks/merge_sentiment.py MODEL [--seeds 3] [--out benchmarks/results/merge_sentiment.json]

MODEL: stories260k (or any small story model). For each seed 900 stories are drawn, and two copies are trained on the
300 with the highest and the 300 with the lowest VADER sentiment (two epochs). Sentiment of 240 stories a merge at
temperature 1; rows of one seed share their random numbers at all weights. Intervals resample openings and rows of all seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab import LM, Sampling
from trimtab.files import write_json
from trimtab.measure.stats import mean_interval
from trimtab.merge.engine import run
from trimtab.merge.recipe import Recipe
from trimtab.prompt.tuning import save, sft
from trimtab.rewards import parse_reward

OPENINGS = Path(__file__).parent / "openings"
WEIGHTS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
DRAWN, KEPT, MEASURED = 900, 300, 240


def seed_rows(model: str, seed: int, folder: Path) -> dict[str, dict[float, dict[str, np.ndarray]]]:
    """Path -> weight -> sentiment and NLL under the base of each story."""
    lm, vader = LM.load(model), parse_reward("sentiment")
    fit = (OPENINGS / "fit.txt").read_text().splitlines()
    test = (OPENINGS / "test.txt").read_text().splitlines()
    openings = (fit * (1 + DRAWN // len(fit)))[:DRAWN]
    stories = lm.generate(openings, Sampling(max_new_tokens=48, seed=100 + seed))
    order = np.argsort(vader(openings, stories.texts), kind="stable")
    for name, rows in (("sad", order[:KEPT]), ("happy", order[-KEPT:])):
        save(sft(lm, [(openings[i], stories.texts[i]) for i in rows], epochs=2, seed=seed), folder / name)
    asked = (test * (1 + MEASURED // len(test)))[:MEASURED]
    both = (str(folder / "happy"), str(folder / "sad"))
    paths = {
        "happy alone": lambda w: ((both[0],), [w]),
        "sad alone": lambda w: ((both[1],), [w]),
        "from sad to happy": lambda w: (both, [(1 + w) / 2, (1 - w) / 2]),
        "happy less sad": lambda w: (both, [w, -w]),
    }
    found: dict[str, dict[float, dict[str, np.ndarray]]] = {name: {} for name in paths}
    for name, at in paths.items():
        for weight in WEIGHTS:
            parents, weights = at(weight)
            out = folder / f"{name}-{weight}"
            run(Recipe("task-arithmetic", parents, model, weights), out, threads=1)
            drawn = LM.load(out).generate(asked, Sampling(max_new_tokens=48, seed=200 + seed))
            nll = [-float(one.mean()) if len(one) else np.nan for one in lm.score(asked, drawn.tokens)]
            found[name][weight] = {"sentiment": vader(asked, drawn.texts), "nll": np.array(nll)}
        print(f"seed {seed}: {name}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "merge_sentiment.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(seed_rows(args.model, seed, Path(folder)))
    tests = len((OPENINGS / "test.txt").read_text().splitlines())
    clusters = [i % tests for _ in rows for i in range(MEASURED)]
    table: list[dict[str, Any]] = []
    for name in rows[0]:
        for weight in WEIGHTS:
            entry: dict[str, Any] = {"path": name, "weight": weight}
            for column in ("sentiment", "nll"):
                values = np.concatenate([one[name][weight][column] for one in rows])
                entry[column] = mean_interval(values, clusters).to_dict()
            entry["seeds"] = [float(one[name][weight]["sentiment"].mean()) for one in rows]
            table.append(entry)
            said = entry["sentiment"]
            seeds = " ".join(f"{value:.2f}" for value in entry["seeds"])
            print(
                f"| {name} | {weight:+.1f} | {said['mean']:.3f} [{said['low']:.3f}, {said['high']:.3f}] | {seeds} "
                f"| {entry['nll']['mean']:.2f} |"
            )
    write_json(args.out, {"schema": 1, "model": Path(args.model).name, "seeds": args.seeds, "table": table})


if __name__ == "__main__":
    main()
