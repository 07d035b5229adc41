"""DELLA: drop entries of each change at random, small ones rather than large; then TIES' election.

    in each row of c entries (the last axis), r = 0 .. c-1 their rank by |d| ascending
    p_i = density - epsilon + 2 epsilon r_i / (c - 1);  m_i ~ Bernoulli(p_i);  d' = m d / p
    x_t = w_t d'_t;  s = +1 where sum_t x_t >= 0, else -1;  M_t = [sign(x_t) = s]
    o = b + scale * sum_t x_t M_t / sum_t w_t M_t            (a divisor of 0 is 1; left out if not `normalize`)

Deep et al. 2024, arXiv 2406.11617 (drop by MagPrune, elect, fuse). Of equal magnitudes the first has the lower rank. A
vector is one row. Rows of one entry have p = density, where mergekit divides 0 by 0. Density 1 keeps everything and 0
nothing, whatever epsilon; between, density -+ epsilon must lie in (0, 1). compat=mergekit rescales by the tensor's L1 norm
instead of 1/p. (Of a tensor with three axes mergekit ranks along the second; here the last is a row, whatever compat.)

Cost: one pass over the parents (compat=mergekit: two) and a sort of each row, some 20 ns an entry. tensors T x [..., c].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.merge.method import Part, Place, in_range, merge_card
from trimtab.merge.methods.sparsify import Dropping
from trimtab.merge.select import magnitude_bits

CARD = merge_card(
    slug="della",
    name="DELLA",
    paper="DELLA-Merging, arXiv 2406.11617",
    summary="Drops entries of each change at random, small ones more often, elects a sign and means what agrees with it.",
    needs=("two or more fine-tunes", "the base they share"),
    fit_cost="reads every parent once, sorts every row, writes one model",
    limits=("three options (density, epsilon, scale) and no way to know them beforehand: `trimtab merge search`",),
    risks=("the result depends on the seed: try several before believing a difference",),
    conflicts=("align",),
    status=("implemented", "verified_cpu"),
    example="trimtab merge della --models A B C --base BASE --density 0.5 --epsilon 0.2 --out merged",
    choose="Where ties cuts too hard and dare-ties too blindly: magnitudes count, and small entries keep a chance.",
)


@dataclass(frozen=True)
class DellaConfig:
    # mean share of each change's entries that is kept; one number, or one a model
    density: float | tuple[float, ...] = 1.0
    # half the range of the keeping probability, from a row's smallest entry to its largest; one number, or one a model
    epsilon: float | tuple[float, ...] = 0.15
    # make up for what is dropped
    rescale: bool = True
    # paper: divide by the probability; mergekit: repeat the change's L1 norm
    compat: Literal["paper", "mergekit"] = "paper"
    # divide by the weights of those that agree
    normalize: bool = True
    # the merged change is multiplied by this (lambda)
    scale: float = 1.0


class Della(Dropping):
    """See the module."""

    slug = "della"
    Config = DellaConfig
    ELECTS = True

    def check(self, parents: int) -> None:
        super().check(parents)
        in_range(self.slug, "density", self.each("density", parents), 0.0, 1.0)
        in_range(self.slug, "epsilon", self.each("epsilon", parents), 0.0, 0.5)
        for density, epsilon in zip(self.each("density", parents), self.each("epsilon", parents), strict=True):
            if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
                raise UsageError(
                    f"{self.slug}: density - epsilon and density + epsilon must be above 0 and below 1, not {density:g} -+ "
                    f"{epsilon:g}: give a smaller --epsilon, or another --density"
                )

    def whole(self, place: Place) -> bool:
        return len(place.shape) < 2

    def keep(self, part: Part, model: int) -> float | Tensor:
        density, epsilon = (self.each(key, len(part.tensors))[model] for key in ("density", "epsilon"))
        if not 0 < density < 1 or not epsilon or part.place.shape[-1:] in ((), (1,)):
            return density
        return density - epsilon + 2 * epsilon * relative_ranks(part.tensors[model])


def relative_ranks(delta: Tensor) -> Tensor:
    """The rank by magnitude of each entry in its row, from 0 for the smallest to 1 for the largest: [..., c], c >= 2.

    Sorts (magnitude, place) as one whole number: equal magnitudes in their order, at a third of the time of a stable argsort.
    """
    count = delta.shape[-1]
    keys = magnitude_bits(delta).view(-1, count).numpy().astype(np.int64) << 32
    keys |= np.arange(count)
    keys.sort(axis=1)
    order = torch.from_numpy(keys & 0xFFFFFFFF)
    ranks = torch.arange(count, dtype=delta.dtype).div_(count - 1)
    return torch.empty(order.shape, dtype=delta.dtype).scatter_(1, order, ranks.expand(order.shape)).view(delta.shape)
