"""Diversity: the values of the published formula and of the published code."""

from __future__ import annotations

import pytest

from trimtab.measure.diversity import distinct, diversity, mean_diversity, words

REPEATED, TEN = "a b a b a b a b a b".split(), "one two three four five six seven eight nine ten".split()


def test_both_forms() -> None:
    assert diversity(REPEATED).value == pytest.approx(0.015873, abs=1e-6)
    assert diversity(REPEATED).value == pytest.approx(2 / 9 * 2 / 8 * 2 / 7, abs=1e-9)
    assert diversity(REPEATED, compat=True).value == pytest.approx(2 / 10 * 2 / 9 * 2 / 8, abs=1e-9)
    assert diversity(REPEATED, compat=True).value == pytest.approx(0.011111, abs=1e-6)
    assert diversity(TEN).value == 1.0
    assert diversity(TEN, compat=True).value == pytest.approx(0.7, abs=1e-9)


@pytest.mark.parametrize(
    ("tokens", "short"), [([], True), (["a"], True), (["a", "b", "c"], True), (["a", "b", "c", "d"], False)]
)
def test_too_short_is_flagged(tokens: list[str], short: bool) -> None:
    assert diversity(tokens) == diversity(list(range(len(tokens))))  # words and token ids alike
    assert diversity(tokens).value == 1.0 and diversity(tokens).too_short is short
    assert diversity(tokens, compat=True).value == (0.0 if short else pytest.approx(3 / 4 * 2 / 3 / 2))


def test_over_answers() -> None:
    assert mean_diversity([REPEATED, TEN]) == pytest.approx((diversity(REPEATED).value + 1) / 2)
    assert mean_diversity([]) is None
    assert distinct([[1, 2, 3, 4]]) == 1.0
    assert distinct([[1, 2, 3, 4]] * 2) == pytest.approx(1 / 8)  # each answer is diverse, all are the same
    assert distinct([[1, 2, 3, 4], [5, 6]]) == 1.0  # n-grams do not cross answers
    assert distinct([[1, 2, 3]]) is None and distinct([]) is None


def test_words() -> None:
    assert words("Don't stop, Mr. Smith’s dog: 3.14!") == [
        "Don't",
        "stop",
        ",",
        "Mr",
        ".",
        "Smith’s",
        "dog",
        ":",
        "3.14",
        "!",
    ]
    assert words("") == [] and words("été 北京") == ["été", "北京"]
