"""How far apart two classes of points are: DBS, Dunn, XBI, CHI, eta2, silhouette, and composites of them.

With centroids c_0, c_1 of n_0 + n_1 = n points, D2 = ||c_0 - c_1||^2 and, over points i of class k,

    SSW = sum ||x_i - c_k||^2       SSB = (n_0 n_1 / n) D2
    DBS = (s_0 + s_1) / sqrt(D2), s_k = mean ||x_i - c_k||                          lower is farther apart
    Dunn = smallest distance between the classes / largest within one               higher
    XBI = SSW / (n D2)                                                              lower
    CHI = SSB / (SSW / (n - 2))                                                     higher, grows with n
    eta2 = SSB / (SSB + SSW)                                                        higher, in [0, 1]
    silhouette = mean (b_i - a_i) / max(a_i, b_i)                                   higher, in [-1, 1]

CHI, XBI and eta2 are one number: CHI XBI = (n - 2) n_0 n_1 / n^2 and eta2 = CHI / (CHI + n - 2). Whatever labels the points
carry, the mean of eta2 over all ways to permute them is 1 / (n - 1).

Everything is computed from inner products, gram [n, n], and from how often each point is counted in either class, w_0 and
w_1 [B, n]: one call gives the statistic of B resamples or of B permutations. Cost: B n^2 operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
NOTHING = 1e-12  # of D2, relative to the mean squared distance from the centre: the classes have one centroid
COMPOSITES = ("comparable", "chi_xbi", "dbs_dunn", "ss_chi", "ss_xbi")


def gram_of(x: npt.ArrayLike) -> Array:
    """x [n, d] -> inner products [n, n] of the points about their mean, in units of the mean squared distance from it.

    Points that differ by no more than float32 rounding are one point: all 0.
    """
    points = np.asarray(x, dtype=np.float64)
    centred = points - points.mean(0)
    scale = float((centred**2).sum(1).mean())
    if scale <= NOTHING * float((points**2).sum(1).mean()):
        return np.zeros((len(points), len(points)))
    return np.asarray(centred @ centred.T / scale)


def distances_of(gram: Array) -> Array:
    """[n, n]"""
    squares = gram.diagonal()
    out = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * gram, 0.0))
    np.fill_diagonal(out, 0.0)
    return out


def classes(labels: npt.ArrayLike, counts: Array | None = None) -> tuple[Array, Array]:
    """Labels [n] or [B, n] of 0 and 1 -> w_0, w_1 [B, n]; counts [B, n]: how often each point is drawn."""
    one = np.atleast_2d(np.asarray(labels)).astype(np.float64)
    counts = np.ones_like(one) if counts is None else counts
    return (1 - one) * counts, one * counts


def separation(gram: Array, w_0: Array, w_1: Array) -> dict[str, Array]:
    """eta2, XBI and CHI, [B] each; XBI is infinite where the classes have one centroid."""
    n_0, n_1 = w_0.sum(1), w_1.sum(1)
    n = n_0 + n_1
    between, within = _scatter(gram, w_0 / n_0[:, None], w_1 / n_1[:, None])
    ssw = np.maximum(n_0 * within[0] + n_1 * within[1], 0.0)
    ssb = n_0 * n_1 / n * between
    apart = between >= NOTHING
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "eta2": np.where(apart, ssb / (ssb + ssw), 0.0),
            "XBI": np.where(apart, ssw / (n * between), np.inf),
            "CHI": np.where(apart, (n - 2) * ssb / ssw, 0.0),
        }


def spread_over_gap(gram: Array, w_0: Array, w_1: Array) -> Array:
    """DBS, [B]."""
    means = [w / w.sum(1, keepdims=True) for w in (w_0, w_1)]
    between, _ = _scatter(gram, *means)
    total = np.zeros(len(w_0))
    for mean in means:
        inner = mean @ gram  # <c_k, x_i>
        squares = gram.diagonal() - 2 * inner + (inner * mean).sum(1, keepdims=True)
        total += (mean * np.sqrt(np.maximum(squares, 0.0))).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(between >= NOTHING, total / np.sqrt(between), np.inf)


def silhouette(distances: Array, w_0: Array, w_1: Array) -> Array:
    """The mean silhouette, [B]; every class needs two points."""
    sums = [w @ distances for w in (w_0, w_1)]  # [B, n]: the summed distance from i to a class
    total = np.zeros(len(w_0))
    for own, other, w, v in ((0, 1, w_0, w_1), (1, 0, w_1, w_0)):
        a = sums[own] / (w.sum(1, keepdims=True) - 1)
        b = sums[other] / v.sum(1, keepdims=True)
        larger = np.maximum(a, b)
        total += (w * (b - a) / np.where(larger > 0, larger, 1.0)).sum(1)
    return total / (w_0.sum(1) + w_1.sum(1))


def dunn(distances: Array, labels: npt.ArrayLike) -> float:
    one = np.asarray(labels) == 1
    widest = max(float(distances[np.ix_(side, side)].max()) for side in (one, ~one))
    gap = float(distances[np.ix_(one, ~one)].min())
    return gap / widest if widest > 0 else (float("inf") if gap > 0 else 0.0)


def fuzzy_xbi(x: npt.ArrayLike, labels: npt.ArrayLike, fuzzifier: float = 2.0) -> float:
    """XBI with memberships u_ki = 1 / sum_j (d_ki / d_ji)^(2 / (m - 1)) about the classes' own centroids."""
    points, one = np.asarray(x, dtype=np.float64), np.asarray(labels) == 1
    centroids = np.stack([points[~one].mean(0), points[one].mean(0)])
    squares = np.maximum(((points[None] - centroids[:, None]) ** 2).sum(-1), np.finfo(float).tiny)  # [2, n]
    power = squares ** (-1 / (fuzzifier - 1))
    members = power / power.sum(0)
    gap = ((centroids[0] - centroids[1]) ** 2).sum()
    return float((members**fuzzifier * squares).sum() / (len(points) * gap)) if gap > 0 else float("inf")


