"""TIES: trim small changes, elect a sign for each entry, mean those that agree with it.

    trim     the int(density n) entries of d_t largest in magnitude stay as they are, the others become 0 (a tensor at a time)
    elect    x_t = w_t d_t;  s = +1 where sum_t x_t >= 0, else -1
    merge    M_t = [sign(x_t) = s];  o = b + scale * sum_t x_t M_t / sum_t w_t M_t      (a divisor of 0 is 1)

Yadav et al. 2023, arXiv 2306.01708. An entry that is exactly 0 agrees with nobody, so a trimmed one leaves the divisor. Equal
to mergekit's in float32, whose `magnitude` fails where int(density n) is 0: here the tensor then stays the base's.
normalize=false leaves the division out.

Cost: three passes over the parents (two find the cut where density < 1); some 10 T operations an entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.merge.method import Method, Part, Parts, in_range, merge_card
from trimtab.merge.select import Cut, largest

CARD = merge_card(
    slug="ties",
    name="TIES merging",
    paper="TIES-Merging, arXiv 2306.01708",
    summary="Trims small changes, elects a sign for each weight and means the changes that agree with it.",
    needs=("two or more fine-tunes", "the base they share"),
    fit_cost="reads every parent three times, writes one model",
    limits=("density and scale matter and are not known beforehand: `trimtab merge search`",),
    conflicts=("align",),
    status=("implemented", "verified_cpu"),
    example="trimtab merge ties --models A B C --base BASE --density 0.3 --out merged",
    choose="Several fine-tunes for different skills whose changes disagree in sign (`trimtab merge inspect` says how often).",
)


@dataclass(frozen=True)
class TiesConfig:
    # share of each change's entries that is kept; one number, or one a model
    density: float | tuple[float, ...] = 1.0
    # divide by the weights of those that agree
    normalize: bool = True
    # the merged change is multiplied by this (lambda)
    scale: float = 1.0


class Ties(Method):
    """See the module."""

    slug = "ties"
    Config = TiesConfig

    def check(self, parents: int) -> None:
        super().check(parents)
        in_range(self.slug, "density", self.each("density", parents), 0.0, 1.0)

    def survey(self, parts: Parts) -> list[Cut]:
        first = next(parts(), None)
        if first is None:  # a tensor without rows
            return []
        kept = [int(density * first.place.numel) for density in self.each("density", len(first.weights))]
        return largest(lambda: ((part.start, part.tensors) for part in parts()), kept, first.place.numel)

    def merge(self, part: Part, found: list[Cut]) -> Tensor:
        trimmed = [cut.trim(tensor, part.start) for tensor, cut in zip(part.tensors, found, strict=True)]
        return elect(trimmed, part.weights, self.config.normalize).mul_(self.config.scale)


def elect(deltas: list[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """The weighted sum of the entries whose sign is the elected one, divided by their weights if `normalize`.

    deltas [any shape] each, changed in place. The elected sign is +-1 in floating point, so that agreeing is a product, and
    the whole a fifth of the time that masks and `where` take.
    """
    weighted = [delta.mul_(weight) for delta, weight in zip(deltas, weights, strict=True)]
    sign = weighted[0].clone()
    for one in weighted[1:]:
        sign.add_(one)
    sign.sign_().add_(0.5).sign_()  # a sum of 0 counts as positive
    divisor = torch.zeros_like(sign)
    for one, weight in zip(weighted, weights, strict=True):
        one.mul_(sign).clamp_(min=0)  # those that disagree become 0
        if normalize:
            divisor.add_(one.sign(), alpha=weight)
    merged = weighted[0]
    for one in weighted[1:]:
        merged.add_(one)
    if normalize:
        # Nobody agrees, or weights of both signs cancel: a divisor of 0, up to rounding, becomes 1.
        if min(weights) > 0:
            divisor.clamp_(min=min(weights) / 2)  # nobody agrees: 0 by anything is 0, at a tenth of the time
        else:
            divisor.add_(divisor.abs() <= 1e-6 * sum(map(abs, weights)))
        merged.div_(divisor)
    return merged.mul_(sign)
