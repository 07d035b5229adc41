"""Rules, on answers whose score can be worked out by hand."""

from __future__ import annotations

import pytest

from trimtab.errors import UsageError
from trimtab.rewards import Keyword, Length, Regex


def score(reward: Length | Keyword | Regex, *texts: str) -> list[float | None]:
    return reward.score(["p"] * len(texts), texts)


def test_length() -> None:
    assert score(Length(target=4), "a b c d", "a b", "", "a b c d e f g h") == [0, -0.5, -1, -1]
    assert score(Length(target=4, unit="characters"), "abcd", "ab") == [0, -0.5]
    assert score(Length(target=4, tolerance=1), "a b c", "a b c d e", "a b") == [0, 0, -0.25]
    for broken in ({"target": 0}, {"target": 3, "tolerance": -1}):
        with pytest.raises(UsageError, match="target >= 1"):
            Length(**broken)


def test_keyword_counts_whole_words_only() -> None:
    text = "The cat sat; a Cat, not a concatenation."
    assert score(Keyword(words=("cat",)), text, "concatenate") == [1, 0]
    assert score(Keyword(words=("cat", "dog")), text) == [1]
    assert score(Keyword(words=("cat", "dog"), mode="all"), text, "cat dog") == [0, 1]
    assert score(Keyword(words=("cat",), mode="count"), text) == [2]
    assert score(Keyword(words=("cat",), mode="count", ignore_case=False), text) == [1]
    assert score(Keyword(words=("c++",)), "I write C++.", "c+") == [1, 0]
    assert score(Keyword(words=("thank you",)), "Oh, thank you!") == [1]
    for broken in ((), ("a", " ")):
        with pytest.raises(UsageError, match="none of them empty"):
            Keyword(words=broken)


def test_regex() -> None:
    assert score(Regex(pattern=r"\d+"), "a 12 b", "a") == [1, 0]
    assert score(Regex(pattern=r"\d+", mode="count"), "1 22 333", "") == [3, 0]
    assert score(Regex(pattern="a.b", mode="all"), "a\nb", "a\nbc") == [1, 0]
    assert score(Regex(pattern="yes", ignore_case=True), "YES") == [1]
    with pytest.raises(UsageError, match="is not a regular expression"):
        Regex(pattern="(")
