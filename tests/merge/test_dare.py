"""DARE: unbiased by 1/p, norm-preserving where it is to be, and its masks are those of `Part.uniform`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from merge.parents import SHAPES, changes, in_parts, lower_bound, part_sizes, uniform
from trimtab import merge
from trimtab.errors import UsageError
from trimtab.merge.methods.dare import Dare, DareConfig
from trimtab.merge.methods.sparsify import exact_norm

OPTIONS: list[dict[str, Any]] = [
    {"density": 0.4},
    {"density": 0.4, "compat": "mergekit"},
    {"density": (0.2, 0.5, 1.0), "normalize": True, "scale": 0.5},
    {"density": 0.4, "rescale": False},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(7,), (5, 3), (64, 33), ()])
def test_it_is_task_arithmetic_of_masked_and_rescaled_changes(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    deltas, weights = changes(shape), (0.5, 2.0, -0.25)
    densities = options["density"] if isinstance(options["density"], tuple) else (options["density"],) * 3
    kept: list[Tensor] = []
    for model, (delta, density) in enumerate(zip(deltas, densities, strict=True)):
        one = torch.where(uniform(shape, model, seed=5) < density, delta, 0.0).double()
        if options.get("compat") == "mergekit":
            one *= float(delta.double().abs().sum() / one.abs().sum()) if one.any() else 1.0
        elif options.get("rescale", True):
            one /= density
        kept.append(one)
    expected = sum(weight * one for weight, one in zip(weights, kept, strict=True)) * options.get("scale", 1.0)
    expected = expected / 2.25 if options.get("normalize") else expected
    found = merge.dare(deltas, weights, seed=5, **options)
    assert (found - expected).abs().max() < 1e-6  # some roundings of values of about 1


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_does_not_depend_on_the_parts(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    method, deltas = Dare(DareConfig(**options)), changes(shape)
    for rows in part_sizes(shape):
        whole = method.merged(deltas, (0.2, 0.5, 1.0), seed=3)
        assert torch.equal(in_parts(method, deltas, rows, (0.2, 0.5, 1.0), seed=3), whole)


def test_parts_may_lie_across_blocks_of_random_numbers() -> None:
    method, deltas = Dare(DareConfig(density=0.5, compat="mergekit")), changes((35000, 2), 2)
    assert torch.equal(in_parts(method, deltas, 20001), method.merged(deltas))


def test_the_mean_over_seeds_is_the_change() -> None:
    (delta,) = changes((40,), 1)
    density, seeds = 0.3, 2000
    total = torch.zeros(40, dtype=torch.float64)
    for seed in range(seeds):
        total += merge.dare([delta], density=density, seed=seed)
    error = delta.double().abs() * math.sqrt((1 - density) / density / seeds)
    assert ((total / seeds - delta).abs() < 4 * error).all()


def test_compat_keeps_the_norm() -> None:
    for delta in changes((128, 64)):
        found = merge.dare([delta], density=0.2, compat="mergekit")
        assert float(found.abs().sum() / delta.abs().sum()) == pytest.approx(1, abs=1e-5)
        assert 0.17 < float((found != 0).float().mean()) < 0.23  # 6.8 standard errors


def test_compat_leaves_a_change_of_next_to_no_norm_as_it_is() -> None:
    tiny = torch.full((20,), 1e-9)  # its norm is 2e-8, below mergekit's 1e-7
    assert set(merge.dare([tiny], density=0.5, compat="mergekit").tolist()) == {0.0, tiny[0].item()}


def test_norms_are_summed_exactly() -> None:
    values = torch.tensor([1.5, -2.0, 3e-45, 1e-40, 1e30, -1e-30, 0.0, -0.0])
    assert exact_norm(values) * 2.0**-149 == math.fsum(abs(value) for value in values.tolist())
    assert exact_norm(torch.tensor([2.0**-149])) == 1
    many = changes((1000,), 1)[0]
    assert exact_norm(many) == sum(exact_norm(piece) for piece in many.split(7))


def test_limits() -> None:
    base, model = changes((64, 33), 2, size=1.0)
    assert torch.equal(merge.dare([model - base]), model - base)  # one, density 1: the model itself
    for compat in ("paper", "mergekit"):
        assert not merge.dare(changes((5, 3)), density=0.5, scale=0.0, compat=compat).any()
        assert not merge.dare(changes((5, 3)), density=0.0, compat=compat).any()
        assert not merge.dare([torch.zeros(5)], density=0.5, compat=compat).any()
        assert merge.dare([torch.zeros(0, 3)], density=0.5, compat=compat).shape == (0, 3)


def test_every_model_tensor_and_seed_has_a_mask_of_its_own() -> None:
    delta = torch.ones(4000)
    masks = [
        merge.dare([delta], density=0.5, seed=seed, name=name) > 0 for seed, name in [(0, "a"), (1, "a"), (0, "b")]
    ]
    both = merge.dare([delta, delta], [1.0, 10.0], density=0.5, seed=0, name="a")
    masks.append(both >= 20)
    for i, one in enumerate(masks):
        for two in masks[:i]:
            assert 0.46 < float((one == two).float().mean()) < 0.54  # 5 standard errors about one half
    assert torch.equal(masks[0], (both == 2) | (both == 22))


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(UsageError, match="dare: density must be between 0 and 1, not -0.1"):
        merge.dare(changes((3,)), density=-0.1)
    with pytest.raises(UsageError, match="compat='exact' is not one of paper, mergekit"):
        merge.dare(changes((3,)), compat="exact")
    with pytest.raises(UsageError, match="dare: the weights sum to 0"):
        merge.dare(changes((3,), 2), (1, -1), normalize=True)


def test_rescaling_keeps_what_a_change_does_to_the_inputs_that_made_it() -> None:
    # A classifier trained from zero, its change dropped to a fifth: rescaled, the logits stay; not rescaled, they shrink.
    differences = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(400, 300, generator=generator) * 0.5
        labels = torch.where(torch.rand(400, generator=generator) < 0.5, 1.0, -1.0)
        inputs += labels[:, None] * torch.full((300,), 0.2)
        change = (labels[:200, None] * inputs[:200]).mean(0)
        change *= 4 / (inputs[:200] @ change).abs().mean()

        def loss(weights: Tensor, x: Tensor = inputs[200:], y: Tensor = labels[200:]) -> float:
            return float(torch.nn.functional.softplus(-y * (x @ weights)).mean())

        with_, without = (merge.dare([change], density=0.2, seed=seed, rescale=one) for one in (True, False))
        differences.append(loss(without) - loss(with_))
    assert lower_bound(differences) > 0
