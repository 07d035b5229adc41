"""Writing so that a kill or a full disk leaves the old file or the new one, never half of one; JSON; hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

# Names with this beginning are unfinished work; nobody reads them and the next run removes them.
TEMPORARY = ".tmp-"


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Writes a file under a temporary name in the same folder, flushes it to disk and renames it. Text is UTF-8."""
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def dump_json(obj: Any, indent: int | None = 2) -> str:
    """JSON text that ends with a newline. ValueError for NaN or infinity, which JSON does not have."""
    return json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"


def write_json(path: str | Path, obj: Any) -> None:
    """`dump_json`, written atomically."""
    write_atomic(path, dump_json(obj))


def _plain(value: Any) -> Any:
    """What a result may hold besides JSON's own types: paths, numpy scalars and arrays, dataclasses."""
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no place in JSON: {value!r}")


def digest(path: str | Path) -> str:
    """SHA-256 of a file, or of a folder's relative names and contents in sorted order."""
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for file_path in sorted(child for child in path.rglob("*") if child.is_file()):
        total.update(f"{file_path.relative_to(path).as_posix()}\0{digest(file_path)}\n".encode())
    return total.hexdigest()


def free_name(path: Path) -> Path:
    """The first of NAME.corrupt-1, NAME.corrupt-2, ... that is not taken: where something damaged is kept."""
    number = 1
    while (free := path.with_name(f"{path.name}.corrupt-{number}")).exists():
        number += 1
    return free


def set_torn_lines_aside(path: Path) -> Path | None:
    """Moves the lines of a JSONL file that are not whole JSON objects to another file; returns it, or None."""
    good: list[bytes] = []
    torn: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        (good if _is_row(line) else torn).append(line)
    if not torn:
        return None
    aside = free_name(path)
    write_atomic(aside, b"".join(torn))
    write_atomic(path, b"".join(good))
    return aside


def _is_row(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def sync_tree(folder: Path, deep: bool = True) -> None:
    """Flushes a folder (and, if `deep`, all that is in it) to disk."""
    for path in folder.rglob("*") if deep else ():
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
