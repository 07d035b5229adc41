"""Code that is not to be trusted: everything it may try ends as a failure, in time, and touches nothing."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from pathlib import Path

import pytest

from trimtab.errors import UsageError
from trimtab.measure.sandbox import run_python

TESTS = "assert f(1) == 2"
SEALED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
sealed = pytest.mark.skipif(not SEALED, reason="needs the filter of system calls: Linux on x86_64 or aarch64")


@pytest.mark.parametrize(
    "code",
    [
        "def f(x): return x + 1",
        "import math, typing, re, heapq, functools, itertools, collections, hashlib, random, json, copy, datetime\n"
        "def f(x): return int(math.sqrt(x)) + 1",
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\ndef f(x): return P(x).x + 1",
        "print('noise' * 100000)\ndef f(x): return x + 1",
        "f = lambda x: x + 1",
    ],
)
@sealed
def test_right_code_passes(code: str) -> None:
    ran = run_python(code, TESTS, entry="f")
    assert ran.passed and ran.outcome == "passed" and ran.sealed, ran


# what a wrong answer may try to be taken for a right one: (code, what is said)
CHEATS = {
    "prints": ("print('PASS'); print('OK')\ndef f(x): return 0", "AssertionError"),
    "exits": ("import sys\nsys.exit(0)", "left before its tests ended"),
    "exits in the function": ("import sys\ndef f(x): sys.exit(0)", "left before its tests ended"),
    "leaves": ("import os\nos._exit(0)", "left before its tests ended"),
    "leaves in the function": ("import os\ndef f(x): os._exit(0)", "left before its tests ended"),
    "leaves at exit": ("import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0", "AssertionError"),
    "replaces AssertionError": (
        "import builtins\nclass E(Exception): pass\nbuiltins.AssertionError = E\ndef f(x): return 0",
        "AssertionError",
    ),
    "equals everything": (
        "class E(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\ndef f(x): return E()",
        "plain values",
    ),
    "equals everything, inside": (
        "class E(int):\n    def __eq__(s, o): return True\ndef f(x): return [E()]",
        "plain values",
    ),
    "swallows the tests": ("def f(x): return 0\n'''", "SyntaxError"),
    "writes to every descriptor": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed\\n')\n    except OSError: pass\n"
        "def f(x): return 0",
        "AssertionError",
    ),
    "looks for our frames": (
        "import sys\nframe, found = sys._getframe(), []\nwhile frame: found.append(dict(frame.f_locals)); "
        "frame = frame.f_back\nassert 'nonce' in str([list(one) for one in found])\ndef f(x): return 2",
        "AssertionError",
    ),
    "looks for other threads' frames": ("import sys\nsys._current_frames()\ndef f(x): return 2", "AttributeError"),
    "lies down in a trace": (
        "import sys\ndef t(frame, *_):\n    frame.f_trace_lines = False\n    return t\nsys.settrace(t)\n"
        "def f(x): return 0",
        "AssertionError",
    ),
    "never defines it": ("g = 1", "KeyError"),
}


@pytest.mark.parametrize("name", sorted(CHEATS))
@sealed
def test_wrong_code_fails_whatever_it_says(name: str) -> None:
    code, said = CHEATS[name]
    ran = run_python(code, TESTS, entry="f")
    assert not ran.passed and said in ran.detail, ran


@sealed
def test_replaced_builtins_do_not_reach_the_tests() -> None:
    """abs() that is always 0 would pass any comparison with a tolerance, and all() that is always true any list."""
    code = "import builtins\nbuiltins.abs = lambda x: 0\nabs = lambda x: 0\nbuiltins.all = all = any = lambda x: True\n"
    assert not run_python(code + "def f(x): return 9", "assert abs(f(1) - 2) < 1e-6").passed
    assert not run_python(code + "def f(x): return 9", "assert all([f(1) == 2])").passed
    assert run_python(code + "def f(x): return 2", "assert abs(f(1) - 2) < 1e-6 and all([f(1) == 2])").passed


@sealed
def test_the_outside_is_out_of_reach(tmp_path: Path) -> None:
    """Each is refused by the system, not by Python: the calls are made through os, socket and ctypes."""
    mine = tmp_path / "mine.txt"
    mine.write_text("kept")
    for code, said in {
        "import os; os.fork()": "PermissionError",
        "import subprocess; subprocess.run(['true'])": "PermissionError",
        "import os; os.execv('/bin/true', ['true'])": "PermissionError",
        "import threading; threading.Thread(target=print).start()": "can't start new thread",
        "import socket; socket.socket()": "PermissionError",
        "import socket; socket.create_connection(('127.0.0.1', 9))": "PermissionError",
        "open('big', 'wb').write(b'x' * (10 << 30))": "MemoryError|PermissionError",
        "file = open('big', 'wb')\nwhile True: file.write(b'x' * (1 << 20))": "PermissionError",
        f"import os; os.remove({str(mine)!r})": "PermissionError",
        f"import os; os.rename({str(mine)!r}, 'x')": "PermissionError",
        f"open({str(mine)!r}, 'w')": "PermissionError",
        f"import os; os.truncate({str(mine)!r}, 0)": "PermissionError",
        f"import os; os.chmod({str(mine)!r}, 0)": "PermissionError",
        "import os; os.mkdir('x')": "PermissionError",
        "import os; os.kill(os.getppid(), 9)": "PermissionError",
        "import os; os.memfd_create('x')": "PermissionError",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))": "PermissionError|ValueError",
        "import signal; signal.signal(signal.SIGALRM, print)": "main thread",
        "import numpy": "ModuleNotFoundError",
        "import trimtab": "ModuleNotFoundError",
        "import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) == -1; raise OSError('no socket')": "no socket",
    }.items():
        ran = run_python(code + "\ndef f(x): return 2", TESTS)
        assert ran.sealed and not ran.passed, (code, ran)
        assert any(part in ran.detail for part in said.split("|")), (code, ran)
    assert mine.read_text() == "kept" and os.access(mine, os.R_OK)


@pytest.mark.parametrize(
    "code",
    [
        "import time\ntime.sleep(1000)",
        "while True: pass",
        "while True:\n    try: 1 / 0\n    except BaseException: pass",
    ],
)
@sealed
def test_time_ends_it_with_all_that_it_started(code: str) -> None:
    start = time.monotonic()
    ran = run_python(code, TESTS, seconds=0.5)
    assert ran.outcome == "timeout" and not ran.passed
    assert time.monotonic() - start < 5  # 0.5 s and the end of a process, on a machine that is busy


@sealed
def test_memory_recursion_and_crashes_are_failures() -> None:
    assert "MemoryError" in run_python("x = 'a' * (10 << 30)", TESTS).detail
    assert "RecursionError" in run_python("def f(x): return f(x)", TESTS).detail
    ran = run_python("import ctypes\nctypes.string_at(0)", TESTS)
    assert (ran.outcome, ran.detail) == ("killed", "ended by SIGSEGV")


@sealed
def test_nothing_of_ours_is_in_its_environment() -> None:
    code = "import os\ndef f(x): return dict(os.environ) == {'LC_CTYPE': 'C.UTF-8'} or not os.environ"
    os.environ["TRIMTAB_SECRET"] = "1"
    try:
        assert run_python(code, "assert f(0)").passed
    finally:
        del os.environ["TRIMTAB_SECRET"]


def test_where_nothing_can_be_filtered_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same driver on a machine that it has no table for."""
    from trimtab.measure import sandbox

    unknown = tmp_path / "sandbox_child.py"
    unknown.write_text(sandbox.CHILD.read_text().replace('"x86_64": (', '"x": (').replace('"aarch64": (', '"a": ('))
    monkeypatch.setattr(sandbox, "CHILD", unknown)
    ran = run_python("def f(x): return 2", TESTS)
    assert ran.outcome == "refused" and "no filter of system calls for" in ran.detail and not ran.sealed
    ran = run_python("def f(x): return 2", TESTS, unsealed=True)
    assert ran.passed and not ran.sealed
    ran = run_python(
        "import os\nif os.fork() == 0:\n    import time\n    time.sleep(60)", TESTS, unsealed=True, seconds=1
    )
    assert not ran.passed and ran.seconds < 10
    ran = run_python("file = open('big', 'wb')\nwhile True: file.write(b'x' * (1 << 20))", TESTS, unsealed=True)
    assert "File too large" in ran.detail


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "/usr/include/asm-generic/unistd.h")],
)
def test_numbers_of_system_calls_are_those_of_the_headers(machine: str, header: str) -> None:
    """aarch64 uses the generic table; a call under two names there (fstatat, newfstatat) has one number."""
    from trimtab.measure.sandbox_child import MACHINES

    if not Path(header).exists():
        pytest.skip(f"needs {header}")
    lines = Path(header).read_text()
    known = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", lines)}
    known.setdefault("newfstatat", known.get("fstatat", -1))
    _, seccomp, flagged, allowed = MACHINES[machine]
    assert {name: known[name] for name in allowed} == allowed
    assert known["seccomp"] == seccomp and known["openat"] in flagged


def test_bad_limits() -> None:
    with pytest.raises(UsageError, match="seconds in"):
        run_python("", seconds=0)
