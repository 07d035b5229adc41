"""Karcher mean: the point on the sphere from which the parents pull equally, by the arcs to them.

    x_t = |x_t| u_t;  alpha_t = w_t / sum w
    u <- the direction of sum_t alpha_t u_t
    v = sum_t alpha_t theta_t / sin(theta_t) (u_t - cos(theta_t) u),  cos(theta_t) = <u, u_t>       the logarithms' mean
    u <- cos|v| u + sin|v| v / |v|           until |v| < tol, at most max_iter times
    o = (sum_t alpha_t |x_t|) u

Karcher 1977; mergekit's `karcher` is the equality target, for equal weights, which are all that one has. A tensor at a
time, flattened. All iterates lie in the span of the parents, so the iteration runs on T numbers and their T x T inner
products in float64, and costs nothing. Departures: `on=deltas`; only a tensor that is zero has no direction (there: one
whose norm is below tol); a parent at the point opposite to u, where the logarithm is not defined, does not pull (there:
infinitely). Two parents: SLERP at the second's share, with the mean of the norms. Fine-tunes of one base lie so close
that this is their linear mean, longer by some 1e-4 (models that moved by 2 %): there, take on=deltas or linear.

Cost: two passes over the parents; T^2 operations an entry. tensors T x [any shape].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.merge.method import merge_card
from trimtab.merge.methods.gram import Found, GramMethod, cosines

CARD = merge_card(
    slug="karcher",
    name="Karcher mean",
    paper="Riemannian center of mass, Karcher 1977",
    summary="The mean of several models along arcs: SLERP for more than two, whatever their order.",
    needs=("two or more checkpoints of one architecture",),
    fit_cost="reads every parent twice, writes one model",
    limits=("between fine-tunes of one base it is their linear mean",),
    composes_with=("align",),
    status=("implemented", "verified_cpu"),
    example="trimtab merge karcher --models A B C --out merged",
    choose="Three or more models where you would take SLERP for two.",
)


@dataclass(frozen=True)
class KarcherConfig:
    # steps at most
    max_iter: int = 10
    # the length of the mean pull, in radians, below which it has arrived
    tol: float = 1e-5
    # what is averaged: the models' weights, or their differences to the base
    on: Literal["weights", "deltas"] = "weights"


class Karcher(GramMethod):
    """See the module."""

    slug = "karcher"
    Config = KarcherConfig
    DELTAS = False

    def check(self, parents: int) -> None:
        super().check(parents)
        if self.config.max_iter < 1:
            raise UsageError(f"karcher: max_iter must be 1 or more, not {self.config.max_iter}")
        if not self.config.tol > 0:
            raise UsageError(f"karcher: tol must be above 0, not {self.config.tol:g}")

    def check_weights(self, weights: Sequence[float]) -> None:
        if min(weights) < 0 or sum(weights) == 0:
            raise UsageError("karcher: its weights are shares: none below 0 and not all 0")

    def on_deltas(self, base: bool) -> bool:
        return bool(self.config.on == "deltas")

    def coefficients(self, gram: Tensor, weights: tuple[float, ...]) -> Found:
        alphas = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        norms = gram.diagonal().sqrt()
        there = (norms > 0) & (alphas > 0)
        if not bool(there.any()):
            return Found([0.0] * len(weights), {"steps": 0.0, "pull": 0.0})
        pulls = torch.where(there, alphas, 0.0)
        u, steps, pull = mean_on_sphere(cosines(gram), pulls / pulls.sum(), self.config.max_iter, self.config.tol)
        length = (alphas * norms).sum()
        coefficients = torch.where(norms > 0, length * u / torch.where(norms > 0, norms, 1.0), 0.0)
        return Found(coefficients.tolist(), {"steps": float(steps), "pull": pull})


def mean_on_sphere(cosine: Tensor, alphas: Tensor, max_iter: int, tol: float) -> tuple[Tensor, int, float]:
    """The mean of unit vectors: its coordinates in them, float64 [T], the steps taken, and the last length of the pull.

    cosine: [T, T], the vectors' inner products. alphas: [T], 0 or more, sum 1.
    """

    def length(coordinates: Tensor) -> float:
        return float((coordinates @ cosine @ coordinates).clamp_min(0.0).sqrt())

    u = alphas
    if length(u) < tol:  # they cancel, and no direction is better than the first one's
        u = torch.nn.functional.one_hot((alphas > 0).int().argmax(), len(alphas)).double()
    u = u / length(u)
    pull = 0.0
    for step in range(max_iter):
        cos = (cosine @ u).clamp(-1.0, 1.0)
        sin = (1.0 - cos * cos).sqrt()
        stretch = torch.where(sin > 1e-6, cos.acos() / sin.clamp_min(1e-6), (cos > 0).double())
        logs = alphas * stretch
        v = logs - (logs @ cos) * u
        pull = length(v)
        if pull < tol:
            return u, step, pull
        u = math.cos(pull) * u + math.sin(pull) / pull * v
        u = u / length(u)
    return u, max_iter, pull
