"""Linear: the weighted mean, and its limits."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch

from merge.parents import SHAPES, changes, in_parts, lower_bound, part_sizes, planted, write_model
from trimtab import merge
from trimtab.errors import UsageError
from trimtab.merge.engine import run
from trimtab.merge.methods.linear import Linear, LinearConfig, normalized
from trimtab.merge.recipe import Recipe


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_weighted_mean(shape: tuple[int, ...], normalize: bool) -> None:
    models, weights = changes(shape, size=1.0), (0.5, 2.0, -0.25)
    expected = sum(weight * model.numpy().astype(np.float64) for model, weight in zip(models, weights, strict=True))
    expected = expected / 2.25 if normalize else expected
    found = merge.linear(models, weights, normalize=normalize)
    assert found.dtype == torch.float32 and found.shape == shape
    assert np.abs(found.numpy() - expected).max() < 1e-6  # some roundings of values below 8 in float32


@pytest.mark.parametrize("shape", SHAPES)
def test_it_does_not_depend_on_the_parts(shape: tuple[int, ...]) -> None:
    models = changes(shape)
    for rows in part_sizes(shape):
        assert torch.equal(in_parts(Linear(), models, rows, (0.2, 0.5, 1.0)), merge.linear(models, (0.2, 0.5, 1.0)))


def test_one_model_is_itself_and_the_parents_stay_as_they_are() -> None:
    models = changes((5, 3))
    kept = [model.clone() for model in models]
    assert torch.equal(merge.linear(models[:1], [3.0]), models[0])
    merge.linear(models)
    assert all(torch.equal(model, one) for model, one in zip(models, kept, strict=True))


def test_float64_stays_and_bfloat16_is_summed_in_float32() -> None:
    models = [model.double() for model in changes((5, 3))]
    assert merge.linear(models).dtype == torch.float64
    halves = [model.bfloat16() for model in models]
    expected = torch.stack([half.float() for half in halves]).mean(0)
    assert (merge.linear(halves) - expected).abs().max() < 1e-7  # bfloat16 sums would be off by some 1e-3


def test_weights_that_sum_to_zero_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="linear: the weights sum to 0, so there is no mean: .* --normalize false"):
        merge.linear(changes((3,), 2), (1.0, -1.0))
    assert torch.isfinite(merge.linear(changes((3,), 2), (1.0, -1.0), normalize=False)).all()
    with pytest.raises(UsageError, match="slug: the weights sum to"):
        normalized("slug", (0.1, 0.2, -0.3))  # not exactly 0 in floating point
    # a gradient over depth whose middle layer has weights 1 and -1
    models = []
    for number, weight in enumerate(changes((4,), 2)):
        tensors = {f"model.layers.{layer}.w": weight.clone() for layer in range(3)}
        models.append(str(write_model(tmp_path / str(number), tensors)))
    recipe = Recipe("linear", tuple(models), weights=[[2.0, 0.0], -1.0])
    with pytest.raises(UsageError, match="sum to 0"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mean_of_three_attempts_is_better_than_the_mean_attempt() -> None:
    differences = []
    for seed in range(20):
        found, learned = planted(seed)
        truth = learned[0]
        attempts = [truth + one - own for one, own in zip(found, learned, strict=True)]  # the same goal, other noise
        merged = Linear(LinearConfig()).merged(attempts)
        losses = [float(((attempt - truth) ** 2).mean()) for attempt in attempts]
        differences.append(mean(losses) - float(((merged - truth) ** 2).mean()))
    assert lower_bound(differences) > 0
