"""DARE-TIES: DARE's dropping, then TIES' election of a sign for each entry.

    d'_t = DARE(d_t);  x_t = w_t d'_t;  s = +1 where sum_t x_t >= 0, else -1;  M_t = [sign(x_t) = s]
    o = b + scale * sum_t x_t M_t                            and divided by sum_t w_t M_t if `normalize`

Yu et al. 2024, arXiv 2311.03099 (section on merging), with Yadav et al. 2023, arXiv 2306.01708. A dropped entry has no vote
and leaves the divisor, so the election is among those that were kept. compat as in `dare`. normalize is off as in mergekit:
with it, rescaled entries that stand alone are not averaged down, and the merged change grows.

Cost: one pass over the parents (compat=mergekit: two); some 12 T operations an entry. tensors T x [any shape].
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.merge.method import merge_card
from trimtab.merge.methods.dare import Dare, DareConfig

CARD = merge_card(
    slug="dare-ties",
    name="DARE-TIES",
    paper="Language models are Super Mario (DARE), arXiv 2311.03099",
    summary="Drops entries of each change at random, rescales the rest and adds those that agree with the elected sign.",
    needs=("two or more fine-tunes", "the base they share"),
    fit_cost="reads every parent once, writes one model",
    limits=(
        "electing signs undoes what dropping was made for: the merged change is larger than the sum of the changes",
        "where much is dropped the election is among chance survivors, and dare keeps more of what most agree on",
    ),
    risks=("the result depends on the seed: try several before believing a difference",),
    conflicts=("align",),
    status=("implemented", "verified_cpu"),
    example="trimtab merge dare-ties --models A B C --base BASE --density 0.5 --scale 0.5 --out merged",
    choose="Light fine-tunes that disagree in sign; compare it with ties at the same density, which is deterministic.",
)


@dataclass(frozen=True)
class DareTiesConfig(DareConfig):
    # divide by the weights of those that agree
    normalize: bool = False


class DareTies(Dare):
    """See the module."""

    slug = "dare-ties"
    Config = DareTiesConfig
    ELECTS = True
