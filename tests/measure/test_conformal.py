"""The promises of conformal methods, by simulation; Benjamini-Hochberg by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trimtab.errors import UsageError
from trimtab.measure.conformal import benjamini_hochberg, select, shifted, split_radius


def test_split_intervals_cover() -> None:
    """Level 0.9, 100 calibration points, 2,000 runs: the exact mean coverage is 91 / 101 = 0.90099."""
    rng = np.random.default_rng(0)
    residuals = np.abs(rng.standard_normal((2000, 101)))
    hits = [row[100] <= split_radius(row[:100], 0.1) for row in residuals]
    assert np.mean(hits) == pytest.approx(91 / 101, abs=0.015)


def test_the_radius_is_an_order_statistic() -> None:
    assert split_radius([3.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0], 0.2) == 8.0  # ceil(10 * 0.8) = 8th
    assert split_radius([1.0, 2.0], 0.1) == math.inf


def test_false_discoveries_are_below_alpha_and_something_is_found() -> None:
    """A ~ N(0, 1) acceptable where above 0, G = A + 0.7 N(0, 1), n 300, m 100, alpha 0.1, 400 runs (0.092, power 0.57)."""
    rng = np.random.default_rng(1)
    false, power = [], []
    for _ in range(400):
        truth = rng.standard_normal(400)
        score = truth + 0.7 * rng.standard_normal(400)
        good = truth > 0
        chosen, _ = select(score[300:], score[:300], good[:300].tolist(), 0.1)
        false.append((chosen & ~good[300:]).sum() / max(1, chosen.sum()))
        power.append((chosen & good[300:]).sum() / good[300:].sum())
    assert np.mean(false) <= 0.1 + 2 * np.std(false) / 20 and np.mean(power) > 0.5


def test_benjamini_hochberg_by_hand() -> None:
    # thresholds 0.02, 0.04, 0.06, 0.08, 0.1: the third is the last below its own
    assert benjamini_hochberg([0.5, 0.01, 0.059, 0.041, 0.2], 0.1).tolist() == [False, True, True, True, False]
    assert not benjamini_hochberg([0.9, 0.8], 0.1).any() and not len(benjamini_hochberg([], 0.1))


def test_a_shift_is_seen() -> None:
    rng = np.random.default_rng(2)
    assert shifted(rng.standard_normal(200) + 1, rng.standard_normal(200)) < 1e-6


def test_bad_input() -> None:
    with pytest.raises(UsageError, match="alpha"):
        split_radius([1.0], 1.5)
    with pytest.raises(UsageError, match="one truth"):
        select([1.0], [1.0, 2.0], [True])
    with pytest.raises(UsageError, match="finite"):
        select([math.nan], [1.0], [True])
