"""Task arithmetic: the weighted sum of changes, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from merge.parents import SHAPES, changes, gain, in_parts, part_sizes
from trimtab import merge
from trimtab.errors import UsageError
from trimtab.merge.methods.task_arithmetic import TaskArithmetic, TaskArithmeticConfig


@pytest.mark.parametrize(("normalize", "scale"), [(False, 1.0), (True, 0.4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_weighted_sum(shape: tuple[int, ...], normalize: bool, scale: float) -> None:
    deltas, weights = changes(shape, size=1.0), (0.5, 2.0, -0.25)
    expected = scale * sum(w * delta.numpy().astype(np.float64) for delta, w in zip(deltas, weights, strict=True))
    expected = expected / 2.25 if normalize else expected
    found = merge.task_arithmetic(deltas, weights, normalize=normalize, scale=scale)
    assert np.abs(found.numpy() - expected).max() < 1e-6  # some roundings of values below 8 in float32


@pytest.mark.parametrize("shape", SHAPES)
def test_it_does_not_depend_on_the_parts(shape: tuple[int, ...]) -> None:
    deltas, method = changes(shape), TaskArithmetic(TaskArithmeticConfig(scale=0.7))
    for rows in part_sizes(shape):
        assert torch.equal(in_parts(method, deltas, rows, (0.2, 0.5, 1.0)), method.merged(deltas, (0.2, 0.5, 1.0)))


def test_limits() -> None:
    base, model = changes((64, 33), 2, size=1.0)
    assert (base + merge.task_arithmetic([model - base]) - model).abs().max() < 1e-6  # one: the model itself
    assert not merge.task_arithmetic(changes((5, 3)), scale=0.0).any()  # scale 0: the base itself
    models = changes((64, 33), 3, seed=1, size=1.0)
    weights = (0.5, 0.7, -0.2)  # they sum to 1
    found = base + merge.task_arithmetic([model - base for model in models], weights, normalize=True)
    assert (found - merge.linear(models, weights)).abs().max() < 1e-6
    deltas = changes((5, 3))
    assert torch.equal(merge.task_arithmetic(deltas, (-1, -1, -1)), -merge.task_arithmetic(deltas))


def test_a_mean_with_weights_that_sum_to_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="task-arithmetic: the weights sum to 0"):
        merge.task_arithmetic(changes((3,), 2), (1.0, -1.0), normalize=True)
    first, second = changes((3,), 2)
    assert torch.equal(merge.task_arithmetic([first, second], (1.0, -1.0)), first - second)


def test_adding_up_keeps_more_of_three_skills_than_the_mean() -> None:
    assert gain(lambda deltas, _: merge.task_arithmetic(deltas, scale=0.6), lambda deltas, _: merge.linear(deltas)) > 0
