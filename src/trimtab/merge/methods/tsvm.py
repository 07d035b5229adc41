"""TSVM: the singular vectors of every change, made orthogonal to each other's, so that no task writes over another.

    d_t = U_t S_t V_t^T          keep the k = floor(r / T) largest, r = min(rows, columns)
    U = [U_1 .. U_T], S = diag(S_1 .. S_T), V = [V_1 .. V_T]
    X = P D Q^T  ->  X_o = P Q^T           the polar factor: the nearest matrix with orthonormal columns, of U and of V
    o = b + scale * U_o S V_o^T

Gargiulo et al. 2025 (task singular vectors), arXiv 2412.00081. A change is multiplied by its weight first. Tensors that
are no matrices, embeddings and heads (unless embeddings=svd), and matrices with T > r get the plain mean of the
changes, which the report of a merge says.

Departures from the published code, both because a singular vector of a zero singular value is whatever the library
returns:
- U_t, V_t: those with S < 1e-6 of the largest are dropped. A change of rank 3 of which 4 are kept brings one arbitrary
  vector, and the polar factor turns the true ones away from it. Changes made by LoRA always have such. (Here for both
  methods, always.)
- U, V: directions of D below 1e-6 of the largest are dropped too. Two equal changes make U = [U_1 U_1], half of whose D
  is zero; P's columns there are arbitrary, and S writes them into the merge at full strength. The published form then
  has 1.3 times the norm of one change, of which 0.94 is noise that another rounding error replaces by other noise. Here
  it is the change's better half, exactly.
The arithmetic is float64, without which 1e-6 would be within the error of the decomposition, and so are the differences to
the base: subtracted in float32, an adapter's small change has the full rank of its base's rounding.

Cost: T + 2 singular value decompositions a matrix, some 20 r^2 max(rows, columns) operations each, on one thread a
tensor; all of one tensor of every parent in memory. deltas T x [rows, columns].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.merge.method import Method, Part, Parts, Place, merge_card, weighted_sum

CARD = merge_card(
    slug="tsvm",
    name="TSV-Merge",
    paper="Task singular vectors, arXiv 2412.00081",
    summary="Merges the leading singular vectors of every change after making them orthogonal to each other.",
    needs=("two or more fine-tunes", "the base they share"),
    fit_cost="T + 2 singular value decompositions of every matrix: some two hours of one core a billion weights",
    limits=(
        "fine-tunes that are much alike: what they share is halved, and where they differ is blown up",
        "every matrix needs singular value decompositions: slow from some billion weights on",
    ),
    conflicts=("align",),
    status=("implemented", "verified_cpu"),
    example="trimtab merge tsvm --models A B C --base BASE --out merged",
    choose="Fine-tunes for different skills, or many of them, with nothing to tune: it needs no density and no weights.",
)

RANK = 1e-6  # of the largest singular value: below it is zero


class Triples(NamedTuple):
    """Singular triples of one change: u [rows, k], s [k] descending, vt [k, columns]."""

    u: Tensor
    s: Tensor
    vt: Tensor


@dataclass(frozen=True)
class TsvmConfig:
    # the merged change is multiplied by this (alpha)
    scale: float = 1.0
    # how embeddings and heads, whose rows are tokens', are merged
    embeddings: Literal["mean", "svd"] = "mean"


class Tsvm(Method):
    """See the module."""

    slug = "tsvm"
    Config = TsvmConfig
    WIDE = True

    def whole(self, place: Place) -> bool:
        return not self.why_mean(place)

    def why_mean(self, place: Place) -> str:
        """Why a tensor gets the mean of its changes; "" where singular vectors are merged."""
        if len(place.shape) != 2:
            return "no matrix"
        if place.embedding and self.config.embeddings == "mean":
            return "embeddings"
        if min(place.shape) < len(place.weights):
            return "more models than singular values"
        return ""

    def survey(self, parts: Parts) -> Place:
        return next(parts()).place

    def notes(self, found: Place) -> dict[str, float | str]:
        why = self.why_mean(found)
        return {"branch": f"mean: {why}" if why else "singular vectors"}

    def merge(self, part: Part, found: Place) -> Tensor:
        models, scale = len(part.tensors), self.config.scale
        if self.why_mean(part.place):
            return weighted_sum(part.tensors, [weight * scale / models for weight in part.weights])
        factors, ranks = self.shares(part.tensors)
        tasks = [
            leading(tensor.double() * (weight * factor), rank)
            for tensor, weight, factor, rank in zip(part.tensors, part.weights, factors, ranks, strict=True)
        ]
        return (orthogonal_sum(tasks) * scale).to(part.tensors[0].dtype)

    def shares(self, deltas: Sequence[Tensor]) -> tuple[list[float], list[int]]:
        """Each change's factor and how many of its singular triples are kept, their sum at most min(rows, columns)."""
        return [1.0] * len(deltas), [min(deltas[0].shape) // len(deltas)] * len(deltas)


def leading(delta: Tensor, rank: int) -> Triples:
    """The largest singular triples of a matrix, `rank` at most; those that are numerically zero are left out."""
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    kept = min(rank, int((s > RANK * s[0]).sum()))
    return Triples(u[:, :kept], s[:kept], vt[:kept])


def orthogonal_sum(tasks: Sequence[Triples]) -> Tensor:
    """U_o S V_o^T [rows, columns] of all tasks' triples together."""
    u = torch.cat([task.u for task in tasks], dim=1)
    vt = torch.cat([task.vt for task in tasks], dim=0)
    s = torch.cat([task.s for task in tasks])
    if not len(s):
        return torch.zeros(u.shape[0], vt.shape[1], dtype=u.dtype)
    return (polar(u) * s) @ polar(vt.T).T


def polar(x: Tensor) -> Tensor:
    """The polar factor of x [n, k], k <= n: P Q^T of x = P D Q^T, over the directions in which D is not zero.

    Orthonormal columns where x has full rank; a partial isometry, the same whatever the library, where it has not.
    """
    p, d, qt = torch.linalg.svd(x, full_matrices=False)
    kept = d > RANK * d[0]
    return p[:, kept] @ qt[kept]