def comparable(found: Mapping[str, Any], gamma: float = 0.5) -> Array:
    """gamma eta2 + (1 - gamma) / (1 + XBI): the one composite that n does not move. 0 where the classes coincide."""
    return gamma * np.asarray(found["eta2"]) + (1 - gamma) / (1 + np.asarray(found["XBI"]))


def composites(found: Mapping[str, float], gamma: float = 0.5) -> dict[str, float]:
    """All composites of single indices; higher is farther apart, each in [0, 1]."""
    chi, dbs, gap = (
        value / (1 + value) if np.isfinite(value) else 1.0 for value in (found["CHI"], found["DBS"], found["Dunn"])
    )
    score, xbi = (1 + found["silhouette"]) / 2, 1 / (1 + found["XBI"])
    return {
        "comparable": float(comparable(found, gamma)),
        "chi_xbi": gamma * chi + (1 - gamma) * xbi,
        "dbs_dunn": gamma * (1 - dbs) + (1 - gamma) * gap,
        "ss_chi": gamma * score + (1 - gamma) * chi,
        "ss_xbi": gamma * score + (1 - gamma) * xbi,
    }  # fmt: skip


def permuted(labels: npt.NDArray[np.int64], groups: Sequence[Any], times: int, seed: int) -> npt.NDArray[np.int64]:
    """[times, n]: the labels permuted within each group."""
    generator, out = np.random.default_rng(seed), np.tile(labels, (times, 1))
    for rows in _rows_of(groups):
        out[:, rows] = generator.permuted(out[:, rows], axis=1)
    return out


def resampled(groups: Sequence[Any], times: int, seed: int) -> Array:
    """[times, n]: how often each row is drawn when every group is resampled with replacement."""
    generator, out = np.random.default_rng(seed), np.zeros((times, len(groups)))
    for rows in _rows_of(groups):
        out[:, rows] = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), times)
    return out


def _scatter(gram: Array, mean_0: Array, mean_1: Array) -> tuple[Array, list[Array]]:
    """Of weights that sum to 1 in each row: ||c_0 - c_1||^2, and the mean squared distance from either centroid."""
    gap = mean_1 - mean_0
    between = np.maximum((gap @ gram * gap).sum(1), 0.0)
    within = [mean @ gram.diagonal() - (mean @ gram * mean).sum(1) for mean in (mean_0, mean_1)]
    return between, within


def _rows_of(groups: Sequence[Any]) -> list[npt.NDArray[np.int64]]:
    found: dict[Any, list[int]] = {}
    for row, group in enumerate(groups):
        found.setdefault(group, []).append(row)
    return [np.array(rows) for rows in found.values()]
