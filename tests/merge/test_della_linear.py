"""DELLA-linear: unbiased, its variance by the formula, and less noise than DARE at the same density."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from merge.parents import SHAPES, changes, gain, in_parts, part_sizes
from merge.test_della import kept, probabilities
from trimtab import merge
from trimtab.errors import UsageError
from trimtab.merge.methods.della_linear import DellaLinear, DellaLinearConfig


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), ((0.3, 0.5, 1.0), (0.2, 0.4, 0.1))])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (64, 33), (6, 1), ()])
def test_it_is_task_arithmetic_of_what_della_keeps(shape: tuple[int, ...], density: Any, epsilon: Any) -> None:
    deltas, weights = changes(shape), (0.5, 2.0, -0.25)
    expected = sum(w * one for w, one in zip(weights, kept(deltas, density, epsilon, seed=4), strict=True)) / 2.25
    found = merge.della_linear(deltas, weights, seed=4, density=density, epsilon=epsilon, normalize=True)
    assert (found - expected).abs().max() < 1e-6  # some roundings of values of about 1


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_does_not_depend_on_the_parts(shape: tuple[int, ...], compat: Any) -> None:
    method, deltas = DellaLinear(DellaLinearConfig(density=0.5, epsilon=0.3, compat=compat)), changes(shape)
    for rows in part_sizes(shape):
        whole = method.merged(deltas, (0.2, 0.5, 1.0), seed=3)
        assert torch.equal(in_parts(method, deltas, rows, (0.2, 0.5, 1.0), seed=3), whole)


def test_the_mean_over_seeds_is_the_change_and_the_variance_that_of_its_probabilities() -> None:
    (delta,) = changes((5, 8), 1)
    seeds = 2000
    drawn = torch.stack([merge.della_linear([delta], density=0.4, epsilon=0.3, seed=seed) for seed in range(seeds)])
    p = probabilities(delta, 0.4, 0.3).double()
    variance = delta.double() ** 2 * (1 / p - 1)
    assert ((drawn.double().mean(0) - delta).abs() < 4 * (variance / seeds).sqrt()).all()
    share = (drawn != 0).double().mean(0)
    assert ((share - p).abs() < 4 * (p * (1 - p) / seeds).sqrt()).all()


def test_compat_keeps_the_norm_and_is_biased() -> None:
    (delta,) = changes((128, 64), 1)
    found = merge.della_linear([delta], density=0.3, epsilon=0.2, compat="mergekit")
    assert float(found.abs().sum() / delta.abs().sum()) == pytest.approx(1, abs=1e-5)
    large = delta.abs() > 2 * delta.std()
    mean = torch.stack(
        [merge.della_linear([delta], density=0.3, epsilon=0.2, compat="mergekit", seed=seed) for seed in range(50)]
    ).mean(0)
    assert float((mean / delta)[large].mean()) > 1.2  # kept with p near 0.5, rescaled as if less


def test_limits() -> None:
    base, model = changes((64, 33), 2, size=1.0)
    assert torch.equal(merge.della_linear([model - base]), model - base)  # one, density 1: the model itself
    assert not merge.della_linear(changes((5, 3)), density=0.5, scale=0.0).any()
    deltas = changes((5, 3))
    ours, theirs = merge.della_linear(deltas, density=0.5, epsilon=0.0), merge.dare(deltas, density=0.5)
    assert torch.equal(ours, theirs)  # epsilon 0: DARE


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(UsageError, match="della-linear: density - epsilon and density"):
        merge.della_linear(changes((3,)), density=0.95)
    with pytest.raises(UsageError, match="della-linear: the weights sum to 0"):
        merge.della_linear(changes((3,), 2), (1, -1), normalize=True)


def test_it_keeps_more_of_three_skills_than_dare_at_the_same_density() -> None:
    assert (
        gain(
            lambda deltas, seed: merge.della_linear(deltas, seed=seed, density=0.5, epsilon=0.4),
            lambda deltas, seed: merge.dare(deltas, seed=seed, density=0.5),
        )
        > 0
    )
