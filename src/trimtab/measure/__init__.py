"""Measuring: diagnostics, intervals, diversity, coherence, divergence. Importing this imports neither torch nor scipy."""

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

# diagnostics: slug -> (module, class)
METHODS = {
    # what a change bought and what it cost
    "panel": ("panel", "Panel"),
    "multiple-choice": ("multiple_choice", "MultipleChoice"),
    "verify": ("verify", "Verify"),
    "refusal": ("refusal_rate", "RefusalRate"),
    "lm-eval": ("lm_eval", "LmEval"),
    # answers
    "branching-factor": ("branching_factor", "BranchingFactor"),
    "generation-exploitation": ("generation_exploitation", "GenerationExploitation"),
    "emergent-misalignment": ("emergent_misalignment", "EmergentMisalignment"),
    "human-triplets": ("human_triplets", "HumanTriplets"),
    # inside the model
    "aqi": ("aqi", "AQI"),
    "pa-ccs": ("pa_ccs", "PaCcs"),
    "surrogate-classifier": ("surrogate_classifier", "SurrogateClassifier"),
    "mexa": ("mexa", "Mexa"),
    # one against another, and the judges themselves
    "judge": ("judged", "Judged"),
    "varco-arena": ("varco_arena", "VarcoArena"),
    "reward-benchmark": ("reward_benchmark", "RewardBenchmark"),
}

__all__ = [
    "METHODS",
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
