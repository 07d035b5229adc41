"""The k entries of largest magnitude of a tensor that is seen in parts, exactly, in memory that hardly grows with it.

A first pass draws a sample. Two of its values stand a little above and below where the k-th is expected; a second pass counts
what lies beyond them and keeps the entries between, of which a partition gives the k-th exactly (should it lie outside, a
further pass with wider bounds finds it). That takes a nanosecond an entry, where a sort takes sixty. Among entries that equal
the k-th the first by index are taken, so that the selection does not depend on how the tensor is cut: one more pass, as far
as the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SAMPLE = 1 << 15  # entries, about; a tensor with fewer is its own sample
NONE = float("inf")  # the level of a cut that nothing passes
SIGMAS, WIDER = 4.0, 8.0  # how far from the expected rank the bounds are at first; the factor where that was too near

Magnitudes = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True)
class Cut:
    """Entries whose magnitude is above `level` are in, and those equal to it whose flat index is below `before`."""

    level: float
    before: int = 0

    @property
    def all(self) -> bool:
        """Whether every entry is in."""
        return self.level < 0

    def __call__(self, tensor: Tensor, start: int = 0) -> Tensor:
        """Which entries are in: bool in the tensor's shape; start: the flat index of its first entry."""
        values = _magnitudes(tensor)
        found = values > self.level
        end = max(self.before - start, 0)
        found[:end] |= values[:end] == self.level
        return torch.from_numpy(found).view(tensor.shape)

    def trim(self, tensor: Tensor, start: int = 0) -> Tensor:
        """The tensor with 0 for the entries that are not in; a new one unless all are. Five times as fast as by a mask."""
        if self.all:
            return tensor
        flat, end = tensor.reshape(-1), min(max(self.before - start, 0), tensor.numel())
        kind = np.float64 if tensor.dtype == torch.float64 else np.float32
        below = float(np.nextafter(kind(self.level), kind(-1)))  # above this: from `level` on
        if end in (0, len(flat)):
            return torch.hardshrink(tensor, below if end else self.level)
        parts = [torch.hardshrink(flat[:end], below), torch.hardshrink(flat[end:], self.level)]
        return torch.cat(parts).view(tensor.shape)


# A pass over the tensors of all parents: (flat index of the first entry, one tensor a parent), in order.
Pass = Callable[[], Iterable[tuple[int, Sequence[Tensor]]]]


def largest(parts: Pass, ks: Sequence[int], numel: int) -> list[Cut]:
    """For each parent t, the `Cut` that keeps the ks[t] entries of largest magnitude."""
    cuts = {t: Cut(-1.0) if k >= numel else Cut(NONE) for t, k in enumerate(ks) if not 0 < k < numel}
    todo = [t for t in range(len(ks)) if t not in cuts]
    samples = _sample(parts, todo, numel) if todo else {}
    tied: dict[int, tuple[float, int]] = {}
    sigmas = SIGMAS
    while todo:
        counts = {t: _Count(ks[t], *_bounds(samples[t], ks[t] / numel, sigmas)) for t in todo}
        if len(samples[todo[0]]) == numel:
            for t in todo:
                counts[t].see(samples[t])
        else:
            for _, tensors in parts():
                for t in todo:
                    counts[t].see(_magnitudes(tensors[t]))
        for t in [*todo]:
            found = counts[t].found()
            if found is not None:
                level, wanted, equal = found
                cuts[t] = Cut(level, numel)
                if wanted < equal:
                    tied[t] = level, wanted
                todo.remove(t)
        sigmas *= WIDER
    cuts |= _first_of(parts, tied)
    return [cuts[t] for t in range(len(ks))]


class _Count:
    """Counts entries beyond two bounds and keeps those between, to find the k-th largest."""

    def __init__(self, k: int, low: float, high: float) -> None:
        self.k, self.low, self.high = k, low, high
        self.counts = np.zeros(4, dtype=np.int64)  # > high, >= high, > low, >= low
        self.between = _Pile()

    def see(self, values: Magnitudes) -> None:
        above, from_high, over = values > self.high, values >= self.high, values > self.low
        self.counts += [np.count_nonzero(one) for one in (above, from_high, over, values >= self.low)]
        self.between.add(values[over > from_high])  # of bools: the one and not the other

    def found(self) -> tuple[float, int, int] | None:
        """(the k-th largest, how many that equal it are among the first k, how many there are); None: beyond the bounds."""
        above, from_high, over, from_low = (int(count) for count in self.counts)
        if not above < self.k <= from_low:
            return None
        if self.k <= from_high:
            return self.high, self.k - above, from_high - above
        if self.k > over:
            return self.low, self.k - over, from_low - over
        values = self.between.all()
        place = len(values) - (self.k - from_high)
        level = np.partition(values, place)[place]
        higher = from_high + int(np.count_nonzero(values > level))
        return float(level), self.k - higher, int(np.count_nonzero(values == level))


class _Pile:
    """A growing array. A list of small ones would pin the large freed blocks that they are cut from, one a part."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self.dtype: Any = np.float32

    def add(self, values: Magnitudes) -> None:
        self.dtype = values.dtype
        self.bytes += values.data

    def all(self) -> Magnitudes:
        found: Magnitudes = np.frombuffer(self.bytes, self.dtype)
        return found


def _bounds(sample: Magnitudes, share: float, sigmas: float) -> tuple[float, float]:
    """Two magnitudes between which the one lies that `share` of the entries reach, as far as the (sorted) sample tells."""
    count = len(sample)
    middle = (1 - share) * count
    margin = sigmas * (count * share * (1 - share)) ** 0.5 + sigmas
    low, high = int(middle - margin), int(middle + margin)
    return float(sample[low]) if low >= 0 else -1.0, float(sample[high]) if high < count else NONE


def _sample(parts: Pass, which: Sequence[int], numel: int) -> dict[int, Magnitudes]:
    """Sorted magnitudes of one entry in each stride, at random places, so that no pattern in the rows is met in step."""
    stride = max(1, numel // SAMPLE)
    found = {t: _Pile() for t in which}
    for start, tensors in parts():
        count = tensors[which[0]].numel()
        places = np.arange(0, count, stride)
        if stride > 1:
            places += np.random.default_rng(start).integers(0, stride, len(places))
            places = places[places < count]
        for t in which:
            found[t].add(np.abs(tensors[t].detach().reshape(-1).numpy()[places]))
    return {t: np.sort(values.all()) for t, values in found.items()}


def _first_of(parts: Pass, tied: dict[int, tuple[float, int]]) -> dict[int, Cut]:
    """The cuts where more entries equal the level than are wanted: the first of them by index."""
    cuts: dict[int, Cut] = {}
    left = {t: wanted for t, (_, wanted) in tied.items()}
    for start, tensors in parts() if tied else ():
        for t in [*left]:
            equal = _magnitudes(tensors[t]) == tied[t][0]
            count = int(np.count_nonzero(equal))
            if count >= left[t]:
                cuts[t] = Cut(tied[t][0], start + int(np.flatnonzero(equal)[left.pop(t) - 1]) + 1)
            else:
                left[t] -= count
        if not left:
            break
    return cuts


def magnitude_bits(tensor: Tensor) -> Tensor:
    """|x| in float32 as int32, in the order of |x|. NaN comes last."""
    return tensor.to(torch.float32).contiguous().view(torch.int32) & 0x7FFFFFFF


def _magnitudes(tensor: Tensor) -> Magnitudes:
    """|x|, flat. numpy compares and counts seven times as fast as torch does on one thread."""
    found: Magnitudes = tensor.detach().abs().reshape(-1).numpy()
    return found
