"""What InfAlign's transforms are worth: a table at equal KL, docs/figures/infalign.svg, and the same on pocket/base.

python benchmarks/infalign_curves.py                 # on densities: half a minute; prints the table, writes the figure
python benchmarks/infalign_curves.py --pocket 120    # and on a model: a few minutes for 120 prompts
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from scipy.optimize import brentq

from trimtab import LM, Sampling, pocket
from trimtab.decode.calibration import mid_ranks
from trimtab.files import write_atomic
from trimtab.measure.stats import Interval, paired_difference, verdict
from trimtab.measure.win_rates import Array, Procedure, Transform, at_kl, curve, kl, of_n_law, tilt, uniform, win_rate
from trimtab.report.win_rate_curves import Lines, win_rate_figure
from trimtab.rewards import as_reward

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "infalign.svg"
N = 4


def transforms(procedure: Procedure) -> dict[str, Transform]:
    """The transforms compared; exp's sign is that of the procedure."""
    return {
        "identity": Transform("identity", procedure, N),
        "exp 5": Transform("exp", procedure, N, t=5),
        "exp 10": Transform("exp", procedure, N, t=10),
        "fixed point": Transform("fixed-point", procedure, N),
    }


def table(nats: float) -> str:
    """Win rates over the base at equal KL, in Markdown."""
    rows = [
        f"| procedure | transform | beta at KL {nats} | one draw | best of {N} | worst of {N} |",
        "|---|---|---|---|---|---|",
    ]
    procedures: tuple[Procedure, ...] = ("best", "worst")
    for procedure in procedures:
        for label, transform in transforms(procedure).items():
            found = at_kl(transform, nats)
            if found is None:
                rows.append(f"| {procedure} of {N} | {label} | none | - | - | - |")
                continue
            beta, rate = found
            rows.append(
                f"| {procedure} of {N} | {label} | {beta:.4f} | {rate.single:.4f} | {rate.best:.4f} | {rate.worst:.4f} |"
            )
    return "\n".join(rows)


def lines(procedure: Procedure, points: int) -> Lines:
    """Each transform's rates from KL 0.002 to past 1."""
    p = uniform(1024)
    out = {}
    for label, transform in transforms(procedure).items():
        far, near = (found[0] if (found := at_kl(transform, nats, p)) else np.nan for nats in (1.05, 0.002))
        betas = np.geomspace(far, near, points)
        out[label] = [rate for _, rate in curve(transform, betas.tolist(), p)]
    return out


def measured(count: int, answers: int = 96) -> str:
    """Best of 4 on pocket/base: raw, calibrated and exp 10 at the same mean KL, by the learned reward and the gold judge.

    The base is the pool of `answers` answers a prompt itself, so reweighting it and ranking its best of 4 are exact; what
    varies is the prompts.
    """
    prompts = pocket.prompts("test", count, 1)
    done = LM.load("pocket/base").generate(prompts, Sampling(max_new_tokens=48, samples=answers, seed=1))
    reward, gold = (
        np.array(as_reward(name).score(done.prompts, done.texts), dtype=float).reshape(count, answers)
        for name in ("pocket/reward", "pocket/judge")
    )
    ranks = np.array([mid_ranks(np.sort(row), row) for row in reward])
    base = np.full(answers, 1 / answers)
    rows = ["| KL | difference | best of 4, reward | best of 4, gold | one draw, reward |", "|---|---|---|---|---|"]
    for nats in (0.1, 0.3, 0.6):
        won = {}
        for name, phi in (("raw", reward), ("calibrated", ranks), ("exp 10", Transform("exp")(ranks))):

            def excess(log_beta: float, phi: Array = phi, nats: float = nats) -> float:
                return float(np.mean([kl(tilt(base, row, math.exp(log_beta)), base) for row in phi])) - nats

            beta = math.exp(brentq(excess, math.log(1e-3), math.log(1e4)))
            tilted = [tilt(base, row, beta) for row in phi]
            four = [of_n_law(q, N, "best", r) for q, r in zip(tilted, reward, strict=True)]
            of_base = [of_n_law(base, N, "best", r) for r in reward]
            won[name] = (
                [beats(q, p, r) for q, p, r in zip(four, of_base, reward, strict=True)],
                [beats(q, p, g) for q, p, g in zip(four, of_base, gold, strict=True)],
                [beats(q, base, r) for q, r in zip(tilted, reward, strict=True)],
            )
        for a, b in (("calibrated", "raw"), ("exp 10", "calibrated"), ("exp 10", "raw")):
            cells = [said(paired_difference(x, y)) for x, y in zip(won[a], won[b], strict=True)]
            rows.append(f"| {nats} | {a} - {b} | {' | '.join(cells)} |")
    return "\n".join(rows)


def beats(q: Array, p: Array, scores: Array) -> float:
    """P(a draw of q scores more than one of p), ties counting half; q and p [A] over the same answers."""
    level = np.unique(scores, return_inverse=True)[1]
    ours, theirs = (np.asarray(np.bincount(level, weights=one), dtype=np.float64) for one in (q, p))
    return win_rate(ours, theirs, 1)


def said(difference: Interval) -> str:
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}] {verdict(difference)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=40, help="points a line")
    parser.add_argument("--out", type=Path, default=FIGURE, help="the SVG to write")
    parser.add_argument("--pocket", type=int, default=0, help="prompts to measure pocket/base on; 0: none")
    args = parser.parse_args()
    print(table(0.3))
    if args.pocket:
        print(f"\n{measured(args.pocket)}\n")
    best, worst = lines("best", args.points), lines("worst", args.points)
    panels = [
        (f"best of {N} beats the base's", "best", best),
        (f"worst of {N} beats the base's", "worst", worst),
        (f"one draw, made for best of {N}", "single", best),
    ]
    write_atomic(args.out, win_rate_figure(panels))
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
