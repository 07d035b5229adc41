"""SCE against plain Python; its limits; small changes are weighed as large ones; selecting helps where it should."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch
from torch import Tensor

from merge.parents import SHAPES, changes, coarse, gain, in_parts, lower_bound
from trimtab import merge
from trimtab.errors import UsageError
from trimtab.merge.methods.sce import Sce, SceConfig, variance


def by_hand(deltas: list[Tensor], select_topk: float, weights: list[float] | None = None) -> Tensor:
    columns = [delta.double().flatten().tolist() for delta in deltas]
    if select_topk < 1:
        spread = [fmean((one - fmean(row)) ** 2 for one in row) for row in zip(*columns, strict=True)]
        kept = sorted(range(len(spread)), key=lambda i: (-spread[i], i))
        kept = {*kept[: int(select_topk * sum(one > 0 for one in spread))]}
        columns = [[one if i in kept else 0.0 for i, one in enumerate(column)] for column in columns]
    energy = [fmean(one * one for one in column) for column in columns]
    shares = [one / sum(energy) if sum(energy) else 1.0 for one in energy]
    shares = [share * weight for share, weight in zip(shares, weights or [1.0] * len(shares), strict=True)]
    total = sum(shares)
    merged = []
    for row in zip(*columns, strict=True):
        sign = 1 if sum(row) >= 0 else -1
        agree = [i for i, one in enumerate(row) if one * sign > 0]
        divisor = sum(shares[i] / total for i in agree)
        merged.append(sum(shares[i] / total * row[i] for i in agree) / max(divisor, 1e-6))
    return torch.tensor(merged).view(deltas[0].shape)


@pytest.mark.parametrize("select_topk", [1.0, 0.9, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_rule_entry_by_entry(shape: tuple[int, ...], select_topk: float) -> None:
    weights = [1.0, 2.0, 0.5]
    deltas = changes(shape)
    merged = merge.sce(deltas, weights, select_topk=select_topk)
    # float32: numbers below 0.5, and no two of these variances are nearer than their rounding
    torch.testing.assert_close(merged, by_hand(deltas, select_topk, weights), atol=1e-7, rtol=0)


@pytest.mark.parametrize("select_topk", [1.0, 0.5])
def test_ties_zeros_and_sums_of_zero(select_topk: float) -> None:
    for seed in range(5):
        deltas = coarse((9, 11), 2, seed)  # variances of two such are exact in float32, and often equal
        merged = merge.sce(deltas, select_topk=select_topk)
        torch.testing.assert_close(merged, by_hand(deltas, select_topk), atol=1e-7, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_model_is_itself_and_none_of_it_varies(shape: tuple[int, ...]) -> None:
    (delta,) = changes(shape, 1)
    torch.testing.assert_close(merge.sce([delta]), delta, atol=0, rtol=2e-7)
    assert torch.equal(merge.sce([delta], select_topk=0.99), torch.zeros_like(delta))
    assert torch.equal(merge.sce([delta, 2 * delta], scale=0.0), torch.zeros_like(delta))


def test_equal_values_have_no_variance_at_all() -> None:
    (tensor,) = changes((1000,), 1, size=1.0)
    assert not variance([tensor] * 3).any() and not variance([tensor * 0.1] * 7).any()
    tensors = changes((50, 3), 5, size=1.0)
    expected = torch.stack(tensors).double().var(0, correction=0)
    torch.testing.assert_close(variance(tensors).double(), expected, atol=1e-6, rtol=0)


def test_small_changes_are_weighed_as_large_ones_unless_compat() -> None:
    deltas = [factor * delta for factor, delta in zip((1.0, 3.0, 0.2), changes((40, 50)), strict=True)]
    small = [1e-3 * delta for delta in deltas]  # by 1e-4 an entry: what a fine-tune does
    torch.testing.assert_close(merge.sce(small), 1e-3 * merge.sce(deltas), atol=1e-9, rtol=0)  # numbers up to 1e-3
    agree = [delta.abs() for delta in small]
    published = merge.sce(agree, compat="mergekit")
    torch.testing.assert_close(published, sum(agree) / 3, atol=1e-10, rtol=0)  # the plain mean
    ours = sum(w * one for w, one in zip((1, 9, 0.04), agree, strict=True)) / 10.04
    assert isinstance(ours, Tensor)
    torch.testing.assert_close(merge.sce(agree), ours, atol=2e-5, rtol=0)  # of 2,000 random squares: 1.5 % or so


def test_changes_that_are_all_zero_stay_zero() -> None:
    zero = torch.zeros(4, 3)
    for select_topk in (1.0, 0.5):
        assert torch.equal(merge.sce([zero, zero], select_topk=select_topk), zero)
    (delta,) = changes((4, 3), 1)
    assert torch.equal(merge.sce([delta, zero], [0.0, 1.0]), zero)


def sparse(seed: int) -> tuple[list[Tensor], Tensor]:
    """(changes, the sum of what was learned): each learned 3 % of the entries, and has noise of a fifth of that."""
    generator = torch.Generator().manual_seed(seed)
    found, learned = [], torch.zeros(40, 40)
    for _ in range(3):
        own = torch.randn(40, 40, generator=generator) * (torch.rand(40, 40, generator=generator) < 0.03)
        found.append(own + 0.2 * torch.randn(40, 40, generator=generator))
        learned += own
    return found, learned


@pytest.mark.parametrize("baseline", ["mean", "sum", "unselected"])
def test_selecting_what_varies_keeps_what_was_learned_and_drops_noise(baseline: str) -> None:
    """The loss against the noiseless sum is 0.33, that of the mean 0.59, of the sum 1.32, of SCE without selection 0.69."""
    differences = []
    for seed in range(20):
        found, learned = sparse(seed)
        ours = merge.sce(found, select_topk=0.1)
        shares = {"mean": [1 / 3] * 3, "sum": [1.0] * 3}
        base = merge.task_arithmetic(found, shares[baseline]) if baseline in shares else merge.sce(found)
        losses = [float((one - learned).square().sum() / learned.square().sum()) for one in (ours, base)]
        differences.append(losses[1] - losses[0])
    assert lower_bound(differences) > 0


def test_erasing_and_weighing_beat_the_mean_but_selecting_does_not_where_tasks_see_their_own_entries_alone() -> None:
    """A task that does not see the others' entries (`planted`) loses what is not selected and gains nothing."""
    assert gain(lambda found, _: merge.sce(found), lambda found, _: merge.task_arithmetic(found, [1 / 3] * 3)) > 0
    assert gain(lambda found, _: merge.sce(found), lambda found, _: merge.sce(found, select_topk=0.5)) > 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("select_topk", [1.0, 0.4])
@pytest.mark.parametrize("rows", [1, 3])
def test_parts_change_nothing(shape: tuple[int, ...], rows: int, select_topk: float) -> None:
    tensors, method = changes(shape), Sce(SceConfig(select_topk))
    torch.testing.assert_close(in_parts(method, tensors, rows), method.merged(tensors), atol=1e-7, rtol=0)


def test_parts_of_tied_variances_change_nothing() -> None:
    tensors, method = coarse((12, 10)), Sce(SceConfig(0.4))
    assert torch.equal(in_parts(method, tensors, 1) != 0, method.merged(tensors) != 0)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([1, -1], {}, "none may be below 0"),
        ([0, 0], {}, "not all may be 0"),
        ([1, 1], {"select_topk": 1.5}, "select_topk must be between 0 and 1"),
    ],
)
def test_what_it_refuses(weights: list[float], options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge.sce(changes((3, 2), 2), weights, **options)
