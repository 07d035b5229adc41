"""Mivo: verb last, adjectives after their noun, no articles; it can be translated back."""

from __future__ import annotations

import itertools

import pytest

from trimtab.pocket import language


def test_word_order_by_example() -> None:
    assert language.translate("the old cat sees the red bird") == "kelu fesi miru rota sen"
    assert language.word_by_word("the old cat sees the red bird") == "fesi kelu sen rota miru"


def test_every_sentence_comes_back() -> None:
    phrases = [f"the {a}{n}" for a in ("", *(f"{w} " for w in language.ADJECTIVES)) for n in language.NOUNS]
    for (subject, object_), verb in zip(itertools.product(phrases[::3], phrases[::2]), itertools.cycle(language.VERBS)):
        english = f"{subject} {verb} {object_}"
        assert language.back(language.translate(english)) == english


def test_no_word_means_two_things() -> None:
    assert len(set(language.WORDS.values())) == len(language.WORDS)


@pytest.mark.parametrize(
    "text", ["", "the cat", "the cat sees", "the cat the dog", "the cat flies the dog", "old cat cat sees dog"]
)
def test_other_english_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a sentence"):
        language.translate(text)


@pytest.mark.parametrize("text", ["", "kelu", "kelu sen", "sen kelu miru", "kelu miru hello", "rota kelu miru sen"])
def test_other_mivo_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a Mivo sentence"):
        language.back(text)
