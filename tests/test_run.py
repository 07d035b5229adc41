from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kill_harness import after_events, after_files, run_with_kills, tree
from trimtab.errors import TrimtabError, UsageError
from trimtab.files import TEMPORARY, digest, dump_json, write_atomic, write_json
from trimtab.run import RunDirectory

ARGUMENTS = {"model": "pocket/base", "temperature": 1.0, "policies": ["base", "best-of-n:n=8"]}

# A small job of the shape of a comparison: a fitted folder, chunks, a total. Slow enough to be killed anywhere.
JOB = textwrap.dedent(
    """
    import sys, time
    from trimtab.run import RunDirectory

    with RunDirectory.open(sys.argv[1], "job", {"n": 6}, {"prompts": "abc"}) as run:
        if not run.done("fits/a"):
            with run.folder("fits/a") as folder:
                for name in ("one", "two"):
                    (folder / name).write_text(name * 2000)
                    time.sleep(0.005)
        total = 0
        for chunk in range(6):
            rows = run.load_json(f"chunks/{chunk}")
            if rows is None:
                time.sleep(0.005)
                rows = [chunk * 1000 + row for row in range(1000)]
                run.save_json(f"chunks/{chunk}", rows)
            total += sum(rows)
        run.save_json("total", {"total": total})
        run.event("finished")
    """
)


def job(folder: Path) -> list[str]:
    return [sys.executable, "-c", JOB, str(folder)]


def opened(path: Path, **changes: object) -> RunDirectory:
    return RunDirectory.open(path, "compare", {**ARGUMENTS, **changes}, {"prompts": "abc"})


# Files


