"""One vector a text from all its layers: x_i = sum_l alpha_l z_l(i) / s_l, with alpha >= 0 and sum alpha = 1.

The scale s_l is the root mean squared distance of z_l from its mean, so that no layer wins by its norm. The weights:

    maximise over the simplex   eta2(alpha) = alpha' B alpha / alpha' (B + W) alpha
    B_lm = (n_0 n_1 / n) <d_l, d_m>, with d_l the gap between the classes' centroids in layer l
    W_lm = sum over texts of <z_l(i) - its class's centroid, z_m(i) - its class's centroid>

by gradient steps, each projected onto the simplex (sparsemax: most layers get exactly 0), from the uniform weights and
from every single layer. Mixing many layers fits noise, so the mixture is kept only if it beats the best single layer
on held-out halves of the same texts. No pair of texts is formed.

Departure. AQI's objective is remembered as the mean over unlike pairs of max(0, 1 - ||x_i - x_j||)^2 plus beta times
the mean squared distance of like pairs, after dividing every layer by its mean norm. Where a layer has no common mean,
unlike pairs are then sqrt(2) apart whether they are separable or not: the first term is 0, and the second mixes layers
until distances shrink. Where one layer of 6 to 33 parted planted classes it gave that layer a weight of 0.0 to 0.6;
the ratio gives it 1.0. The ratio asks for the same (unlike pairs far, like pairs near) without a margin or a scale.
Spread replaces the mean norm because a constant direction of huge norm, which real models have, would silence its
layer.

Shapes: z [n, L+1, D], in memory or mapped; it is read a few texts at a time. Cost: n (L+1)^2 D operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
STEPS, STEP_SIZE = 300, 0.1
TEXTS = 32  # read together


@dataclass(frozen=True)
class LayerWeights:
    """alpha [L+1] sums to 1; scale [L+1] divides each layer (infinite where a layer is the same for all texts)."""

    alpha: Array
    scale: Array

    def pool(self, z: Any, rows: Rows) -> Array:
        """x [len(rows), D]"""
        weights = self.alpha / self.scale
        return np.concatenate([np.einsum("l,nld->nd", weights, part) for _, part in _parts(z, rows)])


def learn(z: Any, labels: npt.NDArray[np.int64], rows: Rows) -> LayerWeights:
    """The weights that part the classes of z[rows] best; labels [n] of all texts, 0 and 1."""
    between, within, scale = scatter(z, labels, rows)
    mixture = best_mixture(between, between + within)
    single = best_layer(between, between + within)
    halves = [np.concatenate([rows[labels[rows] == k][part::2] for k in (0, 1)]) for part in (0, 1)]
    parts = [scatter(z, labels, half, scale) for half in halves]
    gain = 0.0
    for (b, w, _), (b_other, w_other, _) in ((parts[0], parts[1]), (parts[1], parts[0])):
        found, one = best_mixture(b, b + w), best_layer(b, b + w)
        gain += ratio(found, b_other, b_other + w_other) - ratio(one, b_other, b_other + w_other)
    return LayerWeights(mixture if gain > 0 else single, scale)


def even(layers: int, chosen: list[int]) -> LayerWeights:
    """The plain mean of the chosen layers."""
    alpha = np.zeros(layers)
    alpha[chosen] = 1 / len(chosen)
    return LayerWeights(alpha, np.ones(layers))


def scatter(
    z: Any, labels: npt.NDArray[np.int64], rows: Rows, scale: Array | None = None
) -> tuple[Array, Array, Array]:
    """B and W [L+1, L+1] of the scaled layers, and the scale [L+1] (found on these rows unless given)."""
    sums = np.zeros((2, *z.shape[1:]))
    for part, values in _parts(z, rows):
        for k in (0, 1):
            sums[k] += values[labels[part] == k].sum(0)
    counts = np.bincount(labels[rows], minlength=2)
    centroids = sums / counts[:, None, None]
    gap = centroids[1] - centroids[0]  # [L+1, D]
    within = np.zeros((z.shape[1], z.shape[1]))
    for part, values in _parts(z, rows):
        centred = values - centroids[labels[part]]
        within += np.einsum("nld,nmd->lm", centred, centred, optimize=True)
    between = counts[0] * counts[1] / len(rows) * gap @ gap.T
    if scale is None:
        spread = np.sqrt((between + within).diagonal() / len(rows))
        scale = np.where(spread > 1e-6 * np.sqrt((centroids**2).sum(-1).mean(0)), spread, np.inf)
    return between / np.outer(scale, scale), within / np.outer(scale, scale), scale


def best_mixture(between: Array, total: Array) -> Array:
    """The alpha on the simplex that maximises alpha' B alpha / alpha' T alpha."""
    size = len(between)
    alpha = np.vstack([np.full(size, 1 / size), np.eye(size)])  # [starts, L+1]
    best, value = alpha[0], -1.0
    for step in range(STEPS + 1):
        above, below = alpha @ between, alpha @ total
        bottom = np.maximum((below * alpha).sum(1), 1e-12)
        reached = (above * alpha).sum(1) / bottom
        if reached.max() > value:
            best, value = alpha[int(reached.argmax())], float(reached.max())
        slope = 2 * (above - reached[:, None] * below) / bottom[:, None]
        length = np.abs(slope).max(1, keepdims=True)
        rate = STEP_SIZE * (1 - step / (STEPS + 1))
        alpha = sparsemax(alpha + rate * slope / np.where(length > 0, length, 1.0))
    return best


def best_layer(between: Array, total: Array) -> Array:
    """The single layer, as weights, that maximises the same."""
    one: Array = np.eye(len(between))
    return one[int(np.argmax([ratio(alpha, between, total) for alpha in one]))]


def ratio(alpha: Array, between: Array, total: Array) -> float:
    """alpha' B alpha / alpha' T alpha, in [0, 1]; 0 where nothing varies."""
    bottom = alpha @ total @ alpha
    return float(alpha @ between @ alpha / bottom) if bottom > 1e-12 else 0.0


def sparsemax(scores: npt.ArrayLike) -> Array:
    """The nearest point of the simplex to each row, [..., K] (Martins and Astudillo 2016)."""
    values = np.asarray(scores, dtype=np.float64)
    ordered = -np.sort(-values, axis=-1)
    excess = np.cumsum(ordered, axis=-1) - 1
    count = np.arange(1, values.shape[-1] + 1)
    kept = (ordered * count > excess).sum(-1, keepdims=True)
    threshold = np.take_along_axis(excess, kept - 1, axis=-1) / kept
    return np.maximum(values - threshold, 0.0)


def _parts(z: Any, rows: Rows) -> Iterator[tuple[Rows, Array]]:
    for first in range(0, len(rows), TEXTS):
        part = rows[first : first + TEXTS]
        yield part, np.asarray(z[part], dtype=np.float64)
