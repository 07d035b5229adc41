"""`trimtab merge ... --evaluate` and `trimtab merge search`: tables, JSON, pages, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merge_folders import two_tuned
from trimtab import LM
from trimtab.cli import main
from trimtab.merge.skills import Skill


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_tuned(tmp_path_factory.mktemp("merge search"), shown=12)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(folder)


def merge(out: Path, *skills: str) -> list[str]:
    words = ["merge", "task-arithmetic", "--models", "b", "d", "--base", "base", "--scale", "0.7", "--out", str(out)]
    return [*words, "--evaluate", *skills, "--json", "-"]


def test_evaluate_says_what_became_of_each_skill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = merge(
        out, "nll:texts=b.txt,name=skill of b", "nll:texts=d.txt", "refusal:texts=b.txt|d.txt,max_new_tokens=3"
    )
    assert main(command) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    lines = found["skills"]["lines"]
    assert [line["label"] for line in lines] == ["NLL per byte", "NLL per byte", "refusal", "over-refusal"]
    assert [line["specialist"] for line in lines[:2]] == ["b", "d"]
    assert "skill of b: NLL per byte" in said.err and "nll: NLL per byte" in said.err
    assert "What the skills became" in said.err and "base (base)" in said.err and "gain kept" in said.err
    for number in (lines[0]["models"][0]["value"], lines[0]["models"][1]["value"]):
        assert f"{number:.3f}" in said.err
    kept = lines[0]["models"][1]["kept"]
    assert f"{100 * kept['share']:.0f} % [{100 * kept['low']:.0f}, {100 * kept['high']:.0f}] *" in said.err
    stored = json.loads((out / "report" / "skills.json").read_text())
    assert stored["lines"] == lines and stored["command"][:3] == ["trimtab", "merge", "task-arithmetic"]
    page = (out / "report" / "skills.html").read_text()
    assert f"{lines[0]['models'][0]['value']:.3f}" in page and page.count("<svg") == 1 + len(lines)
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert LM.load(out).generate(["ba"]).texts  # what was put beside it leaves it a model
    assert not (out / ".evaluated").exists()
    # The same command: nothing is merged or measured again, and the answer is the same.
    weights = (out / "model.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["skills"] == found["skills"]
    assert (out / "model.safetensors").stat().st_mtime_ns == weights


@pytest.mark.parametrize(
    ("skill", "said"),
    [
        ("nlll:texts=b.txt", "did you mean 'nll'"),
        ("nll:texts=c.txt", "no file c.txt"),
        ("multiple-choice:texts=b.txt", "b.txt"),
        ("pa-ccs:texts=b.txt", "b.txt"),
    ],
)
def test_a_skill_that_cannot_be_measured_stops_the_merge_before_it_begins(
    skill: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(merge(tmp_path / "out", "nll:texts=b.txt", skill)) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_taken_folder_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(["merge", "linear", "--models", "b", "d", "--out", str(out)]) == 0
    for words in (merge(out, "nll:texts=b.txt"), search(out, "--scale", "0:1"), search(Path("b/in"), "--scale", "0:1")):
        monkeypatch.setattr(Skill, "measure", lambda *_, **__: pytest.fail("measured first"))
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "give those, or another --out" in said or "give another --out" in said
    assert not Path("b/in").exists()


def test_progress_names_models_as_the_user_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(merge(tmp_path / "out", "nll:texts=b.txt,name=skill")) == 0
    said = capsys.readouterr().err
    assert "skill of base" in said and "skill of the merge" in said and ".evaluated" not in said


def search(out: Path, *more: str) -> list[str]:
    words = ["merge", "search", "task-arithmetic", "--models", "b", "d", "--base", "base", "--out", str(out)]
    return [*words, "--validate", "nll:texts=b.txt", "nll:texts=d.txt,weight=0.5", *more]


def test_search_finds_merges_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = search(out, "--scale", "0.1:1.2", "--budget", "4", "--test", "nll:texts=d.txt", "--json", "-")
    assert main(command) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert len(found["trials"]) == 4 and found["skills"][1] == "nll:texts=d.txt,weight=0.5"
    assert "4 trials, best first" in said.err and "winner's curse" in said.err.replace("\n", " ")
    assert found["test"]["lines"][0]["n"] == 12 and "What the skills became" in said.err
    page = (out / "search.html").read_text()
    assert found["trials"][0]["settings"] in page and "<svg" in page
    # The recipe that was written makes the model that was written.
    assert main(["merge", "run", str(out / "merge.yaml"), "--out", str(tmp_path / "again")]) == 0
    one, two = ((path / "model.safetensors").read_bytes() for path in (out / "model", tmp_path / "again"))
    assert one == two
    capsys.readouterr()
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--scale", "0.1:1.2", "--budget", "1"], "2 or more"),
        (["--budget", "3"], "nothing to search"),
        (["--scael", "0:1"], "did you mean '--scale'"),
        (["--scale", "1:0"], "LOW:HIGH"),
        (["--scale", "0:1", "--test", "nil:texts=b.txt"], "did you mean 'nll'"),
    ],
)
def test_search_refuses_before_it_writes(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(search(tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_search_of_other_ranges_in_the_same_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(search(tmp_path / "out", "--scale", "0.5:1", "--budget", "2")) == 0
    assert main(search(tmp_path / "out", "--scale", "0.5:1.1", "--budget", "2")) == 2
    assert "begun with other arguments" in capsys.readouterr().err
