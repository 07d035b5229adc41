"""DARE: drop most entries of each change at random, rescale the rest, add up.

    m_i ~ Bernoulli(density);  d'_t = m d_t / density;  o = b + scale * sum_t w_t d'_t

Yu et al. 2024, arXiv 2311.03099: an entry's expectation is what it was, so a change with many small entries survives dropping
90 % of them, and several changes collide less. compat=mergekit rescales by ||d||_1 / ||m d||_1 of the tensor instead of
1/density, as mergekit's dare_linear does; rescale=false leaves it out. Density 0 leaves nothing.

Cost: one pass over the parents (compat=mergekit: two); some 6 T operations an entry, most of them for random numbers.
tensors T x [any shape].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimtab.merge.method import Part, in_range, merge_card
from trimtab.merge.methods.sparsify import Dropping

CARD = merge_card(
    slug="dare",
    name="DARE",
    paper="Language models are Super Mario (DARE), arXiv 2311.03099",
    summary="Drops entries of each change at random, rescales the rest and adds the changes up.",
    needs=("one or more fine-tunes", "the base they share"),
    fit_cost="reads every parent once, writes one model",
    limits=(
        "fails on changes with large entries, after long or full-rate training: it then adds noise as large as they are",
    ),
    risks=("the result depends on the seed: try several before believing a difference",),
    conflicts=("align",),
    status=("implemented", "verified_cpu"),
    example="trimtab merge dare --models A B --base BASE --density 0.3 --out merged",
    choose="Many light fine-tunes (small changes) of one base to be summed. With few, or heavy ones, task arithmetic is the "
    "same without the noise.",
)


@dataclass(frozen=True)
class DareConfig:
    # share of each change's entries that is kept; one number, or one a model
    density: float | tuple[float, ...] = 1.0
    # make up for what is dropped
    rescale: bool = True
    # paper: divide by the density; mergekit: repeat the change's L1 norm
    compat: Literal["paper", "mergekit"] = "paper"
    # divide by the sum of the weights
    normalize: bool = False
    # the merged change is multiplied by this (lambda)
    scale: float = 1.0


class Dare(Dropping):
    """See the module."""

    slug = "dare"
    Config = DareConfig

    def check(self, parents: int) -> None:
        super().check(parents)
        in_range(self.slug, "density", self.each("density", parents), 0.0, 1.0)

    def keep(self, part: Part, model: int) -> float:
        return self.each("density", len(part.tensors))[model]
