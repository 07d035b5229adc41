"""Length control recovers a planted win rate that the raw rate misses, and says what it cannot know."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trimtab.errors import UsageError
from trimtab.measure.length_control import fit, length_controlled
from trimtab.measure.stats import mean_interval


def planted(theta: float, gamma: float, n: int, seed: int, per_prompt: int = 1) -> tuple[Any, ...]:
    """A's answers are longer by 20 on average, and the judge likes length."""
    rng = np.random.default_rng(seed)
    b = rng.integers(20, 80, n)
    a = b + rng.normal(20, 30, n)
    d = a - b
    p = 1 / (1 + np.exp(-(theta + gamma * np.tanh(d / d.std()))))
    return (rng.random(n) < p).astype(float), a, b, np.arange(n) // per_prompt


def test_the_fit_is_that_of_an_ordinary_logistic_regression() -> None:
    """scikit-learn, with the same ridge: C = 1 / 0.001 on an intercept given as a column."""
    from sklearn.linear_model import LogisticRegression

    win, a, b, _ = planted(-0.3, 1.2, 400, 3)
    x = np.tanh((a - b) / (a - b).std())
    other = LogisticRegression(C=1e3, fit_intercept=False, tol=1e-10, max_iter=1000)
    other.fit(np.stack([np.ones_like(x), x], 1), win)
    assert fit(win, x, np.ones((1, len(win))))[0] == pytest.approx(other.coef_[0], abs=1e-5)  # its tolerance, not ours


def test_a_planted_rate_is_recovered_where_the_raw_rate_is_not() -> None:
    """reward = quality + c * length: theta = -0.4 (A loses at equal length, 0.401) and gamma = 2 with longer answers.

    Over 40 draws of 600 rows the interval must hold the truth in at least 34 (binomial 0.95: P(< 34) = 0.003), the raw
    95 % interval in at most 6.
    """
    truth, held, raw_held = 1 / (1 + np.exp(0.4)), 0, 0
    for seed in range(40):
        win, a, b, prompts = planted(-0.4, 2.0, 600, seed)
        found = length_controlled(win, a, b, prompts, resamples=400)
        raw = mean_interval(win, prompts, resamples=400)
        assert found.low is not None and found.high is not None and raw.low is not None and raw.high is not None
        held += found.low <= truth <= found.high
        raw_held += raw.low <= truth <= raw.high
    assert held >= 34
    assert raw_held <= 6


def test_without_a_pull_of_length_the_rate_is_the_raw_one() -> None:
    rng = np.random.default_rng(0)
    win = (rng.random(500) < 0.6).astype(float)
    same = np.full(500, 30.0)
    found, raw = length_controlled(win, same, same), mean_interval(win)
    assert found.mean == pytest.approx(raw.mean, abs=1e-5)  # the ridge: 0.001 * logit / 500
    assert found.low == pytest.approx(raw.low, abs=0.005) and found.high == pytest.approx(raw.high, abs=0.005)


def test_a_verdict_on_equal_sides_fires_at_most_at_its_nominal_rate() -> None:
    """theta = 0 with a strong pull of length: the interval excludes 0.5 in about 5 % of 200 runs (P(> 20) = 0.0007)."""
    fired = 0
    for seed in range(200):
        win, a, b, prompts = planted(0.0, 1.5, 60, seed, per_prompt=2)
        found = length_controlled(win, a, b, prompts, resamples=200)
        assert found.low is not None and found.high is not None
        fired += not found.low <= 0.5 <= found.high
    assert fired <= 20


def test_rows_of_one_prompt_are_resampled_together() -> None:
    """Four copies of every row say no more than one: the interval keeps its width (and would halve without clusters)."""
    win, a, b, _ = planted(0.2, 1.0, 100, 1)
    once = length_controlled(win, a, b)
    four = length_controlled(np.tile(win, 4), np.tile(a, 4), np.tile(b, 4), list(np.tile(np.arange(100), 4)))
    assert once.low is not None and once.high is not None and four.low is not None and four.high is not None
    assert four.mean == pytest.approx(once.mean, abs=1e-3)
    assert four.high - four.low == pytest.approx(once.high - once.low, rel=0.02)
    assert (four.rows, four.prompts) == (400, 100)


def test_rows_that_were_not_judged_are_dropped_and_nothing_is_made_up() -> None:
    win, a, b, _ = planted(0.2, 1.0, 100, 1)
    gaps = np.concatenate([win, [np.nan, 1.0]]), np.concatenate([a, [10, np.nan]]), np.concatenate([b, [20, 5]])
    assert length_controlled(*gaps) == length_controlled(win, a, b)
    assert length_controlled([], [], []).mean is None
    always = length_controlled([1.0] * 9, range(9), [3] * 9)
    assert (always.mean, always.low, always.high, always.prompts) == (1.0, None, None, 9)
    alone = length_controlled([1.0, 0.0, 1.0], [3, 2, 5], [4, 4, 4], [7, 7, 7])
    assert alone.mean is not None and alone.low is None and alone.prompts == 1


def test_where_length_decides_every_row_the_interval_is_wide_and_finite() -> None:
    d = np.concatenate([np.arange(1, 16), -np.arange(1, 16)])
    found = length_controlled((d > 0).astype(float), 50 + d, np.full(30, 50))
    assert found.low is not None and found.high is not None
    assert found.mean == pytest.approx(0.5, abs=1e-6)  # by symmetry
    assert found.low < 0.35 and found.high > 0.65


def test_bad_input_is_refused() -> None:
    with pytest.raises(UsageError, match="two lengths"):
        length_controlled([1.0, 0.0], [1], [1, 2])
    with pytest.raises(UsageError, match="in \\[0, 1\\]"):
        length_controlled([2.0, 0.0], [1, 2], [1, 2])
    with pytest.raises(UsageError, match="infinite"):
        length_controlled([1.0, 0.0], [1, float("inf")], [1, 2])
