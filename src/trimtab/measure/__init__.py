"""Measuring: intervals, diversity, coherence, divergence. Importing this imports neither torch nor scipy."""

from __future__ import annotations

from trimtab.measure.coherence import Embedder, coherence, load_embedder
from trimtab.measure.diversity import Diversity, distinct, diversity, mean_diversity, words
from trimtab.measure.kl import best_of_n_bound
from trimtab.measure.length import LengthCorrelation, length_correlation
from trimtab.measure.stats import (
    Interval,
    WinRate,
    holm,
    mean_interval,
    paired_difference,
    prompts_needed,
    sign_test,
    verdict,
    win_rate,
)

__all__ = [
    "Diversity",
    "Embedder",
    "Interval",
    "LengthCorrelation",
    "WinRate",
    "best_of_n_bound",
    "coherence",
    "distinct",
    "diversity",
    "holm",
    "length_correlation",
    "load_embedder",
    "mean_diversity",
    "mean_interval",
    "paired_difference",
    "prompts_needed",
    "sign_test",
    "verdict",
    "win_rate",
    "words",
]
