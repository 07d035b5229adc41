"""`comparable` of one way to represent texts (a model's states, an untrained model's, TF-IDF) with its resamples.

The resamples of texts are the same for every representation: differences between two of them are paired.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError
from trimtab.measure import geometry
from trimtab.measure.geometry import Array
from trimtab.measure.labelled_texts import Numbers, Sample
from trimtab.measure.layer_pooling import even, learn
from trimtab.measure.measurement import Row
from trimtab.measure.states import States
from trimtab.measure.stats import LEVEL, Interval

ANYWHERE, UNIT = (-math.inf, math.inf), (0.0, 1.0)
RANGES = {
    "eta2": UNIT,
    "XBI": (0.0, math.inf),
    "CHI": (0.0, math.inf),
    "DBS": (0.0, math.inf),
    "silhouette": (-1.0, 1.0),
}


@dataclass
class Representation:
    """values, draws, left: `comparable` of every cell, of its resamples, and without each text in turn.

    curve: (layer, value, low, high) overall.

    gram [n, n] and x [n, D] are of the reported texts; they are not kept in a cache.
    """

    values: dict[str, float]
    draws: dict[str, list[float]]
    left: dict[str, list[float]] = field(default_factory=dict)
    curve: list[Sequence[float | None]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    gram: Array = field(default_factory=lambda: np.zeros((0, 0)))
    x: Array = field(default_factory=lambda: np.zeros((0, 0)))

    def to_dict(self) -> dict[str, Any]:
        kept = ("values", "draws", "left", "curve", "weights")
        return {name: getattr(self, name) for name in kept}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Representation:
        return cls(**data)


def of_states(states: States, config: Any, sample: Sample, counts: Array) -> Representation:
    """Of hidden states: overall and for each axiom with the layers' weights, and layer by layer."""
    z = np.load(states.folder / f"{config.pooling}.npy", mmap_mode="r")  # [n, L+1, D]
    if config.layers == "learned":
        weights = learn(z, sample.labels, sample.train)
    else:
        weights = even(states.layers, chosen_layers(config.layers, states.layers))
    out = _of_points(weights.pool(z, sample.rows), config, sample, counts)
    out.weights = weights.alpha.tolist()
    for layer in range(states.layers):
        gram = geometry.gram_of(states.pooled(config.pooling, layer)[sample.rows])
        value, draws = _comparable(gram, sample.shown, counts, config.gamma)
        found = around(value, draws, len(sample.rows), UNIT)
        out.curve.append((layer, found.mean, found.low, found.high))
    return out


