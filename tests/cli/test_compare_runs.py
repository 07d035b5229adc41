"""`compare` on an embedded model, end to end: what it writes, refuses, resumes, and survives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kill_harness import after_events, run_with_kills, tree
from trimtab import cli, pocket

COMPARE = "compare pocket/base --reward length:target=5 --prompts p.jsonl --max-new-tokens 6 --no-coherence".split()
POLICIES = "--policy best-of-n:n=2 --policy re-control:rollouts=64,epochs=1,steps=2,step_size=0.5".split()
# Figures that are times or memory: all else is the same however often the run was killed.
MEASURED = ("seconds_per_answer", "fit_seconds", "peak_memory_bytes")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a prompts file and a finished comparison in `first`."""
    folder = tmp_path_factory.mktemp("compare")
    prompts = pocket.prompts("test", 20, 0)
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main([*COMPARE, *POLICIES, "--out", "first", "--json", "first.json"]) == 0
    return folder


@pytest.fixture
def folder(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(finished)
    return finished


def figures(path: Path) -> dict[str, object]:
    """compare.json without what a clock or the memory measured."""
    result = json.loads(path.read_text())
    for policy in result["policies"]:
        policy["cost"] = {key: value for key, value in policy["cost"].items() if key not in MEASURED}
    for one in result["side_effects"]["comparisons"]:
        one["changes"] = [change for change in one["changes"] if change["label"] != "seconds per answer"]
    return result


def test_it_writes_the_table_the_answers_and_the_report(folder: Path) -> None:
    result = json.loads((folder / "first.json").read_text())
    assert result == json.loads((folder / "first" / "compare.json").read_text())
    assert (result["schema"], result["prompts"], result["samples"], result["seed"]) == (1, 20, 1, 0)
    assert [policy["name"] for policy in result["policies"]] == ["base", *POLICIES[1::2]]
    base, best, steered = result["policies"]
    assert base["verdict"] == "base" and {best["verdict"], steered["verdict"]} <= {"better", "worse", "undecided"}
    assert best["kl_per_token"] is None and best["kl_bound"] > 0 and steered["kl_per_token"]["mean"] > 0
    assert best["cost"]["reward_calls_per_answer"] == 2 and steered["cost"]["fit_tokens"] > 0
    rows = [json.loads(line) for line in (folder / "first" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 20
    assert "<html" in (folder / "first" / "report.html").read_text()


def test_the_report_is_written_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "first" / "report.html").read_bytes()
    (folder / "first" / "report.html").unlink()
    assert cli.main(["report", "first"]) == 0
    assert (folder / "first" / "report.html").read_bytes() == before
    assert "first/report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward", "lenght:target=5"], "did you mean 'length'?"),
        (["--reward", "length:target=many"], "'many' is not a whole number"),
        (["--gold", "pocket/juge"], "did you mean 'pocket/judge'?"),
        (["--policy", "re-control:stepz=3"], "did you mean 'steps'?"),
        (["--policy", "best-of-n:n=0"], "n must be 1 or more"),
        (["--out", "."], "holds something else"),
        (["--out", "p.jsonl"], "is a file"),
        (["--out", "first", "--seed", "1"], "seed was 0, is now 1"),
    ],
)
def test_it_refuses_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    before = tree(folder, ignore=())
    assert cli.main([*COMPARE, *POLICIES, "--out", "new", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1] and "Traceback" not in err
    assert tree(folder, ignore=()) == before


def test_an_unknown_model_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, message in (("pocket/bas", "did you mean 'base'?"), ("./absent", "there is no model folder")):
        assert cli.main([COMPARE[0], model, *COMPARE[2:], *POLICIES, "--out", "new"]) == 2
        assert message in capsys.readouterr().err
    assert not (folder / "new").exists()


def test_a_damaged_chunk_is_set_aside_and_made_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = figures(folder / "first" / "compare.json")
    chunk = sorted((folder / "first" / "chunks").glob("*.json"))[0]
    chunk.write_text(chunk.read_text().replace('"text": "', '"text": "forged', 1))
    assert cli.main([*COMPARE, *POLICIES, "--out", "first"]) == 0
    assert f"{chunk.name} set aside as {chunk.name}.corrupt-1" in capsys.readouterr().err
    assert figures(folder / "first" / "compare.json") == before


def test_killed_while_fitting_and_while_answering_it_ends_with_the_same_rows(folder: Path) -> None:
    out = folder / "killed é"
    command = [sys.executable, "-m", "trimtab", *COMPARE, *POLICIES, "--out", str(out)]
    outcome = run_with_kills(command, out, points=[after_events(1), after_events(4, "saved")], timeout=300)
    assert outcome.kills == 2
    assert (out / "samples.jsonl").read_bytes() == (folder / "first" / "samples.jsonl").read_bytes()
    assert figures(out / "compare.json") == figures(folder / "first" / "compare.json")
