"""Who won a match: two answers shown to a judge, in random order or both, ties and silence dealt with and counted.

    same    both answers are the same text: no call, a coin
    judge   the judge preferred one
    again   it did not at first, and did when asked again in the other order
    tie     it did not either time (order="both": not the same one in both orders): a coin says who goes on
    none    no verdict either time: a coin

A coin's win counts as a win (ties="coin") or as half a win for each (ties="half", and order="both"); a match without a
verdict is always decided by the coin. Where coins that stand for the judge decide more than 5 % of the matches it was
asked about that is a warning; more than 25 % and the ranking is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError
from trimtab.measure.stats import Array
from trimtab.policy import Cost, Prompt

Ints = npt.NDArray[np.int64]
WARN, REFUSE = 0.05, 0.25
FEWEST = 40  # matches before a ranking can be refused while it is being played


@dataclass
class Referee:
    """outputs[model][prompt] are judged by `judge` (a `PairJudge`). What happened is kept in `how`, match by match.

    positions: the judge sees both answers, so that order may matter; else nothing is asked again in the other one.
    calls: times that two answers were shown to the judge. first: (prompt, whether the answer shown first won).
    """

    judge: Any
    prompts: Sequence[Prompt]
    outputs: Sequence[Sequence[str | None]]
    rng: np.random.Generator
    order: Literal["random", "both"] = "random"
    ties: Literal["coin", "half"] = "coin"
    positions: bool = True
    meter: Cost = field(default_factory=Cost)
    calls: int = 0
    how: list[str] = field(default_factory=list)
    first: list[tuple[int, bool]] = field(default_factory=list)

    def play(self, row: Ints, a: Ints, b: Ints) -> tuple[Array, npt.NDArray[np.bool_]]:
        """The share of each match that a won, and whether a goes on (see `tournament.Play`). row: prompts."""
        size = len(row)
        swapped, coin = self.rng.random(size) < 0.5, self.rng.random(size) < 0.5  # drawn whatever the judge says
        score, how = np.full(size, np.nan), np.full(size, "same", dtype=object)
        asked = np.array(
            [k for k in range(size) if self.outputs[a[k]][row[k]] != self.outputs[b[k]][row[k]]], dtype=np.int64
        )
        if len(asked):
            decide = self._in_both_orders if self.order == "both" else self._in_one_order
            score[asked], how[asked] = decide(row[asked], a[asked], b[asked], swapped[asked])
        halves = np.isin(how, ["tie", "same"]) if self.ties == "half" else (how == "tie") & (self.order == "both")
        by_coin = np.isnan(score) | (score == 0.5)
        won = np.where(by_coin, coin, score > 0.5)
        score = np.where(by_coin, np.where(halves, 0.5, won.astype(np.float64)), score)
        self.how += how.tolist()
        if self.asked >= FEWEST:
            self.check()
        return score, won

    @property
    def asked(self) -> int:
        """Matches that the judge was asked about."""
        return len(self.how) - self.how.count("same")

    @property
    def undecided(self) -> float:
        """Share of these that a coin decided for want of a verdict; ties that count as halves are verdicts."""
        count = Counter(self.how)
        lost = count["none"] + (count["tie"] if self.ties == "coin" and self.order == "random" else 0)
        return lost / self.asked if self.asked else 0.0

    def check(self) -> None:
        """Refuse a ranking that coins decided."""
        if self.undecided <= REFUSE:
            return
        count = Counter(self.how)
        way_out = (
            "--ties half counts a tie as half a win for each" if count["tie"] > count["none"] else "use another judge"
        )
        raise UsageError(
            f"the judge {self.judge.name} decided too few matches: of {self.asked} it was asked about, {count['tie']} "
            f"were ties and {count['none']} had no verdict (more than {REFUSE:.0%}): {way_out}"
        )

    def _in_one_order(
        self, row: Ints, a: Ints, b: Ints, swapped: npt.NDArray[np.bool_]
    ) -> tuple[Array, npt.NDArray[Any]]:
        """Each match shown once, and once more in the other order where that gave no winner."""
        score, how = self._ask(row, a, b, swapped), np.full(len(row), "judge", dtype=object)
        if not self.positions:
            how[score == 0.5], how[np.isnan(score)] = "tie", "none"
            return score, how
        self.first += [
            (int(prompt), bool((share == 1) != turned))
            for prompt, share, turned in zip(row, score, swapped, strict=True)
            if share in (0, 1)
        ]
        left = np.flatnonzero(np.isnan(score) | (score == 0.5))
        if len(left):
            second = self._ask(row[left], a[left], b[left], ~swapped[left])
            ties = (second == 0.5) | (np.isnan(second) & (score[left] == 0.5))
            how[left] = np.where(ties, "tie", np.where(np.isnan(second), "none", "again"))
            score[left] = np.where(ties, 0.5, second)
        return score, how

    def _in_both_orders(
        self, row: Ints, a: Ints, b: Ints, swapped: npt.NDArray[np.bool_]
    ) -> tuple[Array, npt.NDArray[Any]]:
        verdicts = self.judge.compare(*self._shown(row, a, b, np.zeros(len(row), dtype=bool)), self.meter)
        self.calls += 2 * len(row)
        score = np.array([np.nan if verdict.outcome is None else verdict.outcome for verdict in verdicts])
        return score, np.where(np.isnan(score), "none", np.where(score == 0.5, "tie", "judge")).astype(object)

    def _ask(self, row: Ints, a: Ints, b: Ints, swapped: npt.NDArray[np.bool_]) -> Array:
        """1 where a is preferred, 0 where b is, 1/2 for a tie, NaN without a verdict."""
        said = self.judge.prefer(*self._shown(row, a, b, swapped), self.meter)
        self.calls += len(row)
        p = np.array([np.nan if one.value is None else one.value for one in said])
        share = np.where(np.isnan(p), np.nan, (1 + np.sign(p - 0.5)) / 2)
        return np.where(swapped, 1 - share, share)

    def _shown(
        self, row: Ints, a: Ints, b: Ints, swapped: npt.NDArray[np.bool_]
    ) -> tuple[list[Prompt], list[str | None], list[str | None]]:
        first, second = np.where(swapped, b, a), np.where(swapped, a, b)
        return (
            [self.prompts[k] for k in row],
            [self.outputs[i][k] for i, k in zip(first, row, strict=True)],
            [self.outputs[i][k] for i, k in zip(second, row, strict=True)],
        )
