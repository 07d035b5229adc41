"""The Karcher mean: where the pulls cancel, SLERP for two, the same under rotations and in any order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from merge.parents import SHAPES, changes, in_parts
from trimtab import merge
from trimtab.errors import UsageError
from trimtab.merge.methods.gram import cosines, inner_products
from trimtab.merge.methods.karcher import Karcher, KarcherConfig, mean_on_sphere

EXACT = {"max_iter": 1000, "tol": 1e-12}


def spread(parents: int, seed: int = 0) -> list[Tensor]:
    """float64 [4, 5] tensors around one direction, some 45 degrees apart, of different norms."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    return [
        (1 + t) * (centre + 0.8 * torch.randn(4, 5, dtype=torch.float64, generator=generator)) for t in range(parents)
    ]


def log(u: Tensor, x: Tensor) -> Tensor:
    """The logarithm at u of x, both unit vectors: the tangent at u that leads to x."""
    cos = float(u @ x)
    return math.acos(cos) / math.sqrt(1 - cos**2) * (x - cos * u)


@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 2, 5]])
def test_the_weighted_logarithms_sum_to_zero_at_the_mean(weights: list[float]) -> None:
    models = spread(3)
    merged = merge.karcher(models, weights, **EXACT).flatten()
    u = merged / merged.norm()
    pull = sum(w / sum(weights) * log(u, m.flatten() / m.norm()) for w, m in zip(weights, models, strict=True))
    assert float(torch.as_tensor(pull).norm()) < 1e-11  # tol, and the rounding of some ten float64 operations
    norms = sum(w / sum(weights) * float(m.norm()) for w, m in zip(weights, models, strict=True))
    assert float(merged.norm()) == pytest.approx(norms, rel=1e-12)


def test_the_defaults_come_within_their_tolerance_of_it() -> None:
    models = spread(3)
    exact, default = merge.karcher(models, **EXACT), merge.karcher(models)
    assert 0 < float((exact - default).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("t", [0.5, 0.2])
def test_of_two_it_is_slerp(t: float) -> None:
    a, b = (model / model.norm() for model in spread(2))
    merged = merge.karcher([a, b], [1 - t, t], **EXACT)
    torch.testing.assert_close(merged, merge.slerp([a, b], t=t), atol=1e-11, rtol=0)


def test_it_turns_with_the_models_and_does_not_see_their_order() -> None:
    models = spread(4)
    turn = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))).Q
    turned = merge.karcher([(turn @ model.flatten()).view(4, 5) for model in models], [1, 2, 3, 4])
    merged = merge.karcher(models, [1, 2, 3, 4])
    torch.testing.assert_close(turned, (turn @ merged.flatten()).view(4, 5), atol=1e-12, rtol=0)
    torch.testing.assert_close(merge.karcher(models[::-1], [4, 3, 2, 1]), merged, atol=1e-12, rtol=0)


def test_the_mean_is_nearer_to_all_than_any_other_point() -> None:
    """It minimises the sum of squared arcs: moving off in any direction of the tangent space raises it."""
    models = [model / model.norm() for model in spread(3)]
    cosine = cosines(inner_products([model.flatten() for model in models], 0))
    thirds = torch.full((3,), 1 / 3, dtype=torch.float64)
    u, steps, pull = mean_on_sphere(cosine, thirds, 100, 1e-12)
    assert 2 < steps < 100 and pull < 1e-12

    def cost(point: Tensor) -> float:
        return sum(float((point / point.norm() * model).sum().acos()) ** 2 for model in models)

    mean = sum(c * model for c, model in zip(u, models, strict=True))
    assert isinstance(mean, Tensor)
    for seed in range(20):
        step = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert cost(mean + 1e-3 * step) > cost(mean)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_or_several_equal_models_are_themselves(shape: tuple[int, ...]) -> None:
    (model,) = changes(shape, 1)
    assert torch.equal(merge.karcher([model]), model)
    torch.testing.assert_close(merge.karcher([model] * 3), model, atol=3e-8, rtol=3e-7)


def test_zeros_and_opposites() -> None:
    a, b = spread(2)
    zero = torch.zeros_like(a)
    assert torch.equal(merge.karcher([zero, zero]), zero)
    # a zero has no direction but counts in the mean of the norms
    torch.testing.assert_close(merge.karcher([a, zero, b]), merge.karcher([a, b]) * 2 / 3, atol=1e-12, rtol=0)
    # nothing lies between opposites: the first one's direction
    torch.testing.assert_close(merge.karcher([a, -3 * a]), 2 * a, atol=1e-12, rtol=0)
    torch.testing.assert_close(merge.karcher([a, b], [0, 1]), b, atol=1e-12, rtol=0)


def test_fine_tunes_of_one_base_have_their_linear_mean() -> None:
    base, *deltas = changes((64, 64), 4, size=1.0)
    models = [base + 0.02 * delta for delta in deltas]
    merged, mean = merge.karcher(models), merge.linear(models)
    # The mean of the norms over the norm of the mean: 1 + (1 - 1/3) 0.02^2 / 2. The models' own directions differ by 0.02.
    assert float(merged.norm() / mean.norm()) == pytest.approx(1 + 1.33e-4, abs=1e-5)
    assert float((merged / merged.norm() - mean / mean.norm()).norm()) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_parts_change_nothing(shape: tuple[int, ...], rows: int) -> None:
    tensors, method = changes(shape), Karcher(KarcherConfig())
    weights = [1.0, 2.0, 3.0]
    whole = method.merged(tensors, weights)
    torch.testing.assert_close(in_parts(method, tensors, rows, weights), whole, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([1, -1], {}, "none below 0"),
        ([0, 0], {}, "not all 0"),
        ([1, 1], {"max_iter": 0}, "max_iter must be 1 or more"),
        ([1, 1], {"tol": 0.0}, "tol must be above 0"),
    ],
)
def test_what_it_refuses(weights: list[float], options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge.karcher(changes((3, 2), 2), weights, **options)
