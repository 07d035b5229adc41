"""`fit` and `generate` on an embedded model, end to end and in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kill_harness import tree
from trimtab import cli

PROMPTS = [
    "Q: what color is the sky?\nA:",
    "Q: name three animals.\nA:",
    "Q: is snow hot?\nA:",
    "Q: what is 2 + 3?\nA:",
]
FIT = "fit re-control pocket/base --reward length:target=5 --prompts p.jsonl --max-new-tokens 8".split()
SMALL = "--rollouts 64 --epochs 1 --steps 2 --step-size 0.5".split()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a prompts file and a finished fit in `first`."""
    folder = tmp_path_factory.mktemp("fit")
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS * 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main([*FIT, *SMALL, "--out", "first"]) == 0
    return folder


@pytest.fixture
def folder(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(fitted)
    return fitted


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The sentence of a command that must end with exit code 2 and write nothing."""
    capsys.readouterr()
    before = tree(Path.cwd(), ignore=())
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert tree(Path.cwd(), ignore=()) == before
    return err.splitlines()[-1]


def test_a_fit_is_a_controller_and_a_run(folder: Path) -> None:
    names = set(tree(folder / "first", ignore=()))
    assert {"controller.json", "controller.safetensors", "README.md", "run.json", "events.jsonl"} <= names
    record = json.loads((folder / "first" / "controller.json").read_text())
    assert record["method"] == "re-control" and record["config"]["steps"] == 2


def test_the_same_fit_again_is_done_at_once(folder: Path) -> None:
    before = tree(folder / "first")
    assert cli.main([*FIT, *SMALL, "--out", "first"]) == 0
    assert tree(folder / "first") == before


def test_the_same_seed_gives_the_same_weights(folder: Path) -> None:
    assert cli.main([*FIT, *SMALL, "--out", "second"]) == 0
    first, second = (folder / name / "controller.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_other_arguments_in_the_same_folder_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "first was begun with other arguments" in refused(capsys, [*FIT, *SMALL[:-1], "0.7", "--out", "first"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stepz", "3"], "'--stepz'; did you mean '--steps'?"),
        (["--steps", "many"], "steps='many' is not a whole number"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "1", "--steps", "2"], "--steps is given twice"),
        (["--reward", "lenght:target=5"], "unknown reward 'lenght'; did you mean 'length'?"),
        (["--reward", "length:targt=5"], "did you mean 'target'?"),
    ],
)
def test_fit_refuses(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert message in refused(capsys, [*FIT, "--out", "new", *words])


def test_fit_of_what_cannot_be_fitted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "best-of-n has nothing to fit" in refused(capsys, ["fit", "best-of-n", *FIT[2:], "--out", "new"])
    assert "did you mean 're-control'" in refused(capsys, ["fit", "re-contrl", *FIT[2:], "--out", "new"])
    assert "did you mean 'base'" in refused(capsys, [*FIT[:2], "pocket/bas", *FIT[3:], "--out", "new"])
    assert "holds something else" in refused(capsys, [*FIT, *SMALL, "--out", "."])


def test_generate_prints_the_answer_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "pocket/base", PROMPTS[0], "--max-new-tokens", "6", "--temperature", "0"]
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    assert cli.main([*words, "--json", "-"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["answers"]
    assert first == row["text"] + "\n" and row["prompt"] == PROMPTS[0] and row["length"] <= 6


def test_generate_with_a_controller_and_several_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "pocket/base", "--prompts", "p.jsonl", "--controller", "first", "--n", "2", "--json", "a.json"]
    assert cli.main([*words, "--max-new-tokens", "4"]) == 0
    result = json.loads((folder / "a.json").read_text())
    assert [row["sample"] for row in result["answers"]] == [0, 1] * 16
    assert capsys.readouterr().out.count("> ") == 16
    assert result["policy"] == "re-control" and result["cost"]["tokens_forwarded"] > 0
    (folder / "a.json").unlink()


def test_generate_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'base'" in refused(capsys, ["generate", "pocket/bas", "hello"])
    assert "there is no model folder" in refused(capsys, ["generate", "./absent", "hello"])
    assert "not a controller" in refused(capsys, ["generate", "pocket/base", "hello", "--controller", "."])
    assert "re-control" in refused(capsys, ["generate", "pocket/nano", "hello", "--controller", "first"])
