"""Consensus rules by hand: weights, votes, minimum Bayes risk, what counts as an answer."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from trimtab.decode.selection import answer_key, check_extract, mbr, rouge1_f1, vote, weights
from trimtab.errors import UsageError

# weights


def test_weights_are_a_softmax_without_what_was_not_judged() -> None:
    found = weights([1.0, None, 2.0], 0.5)
    assert found == pytest.approx([1 / (1 + math.e**2), 0, math.e**2 / (1 + math.e**2)], abs=1e-15)
    assert weights([-5.0, -5.0], 0.1).tolist() == [0.5, 0.5]
    assert weights([1e300, 0.0, -1e300], 1e-3).tolist() == [1, 0, 0]  # no overflow
    assert weights([3.0, 1.0], math.inf).tolist() == [0.5, 0.5]


def test_weights_without_beta_or_without_a_judged_draw_are_uniform() -> None:
    assert weights([1.0, None, 5.0], None).tolist() == [1 / 3] * 3
    assert weights([None, None], 0.1).tolist() == [0.5, 0.5]
    assert weights([], None).tolist() == []


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_a_beta_that_is_no_temperature_is_refused(beta: float) -> None:
    with pytest.raises(UsageError, match="beta must be above 0"):
        weights([1.0], beta)


# vote


@pytest.mark.parametrize(
    ("keys", "shares", "winner"),
    [
        (["a", "b", "b"], [1, 1, 1], 1),
        (["a", "b", "b", "a"], [1, 1, 1, 1], 0),  # a tie: the key that was drawn first
        (["b", "a", "a", "b"], [1, 1, 1, 1], 0),
        (["a", "b", "b"], [5, 1, 1], 0),
        (["a", "b", "c", "b"], [0.4, 0.1, 0.2, 0.2], 0),
        (["a", "b", "b"], [0, 0, 0.1], 1),  # the earliest draw of the winning key, though it weighs nothing
        ([None, "a", None], [1, 0.1, 1], 1),  # no answer never wins
        ([None, None], [1, 2], 0),
        ([None, "a"], [1, 0], 1),
        (["a"], [1], 0),
    ],
)
def test_votes_by_hand(keys: list[str | None], shares: list[float], winner: int) -> None:
    assert vote(keys, shares) == winner


def test_a_tie_is_a_tie_whatever_the_order_of_the_sum() -> None:
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1 in floats added in turn."""
    assert sum([0.1, 0.2, 0.3]) != sum([0.3, 0.2, 0.1])
    keys = ["a", "b", "a", "b", "a", "b"]
    assert vote(keys, [0.3, 0.1, 0.2, 0.2, 0.1, 0.3]) == 0
    assert vote(keys, [0.1, 0.3, 0.2, 0.2, 0.3, 0.1]) == 0


def test_a_repeated_draw_votes_as_often() -> None:
    assert vote(["a", "a", "b"], [1, 1, 1.5]) == 0
    assert vote(["a", "b"], [2, 1.5]) == 0


# minimum Bayes risk


@pytest.mark.parametrize(
    ("a", "b", "f1"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 3], [4, 5], 0.0),
        ([1, 2, 2], [2, 2, 2], 2 / 3),  # two of three repeats are shared: P = R = 2/3
        ([1, 1, 1, 1], [1], 2 / 5),  # P = 1/4, R = 1
        ([3, 2, 1], [1, 2, 3], 1.0),  # order does not count
        ([1, 2], [1, 3, 3, 3], 1 / 3),
        ([], [], 1.0),
        ([], [1], 0.0),
    ],
)
def test_rouge1_is_the_textbook_f1_with_repeats(a: list[int], b: list[int], f1: float) -> None:
    assert rouge1_f1(a, b) == rouge1_f1(b, a) == pytest.approx(f1, abs=1e-15)
    if a and b and f1:
        overlap = sum((Counter(a) & Counter(b)).values())
        precision, recall = overlap / len(b), overlap / len(a)
        assert 2 * precision * recall / (precision + recall) == pytest.approx(f1, abs=1e-15)


