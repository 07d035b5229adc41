"""A merge that is killed ends, when it is started again, with the bytes of one that was not.

The processes that are killed are forks of one that has imported torch (this file as a script), since that import takes
longer than the merges do: `python test_merge_kills.py WHAT PARENTS FOLDER` prints what happened as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent.parent
SHARDS = ("--max-shard-size", "100KB")


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from merge_folders import save

    folder = tmp_path_factory.mktemp("a folder für kills")
    for name, seed in (("base", 0), ("one", 1), ("two", 2)):
        save(folder / name, seed)
    return folder


def harass(what: str, parents: Path, folder: Path) -> dict[str, Any]:
    """Runs this file as a script."""
    done = subprocess.run(
        [sys.executable, __file__, what, str(parents), str(folder)],
        env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_killed_at_twenty_random_points_it_ends_with_the_same_bytes(parents: Path, tmp_path: Path) -> None:
    found = harass("random", parents, tmp_path)
    assert found["kills"] >= 20 and found["resumed"] >= 5, "the kills must land inside the work"
    assert found["trees"] == [found["uninterrupted"]] * 20


def test_killed_before_every_write_flush_and_rename(parents: Path, tmp_path: Path) -> None:
    """Among them: between two renames of shards, before the index, before config.json, before the last event."""
    found = harass("every", parents, tmp_path)
    assert {"pwrite", "fsync", "replace", "posix_fallocate"} <= set(found["calls"])
    assert found["calls"].count("replace") >= 8 and found["calls"].count("pwrite") >= 3
    assert found["kills"] == len(found["calls"])
    assert found["trees"] == [found["uninterrupted"]] * found["kills"]
    whole = [tree for tree in found["models"] if tree is not None]
    assert whole == [found["uninterrupted"]] * len(whole), "what looks like a model must be the model"
    assert 0 < len(whole) < 6, "config.json is among the last"


def test_ctrl_c_is_130_and_the_same_command_continues(parents: Path, tmp_path: Path) -> None:
    found = harass("ctrl-c", parents, tmp_path)
    assert found["code"] == 130 and found["said"].endswith("stopped: the same command continues where it was\n")
    assert found["event"] == "stopped"
    assert found["tree"] == found["uninterrupted"]
    assert 0 < found["again"] < found["tensors"], "it must neither begin anew nor have been finished"


def test_a_second_process_on_the_same_folder_refuses(parents: Path, tmp_path: Path) -> None:
    found = harass("two", parents, tmp_path)
    assert found["second"] == 2
    assert f"process {found['pid']} is working in" in found["said"] and "--out" in found["said"]
    assert found["first"] == 0 and found["tree"] == found["uninterrupted"]


# The script


class Killer:
    """Forks merges, slowed down so that there is something to interrupt."""

    def __init__(self, parents: Path, folder: Path) -> None:
        models = [str(parents / name) for name in ("one", "two")]
        self.words = ["ties", "--models", *models, "--base", str(parents / "base"), "--density", "0.4", *SHARDS]
        self.folder = folder

    def start(self, out: Path, prepare: Callable[[], None], threads: int = 2) -> int:
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        errors = os.open(f"{out}.stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(errors, 2)
        os.dup2(errors, 1)
        code = 99
        try:
            from trimtab import cli
            from trimtab.merge import engine

            engine.PART, engine.SYNC_SECONDS = 256, 0.0
            prepare()
            # The command is in the model card: it must be the same for all, as it is for one who repeats it.
            os.chdir(out.parent)
            code = cli.main(["merge", *self.words, "--out", out.name, "--threads", str(threads)])
        finally:
            sys.stdout.flush()
            os._exit(code)

    def finish(self, out: Path, prepare: Callable[[], None] = lambda: None, threads: int = 2) -> dict[str, str]:
        code = wait(self.start(out, prepare, threads))
        assert code == 0, Path(f"{out}.stderr").read_text()
        return hashes(out)

    def out(self, case: object) -> Path:
        """Every case has a folder of its own, in which the model has the same name."""
        (self.folder / str(case)).mkdir()
        return self.folder / str(case) / "merged"


def hashes(out: Path) -> dict[str, str]:
    import hashlib

    from kill_harness import tree

    return {name: hashlib.sha256(data).hexdigest() for name, data in tree(out).items()}


def wait(pid: int) -> int:
    """The exit code; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def until(ready: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.001)


def events(out: Path, name: str) -> list[dict[str, Any]]:
    path = out / "events.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if row["event"] == name]