def test_write_atomic_keeps_the_old_file_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "naïve name.json"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert [child.name for child in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"


def test_json_refuses_nan_and_takes_numpy_and_paths(tmp_path: Path) -> None:
    import numpy as np

    write_json(tmp_path / "a.json", {"a": np.float32(0.5), "b": np.arange(2), "c": tmp_path, "d": "é\u2028"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 0.5, "b": [0, 1], "c": str(tmp_path), "d": "é\u2028"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_json({"a": float("nan")})
    with pytest.raises(TypeError, match="object"):
        dump_json({"a": object()})


def test_digest_of_a_folder_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "sub" / "x").write_text("1")
    first = digest(tmp_path / "a")
    (tmp_path / "a" / "sub" / "x").rename(tmp_path / "a" / "sub" / "y")
    assert digest(tmp_path / "a") != first
    (tmp_path / "a" / "sub" / "y").rename(tmp_path / "a" / "sub" / "x")
    assert digest(tmp_path / "a") == first


# Opening


def test_the_same_command_resumes_and_keeps_results(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        assert not run.resumed and not run.done("chunks/0")
        run.save_json("chunks/0", [1, 2])
    with opened(tmp_path / "run") as run:
        assert run.resumed and run.done("chunks/0") and run.load_json("chunks/0") == [1, 2]
        assert [event["event"] for event in run.events()] == ["started", "saved", "resumed"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["arguments"] == ARGUMENTS and record["environment"]["trimtab"]


def test_other_arguments_inputs_or_kind_are_refused_naming_the_key(tmp_path: Path) -> None:
    opened(tmp_path).close()
    before = tree(tmp_path, ignore=())
    with pytest.raises(UsageError, match=r"temperature was 1.0, is now 0.7.*another --out"):
        opened(tmp_path, temperature=0.7)
    with pytest.raises(UsageError, match="seed was null, is now 3"):
        opened(tmp_path, seed=3)
    with pytest.raises(UsageError, match='other inputs.*prompts was "abc", is now "changed"'):
        RunDirectory.open(tmp_path, "compare", ARGUMENTS, {"prompts": "changed"})
    with pytest.raises(UsageError, match="holds a compare run, not a fit run"):
        RunDirectory.open(tmp_path, "fit", ARGUMENTS)
    assert tree(tmp_path, ignore=()) == before


def test_a_folder_that_holds_something_else_is_refused_with_nothing_written(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds something else \(thesis.tex\)"):
        opened(tmp_path)
    assert tree(tmp_path, ignore=()) == {"thesis.tex": b"years of work"}
    with pytest.raises(UsageError, match="is a file"):
        opened(tmp_path / "thesis.tex")
    with pytest.raises(UsageError, match="cannot write to the output folder"):
        opened(tmp_path / "thesis.tex" / "below")


def test_a_damaged_run_json_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    (tmp_path / "run.json").write_text('{"kind": "comp')
    with pytest.raises(UsageError, match="run.json cannot be read"):
        opened(tmp_path)


def test_a_second_process_is_refused_naming_pid_and_path(tmp_path: Path) -> None:
    folder = tmp_path / "with space é"
    with opened(folder) as run:
        with pytest.raises(UsageError, match=rf"process {os.getpid()} is working in .*with space é"):
            opened(folder)
        run.save_json("a", 1)
    # The lock file stays and locks nothing.
    assert (folder / ".lock").exists()
    opened(folder).close()


def test_a_lock_left_by_a_killed_process_locks_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from trimtab.run import RunDirectory; "
        "run = RunDirectory.open(sys.argv[1], 'job', {}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False)
    with RunDirectory.open(tmp_path / "run", "job", {}) as run:
        assert run.resumed


def test_a_kill_before_run_json_leaves_a_folder_that_can_be_used(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("1\n")
    (tmp_path / f"{TEMPORARY}run.json-1").write_text("{")
    with opened(tmp_path) as run:
        assert not run.resumed
    assert sorted(tree(tmp_path)) == ["run.json"]


# Damage


def test_a_damaged_result_is_reported_and_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(tmp_path) as run:
        run.save_json("chunks/0", [1, 2])
        with run.folder("fits/a") as folder:
            (folder / "weights").write_bytes(b"12345678")
    (tmp_path / "chunks" / "0.json").write_text("[1, 3]")
    (tmp_path / "fits" / "a" / "weights").write_bytes(b"1234")
    with opened(tmp_path) as run:
        assert run.load_json("chunks/0") is None
        assert not run.done("fits/a")
        assert [event["key"] for event in run.events("set_aside")] == ["chunks/0.json", "fits/a"]
        run.save_json("chunks/0", [1, 2])
    assert (tmp_path / "chunks" / "0.json.corrupt-1").read_text() == "[1, 3]"
    assert (tmp_path / "fits" / "a.corrupt-1" / "weights").read_bytes() == b"1234"
    assert "0.json set aside as 0.json.corrupt-1" in capsys.readouterr().err
    with opened(tmp_path) as run:
        assert run.load_json("chunks/0") == [1, 2]


def test_a_torn_event_is_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(tmp_path) as run:
        run.save_json("a", 1)
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'{"time": "2026-01-01", "ev')
    with opened(tmp_path) as run:
        assert [event["event"] for event in run.events()] == ["started", "saved", "resumed"]
        assert run.load_json("a") == 1
    assert (tmp_path / "events.jsonl.corrupt-1").read_bytes() == b'{"time": "2026-01-01", "ev'
    assert "torn lines of" in capsys.readouterr().err


def test_an_abandoned_folder_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        with pytest.raises(RuntimeError), run.folder("fits/a") as folder:
            (folder / "half").write_text("")
            raise RuntimeError
        assert not run.done("fits/a")
        with run.folder("fits/a") as folder:
            (folder / "whole").write_text("")
        with pytest.raises(TrimtabError, match="there already"), run.folder("fits/a"):
            pass
    assert sorted(tree(tmp_path)) == ["fits/a/whole", "run.json"]


def test_contents_land_in_the_run_directory_json_last(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        with pytest.raises(RuntimeError), run.contents() as folder:
            (folder / "a.json").write_text("{}")
            raise RuntimeError
        with run.contents() as folder:
            (folder / "a.json").write_text("{}")
            (folder / "sub").mkdir()
            (folder / "sub" / "weights").write_bytes(b"1")
        assert [event["key"] for event in run.events("saved")] == ["sub/weights", "a.json"]
    assert sorted(tree(tmp_path)) == ["a.json", "run.json", "sub/weights"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_run_refused_before_it_has_a_result_leaves_nothing(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "runs" / "é 1"
    if existing:
        path.mkdir(parents=True)
    with pytest.raises(UsageError, match="nan"), opened(path) as run, run.folder("fits/a") as folder:
        (folder / "half").write_text("x")
        raise UsageError("the reward gave nan")
    left = sorted(tmp_path.rglob("*"))
    assert left == ([path.parent, path] if existing else [])
    with opened(path, temperature=2.0):  # so the corrected command can use the folder
        pass


@pytest.mark.parametrize("error", [TrimtabError("disk"), KeyboardInterrupt()])
def test_a_run_that_was_stopped_or_has_a_result_stays(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), opened(tmp_path / "stopped"):
        raise error
    with pytest.raises(UsageError), opened(tmp_path / "refused") as run:
        run.save_json("chunks/0", [1])
        raise UsageError("row 17")
    for name in ("stopped", "refused"):
        with opened(tmp_path / name) as run:
            assert run.resumed and len(run.events("stopped")) == 1
            assert run.load_json("chunks/0") == ([1] if name == "refused" else None)


def test_a_lock_file_that_was_taken_away_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.run._is_at", lambda *_: False)
    with pytest.raises(UsageError, match="has just left .* give the command again"):
        opened(tmp_path / "run")


@pytest.mark.parametrize("name", ["../out", "/abs", "run.json", ".lock", ""])
def test_a_result_stays_inside_the_run(tmp_path: Path, name: str) -> None:
    with opened(tmp_path / "run") as run, pytest.raises(TrimtabError, match="not a name"):
        run.save(name, "x")


def test_a_changed_environment_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened(tmp_path).close()
    record = json.loads((tmp_path / "run.json").read_text())
    record["environment"]["torch"] = "1.0"
    (tmp_path / "run.json").write_text(json.dumps(record))
    opened(tmp_path).close()
    assert "began in another environment (torch 1.0 ->" in capsys.readouterr().err


# Kills


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return run_with_kills(job(folder), folder, kills=0).tree


@pytest.mark.parametrize("seed", range(20))
def test_killed_at_random_points_it_ends_with_the_same_bytes(
    tmp_path: Path, uninterrupted: dict[str, bytes], seed: int
) -> None:
    outcome = run_with_kills(job(tmp_path / "run"), tmp_path / "run", seed=seed, kills=2, window_seconds=0.3)
    assert outcome.tree == uninterrupted
    # A kill alone damages nothing: equal bytes must not come from results that were mended.
    assert not [path for path in (tmp_path / "run").rglob("*.corrupt-*") if "events" not in path.name]


@pytest.mark.parametrize("point", [after_files(2), after_files(5), after_events(1, "saved"), after_events(3)])
def test_killed_at_chosen_points(tmp_path: Path, uninterrupted: dict[str, bytes], point: object) -> None:
    outcome = run_with_kills(job(tmp_path / "run"), tmp_path / "run", points=[point])  # type: ignore[list-item]
    assert outcome.kills == 1 and outcome.tree == uninterrupted
