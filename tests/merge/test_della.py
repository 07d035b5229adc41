"""DELLA: ranks and probabilities by hand, then TIES' rule entry by entry; what it cannot do is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from merge.parents import SHAPES, changes, coarse, elect_all, gain, in_parts, part_sizes, uniform
from trimtab import merge
from trimtab.errors import UsageError
from trimtab.merge.method import Place
from trimtab.merge.methods.della import Della, DellaConfig, relative_ranks


def probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """p of each entry, row by row, by sorting in plain Python."""
    columns = delta.shape[-1] if delta.dim() else 1
    rows = []
    for row in delta.reshape(-1, columns).tolist():
        order = sorted(range(columns), key=lambda i: (abs(row[i]), i))
        rank = {i: r for r, i in enumerate(order)}
        spread = 2 * epsilon / (columns - 1) if columns > 1 else 0
        rows.append([density - (epsilon if columns > 1 else 0) + spread * rank[i] for i in range(columns)])
    return torch.tensor(rows).view(delta.shape)


def kept(deltas: list[Tensor], density: Any, epsilon: Any, seed: int) -> list[Tensor]:
    out = []
    for model, delta in enumerate(deltas):
        one, half = (value[model] if isinstance(value, tuple) else value for value in (density, epsilon))
        p = probabilities(delta, one, half) if one < 1 else torch.ones(delta.shape)
        out.append(torch.where(uniform(delta.shape, model, seed) < p, delta / p, 0.0))
    return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), ((0.3, 0.5, 1.0), (0.2, 0.4, 0.1))])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (64, 33), (6, 1), (4, 3, 5), ()])
def test_it_is_the_rule_entry_by_entry(shape: tuple[int, ...], density: Any, epsilon: Any, normalize: bool) -> None:
    weights = (0.5, 2.0, -0.25)
    for deltas in (coarse(shape), changes(shape)):
        expected = elect_all(kept(deltas, density, epsilon, seed=4), weights, normalize)
        found = merge.della(deltas, weights, seed=4, density=density, epsilon=epsilon, normalize=normalize)
        assert (found - expected).abs().max() < 1e-6  # some roundings of values of about 1


def test_ranks_are_by_magnitude_and_the_first_of_equals_is_lower() -> None:
    delta = torch.tensor([[-3.0, 1.0, 0.5, 2.0, -1.0], [0.0, -0.0, 0.0, 7.0, 0.0]])
    assert relative_ranks(delta).tolist() == [[1, 0.25, 0, 0.75, 0.5], [0, 0.25, 0.5, 1, 0.75]]


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_does_not_depend_on_the_parts(shape: tuple[int, ...], compat: Any) -> None:
    method = Della(DellaConfig(density=0.5, epsilon=0.3, compat=compat))
    for deltas in (coarse(shape), changes(shape)):
        for rows in part_sizes(shape):
            whole = method.merged(deltas, (0.2, 0.5, 1.0), seed=3)
            assert torch.equal(in_parts(method, deltas, rows, (0.2, 0.5, 1.0), seed=3), whole)


def test_a_vector_is_one_row_and_needed_whole() -> None:
    method = Della()
    assert method.whole(Place("a", (7,), (1.0,))) and not method.whole(Place("a", (7, 2), (1.0,)))
    vector = changes((40,), 1)[0]
    assert torch.equal(relative_ranks(vector), relative_ranks(vector[None])[0])


def test_limits() -> None:
    base, model = changes((64, 33), 2, size=1.0)
    assert (base + merge.della([model - base], [0.7]) - model).abs().max() < 1e-6  # one, density 1: the model itself
    for compat in ("paper", "mergekit"):
        assert not merge.della(changes((5, 3)), density=0.5, scale=0.0, compat=compat).any()
        assert not merge.della(changes((5, 3)), density=0.0, compat=compat).any()
        assert not merge.della([torch.zeros(5, 2)], density=0.5, compat=compat).any()
        assert torch.isfinite(merge.della(changes((6, 1)), density=0.5, compat=compat)).all()
    deltas = changes((5, 3))
    assert torch.equal(merge.della(deltas), merge.ties(deltas))  # density 1: TIES
    ours, theirs = (merge.__getattr__(name)(deltas, density=0.5, normalize=True, **more)
                    for name, more in [("della", {"epsilon": 0.0}), ("dare_ties", {})])  # fmt: skip
    assert torch.equal(ours, theirs)  # epsilon 0: DARE-TIES


def test_compat_keeps_the_norm_of_one_change() -> None:
    (delta,) = changes((128, 64), 1)
    found = merge.della([delta], density=0.3, epsilon=0.2, compat="mergekit")
    assert float(found.abs().sum() / delta.abs().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.9}, "density - epsilon and density \\+ epsilon must be above 0 and below 1, not 0.9 -\\+ 0.15"),
        ({"density": 0.1}, "not 0.1 -\\+ 0.15: give a smaller --epsilon, or another --density"),
        ({"density": 0.85}, "not 0.85 -\\+ 0.15"),  # exactly 1
        ({"density": (0.5, 0.5, 0.5), "epsilon": (0.1, 0.1, 0.5)}, "not 0.5 -\\+ 0.5"),
        ({"epsilon": -0.1}, "epsilon must be between 0 and 0.5, not -0.1"),
        ({"density": 1.1}, "density must be between 0 and 1, not 1.1"),
    ],
)
def test_what_it_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"della: .*{message}"):
        merge.della(changes((3,)), **options)


def test_it_keeps_more_of_three_skills_than_dare_ties_at_the_same_density() -> None:
    assert (
        gain(
            lambda deltas, seed: merge.della(deltas, seed=seed, density=0.5, epsilon=0.4),
            lambda deltas, seed: merge.dare_ties(deltas, seed=seed, density=0.5, normalize=True),
        )
        > 0
    )
