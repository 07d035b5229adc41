"""Nudging pocket/base with pocket/nano, which has another tokenizer: is the pair better than either, and who wrote what?

    python benchmarks/nudging.py [--prompts 300]

Greedy answers to held-out questions, judged by the gold judge: overall, helpful, harmless, correct. Differences are paired
by question with 95 % intervals. The control hands the pen over at random, at about the same share of nudged tokens. Last
the premise: how often the two models' greedy tokens differ, by the base's confidence.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from scipy.stats import spearmanr

from trimtab import LM, Sampling, pocket
from trimtab.decode.follow import Follower
from trimtab.decode.nudging import Nudging
from trimtab.environment import environment
from trimtab.measure.stats import mean_interval, paired_difference
from trimtab.policy import Completions, Cost

ASPECTS = ("score", "helpful", "harmless", "correct")


def judged(answers: Completions) -> dict[str, list[float]]:
    """Each aspect of each answer; NaN where it does not apply."""
    verdicts = [pocket.judge(str(prompt), text) for prompt, text in zip(answers.prompts, answers.texts, strict=True)]
    out = {a: [np.nan if (v := getattr(one, a)) is None else v for one in verdicts] for a in ASPECTS}
    return out


def disagreement(base: LM, nano: LM, answers: Completions) -> list[tuple[float, bool]]:
    """At every word boundary of the base's own greedy answers: its confidence, and whether the first letters differ."""
    points = []
    for prompt, text in zip(answers.prompts, answers.texts, strict=True):
        words = text.split(" ")[1:]
        ends = ["".join(" " + word for word in words[:n]) for n in range(len(words))]
        pair = [Follower(lm, [prompt] * len(ends), Sampling(), Cost()) for lm in (base, nano)]
        for one in pair:
            one.follow(ends)
        said = []
        for one in pair:
            tokens = one.session.logits.argmax(-1).tolist()
            said.append([one.lm.decode([token]) if token not in one.lm.eos_ids else "" for token in tokens])
        sure = pair[0].session.logits.softmax(-1).max(-1).values.tolist()
        for u, a, b in zip(sure, *said, strict=True):
            points.append((u, not (a.strip().startswith(b.strip()) or b.strip().startswith(a.strip()))))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=300)
    args = parser.parse_args()
    base, nano = LM.load("pocket/base"), LM.load("pocket/nano")
    prompts, greedy = pocket.prompts("test", args.prompts, seed=11), Sampling(64, 0)
    arms = {"base": base.generate(prompts, greedy), "nano": nano.generate(prompts, greedy)}
    for gamma in (0.2, 0.3, 0.4, 0.6, 0.8):
        arms[f"nudged, gamma {gamma}"] = Nudging(base, nano, gamma=gamma).generate(prompts, greedy)
    arms["random hand-over"] = Nudging(base, nano, random_handback=0.6, random_stop=0.12).generate(prompts, greedy)
    scores = {name: judged(answers) for name, answers in arms.items()}
    print(environment())
    print(
        f"{args.prompts} questions, greedy; gold judge, mean and half of a 95 % interval; differences paired by question"
    )
    for name, answers in arms.items():
        cells = []
        for aspect in ASPECTS:
            found = mean_interval(scores[name][aspect])
            cells.append(
                f"{aspect} {found.mean:.3f}" + ("" if found.low is None else f" ±{(found.high - found.low) / 2:.3f}")
            )
        share = [row["nudged"] for row in answers.telemetry]
        tokens = ", ".join(f"{k} {v / len(prompts):.0f}" for k, v in answers.cost.tokens.items())
        print(f"{name:20} {'  '.join(cells)}  nudged {np.mean(share) if share else 0:.2f}  tokens {tokens}")
    for gamma in (0.3, 0.8):
        for other in ("base", "nano", "random hand-over"):
            cells = []
            for aspect in ASPECTS:
                found = paired_difference(scores[f"nudged, gamma {gamma}"][aspect], scores[other][aspect])
                interval = "(equal)" if found.low is None else f"[{found.low:+.3f}, {found.high:+.3f}]"
                cells.append(f"{aspect} {found.mean:+.3f} {interval}")
            print(f"gamma {gamma} less {other}: {'  '.join(cells)}")
    points = torch.tensor(disagreement(base, nano, base.generate(prompts[:100], greedy)), dtype=torch.float64)
    edges = torch.quantile(points[:, 0], torch.linspace(0, 1, 11, dtype=torch.float64))
    rates = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = points[(points[:, 0] >= low) & (points[:, 0] <= high)]
        rates.append(float(inside[:, 1].mean()))
        print(
            f"base confidence {float(low):.2f} to {float(high):.2f}: greedy tokens differ in {rates[-1]:.0%} of {len(inside)}"
        )
    print(f"Spearman of confidence and disagreement over the ten bins: {spearmanr(range(10), rates).statistic:.2f}")


if __name__ == "__main__":
    main()
