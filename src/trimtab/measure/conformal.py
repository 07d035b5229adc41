"""Which answers may be used without a look? Guarantees that hold for any score, however bad, on exchangeable data.

    split interval     |y - f(x)| of a new point is at most q with probability 1 - alpha or more, where q is the
                       ceil((n + 1)(1 - alpha))-th smallest residual of n calibration points
    selection          calibration scores G_i with the truth A_i (acceptable or not); for a new answer j
                       p_j = (1 + #{i: not acceptable, G_i >= G_j}) / (n + 1), and Benjamini-Hochberg at alpha over the
                       new answers: of those accepted an expected share of at most alpha is not acceptable

After "conformal alignment" (Gui, Jin and Ren, 2024). The promise is about the average over calibration sets, and breaks
where the new data come from elsewhere: `shifted` asks that of the scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError


def split_radius(residuals: npt.ArrayLike, alpha: float = 0.1) -> float:
    """The half width q of a prediction interval at level 1 - alpha, from the calibration residuals |y - f(x)|, [n].

    Infinite where n is too small to promise that much (n < 1 / alpha - 1).
    """
    values = np.sort(np.asarray(residuals, dtype=np.float64))
    _check(alpha, len(values))
    rank = math.ceil((len(values) + 1) * (1 - alpha))
    return math.inf if rank > len(values) else float(values[rank - 1])


def select(
    scores: npt.ArrayLike, calibration: npt.ArrayLike, acceptable: Sequence[bool], alpha: float = 0.1
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Which of the new answers are accepted, bool [m], and their p-values [m].

    scores [m], calibration [n]: larger is more likely acceptable; acceptable [n]: the truth of the calibration answers.
    """
    new, old = np.asarray(scores, dtype=np.float64), np.asarray(calibration, dtype=np.float64)
    truth = np.asarray(acceptable, dtype=bool)
    _check(alpha, len(old))
    if truth.shape != old.shape:
        raise UsageError(f"one truth a calibration score is needed: {len(old)} scores and {len(truth)} truths")
    if not (np.isfinite(new).all() and np.isfinite(old).all()):
        raise UsageError("selection needs a finite score of every answer: leave out those that could not be judged")
    bad = np.sort(old[~truth])
    p = (1 + len(bad) - np.searchsorted(bad, new, side="left")) / (len(old) + 1)
    return benjamini_hochberg(p, alpha), p


def benjamini_hochberg(p_values: npt.ArrayLike, alpha: float) -> npt.NDArray[np.bool_]:
    """Which hypotheses are rejected at a false-discovery rate of `alpha`, bool [m]."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    passed = np.nonzero(p[order] <= alpha * np.arange(1, len(p) + 1) / len(p))[0] if len(p) else np.array([])
    out = np.zeros(len(p), dtype=bool)
    if len(passed):
        out[order[: passed[-1] + 1]] = True
    return out


def shifted(scores: npt.ArrayLike, calibration: npt.ArrayLike) -> float:
    """The p-value of a two-sample test (Kolmogorov-Smirnov): a small one says that the promise does not hold here."""
    from scipy.stats import ks_2samp

    return float(ks_2samp(np.asarray(scores), np.asarray(calibration)).pvalue)


def _check(alpha: float, count: int) -> None:
    if not 0 < alpha < 1:
        raise UsageError(f"alpha lies between 0 and 1, not at {alpha}")
    if count < 1:
        raise UsageError("calibration needs at least one point")
