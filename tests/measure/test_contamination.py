"""Planted contamination is found, chance overlaps are not, and the command says so."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tiny import tiny_lm
from trimtab.cli import main
from trimtab.errors import UsageError
from trimtab.measure.contamination import check_files, overlap, texts_of
from trimtab.prompt.tuning import save

WORDS = [f"w{number}" for number in range(500)]


def text(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def test_planted_rows_are_found_and_no_others() -> None:
    """100 test rows, 2,000 training rows of 40 words; 10 rows planted, one of them as 13 words inside another text."""
    rng = random.Random(0)
    test = [[text(rng, 30)] for _ in range(100)]
    train = [[text(rng, 40)] for _ in range(2000)]
    for number in range(9):
        train[100 * number] = [f"{text(rng, 5)} {test[number][0].upper()}!"]
    part = test[9][0].split()[7:20]
    train[1999] = [f"{text(rng, 10)}, {'; '.join(part)}. {text(rng, 10)}"]
    found = overlap(test, train)
    assert sorted(found.found) == list(range(10)) and found.found[9] == " ".join(part)


def test_twelve_words_in_a_row_are_not_thirteen() -> None:
    rng = random.Random(1)
    row = text(rng, 20)
    assert not overlap([[row]], [[" ".join(row.split()[:12])]]).found
    assert overlap([[row]], [[" ".join(row.split()[:12])]], n=12).found


def test_short_texts_count_whole_and_shorter_ones_not_at_all() -> None:
    test = [["What is two plus two?"], ["yes"], ["one two three four"]]
    train = [["Tell me: what is two plus two? Four."], ["yes"], ["one two three four"]]
    assert list(overlap(test, train).found) == [0]


def test_every_column_and_format(tmp_path: Path) -> None:
    question = "how many apples does tom have if he buys three more apples than he already had"
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "x", "options": ["y", question]}) + "\n")
    (tmp_path / "b.txt").write_text(f"nothing here\nI ask: {question}\n")
    (tmp_path / "c.csv").write_text(f'label,text\n1,"{question}"\n')
    assert texts_of(tmp_path / "a.jsonl") == [["x", "y", question]]
    for name in ("b.txt", "c.csv"):
        (said,) = check_files([tmp_path / "a.jsonl"], [tmp_path / name])
        assert f"1 of 1 rows of a.jsonl overlap with {name}" in said
    assert check_files([tmp_path / "b.txt"], []) == []
    with pytest.raises(UsageError, match="the very file"):
        check_files([tmp_path / "a.jsonl"], [tmp_path / "a.jsonl"])
    with pytest.raises(UsageError, match="at least 2 words"):
        overlap([["a"]], [["a"]], n=1)


def test_the_command_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    save(tiny_lm(), tmp_path / "one")
    (tmp_path / "test.txt").write_text("ba da fa la ma na\npe ra\n")
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "so: ba da fa la ma na"}) + "\n")
    command = [
        "measure",
        "refusal",
        str(tmp_path / "one"),
        "--texts",
        str(tmp_path / "test.txt"),
        "--max-new-tokens",
        "3",
    ]
    assert main([*command, "--train-texts", str(tmp_path / "train.jsonl"), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["measurements"][0]
    assert any("1 of 2 rows of test.txt overlap with train.jsonl" in warning for warning in found["warnings"])
    # the same measurement without it is clean: the warning is not cached with the figures
    assert main([*command, "--json", "-"]) == 0
    assert not any("overlap" in w for w in json.loads(capsys.readouterr().out)["measurements"][0]["warnings"])