def slowly(seconds: float = 0.002) -> None:
    from trimtab.merge.writer import Shards

    write = Shards.write

    def slow(self: Any, *arguments: Any) -> None:
        time.sleep(seconds)
        write(self, *arguments)

    Shards.write = slow  # type: ignore[method-assign]


def at_random(killer: Killer) -> dict[str, Any]:
    killer.finish(killer.out("first"), slowly)  # so that what is imported late is not timed
    began = time.monotonic()
    whole = killer.finish(killer.out("whole"), slowly)
    window = time.monotonic() - began
    trees, kills, resumed = [], 0, 0
    for seed in range(20):
        chance, out = random.Random(seed), killer.out(seed)
        for _ in range(chance.randint(1, 3)):
            pid = killer.start(out, slowly)
            time.sleep(chance.uniform(0, window))
            os.kill(pid, signal.SIGKILL)
            kills += wait(pid) == -signal.SIGKILL
        resumed += bool(events(out, "merged"))
        trees.append(killer.finish(out))
    return {"uninterrupted": whole, "trees": trees, "kills": kills, "resumed": resumed}


def at_every_call(killer: Killer) -> dict[str, Any]:
    from trimtab.errors import UsageError
    from trimtab.merge.source import Folder

    whole = killer.finish(killer.out("whole"), threads=1)
    trees, calls, models = [], [], []
    while True:
        out = killer.out(len(calls))
        log = out.parent / "call"
        if wait(killer.start(out, lambda log=log: die_at(len(calls), log), threads=1)) == 0:
            break
        calls.append(log.read_text())
        try:
            Folder(out)
            models.append(hashes(out))
        except UsageError:
            models.append(None)
        trees.append(killer.finish(out, threads=1))
    return {"uninterrupted": whole, "trees": trees, "calls": calls, "kills": len(trees), "models": models}


def die_at(number: int, log: Path) -> None:
    """The process kills itself just before the number-th call of those that change what is on disk.

    Of the writes every sixth counts, and tensors are in one part and logged once: there are enough of them as it is.
    """
    from trimtab.merge import engine

    engine.PART, engine.SYNC_SECONDS = 1 << 18, 60.0
    left, writes = number, 0

    def dying(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def made(*arguments: Any) -> Any:
            nonlocal left, writes
            writes += name == "pwrite"
            if name == "pwrite" and writes % 6:
                return call(*arguments)
            if left == 0:
                log.write_text(name)
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*arguments)

        return made

    for name in ("pwrite", "fsync", "replace", "posix_fallocate"):
        setattr(os, name, dying(name))


def by_ctrl_c(killer: Killer) -> dict[str, Any]:
    whole = killer.finish(killer.out("whole"))
    out = killer.out("stopped")
    pid = killer.start(out, lambda: slowly(0.1))  # seconds, so that the signal lands inside on a busy machine too
    until(lambda: len(events(out, "merged")) > 1)
    os.kill(pid, signal.SIGINT)
    code = wait(pid)
    said, last = Path(f"{out}.stderr").read_text(), json.loads((out / "events.jsonl").read_text().splitlines()[-1])
    before = sum(len(row["sums"]) for row in events(out, "merged"))
    tree = killer.finish(out)
    tensors = sum(len(row["sums"]) for row in events(killer.folder / "whole/merged", "merged"))
    again = sum(len(row["sums"]) for row in events(out, "merged")) - before
    return {
        "uninterrupted": whole, "tree": tree, "code": code, "said": said, "event": last["event"], "again": again,
        "tensors": tensors,
    }  # fmt: skip


def two_at_once(killer: Killer) -> dict[str, Any]:
    whole = killer.finish(killer.out("whole"))
    out = killer.out("shared")
    first = killer.start(out, lambda: slowly(0.02))
    until(lambda: bool(events(out, "started")))
    second = wait(killer.start(out, lambda: None))
    said = Path(f"{out}.stderr").read_text()
    return {
        "uninterrupted": whole, "pid": first, "second": second, "said": said, "first": wait(first), "tree": hashes(out)
    }  # fmt: skip


if __name__ == "__main__":
    import trimtab.merge.engine
    import trimtab.merge.methods.ties  # noqa: F401 - what the forks need, imported once

    what = {"random": at_random, "every": at_every_call, "ctrl-c": by_ctrl_c, "two": two_at_once}[sys.argv[1]]
    print(json.dumps(what(Killer(Path(sys.argv[2]), Path(sys.argv[3])))))
