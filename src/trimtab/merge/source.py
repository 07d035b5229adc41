"""Where a parent's tensors come from: read by rows, never a whole model, into memory of our own.

A `Source` says what it holds (`entries`) and reads rows of one tensor. `Folder` is a checkpoint on disk; a LoRA adapter on
its base (`adapter.py`) and a checkpoint with another vocabulary (`remapped.py`) look the same from outside.

Reads go through pread into a fresh buffer: a memory map would count every page once read as ours, and page faults cost more
than the copy.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.checkpoint import INDEX, check_index, local_folder
from trimtab.errors import UsageError

# safetensors' names of dtypes
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MERGEABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ALONE = "model.safetensors"  # the file of a model that is not cut into shards
SAMPLE = 32768  # bytes of each end of a tensor that a fingerprint reads


class Entry(NamedTuple):
    """A stored tensor's type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Source(ABC):
    """One parent. name: as the user gave it; folder: where its config and tokenizer are."""

    name: str
    folder: Path
    config: dict[str, Any]
    entries: Mapping[str, Entry]
    fingerprint: str  # 16 hex digits of names, shapes and a sample of every tensor's bytes

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop (of the first axis) of a tensor, in the dtype of its entry, in memory of the caller's own.

        An adapter's sums have a wider dtype than their entry: nothing is rounded before the merge. Safe to call from several
        threads. A tensor without axes is read whole.
        """

    def read_runs(self, name: str, runs: Sequence[tuple[int, int]]) -> Tensor:
        """Rows start:stop of every run (start, stop), one after another."""
        return torch.cat([self.read(name, start, stop) for start, stop in runs])


class View(Source):
    """A source under other names. names: a tensor's name here -> its name there; what is not among them is left out."""

    def __init__(self, inner: Source, names: Mapping[str, str]) -> None:
        self.inner, self.names = inner, dict(names)
        self.name, self.folder, self.config = inner.name, inner.folder, inner.config
        self.entries = {name: inner.entries[own] for name, own in self.names.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.inner.read(self.names[name], start, stop)

    def read_runs(self, name: str, runs: Sequence[tuple[int, int]]) -> Tensor:
        return self.inner.read_runs(self.names[name], runs)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        return self.inner.fingerprint


class _Place(NamedTuple):
    file: int
    offset: int


class Stored(Source):
    """The tensors of safetensors files, whole and consistent or refused by name (`UsageError`)."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any], files: list[Path]) -> None:
        self.name, self.folder, self.config = name, folder, config
        self._files = files
        self._handles: dict[int, int] = {}
        self._lock = threading.Lock()
        self.entries: dict[str, Entry] = {}
        self._places: dict[str, _Place] = {}
        problems = [problem for number in range(len(files)) for problem in self._read_header(number)]
        if problems:
            raise self.damaged(problems)

    def damaged(self, problems: list[str]) -> UsageError:
        """The error that names what is wrong with the files."""
        more = f"; and {len(problems) - 3} more such" if len(problems) > 3 else ""
        return UsageError(f"the model {self.name!r}: {'; '.join(problems[:3])}{more}: get a complete copy")

    def _read_header(self, number: int) -> list[str]:
        """Adds a file's tensors; returns what is wrong with it."""
        from safetensors import SafetensorError, safe_open

        path = self._files[number]
        try:
            with safe_open(path, framework="pt"):  # the library validates every offset against the file's length
                pass
        except (SafetensorError, OSError) as error:
            return [f"{path.name} is damaged or cut short ({error})"]
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        problems = []
        for name, entry in header.items():
            if name in self.entries:
                first = self._files[self._places[name].file].name
                problems.append(f"{first} and {path.name} both hold the tensor {name!r}")
            elif entry["dtype"] not in DTYPES:
                raise UsageError(
                    f"the model {self.name!r} is quantised ({name!r} is stored as {entry['dtype']}): merge the weights that "
                    "it was quantised from"
                )
            else:
                self.entries[name] = Entry(DTYPES[entry["dtype"]], tuple(entry["shape"]))
                self._places[name] = _Place(number, 8 + length + entry["data_offsets"][0])
        return problems

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        entry = self.entries[name]
        if not entry.shape:
            return self._bytes(name, 0, entry.nbytes).view(entry.dtype).view(())
        stop = entry.shape[0] if stop is None else min(stop, entry.shape[0])
        row = entry.nbytes // entry.shape[0] if entry.shape[0] else 0
        data = self._bytes(name, start * row, (stop - start) * row)
        return data.view(entry.dtype).view(stop - start, *entry.shape[1:])

    def read_runs(self, name: str, runs: Sequence[tuple[int, int]]) -> Tensor:
        entry = self.entries[name]
        row = entry.nbytes // max(entry.shape[0], 1)
        count = sum(stop - start for start, stop in runs)
        data = torch.empty(count * row, dtype=torch.uint8)
        view, at = data.numpy().data, 0
        for start, stop in runs:  # into one buffer: a tensor a row would take ten times as long
            size = (stop - start) * row
            self._fill(view[at : at + size], name, start * row)
            at += size
        return data.view(entry.dtype).view(count, *entry.shape[1:])

    def _bytes(self, name: str, start: int, count: int) -> Tensor:
        data = torch.empty(count, dtype=torch.uint8)
        self._fill(data.numpy().data, name, start)
        return data

    def _fill(self, view: memoryview, name: str, start: int) -> None:
        place, count, done = self._places[name], len(view), 0
        while done < count:
            got = os.preadv(self._handle(place.file), [view[done : done + (1 << 30)]], place.offset + start + done)
            if got <= 0:
                raise UsageError(
                    f"the model {self.name!r}: {self._files[place.file].name} became shorter while it was read"
                )
            done += got

    def _handle(self, number: int) -> int:
        with self._lock:
            if number not in self._handles:
                self._handles[number] = os.open(self._files[number], os.O_RDONLY)
            return self._handles[number]

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # when Python ends, `os` is gone before us
        for handle in getattr(self, "_handles", {}).values():
            close(handle)

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        digest = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
            for start in {0, max(0, entry.nbytes - SAMPLE)}:
                digest.update(self._bytes(name, start, min(SAMPLE, entry.nbytes - start)).numpy().tobytes())
        return digest.hexdigest()[:16]


class Folder(Stored):
    """A Hugging Face checkpoint folder, whole and consistent or refused by name (`UsageError`). name: for messages."""

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        name = str(path) if name is None else name
        folder = local_folder(str(path))
        if folder is None:
            raise _no_folder(name)
        check_index(folder, name)
        config = read_json(folder / "config.json", name)
        if (folder / ALONE).is_file():
            super().__init__(name, folder, config, [folder / ALONE])
            return
        if not (folder / INDEX).is_file():
            raise _no_weights(folder, name)
        files: dict[str, str] = json.loads((folder / INDEX).read_bytes())["weight_map"]
        super().__init__(name, folder, config, [folder / shard for shard in sorted(set(files.values()))])
        held = {tensor: self._files[place.file].name for tensor, place in self._places.items()}
        problems = [
            f"{INDEX} says that {files[tensor]} holds {tensor!r}, but it does not"
            if tensor in files
            else f"{held[tensor]} holds {tensor!r}, which {INDEX} does not name"
            for tensor in sorted({*files, *held})
            if files.get(tensor) != held.get(tensor)
        ]
        if problems:
            raise self.damaged(problems)


def _no_folder(name: str) -> UsageError:
    path = Path(name)
    there = path.parent if path.parent.is_dir() else Path()
    near = difflib.get_close_matches(path.name, [one.name for one in there.iterdir() if one.is_dir()], 1, 0.6)
    if near and there == path.parent:
        return UsageError(f"there is no model folder {name!r}; did you mean {str(there / near[0])!r}?")
    mend = f"download the model first (hf download {name} --local-dir DIR) and give DIR" if name.count("/") == 1 else ""
    return UsageError(f"there is no model folder {name!r}: merging reads folders; {mend or 'download the model first'}")


def _no_weights(folder: Path, name: str) -> UsageError:
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if others:
        return UsageError(
            f"the model {name!r} is stored as {others[0]}, which can run code when it is read: convert it to safetensors"
        )
    return UsageError(f"the model {name!r} has no {ALONE} and no {INDEX}: save it as safetensors")


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object in a file of the model `name`. UsageError for anything else."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"the model {name!r}: {path.name} cannot be read ({error})") from error
    return found
