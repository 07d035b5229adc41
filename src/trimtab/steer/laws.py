"""The two laws of steering with a constant vector, and their fits: gain is a tanh of the strength, loss its square.

Wolf et al., arXiv 2401.16332; the closed forms below are exact under the stated models.
    behaviour   B(c) = E[B] with answers +1 and -1. If steering moves every +/- logit gap by 2 Delta c, then
                B(c) = tanh(Delta c + artanh B(0)): slope Delta (1 - B(0)^2) at 0, saturating at 1.
    capability  p(c) = P(right answer). If the logits of the wrong answers relative to the right one move by c x with
                x ~ N(0, sigma^2) over a large vocabulary, p(c) = p0 / (p0 + (1 - p0) exp(c^2 sigma^2 / 2))
                = p0 - p0 (1 - p0) sigma^2 c^2 / 2 + O(c^4).
So a small enough strength always gains more than it loses. On one question the linear term of p need not vanish:
average over questions and over both signs of c (`symmetrised`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError
from trimtab.measure.stats import Interval, mean_interval

Array = npt.NDArray[np.float64]
RESAMPLES = 500


def behaviour_law(strengths: npt.ArrayLike, delta: float, start: float) -> Array:
    """tanh(delta c + artanh(start)): expected behaviour in (-1, 1)."""
    return np.asarray(np.tanh(delta * np.asarray(strengths, dtype=np.float64) + np.arctanh(start)))


def capability_law(strengths: npt.ArrayLike, p0: float, sigma: float) -> Array:
    """p0 / (p0 + (1 - p0) exp(c^2 sigma^2 / 2)): probability of the right answer."""
    c = np.asarray(strengths, dtype=np.float64)
    return np.asarray(p0 / (p0 + (1 - p0) * np.exp(c**2 * sigma**2 / 2)))


@dataclass(frozen=True)
class TanhFit:
    """delta per unit of strength with its bootstrap interval over prompts, start = B(0), r2 of the fit to the mean."""

    delta: Interval
    start: float
    r2: float


@dataclass(frozen=True)
class QuadraticFit:
    """a + k1 c + k2 c^2 on |c| <= c_max, with intervals over prompts; r2 of the fit to the mean."""

    a: float
    k1: Interval
    k2: Interval
    c_max: float
    r2: float


def fit_behaviour(strengths: npt.ArrayLike, behaviour: npt.ArrayLike, seed: int = 0) -> TanhFit:
    """Least squares of the tanh law. behaviour [S] or [S, P] in [-1, 1], per strength (and prompt)."""
    c, values = _table(strengths, behaviour)
    if values.min() < -1 or values.max() > 1:
        raise UsageError("behaviour must lie in [-1, 1]")
    mean = values.mean(1)
    delta, start = _tanh(c, mean)
    prompts = values.shape[1]
    low = high = None
    if prompts > 1:
        generator = np.random.default_rng(seed)
        draws = [_tanh(c, values[:, generator.integers(0, prompts, prompts)].mean(1), (delta, start))[0]
                 for _ in range(RESAMPLES)]  # fmt: skip
        low, high = (float(q) for q in np.quantile(draws, (0.025, 0.975)))
    r2 = _r2(mean, behaviour_law(c, delta, start))
    return TanhFit(Interval(delta, low, high, values.size, prompts), start, r2)


def fit_quadratic(
    strengths: npt.ArrayLike, values: npt.ArrayLike, c_max: float | None = None, symmetric: bool = False, seed: int = 0
) -> QuadraticFit:
    """Least squares of a + k1 c + k2 c^2. values [S] or [S, Q], per strength (and question).

    c_max: the range |c| <= c_max that is used; None: the largest one on which the quadratic's adjusted R^2 beats the
    straight line's. symmetric: average over both signs first (then k1 is 0 by construction). The fit is linear in the
    values, so the interval of a coefficient is that of a mean over questions.
    """
    c, table = _table(strengths, values)
    if symmetric:
        c, table = symmetrised(c, table)
    mean = table.mean(1)
    if c_max is None:
        c_max = _range(c, mean)
    inside = np.abs(c) <= c_max + 1e-12
    if len(np.unique(np.abs(c[inside]) if symmetric else c[inside])) < 3:
        raise UsageError(f"a quadratic needs at least 3 strengths with |c| <= {c_max:g}")
    powers = (0, 2) if symmetric else (0, 1, 2)
    solve = np.linalg.pinv(np.stack([c[inside] ** power for power in powers], 1))  # [powers, S]
    each = solve @ table[inside]  # [powers, Q]
    a, k2 = float(each[0].mean()), mean_interval(each[-1], seed=seed)
    k1 = Interval(0.0, None, None) if symmetric else mean_interval(each[1], seed=seed)
    fitted = a + (k1.mean or 0.0) * c[inside] + (k2.mean or 0.0) * c[inside] ** 2
    return QuadraticFit(a, k1, k2, float(c_max), _r2(mean[inside], fitted))


def symmetrised(strengths: npt.ArrayLike, values: npt.ArrayLike) -> tuple[Array, Array]:
    """|c| [S'] and (values(c) + values(-c)) / 2, for the strengths that were measured at both signs (and 0)."""
    c, table = _table(strengths, values)
    at = {round(float(x), 9): i for i, x in enumerate(c)}
    both = sorted(x for x in at if x >= 0 and -x in at)
    if len(both) < 2:
        raise UsageError("to average over both signs, measure each strength at both")
    return np.array(both), np.stack([(table[at[x]] + table[at[-x]]) / 2 for x in both])


def _table(strengths: npt.ArrayLike, values: npt.ArrayLike) -> tuple[Array, Array]:
    """Strengths [S] in increasing order, values [S, Q] likewise."""
    c, table = np.asarray(strengths, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if table.ndim == 1:
        table = table[:, None]
    if c.ndim != 1 or table.ndim != 2 or len(c) != len(table) or len(c) < 3:
        raise UsageError(
            f"at least 3 strengths with one row of values each are needed, not {c.shape} and {table.shape}"
        )
    if len(np.unique(c)) != len(c) or not np.isfinite(c).all() or not np.isfinite(table).all():
        raise UsageError("strengths must differ, and strengths and values be finite")
    order = np.argsort(c)
    return c[order], table[order]


def _tanh(c: Array, mean: Array, guess: tuple[float, float] | None = None) -> tuple[float, float]:
    """(delta, start) by least squares; the offset is fitted as artanh(start), so that |start| < 1."""
    from scipy.optimize import least_squares

    inner = np.arctanh(np.clip(mean, -0.999, 0.999))
    slope = float(np.polyfit(c, inner, 1)[0])
    first = (slope, float(np.interp(0, c, inner))) if guess is None else (guess[0], float(np.arctanh(guess[1])))
    found: Any = least_squares(
        lambda x: np.tanh(x[0] * c + x[1]) - mean, first, xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=200
    )
    return float(found.x[0]), float(np.tanh(found.x[1]))


def _range(c: Array, mean: Array) -> float:
    """The largest c_max on which a quadratic explains the mean better than a line, by adjusted R^2."""
    for c_max in sorted({float(x) for x in np.abs(c)}, reverse=True):
        inside = np.abs(c) <= c_max
        size = int(inside.sum())
        if size < 4:
            break
        x, y = c[inside], mean[inside]
        scores = [
            1 - (1 - _r2(y, np.asarray(np.polyval(np.polyfit(x, y, n), x), float))) * (size - 1) / (size - n - 1)
            for n in (1, 2)
        ]
        if scores[1] > scores[0]:
            return c_max
    raise UsageError("no range of strengths shows a curve: give more strengths, or larger ones")


def _r2(values: Array, fitted: Array) -> float:
    total = float(((values - values.mean()) ** 2).sum())
    left = float(((values - fitted) ** 2).sum())
    return 1 - left / total if total > 0 else float(left <= 1e-24)
