"""Do two sets of embeddings agree which item is which? Strict precision-at-1 in both directions, and its uncertainty.

aligned(C)[i] = C[i,i] > C[i,j] and C[i,i] > C[j,i] for every j != i. Under exchangeable similarities the diagonal must be
the largest of 2n - 1 numbers: chance is 1 / (2n - 1).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from trimtab.measure.rates import Z
from trimtab.measure.stats import Interval, paired_difference

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
TIE = 1e-12  # cosines this near are equal: rounding must not break a tie


def cosines(a: Array, b: Array) -> Array:
    """[n, D], [m, D] -> [n, m]; a vector of length 0 has cosine 0 with everything."""
    unit = [side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-30) for side in (a, b)]
    return np.asarray(unit[0] @ unit[1].T)


def centred(a: Array) -> Array:
    """The embeddings less their mean."""
    return np.asarray(a - a.mean(0))


def aligned(similarity: Array) -> Flags:
    """[..., n, n] -> [..., n]: whether the diagonal beats its row and its column, strictly."""
    n = similarity.shape[-1]
    rest = np.where(np.eye(n, dtype=bool), -np.inf, similarity)
    rivals = np.maximum(rest.max(-1), rest.max(-2))
    return np.asarray(np.diagonal(similarity, axis1=-2, axis2=-1) > rivals + TIE)


def chance_level(n: int) -> float:
    return 1 / (2 * n - 1)


def without_first(mean: Array, weighted: Array | None, first: Array, counts: npt.NDArray[np.int64]) -> Array:
    """Poolings of tokens 2..T from those of 1..T, [n, D]: the mean, or (weighted given) ranks 1..T-1.

    sum_t (t - 1) h_t = sum_t t h_t - sum_t h_t, so the weighted one needs no further pass over the tokens.
    """
    size = counts[:, None].astype(np.float64)
    if weighted is None:
        return np.asarray((size * mean - first) / (size - 1))
    return np.asarray(((size + 1) * weighted - 2 * mean) / (size - 1))


def pool(mu: Array, pooling: str) -> Array:
    """[..., layers] -> [...]"""
    return np.asarray(mu.mean(-1) if pooling == "mean" else mu.max(-1))


def subsampled(
    similarity: Array, m: int, draws: int, pooling: str, generator: np.random.Generator
) -> tuple[float, float | None, float | None]:
    """The pooled score of m of n items, [layers, n, n] -> (mean over draws, low, high).

    The delete-d jackknife: its variance is m / (n - m) times that of the draws. None where all draws agree.
    """
    n = similarity.shape[-1]
    values = []
    for _ in range(draws):
        some = np.sort(generator.choice(n, m, replace=False))
        values.append(float(pool(aligned(similarity[:, some[:, None], some]).mean(-1), pooling)))
    mean, error = float(np.mean(values)), math.sqrt(m / (n - m) * float(np.var(values, ddof=1)))
    if error == 0:
        return mean, None, None
    return mean, max(0.0, mean - Z * error), min(1.0, mean + Z * error)


def pooled_difference(
    first: Flags, second: Flags, pooling: Literal["mean", "max"], seed: int, resamples: int = 2000
) -> Interval:
    """The difference of pooled scores, [layers, n] each, resampling items (the candidates stay).

    BCa for the mean. For the best layer, which is chosen again in every draw, the percentile interval.
    """
    n = first.shape[1]
    if pooling == "mean":
        return paired_difference(first.mean(0), second.mean(0), seed=seed)
    value = float(first.mean(1).max() - second.mean(1).max())
    if len(first) == len(second) and bool((first == second).all()):
        return Interval(value, None, None, n, n)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) / n  # [R, n]
    draws = (weights @ first.T).max(1) - (weights @ second.T).max(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(value, float(low), float(high), n, n)
