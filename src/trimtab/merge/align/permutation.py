"""Which units of a network may change places: groups of interchangeable units, and everywhere their order shows.

    Place(tensor, axis, start, block)     unit u lies at start + u * block, ..., start + (u + 1) * block - 1 of that axis
    Group(name, size, places)             one permutation; all of its places move together
    Spec(groups)                          of a whole network

A hidden unit of an MLP: rows of one matrix, its bias, columns of the next. block > 1: a head of `block` rows, or a channel
that was flattened into `block` positions. start: a part of a fused tensor.

A permutation is an index list, int64 [size]: applying it puts unit perm[i] of the old tensor at place i. Groups are applied
in the order of `Spec.groups`: one that moves heads within blocks which another group moves comes after it.

The test of a spec is that a permuted network computes what it did: `verify`. Specs are made by `specs.py` (language models,
from their config) and `module_specs.py` (torch modules), or read from JSON (`Spec.from_dict`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UsageError

Permutations = Mapping[str, Tensor]
Tensors = Mapping[str, Tensor]


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

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """One permutation a group, uniformly drawn."""
        return {group.name: torch.randperm(group.size, generator=generator) for group in self.groups}

    def within(self, group: Group) -> tuple[Group, ...]:
        """The groups that move units within the blocks of `group`."""
        return tuple(one for one in self.groups if one.after == group.name)

    def only(self, names: set[str]) -> Spec:
        """The spec of these groups, the others fixed."""
        return Spec(tuple(group for group in self.groups if group.name in names))

    def tensors(self) -> list[str]:
        """The names of all tensors that a group touches, in order."""
        return list(dict.fromkeys(place.tensor for group in self.groups for place in group.places))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """UsageError for a place outside its tensor, a doubled name, or a group that comes before the one it is `after`."""
        seen: set[str] = set()
        for group in self.groups:
            if group.name in seen:
                raise UsageError(f"the permutation spec has two groups {group.name!r}")
            if group.after and group.after not in seen:
                raise UsageError(
                    f"the permutation spec: group {group.name!r} comes before {group.after!r}, which it is after"
                )
            seen.add(group.name)
            for place in group.places:
                shape = shapes.get(place.tensor)
                if shape is None:
                    raise UsageError(f"the permutation spec names {place.tensor!r}, which the model lacks")
                end = place.start + group.size * place.block
                if not 0 <= place.axis < len(shape) or place.start < 0 or place.block < 1 or end > shape[place.axis]:
                    raise UsageError(
                        f"the permutation spec: group {group.name!r} has {group.size} units of {place.block} from "
                        f"{place.start} on along axis {place.axis} of {place.tensor!r}, whose shape is {tuple(shape)}"
                    )

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` reads them."""
        return {
            "groups": [
                {
                    "name": group.name,
                    "size": group.size,
                    "places": [[one.tensor, one.axis, one.start, one.block] for one in group.places],
                    **({"after": group.after} if group.after else {}),
                }
                for group in self.groups
            ]
        }

    @classmethod
    def from_dict(cls, data: Any) -> Spec:
        """From {"groups": [{"name", "size", "places": [[tensor, axis(, start, block)], ...](, "after")}, ...]}."""
        try:
            return cls(
                tuple(
                    Group(
                        str(one["name"]),
                        int(one["size"]),
                        tuple(Place(str(place[0]), *(int(number) for number in place[1:])) for place in one["places"]),
                        str(one.get("after", "")),
                    )
                    for one in data["groups"]
                )
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UsageError(
                'a permutation spec is {"groups": [{"name": ..., "size": ..., "places": [[tensor, axis, start, block], '
                f"...]}}, ...]}}; this one is not ({type(error).__name__}: {error})"
            ) from error


def apply(spec: Spec, permutations: Permutations, tensors: Tensors) -> dict[str, Tensor]:
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
    return tensor.index_select(place.axis, index.to(tensor.device))


def units(tensor: Tensor, place: Place, size: int) -> Tensor:
    """The tensor's entries by unit, float64 [size, rest]; the same order of `rest` for every tensor of one shape."""
    part = tensor.detach().narrow(place.axis, place.start, size * place.block).movedim(place.axis, 0)
    return part.to(torch.float64).reshape(size, -1)


def is_identity(permutations: Permutations) -> bool:
    return all(torch.equal(one, torch.arange(len(one))) for one in permutations.values())


def inverse(permutation: Tensor) -> Tensor:
    """The permutation that undoes one group's (of nested groups, undo the inner first)."""
    return torch.argsort(permutation)


def verify(spec: Spec, tensors: Tensors, function: Callable[[dict[str, Tensor]], Tensor], seed: int = 0) -> float:
    """How much the network's output moves when all groups are permuted at random, relative to its largest entry.

    function: tensors -> outputs, on inputs of its own choice. A right spec gives rounding error: some 1e-6 in float32.
    """
    before = function(dict(tensors)).detach()
    after = function(apply(spec, spec.random(torch.Generator().manual_seed(seed)), tensors)).detach()
    return float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))


def check_function(
    spec: Spec,
    tensors: Tensors,
    function: Callable[[dict[str, Tensor]], Tensor],
    seed: int = 0,
    tolerance: float = 1e-4,
) -> None:
    """UsageError, naming the groups at fault, unless a randomly permuted network computes what it did (see `verify`)."""
    spec.check({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if verify(spec, tensors, function, seed) <= tolerance:
        return
    at_fault = [
        group.name
        for group in spec.groups
        if verify(spec.only({group.name}), tensors, function, seed) > tolerance  # alone: a nested group needs no parent
    ]
    raise UsageError(
        f"the permutation spec is wrong: permuting {', '.join(map(repr, at_fault[:8])) or 'its groups together'} changes "
        "what the network computes"
    )
