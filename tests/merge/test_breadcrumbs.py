"""Breadcrumbs against a sort in plain Python; the fault of mergekit's that compat repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from merge.parents import SHAPES, changes, coarse, gain, in_parts, part_sizes
from trimtab import merge
from trimtab.errors import UsageError
from trimtab.merge.methods.breadcrumbs import Breadcrumbs, BreadcrumbsConfig, kept_counts


def crumbs(delta: Tensor, density: float, gamma: float) -> Tensor:
    """The change without its smallest and its largest entries, by the rule; of equals the first count as larger."""
    flat = delta.flatten().tolist()
    if density >= 1:
        return delta
    target, top = int(density * len(flat)), int(gamma * len(flat))
    bottom = len(flat) - target - top
    if bottom < 0:
        top, bottom = top + bottom, 0
    order = sorted(range(len(flat)), key=lambda i: (abs(flat[i]), -i))
    kept = set(order[bottom : len(flat) - top])
    return torch.tensor([value if i in kept else 0.0 for i, value in enumerate(flat)]).view(delta.shape)


@pytest.mark.parametrize(
    ("density", "gamma"), [(0.85, 0.01), (0.5, 0.2), (0.9, 0.3), (0.5, 0.0), ((0.2, 0.9, 1.0), (0.1, 0.05, 0.5))]
)
@pytest.mark.parametrize("shape", [(7,), (5, 3), (64, 33), ()])
def test_it_is_the_rule_entry_by_entry(shape: tuple[int, ...], density: Any, gamma: Any) -> None:
    weights = (0.5, 2.0, -0.25)
    for deltas in (coarse(shape), changes(shape)):
        pairs = [
            tuple(value[model] if isinstance(value, tuple) else value for value in (density, gamma))
            for model in range(3)
        ]
        kept = [crumbs(delta, *pair) for delta, pair in zip(deltas, pairs, strict=True)]
        expected = sum(weight * one for weight, one in zip(weights, kept, strict=True))
        found = merge.breadcrumbs(deltas, weights, density=density, gamma=gamma)
        assert (found - expected).abs().max() < 1e-6  # some roundings of values below 1
        mean = merge.breadcrumbs(deltas, weights, density=density, gamma=gamma, normalize=True, scale=0.5)
        assert (mean - 0.5 * expected / 2.25).abs().max() < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_it_does_not_depend_on_the_parts(shape: tuple[int, ...]) -> None:
    method = Breadcrumbs(BreadcrumbsConfig(density=0.6, gamma=0.1))
    for deltas in (coarse(shape), changes(shape)):
        for rows in part_sizes(shape):
            assert torch.equal(in_parts(method, deltas, rows, (0.2, 0.5, 1.0)), method.merged(deltas, (0.2, 0.5, 1.0)))


def test_without_outliers_to_drop_the_top_stays_unless_compat_erases() -> None:
    (delta,) = changes((50,), 1)  # int(0.01 x 50) = 0
    ours = merge.breadcrumbs([delta], density=0.8)
    assert int((ours != 0).sum()) == 40 and ours.abs().max() == delta.abs().max()
    assert not merge.breadcrumbs([delta], density=0.8, compat="mergekit").any()
    (long,) = changes((1000,), 1)
    assert not merge.breadcrumbs([long], density=0.8, gamma=0.0, compat="mergekit").any()
    for compat in ("paper", "mergekit"):  # where something is dropped they agree, and where nothing is
        assert torch.equal(merge.breadcrumbs([long], density=0.8, compat=compat), crumbs(long, 0.8, 0.01))
        assert torch.equal(merge.breadcrumbs([delta], compat=compat), delta)


def test_counts() -> None:
    assert kept_counts(1000, 0.85, 0.01, False) == (860, 10)
    assert kept_counts(1000, 0.85, 0.3, False) == (1000, 150)  # the top gives way: 850 stay
    assert kept_counts(1000, 1.0, 0.3, True) == (1000, 0)
    assert kept_counts(5, 0.1, 0.5, False) == (2, 2)  # int(0.1 x 5) = 0 stay


def test_limits() -> None:
    base, model = changes((64, 33), 2, size=1.0)
    assert torch.equal(merge.breadcrumbs([model - base]), model - base)  # one, density 1: the model itself
    assert not merge.breadcrumbs(changes((5, 3)), density=0.5, scale=0.0).any()
    assert not merge.breadcrumbs(changes((5,)), density=0.1).any()
    assert merge.breadcrumbs([torch.zeros(0, 3)], density=0.5).shape == (0, 3)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(UsageError, match="breadcrumbs: gamma must be between 0 and 1, not 3"):
        merge.breadcrumbs(changes((3,)), gamma=3)
    with pytest.raises(UsageError, match="breadcrumbs: the weights sum to 0"):
        merge.breadcrumbs(changes((3,), 2), (1, -1), normalize=True)


def test_without_its_outliers_a_change_hurts_the_other_skills_less() -> None:
    # against the same density with all outliers in, and against the plain sum
    ours = lambda deltas, _: merge.breadcrumbs(deltas, density=0.85, gamma=0.01)  # noqa: E731
    assert gain(ours, lambda deltas, _: merge.breadcrumbs(deltas, density=0.85, gamma=0.0), outliers=0.01) > 0
    assert gain(ours, lambda deltas, _: merge.task_arithmetic(deltas), outliers=0.01) > 0
