"""Breadcrumbs-TIES: breadcrumbs' dropping of the smallest and the largest entries, then TIES' election of a sign.

    d'_t as in `breadcrumbs`;  x_t = w_t d'_t;  s = +1 where sum_t x_t >= 0, else -1;  M_t = [sign(x_t) = s]
    o = b + scale * sum_t x_t M_t                            and divided by sum_t w_t M_t if `normalize`

No paper of its own: mergekit's combination of arXiv 2312.06795 with arXiv 2306.01708, and equal to it in float32 but for the
fault that `breadcrumbs` tells of. normalize is off as it is there, so the merged change is a sum: take a scale below 1.

Cost: three passes over the parents (two find the cuts where density < 1); some 15 T operations an entry. tensors T x [any
shape].
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.merge.method import merge_card
from trimtab.merge.methods.breadcrumbs import Breadcrumbs, BreadcrumbsConfig

CARD = merge_card(
    slug="breadcrumbs-ties",
    name="Breadcrumbs-TIES",
    paper="Model Breadcrumbs, arXiv 2312.06795, with TIES-Merging, arXiv 2306.01708",
    summary="Drops the smallest entries of each change and its outliers, and adds those that agree with the elected sign.",
    needs=("two or more fine-tunes", "the base they share"),
    fit_cost="reads every parent three times, writes one model",
    limits=("three options (density, gamma, scale) and no way to know them beforehand: `trimtab merge search`",),
    conflicts=("align",),
    status=("implemented", "verified_cpu"),
    example="trimtab merge breadcrumbs-ties --models A B C --base BASE --density 0.85 --scale 0.5 --out merged",
    choose="As ties, where single huge entries of one fine-tune win every election.",
)


@dataclass(frozen=True)
class BreadcrumbsTiesConfig(BreadcrumbsConfig):
    # divide by the weights of those that agree
    normalize: bool = False


class BreadcrumbsTies(Breadcrumbs):
    """See the module."""

    slug = "breadcrumbs-ties"
    Config = BreadcrumbsTiesConfig
    ELECTS = True
