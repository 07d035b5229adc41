"""What is refused before a byte is written, all of it at once, and what is only said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from merge_folders import config_of, merge, reconfigure, refused, rewrite, save, tensors
from trimtab.errors import UsageError
from trimtab.merge import Recipe, run
from trimtab.merge.plan import make_plan

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return save(tmp_path / "a"), save(tmp_path / "b", seed=1)


def linear(capsys: pytest.CaptureFixture[str], out: Path, *models: Path) -> str:
    return refused(capsys, out, "linear", "--models", *models)


def test_all_problems_of_all_parents_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = save(tmp_path / "a")
    lacking, other, tied = save(tmp_path / "b"), save(tmp_path / "c"), save(tmp_path / "d", tie_word_embeddings=True)
    rewrite(lacking, model__norm__weight=None)
    rewrite(other, model__norm__weight=torch.ones(33), model__layers__0__mlp__up_proj__weight=torch.ones(1, 2))
    words = ["--models", a, lacking, other, tied, tmp_path / "gone", "--density", "0.5"]
    line = refused(capsys, tmp_path / "out", "ties", *words)
    assert "give --base" in line and "gone" in line
    assert f"'{lacking}' lacks the tensor '{NORM}'" in line
    assert "(32,)" in line or "(48, 32)" in line
    assert "--untie" in line
    assert line.startswith("trimtab: 5 problems: (1) ")


def test_methods_that_need_a_base_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: Any) -> None:
    line = refused(capsys, tmp_path / "out", "task-arithmetic", "--models", *pair)
    assert line == "trimtab: task-arithmetic merges differences to a base: give --base"


def test_missing_and_extra_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: Any) -> None:
    a, b = pair
    rewrite(b, model__layers__1__mlp__up_proj__weight=None)
    line = linear(capsys, tmp_path / "out", a, b)
    assert f"'{b}' lacks the tensor 'model.layers.1.mlp.up_proj.weight' that '{a}' has" in line
    line = linear(capsys, tmp_path / "out", b, a)
    assert f"'{b}' lacks the tensor" in line


def test_shapes_name_the_tensor_and_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save(tmp_path / "a"), save(tmp_path / "b", intermediate_size=40)
    line = linear(capsys, tmp_path / "out", a, b)
    assert "'model.layers.0.mlp.down_proj.weight' has the shape (32, 48)" in line and "(32, 40)" in line
    assert "(and 5 more tensors differ so)" in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers 2 in"),
        ({"hidden_size": 16}, "hidden_size 32 in"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, "num_attention_heads 4 in"),
    ],
)
def test_other_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, int], said: str) -> None:
    """Heads of another width have tensors of the same shapes, and mean something else."""
    a, b = save(tmp_path / "a"), save(tmp_path / "b", **change)
    assert said in linear(capsys, tmp_path / "out", a, b)


def test_other_layer_counts_have_a_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save(tmp_path / "a"), save(tmp_path / "b", num_hidden_layers=3)
    line = linear(capsys, tmp_path / "out", a, b)
    assert "'slices' in a recipe" in line and "lacks 9 tensors, first 'model.layers.2.input_layernorm.weight'" in line
    slices = [{"sources": [{"model": str(a), "layers": [0, 2]}, {"model": str(b), "layers": [1, 3]}]}]
    run(Recipe("linear", (str(a), str(b)), slices=slices), tmp_path / "sliced")
    name = "model.layers.0.mlp.up_proj.weight"
    mean = (tensors(a)[name] + tensors(b)["model.layers.1.mlp.up_proj.weight"]) / 2
    assert torch.equal(tensors(tmp_path / "sliced")[name], mean)


def test_other_architectures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save(tmp_path / "a"), save(tmp_path / "b", arch="mistral")
    line = linear(capsys, tmp_path / "out", a, b)
    assert "model_type llama in" in line and "mistral" in line
    # Everything else that differs follows from that: advice on heads and tensors would mislead.
    line = linear(capsys, tmp_path / "out", a, save(tmp_path / "c", arch="gpt2"))
    assert "gpt2" in line and "problems" not in line and "--untie" not in line


def test_dtypes_that_differ_need_a_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1, dtype=torch.bfloat16)
    line = linear(capsys, tmp_path / "out", a, b)
    assert "is float32 in" in line and "bfloat16 in" in line and "give --dtype float32 or bfloat16" in line
    line = linear(capsys, tmp_path / "out", a, b, save(tmp_path / "c", dtype=torch.float16))
    assert "problems" not in line and "give --dtype float32 or bfloat16 or float16" in line  # one option mends all
    code, said = merge(capsys, "linear", "--models", a, b, "--dtype", "float16", "--out", tmp_path / "out")
    assert code == 0, said
    found = tensors(tmp_path / "out")
    mean = (tensors(a)[EMBEDDING] + tensors(b)[EMBEDDING].float()) / 2
    assert torch.equal(found[EMBEDDING], mean.half()) and config_of(tmp_path / "out")["dtype"] == "float16"


def test_quantised_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: Any) -> None:
    a, b = pair
    reconfigure(b, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "is quantised (gptq)" in linear(capsys, tmp_path / "out", a, b)
    reconfigure(b, quantization_config=None)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        rewrite(b, model__layers__0__mlp__up_proj__weight=torch.zeros(48, 32).to(dtype))
        line = linear(capsys, tmp_path / "out", a, b)
        assert "is quantised ('model.layers.0.mlp.up_proj.weight' is stored as" in line


# Tied heads


def test_all_tied_stay_tied(tmp_path: Path) -> None:
    a = save(tmp_path / "a", tie_word_embeddings=True)
    b = save(tmp_path / "b", seed=1, tie_word_embeddings=True)
    rewrite(b, lm_head__weight=tensors(b)[EMBEDDING].clone())  # a copy in the file
    plan = make_plan(Recipe("linear", (str(a), str(b))))
    assert not plan.warnings
    run(Recipe("linear", (str(a), str(b))), tmp_path / "out")
    assert HEAD not in tensors(tmp_path / "out") and config_of(tmp_path / "out")["tie_word_embeddings"] is True
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, (tensors(a)[EMBEDDING] + tensors(b)[EMBEDDING]) / 2)


def test_a_copy_that_is_none_is_said(tmp_path: Path) -> None:
    a = save(tmp_path / "a", tie_word_embeddings=True)
    rewrite(a, lm_head__weight=tensors(a)[EMBEDDING] + 1)
    (warning,) = make_plan(Recipe("linear", (str(a),))).warnings
    assert f"'{a}' holds 'lm_head.weight' though" in warning


@pytest.mark.parametrize("first", ["tied", "own"])
def test_tied_against_untied(tmp_path: Path, capsys: pytest.CaptureFixture[str], first: str) -> None:
    tied, own = save(tmp_path / "tied", seed=1, tie_word_embeddings=True), save(tmp_path / "own")
    models = [tied, own] if first == "tied" else [own, tied]
    line = linear(capsys, tmp_path / "out", *models)
    assert f"'{tied}' shares its head" in line and f"'{own}' has its own 'lm_head.weight': give --untie" in line
    code, said = merge(capsys, "linear", "--models", *models, "--untie", "--out", tmp_path / "out")
    assert code == 0, said
    found = tensors(tmp_path / "out")
    assert torch.equal(found[HEAD], (tensors(own)[HEAD] + tensors(tied)[EMBEDDING]) / 2)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, found[HEAD]) and not torch.equal(found[HEAD], found[EMBEDDING])


def test_a_config_that_does_not_say(tmp_path: Path) -> None:
    """Older configs leave the key away where it is their kind's default: the files then tell."""
    a, b = save(tmp_path / "a", arch="gpt2"), save(tmp_path / "b", arch="gpt2", seed=1)
    for folder in (a, b):
        config = config_of(folder)
        del config["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(config))
    wte = "transformer.wte.weight"
    rewrite(b, lm_head__weight=tensors(b)[wte].clone())
    run(Recipe("linear", (str(a), str(b))), tmp_path / "out")
    assert HEAD not in tensors(tmp_path / "out") and config_of(tmp_path / "out")["tie_word_embeddings"] is True


def test_a_head_that_is_missing_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = save(tmp_path / "a")
    rewrite(a, lm_head__weight=None)
    assert "lacks a head (lm_head.weight)" in linear(capsys, tmp_path / "out", a)


def test_names_without_the_outermost_module(tmp_path: Path) -> None:
    """GPT-2's own files leave "transformer." away, and hold masks that no model needs."""
    a, b = save(tmp_path / "a", arch="gpt2"), save(tmp_path / "b", arch="gpt2", seed=1)
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors(b).items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(2)}
    save_file({**short, **masks}, b / "model.safetensors")
    run(Recipe("linear", (str(a), str(b))), tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert found.keys() == tensors(a).keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, (tensors(a)[name] + short[name.removeprefix("transformer.")]) / 2)


