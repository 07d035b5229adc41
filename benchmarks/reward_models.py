"""Trains small reward models with TRL's RewardTrainer and writes pairs to measure them on: a minute on one core.

    python benchmarks/reward_models.py OUT

OUT/sst2          a reward trained on 12,000 pairs of SST-2 training sentences, the positive one preferred
OUT/sst2.jsonl    909 pairs of its test sentences, each used once
OUT/words-SEED    a reward trained on 2,000 pairs of a world of words, labelled by VADER, for seeds 0, 1, 2

and prints, for each seed, held-out pair accuracy and best of 1 ... 64 by that reward (proxy) and by VADER (gold): once from
a speaker whose answers are like the training pairs, once from one of whose answers 3% are denied praise.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from toy_reward import Speaker, pairs_by, sentence, sst2, train_reward  # noqa: E402
from trimtab.measure.diagnostic import Subject  # noqa: E402
from trimtab.measure.reward_benchmark import RewardBenchmark, RewardBenchmarkConfig  # noqa: E402
from trimtab.rewards import parse_reward  # noqa: E402
from trimtab.sampling import Sampling  # noqa: E402


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if (ROOT.parent / "shared/data/sst2").is_dir():
        films(out)
    for seed in range(3):
        words(out, seed)


def films(out: Path) -> None:
    train = {text: label for label, text in sst2(ROOT.parent / "shared", "train")}
    train_reward(pairs_by(list(train), lambda text: train[text], 12_000, 1, 0), out / "sst2", lr=2e-3)
    test = sst2(ROOT.parent / "shared", "test")
    generator = np.random.default_rng(1)
    good, bad = ([text for label, text in test if label == wanted] for wanted in (1, 0))
    generator.shuffle(good)
    generator.shuffle(bad)
    write(out / "sst2.jsonl", [{"chosen": a, "rejected": b} for a, b in zip(good, bad, strict=False)])


def words(out: Path, seed: int) -> None:
    vader, generator = parse_reward("sentiment"), np.random.default_rng(seed)
    train, held_out = ([sentence(generator) for _ in range(count)] for count in (3000, 1500))
    scores = dict(zip([*train, *held_out], vader.score([""] * 4500, [*train, *held_out]), strict=True))
    reward = train_reward(
        pairs_by(train, lambda text: scores[text] or 0.0, 2000, 0.01, seed), out / f"words-{seed}", seed=seed, width=32
    )
    pairs = write(
        out / f"words-{seed}.jsonl", pairs_by(held_out, lambda text: scores[text] or 0.0, 500, 0.01, seed + 1)
    )
    for tricky in (0.0, 0.03):
        config = RewardBenchmarkConfig(gold="sentiment", best_of=64, gold_prompts=100, canaries=0)
        found = RewardBenchmark(config).measure(
            Subject(Speaker(tricky), "speaker", texts=[pairs], reward=reward, sampling=Sampling(seed=seed))
        )
        row = found.row("accuracy")
        print(
            f"seed {seed}, denied praise {tricky:.0%}: held-out accuracy {row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
        )
        for line in found.figures[-1].lines:  # type: ignore[union-attr]
            print(f"  {line.label:36s}", " ".join(f"{point[1]:6.2f}" for point in line.points))
        print(*(f"  {warning}" for warning in found.warnings), sep="\n")


def write(path: Path, pairs: list[dict[str, str]]) -> Path:
    rows = [{**pair, "prompt": f"Review {i} :"} for i, pair in enumerate(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    main(Path(sys.argv[1]))
