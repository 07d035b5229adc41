"""The k entries of largest magnitude of a tensor that is seen in parts, exactly, in memory that does not grow with it.

A float32's bits without the sign, read as a whole number, are in the order of its magnitude. Two histograms, of the upper 16
of these 31 bits and then of the lower 15 within the one bin where the k-th falls, give the k-th magnitude exactly: two passes
of a few nanoseconds an entry, where a sort takes a hundred. Among entries that equal it the first by index are taken, so that
the selection does not depend on how the tensor is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HIGH, LOW = 1 << 16, 1 << 15
NONE = (1 << 31) - 1  # above every magnitude


@dataclass(frozen=True)
class Cut:
    """Entries above `bits` are in, and those equal to it whose flat index is below `before`."""

    bits: int
    before: int

    @property
    def all(self) -> bool:
        """Whether every entry is in."""
        return self.bits < 0

    def __call__(self, tensor: Tensor, start: int = 0) -> Tensor:
        """Which entries are in: bool in the tensor's shape; start: the flat index of its first entry."""
        bits = magnitude_bits(tensor)
        found = bits > self.bits
        if self.before > start:
            end = self.before - start
            tied = (bits == self.bits).flatten()
            tied[end:] = False
            found |= tied.view(found.shape)
        return found


def magnitude_bits(tensor: Tensor) -> Tensor:
    """|x| in float32 as int32, in the order of |x|. NaN comes last."""
    return tensor.to(torch.float32).contiguous().view(torch.int32) & 0x7FFFFFFF


# A pass over the tensors of all parents: (flat index of the first entry, one tensor a parent), in order.
Pass = Callable[[], Iterable[tuple[int, Sequence[Tensor]]]]


def largest(parts: Pass, ks: Sequence[int], numel: int) -> list[Cut]:
    """For each parent t, the `Cut` that keeps the ks[t] entries of largest magnitude."""
    cuts = {t: Cut(-1, 0) if k >= numel else Cut(NONE, 0) for t, k in enumerate(ks) if not 0 < k < numel}
    todo = [t for t in range(len(ks)) if t not in cuts]
    if todo:
        high = [torch.zeros(HIGH, dtype=torch.int64) for _ in ks]
        for _, tensors in parts():
            for t in todo:
                high[t] += torch.bincount((magnitude_bits(tensors[t]) >> 15).flatten(), minlength=HIGH)
        bins = {t: _bin_of(high[t], ks[t]) for t in todo}
        low = [torch.zeros(LOW, dtype=torch.int64) for _ in ks]
        for _, tensors in parts():
            for t in todo:
                bits = magnitude_bits(tensors[t]).flatten()
                low[t] += torch.bincount(bits[(bits >> 15) == bins[t][0]] & (LOW - 1), minlength=LOW)
        for t in todo:
            cuts[t] = _exactly(parts, t, ks[t], bins[t], low[t], numel)
    return [cuts[t] for t in range(len(ks))]


def _exactly(parts: Pass, t: int, k: int, high: tuple[int, int], low: Tensor, numel: int) -> Cut:
    place, above = _bin_of(low, k - high[1])
    bits, wanted = (high[0] << 15) | place, k - high[1] - above
    if int(low[place]) == wanted:
        return Cut(bits, numel)
    for start, tensors in parts():  # too many equal the k-th: the first of them by index
        tied = (magnitude_bits(tensors[t]).flatten() == bits).nonzero().flatten()
        if len(tied) >= wanted:
            return Cut(bits, start + int(tied[wanted - 1]) + 1)
        wanted -= len(tied)
    return Cut(bits, numel)


def _bin_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin in which the k-th largest falls, and how many are in the bins above it."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    return len(counts) - 1 - place, int(from_top[place - 1]) if place else 0