# What is only said


def test_settings_that_change_the_function_are_said(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1, rms_norm_eps=1e-3)
    reconfigure(b, rope_parameters={"rope_theta": 500000.0, "rope_type": "default"}, max_position_embeddings=128)
    (warning,) = make_plan(Recipe("linear", (str(a), str(b)))).warnings
    assert "rms_norm_eps is 1e-06" in warning and "500000" in warning and "max_position" not in warning


def test_older_and_newer_configs_of_one_model_do_not_differ(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1)
    config = config_of(b)
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config |= {"rope_scaling": None, "torch_dtype": config.pop("dtype"), "transformers_version": "4.40.0"}
    (b / "config.json").write_text(json.dumps(config))
    assert make_plan(Recipe("linear", (str(a), str(b)))).warnings == []


def test_a_filter_that_fits_no_tensor_is_said(pair: Any) -> None:
    a, b = map(str, pair)
    weights = [[{"filter": "self_attn", "value": 1}, {"filter": "self_atn", "value": 2}, {"value": 3}], 1]
    (warning,) = make_plan(Recipe("linear", (a, b), weights=weights)).warnings
    assert warning == "weights: no tensor's name contains 'self_atn', so that filter is not used"


def test_one_model_twice_and_zero_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: Any) -> None:
    a, b = pair
    same = save(tmp_path / "same")
    code, said = merge(capsys, "linear", "--models", a, a, b, "--out", tmp_path / "out")
    assert code == 0 and f"warning: the model '{a}' is given twice" in said
    assert torch.allclose(tensors(tmp_path / "out")[NORM], (2 * tensors(a)[NORM] + tensors(b)[NORM]) / 3, rtol=1e-6)
    assert any("one and the same" in one for one in make_plan(Recipe("linear", (str(a), str(same)))).warnings)
    code, said = merge(capsys, "ties", "--models", same, b, "--base", a, "--out", tmp_path / "zero")
    assert code == 0 and f"'{same}' seems to be the base '{a}': its differences are all zero" in said
    warnings = make_plan(Recipe("ties", (str(a), str(a)), base=str(a))).warnings
    assert len(warnings) == len(set(warnings)) == 2  # each is said once
    # The base as a model of a method without differences is a parent like any other.
    assert make_plan(Recipe("linear", (str(a), str(b)), base=str(same))).warnings == []


