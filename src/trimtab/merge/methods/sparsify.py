"""What DARE and DELLA share: entries of each change are dropped at random, the rest is rescaled, the changes are combined.

    kept     entry i of d_t stays with probability p_i (DARE: density; DELLA: by rank)
    rescale  compat paper (default): d_i / p_i, so that the expectation of every entry is d_i
             compat mergekit: all kept entries times ||d||_1 / ||kept||_1 of the tensor, which repeats its total magnitude
             exactly but not on average any entry: DELLA keeps the large ones more often and they stay too large
    combine  task arithmetic, or TIES' election of a sign

An entry's random number depends on seed, tensor, model and place alone (`Part.uniform`). The two norms are summed exactly, in
whole numbers, so that their ratio does not depend on how the tensor is cut into parts either.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.merge.method import Method, Part, Parts, weighted_sum
from trimtab.merge.methods.linear import normalized
from trimtab.merge.methods.ties import elect
from trimtab.merge.select import magnitude_bits

LEAST_NORM = 1e-7  # below this mergekit leaves a change as it is


class Combining(Method):
    """A method that changes each parent's difference by itself and then combines them. Config: normalize, scale."""

    ELECTS: ClassVar[bool] = False

    def check_weights(self, weights: Sequence[float]) -> None:
        if self.config.normalize and not self.ELECTS:
            normalized(self.slug, weights)

    def combined(self, deltas: list[Tensor], weights: Sequence[float]) -> Tensor:
        """The changes as one: by TIES' election, or their weighted sum (divided by that of the weights if `normalize`)."""
        if self.ELECTS:
            return elect(deltas, weights, self.config.normalize).mul_(self.config.scale)
        weights = normalized(self.slug, weights) if self.config.normalize else weights
        return weighted_sum(deltas, [self.config.scale * weight for weight in weights])


class Dropping(Combining):
    """Drops at random. Config: density, rescale, compat, and those of `Combining`."""

    @abstractmethod
    def keep(self, part: Part, model: int) -> float | Tensor:
        """The probability that an entry of this parent's change is kept: one for all, or one an entry."""

    def dropped(self, part: Part) -> list[Tensor]:
        """The part's changes with entries dropped (and rescaled by 1/p where that is asked for), in place."""
        divide = self.config.rescale and self.config.compat == "paper"
        return [drop(part, model, self.keep(part, model), divide) for model in range(len(part.tensors))]

    def survey(self, parts: Parts) -> list[float] | None:
        """The factor of each parent's kept entries that repeats its norm, where that is asked for."""
        if self.config.rescale and self.config.compat == "mergekit":
            return norm_ratios(parts, self.dropped)
        return None

    def merge(self, part: Part, found: list[float] | None) -> Tensor:
        deltas = self.dropped(part)
        if found is not None:
            deltas = [delta.mul_(ratio) for delta, ratio in zip(deltas, found, strict=True)]
        return self.combined(deltas, part.weights)


def drop(part: Part, model: int, keep: float | Tensor, divide: bool) -> Tensor:
    """A parent's change, each entry kept with its probability `keep`, and then divided by it if `divide`; in place."""
    delta = part.tensors[model]
    if not isinstance(keep, Tensor):
        if keep >= 1:
            return delta
        if keep <= 0:
            return delta.zero_()
    delta.mul_(part.uniform(model) < keep)
    return delta.div_(keep) if divide else delta


def norm_ratios(parts: Parts, dropped: Callable[[Part], list[Tensor]]) -> list[float]:
    """||d_t||_1 / ||dropped d_t||_1 for each parent, 1 where either is next to nothing."""
    before: list[int] = []
    after: list[int] = []
    for part in parts():
        zeros = [0] * len(part.tensors)
        before = [norm + exact_norm(delta) for norm, delta in zip(before or zeros, part.tensors, strict=True)]
        after = [norm + exact_norm(delta) for norm, delta in zip(after or zeros, dropped(part), strict=True)]
    least = LEAST_NORM * 2.0**149
    return [whole / kept if min(whole, kept) >= least else 1.0 for whole, kept in zip(before, after, strict=True)]


def exact_norm(tensor: Tensor) -> int:
    """The sum of |x| (as float32) in units of 2^-149, float32's smallest number: exact, whatever the order.

    Mantissas are whole numbers of 24 bits, summed for each exponent apart; exact for parts below 2^29 entries.
    """
    bits = magnitude_bits(tensor).flatten()
    exponent = bits >> 23
    mantissa = (bits & 0x7FFFFF) | ((exponent > 0).to(torch.int32) << 23)
    sums = torch.bincount(exponent, weights=mantissa.to(torch.float64), minlength=255)
    return sum(int(total) << max(place - 1, 0) for place, total in enumerate(sums.tolist()))
