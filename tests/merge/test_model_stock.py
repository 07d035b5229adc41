"""Model Stock: its ratio in the limits, by hand and by rows; it comes nearer to the fine-tunes' centre than their mean."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import mean, stdev

import pytest
import torch
from torch import Tensor

from merge.parents import SHAPES, changes, in_parts
from trimtab import merge
from trimtab.errors import UsageError
from trimtab.merge.methods.model_stock import ModelStock, ModelStockConfig


def ratio(deltas: list[Tensor]) -> float:
    """t by the formula, of vectors in general position."""
    flat = [delta.double().flatten() for delta in deltas]
    cos = mean(float(a @ b / a.norm() / b.norm()) for a, b in combinations(flat, 2))
    return len(flat) * cos / (1 + (len(flat) - 1) * cos)


def around(seed: int, parents: int = 3, shape: tuple[int, int] = (20, 30)) -> tuple[Tensor, list[Tensor]]:
    """(centre, fine-tunes' changes): the same change for all, and noise of the same size for each."""
    centre, *noise = changes(shape, parents + 1, seed, 1.0)
    return centre, [centre + one for one in noise]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("filter_wise", [False, True])
def test_equal_changes_stay_whole_and_right_angles_leave_the_base(shape: tuple[int, ...], filter_wise: bool) -> None:
    (delta,) = changes(shape, 1)
    torch.testing.assert_close(merge.model_stock([delta] * 3, filter_wise=filter_wise), delta, atol=1e-7, rtol=0)
    if delta.numel() > 1 and not filter_wise:
        lone = [torch.zeros(delta.numel()) for _ in range(2)]
        lone[0][0], lone[1][1] = 3.0, 5.0
        merged = merge.model_stock([one.view(delta.shape) for one in lone])
        assert torch.equal(merged, torch.zeros_like(delta))


@pytest.mark.parametrize("parents", [2, 3, 5])
def test_the_ratio_is_the_formula(parents: int) -> None:
    _, deltas = around(0, parents)
    expected = ratio(deltas) * sum(deltas) / parents
    torch.testing.assert_close(merge.model_stock(deltas), expected, atol=1e-6, rtol=0)
    # two changes at 60 degrees: c = 1/2, t = 2/3
    sixty = [torch.tensor([2.0, 0.0]), torch.tensor([0.5, math.sqrt(0.75)])]
    torch.testing.assert_close(merge.model_stock(sixty), sum(sixty) / 3, atol=1e-7, rtol=0)


def test_by_filter_each_row_is_a_tensor_of_its_own() -> None:
    for shape in ((6, 9), (4, 3, 5)):
        _, deltas = around(1, shape=shape)  # type: ignore[arg-type]
        rows = [merge.model_stock([delta[row] for delta in deltas]) for row in range(shape[0])]
        # float32 numbers up to 5, the ratio before the sum or after it: their last bit
        torch.testing.assert_close(merge.model_stock(deltas, filter_wise=True), torch.stack(rows), atol=5e-7, rtol=0)
        assert not torch.allclose(merge.model_stock(deltas), torch.stack(rows), atol=1e-2)


def test_changes_that_point_away_from_each_other_leave_the_base_unless_compat() -> None:
    deltas = [torch.tensor([1.0, 0.3]), torch.tensor([-1.0, 0.3])]
    cos = (-1 + 0.09) / 1.09
    assert torch.equal(merge.model_stock(deltas), torch.zeros(2))
    published = torch.tensor([0.0, 0.3]) * 2 * cos / (1 + cos)
    torch.testing.assert_close(merge.model_stock(deltas, compat="mergekit"), published, atol=1e-5, rtol=0)
    assert float(published[1]) < -3  # ten times a change, the other way


def test_small_changes_are_merged_as_large_ones_unless_compat() -> None:
    _, deltas = around(2)
    small = [1e-8 * delta for delta in deltas]
    torch.testing.assert_close(merge.model_stock(small), 1e-8 * merge.model_stock(deltas), atol=5e-15, rtol=0)
    published = merge.model_stock(small, compat="mergekit")
    assert float(published.norm()) < 1e-3 * float(merge.model_stock(small).norm())


def test_a_model_that_did_not_change_says_nothing_of_angles() -> None:
    zero = torch.zeros(3, 4)
    (delta,) = changes((3, 4), 1)
    for filter_wise in (False, True):
        assert torch.equal(merge.model_stock([zero, zero], filter_wise=filter_wise), zero)
        assert torch.equal(merge.model_stock([delta, zero], filter_wise=filter_wise), zero)


def test_it_comes_nearer_to_the_centre_than_the_mean() -> None:
    """The ratio is then the least-squares one, |c|^2 / (|c|^2 + |n|^2 / T): here 3/4, and the loss 3/4 of the mean's."""
    differences = []
    for seed in range(20):
        centre, deltas = around(seed)
        ours, base = merge.model_stock(deltas), merge.task_arithmetic(deltas, [1 / 3] * 3)
        loss = [float((one - centre).square().sum() / centre.square().sum()) for one in (ours, base)]
        differences.append(loss[1] - loss[0])
    low = mean(differences) - 2.093 * stdev(differences) / math.sqrt(20)  # 95 %, t with 19 degrees of freedom
    assert low > 0.05 and mean(differences) == pytest.approx(1 / 3 - 1 / 4, abs=0.01)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_parts_change_nothing(shape: tuple[int, ...], rows: int, filter_wise: bool) -> None:
    tensors, method = changes(shape), ModelStock(ModelStockConfig(filter_wise))
    torch.testing.assert_close(in_parts(method, tensors, rows), method.merged(tensors), atol=1e-7, rtol=0)


def test_what_it_refuses() -> None:
    with pytest.raises(UsageError, match="at least 2 models, not 1"):
        merge.model_stock(changes((3,), 1))
    for weights in ([1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(UsageError, match="takes no weights"):
            merge.model_stock(changes((3,), 2), weights)
