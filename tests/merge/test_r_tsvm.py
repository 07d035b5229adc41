"""R-TSVM: TSVM for tasks that are alike; strengths and ranks by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from merge.parents import SHAPES, changes, in_parts
from trimtab import merge
from trimtab.errors import UsageError
from trimtab.merge.methods.r_tsvm import RTsvm, RTsvmConfig, outlier_mass, ranks, sparsity
from trimtab.merge.methods.tsvm import leading, orthogonal_sum


def shuffled(parents: int, shape: tuple[int, int] = (24, 30)) -> list[Tensor]:
    """Changes that are permutations of each other's rows and columns, signs flipped: equal outliers, equal sparsity."""
    generator = torch.Generator().manual_seed(3)
    delta = torch.randn(shape, dtype=torch.float64, generator=generator) ** 3  # heavy tails: there are outliers
    delta[torch.rand(shape, generator=generator) < 0.4] = 0
    return [
        delta[torch.randperm(shape[0], generator=generator)][:, torch.randperm(shape[1], generator=generator)]
        for _ in range(parents)
    ]


@pytest.mark.parametrize("parents", [2, 3])
def test_of_tasks_with_equal_outliers_and_equal_sparsity_it_is_tsvm(parents: int) -> None:
    deltas = shuffled(parents)
    assert outlier_mass(deltas[0].abs(), 3.0) > 0 and sparsity(deltas[0].abs(), 1e-3) > 0.3
    torch.testing.assert_close(merge.r_tsvm(deltas), merge.tsvm(deltas), atol=1e-10, rtol=0)
    weights = [0.5, 2.0, 1.0][:parents]
    torch.testing.assert_close(merge.r_tsvm(deltas, weights), merge.tsvm(deltas, weights), atol=1e-10, rtol=0)


def test_a_task_is_as_strong_as_its_outliers() -> None:
    """Twice a change has twice the outliers: omega = 2/3 and 4/3, of w and 2 w; ranks stay equal."""
    one, two = shuffled(2)
    factors, kept = RTsvm().shares([one, 2 * two])
    assert factors == pytest.approx([2 / 3, 4 / 3], rel=1e-12) and kept == [12, 12]
    expected = merge.tsvm([one, two], [3.0 * 2 / 3, 0.5 * 4 / 3 * 2])  # a model's own weight does not enter omega
    torch.testing.assert_close(merge.r_tsvm([one, 2 * two], [3.0, 0.5]), expected, atol=1e-10, rtol=0)


def test_the_deviation_is_the_populations() -> None:
    """Of 0, 0, 0, 10 it is 4.33 about 2.5 (a sample's: 5), so that 10 lies 1.73 of them above."""
    sizes = torch.tensor([0.0, 0.0, 0.0, 10.0], dtype=torch.float64)
    assert outlier_mass(sizes, 1.7) == 10.0 and outlier_mass(sizes, 1.8) == 0.0


def test_strengths_and_ranks_are_the_formulas() -> None:
    one, two = shuffled(2)
    thin = two.clone()
    thin[:, 5:] = 0
    deltas = [one, thin]
    masses, dense = [], []
    for delta in deltas:
        sizes = np.abs(delta.numpy())
        masses.append(sizes[sizes > sizes.mean() + 3 * sizes.std()].sum())
        dense.append(1 - (sizes < 1e-3 * sizes.max()).mean())
    factors, kept = RTsvm().shares(deltas)
    assert factors == pytest.approx([2 * mass / sum(masses) for mass in masses], rel=1e-12)
    assert kept == [round(12 * one / (sum(dense) / 2)) for one in dense] and kept[0] > 3 * kept[1]
    tasks = [leading(delta * factor, rank) for delta, factor, rank in zip(deltas, factors, kept, strict=True)]
    torch.testing.assert_close(merge.r_tsvm(deltas), orthogonal_sum(tasks), atol=1e-12, rtol=0)
    assert not torch.allclose(merge.r_tsvm(deltas), merge.tsvm(deltas), atol=1e-2)


@pytest.mark.parametrize(
    ("dense", "full", "expected"),
    [
        ([1.0, 1.0, 1.0], 10, [3, 3, 3]),  # as TSVM
        ([0.6, 0.2], 8, [6, 2]),
        ([1.0, 0.0], 8, [8, 0]),  # an empty change
        ([1.0, 0.001], 8, [7, 1]),  # clamped to 8 and 1, then the largest is lowered
        ([0.5, 0.5, 0.01], 3, [1, 1, 1]),
        ([0.0, 0.0], 9, [0, 0]),
        ([0.3, 0.3, 0.9, 0.9], 11, [1, 1, 3, 3]),  # floor(11 / 4) = 2, times 1/2 and 3/2
    ],
)
def test_ranks(dense: list[float], full: int, expected: list[int]) -> None:
    assert ranks(dense, full) == expected


def test_a_change_that_is_zero_takes_nothing_away_and_one_without_outliers_counts_as_the_others() -> None:
    (one,) = shuffled(1)
    zero = torch.zeros_like(one)
    assert torch.equal(merge.r_tsvm([zero, zero]), zero)
    # omega is 2 for the only one with outliers, and all ranks are its own
    torch.testing.assert_close(merge.r_tsvm([one, zero]), 2 * one, atol=1e-12, rtol=0)
    flat = torch.ones(6, 6, dtype=torch.float64)
    assert RTsvm().shares([flat, flat])[0] == [1.0, 1.0]


@pytest.mark.parametrize("shape", [(7,), (), (4, 3, 5), (2, 9)])
def test_elsewhere_it_is_the_plain_mean(shape: tuple[int, ...]) -> None:
    deltas = [factor * delta for factor, delta in zip((1.0, 2.0, 3.0), changes(shape), strict=True)]
    torch.testing.assert_close(merge.r_tsvm(deltas), sum(deltas) / 3, atol=1e-7, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_parts_change_nothing(shape: tuple[int, ...], rows: int) -> None:
    tensors, method = changes(shape), RTsvm(RTsvmConfig())
    assert torch.equal(in_parts(method, tensors, rows), method.merged(tensors))


@pytest.mark.parametrize("key", ["outlier", "sparse"])
def test_what_it_refuses(key: str) -> None:
    with pytest.raises(UsageError, match=f"{key} must be 0 or more"):
        merge.r_tsvm(changes((3, 2), 2), **{key: -1.0})
