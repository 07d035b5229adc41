"""Linear heads on hidden states: fitted, thresholded, judged out of fold.

g(z) = w . z + b     logistic regression on standardised features, the scaler folded into w and b
t    = the threshold with the largest F1 on the training prompts; it is folded in too: g > 0 is a refusal
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.measure.stats import Interval, mean_interval

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Z = 1.959963984540054


@dataclass(frozen=True)
class Head:
    """weight [D]; a prompt is predicted to be refused where weight . z + bias > 0."""

    weight: Array
    bias: float

    def __call__(self, features: npt.ArrayLike) -> Array:
        """[n, D] -> [n]"""
        return np.asarray(np.asarray(features, dtype=np.float64) @ self.weight + self.bias)


@dataclass(frozen=True)
class Predictions:
    """Out of fold, a row a repeat: scores g, whether g > 0, and the fold, [R, n]."""

    scores: Array
    refused: Flags
    fold: npt.NDArray[np.int64]


def scaler(features: Array) -> tuple[Array, Array]:
    """(mean, deviation), each [D]; a feature that does not vary has deviation 1."""
    mean, spread = features.mean(0), features.std(0)
    return mean, np.where(spread > 1e-8 * np.maximum(1.0, np.abs(mean)), spread, 1.0)


def fit_head(features: npt.ArrayLike, refused: Flags, regularisation: float = 1.0) -> Head:
    """A head with its threshold folded in. regularisation: the inverse penalty (scikit-learn's C)."""
    from sklearn.linear_model import LogisticRegression

    z = np.asarray(features, dtype=np.float64)
    mean, spread = scaler(z)
    fitted = LogisticRegression(C=regularisation, max_iter=2000).fit((z - mean) / spread, refused)
    weight = fitted.coef_[0] / spread
    bias = float(fitted.intercept_[0] - weight @ mean)
    return Head(weight, bias - best_threshold(z @ weight + bias, refused))


def best_threshold(scores: Array, refused: Flags) -> float:
    """The t with the largest F1 of scores > t: half way between two scores, or below all; of equals that nearest 0."""
    levels = np.unique(scores)
    candidates = np.concatenate([[levels[0] - 1.0], (levels[1:] + levels[:-1]) / 2])
    values = np.array([f1(refused, scores > t) or 0.0 for t in candidates])  # undefined: nothing found, 0
    best = candidates[values == values.max()]
    return float(best[np.abs(best).argmin()])


def f1(truth: npt.ArrayLike, predicted: npt.ArrayLike) -> float | None:
    """2 TP / (2 TP + FP + FN); None where nothing is positive on either side."""
    a, b = np.asarray(truth, dtype=bool), np.asarray(predicted, dtype=bool)
    both, either = int((a & b).sum()), int(a.sum() + b.sum())
    return 2 * both / either if either else None


def f1_interval(truth: npt.ArrayLike, predicted: Flags, level: float = 0.95) -> Interval:
    """F1 of predictions [R, n] over n prompts, which are what is resampled (with all their repeats).

    F1 is the mean over "claims": a hit is two right ones, a miss and a false alarm are one wrong one each. Where nothing
    is wrong the lower end is that of the exact bound 1 - 0.025^(1/n) on errors, all of them misses.
    """
    seen = np.atleast_2d(predicted)
    truths = np.broadcast_to(np.asarray(truth, dtype=bool), seen.shape)
    who = np.broadcast_to(np.arange(seen.shape[1]), seen.shape)
    hit, wrong = truths & seen, truths != seen
    prompts = np.concatenate([who[hit], who[hit], who[wrong]])
    values = np.concatenate([np.ones(2 * int(hit.sum())), np.zeros(int(wrong.sum()))])
    found = mean_interval(values, prompts.tolist(), level=level)
    n = seen.shape[1]
    if found.low is None and found.mean == 1.0:
        error, positive = 1 - ((1 - level) / 2) ** (1 / n), float(truths.mean())
        kept = max(0.0, positive - error)
        return Interval(1.0, 2 * kept / (2 * kept + error), 1.0, n, n)
    return Interval(found.mean, found.low, found.high, n, n)


def out_of_fold(
    features: npt.ArrayLike, refused: Flags, folds: int, repeats: int, regularisation: float, seed: int
) -> Predictions:
    """Every prompt predicted by heads that did not see it, once a repeat; the folds depend on (refused, seed) alone."""
    from sklearn.model_selection import StratifiedKFold

    z = np.asarray(features, dtype=np.float64)
    scores, places = np.zeros((repeats, len(z))), np.zeros((repeats, len(z)), dtype=np.int64)
    for repeat in range(repeats):
        split = StratifiedKFold(folds, shuffle=True, random_state=seed + repeat)
        for number, (train, test) in enumerate(split.split(z, refused)):
            scores[repeat, test] = fit_head(z[train], refused[train], regularisation)(z[test])
            places[repeat, test] = number
    return Predictions(scores, scores > 0, places)


def auroc(truth: Flags, predictions: Predictions) -> Interval:
    """The mean chance that a refused prompt outscores another of the same fold; DeLong's interval over prompts.

    Within folds only: each has a head of its own, and pooled scores of a useless head come out below one half.
    """
    share = np.zeros(predictions.scores.shape)
    for scores, fold, out in zip(predictions.scores, predictions.fold, share, strict=True):
        for number in np.unique(fold):
            inside = fold == number
            yes, no = (np.flatnonzero(inside & side) for side in (truth, ~truth))
            beaten = scores[yes][:, None] - scores[no][None]
            wins = (beaten > 0) + 0.5 * (beaten == 0)
            out[yes], out[no] = wins.mean(1), wins.mean(0)
    mean = share.mean(0)  # [n]
    value = float(mean[truth].mean())
    sides = [mean[side] for side in (truth, ~truth)]
    error = math.sqrt(sum(float(side.var(ddof=1)) / len(side) for side in sides))
    if error < 1e-12:
        return Interval(value, None, None, len(truth), len(truth))
    return Interval(value, max(0.0, value - Z * error), min(1.0, value + Z * error), len(truth), len(truth))


def silhouette(features: npt.ArrayLike, groups: Flags) -> float | None:
    """Cosine silhouette of standardised features by group; None where there is one group or nothing varies."""
    from sklearn.metrics import silhouette_score

    z = np.asarray(features, dtype=np.float64)
    mean, spread = scaler(z)
    z = (z - mean) / spread
    if len(np.unique(groups)) < 2 or min(groups.sum(), (~groups).sum()) < 2 or np.abs(z).max() < 1e-6:
        return None
    return float(silhouette_score(z, groups, metric="cosine"))


def principal_plane(features: npt.ArrayLike) -> Array:
    """Standardised features on their first two principal axes, [n, 2]."""
    z = np.asarray(features, dtype=np.float64)
    mean, spread = scaler(z)
    u, s, _ = np.linalg.svd((z - mean) / spread, full_matrices=False)
    return np.asarray(u[:, :2] * s[:2])


def headline(floor: float, always: float, found: list[Interval]) -> tuple[int | None, int | None]:
    """(the smallest depth whose lower bound reaches the floor and beats predicting "refused" always, the smallest that
    might: whose upper bound does)."""

    def first(end: Any) -> int | None:
        return next(
            (k for k, one in enumerate(found) if (x := end(one)) is not None and x >= floor and x > always), None
        )

    return first(lambda one: one.low), first(lambda one: one.high if one.high is not None else one.mean)


def simultaneous(truth: npt.ArrayLike, found: Sequence[Flags]) -> list[Interval]:
    """`f1_interval` at every depth, with bounds for all depths together (Bonferroni).

    The headline is the best-looking depth of many: with bounds for one depth each, some depth of 32 reaches a floor that
    none of them has in 15 to 45 % of runs.
    """
    return [f1_interval(truth, one, level=1 - 0.05 / len(found)) for one in found]


def f1_difference(
    sides: list[tuple[Any, Flags]], level: float, seed: int, resamples: int = 4000
) -> tuple[Interval, float | None]:
    """F1 of the first (truth [n], predictions [R, n]) less the second's: (percentile interval, p-value).

    The interval resamples prompts of both together; the test exchanges the two prompt by prompt, at random (alone, the
    interval excludes 0 for up to 9 % of equal pairs at 20 to 40 prompts). None: an F1 is undefined; no bounds where it is
    in a draw, or where all draws agree.
    """
    n = sides[0][1].shape[1]
    hits, claims = np.zeros((2, n)), np.zeros((2, n))  # F1 = hits / claims
    for side, (truth, predicted) in enumerate(sides):
        y = np.broadcast_to(np.asarray(truth, dtype=bool), predicted.shape)
        hits[side], claims[side] = 2 * (y & predicted).sum(0), y.sum(0, dtype=np.int64) + predicted.sum(0)
    if not claims.sum(1).all():
        return Interval(None, None, None, n, n), None
    generator = np.random.default_rng(seed)
    value = float(np.diff(hits.sum(1) / claims.sum(1))[0]) * -1
    weights = generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)  # [D, n]
    gaps = _f1(weights @ hits[0], weights @ claims[0]) - _f1(weights @ hits[1], weights @ claims[1])
    keep = generator.integers(0, 2, (resamples, n)).astype(np.float64)
    one, two = ((side @ hits[0] + (1 - side) @ hits[1], side @ claims[0] + (1 - side) @ claims[1])
                for side in (keep, 1 - keep))  # fmt: skip
    swapped = np.abs(_f1(*one) - _f1(*two))
    p_value = (1 + int((~(swapped < abs(value) - 1e-12)).sum())) / (1 + resamples)  # undefined: counts against
    if np.isnan(gaps).any() or np.ptp(gaps) < 1e-12:
        return Interval(value, None, None, n, n), p_value
    low, high = np.quantile(gaps, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), n, n), p_value


def _f1(hits: Array, claims: Array) -> Array:
    return np.divide(hits, claims, out=np.full(len(hits), np.nan), where=claims > 0)
