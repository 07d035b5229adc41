"""A cache of what is dear to make (answers, hidden states, judgements), under the fingerprint of what it was made from.

    ROOT/KIND/KEY.json    {"digest": SHA-256 of the value as JSON, "value": ...}
    ROOT/KIND/KEY/        files and manifest.json (name -> SHA-256)

An entry is written whole or not at all. One that no longer has its hash is reported (a warning), set aside under another
name and made again. ROOT is $TRIMTAB_CACHE, else $XDG_CACHE_HOME/trimtab, else ~/.cache/trimtab; where none can be written
to (or TRIMTAB_CACHE=off) nothing is kept, which is said once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.files import TEMPORARY, digest, dump_json, free_name, sync_tree, write_atomic


class Cache:
    """A folder of entries. root None: nothing is kept (folders are temporary and go with the cache object)."""

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self._temporary: list[tempfile.TemporaryDirectory[str]] = []

    @classmethod
    def default(cls) -> Cache:
        named = os.environ.get("TRIMTAB_CACHE")
        if named == "off":
            return cls(None)
        try:
            root = Path(named) if named else _home() / "trimtab"
            root.mkdir(parents=True, exist_ok=True)
            usable = os.access(root, os.W_OK)
        except (OSError, RuntimeError):  # RuntimeError: there is no home
            usable = False
        if not usable:
            warnings.warn(
                "nothing is cached: no folder to write to (set TRIMTAB_CACHE to one, or to off)", stacklevel=2
            )
            return cls(None)
        return cls(root)

    def load(self, kind: str, key: str) -> Any | None:
        """The JSON value kept under a key, or None."""
        if self.root is None or not (path := self.root / kind / f"{key}.json").exists():
            return None
        try:
            entry = json.loads(path.read_bytes())
            if entry["digest"] == _hash(entry["value"]):
                return entry["value"]
        except (ValueError, KeyError, TypeError):
            pass  # damaged like a wrong hash is
        _set_aside(path)
        return None

    def save(self, kind: str, key: str, value: Any) -> None:
        """Keep a JSON value. What cannot be written (a full disk) is reported and not kept."""
        if self.root is None:
            return
        path = self.root / kind / f"{key}.json"
        value = json.loads(dump_json(value, indent=None))  # as it will be read back
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, dump_json({"digest": _hash(value), "value": value}, indent=None))
        except OSError as error:
            warnings.warn(f"not cached ({error.strerror}): {path}", stacklevel=2)

    def folder(self, kind: str, key: str, make: Callable[[Path], None]) -> Path:
        """The folder kept under a key; where there is none, `make(folder)` fills it."""
        if self.root is None:
            self._temporary.append(tempfile.TemporaryDirectory(prefix="trimtab-"))
            path = Path(self._temporary[-1].name)
            make(path)
            return path
        path = self.root / kind / key
        if path.exists() and not _whole(path):
            _set_aside(path)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            new = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
            try:
                make(new)
                manifest = {child.name: digest(child) for child in sorted(new.iterdir())}
                write_atomic(new / "manifest.json", dump_json(manifest))
                sync_tree(new)
                if not path.exists():  # another process may have been faster; its bytes are the same
                    os.replace(new, path)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        return path


def _home() -> Path:
    named = os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else Path.home() / ".cache"


def _whole(path: Path) -> bool:
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        return all(digest(path / name) == expected for name, expected in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _set_aside(path: Path) -> None:
    aside = free_name(path)
    path.rename(aside)
    warnings.warn(f"damaged cache entry {path.name}: set aside as {aside.name} and made again", stacklevel=3)


def _hash(value: Any) -> str:
    return hashlib.sha256(dump_json(value, indent=None).encode()).hexdigest()
