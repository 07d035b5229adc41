"""`trimtab measure`: tables, JSON, the page, the cache, and everything that is refused before any work."""

from __future__ import annotations

import json
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tiny import tiny_lm
from trimtab.cli import main
from trimtab.prompt.tuning import save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measure")
    save(tiny_lm(), path / "one")
    save(tiny_lm(seed=1), path / "two")
    (path / "harmful.txt").write_text("ba da fa\nma na\npe ra sa\n")
    (path / "harmless.txt").write_text("de fe\nge le\n")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def words(folder: Path, *more: str) -> list[str]:
    texts = ["--texts", str(folder / "harmful.txt"), str(folder / "harmless.txt")]
    return ["measure", "refusal", str(folder / "one"), *texts, "--max-new-tokens", "5", *more]


def test_a_table_json_and_a_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = words(folder, "--against", str(folder / "two"), "--out", str(out), "--samples", "2", "--json", "-")
    assert main(command) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [one["subject"] for one in found["measurements"]] == ["one", "two"] and len(found["comparisons"]) == 1
    assert "refusal of one" in said.err and "one against two (paired by prompt)" in said.err
    assert json.loads((out / "measure.json").read_text())["measurements"] == found["measurements"]
    assert found["measurements"][0]["measured"]["settings"]["samples"] == 2
    html = (out / "report.html").read_text()
    assert "trimtab measure refusal" in html and "What it means" in html and html.count("<svg") == 3
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert main(command) == 0 and (out / "report.html").read_text() == html


def test_the_pages_numbers_are_the_jsons(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(words(folder, "--out", str(out))) == 0
    found = json.loads((out / "measure.json").read_text())["measurements"][0]
    shown: list[float | None] = []

    class Cells(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            value = dict(attributes).get("data-value")
            if tag == "td" and value is not None:
                shown.append(json.loads(value))

    Cells().feed((out / "report.html").read_text())
    assert shown == [row["value"] for row in found["table"]]


def test_a_second_run_forwards_nothing_and_is_fifty_times_faster(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is not even loaded. Times are of the measuring itself, without Python's own start."""
    from trimtab.lm import LM

    start = time.perf_counter()
    assert main(words(folder, "--samples", "16")) == 0
    first, text = time.perf_counter() - start, capsys.readouterr().out
    monkeypatch.setattr(LM, "load", lambda *_: pytest.fail("the model was loaded"))
    start = time.perf_counter()
    assert main(words(folder, "--samples", "16")) == 0
    again = time.perf_counter() - start
    assert capsys.readouterr().out == text and again < first


def test_other_weights_are_measured_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    fingerprints = []
    for seed in (0, 1):
        save(tiny_lm(seed=seed), model)
        assert main(["measure", "refusal", str(model), *words(folder)[3:], "--json", "-"]) == 0
        fingerprints.append(json.loads(capsys.readouterr().out)["measurements"][0]["fingerprint"])
    assert fingerprints[0] != fingerprints[1]


def test_another_file_under_an_options_name_is_measured_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harmful = tmp_path / "h.txt"
    command = [
        "measure",
        "panel",
        str(folder / "one"),
        "--texts",
        str(folder / "harmful.txt"),
        "--harmful",
        str(harmful),
    ]
    counts = []
    for lines in ("ba da", "ba da\nma na"):
        harmful.write_text(lines)
        assert main([*command, "--max-new-tokens", "5", "--json", "-"]) == 0
        rows = json.loads(capsys.readouterr().out)["measurements"][0]["table"]
        counts.append(next(row["n"] for row in rows if row["label"] == "refusal"))
    assert counts == [1, 2]


def test_a_reward_model_is_a_subject_too(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "Q: 1 + 1?\nA:", "chosen": f" It is {n}.", "rejected": f" No {n} way."} for n in range(30)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["measure", "reward-benchmark", "pocket/reward", "--texts", str(pairs), "--json", "-"]) == 0
    one = json.loads(capsys.readouterr().out)["measurements"][0]
    assert (
        main(
            [
                "measure",
                "reward-benchmark",
                str(folder / "one"),
                "--reward",
                "pocket/reward",
                "--texts",
                str(pairs),
                "--json",
                "-",
            ]
        )
        == 0
    )
    two = json.loads(capsys.readouterr().out)["measurements"][0]
    assert one["subject"] == two["subject"] == "pocket/reward" and one["table"][0] == two["table"][0]
    assert main(["measure", "refusal", "pocket/reward", "--texts", str(folder / "harmful.txt")]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["measure", "refusl", "MODEL"], "unknown diagnostic 'refusl'; did you mean 'refusal'?"),
        (["measure", "best-of-n", "MODEL"], "best-of-n"),
        (["measure", "refusal", "MODEL"], "--texts FILE is needed"),
        (["measure", "refusal", "MODEL", "--texts", "absent.txt"], "there is no file absent.txt"),
        (["measure", "refusal", "MODEL", "--texts", "TEXT", "--sampels", "3"], "did you mean '--samples'?"),
        (["measure", "refusal", "MODEL", "--texts", "TEXT", "--samples", "0"], "samples must be 1 or more"),
        (["measure", "refusal", "MODEL", "--texts", "TEXT", "--samples", "x"], "is not a whole number"),
        (["measure", "refusal", "MODEL", "--texts", "TEXT", "--against", "MODEL"], "is given twice"),
        (["measure", "refusal", "MODEL/absent", "--texts", "TEXT"], "there is no model folder"),
        (["measure", "refusal", "best-of-n on MODEL", "--texts", "TEXT"], "give --reward"),
        (["measure", "varco-arena", "MODEL", "--texts", "TEXT"], "give --against MODEL"),
        (["measure", "refusal", "MODEL", "--texts", "TEXT", "--json", "/no/such/folder/x"], "there is no folder"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_written(
    folder: Path, cache: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    stand = {"MODEL": str(folder / "one"), "TEXT": str(folder / "harmful.txt")}
    line = [word.replace("MODEL", stand["MODEL"]).replace("TEXT", stand["TEXT"]) for word in change]
    assert main(line) == 2
    said = capsys.readouterr()
    assert message in said.err.splitlines()[-1] and said.out == ""
    assert not (cache / "measurements").exists()


def test_out_that_holds_something_else(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_text("mine")
    assert main(words(folder, "--out", str(tmp_path))) == 2
    assert "holds something else" in capsys.readouterr().err


def test_a_policy_on_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = f"best-of-n:n=2 on {folder / 'one'}"
    command = ["measure", "panel", best, "--against", str(folder / "one"), "--reward", "length:target=3"]
    command += ["--texts", str(folder / "harmful.txt"), "--max-new-tokens", "5", "--json", "-"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    labels = [change["label"] for change in found["comparisons"][0]["changes"]]
    assert labels[:2] == ["win rate", "reward"] and labels[-2:] == ["tokens per answer", "seconds per answer"]
