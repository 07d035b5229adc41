"""Shares and rates with intervals: exact where nothing or everything happened, Wilson's, Clopper and Pearson's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError
from trimtab.measure.stats import LEVEL, Interval, mean_interval

Z = 1.959963984540054  # of 95 %, two-sided


def rate(values: npt.ArrayLike, prompts: Sequence[int] | None = None) -> Interval:
    """The mean of shares in [0, 1] (NaN: dropped) with its interval (BCa); exact where all are 0 or all are 1.

    prompts: which prompt each share belongs to; None: every one is its own.
    """
    shares = np.asarray(values, dtype=np.float64)
    return exact_ends(mean_interval(shares, prompts), shares[~np.isnan(shares)])


def exact_ends(found: Interval, shares: npt.NDArray[np.float64]) -> Interval:
    """A bootstrap of equal values says nothing: Clopper-Pearson, a prompt being one trial, where all are 0 or all 1."""
    if found.low is not None or not len(shares) or shares[0] not in (0, 1) or (shares != shares[0]).any():
        return found
    bound = 1 - 0.025 ** (1 / found.prompts)
    low, high = (0.0, bound) if shares[0] == 0 else (1 - bound, 1.0)
    return Interval(found.mean, low, high, found.rows, found.prompts)


def wilson(events: float, trials: int) -> Interval:
    """A share of independent trials with Wilson's 95 % interval; no trial: undefined."""
    if not trials:
        return Interval(None, None, None)
    share = events / trials
    middle = share + Z**2 / (2 * trials)
    spread = Z * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    scale = 1 + Z**2 / trials
    return Interval(share, max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale), trials, trials)


def rate_bounds(events: int, trials: int, level: float = LEVEL) -> Interval:
    """A rate with its exact (Clopper-Pearson) interval; one-sided, and exact, where nothing or everything happened.

    No event in n trials: [0, `none_seen(n)`], so 0 in 300 is at most 0.99 %. All of n: the mirror image.
    """
    from scipy.stats import beta

    if trials < 1 or not 0 <= events <= trials:
        raise UsageError(f"a rate needs at least one trial and 0 to that many events, not {events} of {trials}")
    bound = none_seen(trials, level)
    if events == 0:
        return Interval(0.0, 0.0, bound, trials, trials)
    if events == trials:
        return Interval(1.0, 1 - bound, 1.0, trials, trials)
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, events, trials - events + 1))
    high = float(beta.ppf(1 - tail, events + 1, trials - events))
    return Interval(events / trials, low, high, trials, trials)


def none_seen(trials: int, level: float = LEVEL) -> float:
    """The upper bound (one-sided, exact) of a rate of which nothing was seen in n independent trials."""
    return 1.0 if trials < 1 else 1 - (1 - level) ** (1 / trials)
