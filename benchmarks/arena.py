"""What is a bracket worth? rho of tournaments, random pairs, anchors and the round robin against known ratings.

    python benchmarks/arena.py [--trials 100] [--cells 20,500,0.7 8,100,0.8 ...] [--leaderboard]

Cells are models, prompts, the judge's precision. Ratings are drawn from U(1000, 1300) in every trial, or are the fixed
twenty of `trimtab.measure.tournament.LEADERBOARD` (cells of 20 models). Each cell shows the mean rho with its standard
error, the median and quartiles of the bracket, how often the bracket is above the best anchor of the cell, how often the
best model is ranked first, and judge calls for each 0.01 of rho above the best anchor.
"""

from __future__ import annotations

import argparse

import numpy as np

from trimtab.measure.tournament import LEADERBOARD, simulate

CELLS = ["20,50,0.7", "20,200,0.7", "20,500,0.7", "20,100,0.9", "20,500,0.9", "8,100,0.8", "5,100,0.8", "20,500,1.0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--leaderboard", action="store_true")
    args = parser.parse_args()
    for cell in args.cells:
        models, prompts, precision = cell.split(",")
        ratings = LEADERBOARD if args.leaderboard else None
        arms = simulate(int(models), int(prompts), float(precision), args.trials, 0, ratings, round_robin=True)
        ours = arms["tournament"]
        best = max((arm for name, arm in arms.items() if name.startswith("anchor")), key=lambda arm: arm.rho.mean())
        gain = ours.rho - best.rho
        low, middle, high = np.quantile(ours.rho, [0.25, 0.5, 0.75])
        print(f"{models} models, {prompts} prompts, the judge is right {precision}")
        for arm in arms.values():
            error = arm.rho.std(ddof=1) / np.sqrt(args.trials)
            line = f"  {arm.name:14s} rho {arm.rho.mean():.3f} +- {error:.3f}  tau-b {arm.tau.mean():.3f}"
            print(f"{line}  first is first {arm.top.mean():.2f}  {arm.calls} calls")
        print(f"  bracket: median {middle:.3f}, quartiles {low:.3f} and {high:.3f}")
        print(f"  bracket - {best.name}: {gain.mean():.3f} +- {gain.std(ddof=1) / np.sqrt(args.trials):.3f}", end="")
        calls = ours.calls_per_hundredth(best)
        print(f", above in {(gain > 0).mean():.2f} of trials" + (f", {calls:.0f} calls for 0.01" if calls else ""))


if __name__ == "__main__":
    main()
