"""Shares and rates with intervals: exact where nothing or everything happened, Wilson's, Clopper and Pearson's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError
from trimtab.measure.stats import LEVEL, Interval, mean_interval

Z = 1.959963984540054  # of 95 %, two-sided


def rate(values: Sequence[float] | npt.NDArray[np.float64]) -> Interval:
    """The mean of shares in [0, 1], one a unit, with its interval (BCa); exact where all are 0 or all are 1."""
    shares = np.asarray(values, dtype=np.float64)
    found = mean_interval(shares)
    if found.low is None and len(shares) and (shares == shares[0]).all() and shares[0] in (0, 1):
        bound = 1 - 0.025 ** (1 / len(shares))
        low, high = (0.0, bound) if shares[0] == 0 else (1 - bound, 1.0)
        return Interval(found.mean, low, high, found.rows, found.prompts)
    return found


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
