"""The straight-through estimator: never worse than weight matching on its data, better where the weights mislead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.merge.align.matching import match
from trimtab.merge.align.module_specs import module_spec
from trimtab.merge.align.path import interpolate
from trimtab.merge.align.permutation import Spec, apply
from trimtab.merge.align.straight_through import straight_through


def task(seed: int, width: int = 12) -> tuple[nn.Module, dict[str, Tensor]]:
    """A classifier trained for a moment; all seeds see the same data."""
    with torch.random.fork_rng():
        torch.manual_seed(100)
        inputs, teacher = torch.randn(256, 8), torch.randn(8, 4)
        targets = (inputs @ teacher).argmax(1)
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(150):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model, {"inputs": inputs, "targets": targets}


def setting(seed: int) -> tuple[Spec, dict[str, Tensor], dict[str, Tensor], Any, list[Any]]:
    (one, data), (two, _) = task(2 * seed), task(2 * seed + 1)
    spec = module_spec(one, data["inputs"][:4])

    def loss(tensors: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(one, tensors, (batch[0],)), batch[1])

    batches = list(zip(data["inputs"].split(64), data["targets"].split(64), strict=True))
    a, b = ({name: value.detach() for name, value in model.named_parameters()} for model in (one, two))
    return spec, a, b, loss, batches


def full(loss: Any, batches: list[Any], tensors: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return sum(float(loss(tensors, batch)) for batch in batches) / len(batches)


def test_the_middle_gets_better_than_by_weight_matching_and_the_figures_are_true() -> None:
    better = 0
    for seed in range(4):
        spec, a, b, loss, batches = setting(seed)
        kept = {name: value.clone() for name, value in b.items()}
        found = straight_through(spec, a, b, loss, batches, steps=100, seed=0)
        by_weights = full(loss, batches, interpolate(a, apply(spec, match(spec, a, b).permutations, b), 0.5))
        here = full(loss, batches, interpolate(a, apply(spec, found.permutations, b), 0.5))
        assert found.start_loss == pytest.approx(by_weights) and found.midpoint_loss == pytest.approx(here)
        assert here <= by_weights
        better += here < 0.95 * by_weights
        assert all(torch.equal(b[name], value) for name, value in kept.items())  # neither model changes
        assert all(not value.requires_grad for value in (*a.values(), *b.values()))
    assert better >= 3  # weight matching alone scores 0 here


def test_a_step_looks_at_the_middle_of_a_and_the_permuted_b() -> None:
    """The first step sees the loss at the middle of A and pi(B), though what learns began as A."""
    spec, a, b, loss, batches = setting(0)
    seen: list[dict[str, Tensor]] = []

    def watched(tensors: dict[str, Tensor], batch: Any) -> Tensor:
        value = loss(tensors, batch)
        if value.requires_grad:
            seen.append({name: tensor.detach() for name, tensor in tensors.items()})
        return value

    straight_through(spec, a, b, watched, batches, steps=1, seed=0)
    wanted = interpolate(a, apply(spec, match(spec, a, b).permutations, b), 0.5)
    assert all(torch.allclose(seen[0][name], value) for name, value in wanted.items())  # its value is that of pi(B)


@pytest.mark.parametrize("begin", ["matched", "moving"])
def test_other_beginnings_are_no_worse_than_weight_matching_either(begin: Any) -> None:
    spec, a, b, loss, batches = setting(1)
    found = straight_through(spec, a, b, loss, batches, steps=10, begin=begin, seed=0)
    assert found.midpoint_loss <= found.start_loss and found.tried[0] == (0, found.start_loss)


def test_a_planted_permutation_is_kept() -> None:
    spec, a, _, loss, batches = setting(0)
    moved = apply(spec, spec.random(torch.Generator().manual_seed(1)), a)
    found = straight_through(spec, a, moved, loss, batches, steps=5)
    back = apply(spec, found.permutations, moved)
    assert all(torch.equal(back[name], value) for name, value in a.items())


def test_without_data_it_is_refused() -> None:
    spec, a, b, loss, _ = setting(0)
    with pytest.raises(UsageError, match="no batch was given"):
        straight_through(spec, a, b, loss, [])
