"""Means, differences and win rates with intervals that respect how the rows were drawn.

Rows that answer the same prompt are not independent, so prompts (clusters), not rows, are resampled. The interval is
the bias-corrected and accelerated bootstrap (BCa; Efron 1987) of the pooled mean, with its levels widened for small
samples as Hesterberg (2015, "What teachers should know about the bootstrap") does for the percentile interval: the
normal quantile z becomes sqrt(C / (C - 1)) * t with C - 1 degrees of freedom. Without it few prompts cover too little.

A verdict needs the randomisation test besides (`swap_test`). Alone, the interval of a paired difference tells two equal
systems apart too often where few prompts differ (up to 10 % of the time), where differences have heavy tails (15 %), and
below six prompts (13 %; simulated in the tests).

Undefined is None: one prompt, or values that do not vary, have no interval (and not one of width 0). NaN in a score
means "could not judge"; such rows are dropped (in pairs), and `Interval.rows` counts those that remain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError

Array = npt.NDArray[np.float64]
Verdict = Literal["better", "worse", "undecided"]
RESAMPLES, LEVEL = 10_000, 0.95
ENUMERATED, SWAPS = 13, 9_999  # up to so many units all 2^n exchanges are counted; else so many are drawn


@dataclass(frozen=True)
class Interval:
    """A mean with its interval. None: undefined (no row; for the bounds also one prompt or no variance).

    rows, prompts: how many were judged and counted.
    """

    mean: float | None
    low: float | None
    high: float | None
    rows: int = 0
    prompts: int = 0

    def to_dict(self) -> dict[str, float | None]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class WinRate:
    """Share of rows won, ties counting half, with its interval; and the exact sign test over prompts.

    wins, ties and losses count rows. p_value: two-sided, over prompts whose net wins are not 0; None without any.
    """

    rate: Interval
    wins: int
    ties: int
    losses: int
    p_value: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean_interval(
    values: npt.ArrayLike,
    prompts: Sequence[int] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of `values` [N] (NaN or None: not judged, dropped) with its interval.

    prompts [N]: which prompt each row answers; None: every row is its own. The result depends on `seed` alone.
    """
    scores, clusters = _judged_rows(values, prompts)
    if not len(scores):
        return Interval(None, None, None)
    sums = np.asarray(np.bincount(clusters, weights=scores), dtype=np.float64)  # [C]
    counts = np.asarray(np.bincount(clusters), dtype=np.float64)  # [C]
    mean = float(sums.sum() / counts.sum())
    low, high = _bca(sums, counts, level, resamples, seed)
    return Interval(mean, low, high, len(scores), len(sums))


def paired_difference(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    prompts: Sequence[int] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """mean(a - b) with its interval; row i of both answers the same prompt. A row that either lacks is dropped."""
    first, second = _pair(a, b)
    return mean_interval(first - second, prompts, level=level, resamples=resamples, seed=seed)


def win_rate(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    prompts: Sequence[int] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> WinRate:
    """How often a beats b: (wins + ties / 2) / n over rows paired by prompt and sample.

    The sign test takes one sign a prompt (that of wins minus losses), because several samples of one prompt are not
    several independent trials.
    """
    first, second = _pair(a, b)
    sign, clusters = _judged_rows(np.sign(first - second), prompts)
    rate = mean_interval((sign + 1) / 2, list(clusters), level=level, resamples=resamples, seed=seed)
    net = np.bincount(clusters, weights=sign) if len(sign) else sign
    wins, ties, losses = (int((sign == outcome).sum()) for outcome in (1, 0, -1))
    return WinRate(rate, wins, ties, losses, sign_test(int((net > 0).sum()), int((net < 0).sum())))


def sign_test(wins: int, losses: int) -> float | None:
    """Exact two-sided binomial(1/2) p-value on non-ties; None where there is none."""
    if wins < 0 or losses < 0:
        raise UsageError(f"wins and losses must be 0 or more, not {wins} and {losses}")
    if wins + losses == 0:
        return None
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses, 0.5).pvalue)


