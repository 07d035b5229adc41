"""What the report works out from samples and sweeps: fronts, paired differences, over-optimisation, wins, picks.

Pure functions over the rows of compare.json, samples.jsonl and sweep.json. Differences and intervals are those of
`trimtab.measure.stats`, with its fixed seed: the verdicts of the table, and the same bytes for the same run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.measure import stats


def number(value: Any) -> float | None:
    """The value as a finite float; the mean of a {"mean", ...} record; None for anything else, NaN and infinity too."""
    if isinstance(value, dict):
        value = value.get("mean")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; `low` and `high` are None where no interval is known (one prompt, say)."""

    mean: float
    low: float | None = None
    high: float | None = None

    @staticmethod
    def read(record: Any) -> Estimate | None:
        """From {"mean", "low", "high"} or a bare number; None where there is no mean."""
        mean = number(record)
        if mean is None:
            return None
        low, high = (number(record.get(end)) for end in ("low", "high")) if isinstance(record, dict) else (None, None)
        return Estimate(mean, low, high) if low is not None and high is not None else Estimate(mean)

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)

    def clearly_above(self, other: Estimate) -> bool:
        """Each interval excludes the other's mean. False where an interval is missing."""
        return self.low is not None and other.high is not None and self.low > other.mean and self.mean > other.high


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices, in order of cost, of the (cost, value) points that no other point beats.

    To beat is to cost no more and be worth no less, one of them strictly. Equal points are all on the front or all off.
    """

    def beaten(cost: float, value: float) -> bool:
        return any(c <= cost and v >= value and (c < cost or v > value) for c, v in points)

    return sorted((i for i, point in enumerate(points) if not beaten(*point)), key=lambda i: (*points[i], i))


@dataclass(frozen=True)
class OverOptimisation:
    """Where gold stops rising, the proxy not. `state`: starts | undecided | not seen | no gold | too few points."""

    state: str
    index: int | None = None
    sentence: str = ""


def over_optimisation(proxy: Sequence[Estimate], gold: Sequence[Estimate | None]) -> OverOptimisation:
    """Reads a sweep in order of strength.

    The candidate is the first point of highest mean gold. `starts`: at some later point the proxy is clearly higher and
    gold clearly lower (each interval excludes the other's mean). `undecided`: the proxy goes on rising and gold does
    not, but one of the two differences lies within its intervals. `not seen`: gold is highest at the last point, or the
    proxy stops too.
    """
    golds = [g for g in gold if g is not None]
    if len(golds) < len(gold) or not golds:
        return OverOptimisation("no gold", sentence="no gold reward was measured, so over-optimisation cannot be seen")
    if len(golds) < 3:
        return OverOptimisation("too few points", sentence="fewer than three strengths: too few to see a turning point")
    at = max(range(len(golds)), key=lambda i: (golds[i].mean, -i))
    later = range(at + 1, len(golds))
    for j in later:
        if proxy[j].clearly_above(proxy[at]) and golds[at].clearly_above(golds[j]):
            return OverOptimisation(
                "starts", at, "beyond this point the proxy rises and gold falls, both outside their intervals"
            )
    if any(proxy[j].mean > proxy[at].mean for j in later):
        return OverOptimisation(
            "undecided", at, "gold rises no further while the proxy does, but within the intervals: undecided"
        )
    return OverOptimisation("not seen", sentence="over-optimisation is not seen in this range")


Row = dict[str, Any]
Pair = tuple[Row, Row]  # (base answer, method's answer) to the same prompt and sample number


def pair_rows(samples: Sequence[Row], base: str, method: str) -> list[Pair]:
    """Answers of both policies to the same (prompt, sample), in that order; a row that only one has is left out."""
    first = {(row["prompt_index"], row["sample"]): row for row in samples if row["policy"] == base}
    second = {(row["prompt_index"], row["sample"]): row for row in samples if row["policy"] == method}
    return [(first[key], second[key]) for key in sorted(first.keys() & second.keys())]


def paired_difference(pairs: Sequence[Pair], key: str) -> Estimate | None:
    """Mean of method - base of `key` with its interval, paired and clustered by prompt as in compare.json."""
    found = stats.paired_difference(
        [math.nan if (value := number(row.get(key))) is None else value for _, row in pairs],
        [math.nan if (value := number(row.get(key))) is None else value for row, _ in pairs],
        [row["prompt_index"] for row, _ in pairs],
    )
    return None if found.mean is None else Estimate(found.mean, found.low, found.high)


@dataclass(frozen=True)
class GoodRule:
    """What counts as a good answer: `key` >= threshold (gold), or > threshold (reward above the base's median)."""

    key: str
    threshold: float
    sentence: str

    @staticmethod
    def choose(samples: Sequence[Row], base: str) -> GoodRule:
        if any(number(row.get("gold")) is not None for row in samples):
            return GoodRule("gold", 0.5, "an answer is good when its gold reward is at least 0.5")
        rewards = sorted(r for row in samples if row["policy"] == base and (r := number(row.get("reward"))) is not None)
        median = float(np.median(rewards)) if rewards else 0.0
        return GoodRule(
            "reward",
            median,
            f"an answer is good when its reward is above the base's median, {median:.3f} (no gold here)",
        )

    def good(self, row: Row) -> bool | None:
        value = number(row.get(self.key))
        if value is None:
            return None
        return value >= self.threshold if self.key == "gold" else value > self.threshold

    def quadrant(self, pair: Pair) -> str:
        """both | base | method | neither, or unjudged where one of the two has no score."""
        base, method = self.good(pair[0]), self.good(pair[1])
        if base is None or method is None:
            return "unjudged"
        return {(True, True): "both", (True, False): "base", (False, True): "method", (False, False): "neither"}[
            base, method
        ]


def net_wins(pairs: Sequence[Pair], rule: GoodRule) -> Estimate | None:
    """Share of answers that only the method gets right minus the share that only the base does, in [-1, 1]."""
    worth = {"method": 1.0, "base": -1.0, "both": 0.0, "neither": 0.0}
    judged = [pair for pair in pairs if rule.quadrant(pair) in worth]
    values = [worth[rule.quadrant(pair)] for pair in judged]
    found = stats.mean_interval(values, [pair[0]["prompt_index"] for pair in judged])
    return None if found.mean is None else Estimate(found.mean, found.low, found.high)


PICK_RULE = (
    "Picked by rule, not by hand: rows are ordered by the difference in reward (method minus base); shown are the "
    "median, the worst regression, and one drawn at random from a fixed seed. Ties go to the earlier prompt."
)


def picks(pairs: Sequence[Pair], seed: int) -> list[tuple[str, Pair]]:
    """Median improvement, worst regression, random: up to three different rows, each with why it is here."""

    def difference(i: int) -> float:
        a, b = number(pairs[i][0].get("reward")), number(pairs[i][1].get("reward"))
        return 0.0 if a is None or b is None else b - a

    judged = [
        i
        for i, (a, b) in enumerate(pairs)
        if number(a.get("reward")) is not None and number(b.get("reward")) is not None
    ]
    order = sorted(judged, key=lambda i: (difference(i), i))
    chosen: list[tuple[str, int]] = []
    if order:
        chosen.append(("median improvement", order[(len(order) - 1) // 2]))
        chosen.append(
            ("worst regression" if difference(order[0]) < 0 else "smallest improvement (no regression)", order[0])
        )
    taken = {i for _, i in chosen}
    rest = [i for i in range(len(pairs)) if i not in taken]
    if rest:
        digest = hashlib.sha256(f"trimtab report {seed}".encode()).digest()
        chosen.append(("random", rest[int.from_bytes(digest[:8], "big") % len(rest)]))
    unique: dict[int, str] = {}
    for why, i in chosen:
        unique[i] = f"{unique[i]} and {why}" if i in unique else why
    return [(why, pairs[i]) for i, why in unique.items()]


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Pearson's r; None for fewer than three pairs or a constant."""
    if len(xs) < 3 or np.std(xs) == 0 or np.std(ys) == 0:
        return None
    return float(np.corrcoef(xs, ys)[0, 1])