def of_words(config: Any, sample: Sample, counts: Array) -> Representation:
    """Of TF-IDF vectors of the same texts, of words and signs (the weights need no labels: all texts give them)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]").fit_transform(sample.texts)
    return _of_points(vectors[sample.rows].toarray(), config, sample, counts)


def chosen_layers(text: str, layers: int) -> list[int]:
    """ "uniform", "last", "3" or "2-5" as numbers of layers, 0 to layers - 1."""
    last = layers - 1
    if text in ("uniform", "last"):
        return list(range(layers)) if text == "uniform" else [last]
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not found:
        raise UsageError(f"layers is learned, uniform, last, a number or a range such as 2-5, not {text!r}")
    low, high = int(found[1]), int(found[2] or found[1])
    if not low <= high <= last:
        raise UsageError(f"layers {text} do not exist: there are 0 (embeddings) to {last}")
    return list(range(low, high + 1))


def p_value(
    gram: Array, value: float, sample: Sample, at: Numbers, times: int, seed: int, gamma: float
) -> tuple[float, float]:
    """Of a cell: the share of permutations within axioms (the identity counted) that reach the value; their mean."""
    groups = [sample.axioms[sample.rows[i]] for i in at]
    shuffled = geometry.permuted(sample.shown[at], groups, times, seed)
    null = geometry.comparable(geometry.separation(gram[np.ix_(at, at)], *geometry.classes(shuffled)), gamma)
    return float((1 + (null >= value - 1e-12).sum()) / (1 + times)), float(null.mean())


def around(
    value: float,
    draws: npt.ArrayLike,
    n: int,
    within: tuple[float, float] = ANYWHERE,
    left: npt.ArrayLike | None = None,
) -> Interval:
    """value +- t (n - 2 degrees of freedom) standard deviations of its resamples; undefined where they do not vary.

    within: where the value can lie; the interval is cut there. left: the values without each text in turn; the jackknife's
    deviation is taken where it is larger, for with heavy tails the bootstrap's is too small.
    """
    from scipy.stats import t

    if not math.isfinite(value):
        return Interval(None, None, None, n, n)
    deviation = _deviation(draws, left)
    if deviation is None:
        return Interval(value, None, None, n, n)
    half = float(t.ppf(0.5 + LEVEL / 2, n - 2)) * deviation
    return Interval(value, max(within[0], value - half), min(within[1], value + half), n, n)


def normal_p(found: Interval, draws: npt.ArrayLike, left: npt.ArrayLike | None = None) -> float | None:
    """Two-sided p-value of a difference whose resamples deviate like the draws; not below what so many of them can tell."""
    deviation = _deviation(draws, left)
    if deviation is None or found.mean is None:
        return None
    from scipy.stats import t

    return max(1 / (1 + np.size(draws)), float(2 * t.sf(abs(found.mean) / deviation, found.prompts - 2)))


def raw_rows(model: Representation, sample: Sample, counts: Array, gamma: float) -> list[Row]:
    """The indices and the other composites, overall. Dunn, an extreme over pairs, has no bootstrap interval."""
    labels, n, distances = sample.shown, len(sample.rows), geometry.distances_of(model.gram)
    single, draws = (
        {
            **geometry.separation(model.gram, *w),
            "DBS": geometry.spread_over_gap(model.gram, *w),
            "silhouette": geometry.silhouette(distances, *w),
        }
        for w in (geometry.classes(labels), geometry.classes(labels, counts))
    )
    values = {name: float(value[0]) for name, value in single.items()} | {"Dunn": geometry.dunn(distances, labels)}
    out = []
    for name in RANGES:
        found = around(values[name], draws[name], n, RANGES[name])
        out.append(Row.of(name, found, "lower" if name in ("XBI", "DBS") else "higher"))
    for name, value in (("Dunn", values["Dunn"]), ("fuzzy XBI", geometry.fuzzy_xbi(model.x, labels))):
        found = Interval(value if math.isfinite(value) else None, None, None, n, n)
        out.append(Row.of(name, found, "lower" if name == "fuzzy XBI" else "higher"))
    rest = {name: value for name, value in geometry.composites(values, gamma).items() if name != "comparable"}
    return out + [Row(name, value, n=n, note="of this model and text set alone") for name, value in rest.items()]


def _of_points(x: Array, config: Any, sample: Sample, counts: Array) -> Representation:
    gram = geometry.gram_of(x)
    out = Representation({}, {}, gram=gram, x=x)
    for cell, at in sample.cells.items():
        value, draws = _comparable(gram[np.ix_(at, at)], sample.shown[at], counts[:, at], config.gamma)
        out.values[cell], out.draws[cell] = value, draws.tolist()
        out.left[cell] = left_out(gram[np.ix_(at, at)], sample.shown[at], config.gamma).tolist()
    return out


def _comparable(gram: Array, labels: Numbers, counts: Array, gamma: float) -> tuple[float, Array]:
    """`comparable`, and of every resample."""
    one, many = (geometry.separation(gram, *geometry.classes(labels, w)) for w in (None, counts))
    return float(geometry.comparable(one, gamma)[0]), geometry.comparable(many, gamma)


def left_out(gram: Array, labels: Numbers, gamma: float) -> Array:
    """`comparable` without each of the n texts in turn, [n]."""
    weights = 1.0 - np.eye(len(labels))
    return geometry.comparable(geometry.separation(gram, *geometry.classes(labels, weights)), gamma)


def _deviation(draws: npt.ArrayLike, left: npt.ArrayLike | None = None) -> float | None:
    """Of the resamples; with values without each unit, the jackknife's where that is larger (heavy tails)."""
    values = np.asarray(draws, dtype=np.float64)
    if not np.isfinite(values).all():
        return None
    deviation = float(values.std(ddof=1))
    if left is not None:
        without = np.asarray(left, dtype=np.float64)
        deviation = max(deviation, math.sqrt((len(without) - 1) * float(without.var())))
    return deviation if deviation > 1e-12 else None
