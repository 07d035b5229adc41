"""Why the straight path between two models is flat after matching, or is not: the analysis of arXiv 2402.04051.

    L2 reduction       1 - ||A - pi B|| / ||A - B||, a layer and in total (the paper: small, though the barrier vanishes)
    Taylor prediction  the path's excess loss by second-order expansions at both ends, from mu^T H mu, mu = pi B - A
    R_gamma            how well singular directions line up, over those with S_i >= gamma S_max:
                       sum_layers sum_ij (u^A_i . u^B_j)(v^A_i . v^B_j) / sum_layers min(n_A, n_B)
                       1: aligned; about 0: unrelated
    weighted R         the same with weights S^A_i S^B_j over all directions, divided by sum_i S^A_i S^B_i: at most 1
    input alignment    the share of the layer's input energy within the span of its leading right singular vectors

Permutations cannot change singular values, only directions: for W_A = sum S^A_i u^A_i v^A_i^T and a layer's row and column
permutations P and Q,

    ||A - P B Q^T||_F^2 = sum (S^A)^2 + sum (S^B)^2 - 2 sum_ij S^A_i S^B_j (u^A_i . P u^B_j)(v^A_i . Q v^B_j)

so weight matching aligns directions, those of large singular values first. Our choices: R divides by the smaller of the two
counts (the sum cannot exceed it); the expansions of the two ends are mixed in the proportion (1 - l) : l, so that the
prediction is exact at both.

Cost: two SVDs a layer; pi B shares B's. Two Hessian-vector products (about four gradients) for the Taylor prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.merge.align.permutation import Permutations, Place, Spec, permute

Tensors = Mapping[str, Tensor]
LARGEST = 1 << 25  # entries of the largest matrix whose singular vectors are asked for


@dataclass(frozen=True)
class Reduction:
    """before, after: ||A - B|| and ||A - pi B||; value: 1 - after / before, None where A and B are equal."""

    before: float
    after: float

    @property
    def value(self) -> float | None:
        return None if self.before == 0 else 1 - self.after / self.before


def l2_reduction(a: Tensors, b: Tensors, permuted: Tensors) -> dict[str, Reduction]:
    """A tensor each, and "total", over the floating-point tensors."""
    found, total = {}, [0.0, 0.0]
    for name, one in a.items():
        if not one.is_floating_point():
            continue
        squares = [_square(one, side[name]) for side in (b, permuted)]
        total = [sum(pair) for pair in zip(total, squares, strict=True)]
        found[name] = Reduction(squares[0] ** 0.5, squares[1] ** 0.5)
    return {**found, "total": Reduction(total[0] ** 0.5, total[1] ** 0.5)}


def _square(one: Tensor, other: Tensor) -> float:
    return float((one.to(torch.float64) - other.to(torch.float64)).square().sum())


# Singular directions


@dataclass(frozen=True)
class Directions:
    """u [out, r], s [r] in falling order, v [in, r], float64: of a layer's weight as a matrix."""

    u: Tensor
    s: Tensor
    v: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Directions:
        """A convolution's weight is [out, in x kernel]."""
        u, s, vh = torch.linalg.svd(weight.detach().to(torch.float64).flatten(1), full_matrices=False)
        return cls(u, s, vh.T)

    def permuted(self, name: str, spec: Spec, permutations: Permutations) -> Directions:
        """Of a matrix [out, in] `name` after these permutations: its vectors' entries move, its values stay."""
        sides = [self.u, self.v]
        for group in spec.groups:
            for place in group.places if group.name in permutations else ():
                if place.tensor == name:
                    moved = Place(name, 0, place.start, place.block)
                    sides[place.axis] = permute(sides[place.axis], moved, permutations[group.name])
        return Directions(sides[0], self.s, sides[1])

    def top(self, gamma: float) -> int:
        """How many have S_i >= gamma S_max, of those above rounding (a singular value of 0 has no direction)."""
        return int(((self.s >= gamma * self.s[0]) & (self.s > 1e-12 * self.s[0])).sum())


def matrices(tensors: Tensors, largest: int = LARGEST) -> list[str]:
    """Names of the tensors with two or more axes, those with more entries than `largest` left out."""
    return [
        name
        for name, one in tensors.items()
        if one.is_floating_point() and one.ndim >= 2 and 0 < one.numel() <= largest
    ]


