"""DELLA-linear: DELLA's dropping (small entries more often than large), then task arithmetic.

    d'_t as in `della`;  o = b + scale * sum_t w_t d'_t      and divided by sum_t w_t if `normalize`

Deep et al. 2024, arXiv 2406.11617, without its election. Every entry's expectation is that of task arithmetic (compat=paper),
and its variance is d^2 (1/p - 1): lower than DARE's for large entries, which are dropped less, and higher for small ones.

Cost: one pass over the parents (compat=mergekit: two) and a sort of each row, some 20 ns an entry. tensors T x [..., c].
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.merge.method import merge_card
from trimtab.merge.methods.della import Della, DellaConfig

CARD = merge_card(
    slug="della-linear",
    name="DELLA-linear",
    paper="DELLA-Merging, arXiv 2406.11617",
    summary="Drops entries of each change at random, small ones more often, rescales the rest and adds the changes up.",
    needs=("one or more fine-tunes", "the base they share"),
    fit_cost="reads every parent once, sorts every row, writes one model",
    limits=("task arithmetic with noise added: it can only help where dropping by itself does",),
    risks=("the result depends on the seed: try several before believing a difference",),
    conflicts=("align",),
    status=("implemented", "verified_cpu"),
    example="trimtab merge della-linear --models A B --base BASE --density 0.4 --epsilon 0.2 --out merged",
    choose="Where dare works: the same with less noise at the same density.",
)


@dataclass(frozen=True)
class DellaLinearConfig(DellaConfig):
    # divide by the sum of the weights
    normalize: bool = False


class DellaLinear(Della):
    """See the module."""

    slug = "della-linear"
    Config = DellaLinearConfig
    ELECTS = False
