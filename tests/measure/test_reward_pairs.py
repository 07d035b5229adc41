"""Accuracy over subsets and sections by hand, its interval, and the part that length plays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trimtab.measure.length import length_correlation
from trimtab.measure.reward_pairs import Pairs, length_bias, length_correlations, mean_of_sections, section
from trimtab.measure.stats import mean_interval


def test_ties_are_half_right_and_what_was_not_judged_is_nothing() -> None:
    pairs = Pairs(np.array([1.0, 0.0, 2.0, np.nan]), np.array([0.0, 0.0, 3.0, 1.0]), [0, 1, 2, 3], ["a"] * 4)
    assert pairs.right.tolist()[:3] == [1, 0.5, 0] and math.isnan(pairs.right[3])
    assert pairs.judged == [0, 1, 2]
    found = mean_of_sections(pairs.right, pairs.subset, pairs.prompt)
    assert found.mean == 0.5 and found.rows == 3


def test_sections() -> None:
    named = {"math-prm": "Reasoning", "donotanswer": "Safety", "Mine/x": "Mine", "plain": "plain"}
    assert {name: section(name) for name in named} == named
    # section A: 2 of 3 pairs; section B: 0 of 1. The mean of sections is 1/3; of pairs it would be 1/2
    found = mean_of_sections(np.array([1.0, 1.0, 0.0, 0.0]), ["A", "A", "A", "B"], [0, 1, 2, 3])
    assert found.mean == pytest.approx(1 / 3, abs=1e-12)
    assert mean_of_sections(np.array([np.nan]), ["A"], [0]).mean is None
    values = np.array([1.0, 0, 1, 1, 0, 1])
    one = mean_of_sections(values, ["A"] * 6, [0, 0, 1, 2, 3, 4])
    assert one == mean_interval(values, [0, 0, 1, 2, 3, 4])  # one section: nothing but the mean


def test_the_interval_of_a_mean_of_sections_covers() -> None:
    """Sections of 100 and 25 pairs with accuracies 0.9 and 0.6: 95% of 300 runs cover 0.75, to three standard errors."""
    names = ["A"] * 100 + ["B"] * 25
    truth, hits = np.repeat([0.9, 0.6], [100, 25]), 0
    for seed in range(300):
        values = (np.random.default_rng(seed).random(125) < truth).astype(float)
        found = mean_of_sections(values, names, list(range(125)), resamples=500)
        hits += found.low is not None and found.high is not None and found.low <= 0.75 <= found.high
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / 300) <= hits / 300 <= 0.95 + 3 * math.sqrt(0.95 * 0.05 / 300)


def of_lengths(seed: int, pull: float, size: int = 300) -> Pairs:
    """The score is quality plus `pull` times the length; the chosen answer has the higher quality by 0.5 on average."""
    generator = np.random.default_rng(seed)
    chosen, rejected = generator.integers(5, 60, (2, size)).astype(float)
    quality = generator.normal(0.5, 1, size)
    return Pairs(quality + pull * chosen, pull * rejected, list(range(size)), ["a"] * size, chosen, rejected)


def test_a_planted_love_of_length_is_seen() -> None:
    """True accuracy at equal length: P(N(0.5, 1) > 0) = 0.69."""
    fair, biased = of_lengths(0, 0.0), of_lengths(0, 0.1)
    assert all(found.low is not None and found.low < 0.69 < (found.high or 0) for found in length_bias(fair).values())
    found = length_bias(biased)
    longer, shorter = found["accuracy, chosen longer"], found["accuracy, chosen shorter"]
    assert (longer.low or 0) > 0.8 and (shorter.high or 1) < 0.5
    for label, inside in (("length correlation", False), ("length correlation within prompts", True)):
        one, two = length_correlations(fair)[label], length_correlations(biased)[label]
        assert one.low is not None and one.high is not None and one.low < 0 < one.high
        assert two.low is not None and two.low > 0.3
        scores = np.concatenate([biased.chosen, biased.rejected])
        lengths = np.concatenate([biased.chosen_length, biased.rejected_length])
        whole = length_correlation(scores, lengths, [*biased.prompt, *biased.prompt])
        assert two.mean == (whole.within_prompt if inside else whole.overall)


def test_the_interval_of_the_length_correlation_covers_none() -> None:
    """No correlation: 60 runs, at least 95% - three standard errors cover 0."""
    hits = 0
    for seed in range(60):
        found = length_correlations(of_lengths(seed, 0.0, 40))["length correlation within prompts"]
        hits += found.low is not None and found.high is not None and found.low <= 0 <= found.high
    assert hits / 60 >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 60)


def test_lengths_that_do_not_vary_have_no_correlation() -> None:
    same = Pairs(np.array([1.0, 2, 3]), np.array([0.0, 3, 1]), [0, 1, 2], ["a"] * 3, np.full(3, 5.0), np.full(3, 5.0))
    assert all(found.mean is None and found.low is None for found in length_correlations(same).values())
    assert all(found.mean is None for found in length_bias(same).values())
