"""Model Stock: how far to go from the base to the mean of its fine-tunes, told by the angles between them.

    c = the mean of cos(d_i, d_j) over pairs
    t = T c / (1 + (T - 1) c)
    o = b + t mean(d)

Jang et al. 2024, arXiv 2403.19522: fine-tunes lie on a thin shell about a centre that is better than any of them, and
the point nearest to it in their plane follows from the angle. Parallel changes are all signal (t = 1, the mean);
changes at right angles are all noise (t = 0, the base). A tensor at a time, flattened (default), or a filter at a time
(filter_wise): one t for each index of the first axis, what a unit reads. mergekit's `model_stock` is the equality
target; for several models the mean over pairs is its reading, the paper having one angle. Departures, each undone by
compat=mergekit:
- changes that point away from each other have c < 0 and a negative t, and t has no bound as c nears -1 / (T - 1): here
  t is 0;
- a product of two norms below 1e-6 counts as 1e-6 there, so that small changes of small tensors seem at right angles.
A filter of a tensor with three axes or more is all of it but the first axis, as in the paper (mergekit: the last axis
alone).

Cost: two passes over the parents (one with filter_wise); T^2 operations an entry. deltas T x [any shape].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.merge.method import Part, Parts, merge_card, weighted_sum
from trimtab.merge.methods.gram import Found, GramMethod, cosines, inner_products

CARD = merge_card(
    slug="model-stock",
    name="Model Stock",
    paper="Model Stock, arXiv 2403.19522",
    summary="Goes from the base towards the mean of its fine-tunes, as far as they agree in direction.",
    needs=("two or more fine-tunes for the same goal", "the base they share"),
    fit_cost="reads every parent twice, writes one model",
    limits=("fine-tunes for different skills lie at right angles, and the merge is then the base",),
    conflicts=("align",),
    status=("implemented", "verified_cpu"),
    example="trimtab merge model-stock --models A B C --base BASE --out merged",
    choose="A few fine-tunes of one base on the same data (other seeds, other orders), in place of a soup of many.",
)


@dataclass(frozen=True)
class ModelStockConfig:
    # one ratio for each row (index of the first axis) in place of one for the tensor
    filter_wise: bool = False
    # mergekit: as published there, ratios below 0 and small norms included
    compat: Literal["paper", "mergekit"] = "paper"


class ModelStock(GramMethod):
    """See the module."""

    slug = "model-stock"
    Config = ModelStockConfig
    LEAST = 2

    def check_weights(self, weights: Sequence[float]) -> None:
        if len({*weights}) > 1 or not weights[0]:
            raise UsageError(
                "model-stock takes no weights: the angles decide; leave --weights out, or use task-arithmetic"
            )

    def survey(self, parts: Parts) -> Found | None:
        if self.config.filter_wise and len(next(parts()).place.shape) > 1:
            return None  # every part has its rows whole
        return super().survey(parts)

    def merge(self, part: Part, found: Found | None) -> Tensor:
        if found is not None:
            return super().merge(part, found)
        models = len(part.tensors)
        _, ratio = self._ratio(inner_products([tensor.flatten(1) for tensor in part.tensors], -1))
        mean = weighted_sum(part.tensors, [1.0 / models] * models)
        return mean.mul_(ratio.to(mean.dtype).view(-1, *[1] * (mean.dim() - 1)))

    def coefficients(self, gram: Tensor, weights: tuple[float, ...]) -> Found:
        cosine, ratio = self._ratio(gram)
        return Found([float(ratio) / len(weights)] * len(weights), {"cosine": float(cosine), "ratio": float(ratio)})

    def _ratio(self, gram: Tensor) -> tuple[Tensor, Tensor]:
        """(c, t), each [...], from gram [T, T, ...]."""
        models = len(gram)
        if self.config.compat == "mergekit":
            norms = torch.diagonal(gram, dim1=0, dim2=1).movedim(-1, 0).sqrt()
            cosine = (gram / (norms[:, None] * norms[None, :]).clamp_min(1e-6)).clamp(-1.0, 1.0)
        else:
            cosine = cosines(gram)
        pairs = torch.combinations(torch.arange(models))
        mean = cosine[pairs[:, 0], pairs[:, 1]].mean(dim=0)
        used = mean if self.config.compat == "mergekit" else mean.clamp_min(0.0)
        return mean, models * used / (1 + (models - 1) * used)
