"""SCE: select the entries in which the models differ, calculate weights from what is left, erase minority signs.

    select       the int(select_topk * nonzero) entries with the largest variance over the models (population variance;
                 nonzero: how many have any), in all changes; the others become 0               if select_topk < 1
    calculate    w_t = mean(d_t^2) / sum_u mean(d_u^2)                   a tensor at a time
    erase        s = +1 where sum_t d_t >= 0, else -1;  M_t = [sign(d_t) = s]
    o = b + scale * sum_t w_t d_t M_t / max(sum_t w_t M_t, 1e-6)

Wan et al. 2024 (FuseChat 3.0's merge), arXiv 2408.07990; mergekit's `sce` is the equality target. A model's own weight
multiplies its w_t, 1 by default. Departures: mergekit takes equal w_t where sum_u mean(d_u^2) < 1e-6, which is any
fine-tune whose weights moved by less than a thousandth or so: its "calculate" is then off. Here that is so only if all
changes are 0; compat=mergekit restores it. The variance is Welford's, so that models that agree in an entry have none,
exactly.

What T = 1 gives: with select_topk = 1 the model itself, below that the base, since a single model does not vary.

Cost: two passes over the parents, six with select_topk < 1; some 10 T operations an entry. deltas T x [any shape].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.merge.method import Method, Part, Parts, in_range, merge_card
from trimtab.merge.select import Cut, largest

CARD = merge_card(
    slug="sce",
    name="SCE merging",
    paper="FuseChat, arXiv 2408.07990",
    summary="Keeps the entries in which changes differ most, weighs models by how much they changed, drops minority signs.",
    needs=("two or more fine-tunes", "the base they share"),
    fit_cost="reads every parent two to six times, writes one model",
    limits=(
        "the model that moved furthest wins: a long or hot fine-tune drowns a careful one",
        "select_topk below 1 loses skills that are spread over all entries",
    ),
    conflicts=("align",),
    status=("implemented", "verified_cpu"),
    example="trimtab merge sce --models A B C --base BASE --select-topk 0.1 --out merged",
    choose="Fine-tunes whose strength differs from layer to layer, when there is no reward to tune weights on.",
)


@dataclass(frozen=True)
class SceConfig:
    # share of the entries in which the models differ at all that is kept; 1: all entries
    select_topk: float = 1.0
    # the merged change is multiplied by this
    scale: float = 1.0
    # mergekit: equal weights for changes whose mean squares sum to less than 1e-6
    compat: Literal["paper", "mergekit"] = "paper"


@dataclass(frozen=True)
class Found:
    """Which entries are kept (None: all), and each model's weight."""

    cut: Cut | None
    weights: list[float]


class Sce(Method):
    """See the module."""

    slug = "sce"
    Config = SceConfig

    def check(self, parents: int) -> None:
        super().check(parents)
        in_range(self.slug, "select_topk", [self.config.select_topk], 0.0, 1.0)

    def check_weights(self, weights: Sequence[float]) -> None:
        if min(weights) < 0 or sum(weights) == 0:
            raise UsageError("sce: weights multiply shares: none may be below 0, and not all may be 0")

    def survey(self, parts: Parts) -> Found:
        cut, place = None, None
        if self.config.select_topk < 1:
            varying = sum(int(torch.count_nonzero(variance(part.tensors))) for part in parts())
            kept = int(self.config.select_topk * varying)
            place = next(parts()).place
            (cut,) = largest(lambda: _variances(parts), [kept], place.numel)
        squares: Tensor | None = None
        for part in parts():
            place = part.place
            one = torch.stack([tensor.double().square().sum() for tensor in _selected(part, cut)])
            squares = one if squares is None else squares.add_(one)
        assert squares is not None and place is not None  # a tensor has a part
        squares /= max(place.numel, 1)
        enough = 1e-6 if self.config.compat == "mergekit" else 0.0
        shares = (
            squares / squares.sum() if float(squares.sum()) > enough else torch.full_like(squares, 1 / len(squares))
        )
        shares *= torch.tensor(place.weights, dtype=torch.float64)
        return Found(cut, (shares / shares.sum()).tolist() if float(shares.sum()) > 0 else [0.0] * len(shares))

    def notes(self, found: Found) -> dict[str, float | str]:
        return {f"weight {i}": weight for i, weight in enumerate(found.weights, 1)}

    def merge(self, part: Part, found: Found) -> Tensor:
        deltas = _selected(part, found.cut)
        total = deltas[0].clone()
        for delta in deltas[1:]:
            total.add_(delta)
        negative = total < 0
        merged, divisor = torch.zeros_like(total), torch.zeros_like(total)
        for delta, weight in zip(deltas, found.weights, strict=True):
            agrees = torch.where(negative, delta < 0, delta > 0)
            merged.add_(delta.mul_(agrees), alpha=weight)
            divisor.add_(agrees, alpha=weight)
        return merged.div_(divisor.clamp_min_(1e-6)).mul_(self.config.scale)


def variance(tensors: Sequence[Tensor]) -> Tensor:
    """The population variance of each entry over the models, in the tensors' shape and dtype. Equal values have exactly 0."""
    mean, total = tensors[0].clone(), torch.zeros_like(tensors[0])
    for count, tensor in enumerate(tensors[1:], 2):
        step = tensor - mean
        mean.add_(step, alpha=1 / count)
        total.addcmul_(step, tensor - mean)
    return total.div_(len(tensors))


def _variances(parts: Parts) -> Iterator[tuple[int, list[Tensor]]]:
    for part in parts():
        yield part.start, [variance(part.tensors)]


def _selected(part: Part, cut: Cut | None) -> list[Tensor]:
    if cut is None or cut.all:
        return part.tensors
    kept = cut(variance(part.tensors), part.start)
    return [tensor.mul_(kept) for tensor in part.tensors]
