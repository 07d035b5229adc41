"""`trimtab merge pleas`: one command from two folders to a model that answers; refusals of one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny import WORDS, tiny_model, tiny_tokenizer
from trimtab import cli


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b")):
        tiny_model(seed=seed).save_pretrained(name)
        tiny_tokenizer().save_pretrained(name)
    for name in ("one.txt", "two.txt"):
        Path(name).write_text("".join(f"{' '.join(WORDS[i : i + 6])}\n" for i in range(40)))
    return tmp_path


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["merge", "pleas", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and not Path("out").exists()
    return err.splitlines()[-1]


def test_from_two_folders_to_a_model_that_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "merge pleas a b --budget 1.3 --data one.txt two.txt --targets separate --residual --match am --out".split()
    assert cli.main([*words, "merged model", "--json", "found.json"]) == 0
    out, err = capsys.readouterr()
    assert "times one parent's multiply-adds" in out and "one.txt" in out and "two.txt" in out
    assert "all inputs are of one domain" not in err and "--residual matches" not in err
    found = json.loads(Path("found.json").read_text())
    assert found["shares"]["one.txt"] == pytest.approx(0.5) and found["width"] > 48
    readme = Path("merged model/README.md").read_text()
    assert "trimtab merge pleas a b --budget 1.3" in readme and "PLeaS" in readme
    assert cli.main(["generate", "merged model", "ba be", "--max-new-tokens", "3"]) == 0
    capsys.readouterr()
    assert cli.main([*words, "merged model", "--json", "-"]) == 0  # finished already
    assert json.loads(capsys.readouterr().out)["ratio"] == found["ratio"]


def test_help_says_what_the_options_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["merge", "pleas", "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "examples:" in out and '"data-free"' in out


def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["a", "b", "--data", "one.txt", "--out", "out"]
    assert "between 1 (one model) and 2" in fails(capsys, *said, "--budget", "2.5")
    assert "there is no file three.txt" in fails(capsys, "a", "b", "--data", "three.txt", "--out", "out")
    assert "did you mean '--budget'" in fails(capsys, *said, "--bugdet", "1.2")
    assert "one of auto, qp, uniform, zip" in fails(capsys, *said, "--scheme", "equal")
    assert "--data" in fails(capsys, "a", "b", "--out", "out")
    assert "are required" in fails(capsys)
    assert "lies in the folder of the model 'b'" in fails(capsys, *said[:-1], "b/out")
    assert "unknown option" in fails(capsys, *said, "--heads", "separate")  # for modules only
    assert "ridge must be 0 or more" in fails(capsys, *said, "--ridge", "-1")
    assert "there is no model folder" in fails(capsys, "a", "nowhere/b/c", "--data", "one.txt", "--out", "out")
    Path("few.txt").write_text("ba be bi\n")
    assert "ridge above 0" in fails(capsys, "a", "b", "--data", "few.txt", "--out", "out", "--ridge", "0")
