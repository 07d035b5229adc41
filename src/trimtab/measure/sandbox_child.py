"""The other side of `sandbox`: runs code that nobody trusts. Started as `python -I -S sandbox_child.py`, never imported.

On standard input: one JSON object {nonce, code, tests, entry, report, memory_bytes, cpu_seconds, unsealed}. On the file
descriptor `report`: a line "sealed" or "unsealed: REASON" before anything is run, then the nonce if and only if the
code and its tests came to their ends, else one line that says what was raised.

The code runs in a thread that is a chain of C functions (list, map, exec): it has no frame of ours below it, and the
nonce is a local of the main thread. Steps: wait, code, link, tests, done; each compiled by itself, so that no quote or
future import of the code reaches the tests. The tests get builtins copied before the code ran, and functions of the code
wrapped so that they return plain values: an object that calls itself equal to everything is not accepted.
"""

from __future__ import annotations

import _thread
import builtins
import collections
import ctypes
import decimal
import fractions
import json
import os
import platform
import resource
import struct
import sys
import time
import types

# What an interpreter needs after it has started, and nothing else: no sockets, processes, threads, signals, renaming or
# removing; files are opened for reading only. Numbers of the system calls by machine.
COMMON = (
    "read readv pread64 write writev lseek close newfstatat fstat statx faccessat faccessat2 readlinkat getdents64 "
    "getcwd mmap munmap mprotect mremap madvise brk futex rt_sigprocmask rt_sigreturn sigaltstack restart_syscall "
    "getpid getppid gettid getuid geteuid getgid getegid uname sysinfo clock_gettime clock_getres clock_nanosleep "
    "nanosleep gettimeofday times getrusage sched_yield sched_getaffinity getrandom exit exit_group"
).split()
X86_64 = (
    "0 19 17 1 20 8 3 262 5 332 269 439 267 217 79 9 11 10 25 28 12 202 14 15 131 219 39 110 186 102 107 104 108 63 99 "
    "228 229 230 35 96 100 98 24 204 318 60 231"
)
AARCH64 = (
    "63 65 67 64 66 62 57 79 80 291 48 439 78 61 17 222 215 226 216 233 214 98 135 139 132 128 172 173 178 174 175 176 "
    "177 160 179 113 114 115 101 169 153 165 124 123 278 93 94"
)
X86_64_ALSO = {"stat": 4, "lstat": 6, "access": 21, "readlink": 89, "time": 201}


def numbered(numbers: str, **also: int) -> dict[str, int]:
    return {**dict(zip(COMMON, map(int, numbers.split()), strict=True)), **also}


# machine -> (audit number, number of seccomp, {open or openat: its argument that holds the flags}, allowed calls)
MACHINES: dict[str, tuple[int, int, dict[int, int], dict[str, int]]] = {
    "x86_64": (0xC000003E, 317, {257: 2, 2: 1}, numbered(X86_64, **X86_64_ALSO)),
    "aarch64": (0xC00000B7, 277, {56: 2}, numbered(AARCH64)),
}
FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # DENY: the call fails with EPERM
PLAIN = (int, float, complex, bool, str, bytes, bytearray, type(None), range, decimal.Decimal, fractions.Fraction)
MANY = (list, tuple, set, frozenset, collections.deque)
PAIRS = (dict, collections.Counter, collections.OrderedDict, collections.defaultdict)

LINK = """
settrace(None); setprofile(None)
def plain(value):
    kind = type(value)
    if kind in MANY:
        for one in value: plain(one)
    elif kind in PAIRS:
        for name, one in dict.items(value): plain(name); plain(one)
    elif kind not in PLAIN:
        raise TypeError("an answer of type " + str(kind) + ": plain values are needed")
    return value
def wrapped(function):
    def call(*arguments, **named): return plain(function(*arguments, **named))
    return call
for name in list(tested):
    if type(name) is str and name not in names:
        value = tested[name]
        checks[name] = wrapped(value) if type(value) is kind_of_function else value
if entry: tested[entry]
"""


def seal() -> str:
    """Install the filter on all threads; "" or why it could not be."""
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        return f"no filter of system calls for {sys.platform} on {platform.machine()}"
    audit, number, flagged, allowed = MACHINES[platform.machine()]
    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for call, argument in flagged.items():
        steps += [(EQUAL, 0, 4, call), (LOAD, 0, 0, 16 + 8 * argument), (ANY_BIT, 1, 0, FOR_WRITING)]
        steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, DENY)]
    for call in allowed.values():
        steps += [(EQUAL, 0, 1, call), (RETURN, 0, 0, ALLOW)]
    steps.append((RETURN, 0, 0, DENY))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program)))
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL: not to outlive the parent
    if libc.prctl(38, 1, 0, 0, 0) != 0:  # PR_SET_NO_NEW_PRIVS
        return f"prctl failed ({os.strerror(ctypes.get_errno())})"
    if libc.syscall(number, 1, 1, filter_) != 0:  # SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC
        return f"seccomp failed ({os.strerror(ctypes.get_errno())})"
    return ""


def limit(**limits: int) -> None:
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        except (ValueError, OSError):  # a system with a lower limit, or that refuses this one (macOS: memory)
            continue


def main() -> None:
    asked = json.loads(sys.stdin.buffer.read())
    limit(CPU=asked["cpu_seconds"], AS=asked["memory_bytes"], FSIZE=1 << 20, NOFILE=64, CORE=0)
    unsealed = asked["unsealed"]
    report, nonce = asked["report"], asked.pop("nonce").encode()
    write, leave, running, sleep = os.write, os._exit, _thread._count, time.sleep  # as they are now
    module = types.ModuleType("tested")
    sys.modules["tested"] = module
    pristine = dict(vars(builtins))
    checks = {"__builtins__": pristine, "__name__": "tests"}
    names = {"__builtins__", *pristine, *vars(module)}
    link = {
        "__builtins__": pristine, "tested": vars(module), "checks": checks, "names": names,
        "entry": asked["entry"], "settrace": sys.settrace, "setprofile": sys.setprofile, "PLAIN": PLAIN, "MANY": MANY,
        "PAIRS": PAIRS, "kind_of_function": types.FunctionType,
    }  # fmt: skip
    gate = _thread.allocate_lock()
    done: list[int] = []
    gate.acquire()
    try:
        code = compile(asked["code"], "code", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        write(report, f"sealed\nraised {type(error).__name__} before it ran".encode())
        leave(0)
    steps = [
        (compile("acquire()", "wait", "exec"), {"acquire": gate.acquire}),
        (code, vars(module)),
        (compile(LINK, "link", "exec"), link),
        (compile(asked["tests"], "tests", "exec"), checks),
        (compile("append(1)", "done", "exec"), {"append": done.append}),
    ]
    codes, spaces = zip(*steps, strict=True)

    def raised(what: object) -> None:
        kind = getattr(what, "exc_type", None)
        write(report, f"raised {getattr(kind, '__name__', kind)}: {getattr(what, 'exc_value', '')}".encode()[:500])

    sys.unraisablehook = raised
    _thread.start_new_thread(list, (map(exec, codes, spaces),))
    del asked, codes, spaces, steps, link, checks, module, sys._current_frames
    while not running():
        sleep(0.001)
    limit(NPROC=0)  # the thread is there already
    why = seal()
    write(report, f"{'unsealed: ' + why if why else 'sealed'}\n".encode())
    if why and not unsealed:
        leave(0)
    gate.release()
    while running():
        sleep(0.002)
    if done:
        write(report, nonce)
    leave(0)


if __name__ == "__main__":
    main()
