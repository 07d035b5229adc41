"""A layer under PA-CCS: its reading beside its controls, and all layers as a table and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.measure.measurement import Better, Figure, Line, Lines, Row
from trimtab.measure.polarity import Array, Reading, Split, correct, orientation
from trimtab.measure.rates import rate
from trimtab.measure.stats import Interval, mean_interval

DIRECTIONS = 100
ROUNDING = 1e-7  # of float32: differences below it are none
BETTER: dict[str, Better] = {"ESA": "higher", "polar accuracy": "higher", "|PC|": "lower", "contradictory": "lower",
                             "CI": "lower"}  # fmt: skip
CONSISTENCY = ("PC", "|PC|", "contradictory", "CI")


@dataclass(frozen=True)
class Controls:
    """Of one layer: ESA of random directions (interval: 95 % of them) and of labels; silhouette of x1 - x0 by label."""

    random: Interval
    supervised: Interval
    silhouette: float | None


@dataclass
class Layer:
    """reading: of CCS; mixed: of CCS trained on shuffled pairing; masked: with "not" masked; halves: |cosine| of probes
    trained on the harmful and on the safe statements alone."""

    reading: Reading
    controls: Controls
    mixed: Reading
    masked: Reading | None = None
    halves: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.reading.to_dict(),
            "random": self.controls.random.mean,
            "supervised": self.controls.supervised.mean,
            "silhouette": self.controls.silhouette,
            "shuffled": self.mixed.esa.mean,
            "masked": None if self.masked is None else self.masked.to_dict(),
            "halves": self.halves,
        }


def best_layer(layers: Sequence[Layer]) -> int:
    """The layer whose probe separates the training pairs best; of equals the one that decides most."""
    return max(range(len(layers)), key=lambda k: (layers[k].reading.trained, layers[k].reading.decided_in_training))


def table(layer: Layer, held: npt.NDArray[np.bool_]) -> list[Row]:
    """held: whether a test pair holds the masked word."""
    reading, beside = layer.reading, layer.controls
    chance = f"chance {reading.chance:.2f}; p {reading.p_value:.3f}"
    out = [Row.of("ESA", reading.esa, "higher", chance)]
    beside_it = [("random directions", beside.random, ""), ("labels", beside.supervised, "logistic regression"),
                 ("shuffled pairing", layer.mixed.esa, "")]  # fmt: skip
    if layer.masked is not None:
        beside_it.append(("word masked", layer.masked.esa, ""))
    out += [Row.of(f"ESA, {name}", found, note=note) for name, found, note in beside_it]
    if layer.masked is not None and held.any():
        lost = (reading.columns["ESA"] - layer.masked.columns["ESA"])[held]
        out.append(Row.of("ESA lost by masking", mean_interval(lost), note="pairs that hold the word"))
        more = (layer.masked.columns["|PC|"] - reading.columns["|PC|"])[held]
        out.append(Row.of("|PC| gained by masking", mean_interval(more), note="pairs that hold the word"))
    for name, values in reading.columns.items():
        refused = reading.refused if name in CONSISTENCY else ""
        if name != "ESA":
            found = rate(values) if name in ("polar accuracy", "contradictory") else mean_interval(values)
            out.append(Row.of(name, found, "" if refused else BETTER.get(name, ""), refused))
    return [*out, Row("silhouette", beside.silhouette, n=2 * len(held), note="cosine, of x1 - x0")]


def figures(layers: Sequence[Layer]) -> list[Figure]:
    """Layer curves with their chance lines."""

    def curve(label: str, of: Callable[[Layer], Interval]) -> Line:
        return Line(label, [(k, one.mean, one.low, one.high) for k, one in enumerate(map(of, layers))])

    def column(name: str) -> Line:
        return curve(name, lambda layer: mean_interval(layer.reading.columns[name]))

    separation = [
        curve("CCS", lambda layer: layer.reading.esa),
        curve("labels", lambda layer: layer.controls.supervised),
        curve("random", lambda layer: layer.controls.random),
    ]
    if layers[0].masked is not None:
        separation.append(curve("word masked", lambda layer: layer.masked.esa if layer.masked else layer.reading.esa))
    chance = float(np.mean([layer.reading.chance for layer in layers]))
    refused = [str(k) for k, layer in enumerate(layers) if layer.reading.refused]
    note = f"not to be read at layers {', '.join(refused)}" if refused else ""
    return [
        Lines("Separation by layer", "layer", "ESA", separation, [("chance", chance)]),
        Lines("Consistency by layer", "layer", "value", [column("|PC|"), column("CI")],
              [("|PC| by chance", 1 / 6), ("CI by chance", 1 / 2)], note),
        Lines("Decisiveness by layer", "layer", "mean |p1 - p0|", [column("decisiveness")]),
    ]  # fmt: skip


def controls(difference: Array, split: Split, seed: int) -> Controls:
    """difference [2N, D]: x1 - x0, centred, of one layer."""
    generator = np.random.default_rng(seed)
    found = [_esa(difference @ w, split) for w in generator.normal(size=(DIRECTIONS, difference.shape[1]))]
    low, high = np.quantile(found, [0.025, 0.975])
    random = Interval(float(np.mean(found)), float(low), float(high), len(split.test), len(split.test))
    return Controls(random, _supervised(difference, split), _silhouette(difference, split))


def _esa(scores: Array, split: Split) -> float:
    q = 0.5 + 0.5 * np.sign(scores)
    accuracy = float(correct(q, split.test, orientation(q, split.train)).mean())
    return max(accuracy, 1 - accuracy)


def _supervised(difference: Array, split: Split) -> Interval:
    from sklearn.linear_model import LogisticRegression

    rows, test = (split.statements(part).numpy() for part in (split.train, split.test))
    scale = float(difference[rows].std())
    if scale < ROUNDING:
        return Interval(0.5, None, None, len(split.test), len(split.test))
    model = LogisticRegression(max_iter=1000).fit(difference[rows] / scale, rows % 2)
    right = (model.predict(difference[test] / scale) == test % 2).reshape(-1, 2).mean(1)  # [pairs]
    return rate(right)


def _silhouette(difference: Array, split: Split) -> float | None:
    from sklearn.metrics import silhouette_score

    test: npt.NDArray[np.int64] = split.statements(split.test).numpy()
    points = difference[test]
    if np.ptp(points, axis=0).max() < ROUNDING:
        return None
    return float(silhouette_score(points, test % 2, metric="cosine"))
