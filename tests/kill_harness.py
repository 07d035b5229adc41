"""Kills a command with SIGKILL, again and again, at random or chosen points, and lets the same command finish the work.

    outcome = run_with_kills(command, folder, seed=3, window_seconds=2.0)
    assert outcome.tree == tree(uninterrupted_folder)

A point is a time, or a number of files or of logged events in the run directory. What a run directory holds about its
own history (the event log, the lock, files set aside) is left out of the comparison.
"""

from __future__ import annotations

import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HISTORY = ("events.jsonl", ".lock")


@dataclass
class Outcome:
    """What a harassed run came to. `kills` landed while the command ran; `stderr` is that of each start."""

    tree: dict[str, bytes]
    kills: int
    starts: int
    stderr: list[str] = field(default_factory=list)


def tree(folder: Path, ignore: Sequence[str] = HISTORY) -> dict[str, bytes]:
    """Relative name -> bytes of every file but the history and what was set aside; temporary files are included."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: path.read_bytes() for name, path in names.items() if path.name not in ignore and ".corrupt-" not in name
    }


def after_seconds(seconds: float) -> Callable[[Path], Callable[[], bool]]:
    """The point `seconds` after the command was started."""

    def start(_: Path) -> Callable[[], bool]:
        end = time.monotonic() + seconds
        return lambda: time.monotonic() >= end

    return start


def after_files(count: int) -> Callable[[Path], Callable[[], bool]]:
    """The point at which `count` more files are in the folder than when the command was started."""

    def start(folder: Path) -> Callable[[], bool]:
        before = _files(folder)
        return lambda: _files(folder) >= before + count

    return start


def after_events(count: int, name: str | None = None) -> Callable[[Path], Callable[[], bool]]:
    """The point at which `count` more events (of one name) are in events.jsonl than when the command was started."""

    def start(folder: Path) -> Callable[[], bool]:
        before = _events(folder, name)
        return lambda: _events(folder, name) >= before + count

    return start


def run_with_kills(
    command: Sequence[str],
    folder: Path,
    *,
    seed: int = 0,
    kills: int = 3,
    window_seconds: float = 1.0,
    points: Sequence[Callable[[Path], Callable[[], bool]]] | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 120.0,
    ignore: Sequence[str] = HISTORY,
) -> Outcome:
    """Runs `command` (which writes to `folder`), kills it at each point in turn, then runs it to its end.

    Without `points`, `kills` random times within `window_seconds` are drawn from `seed`. AssertionError if the command
    fails by itself, or does not end within `timeout` seconds.
    """
    chance = random.Random(seed)
    points = points or [after_seconds(chance.uniform(0, window_seconds)) for _ in range(kills)]
    outcome = Outcome({}, 0, 0)
    for point in [*points, None]:
        killed, stderr = _run_once(command, folder, point, env, timeout)
        outcome.starts += 1
        outcome.kills += killed
        outcome.stderr.append(stderr)
    outcome.tree = tree(folder, ignore)
    return outcome


def _run_once(
    command: Sequence[str],
    folder: Path,
    point: Callable[[Path], Callable[[], bool]] | None,
    env: dict[str, str] | None,
    timeout: float,
) -> tuple[bool, str]:
    with tempfile.TemporaryFile() as errors:
        # Counted before the start: what the command itself writes early must not be taken for what was there.
        reached = point(folder) if point else lambda: False
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=errors)
        end = time.monotonic() + timeout
        while process.poll() is None and not reached() and time.monotonic() < end:
            time.sleep(0.001)
        late = time.monotonic() >= end
        process.kill()
        process.wait()
        errors.seek(0)
        stderr = errors.read().decode(errors="replace")
    assert not late, f"{command} did not end within {timeout} s:\n{stderr}"
    # A kill may come just after the end: then the process has ended by itself.
    killed = process.returncode == -signal.SIGKILL
    assert killed or process.returncode == 0, f"{command} failed by itself ({process.returncode}):\n{stderr}"
    return killed, stderr


def _files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def _events(folder: Path, name: str | None) -> int:
    path = folder / "events.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return sum(name is None or f'"event": "{name}"'.encode() in line for line in lines)
