"""Fitting what a reward's numbers mean, and how far a probability is from what happens. Pure functions over arrays.

    temperature  the T > 0 that minimises the mean of -log sigmoid(d / T), d the score of the preferred answer minus that
                 of the other. The loss is convex in 1/T: its only root of the slope is bracketed and found
    Platt        sigmoid(a r + b) by maximum likelihood on Platt's smoothed labels (n1 + 1)/(n1 + 2) and 1/(n0 + 2), so
                 that it is finite where the labels are separable
    isotonic     the best rising function of r in squared error (pool adjacent violators); equal scores are one point
    affine       (r - mean) / sd over a reference policy's answers, of all prompts or of each prompt by itself

A pair has no label to be calibrated against, it has an order. So p = sigmoid(|d| / T) is the confidence in the order that
the reward gives, and what happens is whether that order is right (a tie: one half, at p = 1/2).
ECE is the mean over 15 bins of equal mass of |mean p - share right|, weighted by mass. It is biased upwards where bins are
small: with m rows a bin even a perfect probability gets about sqrt(2 p (1 - p) / (pi m)).

The fits give `trimtab.rewards.Calibration`, which makes the calibrated reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError
from trimtab.measure.stats import Array
from trimtab.policy import Prompt
from trimtab.rewards.base import Reward
from trimtab.rewards.calibrated import Calibration, Kind, prompt_key

BINS = 15


@dataclass(frozen=True)
class Quality:
    """Of probabilities against outcomes: all means over rows; bins are (mean p, share right, rows), p rising."""

    accuracy: float
    nll: float
    brier: float
    ece: float
    bins: tuple[tuple[float, float, int], ...]
    rows: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bins": [list(one) for one in self.bins]}


def fit_temperature(differences: npt.ArrayLike) -> float:
    """T of pairs' score differences [N], preferred minus other. UsageError where no positive finite T is best."""
    d = _finite(differences, "differences")
    if not d.sum() > 0:
        raise UsageError(
            "no temperature fits: on average the reward scores the preferred answer no higher "
            f"({d.mean():.4g} on {len(d)} pairs); is its sign the wrong way round?"
        )
    if (d >= 0).all():
        raise UsageError(
            f"no temperature fits: the reward orders all {len(d)} pairs right, so ever more confidence fits ever better"
        )
    from scipy.optimize import brentq

    def slope(inverse: float) -> float:
        """d NLL / d (1 / T): negative at 0, rising."""
        return float(-(d * np.exp(-np.logaddexp(0, d * inverse))).mean())

    high = 1.0 / np.abs(d).max()
    while slope(high) < 0:
        high *= 2
    return 1.0 / float(brentq(slope, 0.0, high, xtol=1e-14, rtol=1e-12))


def temperature_interval(
    differences: npt.ArrayLike, prompts: Sequence[int], temperature: float
) -> tuple[float | None, float | None]:
    """95% of T by the sandwich variance of 1/T with the prompts as clusters; None for an end that has none."""
    d = _finite(differences, "differences")
    p = np.exp(-np.logaddexp(0, -d / temperature))  # [N]
    clusters = np.unique(np.asarray(prompts), return_inverse=True)[1]
    gradient = np.bincount(clusters, weights=-d * (1 - p))  # [C]
    curvature = float((d**2 * p * (1 - p)).sum())
    if len(gradient) < 2 or curvature == 0:
        return None, None
    size = len(gradient)
    error = 1.96 * math.sqrt(size / (size - 1) * float((gradient**2).sum())) / curvature
    inverse = 1 / temperature
    return 1 / (inverse + error), 1 / (inverse - error) if inverse > error else None


def confidence(differences: npt.ArrayLike, temperature: float = 1.0) -> tuple[Array, Array]:
    """(p, right) of pairs [N]: sigmoid(|d| / T), and whether the order is right (1, 0, a tie one half)."""
    d = np.asarray(differences, dtype=np.float64)
    return np.exp(-np.logaddexp(0, -np.abs(d) / temperature)), (np.sign(d) + 1) / 2


