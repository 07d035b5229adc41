"""The run directory: what makes a `compare` or a `fit` resumable, and its result the same however often it was killed.

    DIR/run.json       kind, frozen arguments, hashes of the inputs, environment; written once
    DIR/events.jsonl   append-only log; every saved file and folder with its hash
    DIR/.lock          held by the one process that works here
    everything else    written to a temporary name, flushed to disk, renamed: a file that is there is whole

The same command finds what is done and does the rest. Other arguments, changed inputs, a second process, a folder that
holds something else: refused before anything is written. A run that a `UsageError` ends before it has a result leaves
nothing. A file that no longer has the hash it was saved with is
reported and set aside under another name, and is then made again.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from trimtab.environment import differences, environment
from trimtab.errors import TrimtabError, UsageError
from trimtab.files import (
    TEMPORARY,
    digest,
    dump_json,
    free_name,
    set_torn_lines_aside,
    sync_tree,
    write_atomic,
    write_json,
)

__all__ = ["RunDirectory", "digest", "dump_json", "environment", "write_atomic", "write_json"]

_LOCK, _RUN, _EVENTS = ".lock", "run.json", "events.jsonl"


class RunDirectory:
    """A locked, resumable folder; `open` it as a context manager. A key names a result: `chunks/base-0`, `fits/x`."""

    def __init__(self, path: Path, lock: IO[str], made: list[Path]) -> None:
        self.path = path
        self.resumed = False
        self._made = made  # folders that were not there before, innermost first
        self._lock = lock
        self._digests: dict[str, str] = {}
        self._verified: set[str] = set()

    @classmethod
    def open(
        cls, path: str | Path, kind: str, arguments: Mapping[str, Any], inputs: Mapping[str, str] | None = None
    ) -> RunDirectory:
        """Creates the run, or resumes it if `kind`, `arguments` (JSON values) and `inputs` (name -> hash) are the same.

        UsageError: the folder holds something else, another run or other arguments, cannot be written, or is in use.
        """
        path = Path(path)
        wanted = cls.check(path, kind, arguments, inputs)
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = open(path / _LOCK, "a+")  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"cannot write to the output folder {path}: {error.strerror}") from error
        _lock_or_refuse(lock, path)
        run = cls(path, lock, made)
        try:
            run._begin(wanted)
        except BaseException:
            run.close()
            raise
        return run

    @staticmethod
    def check(
        path: str | Path, kind: str, arguments: Mapping[str, Any], inputs: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """UsageError where `open` would refuse what the folder holds; reads only. Returns what its run.json says, or will."""
        wanted = json.loads(dump_json({"kind": kind, "arguments": dict(arguments), "inputs": dict(inputs or {})}))
        _refuse_foreign(Path(path), wanted)
        return dict(wanted)

    def _begin(self, wanted: dict[str, Any]) -> None:
        # Looked at again now that nobody else can write: two first runs may have raced for the lock.
        _refuse_foreign(self.path, wanted)
        for left in [*self.path.rglob(f"{TEMPORARY}*")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        here = environment()
        self.resumed = (self.path / _RUN).exists()
        if not self.resumed:
            write_json(self.path / _RUN, {"schema": 1, **wanted, "environment": here})
            self.event("started", pid=os.getpid())
            return
        self._read_events()
        changed = differences(_read_run(self.path)["environment"], here)
        self.event("resumed", pid=os.getpid(), environment_changed=changed)
        if changed:
            _tell(f"{self.path} began in another environment ({'; '.join(changed)}): its parts may differ slightly")

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, UsageError) and self._holds_nothing():
            self._withdraw()
        elif error is not None:
            self.event("stopped", error=type(error).__name__, message=str(error)[:500])
        self.close()

    def _holds_nothing(self) -> bool:
        return {path.name for path in self.path.rglob("*") if not path.is_dir()} <= {_LOCK, _RUN, _EVENTS}

    def _withdraw(self) -> None:
        """Removes a run that was refused before it had a result, so that the corrected command can use the folder."""
        inside = sorted((path for path in self.path.rglob("*") if path.is_dir()), reverse=True)
        for name in (_RUN, _EVENTS, _LOCK):
            (self.path / name).unlink(missing_ok=True)
        for folder in [*inside, *self._made]:
            if not any(folder.iterdir()):
                folder.rmdir()

    def close(self) -> None:
        """Releases the lock."""
        self._lock.close()

    @property
    def environment(self) -> dict[str, Any]:
        """The environment in which the run began."""
        return dict(_read_run(self.path)["environment"])

    # Events

    def event(self, name: str, **fields: Any) -> None:
        """Appends one line to events.jsonl: `time` (UTC), `event` and the given fields (JSON values)."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = dump_json({"time": now, "event": name, **fields}, indent=None)
        with open(self.path / _EVENTS, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """All events so far, or those of one name."""
        rows = [json.loads(line) for line in (self.path / _EVENTS).read_bytes().splitlines()]
        return [row for row in rows if name is None or row.get("event") == name]

    def _read_events(self) -> None:
        """Recovers the hashes of what was saved; lines that a kill or a bad disk tore are set aside, not lost."""
        path = self.path / _EVENTS
        if not path.exists():
            return
        torn = set_torn_lines_aside(path)
        if torn:
            _tell(f"torn lines of {path} set aside in {torn.name}")
        self._digests = {row["key"]: row["digest"] for row in self.events("saved")}

    # Results

    def done(self, key: str) -> bool:
        """Whether the result `key` (a folder, a file, or `key`.json) is there and still as it was saved."""
        name = self._name(key)
        path = self.path / name
        if not path.exists():
            return False
        if name not in self._verified:
            if name in self._digests and digest(path) != self._digests[name]:
                self.set_aside(key, "it is not as it was saved")
                return False
            self._verified.add(name)
        return True

    def set_aside(self, key: str, reason: str) -> Path:
        """Renames a damaged result to NAME.corrupt-N, says so, and forgets it. Returns the new path."""
        name = self._name(key)
        aside = free_name(self.path / name)
        os.rename(self.path / name, aside)
        self._digests.pop(name, None)
        self._verified.discard(name)
        self.event("set_aside", key=name, to=aside.name, reason=reason)
        _tell(f"{self.path / name} set aside as {aside.name} ({reason}); it is made again")
        return aside

    def save(self, name: str, data: str | bytes) -> Path:
        """Writes the file `name` (relative, with its extension) atomically and logs its hash."""
        path = self._inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
        self._saved(name)
        return path

    def save_json(self, key: str, obj: Any) -> Path:
        """Saves `obj` as `key`.json. ValueError for NaN or infinity: JSON has neither, and a result must not either."""
        return self.save(f"{key}.json", dump_json(obj))

    def load_json(self, key: str) -> Any | None:
        """What `save_json` wrote, or None if it is absent or was damaged (then it is set aside)."""
        name = f"{key}.json"
        if not self.done(name):
            return None
        try:
            return json.loads((self.path / name).read_bytes())
        except ValueError as error:
            self.set_aside(name, f"it is not JSON: {error}")
            return None

    @contextmanager
    def folder(self, key: str) -> Iterator[Path]:
        """A temporary folder to fill, which becomes the folder `key` when the block ends without an error."""
        final = self._inside(key)
        if final.exists():
            raise TrimtabError(f"{final} is there already: ask done({key!r}) first")
        with self._temporary(key) as temporary:
            yield temporary
            self._publish(temporary, key)

    @contextmanager
    def contents(self) -> Iterator[Path]:
        """A temporary folder whose files move to the run directory itself when the block ends, .json files last.

        For results that others read from DIR (a controller, a checkpoint). Log an event afterwards: it says "complete".
        """
        with self._temporary("contents") as temporary:
            yield temporary
            for path in sorted(temporary.rglob("*"), key=lambda path: (path.suffix == ".json", path)):
                if path.is_file():
                    self._publish(path, path.relative_to(temporary).as_posix())

    @contextmanager
    def _temporary(self, name: str) -> Iterator[Path]:
        folder = self.path / f"{TEMPORARY}{name.replace('/', '-')}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, path: Path, name: str) -> None:
        """Gives a finished temporary file or folder its name."""
        sync_tree(path, deep=path.is_dir())
        final = self._inside(name)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, final)
        sync_tree(final.parent, deep=False)
        self._saved(name)

    def _saved(self, name: str) -> None:
        self._digests[name] = digest(self.path / name)
        self._verified.add(name)
        self.event("saved", key=name, digest=self._digests[name])

    def _name(self, key: str) -> str:
        """A key as the name on disk: itself, or `key`.json where only that exists."""
        return f"{key}.json" if not self._inside(key).exists() and self._inside(f"{key}.json").exists() else key

    def _inside(self, name: str) -> Path:
        path = self.path / name
        if Path(name).is_absolute() or ".." in Path(name).parts or name in ("", ".", _LOCK, _RUN, _EVENTS):
            raise TrimtabError(f"{name!r} is not a name for a result of a run")
        return path


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads((path / _RUN).read_bytes())
        if not {"kind", "arguments", "inputs", "environment"} <= run.keys():
            raise ValueError("keys are missing")
    except (ValueError, AttributeError, OSError) as error:
        raise UsageError(
            f"{path / _RUN} cannot be read ({error}), so nobody can tell what the folder's results belong to: "
            "give another --out, or remove the folder"
        ) from error
    return dict(run)


