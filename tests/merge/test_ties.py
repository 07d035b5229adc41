"""TIES against its rule written out entry by entry in plain Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from merge.parents import SHAPES, changes, coarse, elect_all, gain, in_parts, part_sizes
from trimtab import merge
from trimtab.errors import UsageError
from trimtab.merge.methods.ties import Ties, TiesConfig, elect

WEIGHTS = [(1.0, 1.0, 1.0), (0.5, 2.0, -0.25), (1.0, -1.0, 0.0)]


def trim(delta: Tensor, density: float) -> Tensor:
    """The int(density n) entries of largest magnitude, the first of equals; 0 elsewhere."""
    flat = delta.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))
    kept = set(order[: int(density * len(flat))])
    return torch.tensor([value if i in kept else 0.0 for i, value in enumerate(flat)]).view(delta.shape)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", [1.0, 0.3, (0.2, 0.5, 0.9)])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (64, 33), ()])
def test_it_is_the_rule_entry_by_entry(
    shape: tuple[int, ...], density: Any, weights: tuple[float, ...], normalize: bool
) -> None:
    densities = density if isinstance(density, tuple) else (density,) * 3
    for deltas in (coarse(shape), changes(shape)):
        trimmed = [trim(delta, one) for delta, one in zip(deltas, densities, strict=True)]
        found = merge.ties(deltas, weights, density=density, normalize=normalize, scale=0.5)
        # One rounding of the division and of sums that are below 1.
        assert (found - 0.5 * elect_all(trimmed, weights, normalize)).abs().max() < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_it_does_not_depend_on_the_parts(shape: tuple[int, ...]) -> None:
    method = Ties(TiesConfig(density=0.4))
    for deltas in (coarse(shape), changes(shape)):
        for rows in part_sizes(shape):
            assert torch.equal(in_parts(method, deltas, rows, (0.2, 0.5, 1.0)), method.merged(deltas, (0.2, 0.5, 1.0)))


def test_limits() -> None:
    base, model = changes((64, 33), 2, size=1.0)
    assert (base + merge.ties([model - base], [0.7]) - model).abs().max() < 1e-6  # one: the model itself
    assert not merge.ties(changes((5, 3)), scale=0.0, density=0.5).any()
    assert not merge.ties(changes((5,)), density=0.1).any()  # int(0.1 x 5) = 0 entries
    assert not merge.ties([torch.zeros(5)] * 2).any()
    assert merge.ties([torch.zeros(0, 3)] * 2, density=0.5).shape == (0, 3)


def test_zeros_and_those_outvoted_leave_the_divisor() -> None:
    deltas = [
        torch.tensor([4.0, 4.0, 0.0, 1.0]),
        torch.tensor([2.0, 0.0, 0.0, -1.0]),
        torch.tensor([-1.0, 0.0, 0.0, 0.0]),
    ]
    assert merge.ties(deltas).tolist() == [3.0, 4.0, 0.0, 1.0]  # the last: a sum of 0 elects +


def test_weights_that_cancel_among_those_that_agree_do_not_divide_by_rounding_errors() -> None:
    # 0.3 + 0.6 - 0.9 is 6e-8 in float32 and not 0
    deltas = [torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([-1.0])]
    found = elect([delta.clone() for delta in deltas], (0.3, 0.6, -0.9), normalize=True)
    assert found.item() == pytest.approx(1.8)


def test_a_density_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match="ties: density must be between 0 and 1, not 1.2"):
        merge.ties(changes((3,)), density=1.2)
    with pytest.raises(UsageError, match="density has 2 values for 3 models"):
        merge.ties(changes((3,)), density=(0.2, 0.3))


def test_trimming_and_electing_keep_more_of_three_skills_than_the_mean() -> None:
    assert gain(lambda deltas, _: merge.ties(deltas, density=0.3), lambda deltas, _: merge.linear(deltas)) > 0
    # and than adding up what was trimmed: that noise which opposes a skill has no part in it
    trimmed = lambda deltas, _: merge.linear([trim(delta, 0.3) for delta in deltas])  # noqa: E731
    assert gain(lambda deltas, _: merge.ties(deltas, density=0.3), trimmed) > 0
