"""Breadcrumbs-TIES: breadcrumbs' dropping, then TIES' rule, entry by entry in plain Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from merge.parents import SHAPES, changes, coarse, elect_all, gain, in_parts, part_sizes
from merge.test_breadcrumbs import crumbs
from trimtab import merge
from trimtab.errors import UsageError
from trimtab.merge.methods.breadcrumbs_ties import BreadcrumbsTies, BreadcrumbsTiesConfig


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, -0.25)])
@pytest.mark.parametrize(("density", "gamma"), [(0.85, 0.01), (0.5, 0.2), (0.9, 0.3)])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (64, 33), ()])
def test_it_is_the_rule_entry_by_entry(
    shape: tuple[int, ...], density: float, gamma: float, weights: tuple[float, ...], normalize: bool
) -> None:
    for deltas in (coarse(shape), changes(shape)):
        expected = 0.5 * elect_all([crumbs(delta, density, gamma) for delta in deltas], weights, normalize)
        found = merge.breadcrumbs_ties(deltas, weights, density=density, gamma=gamma, normalize=normalize, scale=0.5)
        assert (found - expected).abs().max() < 1e-6  # one rounding of the division and of sums below 1


@pytest.mark.parametrize("shape", SHAPES)
def test_it_does_not_depend_on_the_parts(shape: tuple[int, ...]) -> None:
    method = BreadcrumbsTies(BreadcrumbsTiesConfig(density=0.6, gamma=0.1, normalize=True))
    for deltas in (coarse(shape), changes(shape)):
        for rows in part_sizes(shape):
            assert torch.equal(in_parts(method, deltas, rows, (0.2, 0.5, 1.0)), method.merged(deltas, (0.2, 0.5, 1.0)))


def test_limits() -> None:
    base, model = changes((64, 33), 2, size=1.0)
    assert torch.equal(merge.breadcrumbs_ties([model - base]), model - base)  # one, density 1: the model itself
    assert not merge.breadcrumbs_ties(changes((5, 3)), density=0.5, scale=0.0).any()
    deltas = changes((64, 33))
    ours: Any = merge.breadcrumbs_ties(deltas, density=0.3, gamma=0.0, normalize=True)
    assert torch.equal(ours, merge.ties(deltas, density=0.3))  # gamma 0: TIES
    assert not merge.breadcrumbs_ties(deltas, density=0.3, gamma=0.0, compat="mergekit").any()


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(UsageError, match="breadcrumbs-ties: density must be between 0 and 1, not 3"):
        merge.breadcrumbs_ties(changes((3,)), density=3)


def test_without_its_outliers_a_change_hurts_the_other_skills_less() -> None:
    assert (
        gain(
            lambda deltas, _: merge.breadcrumbs_ties(deltas, density=0.6, gamma=0.02, normalize=True),
            lambda deltas, _: merge.ties(deltas, density=0.6),
            outliers=0.01,
        )
        > 0
    )
