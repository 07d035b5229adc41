"""Estimators of the entropy of answers per token, in nats; its exponential is the branching factor. Arrays in, numbers out.

S_i sums the entropies h_t (or the surprises -log p(y_t)) of answer i over its N_i tokens, its end token included. Both
sums are unbiased for the entropy H of a whole answer (chain rule), so they must agree in the limit.

    ratio           sum_i S_i / sum_i N_i          consistent for H / E[N]; entropies and surprises agree
    per_sequence    mean_i S_i / N_i               entropies and surprises have different limits where lengths vary
    position_mean   mean_t of the mean h_t over the answers alive at t, up to the 95 % quantile of lengths and while more
                    than 3 are alive
    paper           mean_i of the surprise per token where N_i > 50, of the entropy per token elsewhere

The published code's `position_mean` cuts every later answer to the length of the first (it overwrites its limit inside
the loop); here every answer keeps its own length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError
from trimtab.measure.stats import Interval

Array = npt.NDArray[np.float64]
Estimator = Literal["ratio", "per_sequence", "position_mean", "paper"]
ALIVE = 4  # answers that a position needs to be averaged over
LONG = 50  # tokens above which the paper trusts the surprise alone


def ratio(sums: npt.ArrayLike, lengths: npt.ArrayLike) -> float:
    """The branching factor exp(sum_i S_i / sum_i N_i) of answers with entropy (or surprise) sums S and N tokens."""
    total, tokens = np.asarray(sums, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    if total.shape != tokens.shape or tokens.sum() <= 0:
        raise UsageError(
            f"a branching factor needs one sum and one length an answer, and a token; got {total.shape} sums, "
            f"{tokens.shape} lengths and {int(tokens.sum())} tokens"
        )
    return math.exp(total.sum() / tokens.sum())


def nats_per_token(
    values: Sequence[Array], estimator: Estimator = "ratio", surprises: Sequence[Array] | None = None
) -> float:
    """The estimate from one array [N_i] an answer; NaN where no answer has a token (or no position enough of them).

    surprises: those of the same answers, needed by "paper" (whose `values` are the entropies).
    """
    rows = [row for row in values if len(row)]
    if not rows:
        return math.nan
    if estimator == "ratio":
        return float(sum(row.sum() for row in rows) / sum(map(len, rows)))
    if estimator == "per_sequence":
        return float(np.mean([row.mean() for row in rows]))
    if estimator == "position_mean":
        found = curve(rows)
        last = int(np.quantile([len(row) for row in rows], 0.95))
        return float(found.nats[:last].mean()) if len(found.nats[:last]) else math.nan
    if surprises is None:
        raise UsageError("the paper's estimator needs the surprises of long answers beside the entropies")
    pairs = [(h, s) for h, s in zip(values, surprises, strict=True) if len(h)]
    return float(np.mean([s.mean() if len(s) > LONG else h.mean() for h, s in pairs]))


@dataclass(frozen=True)
class Curve:
    """Along answers, position 1 first. nats [T]: mean h_t; cumulative [T]: the mean of these up to t; alive [T]: answers
    that have a token there."""

    nats: Array
    cumulative: Array
    alive: npt.NDArray[np.int64]


def curve(rows: Sequence[Array], least: int = ALIVE) -> Curve:
    """Means over the answers that are still going, as far as `least` of them are."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    alive = np.array([(lengths > t).sum() for t in range(int(lengths.max(initial=0)))], dtype=np.int64)
    alive = alive[alive >= least]
    nats = np.array([np.mean([row[t] for row in rows if len(row) > t]) for t in range(len(alive))], dtype=np.float64)
    return Curve(nats, np.cumsum(nats) / np.arange(1, len(nats) + 1), alive)


def exponential(interval: Interval) -> Interval:
    """The interval of exp(mean), from that of a mean of logarithms."""
    mean, low, high = (None if end is None else math.exp(end) for end in (interval.mean, interval.low, interval.high))
    return Interval(mean, low, high, interval.rows, interval.prompts)


def share_interval(part: npt.ArrayLike, whole: npt.ArrayLike, seed: int = 0, resamples: int = 10_000) -> Interval:
    """mean(part) / mean(whole) over paired units, with a percentile interval.

    Undefined (None) where mean(whole) may as well be 0: then there is nothing to be a share of.
    """
    top, bottom = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    keep = ~(np.isnan(top) | np.isnan(bottom))
    top, bottom = top[keep], bottom[keep]
    if len(top) < 2:
        return Interval(None, None, None, len(top), len(top))
    picks = np.random.default_rng(seed).integers(0, len(top), (resamples, len(top)))
    wholes = bottom[picks].mean(1)
    if np.quantile(wholes, 0.025) <= 0 <= np.quantile(wholes, 0.975):
        return Interval(None, None, None, len(top), len(top))
    low, high = np.quantile(top[picks].mean(1) / wholes, (0.025, 0.975))
    return Interval(float(top.mean() / bottom.mean()), float(low), float(high), len(top), len(top))
