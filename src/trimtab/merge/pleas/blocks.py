"""Two networks' units side by side: which are merged, which stay apart, and the block matrices that follow from that.

    Units(a, b)     unit i of the merged axis is unit a[i] of A and unit b[i] of B; -1: of none (both -1: a zero unit)

An axis reads [merged | A's own | B's own]. With W_A, W_B gathered onto the merged axes (0 where an index is -1):

    W = s (W_A + W_B),   s = 1/2 on the rows of merged units, 1 on the others        ("rows": the axis of a layer's outputs)

which is the paper's table of blocks: (merged, merged) the mean of both, (merged, A) = W_A / 2, (A, A) = (A, merged) = W_A,
(A, B) = (B, A) = 0, and the same for B; a bias or a norm's weight is [mean | A's | B's].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.merge.align.matching import SILENT
from trimtab.merge.align.permutation import Group, Permutations, Place, Spec, Tensors, apply, permute, units


@dataclass(frozen=True)
class Units:
    """Where the units along one axis of the merged network come from. a, b: int64 [width], -1 for none."""

    a: Tensor
    b: Tensor

    def __len__(self) -> int:
        return len(self.a)

    @property
    def merged(self) -> Tensor:
        """bool [width]: units of both."""
        return (self.a >= 0) & (self.b >= 0)

    @property
    def scale(self) -> Tensor:
        """float64 [width]: 1/2 for units of both, else 1."""
        return torch.where(self.merged, 0.5, 1.0).to(torch.float64)

    @classmethod
    def fixed(cls, size: int) -> Units:
        """An axis whose order means something to both: inputs, classes, tokens."""
        index = torch.arange(size)
        return cls(index, index)

    def restore(self, side: str) -> Tensor:
        """int64 [n]: where on this axis units 0, ..., n - 1 of "a" or "b" are found."""
        index = self.a if side == "a" else self.b
        own = torch.nonzero(index >= 0).flatten()
        return own[torch.argsort(index[own])]


def split(permutation: Tensor, scores: Tensor, separate: int) -> Units:
    """Keeps the `separate` pairs (i, permutation[i]) of lowest score apart, and merges the rest.

    permutation int64 [n]: unit i of A matches permutation[i] of B. scores [n]. Equal scores: the earlier unit stays apart.
    Order: merged by A's index, then A's own, then B's own (in the same order as A's). Width: n + separate.
    """
    size = len(permutation)
    if not 0 <= separate <= size:
        raise UsageError(f"between 0 and {size} units of a group of {size} can be kept apart, not {separate}")
    # A sort, not a quantile: with equal scores `score >= quantile` keeps more than it should.
    apart = torch.zeros(size, dtype=torch.bool)
    apart[torch.argsort(scores, stable=True)[:separate]] = True
    together, own = torch.nonzero(~apart).flatten(), torch.nonzero(apart).flatten()
    none = torch.full_like(own, -1)
    return Units(torch.cat([together, own, none]), torch.cat([permutation[together], none, permutation[own]]))


def padded(units: Units, width: int) -> Units:
    """The same units and, behind them, ones of neither network, whose weights are 0, up to `width`."""
    none = torch.full((max(width - len(units), 0),), -1)
    return Units(torch.cat([units.a, none]), torch.cat([units.b, none]))


def match_scores(spec: Spec, permutations: Permutations, a: Tensors, b: Tensors) -> dict[str, Tensor]:
    """c_i = C[i, P(i)] of weight matching: the inner product of all entries of unit i of A and of its match.

    float64 [n] a group. Running statistics of batch norms do not count.
    """
    moved = apply(spec, permutations, b)
    return {
        group.name: torch.stack(
            [
                (units(a[one.tensor], one, group.size) * units(moved[one.tensor], one, group.size)).sum(1)
                for one in group.places
                if not one.tensor.endswith(SILENT)
            ]
        ).sum(0)
        for group in spec.groups
    }


def axis_units(
    spec: Spec, splits: Mapping[str, Units], permutations: Permutations, tensor: str, axis: int, size: int
) -> Units:
    """The units along one axis of a tensor of `size` entries.

    splits: of the groups that are widened; the others only follow their permutation. UsageError for a widened group that
    shares its places with another.
    """
    index = torch.arange(size)
    wide: list[tuple[Group, Place]] = []
    for group in spec.groups:
        for place in group.places:
            if (place.tensor, place.axis) == (tensor, axis):
                if group.name in splits:
                    wide.append((group, place))
                elif group.name in permutations:
                    index = permute(index, Place(tensor, 0, place.start, place.block), permutations[group.name])
    a, b, at = [], [], 0
    for group, place in sorted(wide, key=lambda one: one[1].start):
        if place.start < at or _shared(spec, group, place):
            raise UsageError(f"{tensor!r}: group {group.name!r} shares its units with another: it cannot be widened")
        found = splits[group.name]
        a += [torch.arange(at, place.start), _spread(found.a, place)]
        b += [index[at : place.start], _spread(found.b, place)]
        at = place.start + group.size * place.block
    return Units(torch.cat([*a, torch.arange(at, size)]), torch.cat([*b, index[at:]]))


def gather(tensor: Tensor, axes: Sequence[Tensor | None]) -> Tensor:
    """The tensor's entries at an index list an axis (None: the axis as it is), 0 where an index is -1."""
    for axis, index in enumerate(axes):
        if index is not None:
            tensor = tensor.index_select(axis, index.clamp_min(0))
            if bool((index < 0).any()):
                tensor = tensor * along((index >= 0).to(tensor.dtype), axis, tensor.dim())
    return tensor


def block_start(a: Tensor, b: Tensor, axes: Sequence[Units | None], out_axis: int = 0) -> Tensor:
    """The merged tensor before any fit (see the module). axes: one an axis of the tensors, None where no unit moves."""
    both = gather(a, [None if one is None else one.a for one in axes])
    both = both + gather(b, [None if one is None else one.b for one in axes])
    rows = axes[out_axis] if axes else None
    if rows is None:
        return both * 0.5
    return both * along(rows.scale.to(both.dtype), out_axis, both.dim())


def allowed(rows: Units, columns: Units) -> Tensor:
    """bool [rows, columns]: False in the two blocks between A's own and B's own units."""
    from_a, from_b = columns.a >= 0, columns.b >= 0
    return ((rows.a >= 0)[:, None] & from_a) | ((rows.b >= 0)[:, None] & from_b)


def along(vector: Tensor, axis: int, dim: int) -> Tensor:
    """A vector in the shape that multiplies along one axis of a tensor with `dim` axes."""
    shape = [1] * dim
    shape[axis] = -1
    return vector.view(shape)


def _spread(index: Tensor, place: Place) -> Tensor:
    """Unit indices as indices along the place's axis, `block` positions a unit."""
    inside = torch.arange(place.block)
    spread = index[:, None] * place.block + inside + place.start
    return torch.where(index[:, None] >= 0, spread, -1).flatten()


def _shared(spec: Spec, group: Group, place: Place) -> bool:
    first, last = place.start, place.start + group.size * place.block
    return any(
        (other.tensor, other.axis) == (place.tensor, place.axis)
        and (other_group, other) != (group, place)
        and other.start < last
        and first < other.start + other_group.size * other.block
        for other_group in spec.groups
        for other in other_group.places
    )
