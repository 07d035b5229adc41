"""VADER, against its own published example values."""

from __future__ import annotations

import sys

import pytest

from trimtab.errors import UsageError
from trimtab.rewards import Sentiment


def test_compound() -> None:
    pytest.importorskip("vaderSentiment", reason="needs the extra 'text'")
    good, bad, empty = Sentiment().score(["p"] * 3, ["The food was great", "The food was horrible.", ""])
    assert good == pytest.approx(0.6249, abs=1e-9)
    assert bad is not None and bad < -0.5
    assert empty == 0.0  # VADER's own word for neutral


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(UsageError, match=r'pip install "trimtab\[text\]"'):
        Sentiment()
