"""Where output goes: results to stdout, progress to stderr, JSON to a file or (alone) to stdout."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from trimtab.errors import UsageError
from trimtab.files import dump_json, write_atomic


def text_stream(json_to: str | None) -> TextIO:
    """Where text for people goes: stdout, unless stdout is for JSON."""
    return sys.stderr if json_to == "-" else sys.stdout


def check_json(json_to: str | None) -> None:
    """UsageError, before any work, if --json FILE cannot be written."""
    if json_to is None or json_to == "-":
        return
    path = Path(json_to)
    if path.is_dir():
        raise UsageError(f"--json {path} is a folder: name a file, or - for stdout")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--json {path}: there is no folder {path.parent}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(f"--json {path}: the folder {path.parent} cannot be written to")


def write_result(json_to: str | None, result: Any) -> None:
    """Writes the result as JSON where --json says, if it was given."""
    if json_to == "-":
        sys.stdout.write(dump_json(result))
        sys.stdout.flush()
    elif json_to is not None:
        write_atomic(json_to, dump_json(result))


def console_for(table: Any, stream: TextIO) -> tuple[Any, int]:
    """A rich console for `stream`, and the width the table needs; where there is no terminal it is as wide as that."""
    from rich.console import Console

    class Ours(Console):
        def on_broken_pipe(self) -> None:
            raise  # rich would exit with 1; `main` knows what a reader who has gone means

    needed = Console(width=10_000).measure(table).maximum
    console = Ours(file=stream)
    return (console if console.is_terminal else Ours(file=stream, width=max(needed, 120))), needed


class Progress:
    """Says what is going on, on stderr: a live line in a terminal, a line a message elsewhere."""

    def __init__(self, status: Any) -> None:
        self._status = status
        self._start = time.monotonic()

    def __call__(self, message: str) -> None:
        if self._status is None:
            print(f"[{time.monotonic() - self._start:6.1f}s] {message}", file=sys.stderr, flush=True)
        else:
            from rich.markup import escape

            self._status.update(f"{escape(message)} [dim]({time.monotonic() - self._start:.0f} s)[/dim]")


@contextmanager
def progress() -> Iterator[Progress]:
    """A `Progress` for the length of a block."""
    if not sys.stderr.isatty():
        yield Progress(None)
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield Progress(status)