def overlaps(a: Directions, b: Directions, gamma: float = 0.0) -> tuple[float, int]:
    """(sum_ij (u^A_i . u^B_j)(v^A_i . v^B_j) over the leading directions, the smaller of their counts)."""
    n, m = a.top(gamma), b.top(gamma)
    return float(((a.u[:, :n].T @ b.u[:, :m]) * (a.v[:, :n].T @ b.v[:, :m])).sum()), min(n, m)


def alignment(a: Mapping[str, Directions], b: Mapping[str, Directions], gamma: float = 0.0) -> dict[str, float]:
    """R_gamma a layer, and "total"."""
    found, top, bottom = {}, 0.0, 0
    for name in a:
        overlap, count = overlaps(a[name], b[name], gamma)
        found[name] = overlap / max(count, 1)
        top, bottom = top + overlap, bottom + count
    return {**found, "total": top / max(bottom, 1)}


def weighted_alignment(a: Mapping[str, Directions], b: Mapping[str, Directions]) -> dict[str, float]:
    """sum_ij S^A_i S^B_j (u.u)(v.v) / sum_i S^A_i S^B_i a layer, and "total"; at most 1 (von Neumann's trace inequality)."""
    found, top, bottom = {}, 0.0, 0.0
    for name in a:
        inner = _weighted(a[name], b[name])
        most = float((a[name].s * b[name].s).sum())
        found[name] = inner / most if most else 0.0
        top, bottom = top + inner, bottom + most
    return {**found, "total": top / bottom if bottom else 0.0}


def _weighted(a: Directions, b: Directions) -> float:
    return float(((a.u.T @ b.u) * (a.v.T @ b.v) * a.s[:, None] * b.s[None]).sum())


def distance_by_directions(a: Directions, b: Directions) -> float:
    """||A - B||_F^2 by the identity in the module's docstring; b: directions of the permuted weight."""
    return float(a.s.square().sum() + b.s.square().sum()) - 2 * _weighted(a, b)


def input_alignment(inputs: Tensor, weight: Directions, gamma: float = 0.3) -> float:
    """Share of the energy of a layer's inputs [N, in] in the span of its right singular vectors with S_i >= gamma S_max."""
    inputs = inputs.to(torch.float64)
    inside = (inputs @ weight.v[:, : weight.top(gamma)]).square().sum()
    return float(inside / inputs.square().sum().clamp_min(1e-300))


# Curvature


@dataclass(frozen=True)
class Expansion:
    """L(theta + t mu) up to second order: value, slope = grad . mu, curvature = mu^T H mu."""

    value: float
    slope: float
    curvature: float

    def at(self, t: float) -> float:
        return self.value + t * self.slope + 0.5 * t * t * self.curvature


def expand(loss: Callable[[dict[str, Tensor]], Tensor], tensors: Tensors, direction: Tensors) -> Expansion:
    """The expansion of loss(tensors) along `direction` (floating-point tensors), by a double backward."""
    names = [name for name in direction if tensors[name].is_floating_point()]
    at = {name: tensors[name].detach().clone().requires_grad_() for name in names}
    value = loss({**dict(tensors), **at})
    gradients = torch.autograd.grad(value, list(at.values()), create_graph=True, allow_unused=True)
    slope = sum(
        (
            (gradient * direction[name]).sum()
            for name, gradient in zip(names, gradients, strict=True)
            if gradient is not None
        ),
        torch.zeros((), dtype=value.dtype),
    )
    products = torch.autograd.grad(slope, list(at.values()), allow_unused=True) if slope.requires_grad else ()
    curvature = sum(
        float((product * direction[name]).sum())
        for name, product in zip(names, products, strict=bool(products))
        if product is not None
    )
    return Expansion(float(value.detach()), float(slope.detach()), curvature)


def taylor(
    loss: Callable[[dict[str, Tensor]], Tensor], a: Tensors, b: Tensors, lambdas: Sequence[float]
) -> tuple[list[float], Expansion, Expansion]:
    """The excess loss that curvature predicts at each l, and the expansions at A and at B, both along mu = B - A.

    A prediction far from the true excess means that the ends are not within each other's quadratic neighbourhood.
    """
    direction = {
        name: (b[name].to(torch.float64) - one.to(torch.float64)).to(one.dtype)
        for name, one in a.items()
        if one.is_floating_point()
    }
    first, last = expand(loss, a, direction), expand(loss, b, direction)
    excess = [
        (1 - at) * first.at(at) + at * last.at(at - 1) - (1 - at) * first.value - at * last.value for at in lambdas
    ]
    return excess, first, last
