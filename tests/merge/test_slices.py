"""Slices: output layer i from layer j of each source, against merges worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from merge.stacked import read, shapes, stack, write
from trimtab.errors import UsageError
from trimtab.merge.engine import run
from trimtab.merge.recipe import Recipe
from trimtab.merge.schedule import layer_of
from trimtab.merge.slices import layers_in, mapped, rename, sliced_config
from trimtab.merge.source import Folder


def number(model: int) -> Any:
    """All entries of layer i of model m are 10 m + i; outside of layers 10 m + 9."""
    return lambda name: 10 * model + (9 if layer_of(name) is None else layer_of(name))


@pytest.fixture
def parents(tmp_path: Path) -> tuple[str, str, str]:
    """Models 1 and 2 of four layers, 3 of six."""
    return tuple(str(stack(tmp_path / f"m{m}", 6 if m == 3 else 4, number(m))) for m in (1, 2, 3))  # type: ignore[return-value]


def part(model: str, first: int, end: int) -> dict[str, Any]:
    return {"model": model, "layers": [first, end]}


def made(recipe: Recipe, out: Path) -> dict[str, float]:
    """What the entries of each tensor are; they are all the same."""
    run(recipe, out)
    assert all(tensor.unique().numel() == 1 for tensor in read(out).values())
    return {name: float(tensor.flatten()[0]) for name, tensor in read(out).items()}


def test_stacked_layers_are_those_of_their_sources(parents: tuple[str, str, str], tmp_path: Path) -> None:
    one, two, three = parents
    slices = [{"sources": [part(*x)]} for x in ((one, 0, 3), (three, 4, 6), (two, 1, 3))]
    found = made(Recipe("linear", parents, slices=slices), tmp_path / "out")
    want = [10, 11, 12, 34, 35, 21, 22]
    assert set(found) == set(shapes(7))
    for i, value in enumerate(want):
        assert {v for name, v in found.items() if layer_of(name) == i} == {value}
    assert found["model.embed_tokens.weight"] == 19  # as the first slice
    assert found["lm_head.weight"] == found["model.norm.weight"] == 29  # as the last
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 7


def test_weights_options_and_gradients_of_a_slice(parents: tuple[str, str, str], tmp_path: Path) -> None:
    one, two, three = parents
    slices = [
        # 0.25 m1 + 0.75 m2 and 0.75 m1 + 0.25 m2: the gradients run over these two layers alone
        {"sources": [part(one, 0, 2), part(two, 2, 4)], "weights": [[0.25, 0.75], [0.75, 0.25]]},
        # the recipe's weights 1 (m1) and 3 (m3); not normalized: 12 + 3 * 35
        {"sources": [part(one, 2, 3), part(three, 5, 6)], "options": {"normalize": False}},
    ]
    found = made(Recipe("linear", parents, weights=[1, 100, 3], slices=slices), tmp_path / "out")
    layer = [next(v for name, v in found.items() if layer_of(name) == i) for i in range(3)]
    assert layer == [0.25 * 10 + 0.75 * 22, 0.75 * 11 + 0.25 * 23, 12 + 3 * 35]
    assert found["model.embed_tokens.weight"] == 0.25 * 19 + 0.75 * 29
    assert found["lm_head.weight"] == 19 + 3 * 39


def test_differences_to_the_slices_own_layers_of_the_base(parents: tuple[str, str, str], tmp_path: Path) -> None:
    one, two, three = parents
    slices = [
        {"sources": [part(one, 1, 3)], "base": [0, 2]},
        {"sources": [part(one, 0, 1), part(two, 3, 4)], "base": [5, 6], "weights": [0.5, 1]},
        {"sources": [part(two, 2, 3)], "options": {"scale": 0.1}},  # of the base: the same layers
    ]
    recipe = Recipe("task-arithmetic", (one, two), three, weights=2, options={"scale": 1.0}, slices=slices)
    found = made(recipe, tmp_path / "out")
    layer = [next(v for name, v in found.items() if layer_of(name) == i) for i in range(4)]
    want = [30 + 2 * (11 - 30), 31 + 2 * (12 - 31), 35 + 0.5 * (10 - 35) + (23 - 35), 32 + 0.1 * 2 * (22 - 32)]
    assert layer == pytest.approx(want, abs=1e-5)


def test_each_option_of_the_recipe_goes_with_its_model(parents: tuple[str, str, str]) -> None:
    one, two, three = parents
    slices = [{"sources": [part(two, 0, 1)]}, {"sources": [part(one, 0, 1), part(two, 1, 2)]}]
    options = {"density": {"each": [0.1, [0.4, 0.6]]}, "scale": [{"filter": "mlp", "value": 2.0}]}
    recipe = Recipe("ties", (one, two), three, options=options, slices=slices)
    found = {m.name: m for m in mapped(recipe, [Folder(one), Folder(two)], Folder(three))}
    first, second = (found[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    assert first.options == {"density": (0.4,), "scale": 2.0} and first.names == (
        "",
        "model.layers.0.mlp.up_proj.weight",
    )
    assert second.options["density"] == (0.1, 0.4) and second.weights == (1.0, 1.0)
    assert "scale" not in found["model.layers.0.self_attn.q_proj.weight"].options


def test_without_slices_every_tensor_has_one_name(parents: tuple[str, str, str]) -> None:
    one, two, _ = parents
    found = mapped(Recipe("linear", (one, two), weights=[[0, 1], 0.5]), [Folder(one), Folder(two)], None)
    assert [m.name for m in found] == sorted(shapes(4)) and all(m.names == (m.name,) * 2 for m in found)
    weights = {m.name: m.weights for m in found}
    assert weights["model.layers.1.mlp.up_proj.weight"] == pytest.approx((1 / 3, 0.5))
    assert weights["lm_head.weight"] == (1, 0.5) and weights["model.embed_tokens.weight"] == (0, 0.5)


@pytest.mark.parametrize(
    ("slices", "said"),
    [
        ([("1", 0, 5)], r"slice 1: layers \[0, 5\] of '.*m1', which has 4"),
        ([("1", 0, 2), ("3", 5, 7)], r"slice 2: layers \[5, 7\] of '.*m3', which has 6"),
    ],
)
def test_layers_that_a_model_lacks(
    slices: list[tuple[str, int, int]], said: str, parents: tuple[str, str, str], tmp_path: Path
) -> None:
    given = [{"sources": [part(parents[int(m) - 1], first, end)]} for m, first, end in slices]
    with pytest.raises(UsageError, match=said):
        run(Recipe("linear", parents, slices=given), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_of_other_shapes_are_named_before_anything_is_written(
    parents: tuple[str, str, str], tmp_path: Path
) -> None:
    wide = {name: torch.ones(*shape[:-1], 5) for name, shape in shapes(4).items()}
    other = str(write(tmp_path / "wide", wide, 4))
    slices = [{"sources": [part(parents[0], 0, 2)]}, {"sources": [part(parents[0], 2, 4), part(other, 0, 2)]}]
    with pytest.raises(UsageError) as error:
        run(Recipe("linear", (parents[0], other), slices=slices), tmp_path / "out")
    assert "model.layers.0.mlp.up_proj.weight" in str(error.value) and "(8, 5)" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_merge_of_all_layers_as_one_slice_is_the_merge_without_slices(tmp_path: Path) -> None:
    models = tuple(str(stack(tmp_path / f"r{seed}", 3, seed=seed)) for seed in range(2))
    base = str(stack(tmp_path / "base", 3, seed=9))
    plain = Recipe("ties", models, base, [[0.2, 0.8], 1.0], {"density": [0.3, 0.9]})
    slices = [{"sources": [part(model, 0, 3) for model in models]}]
    run(plain, tmp_path / "plain")
    run(Recipe("ties", models, base, plain.weights, plain.options, slices=slices), tmp_path / "sliced")
    one, two = read(tmp_path / "plain"), read(tmp_path / "sliced")
    assert all(torch.equal(one[name], two[name]) for name in shapes(3))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "many", True, [0.1, float("nan")], {"each": [1, 2]}])
def test_weights_that_are_none(weight: Any, parents: tuple[str, str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="weights"):
        run(Recipe("linear", parents[:2], weights=[weight, 1.0]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lists_of_one_value_a_layer_follow() -> None:
    recipe = Recipe(
        "linear", ("a", "b"), slices=[{"sources": [part("a", 0, 2)]}, {"sources": [part("b", 1, 2)], "base": [2, 3]}]
    )
    config = {"num_hidden_layers": 3, "layer_types": ["x", "y", "z"], "other": [1, 2, 3], "rope": {"layers": 3}}
    out = sliced_config(config, recipe.parsed_slices(), based=False)
    assert out == {**config, "layer_types": ["x", "y", "y"]}
    assert sliced_config(config, recipe.parsed_slices(), based=True)["layer_types"] == ["x", "y", "z"]
    inner = sliced_config({"text_config": {"num_hidden_layers": 9}}, recipe.parsed_slices(), False)
    assert inner == {"text_config": {"num_hidden_layers": 3}}


def test_names() -> None:
    assert rename("model.layers.3.experts.7.w", 12) == "model.layers.12.experts.7.w"
    assert rename("lm_head.weight", 12) == "lm_head.weight"
    assert layers_in(["h.0.a", "h.11.b", "x"]) == 12 and layers_in(["x"]) == 1