def test_three_lists_by_hand() -> None:
    """u: (0,1) 4/6, (0,2) 2/4, (1,2) 0. Means 2.167/3, 1.667/3, 1.5/3: the first; weight on the last turns it."""
    tokens = [[1, 2, 3], [1, 2, 2], [3]]
    assert mbr(tokens, [1, 1, 1]) == 0
    assert mbr(tokens, [0, 1, 0]) == 1
    assert mbr(tokens, [0.1, 0.1, 0.8]) == 2  # 0.8 + 0.05 against 0.4 + 0.1 + 0.067
    assert mbr(tokens[::-1], [1, 1, 1]) == 2


def test_ties_go_to_the_first_draw() -> None:
    assert mbr([[1], [2]], [1, 1]) == 0
    assert mbr([[2, 1], [1, 2], [1, 2]], [1, 1, 1]) == 0  # the same words in another order
    assert mbr([[5], [1, 2], [1, 2]], [1, 1, 1]) == 1
    assert mbr([[], [], [1]], [1, 1, 1]) == 0
    assert mbr([[7]], [1]) == 0


def test_repeats_are_weight() -> None:
    """A chain's states, repeats included, choose as its different states weighed by how often they were held."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        states = [rng.integers(0, 6, rng.integers(1, 6)).tolist() for _ in range(6)]
        held = rng.integers(1, 5, 6)
        repeated = [state for state, times in zip(states, held, strict=True) for _ in range(times)]
        assert repeated[mbr(repeated, np.ones(len(repeated)))] == states[mbr(states, held)]


def test_it_is_the_mean_over_all_pairs() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        tokens = [rng.integers(0, 8, rng.integers(0, 9)).tolist() for _ in range(7)]
        shares = rng.dirichlet(np.ones(7))
        means = [sum(w * rouge1_f1(a, b) for b, w in zip(tokens, shares, strict=True)) for a in tokens]
        assert means[mbr(tokens, shares)] == pytest.approx(max(means), abs=1e-12)


# what counts as an answer


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("It is 12.", "12"),
        ("3 + 4 = 7. 7 - 5 = 2. It is 2.", "2"),
        ("1,000.0 apples", "1000"),
        ("1,2,3", "3"),
        ("minus -3.50", "-3.5"),
        ("7-3", "3"),  # a difference, not a negative number
        ("(7)-3", "3"),
        ("= \u22124", "-4"),
        ("-0.0", "0"),
        ("it costs .5", "0.5"),
        ("v1.20", "1.2"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number(text: str, key: str | None) -> None:
    assert answer_key(text, "number") == key


@pytest.mark.parametrize(
    ("text", "key"),
    [("  Paris. ", "paris"), ("PARIS", "paris"), ("in\n Paris!", "in paris"), (" . ", None), ("", None)],
)
def test_the_text_itself(text: str, key: str | None) -> None:
    assert answer_key(text) == answer_key(text, "text") == key


def test_the_group_of_a_regular_expression() -> None:
    pattern = r"answer: ?(\w*)"
    assert answer_key("answer: A, no, answer: B", pattern) == "b"  # the last match
    assert answer_key("no idea", pattern) is None
    assert answer_key("answer: ", pattern) is None
    assert answer_key("x or y", r"(z)|y") is None  # a group that took no part


@pytest.mark.parametrize(
    ("extract", "said"), [("(", "not a regular"), ("numbers", "has 0 groups"), ("(a)(b)", "has 2 groups")]
)
def test_an_extract_that_cannot_work_is_refused(extract: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_extract(extract)
    with pytest.raises(UsageError, match=said):
        answer_key("text", extract)


# bad input


@pytest.mark.parametrize("shares", [[1.0], [1.0, -1.0], [1.0, math.nan], [[1.0, 1.0]]])
def test_weights_that_do_not_fit_are_refused(shares: list[float]) -> None:
    with pytest.raises(UsageError, match="2 draws need 2 finite weights"):
        vote(["a", "b"], shares)
    with pytest.raises(UsageError, match="2 draws need 2 finite weights"):
        mbr([[1], [2]], shares)


def test_no_draw_is_refused() -> None:
    with pytest.raises(UsageError, match="no draw to choose from"):
        vote([], [])
    with pytest.raises(UsageError, match="no draw to choose from"):
        mbr([], [])