def swap_test(differences: npt.ArrayLike, prompts: Sequence[int] | None = None, *, seed: int = 0) -> float | None:
    """Two-sided p-value of the mean difference if the two systems were one: exchanged, prompt by prompt, at random.

    differences [N] (NaN: dropped); prompts [N]: which prompt each row answers. Exact for any distribution of scores (on
    differences of -1, 0 and 1 it is the sign test); with five prompts or fewer it cannot fall below 5 %. None: no row.
    """
    scores, clusters = _judged_rows(differences, prompts)
    if not len(scores):
        return None
    sums = np.asarray(np.bincount(clusters, weights=scores), dtype=np.float64)
    sums = sums[np.abs(sums) > 1e-12 * np.abs(sums).max()]  # a prompt without a difference weighs nothing
    size = len(sums)
    least = abs(float(sums.sum())) - 1e-9 * float(np.abs(sums).sum())
    if size <= ENUMERATED:
        signs = 1 - 2 * (np.arange(2**size)[:, None] >> np.arange(size) & 1)  # [2^size, size]
        return float((np.abs(signs @ sums) >= least).mean())
    generator, found = np.random.default_rng(seed), 1  # the order as it is counts too
    for start in range(0, SWAPS, chunk := max(1, 1_000_000 // size)):
        flipped = generator.integers(0, 2, (min(chunk, SWAPS - start), size), dtype=np.int8)
        found += int((np.abs(sums.sum() - 2 * (flipped @ sums)) >= least).sum())
    return found / (1 + SWAPS)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjusted p-values, in the given order. None (no test) stays None and is not counted."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    out: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        if not 0 <= p <= 1:
            raise UsageError(f"a p-value lies in [0, 1], not {p}")
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        out[i] = highest
    return out


def verdict(difference: Interval, p_value: float | None = None) -> Verdict:
    """Of policy - base: "better", "worse" where the interval lies above, below 0, else "undecided".

    p_value: of an exact test over prompts (`swap_test`, `sign_test`), which must be at most 1 - LEVEL too. It decides alone
    where every prompt differs by the same amount and no interval is defined: from never to always is no doubtful change.
    """
    if p_value is not None and p_value > 1 - LEVEL:
        return "undecided"
    if difference.low is None or difference.high is None:
        if p_value is None or not difference.mean:
            return "undecided"
        return "better" if difference.mean > 0 else "worse"
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "undecided"


def prompts_needed(effect: float, deviation: float, *, level: float = LEVEL, power: float = 0.8) -> int | None:
    """How many prompts show a mean difference of `effect` at this power, where differences per prompt deviate by
    `deviation`. None where either is 0 or unknown (NaN)."""
    from scipy.stats import norm

    if not effect or not deviation or math.isnan(effect) or math.isnan(deviation):
        return None
    z = norm.ppf(0.5 + level / 2) + norm.ppf(power)
    return math.ceil((z * deviation / effect) ** 2)


def _bca(sums: Array, counts: Array, level: float, resamples: int, seed: int) -> tuple[float | None, float | None]:
    """The BCa interval of sum(sums) / sum(counts), resampling the C clusters."""
    from scipy.stats import norm, t

    size = len(sums)
    if size < 2 or np.ptp(sums / counts) <= 1e-12 * np.abs(sums / counts).max():
        return None, None
    mean = sums.sum() / counts.sum()
    draws = _resample(sums, counts, resamples, seed)  # [R]
    below = (np.count_nonzero(draws < mean) + np.count_nonzero(draws == mean) / 2) / resamples
    bias = norm.ppf(np.clip(below, 1 / resamples, 1 - 1 / resamples))
    left_out = (sums.sum() - sums) / (counts.sum() - counts)  # [C], the jackknife
    centred = left_out.mean() - left_out
    spread = (centred**2).sum() ** 1.5
    acceleration = (centred**3).sum() / (6 * spread) if spread > 0 else 0.0
    tail = math.sqrt(size / (size - 1)) * t.ppf(0.5 + level / 2, size - 1)
    quantiles = []
    for z in (bias - tail, bias + tail):
        scale = 1 - acceleration * z
        quantiles.append(norm.cdf(bias + z / scale) if scale > 0 else (0.0 if z < 0 else 1.0))
    low, high = np.quantile(draws, quantiles)
    return float(low), float(high)


def _resample(sums: Array, counts: Array, resamples: int, seed: int) -> Array:
    """Pooled means of `resamples` draws of C clusters with replacement, [R], about 16 MB at a time."""
    generator = np.random.default_rng(seed)
    size = len(sums)
    chunk = max(1, 1_000_000 // size)
    out = np.empty(resamples)
    equal = bool((counts == counts[0]).all())
    for start in range(0, resamples, chunk):
        picks = generator.integers(0, size, (min(chunk, resamples - start), size))  # [r, C]
        total = size * counts[0] if equal else counts[picks].sum(1)
        out[start : start + len(picks)] = sums[picks].sum(1) / total
    return out


def _pair(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[Array, Array]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise UsageError(f"paired scores need one row each a prompt and sample; got {first.shape} and {second.shape}")
    return first, second


def _judged_rows(values: npt.ArrayLike, prompts: Sequence[int] | None) -> tuple[Array, npt.NDArray[np.int64]]:
    """The scores that are not NaN, and their prompts renumbered 0..C-1."""
    scores = np.asarray(values, dtype=np.float64)
    clusters = np.arange(len(scores)) if prompts is None else np.asarray(prompts)
    if scores.ndim != 1 or clusters.shape != scores.shape:
        raise UsageError(f"one prompt index a score is needed; got {scores.shape} scores and {clusters.shape} indices")
    if np.isinf(scores).any():
        raise UsageError("infinite scores have no mean")
    keep = ~np.isnan(scores)
    return scores[keep], np.unique(clusters[keep], return_inverse=True)[1].astype(np.int64)
