"""Correlations with Fisher's interval: tanh(atanh r -+ z s), s = 1 / sqrt(n - 3).

For Spearman s^2 grows by the factor 1 + r^2 / 2 (Bonett and Wright 2000). None: undefined, where one side does not vary
or (the bounds) there are fewer than four pairs or the correlation is perfect.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from trimtab.measure.rates import Z

Correlation = tuple[float | None, float | None, float | None]


def pearson(a: npt.ArrayLike, b: npt.ArrayLike) -> Correlation:
    """(r, low, high)."""
    return _fisher(_r(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)), np.size(a), False)


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> Correlation:
    """(rho, low, high): Pearson of ranks, ties at their mean rank."""
    from scipy.stats import rankdata

    return _fisher(_r(rankdata(a), rankdata(b)), np.size(a), True)


def _r(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float | None:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.clip(np.corrcoef(a, b)[0, 1], -1.0, 1.0))


def _fisher(r: float | None, n: int, ranks: bool) -> Correlation:
    if r is None or n < 4 or abs(r) > 1 - 1e-12:
        return r, None, None
    error = math.sqrt((1 + r**2 / 2 if ranks else 1.0) / (n - 3))
    return r, math.tanh(math.atanh(r) - Z * error), math.tanh(math.atanh(r) + Z * error)
