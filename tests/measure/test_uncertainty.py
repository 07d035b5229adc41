"""Variance components, few seeds, nothing seen, noisy labels: against simulation and closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.errors import UsageError
from trimtab.measure.rates import rate_bounds
from trimtab.measure.stats import Interval, mean_interval
from trimtab.measure.uncertainty import (
    Components,
    corrected_rate,
    flip_rate,
    hierarchical_interval,
    kappa,
    two_way_interval,
    variance_components,
)

SEEDS, PROMPTS, SAMPLES = 10, 50, 5


def world(rng: np.random.Generator, seed: float = 1.0, prompt: float = 1.0, sample: float = 2.0) -> np.ndarray:
    """[S, P, K] with mean 0 and these standard deviations."""
    noise = sample * rng.standard_normal((SEEDS, PROMPTS, SAMPLES))
    return seed * rng.standard_normal((SEEDS, 1, 1)) + prompt * rng.standard_normal((1, PROMPTS, 1)) + noise


def test_components_are_recovered() -> None:
    """Unbiased: over 400 worlds the mean is within 4 standard errors (and within 15 % for each, the spec's bar)."""
    rng = np.random.default_rng(0)
    found = [variance_components(world(rng, 1.0, 1.5, 2.0)) for _ in range(400)]
    for name, true in (("seed", 1.0), ("prompt", 2.25), ("sample", 4.0)):
        values = np.array([getattr(one, name) for one in found])
        assert abs(values.mean() - true) < 4 * values.std() / 20
        assert abs(values.mean() / true - 1) < 0.15


def test_components_of_a_world_without_noise_are_exact() -> None:
    x = np.array([[[0.0], [1.0]], [[2.0], [3.0]]])  # seed means differ by 2, prompt means by 1, nothing is left over
    found = variance_components(x)
    assert (found.seed, found.prompt, found.sample) == pytest.approx((2.0, 0.5, 0.0), abs=1e-12)


def test_what_to_buy() -> None:
    assert Components(4.0, 0.1, 0.1, 3, 100, 2).buy == "seeds"
    assert Components(0.0, 4.0, 1.0, 3, 20, 2).buy == "prompts"
    assert Components(0.0, 0.0, 4.0, 3, 20, 2).buy == "seeds"  # samples are as good: ties go to the first
    assert Components(1.0, 2.0, 4.0, 2, 4, 1).error_variance == 1 / 2 + 2 / 4 + 4 / 8


def test_two_way_intervals_cover_where_others_do_not() -> None:
    """Nominal 95 %, 10 seeds. 300 worlds measured: two-way 0.95, percentile bootstrap 0.92, flat 0.18."""
    rng = np.random.default_rng(1)
    hits = {"two-way": 0, "bootstrap": 0, "flat": 0}
    runs = 150
    for number in range(runs):
        x = world(rng)
        flat = mean_interval(x.ravel(), resamples=200, seed=number)
        few = hierarchical_interval(x, resamples=200, seed=number)
        for name, one in (("two-way", two_way_interval(x)), ("bootstrap", few), ("flat", flat)):
            assert one.low is not None and one.high is not None
            hits[name] += one.low <= 0 <= one.high
    # 0.95 - 4 standard errors of 150 runs is 0.88
    assert hits["two-way"] / runs > 0.88 and hits["two-way"] > hits["bootstrap"] > hits["flat"]
    assert hits["flat"] / runs < 0.35


def test_nothing_seen_is_not_nothing() -> None:
    assert rate_bounds(0, 300).high == pytest.approx(1 - 0.05 ** (1 / 300), abs=1e-15)
    assert rate_bounds(0, 300).high == pytest.approx(0.0099, abs=5e-5)
    assert rate_bounds(300, 300).low == pytest.approx(0.05 ** (1 / 300), abs=1e-15)
    some = rate_bounds(3, 20)  # Clopper and Pearson's table
    assert (some.low, some.high) == pytest.approx((0.0321, 0.3789), abs=5e-5)


def test_noise_is_taken_off() -> None:
    assert corrected_rate(Interval(0.62, None, None), 0.2).mean == pytest.approx(0.7, abs=1e-12)
    one = corrected_rate(Interval(0.62, 0.56, 0.68), 0.2)
    assert (one.low, one.high) == pytest.approx((0.6, 0.8), abs=1e-12)  # 1 / (1 - 2 e) times as wide
    wider = corrected_rate(Interval(0.62, 0.56, 0.68), 0.2, error_deviation=0.05)
    assert wider.low < one.low and wider.high > one.high
    with pytest.raises(UsageError, match="below 1/2"):
        corrected_rate(Interval(0.6, None, None), 0.5)


def test_corrected_intervals_cover() -> None:
    """True rate 0.7, labels wrong with probability 0.2, 400 labels: 95 % nominal, 4 standard errors of 300 runs below."""
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        labels = (rng.random(400) < 0.7) ^ (rng.random(400) < 0.2)
        share = labels.mean()
        half = 1.96 * np.sqrt(share * (1 - share) / 400)
        found = corrected_rate(Interval(float(share), float(share - half), float(share + half)), 0.2)
        hits += found.low <= 0.7 <= found.high
    assert hits / 300 > 0.95 - 4 * np.sqrt(0.95 * 0.05 / 300)


def test_error_from_two_labels() -> None:
    rng = np.random.default_rng(3)
    truth = rng.random(20_000) < 0.6
    first, second = (truth ^ (rng.random(20_000) < 0.15) for _ in range(2))
    error, deviation = flip_rate(first.tolist(), second.tolist())
    assert abs(error - 0.15) < 4 * deviation and deviation < 0.005
    with pytest.raises(UsageError, match="say nothing"):
        flip_rate([0, 1], [1, 0])


def test_kappa() -> None:
    # Cohen's own form: agreement 0.7, chance 0.5
    first = [1] * 25 + [0] * 25
    second = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert kappa(first, second) == pytest.approx(0.4, abs=1e-12)
    assert kappa([1, 1], [1, 1]) is None and kappa(["a", "b"], ["a", "b"]) == 1.0


@pytest.mark.parametrize("scores", [np.zeros((1, 5, 2)), np.zeros((5, 2)), np.full((3, 3, 1), np.nan)])
def test_gaps_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(UsageError):
        variance_components(scores)


def test_no_variance_has_no_interval() -> None:
    assert two_way_interval(np.ones((3, 4, 2))).low is None
