"""Which units of a network may change places: groups of interchangeable units, and everywhere their order shows.

    Place(tensor, axis, start, block)     unit u lies at start + u * block, ..., start + (u + 1) * block - 1 of that axis
    Group(name, size, places)             one permutation; all of its places move together
    Spec(groups)                          of a whole network

A hidden unit of an MLP: rows of one matrix, its bias, columns of the next. block > 1: a head of `block` rows, or a channel that
was flattened into `block` positions. start: a part of a fused tensor.

A permutation is an index list, int64 [size]: applying it puts unit perm[i] of the old tensor at place i. Groups are applied in
the order of `Spec.groups`: one that moves heads within blocks which another group moves comes after it.

The test of a spec is that a permuted network computes what it did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where along one axis of one tensor a group's units lie."""

    tensor: str
    axis: int
    start: int = 0
    block: int = 1


@dataclass(frozen=True)
class Group:
    """Interchangeable units. after: the group whose blocks this one moves units within, or ""."""

    name: str
    size: int
    places: tuple[Place, ...]
    after: str = ""


@dataclass(frozen=True)
class Spec:
    """All groups of a network, in the order in which they are applied."""

    groups: tuple[Group, ...]

    def identity(self) -> dict[str, Tensor]:
        return {group.name: torch.arange(group.size) for group in self.groups}


def apply(spec: Spec, permutations: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The permuted tensors (new ones where a group touches them). A group without a permutation stays."""
    out = dict(tensors)
    for group in spec.groups:
        if group.name in permutations:
            for place in group.places:
                out[place.tensor] = permute(out[place.tensor], place, permutations[group.name])
    return out


def permute(tensor: Tensor, place: Place, permutation: Tensor) -> Tensor:
    """One tensor with the units of one place in another order."""
    index = torch.arange(tensor.shape[place.axis])
    moved = permutation[:, None] * place.block + torch.arange(place.block)[None] + place.start
    index[place.start : place.start + moved.numel()] = moved.flatten()
    return tensor.index_select(place.axis, index)
