"""mergekit's configurations: what they become, what their settings do, and what is refused by name.

Expected values are worked out by hand from mergekit's documentation and code; it is not imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from merge.stacked import read, shapes, stack
from trimtab.errors import UsageError
from trimtab.merge.engine import run
from trimtab.merge.mergekit import is_mergekit, read_mergekit
from trimtab.merge.mergekit_form import METHODS
from trimtab.merge.schedule import layer_of


def config(text: str) -> dict[str, Any]:
    found = yaml.safe_load(text)
    assert isinstance(found, dict) and is_mergekit(found)
    return found


TIES = """
models:
  - model: A
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: B
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
  - model: C
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: BASE
parameters: {normalize: true, int8_mask: true, lambda: 0.9}
dtype: float16
"""


def test_a_whole_configuration() -> None:
    found = read_mergekit(config(TIES))
    assert found.recipe.to_dict() == {
        "method": "ties",
        "models": ["A", "B", "C"],
        "base": "BASE",
        "weights": [1.0, [0, 0.3, 0.7, 1], [{"filter": "mlp", "value": 0.5}, {"value": 0}]],
        "options": {"normalize": True, "scale": 0.9, "density": {"each": [[1, 0.7, 0.1], 0.5, 0.33]}},
        "dtype": "float16",
        "depth": "mergekit",
    }
    assert any("int8_mask" in note for note in found.notes) and any("float16" in note for note in found.notes)


@pytest.mark.parametrize(
    ("theirs", "ours"), [(theirs, ours) for theirs, ours in METHODS.items() if theirs not in ("slerp", "passthrough")]
)
def test_every_methods_name_and_base(theirs: str, ours: str) -> None:
    models = "[{model: A, parameters: {weight: 0.4}}, {model: B, parameters: {weight: 0.6}}]"
    if theirs in ("karcher", "model_stock", "sce"):
        models = "[{model: A}, {model: B}]"
    base = "" if theirs in ("linear", "karcher") else "base_model: BASE\n"
    recipe = read_mergekit(config(f"merge_method: {theirs}\nmodels: {models}\n{base}")).recipe
    assert (recipe.method, recipe.models, recipe.base) == (ours, ("A", "B"), "BASE" if base else None)
    assert recipe.weights == (None if "weight" not in models else [0.4, 0.6])
    compat = {"dare", "dare-ties", "della", "della-linear", "breadcrumbs", "breadcrumbs-ties", "model-stock", "sce"}
    assert (recipe.options.get("compat") == "mergekit") is (ours in compat)


def test_settings_of_the_whole_come_after_those_of_a_model() -> None:
    text = """
    merge_method: task_arithmetic
    base_model: BASE
    models:
      - {model: A, parameters: {weight: [{filter: mlp, value: 0.1}]}}
      - {model: B}
    parameters: {weight: [{filter: attn, value: 0.2}, {value: 0.3}]}
    """
    recipe = read_mergekit(config(text)).recipe
    rest = [{"filter": "attn", "value": 0.2}, {"value": 0.3}]
    assert recipe.weights == [[{"filter": "mlp", "value": 0.1}, *rest], rest]


def test_a_model_without_a_density_keeps_all_of_its_change() -> None:
    density = "[{filter: mlp, value: 0.2}]"
    models = f"[{{model: A, parameters: {{weight: 1, density: {density}}}}}, {{model: B, parameters: {{weight: 1}}}}]"
    recipe = read_mergekit(config(f"merge_method: ties\nbase_model: X\nmodels: {models}")).recipe
    assert recipe.options["density"] == {"each": [[{"filter": "mlp", "value": 0.2}, {"value": 1.0}], 1.0]}


def test_the_base_among_the_models() -> None:
    """It is skipped where differences are merged, and is one of the models where weights are."""
    listed = "[{model: X, parameters: {weight: 5}}, {model: A, parameters: {weight: 1}}]"
    for method in ("ties", "task_arithmetic", "dare_linear"):
        found = read_mergekit(config(f"merge_method: {method}\nbase_model: X\nmodels: {listed}"))
        assert (found.recipe.models, found.recipe.base, found.recipe.weights) == (("A",), "X", [1])
        assert any("do nothing" in note for note in found.notes)
    mean = read_mergekit(config(f"merge_method: linear\nbase_model: X\nmodels: {listed}")).recipe
    assert (mean.models, mean.base, mean.weights) == (("X", "A"), None, [5, 1])
    added = read_mergekit(config("merge_method: linear\nbase_model: X\nmodels: [{model: A}]\nparameters: {weight: 2}"))
    assert added.recipe.models == ("A", "X") and added.recipe.weights == [2, 2]
    assert any("one more model" in note for note in added.notes)
    assert read_mergekit(config("merge_method: karcher\nbase_model: X\nmodels: [{model: A}]")).recipe.models == (
        "A",
        "X",
    )


@pytest.mark.parametrize("models", ["[{model: A}]", "[{model: A}, {model: X}]", "[{model: X}, {model: A}]"])
def test_slerp_goes_from_the_base(models: str) -> None:
    found = read_mergekit(config(f"merge_method: slerp\nbase_model: X\nmodels: {models}\nparameters: {{t: [0, 1]}}"))
    assert (found.recipe.models, found.recipe.base) == (("X", "A"), None)
    assert found.recipe.options == {"t": [0, 1]}


def test_numbers_that_yaml_reads_as_text() -> None:
    found = read_mergekit(config("merge_method: karcher\nmodels: [{model: A}, {model: B}]\nparameters: {tol: 1e-6}"))
    assert found.recipe.options == {"tol": 1e-6}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("A", "A"),
        ("A+LORA", "A+LORA"),
        ("{model: A, lora: LORA}", "A+LORA"),
        ("{model: {path: A}}", "A"),
        ("{model: {path: A}, lora: {path: L}}", "A+L"),
    ],
)
def test_models(given: str, wanted: str) -> None:
    recipe = read_mergekit(config(f"merge_method: karcher\nmodels: [{{model: {given}}}, {{model: Z}}]")).recipe
    assert recipe.models == (wanted, "Z")


@pytest.mark.parametrize(
    ("more", "tokenizer"),
    [
        ("tokenizer_source: union", "union"),
        ("tokenizer_source: base", "base"),
        ("tokenizer_source: A", "A"),
        ("tokenizer_source: X", "base"),
        ("tokenizer: {source: union}", "union"),
        ("tokenizer: {}", "union"),
        ("tokenizer: {source: X}", "base"),
        ("chat_template: auto", ""),
    ],
)
def test_tokenizers(more: str, tokenizer: str) -> None:
    text = f"merge_method: task_arithmetic\nbase_model: X\nmodels: [{{model: A, parameters: {{weight: 1}}}}]\n{more}"
    recipe = read_mergekit(config(text)).recipe
    assert (recipe.tokenizer, recipe.chat_template) == (tokenizer, "")


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [("", None), ("dtype: bfloat16", "bfloat16"), ("dtype: float32\nout_dtype: torch.float16", "float16")],
)
def test_dtypes(dtypes: str, wanted: str | None) -> None:
    assert read_mergekit(config(f"merge_method: karcher\nmodels: [{{model: A}}]\n{dtypes}")).recipe.dtype == wanted


def test_slices() -> None:
    text = """
    merge_method: ties
    base_model: X
    slices:
      - sources:
          - {model: X, layer_range: [0, 4]}
          - {model: A, layer_range: [2, 6], parameters: {weight: 0.5}}
        parameters: {density: 0.4}
      - sources:
          - {model: B, layer_range: [1, 3], parameters: {weight: 2, density: [0.1, 0.2]}}
          - {model: X, layer_range: [4, 6]}
    parameters: {density: 0.9, lambda: 0.7}
    """
    recipe = read_mergekit(config(text)).recipe
    assert recipe.models == ("A", "B") and recipe.base == "X" and recipe.options == {}
    assert recipe.slices == [
        {
            "sources": [{"model": "A", "layers": [2, 6]}], "base": [0, 4], "weights": [0.5],
            "options": {"scale": 0.7, "density": 0.4},
        },
        {
            "sources": [{"model": "B", "layers": [1, 3]}], "base": [4, 6], "weights": [2],
            "options": {"scale": 0.7, "density": [0.1, 0.2]},
        },
    ]  # fmt: skip


def test_stacked_layers_with_a_scale(tmp_path: Path) -> None:
    """passthrough: layers 0, 1 of A (1), then 2, 3 of B (2), its up_proj halved."""
    for m, name in enumerate("AB", 1):
        stack(tmp_path / name, 4, lambda _, m=m: m)
    text = f"""
    merge_method: passthrough
    slices:
      - sources: [{{model: {tmp_path}/A, layer_range: [0, 2]}}]
      - sources:
          - model: {tmp_path}/B
            layer_range: [2, 4]
            parameters: {{scale: [{{filter: up_proj, value: 0.5}}]}}
    """
    run(read_mergekit(config(text)).recipe, tmp_path / "out")
    found = {name: float(tensor.flatten()[0]) for name, tensor in read(tmp_path / "out").items()}
    assert set(found) == set(shapes(4))
    for name, value in found.items():
        layer = layer_of(name)
        from_a = layer in (0, 1) or name.startswith("model.embed")
        assert value == (1 if from_a else 1 if "up_proj" in name else 2), name


def test_an_adapter_on_a_model_of_its_own(tmp_path: Path) -> None:
    """A+L: A (1) and alpha / r B A = 8 / 2 * (1 * 0.5 + 1 * 0.5) = 4 in one matrix; half of the way from X (0)."""
    for name, value in (("X", 0), ("A", 1)):
        stack(tmp_path / name, 2, lambda _, value=value: value)
    target = "model.layers.1.self_attn.q_proj"
    (tmp_path / "L").mkdir()
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (tmp_path / "L" / "adapter_config.json").write_text(json.dumps(options))
    factors = {"lora_A": torch.full((2, 4), 0.5), "lora_B": torch.ones(4, 2)}
    save_file(
        {f"base_model.model.{target}.{k}.weight": v for k, v in factors.items()},
        tmp_path / "L" / "adapter_model.safetensors",
    )
    text = f"""
    merge_method: task_arithmetic
    base_model: {tmp_path}/X
    models: [{{model: {tmp_path}/A+{tmp_path}/L, parameters: {{weight: 0.5}}}}]
    """
    run(read_mergekit(config(text)).recipe, tmp_path / "out")
    found = {name: float(tensor.flatten()[0]) for name, tensor in read(tmp_path / "out").items()}
    assert found.pop(f"{target}.weight") == 0.5 * (1 + 4) and set(found.values()) == {0.5}


def test_gradients_as_there(tmp_path: Path) -> None:
    """o = 0 + w_A * 1 + w_B * 10: over layers from the first value to the last; the first also for the norm and the head."""
    for name, value in (("X", 0), ("A", 1), ("B", 10)):
        stack(tmp_path / name, 3, lambda _, value=value: value)
    text = f"""
    merge_method: task_arithmetic
    base_model: {tmp_path}/X
    models:
      - {{model: {tmp_path}/A, parameters: {{weight: [0.2, 0.8]}}}}
      - {{model: {tmp_path}/B, parameters: {{weight: [{{filter: mlp, value: [0, 0.5, 0.5]}}, {{value: 0.1}}]}}}}
    parameters: {{lambda: 2}}
    """
    run(read_mergekit(config(text)).recipe, tmp_path / "out")
    found = {name: float(tensor.flatten()[0]) for name, tensor in read(tmp_path / "out").items()}
    for name, value in found.items():
        depth = (layer_of(name) or 0) / 2
        b = min(2 * depth, 1) * 0.5 if "mlp" in name else 0.1
        assert value == pytest.approx(2 * (0.2 + 0.6 * depth + 10 * b), rel=1e-6), name
    assert found["lm_head.weight"] == pytest.approx(2 * (0.2 + 1), rel=1e-6)


BASE = "merge_method: ties\nbase_model: X\nmodels: [{model: A, parameters: {weight: 1}}]\n"
SLICE = "slices: [{sources: [{model: A, layer_range: [0, 1]}]"
LINEAR = "merge_method: linear\nmodels: [{model: A, parameters: {weight: 1}}]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base_model: X\nmodels: [{model: A}]", "needs merge_method"),
        ("merge_method: tie\nmodels: [{model: A}]", "did you mean 'ties'"),
        ("merge_method: arcee_fusion\nmodels: [{model: A}]", "arcee_fusion is not supported"),
        (BASE + "basemodel: Y", "did you mean 'base_model'"),
        (BASE + "modules: {text: {}}", "modules:"),
        (BASE + "slices: [{sources: [{model: A, layer_range: [0, 1]}]}]", "either 'models' or 'slices'"),
        ("merge_method: ties\nbase_model: X", "either 'models' or 'slices'"),
        ("merge_method: ties\nmodels: [{model: A}]", "needs base_model"),
        ("merge_method: ties\nbase_model: A\nmodels: [{model: A}]", "no model besides the base"),
        (BASE + "parameters: {densty: 0.3}", "did you mean 'density'"),
        (LINEAR + "parameters: {density: 0.3}", "linear has no parameter density"),
        (BASE + "parameters: {rescale: true}", "rescale"),
        (BASE + "parameters: {density: {filter: mlp}}", "has no value"),
        (BASE + "parameters: {density: [0.5, {value: 1}]}", "mixes filters and values"),
        (BASE + "parameters: {density: [{value: 1, fliter: mlp}]}", "did you mean 'filter'"),
        (BASE + "parameters: {density: []}", "empty list"),
        (BASE + "parameters: [1]", "KEY: VALUE"),
        (BASE + "dtype: float17", "did you mean"),
        (BASE + "dtype: int8", "unknown dtype"),
        (BASE + "tokenizer: {source: union, tokens: {x: {source: A}}}", "tokens is not supported"),
        (BASE + "tokenizer: {source: base, pad_to_multiple_of: 64}", "pad_to_multiple_of is not supported"),
        (BASE + "tokenizer: {sauce: base}", "did you mean 'source'"),
        (BASE + "tokenizer: union", "holds 'source'"),
        (BASE + "tokenizer: {}\ntokenizer_source: base", "either tokenizer_source or tokenizer"),
        (BASE + "tokenizer_source: Q", "unknown model as tokenizer source"),
        (BASE + "chat_template: chatml", "chat_template 'chatml' is not supported"),
        ("merge_method: ties\nbase_model: X\nmodels: [{modle: A}]", "is {model: FOLDER}"),
        ("merge_method: ties\nbase_model: X\nmodels: [{model: A, parameter: {}}]", "did you mean 'parameters'"),
        ("merge_method: ties\nbase_model: X\nmodels: {model: A}", "models is a list"),
        ("merge_method: ties\nbase_model: X\nmodels: [{model: A, parameters: {lambda: 1}}]", "not a parameter of one model"),
        ("merge_method: linear\nmodels: [{model: A}, {model: A}]", "listed twice"),
        ("merge_method: linear\nbase_model: X\nmodels: [{model: A, parameters: {weight: 1}}]", "for want of a weight"),
        ("merge_method: slerp\nbase_model: X\nmodels: [{model: A}]", "needs the parameter t"),
        ("merge_method: slerp\nbase_model: X\nmodels: [{model: A}, {model: B}]\nparameters: {t: 0.5}", "one other model"),
        ("merge_method: nuslerp\nbase_model: A\nmodels: [{model: A}, {model: B}]", "neither of them base_model"),
        ("merge_method: passthrough\nmodels: [{model: A}, {model: B}]", "one model a slice"),
        ("merge_method: passthrough\nbase_model: X\nmodels: [{model: A}]", "leave base_model out"),
        ("merge_method: karcher\nmodels: [{model: org/name@main}]", "revision"),
        ("merge_method: karcher\nmodels: [{model: {path: A, revision: main}}]", "revision"),
        ("merge_method: karcher\nmodels: [{model: {model: A, override_architecture: L}}]", "override_architecture"),
        ("merge_method: ties\nbase_model: X\n" + SLICE + "}]", "lacks base_model"),
        ("merge_method: karcher\nslices: [{sources: [{model: A}]}]", "needs layer_range"),
        ("merge_method: karcher\n" + SLICE + ", residual_weight: 1}]", "residual_weight"),
        ("merge_method: karcher\n" + SLICE + ", base_model: Y}]", "of its own"),
        ("merge_method: karcher\nslices: [{sources: [{model: A, layer_range: [1, 1]}]}]", "are none"),
    ],
)  # fmt: skip
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        read_mergekit(config(text))
    assert said in str(error.value)


@pytest.mark.parametrize("text", [BASE, LINEAR])
def test_what_the_refusals_started_from_is_good(text: str) -> None:
    assert read_mergekit(config(text)).recipe.models == ("A",)


def test_the_two_forms_are_told_apart() -> None:
    assert not is_mergekit({"method": "ties", "models": ["A"]}) and is_mergekit({"merge_method": "ties"})


def test_filters_that_leave_tensors_out() -> None:
    """mergekit stops at the first such tensor. A weight is 1 there, and that is said; a t is asked for."""
    head = "merge_method: linear\nmodels: [{model: A, parameters: {weight: [{filter: mlp, value: 2}]}}]"
    found = read_mergekit(config(head))
    assert found.recipe.weights == [[{"filter": "mlp", "value": 2}]] and any(
        "none of its filters" in n for n in found.notes
    )
    whole = read_mergekit(config(head.replace("value: 2}", "value: 2}, {value: 1}")))
    assert not whole.notes
    text = "merge_method: slerp\nbase_model: X\nmodels: [{model: A}]\nparameters: {t: [{filter: mlp, value: 0.1}]}"
    with pytest.raises(UsageError, match="t has filters alone"):
        read_mergekit(config(text))
    assert read_mergekit(config(text.replace("0.1}", "0.1}, {value: 0.5}"))).recipe.method == "slerp"


def test_what_does_nothing_there_is_said() -> None:
    text = "merge_method: nuslerp\nmodels: [{model: A}, {model: B}]\nparameters: {nuslerp_row_wise: true}"
    found = read_mergekit(config(text))
    assert found.recipe.options == {} and found.recipe.weights == [1.0, 1.0]
    assert any("row_wise" in note for note in found.notes) and any("no weight for A, B" in note for note in found.notes)
