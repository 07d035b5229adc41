"""Runs Python that nobody trusts, with tests that are trusted, and says whether the tests passed.

A separate process: `python -I -S` (no site packages: the standard library alone), an empty environment, a fresh folder, a
process group of its own that is killed as one at the wall-clock limit; limits of processor time, memory, file size, open
files and processes. On Linux (x86_64, aarch64) a seccomp filter lets through only the system calls that an interpreter
needs: no sockets, no new processes or threads, no signals, no file opened for writing, made, renamed or removed. Where
the filter cannot be installed nothing is run, unless `unsealed` allows it; the result says which it was.

The verdict is a number drawn for this run, written to a pipe of its own by the driver once the tests have come to
their end (`sandbox_child`). Printing PASS, sys.exit(0), os._exit(0), atexit, replaced builtins, and objects that call
themselves equal to everything do not make a failure pass.

What is not covered: code and tests share one interpreter. Code written against this very driver can make it say that the
tests have ended (gc finds its objects, ctypes and /proc/self/mem its memory), and code can replace a function of a module
that the tests import (math.isclose). Code can read what the user can read (it has nowhere to send it). Without the filter
it can also write and connect. A process is no virtual machine: run what is hostile, not merely wrong, in one of those.
Cost: the start of an interpreter, some 40 ms a run.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import UsageError

CHILD = Path(__file__).with_name("sandbox_child.py")
MOST_REPORTED = 4096  # bytes; whoever says more is cut off


@dataclass(frozen=True)
class Ran:
    """passed: the tests came to their end. outcome: "passed", "failed", "timeout", "killed", "refused" (not run).

    detail: what was raised, which signal, why it was refused. sealed: the filter of system calls was in place.
    """

    passed: bool
    outcome: str
    detail: str
    sealed: bool
    seconds: float


def run_python(
    code: str,
    tests: str = "",
    *,
    entry: str = "",
    seconds: float = 5.0,
    memory_bytes: int = 1 << 30,
    unsealed: bool = False,
) -> Ran:
    """Run `code`, then `tests` with what it defined. entry: a name that the code must define.

    seconds: wall clock and processor time; unsealed: run even where system calls cannot be filtered.
    """
    if os.name != "posix":
        raise UsageError("code is run on Linux or macOS only")
    if not 0 < seconds <= 3600 or memory_bytes < 1 << 27:
        raise UsageError(f"seconds in (0, 3600] and 128 MiB or more are needed, not {seconds} and {memory_bytes}")
    nonce = secrets.token_hex(16)
    receive, report = os.pipe()
    asked = {
        "nonce": nonce, "code": code, "tests": tests, "entry": entry, "report": report, "unsealed": unsealed,
        "memory_bytes": memory_bytes, "cpu_seconds": int(seconds) + 1,
    }  # fmt: skip
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(CHILD)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd=folder, env={}, pass_fds=[report], start_new_session=True,
        )  # fmt: skip
        os.close(report)
        try:
            said, ended = _listen(process, json.dumps(asked).encode(), receive, start + seconds)
        finally:
            os.close(receive)
            _kill(process)
    return _verdict(said, ended, nonce, process.returncode, time.monotonic() - start)


def _listen(process: subprocess.Popen[bytes], asked: bytes, receive: int, deadline: float) -> tuple[bytes, bool]:
    """What the child reports, and whether it ended by itself before the deadline."""
    assert process.stdin is not None  # it is a pipe
    try:
        process.stdin.write(asked)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it ended before it read: the report is empty and says so
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(receive, selectors.EVENT_READ)
        while len(said) <= MOST_REPORTED:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                return said, False
            part = os.read(receive, MOST_REPORTED)
            if not part:
                break
            said += part
    try:
        process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return said, False
    return said, True


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The whole group, also what outlived its parent."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # all of it has ended
    process.wait()


def _verdict(said: bytes, ended: bool, nonce: str, code: int, seconds: float) -> Ran:
    first, _, rest = said.decode("utf-8", "replace").partition("\n")
    sealed = first == "sealed"
    if not ended:
        return Ran(False, "timeout", f"stopped after {seconds:.1f} seconds", sealed, seconds)
    if code < 0:
        return Ran(False, "killed", f"ended by {signal.Signals(-code).name}", sealed, seconds)
    if rest == nonce:
        return Ran(True, "passed", "", sealed, seconds)
    if first.startswith("unsealed: ") and not rest:
        return Ran(False, "refused", first.removeprefix("unsealed: "), False, seconds)
    return Ran(False, "failed", " ".join(rest.split())[:200] or "it left before its tests ended", sealed, seconds)
