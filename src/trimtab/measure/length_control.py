"""What share of comparisons A would win if both answers were equally long: a win rate without the pull of length.

    P(A wins) = sigmoid(theta + gamma tanh(d / sd(d))),   d = length of A - length of B;   the estimate is sigmoid(theta)

After length-controlled AlpacaEval (Dubois et al., 2404.04475), without its terms for the difficulty of an instruction.
p_a may be a probability: the fit is the cross-entropy one. A ridge of 0.001 on (theta, gamma) keeps both finite where
length decides every row; at 8 wins of 10 it moves the rate by about 0.0001.

The interval is the percentile bootstrap over prompts (all rows of a prompt together), its levels widened for few prompts
as in `measure.stats`; sd(d) is that of the data and is not resampled.

What it means: the contrast between answers of equal length, if length acts as assumed. What it does not mean: that length
is no merit. When it misleads: where one side is always the longer one, nothing tells length from quality, and the interval
says so by its width; where quality itself makes answers longer, that part of quality is taken away too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from trimtab.errors import UsageError
from trimtab.measure.ratings import widened_tail
from trimtab.measure.stats import LEVEL, Array, Interval

RIDGE, RESAMPLES = 1e-3, 2000
STEPS, LONGEST_STEP = 50, 1.5


def length_controlled(
    p_a: npt.ArrayLike,
    length_a: npt.ArrayLike,
    length_b: npt.ArrayLike,
    prompts: Sequence[int] | None = None,
    seed: int = 0,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Interval:
    """The length-controlled win rate of A in [0, 1], with its interval clustered by prompt.

    p_a [N]: 1 where A won, 0 where it lost, 1/2 for a tie, or a probability; NaN or None: not judged, dropped.
    length_a, length_b [N]: in any one unit; rows with an unknown length are dropped. prompts [N]: which prompt a row
    answers (None: every row its own). The bounds are None for one prompt, or where no row differs from another.
    """
    win, longer, clusters = _rows(p_a, length_a, length_b, prompts)
    if not len(win):
        return Interval(None, None, None)
    count = int(clusters.max()) + 1
    if np.ptp(win) == 0:  # nothing to explain; with a ridge alone the fit would not say exactly this
        return Interval(float(win[0]), None, None, len(win), count)
    fitted = fit(win, longer, np.ones((1, len(win))))  # [1, 2]
    rate = float(expit(fitted[0, 0]))
    if count < 2:
        return Interval(rate, None, None, len(win), count)
    generator = np.random.default_rng(seed)
    draws = []
    chunk = max(1, 1_000_000 // len(win))
    for start in range(0, resamples, chunk):
        times = generator.multinomial(count, np.full(count, 1 / count), min(chunk, resamples - start))  # [r, C]
        draws.append(fit(win, longer, times[:, clusters].astype(np.float64), fitted)[:, 0])
    tail = widened_tail(count, level)
    low, high = np.quantile(expit(np.concatenate(draws)), [tail, 1 - tail])
    return Interval(rate, float(low), float(high), len(win), count)


def fit(win: Array, longer: Array, weights: Array, start: Array | None = None) -> Array:
    """(theta, gamma) [R, 2] by Newton's method, one fit for each row of weights [R, N]. win, longer [N].

    Steps are cut to a length at which each still lowers the loss (a logistic loss is self-concordant).
    """
    x = np.stack([np.ones_like(longer), longer])  # [2, N]
    at = np.repeat(start if start is not None else np.zeros((1, 2)), len(weights), 0)
    pairs = np.stack([x[0] * x[0], x[0] * x[1], x[1] * x[1]])  # [3, N]
    for _ in range(STEPS):
        p = expit(at @ x)  # [R, N]
        slope = (weights * (win - p)) @ x.T - RIDGE * at  # [R, 2]
        a, b, c = ((weights * p * (1 - p)) @ pairs.T + RIDGE * np.array([1.0, 0.0, 1.0])).T  # [R] each
        step = np.stack([c * slope[:, 0] - b * slope[:, 1], a * slope[:, 1] - b * slope[:, 0]], 1)
        step /= (a * c - b * b)[:, None]
        size = np.abs(step).sum(1, keepdims=True)
        at = at + step * np.minimum(1.0, LONGEST_STEP / np.maximum(size, 1e-300))
        if size.max() < 1e-9:
            break
    return at


def _rows(
    p_a: npt.ArrayLike, length_a: npt.ArrayLike, length_b: npt.ArrayLike, prompts: Sequence[int] | None
) -> tuple[Array, Array, npt.NDArray[np.int64]]:
    """The judged rows: p_a, tanh(d / sd(d)) (0 where lengths do not vary), and prompts renumbered 0..C-1."""
    win, first, second = (np.asarray(column, dtype=np.float64) for column in (p_a, length_a, length_b))
    clusters = np.arange(len(win)) if prompts is None else np.asarray(prompts)
    if win.ndim != 1 or not win.shape == first.shape == second.shape == clusters.shape:
        raise UsageError(
            "one outcome, two lengths and one prompt a row are needed; "
            f"got {win.shape}, {first.shape}, {second.shape} and {clusters.shape}"
        )
    keep = ~(np.isnan(win) | np.isnan(first) | np.isnan(second))
    win, d = win[keep], (first - second)[keep]
    if ((win < 0) | (win > 1)).any():
        raise UsageError("p_a is the share or probability that A wins: values in [0, 1] are needed")
    if not np.isfinite(d).all():
        raise UsageError("infinite lengths cannot be controlled for")
    spread = float(d.std()) if len(d) else 0.0
    # lengths that never vary say nothing: a constant difference is left in theta
    longer = np.tanh(d / spread) if spread > 1e-12 * max(1.0, float(np.abs(d).max(initial=0))) else np.zeros_like(d)
    return win, longer, np.unique(clusters[keep], return_inverse=True)[1].astype(np.int64)
