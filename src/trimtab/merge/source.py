"""Where a parent's tensors come from: read by rows, never a whole model, into memory of our own.

A `Source` says what it holds (`entries`) and reads rows of one tensor. `Folder` is a checkpoint on disk; a LoRA adapter on its
base (`adapter.py`) and a checkpoint with another vocabulary (`vocabulary.py`) look the same from outside.

Reads go through pread into a fresh buffer: a memory map would count every page once read as ours, and page faults cost more
than the copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
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

        Safe to call from several threads. A tensor without axes is read whole.
        """


class _Place(NamedTuple):
    file: int
    offset: int


class Folder(Source):
    """A Hugging Face checkpoint folder with safetensors, whole and consistent or refused by name (`UsageError`)."""

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.name = str(path) if name is None else name
        folder = local_folder(str(path))
        if folder is None:
            raise UsageError(f"there is no model folder {self.name!r}: merging reads folders; download the model first")
        self.folder = folder
        check_index(folder, self.name)
        self.config = _json(folder / "config.json", self.name)
        self._files = _files(folder, self.name)
        self._handles: dict[int, int] = {}
        self.entries: dict[str, Entry] = {}
        self._places: dict[str, _Place] = {}
        for number, file in enumerate(self._files):
            self._read_header(number, file)
        self._check_weight_map()

    def _read_header(self, number: int, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt"):  # the library validates every offset against the file's length
                pass
        except (SafetensorError, OSError) as error:
            raise UsageError(f"the model {self.name!r}: {path.name} is damaged or cut short ({error})") from error
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in self.entries:
                raise UsageError(f"the model {self.name!r} holds the tensor {name!r} in two of its files")
            if entry["dtype"] not in DTYPES:
                raise UsageError(
                    f"the model {self.name!r}: {name!r} is stored as {entry['dtype']}: merge it unquantised"
                )
            self.entries[name] = Entry(DTYPES[entry["dtype"]], tuple(entry["shape"]))
            self._places[name] = _Place(number, 8 + length + entry["data_offsets"][0])

    def _check_weight_map(self) -> None:
        path = self.folder / INDEX
        if len(self._files) == 1 and self._files[0].name == "model.safetensors":
            return
        for name, file in json.loads(path.read_bytes())["weight_map"].items():
            if name not in self.entries or self._files[self._places[name].file].name != file:
                raise UsageError(f"the model {self.name!r}: {INDEX} says that {file} holds {name!r}, but it does not")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        entry = self.entries[name]
        if not entry.shape:
            return self._bytes(name, 0, entry.nbytes).view(entry.dtype).view(())
        stop = entry.shape[0] if stop is None else min(stop, entry.shape[0])
        row = entry.nbytes // entry.shape[0] if entry.shape[0] else 0
        data = self._bytes(name, start * row, (stop - start) * row)
        return data.view(entry.dtype).view(stop - start, *entry.shape[1:])

    def _bytes(self, name: str, start: int, count: int) -> Tensor:
        place = self._places[name]
        data = torch.empty(count, dtype=torch.uint8)
        view = memoryview(data.numpy())
        done = 0
        while done < count:
            got = os.preadv(self._handle(place.file), [view[done : done + (1 << 30)]], place.offset + start + done)
            if got <= 0:
                raise UsageError(
                    f"the model {self.name!r}: {self._files[place.file].name} became shorter while it was read"
                )
            done += got
        return data

    def _handle(self, number: int) -> int:
        handle = self._handles.get(number)
        if handle is None:
            handle = self._handles.setdefault(number, os.open(self._files[number], os.O_RDONLY))
        return handle

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        digest = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
            for start in {0, max(0, entry.nbytes - SAMPLE)}:
                digest.update(self._bytes(name, start, min(SAMPLE, entry.nbytes - start)).numpy().tobytes())
        return digest.hexdigest()[:16]


def _files(folder: Path, name: str) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        shards = json.loads((folder / INDEX).read_bytes())["weight_map"].values()
        return [folder / shard for shard in sorted(set(shards))]
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if others:
        raise UsageError(
            f"the model {name!r} is stored as {others[0]}, which can run code when it is read: convert it to safetensors"
        )
    raise UsageError(f"the model {name!r} has no model.safetensors and no {INDEX}")


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise UsageError(f"the model {name!r}: {path.name} cannot be read ({error})") from error
    return found
