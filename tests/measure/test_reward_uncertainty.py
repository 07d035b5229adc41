"""The Laplace head against a grid posterior, its rate in n, and what it says of pairs it has not seen."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.errors import UsageError
from trimtab.measure.reward_uncertainty import LaplaceHead

TRUE = np.array([1.0, -0.5])


def pairs(count: int, seed: int) -> np.ndarray:
    """Differences chosen - rejected [count, 2] of pairs labelled by Bradley-Terry."""
    rng = np.random.default_rng(seed)
    d = rng.standard_normal((count, 2))
    won = rng.random(count) < 1 / (1 + np.exp(-d @ TRUE))
    return np.where(won[:, None], d, -d)


def test_deviations_equal_the_posterior_on_a_grid() -> None:
    """200 pairs in two dimensions: predictive standard deviations within 10 %, the error of the Gaussian itself."""
    d = pairs(200, 0)
    head = LaplaceHead.fit(d)
    axis = [np.linspace(w - 1.5, w + 1.5, 301) for w in head.weights]
    grid = np.stack(np.meshgrid(*axis, indexing="ij"), -1).reshape(-1, 2)
    log = -np.logaddexp(0, -grid @ d.T).sum(1) - (grid**2).sum(1) / 2
    mass = np.exp(log - log.max())
    mass /= mass.sum()
    tests = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]])
    values = grid @ tests.T
    mean = mass @ values
    deviation = np.sqrt(mass @ (values - mean) ** 2)
    ours, sd = head.margin(tests)
    assert np.abs(sd / deviation - 1).max() < 0.1 and np.abs(ours - mean).max() < 0.1 * deviation.max() * 3
    # MacKay's probability against the grid's own: 0.01 at worst here
    assert np.abs(head.wins(tests) - mass @ (1 / (1 + np.exp(-values)))).max() < 0.015


def test_variance_falls_as_one_over_n() -> None:
    some, many = (LaplaceHead.fit(pairs(n, 1)).margin(np.eye(2))[1] ** 2 for n in (500, 8000))
    assert np.log(some / many) / np.log(16) == pytest.approx([1.0, 1.0], abs=0.1)


def test_far_pairs_are_unlike_and_conservative_rewards_lower() -> None:
    head = LaplaceHead.fit(pairs(200, 2))
    assert head.unlike([[8.0, 8.0], [0.1, 0.1]]).tolist() == [True, False]
    features, centre = np.array([[1.0, 0.0], [4.0, 0.0]]), np.zeros(2)
    sure, unsure = head.conservative(features, centre, 0.0), head.conservative(features, centre, 1.0)
    assert (unsure < sure).all() and (sure - unsure)[1] == pytest.approx(4 * (sure - unsure)[0], rel=1e-9)


def test_bad_input() -> None:
    with pytest.raises(UsageError, match="finite"):
        LaplaceHead.fit([[np.nan, 1.0]])
    with pytest.raises(UsageError, match="ridge"):
        LaplaceHead.fit([[1.0]], ridge=0.0)
