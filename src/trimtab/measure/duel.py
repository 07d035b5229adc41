"""The verdicts on one model's answers against another's, and what they come to: win rate, its interval, counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.measure.rates import rate
from trimtab.measure.stats import Interval, WinRate, win_rate
from trimtab.rewards.pair_judge import Verdict

FEW = 20  # decided prompts; below, a sign test sees only landslides


@dataclass(frozen=True)
class Duel:
    """The verdicts on the first model's answers against one other's. prompts [N]: which prompt each pair answers."""

    against: str
    verdicts: list[Verdict]
    prompts: list[int]
    lengths: tuple[list[int], list[int]]

    @property
    def outcomes(self) -> list[float | None]:
        return [verdict.outcome for verdict in self.verdicts]

    def by_prompt(self, count: int) -> list[float | None]:
        """The mean outcome of each prompt, None where none of its pairs was judged."""
        rows: list[list[float]] = [[] for _ in range(count)]
        for prompt, outcome in zip(self.prompts, self.outcomes, strict=True):
            if outcome is not None:
                rows[prompt].append(outcome)
        return [sum(row) / len(row) if row else None for row in rows]


def wins(duel: Duel) -> WinRate:
    """The win rate with its interval and sign test over prompts."""
    outcomes = [np.nan if x is None else x for x in duel.outcomes]
    return win_rate(outcomes, [0.5] * len(outcomes), duel.prompts)


def win_interval(found: Interval, means: Sequence[float | None]) -> Interval:
    """The interval of a win rate, wide enough where few prompts are decided or none differs from another.

    There the bootstrap excludes 1/2 as soon as the few that are decided agree. With A the mean of |outcome - 1/2| over
    prompts and P the exact (Clopper-Pearson) interval of the share of decided prompts that are won, 1/2 + A (2 P - 1)
    excludes 1/2 only where the sign test does; the wider of the two on each side is taken.
    """
    known = np.array([x for x in means if x is not None])
    won, decided = decided_of(means)
    if len(known) < 2 or not decided or (decided >= FEW and found.low is not None):
        return found
    from scipy.stats import binomtest

    exact = binomtest(won, decided).proportion_ci(0.95)
    low, high = (0.5 + float(np.abs(known - 0.5).mean()) * (2 * bound - 1) for bound in (exact.low, exact.high))
    low, high = min(low, low if found.low is None else found.low), max(high, high if found.high is None else found.high)
    return Interval(found.mean, low, high, found.rows, found.prompts)


def decided_of(means: Sequence[float | None]) -> tuple[int, int]:
    """How many prompts were won, and how many were won or lost."""
    won, lost = (sum(x is not None and sign * x > sign * 0.5 for x in means) for sign in (1, -1))
    return won, won + lost


def share(values: Sequence[bool | None], prompts: Sequence[int]) -> Interval:
    """How many are true, of those that are not None; exact bounds where all or none are."""
    found = rate(np.array(values, dtype=np.float64), prompts)
    return found if found.prompts > 1 else Interval(found.mean, None, None, found.rows, found.prompts)


def counted(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """How many pairs were equal, flipped with the order, and unjudged, these by kind."""
    kinds = Counter(verdict.kind for verdict in verdicts if verdict.p_a is None)
    return {
        "pairs": len(verdicts),
        "equal": sum(verdict.identical for verdict in verdicts),
        "flipped": sum(verdict.flipped is True for verdict in verdicts),
        "unjudged": dict(kinds.most_common()),
    }


def or_nan(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
