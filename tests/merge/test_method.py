"""What every merging method has from `Method`: numbers addressed by place, the function on tensors, its refusals."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import torch

import trimtab.merge
from trimtab import catalogue
from trimtab.errors import UsageError
from trimtab.merge import METHODS
from trimtab.merge.method import BLOCK, Part, Place, in_range, weighted_sum


def drawn(name: str, start: int, count: int, model: int = 0, seed: int = 0) -> torch.Tensor:
    place = Place(name, (10 * BLOCK,), (1.0, 1.0), seed)
    return Part(place, start, [torch.zeros(count)] * 2).uniform(model)


def test_random_numbers_depend_on_the_place_alone() -> None:
    """However a tensor is cut, across blocks too; and on tensor, parent and seed."""
    whole = drawn("a", 0, 2 * BLOCK + 100)
    for start, count in ((0, 1), (BLOCK - 1, 2), (5, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, 100), (77, 2 * BLOCK)):
        assert torch.equal(drawn("a", start, count), whole[start : start + count])
    for other in (
        drawn("b", 0, 100),
        drawn("a", 0, 100, model=1),
        drawn("a", 0, 100, seed=1),
        whole[BLOCK : BLOCK + 100],
    ):
        assert not torch.equal(other, whole[:100])
    assert drawn("a", 7, 0).shape == (0,)


def test_random_numbers_are_uniform() -> None:
    """2 x 65,536 draws: mean and correlation within five standard errors, all in [0, 1)."""
    one, two = drawn("a", 0, BLOCK), drawn("a", 0, BLOCK, model=1)
    assert one.dtype == torch.float32 and 0 <= float(one.min()) and float(one.max()) < 1
    assert abs(float(one.mean()) - 0.5) < 5 * (1 / 12 / BLOCK) ** 0.5
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 5 / BLOCK**0.5


def test_indices_are_those_of_the_whole_tensor() -> None:
    part = Part(Place("a", (6, 2), (1.0,)), 4, [torch.zeros(2, 2)])
    assert torch.equal(part.indices(), torch.tensor([[4, 5], [6, 7]]))


@pytest.mark.parametrize("slug", METHODS)
def test_every_method_is_a_function_whose_options_are_its_config(slug: str) -> None:
    function, method = getattr(trimtab.merge, slug.replace("-", "_")), catalogue.method(slug)
    options = {field.name: field.default for field in fields(method.Config)}
    known = inspect.signature(function).parameters
    assert {name: known[name].default for name in options} == options
    assert function.__doc__ and function.__name__ == slug.replace("-", "_")


@pytest.mark.parametrize("slug", METHODS)
def test_tensors_that_are_given_stay_as_they_are(slug: str) -> None:
    chance = torch.Generator().manual_seed(0)
    tensors = [torch.randn(8, 6, generator=chance) for _ in range(2)]
    before = [tensor.clone() for tensor in tensors]
    merged = getattr(trimtab.merge, slug.replace("-", "_"))(tensors)
    assert merged.shape == (8, 6) and torch.isfinite(merged).all()
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))
    assert all(merged.data_ptr() != tensor.data_ptr() for tensor in tensors)


@pytest.mark.parametrize("slug", METHODS)
def test_a_tensor_without_entries_merges_to_one_without_entries(slug: str) -> None:
    for shape in ((0, 5), (5, 0), (0,)):
        assert getattr(trimtab.merge, slug.replace("-", "_"))([torch.zeros(shape)] * 2).shape == shape


def test_what_cannot_be_merged_is_said() -> None:
    two = [torch.zeros(2), torch.zeros(2)]
    with pytest.raises(UsageError, match="different shapes"):
        trimtab.merge.linear([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(UsageError, match="3 weights for 2 models"):
        trimtab.merge.linear(two, [1, 1, 1])
    with pytest.raises(UsageError, match="at least 1"):
        trimtab.merge.linear([])
    with pytest.raises(UsageError, match="density.*3 values for 2 models"):
        trimtab.merge.ties(two, density=(0.1, 0.2, 0.3))
    with pytest.raises(UsageError, match=r"unknown.*densty.*density"):
        trimtab.merge.ties(two, densty=0.3)
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="ties: density must be between 0 and 1"):
            in_range("ties", "density", [0.5, value], 0, 1)


def test_weighted_sum_is_in_place_in_the_first() -> None:
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), torch.tensor([4.0, 8.0])]
    total = weighted_sum(tensors, [2.0, 0.5, -0.25])
    assert total is tensors[0] and torch.equal(total, torch.tensor([6.0, 12.0]))


def test_one_tensor_is_no_list_of_tensors() -> None:
    """Its rows would be taken for models."""
    with pytest.raises(UsageError, match="ties: give a list of tensors, one a model"):
        trimtab.merge.ties(torch.ones(2, 3))
