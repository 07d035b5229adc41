"""Measuring: diagnostics, and the statistics they rest on. This dict is the list of the diagnostics.

Statistics are in `stats` (intervals, differences, win rates), `ratings`, `uncertainty`; what a diagnostic is, in `diagnostic`
and `measurement`. Importing this imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import Any

# slug -> (module, class)
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


def __getattr__(name: str) -> Any:
    for module, cls in METHODS.values():
        if name == cls:
            return getattr(importlib.import_module(f"trimtab.measure.{module}"), cls)
    raise AttributeError(f"module 'trimtab.measure' has no attribute {name!r}")
