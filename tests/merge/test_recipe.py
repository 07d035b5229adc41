"""Recipes: what is read is what was written, and everything that is none is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import UsageError
from trimtab.merge.recipe import Recipe, read_yaml

FULL = Recipe(
    "dare-ties", ("runs/a", "ein Ordner/ü"), "base", [0.5, [0.1, 0.9]],
    {"density": [{"filter": "mlp", "value": {"each": [0.3, [0.2, 0.4]]}}, {"value": 0.5}], "scale": 0.7},
    "bfloat16", "float64", "500MB", "union", "none", True, 7,
    [{"sources": [{"model": "runs/a", "layers": [0, 2]}], "base": [1, 3], "weights": [2.0], "options": {"scale": 1.5}}],
    "mergekit",
)  # fmt: skip


@pytest.mark.parametrize("recipe", [FULL, Recipe("linear", ("a",))])
def test_yaml_and_dict_give_the_recipe_back(recipe: Recipe, tmp_path: Path) -> None:
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    path = tmp_path / "merge.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_dict(read_yaml(path)) == recipe
    assert Recipe.from_dict(read_yaml(path)).to_yaml() == recipe.to_yaml()


def test_what_is_at_its_default_is_left_out() -> None:
    assert Recipe("ties", ("a", "b"), base="x").to_dict() == {"method": "ties", "models": ["a", "b"], "base": "x"}


@pytest.mark.parametrize(
    ("size", "nbytes"), [("5GB", 5e9), ("500 MB", 5e8), ("1.5k", 1500), ("300", 300), ("2T", 2e12), ("7b", 7)]
)
def test_sizes(size: str, nbytes: float) -> None:
    assert Recipe("linear", ("a",), max_shard_size=size).shard_bytes == int(nbytes)


GOOD = {"method": "ties", "models": ["a", "b"], "base": "x"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": ["a"]}, "did you mean 'models'"),
        ({"models": "abc"}, "is a list of models"),
        ({"models": []}, "needs models"),
        ({"models": None}, "needs 'models'"),
        ({"method": 3}, "is a name"),
        ({"options": [0.3]}, "KEY: VALUE"),
        ({"dtype": "bfloat"}, "did you mean 'bfloat16'"),
        ({"work_dtype": "float16"}, "work dtype"),
        ({"depth": "mergekid"}, "did you mean 'mergekit'"),
        ({"untie": "yes"}, "true or false"),
        ({"seed": 1.5}, "whole number"),
        ({"seed": True}, "whole number"),
        ({"max_shard_size": "5 parsecs"}, "no size"),
        ({"max_shard_size": "0GB"}, "no size"),
        ({"slices": {}}, "is a list"),
        ({"slices": []}, "is a list"),
        ({"slices": [{"sources": []}]}, "needs 'sources'"),
        ({"slices": [{"sources": [{"model": "a"}]}]}, "a source is"),
        ({"slices": [{"sources": [{"model": "c", "layers": [0, 1]}]}]}, "unknown model in slice 1"),
        ({"slices": [{"sources": [{"model": "a", "layers": [0, 1]}], "weigths": [1]}]}, "did you mean 'weights'"),
        ({"slices": [{"sources": [{"model": "a", "layers": [0, 1]}], "options": [1]}]}, "options holds KEY: VALUE"),
        ({"slices": [{"sources": [{"model": "a", "layers": [2, 2]}]}]}, "are none"),
        ({"slices": [{"sources": [{"model": "a", "layers": [0, 1.0]}]}]}, "two whole numbers"),
        ({"slices": [{"sources": [{"model": "a", "layers": [0, 1]}], "weights": [1, 2]}]}, "2 weights for 1"),
        ({"slices": [{"sources": [{"model": m, "layers": [0, 1]} for m in "aa"]}]}, "one model twice"),
        (
            {"slices": [{"sources": [{"model": m, "layers": [0, n]} for m, n in (("a", 1), ("b", 2))]}]},
            "as many layers",
        ),
    ],
)
def test_what_is_no_recipe(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        Recipe.from_dict({key: value for key, value in {**GOOD, **changed}.items() if value is not None})
    assert said in str(error.value)


def test_a_recipe_as_given_is_good() -> None:
    assert Recipe.from_dict(GOOD).base == "x"  # so the refusals above are of what was changed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: ties\nmethod: linear\n", "given twice"),
        ("a: {b: 1, b: 2}\n", "given twice"),
        ("? [a, b]\n: 1\n", "a key is a word"),
        ("- a\n- b\n", "no KEY: VALUE pairs"),
        ("", "no KEY: VALUE pairs"),
        ("a: [1, 2\nb: 3\n", "line 2"),
        ("a: !!python/object/apply:os.system ['touch SEEN']\n", "no YAML that can be read"),
        ("{" * 1500, "no YAML that can be read"),
    ],
)
def test_yaml_that_is_none(text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_yaml(path)
    assert said in str(error.value) and not (tmp_path / "SEEN").exists()


def test_a_file_that_is_not_there_or_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_yaml(tmp_path / "nothing.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UsageError, match="no UTF-8"):
        read_yaml(tmp_path / "x.yaml")