def _refuse_foreign(path: Path, wanted: dict[str, Any]) -> None:
    """UsageError unless `path` is absent, empty, or this very run; reads only."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"the output folder {path} is a file: give another --out")
    names = sorted(child.name for child in path.iterdir()) if path.is_dir() else []
    if _RUN not in names:
        others = [name for name in names if name != _LOCK and not name.startswith(TEMPORARY)]
        if others:
            raise UsageError(f"the output folder {path} holds something else ({others[0]}): give a new or empty --out")
        return
    found = _read_run(path)
    if found["kind"] != wanted["kind"]:
        raise UsageError(f"{path} holds a {found['kind']} run, not a {wanted['kind']} run: give another --out")
    for part, what in (("arguments", "other arguments"), ("inputs", "other inputs")):
        changed = [
            f"{key} was {json.dumps(found[part].get(key))}, is now {json.dumps(wanted[part].get(key))}"
            for key in sorted({*found[part], *wanted[part]})
            if found[part].get(key) != wanted[part].get(key)
        ]
        if changed:
            raise UsageError(f"{path} was begun with {what} ({'; '.join(changed)}): give those, or another --out")


def _lock_or_refuse(lock: IO[str], path: Path) -> None:
    """The kernel drops the lock when its process ends, however it ends: a lock file left behind locks nothing."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise UsageError(f"process {holder} is working in {path}: wait for it, or give another --out") from error
    if not _is_at(lock, path / _LOCK):
        lock.close()
        raise UsageError(f"another process has just left {path}: give the command again")
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at `path`: a run that was refused takes its lock file away."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _tell(message: str) -> None:
    print(f"trimtab: {message}", file=sys.stderr, flush=True)
