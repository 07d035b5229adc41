"""Shared by slerp, nuslerp, karcher and model-stock: all of them are a linear combination of the parents whose coefficients
depend on nothing but the parents' inner products.

    G_ij = <x_i, x_j>            float64 [T, T], summed over the parts of a tensor
    o    = sum_t c_t(G) x_t

An arc between two vectors lies in their plane, and every iterate of a mean on a sphere lies in the span of its points.
So the whole tensor is never needed at once: one pass for G, one for the sum. In float64 the cosine of two fine-tunes,
0.99998 or so, is known to some 14 digits; a float32 sum knows 6, and acos of that knows nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.merge.method import Method, Part, Parts, weighted_sum

OPPOSITE = 0.9995  # minus the cosine from which there is no arc, mergekit's slerp's
Notes = dict[str, float | str]


@dataclass(frozen=True)
class Found:
    """Of one tensor: one coefficient a parent (a number, or a float64 tensor that the entries are multiplied by)."""

    coefficients: Sequence[float | Tensor]
    notes: Notes = field(default_factory=dict)


class GramMethod(Method):
    """A method that is `coefficients` of the Gram matrix of whole tensors, flattened."""

    @abstractmethod
    def coefficients(self, gram: Tensor, weights: tuple[float, ...]) -> Found:
        """From gram, float64 [T, T]."""

    def survey(self, parts: Parts) -> Found | None:
        total: Tensor | None = None
        for part in parts():
            gram = inner_products([tensor.reshape(-1) for tensor in part.tensors], 0)
            total = gram if total is None else total.add_(gram)
            weights = part.weights
        assert total is not None  # a tensor has a part
        return self.coefficients(total, weights)

    def merge(self, part: Part, found: Found | None) -> Tensor:
        assert found is not None
        return combine(part.tensors, found.coefficients)

    def notes(self, found: Found | None) -> Notes:
        return {} if found is None else found.notes


def inner_products(vectors: Sequence[Tensor], dim: int) -> Tensor:
    """Inner products along `dim` of each two: float64 [T, T, the other axes]."""
    wide = [vector.double() for vector in vectors]
    rows = [[torch.linalg.vecdot(one, two, dim=dim) for two in wide[: i + 1]] for i, one in enumerate(wide)]
    return torch.stack([torch.stack([rows[max(i, j)][min(i, j)] for j in range(len(wide))]) for i in range(len(wide))])


def combine(tensors: Sequence[Tensor], coefficients: Sequence[float | Tensor]) -> Tensor:
    """sum_t c_t x_t, in place in the first tensor; a c_t that is a tensor is broadcast."""
    if not isinstance(coefficients[0], Tensor):
        return weighted_sum(tensors, [float(one) for one in coefficients])
    factors = [torch.as_tensor(one).to(tensors[0].dtype) for one in coefficients]
    total = tensors[0].mul_(factors[0])
    for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
        total.addcmul_(tensor, factor)
    return total


def cosines(gram: Tensor) -> Tensor:
    """G_ij / |x_i| |x_j| in [-1, 1]; 0 for a vector that is zero."""
    squares = torch.diagonal(gram, dim1=0, dim2=1).movedim(-1, 0)
    norms = (squares[:, None] * squares[None, :]).sqrt()
    return torch.where(norms > 0, gram / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0).clamp(-1.0, 1.0)


def arc(gram: Tensor, t: float, straight: float) -> tuple[Tensor, Tensor]:
    """The coefficients of the point at t on the arc between two vectors, float64 [2, ...], and where it is a line, bool.

        sin((1 - t) theta) / sin(theta),  sin(t theta) / sin(theta)
        1 - t,  t                     where cos(theta) > straight or < -0.9995, or a vector is zero

    gram: [2, 2, ...]. A zero vector has no angle to anything; opposite ones have no shortest arc, and vectors of unequal
    length that are nearly opposite would come out longer without bound.
    """
    cosine = cosines(gram)[0, 1]
    line = (cosine > straight) | (cosine < -OPPOSITE) | (gram[0, 0] == 0) | (gram[1, 1] == 0)
    theta = torch.where(line, 1.0, cosine.acos())
    first = torch.where(line, 1.0 - t, torch.sin((1.0 - t) * theta) / torch.sin(theta))
    second = torch.where(line, t, torch.sin(t * theta) / torch.sin(theta))
    return torch.stack([first, second]), line


def share(slug: str, weights: Sequence[float]) -> float:
    """The second of two weights over their sum. UsageError where that is not between 0 and 1."""
    total = sum(weights)
    if total == 0 or not 0 <= weights[1] / total <= 1:
        raise UsageError(f"{slug}: the weights {weights[0]:g} and {weights[1]:g} are no shares: give two of 0 or more")
    return weights[1] / total


def two(slug: str, parents: int) -> None:
    """UsageError unless there are two parents."""
    if parents != 2:
        raise UsageError(f"{slug} merges two models, not {parents}: karcher is the mean of more on the sphere")


def arc_notes(line: Tensor, gram: Tensor) -> Notes:
    """Which way was taken, and the cosine."""
    return {"branch": "line" if bool(line) else "arc", "cosine": float(cosines(gram)[0, 1])}
