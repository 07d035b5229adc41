"""Safetensors files written tensor by tensor, in any order, from layouts that are known before the first byte.

The library writes a shard from tensors that are all in memory. Here a file is laid out first (header, then every tensor at
its offset), its space is claimed from the disk at once, and rows are written where they belong as they are made.

A file is called NAME.partial until all of it is on disk.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from trimtab.checkpoint import INDEX
from trimtab.files import sync_tree, write_json
from trimtab.merge.source import NAMES, Entry

PARTIAL = ".partial"


@dataclass
class Shard:
    """One file: its name, its header's bytes, where each tensor's data begin, and how long it is."""

    file: str
    header: bytes
    offsets: dict[str, int]
    nbytes: int
    handle: int = field(default=-1, repr=False)


class Shards:
    """The files of one model in `folder`. entries: every tensor, in the order in which shards are filled."""

    def __init__(self, folder: Path, entries: dict[str, Entry], max_bytes: int) -> None:
        self.folder = folder
        self.entries = entries
        self.shards = _layout(entries, max_bytes)
        self._shard_of = {name: shard for shard in self.shards for name in shard.offsets}

    def open(self) -> None:
        """Opens what is there and makes what is not, its space claimed. OSError (ENOSPC) where the disk has none left.

        A file of another length or with another header than it must have is begun anew.
        """
        for shard in self.shards:
            final, partial = self._names(shard)
            there = final if final.exists() and not partial.exists() else partial
            shard.handle = os.open(there, os.O_RDWR | os.O_CREAT, 0o644)
            size = os.fstat(shard.handle).st_size
            if size != shard.nbytes or os.pread(shard.handle, len(shard.header), 0) != shard.header:
                os.replace(there, partial)
                os.ftruncate(shard.handle, 0)
                _claim(shard.handle, shard.nbytes)
                os.pwrite(shard.handle, shard.header, 0)

    def withdraw(self) -> None:
        """Calls the files partial again: they are to be written to."""
        for shard in self.shards:
            final, partial = self._names(shard)
            if not partial.exists():
                os.replace(final, partial)

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Rows of a tensor from row `start` on, in the dtype of its entry. Safe to call from several threads."""
        entry, shard = self.entries[name], self._shard_of[name]
        row = entry.nbytes // entry.shape[0] if entry.shape and entry.shape[0] else 0
        data = rows.contiguous().view(-1).view(torch.uint8).numpy().data
        at, done = shard.offsets[name] + start * row, 0
        while done < len(data):
            done += os.pwrite(shard.handle, data[done : done + (1 << 30)], at + done)

    def checksum(self, name: str) -> int:
        """The sum of a tensor's bytes in the file, as 64-bit words modulo 2^64 (the tail as bytes): told from torn data."""
        entry, shard = self.entries[name], self._shard_of[name]
        total, left, at = 0, entry.nbytes, shard.offsets[name]
        while left:
            data = os.pread(shard.handle, min(left, 1 << 24), at)
            if not data:
                return -1
            total += checksum(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            at, left = at + len(data), left - len(data)
        return total % (1 << 64)

    def sync(self) -> None:
        """Waits until all that was written is on disk."""
        for shard in self.shards:
            os.fsync(shard.handle)

    def close(self) -> None:
        for shard in self.shards:
            if shard.handle >= 0:
                os.close(shard.handle)
                shard.handle = -1

    def publish(self) -> None:
        """Gives the finished files their names and writes the index, where there are several."""
        self.sync()
        for shard in self.shards:
            final, partial = self._names(shard)
            if partial.exists():
                os.replace(partial, final)
        sync_tree(self.folder, deep=False)
        if len(self.shards) > 1:
            total = sum(entry.nbytes for entry in self.entries.values())
            files = {name: shard.file for name, shard in sorted(self._shard_of.items())}
            write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})

    def discard(self) -> None:
        """Removes the partial files, and the index."""
        self.close()
        for shard in self.shards:
            self._names(shard)[1].unlink(missing_ok=True)
        (self.folder / INDEX).unlink(missing_ok=True)

    def _names(self, shard: Shard) -> tuple[Path, Path]:
        """What the file is called when it is whole, and until then."""
        return self.folder / shard.file, self.folder / (shard.file + PARTIAL)


def write_shards(folder: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, Entry], max_bytes: int) -> None:
    """Writes tensors that are all in memory, and nothing that looks whole if it fails."""
    shards = Shards(folder, dict(entries), max_bytes)
    try:
        shards.open()
        shards.withdraw()
        for name, tensor in tensors.items():
            shards.write(name, 0, tensor)
        shards.publish()
    except BaseException:
        shards.discard()
        raise
    finally:
        shards.close()


def checksum(data: Tensor) -> int:
    """The sum of bytes as 64-bit words modulo 2^64; additive over pieces whose lengths are multiples of 8."""
    data = data.contiguous().view(-1).view(torch.uint8)
    whole = len(data) // 8 * 8
    total = int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum(dtype=torch.int64))
    return total % (1 << 64)


def _layout(entries: dict[str, Entry], max_bytes: int) -> list[Shard]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if groups[-1] and size + entry.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += entry.nbytes
    count = len(groups)
    names = (
        [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count > 1
        else ["model.safetensors"]
    )
    return [_shard(file, group, entries) for file, group in zip(names, groups, strict=True)]


def _shard(file: str, names: Sequence[str], entries: dict[str, Entry]) -> Shard:
    # Wide types first, as the library does: every tensor then begins at a multiple of its own size.
    order = sorted(names, key=lambda name: (-entries[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, at = {}, 0
    for name in order:
        entry = entries[name]
        header[name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        offsets[name] = at
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return Shard(file, struct.pack("<Q", len(text)) + text, {k: v + start for k, v in offsets.items()}, start + at)


def _claim(handle: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(handle, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(handle, nbytes)  # a file system that cannot promise space: a full disk is met when writing
