"""DARE-TIES: DARE's masks, then TIES' rule, entry by entry in plain Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from merge.parents import (
    SHAPES,
    changes,
    coarse,
    cosine,
    disputed,
    elect_all,
    in_parts,
    lower_bound,
    part_sizes,
    uniform,
)
from trimtab import merge
from trimtab.errors import UsageError
from trimtab.merge.methods.dare_ties import DareTies, DareTiesConfig


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, -0.25)])
@pytest.mark.parametrize("density", [0.5, (0.25, 0.5, 1.0)])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (64, 33), ()])
def test_it_is_the_rule_entry_by_entry(
    shape: tuple[int, ...], density: Any, weights: tuple[float, ...], normalize: bool
) -> None:
    densities = density if isinstance(density, tuple) else (density,) * 3
    for deltas in (coarse(shape), changes(shape)):
        kept = [
            torch.where(uniform(shape, model, seed=2) < one, delta / one, 0.0)
            for model, (delta, one) in enumerate(zip(deltas, densities, strict=True))
        ]
        found = merge.dare_ties(deltas, weights, seed=2, density=density, normalize=normalize, scale=0.5)
        # One rounding of the division and of sums of about 1.
        assert (found - 0.5 * elect_all(kept, weights, normalize)).abs().max() < 1e-6


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_does_not_depend_on_the_parts(shape: tuple[int, ...], compat: Any) -> None:
    method = DareTies(DareTiesConfig(density=0.4, compat=compat, normalize=True))
    for deltas in (coarse(shape), changes(shape)):
        for rows in part_sizes(shape):
            whole = method.merged(deltas, (0.2, 0.5, 1.0), seed=3)
            assert torch.equal(in_parts(method, deltas, rows, (0.2, 0.5, 1.0), seed=3), whole)


def test_compat_keeps_the_norm_of_one_change() -> None:
    (delta,) = changes((128, 64), 1)
    found = merge.dare_ties([delta], density=0.2, compat="mergekit")
    assert float(found.abs().sum() / delta.abs().sum()) == pytest.approx(1, abs=1e-5)


def test_limits() -> None:
    base, model = changes((64, 33), 2, size=1.0)
    assert (base + merge.dare_ties([model - base]) - model).abs().max() < 1e-6  # one, density 1: the model itself
    assert not merge.dare_ties(changes((5, 3)), density=0.5, scale=0.0).any()
    deltas = changes((5, 3))
    assert torch.equal(merge.dare_ties(deltas, normalize=True), merge.ties(deltas))  # density 1: TIES
    # weights of sum 0 have no mean, but an election needs none
    assert torch.isfinite(merge.dare_ties(deltas[:2], (1, -1), normalize=True)).all()


def test_a_density_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match="dare-ties: density must be between 0 and 1, not 2"):
        merge.dare_ties(changes((3,)), density=2)


def differences_to_dare(density: float) -> list[float]:
    """How much nearer, in cosine, to what three changes agree on at most entries the election comes."""
    out = []
    for seed in range(20):
        deltas, truth = disputed(seed)
        ours, theirs = (method(deltas, density=density, seed=seed) for method in (merge.dare_ties, merge.dare))
        out.append(cosine(ours, truth) - cosine(theirs, truth))
    return out


def test_an_election_keeps_more_of_what_most_agree_on_than_dare_where_little_is_dropped() -> None:
    assert lower_bound(differences_to_dare(0.9)) > 0


def test_where_half_is_dropped_chance_elects_and_dare_is_better() -> None:
    assert lower_bound([-one for one in differences_to_dare(0.5)]) > 0  # a limit of the method, and of our claim
