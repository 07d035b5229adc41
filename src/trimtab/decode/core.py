"""CoRE: a token ensemble that weighs its members by how consistent they are, on top of any alignment.

The weights are in `consistency`, the alignments and the rest in `ensemble`: this is that method with weighting=core and the
ten likeliest tokens of each model, as published. Zeng et al., "Harnessing Consistency for Robust Test-Time LLM Ensemble",
arXiv 2510.13855. It adds no call of any model to the ensemble's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from trimtab.decode import ensemble
from trimtab.decode.ensemble import Ensemble, EnsembleConfig

CARD = replace(
    ensemble.CARD,
    slug="core",
    name="CoRE",
    paper="arXiv 2510.13855",
    summary="A token ensemble that trusts members which agree and are sure, and doubts tokens they disagree on.",
    risks=("an assistant that is wrong and sure still counts for up to half",),
    choose="When an ensemble's members differ in skill or their tokens match badly: it is harder to pull down "
    "than the plain average, at the same cost.",
    example="trimtab compare pocket/base --reward pocket/reward --gold pocket/judge --prompts prompts.txt "
    "--policy core:models=pocket/nano --policy ensemble:models=pocket/nano",
)


@dataclass(frozen=True)
class CoreConfig(EnsembleConfig):
    # every model alike, or by consistency (CoRE)
    weighting: Literal["uniform", "core"] = "core"
    # likeliest tokens of each model that vote; 0: all
    k: int = 10


class Core(Ensemble):
    """`Core(main, [assistant, ...])`: see `Ensemble`."""

    slug = "core"
    Config = CoreConfig