@pytest.mark.parametrize("method", ["linear", "task-arithmetic", "ties", "dare", "della", "sce", "tsvm"])
def test_a_merge_of_one_is_that_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, pair: Any) -> None:
    """base + (m - base) in float32: two roundings of values below 4. tsvm decomposes and rebuilds the difference."""
    a, b = pair
    words = [
        "--models",
        b,
        *(["--base", a] if method != "linear" else []),
        *(["--density", "1"] if method == "dare" else []),
    ]
    words += ["--density", "1", "--epsilon", "0"] if method == "della" else []
    code, said = merge(capsys, method, *words, "--out", tmp_path / "out")
    assert code == 0, said
    for name, tensor in tensors(tmp_path / "out").items():
        assert torch.allclose(tensor, tensors(b)[name], rtol=0, atol=2e-5 if method == "tsvm" else 1e-6), name


def test_parents_that_are_all_the_same_give_themselves(tmp_path: Path) -> None:
    a = save(tmp_path / "a")
    run(Recipe("linear", (str(a), str(a), str(a))), tmp_path / "out")
    for name, tensor in tensors(tmp_path / "out").items():
        assert torch.allclose(tensor, tensors(a)[name], rtol=3e-7, atol=0), name  # three products, two sums
    run(Recipe("ties", (str(a), str(a)), str(a)), tmp_path / "base")
    assert all(torch.equal(tensor, tensors(a)[name]) for name, tensor in tensors(tmp_path / "base").items())


def test_counts_weights_and_options_are_checked_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: Any
) -> None:
    a, b = pair
    out = tmp_path / "out"
    assert "slerp merges two models, not 3" in refused(capsys, out, "slerp", "--models", a, b, a)
    line = refused(capsys, out, "linear", "--models", a, b, "--weights", "1", "2", "3")
    assert "3 weights for 2 models" in line and "problems" not in line
    line = refused(capsys, out, "linear", "--models", a, b, "--weights", "1", "-1")
    assert "the weights sum to 0" in line and "--normalize false" in line and "problems" not in line
    line = refused(capsys, out, "ties", "--models", a, b, "--base", a, "--density", "1.5", "--dtype", "int4")
    assert "unknown dtype 'int4'" in line
    line = refused(capsys, out, "ties", "--models", a, b, "--base", a, "--density", "1.5")
    assert "density must be between 0 and 1" in line and "problems" not in line
    with pytest.raises(UsageError, match="unknown merging method 'tie'; did you mean 'ties'"):
        make_plan(Recipe("tie", (str(a),)))


# NaN and infinity are met while merging


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: Any, value: float
) -> None:
    a, b = pair
    for folder, name in ((a, NORM), (b, "model.layers.1.mlp.up_proj.weight")):
        broken = tensors(folder)[name].clone()
        broken.view(-1)[-1] = value
        rewrite(folder, **{name: broken})
    line = linear(capsys, tmp_path / "out", a, b)
    assert "not finite" in line and f"'{a}' in '{NORM}'" in line and f"'{b}' in 'model.layers.1.mlp" in line
    line = refused(capsys, tmp_path / "out", "ties", "--models", b, "--base", a)
    assert "not finite" in line


def test_a_result_that_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: Any) -> None:
    a, b = pair
    words = ["task-arithmetic", "--models", b, "--base", a, "--weights", "1e6", "--dtype", "float16"]
    line = refused(capsys, tmp_path / "out", *words)
    assert "not finite in float16" in line and "--dtype float32" in line


def test_an_out_folder_that_holds_something_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: Any
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    code, said = merge(capsys, "linear", "--models", *pair, "--out", tmp_path / "full")
    assert code == 2 and "holds something else" in said
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
