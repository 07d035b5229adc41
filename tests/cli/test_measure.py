"""`trimtab measure`: tables, JSON, the page, the cache, and everything that is refused before any work."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tiny import tiny_lm
from trimtab import catalogue
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


def test_other_templates_are_refused_before_any_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny import CHAT, tiny_tokenizer
    from trimtab.lm import LM

    save(tiny_lm(tokenizer=tiny_tokenizer(chat=CHAT)), tmp_path / "chat")
    with monkeypatch.context() as patch:
        patch.setattr(LM, "load", lambda *_: pytest.fail("a model was loaded"))
        assert main(words(folder, "--against", str(tmp_path / "chat"))) == 2
    assert "--template plain" in capsys.readouterr().err
    assert main(words(folder, "--against", str(tmp_path / "chat"), "--template", "plain")) == 0


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
        (["measure", "refusal", "MODEL", "--texts", "TEXT", "TEXT"], "its rows would count twice"),
        (
            ["measure", "refusal", "MODEL", "--texts", "TEXT", "--train-texts", "TEXT"],
            "the very file that is measured on",
        ),
        (["measure", "human-triplets", "MODEL", "--texts", "MODEL/model.safetensors"], "not UTF-8 text (byte"),
        (["measure", "refusal", "MODEL/absent", "--texts", "TEXT"], "there is no model folder"),
        (["measure", "refusal", "best-of-n on MODEL", "--texts", "TEXT"], "give --reward"),
        (["measure", "varco-arena", "MODEL", "--texts", "TEXT"], "give --against MODEL"),
        (["measure", "refusal", "MODEL", "--texts", "TEXT", "--json", "/no/such/folder/x"], "there is no folder"),
        (
            ["measure", "refusal", "MODEL", "--texts", "TEXT", "--out", "TEXT/out"],
            "is no folder that can be written to",
        ),
        (
            ["measure", "refusal", "MODEL", "--texts", "TEXT", "--max-new-tokens", "0"],
            "answers of 0 tokens say nothing",
        ),
        (["measure", "refusal", "aqi on MODEL", "--texts", "TEXT"], "aqi is a diagnostic and no policy"),
        (["measure", "multiple-choice", "MODEL", "--texts", "TEXT"], "(mc, belief-mc, contrast-likelihood)"),
        (
            ["measure", "verify", "MODEL", "--texts", "TEXT", "--samples", "2", "--k", "2", "--temperature", "0"],
            "greedy",
        ),
        (["measure", "generation-exploitation", "MODEL", "--texts", "TEXT", "--export", "TEXT"], "name a folder"),
        (
            [
                "measure",
                "reward-benchmark",
                "MODEL",
                "--texts",
                "TEXT",
                "--reward",
                "length:target=3",
                "--gold",
                "length:target=9",
                "--temperature",
                "0",
            ],
            "--temperature above 0",
        ),
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


def test_a_damaged_model_is_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copytree(folder / "one", tmp_path / name)
        (tmp_path / name / name).write_bytes(b"{")
        assert main(["measure", "refusal", str(tmp_path / name), "--texts", str(folder / "harmful.txt")]) == 2
        assert "cannot load the model" in capsys.readouterr().err.splitlines()[-1]


def test_a_reader_who_has_gone(folder: Path) -> None:
    """Tables are printed by rich, which on its own would exit with 1."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "trimtab", *words(folder)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 141 and b"Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["refusal", "multiple-choice"])
def test_the_cards_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("harmful.txt", "harmless.txt"):
        Path(file).write_text("Tell me how to steal a bike.\n")
    row = {"question": "Where do I find a fox?", "choices": ["In the barn.", "In the hill."], "answer": 0}
    Path("questions.jsonl").write_text(json.dumps(row) + "\n")
    example = shlex.split(catalogue.card(name).example)
    assert main([*example[1:], "--max-new-tokens", "2"]) == 0


def test_a_comparison_prints_what_it_measured(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", str(folder / "one"), "--reward", "length:target=3", "--prompts", str(folder / "harmful.txt")]
    command += ["--policy", "best-of-n:n=2", "--measure", f"refusal:texts={folder / 'harmless.txt'}"]
    assert main([*command, "--max-new-tokens", "4", "--no-coherence", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "best-of-n:n=2 against base (paired by prompt)" in said.out and "\nrefusal " in said.out
    assert "measuring refusal of best-of-n:n=2" in said.err


def test_the_card_says_how_options_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "refusal"]) == 0
    assert "in --measure; --key value in trimtab measure refusal)" in capsys.readouterr().out


def test_a_long_name_is_short_over_its_column(folder: Path, tmp_path: Path) -> None:
    name = "a-model-with-a-name-that-goes-on-and-on-checkpoint-12000"
    shutil.copytree(folder / "two", tmp_path / name)
    assert main(words(folder, "--against", str(tmp_path / name), "--out", str(tmp_path / "out"))) == 0
    html = (tmp_path / "out" / "report.html").read_text()
    assert f'title="{name}">a-model-with-a…point-12000<' in html and f"<b>{name}</b>" in html


def test_a_number_without_an_interval_says_so(folder: Path, tmp_path: Path) -> None:
    """One sample of one answer has no spread: the cell holds words, not nothing."""
    out = tmp_path / "out"
    command = ["measure", "panel", str(folder / "one"), "--texts", str(folder / "harmful.txt"), "--out", str(out)]
    assert main([*command, "--max-new-tokens", "5"]) == 0
    table = json.loads((out / "measure.json").read_text())["measurements"][0]["table"]
    bare = [row for row in table if row["value"] is not None and row["low"] is None]
    assert (out / "report.html").read_text().count("<small>no interval</small>") == len(bare) > 0
