"""Does the reward just like long answers? Spearman's correlation of score and length, overall and within prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError
from trimtab.measure.stats import Array


@dataclass(frozen=True)
class LengthCorrelation:
    """Both in [-1, 1]; None where undefined (fewer than three rows, or ranks that do not vary).

    overall         over all rows: prompts that invite long answers and high scores count too
    within_prompt   of ranks taken inside each prompt and centred there, pooled: only the choice between answers counts
    rows            how many were judged
    """

    overall: float | None
    within_prompt: float | None
    rows: int


def length_correlation(
    scores: npt.ArrayLike, lengths: npt.ArrayLike, prompts: Sequence[int] | None = None
) -> LengthCorrelation:
    """Scores [N] (NaN or None: dropped) against lengths [N] (tokens); prompts [N] says which prompt a row answers."""
    from scipy.stats import rankdata

    score, length = np.asarray(scores, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    groups = np.arange(len(score)) if prompts is None else np.asarray(prompts)
    if score.ndim != 1 or score.shape != length.shape or groups.shape != score.shape:
        raise UsageError(
            f"one length and one prompt a score are needed; got {score.shape}, {length.shape}, {groups.shape}"
        )
    keep = ~(np.isnan(score) | np.isnan(length))
    score, length, groups = score[keep], length[keep], groups[keep]
    overall = _pearson(rankdata(score), rankdata(length))
    inside = [groups == group for group in np.unique(groups)]
    pairs = [(_centred(rankdata(score[rows])), _centred(rankdata(length[rows]))) for rows in inside if rows.sum() > 1]
    within = _pearson(*(np.concatenate(side) for side in zip(*pairs, strict=True))) if pairs else None
    return LengthCorrelation(overall, within, len(score))


def _centred(ranks: Array) -> Array:
    return ranks - ranks.mean()


def _pearson(x: Array, y: Array) -> float | None:
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])
