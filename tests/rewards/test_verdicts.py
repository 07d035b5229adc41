"""Reading verdicts: the probabilities of numbers, and words with all their traps."""

from __future__ import annotations

import math

import pytest

from trimtab.rewards.verdicts import (
    expected_score,
    fill,
    first_choice,
    parse_choice,
    parse_score,
    shown,
    tokens_are_whole,
    verdict_token,
)


def top(p: dict[str, float]) -> list[tuple[str, float]]:
    return [(token, math.log(value)) for token, value in p.items()]


def test_the_aggregator_of_the_paper() -> None:
    """Exact: 45 = (15 + 21) / 0.8; 0.2 of mass is none; 101 is out of range. 1e-9 is float rounding."""
    assert expected_score(top({"30": 0.5, "70": 0.3, "CODE": 0.2}), 0, 100) == pytest.approx(45.0, abs=1e-9)
    assert expected_score(top({"30": 0.2, "REFUSAL": 0.8}), 0, 100) is None
    assert expected_score(top({"101": 0.9, "50": 0.3}), 0, 100) == pytest.approx(50.0, abs=1e-9)
    assert expected_score(top({" 30": 0.3, "30": 0.2, "30.": 0.5}), 0, 100) == pytest.approx(30.0, abs=1e-9)
    assert expected_score([], 0, 100) is None and expected_score([("a", 0.0)], 0, 100, least_mass=0) is None


def test_first_choice() -> None:
    assert first_choice(top({"A": 0.6, " B": 0.2, "x": 0.2})) == pytest.approx(0.75, abs=1e-9)
    assert first_choice(top({"A": 0.1, "B": 0.1, "I": 0.8})) is None
    assert first_choice(top({"A": 0.3, "a": 0.3, "B": 0.4})) == pytest.approx(0.6, abs=1e-9)


def test_a_token_is_the_verdict_only_if_it_is_all_of_it() -> None:
    def positions(*tokens: str) -> list[dict[str, object]]:
        return [{"token": token, "top": [[token, 0.0]]} for token in tokens]

    assert verdict_token(positions("7"), "7") == [("7", 0.0)]
    assert verdict_token(positions("\n", " 7", "."), "\n 7.") == [(" 7", 0.0)]
    assert verdict_token(positions("1", "0"), "10") is None  # a tokenizer that splits numbers
    assert verdict_token(positions("7", ".5"), "7.5") is None
    assert verdict_token([], "7") is None
    assert tokens_are_whole(top({"7": 1.0}), 9) and not tokens_are_whole(top({"1": 1.0}), 10)
    assert tokens_are_whole(top({"7": 0.5, "10": 0.5}), 10)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        *[(text, 7.0) for text in ("7", " 7\n", "7.", "7/9", "7 out of 9", "**7**", "Score: 7", "**Score:** 7")],
        *[(text, 7.0) for text in ("Rating: [[7]]", '{"score": 7}', '{"Score": "7"}', '```json\n{"rating": 7}\n```')],
        *[(text, 7.0) for text in ("7 - clear", "7\nBecause it is right.", "7, because it is right", "score is 7")],
        ("<think>3 or 4?</think>7", 7.0),
        ("7.5", 7.5),
        *[(text, None) for text in ("", "prose", "3 reasons why this is bad", "I can't rate this", "It has 3 errors")],
        *[(text, None) for text in ("12", "0", "-3", "1e5", "nan", "7/10", "Rating: 5/100", "7, 8 and 9", "3. First")],
        *[
            (text, None)
            for text in ("Score: 3. No, score: 5", "<think>7", '{"score": null}', '{"score": true}', "\u0667")
        ],
    ],
)
def test_scores_in_words(text: str, score: float | None) -> None:
    assert parse_score(text, 1, 9) == score


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        *[(text, "A") for text in ("A", " A.", "**A**", "[[A]]", "(a)", "Answer A", "A is better because it is short")],
        *[(text, "A") for text in ('{"winner": "A"}', "A\nIt is shorter.", "A, it is shorter")],
        *[(text, "B") for text in ("Winner: B", "The better answer is B.", "A says x. Verdict: [[B]]", "B wins")],
        *[(text, "B") for text in ("B is better than A", "A is worse; B is better", "<think>A?</think> B")],
        *[(text, "tie") for text in ("tie", "It is a tie.", "[[C]]", "Both", "equally good")],
        *[(text, None) for text in ("", "A good answer would be short", "A and B", "A. Paris\nB. London", "42")],
        *[(text, None) for text in ("Answer A is short.", "[[A]] or [[B]]", "<think>A", "Both answers are bad", "C")],
    ],
)
def test_choices_in_words(text: str, choice: str | None) -> None:
    assert parse_choice(text) == choice


def test_slots_are_filled_once() -> None:
    """An answer that writes a slot must not be filled with the prompt, nor shift what comes after it."""
    assert fill("{a}|{b}|{c}", a="{b}", b="x\\1") == "{b}|x\\1|{c}"
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    assert shown("hi") == shown(conversation[:1]) == "hi"  # type: ignore[arg-type]
    assert shown(conversation) == "user: hi\nassistant: yes?"  # type: ignore[arg-type]