def fit_platt(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[float, float]:
    """(slope, intercept) for scores [N] and labels [N] of 0 and 1."""
    from scipy.optimize import minimize

    r, y = _labelled(scores, labels)
    ones = y.sum()
    target = np.where(y == 1, (ones + 1) / (ones + 2), 1 / (len(y) - ones + 2))
    centre, spread = r.mean(), r.std() or 1.0
    z = (r - centre) / spread

    def loss(weights: Array) -> tuple[float, Array]:
        logits = weights[0] * z + weights[1]
        off = np.exp(-np.logaddexp(0, -logits)) - target
        value = np.logaddexp(0, logits) - target * logits
        return float(value.mean()), np.array([(off * z).mean(), off.mean()])

    slope, intercept = minimize(loss, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-8}).x
    return float(slope / spread), float(intercept - slope * centre / spread)


def fit_isotonic(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[list[float], list[float]]:
    """(x, y): the corners of the rising line, x strictly rising."""
    from scipy.optimize import isotonic_regression

    r, y = _labelled(scores, labels)
    points, where = np.unique(r, return_inverse=True)
    counts = np.bincount(where).astype(np.float64)
    means = np.bincount(where, weights=y) / counts
    fitted = np.clip(isotonic_regression(means, weights=counts).x, 0, 1)
    inside = np.r_[True, (fitted[1:-1] != fitted[:-2]) | (fitted[1:-1] != fitted[2:]), True][: len(points)]
    return points[inside].tolist(), fitted[inside].tolist()


def quality(p: npt.ArrayLike, right: npt.ArrayLike, bins: int = BINS) -> Quality:
    """Of probabilities p [N] against outcomes [N] in {0, 1/2, 1}. Accuracy counts p = 1/2 as half right."""
    chance, outcome = _finite(p, "probabilities"), np.asarray(right, dtype=np.float64)
    if chance.shape != outcome.shape or (chance < 0).any() or (chance > 1).any():
        raise UsageError("probabilities in [0, 1] and one outcome each are needed")
    order = np.argsort(chance, kind="stable")
    table = [
        (float(chance[part].mean()), float(outcome[part].mean()), len(part))
        for part in np.array_split(order, min(bins, len(order)))
    ]
    agrees = np.where(chance == 0.5, 0.5, np.where(chance > 0.5, outcome, 1 - outcome))
    ece = sum(count * abs(mean - share) for mean, share, count in table) / len(chance)
    return Quality(
        float(agrees.mean()), float(row_nll(chance, outcome).mean()), float(((chance - outcome) ** 2).mean()),
        float(ece), tuple(table), len(chance),
    )  # fmt: skip


def row_nll(p: Array, outcome: Array) -> Array:
    """-log-likelihood of each row in nats; p is kept 1e-12 away from 0 and 1."""
    safe = np.clip(p, 1e-12, 1 - 1e-12)
    return np.asarray(-(outcome * np.log(safe) + (1 - outcome) * np.log(1 - safe)))


def fitted(
    kind: Kind, reward: Reward, chosen: Array, rejected: Array, prompts: Sequence[int], seed: int = 0
) -> tuple[Calibration, Array, Array, list[int]]:
    """A calibration on all labelled pairs [N], and how good it is out of fold.

    Gives (calibration, p, right, prompts of their rows). Each half of the prompts is judged by the fit on the other half.
    Rows are pairs for a temperature, answers for Platt and isotonic (chosen: 1, rejected: 0); none for affine.
    """
    both = np.concatenate([chosen, rejected])
    labels = np.repeat([1.0, 0.0], [len(chosen), len(rejected)])
    if kind == "affine":
        return calibrate_affine(reward, both), np.zeros(0), np.zeros(0), []
    if kind == "temperature":
        d = chosen - rejected
        halves = _halves(prompts, seed)
        p = np.zeros(len(d))
        for train, test in ((halves, ~halves), (~halves, halves)):
            p[test] = confidence(d[test], fit_temperature(d[train]))[0]
        return calibrate_pairs(reward, d), p, confidence(d)[1], list(prompts)
    rows = [*prompts, *prompts]
    make = calibrate_platt if kind == "platt" else calibrate_isotonic
    halves = _halves(rows, seed)
    p = np.zeros(len(both))
    for train, test in ((halves, ~halves), (~halves, halves)):
        one = make(reward, both[train], labels[train])
        p[test] = np.array(one.apply(both[test].tolist(), [""] * int(test.sum())), dtype=np.float64)
    return make(reward, both, labels), p, labels, rows


def calibrate_pairs(reward: Reward, differences: npt.ArrayLike, report: dict[str, Any] | None = None) -> Calibration:
    """A reward with the temperature of labelled pairs."""
    return _made("temperature", reward, {"temperature": fit_temperature(differences)}, report)


def calibrate_platt(reward: Reward, scores: npt.ArrayLike, labels: npt.ArrayLike, **report: Any) -> Calibration:
    slope, intercept = fit_platt(scores, labels)
    return _made("platt", reward, {"slope": slope, "intercept": intercept}, report)


def calibrate_isotonic(reward: Reward, scores: npt.ArrayLike, labels: npt.ArrayLike, **report: Any) -> Calibration:
    x, y = fit_isotonic(scores, labels)
    return _made("isotonic", reward, {"x": x, "y": y}, report)


def calibrate_affine(
    reward: Reward, scores: npt.ArrayLike, prompts: Sequence[Prompt] | None = None, **report: Any
) -> Calibration:
    """From a reference policy's scores [N] (NaN: not judged, left out).

    prompts [N]: each prompt with two different scores or more gets its own mean and sd; others keep those of all.
    """
    r = np.asarray(scores, dtype=np.float64)
    mean, sd = _moments(r[~np.isnan(r)])
    if not sd > 0:
        raise UsageError(f"reward {reward.name!r}: reference scores that do not vary have no scale ({len(r)} rows)")
    own: dict[str, tuple[float, float]] = {}
    if prompts is not None:
        keys = np.array([prompt_key(prompt) for prompt in prompts])
        for key in dict.fromkeys(keys.tolist()):
            found = _moments(r[(keys == key) & ~np.isnan(r)])
            if found[1] > 0:
                own[key] = found
    return Calibration("affine", reward.name, reward.fingerprint, {"mean": mean, "sd": sd}, own, report)


def _halves(prompts: Sequence[int], seed: int) -> npt.NDArray[np.bool_]:
    """[N]: which rows belong to a random half of the prompts."""
    names, where = np.unique(np.asarray(prompts), return_inverse=True)
    if len(names) < 4:
        raise UsageError(f"{len(names)} prompts cannot be halved into some to fit on and some held out: give 4 or more")
    return np.asarray(np.random.default_rng(seed).permutation(len(names))[where] < len(names) // 2)


def _made(kind: Any, reward: Reward, values: dict[str, Any], report: dict[str, Any] | None) -> Calibration:
    return Calibration(kind, reward.name, reward.fingerprint, values, {}, report or {})


def _moments(values: Array) -> tuple[float, float]:
    """Mean and sample sd; an sd of 0 where there is none."""
    return (float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0) if len(values) else (0.0, 0.0)


def _finite(values: npt.ArrayLike, what: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise UsageError(f"{what} must be one row or more of finite numbers (leave out what could not be judged)")
    return array


def _labelled(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Array, Array]:
    r, y = _finite(scores, "scores"), np.asarray(labels, dtype=np.float64)
    if y.shape != r.shape or set(np.unique(y)) != {0.0, 1.0}:
        raise UsageError("calibration needs a label of 0 or 1 for every score, and both labels")
    return r, y
