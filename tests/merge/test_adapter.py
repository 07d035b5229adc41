"""LoRA adapters as parents: equal to peft's own folding, refused where they are more than a sum."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge_folders import config_of, merge, refused, save, tensors
from tiny import tiny_model, tiny_tokenizer
from trimtab.errors import UsageError
from trimtab.merge import Recipe, run
from trimtab.merge.adapter import Adapter, open_source
from trimtab.merge.source import Folder

peft = pytest.importorskip("peft", reason="needs peft, the oracle of adapters")
pytestmark = pytest.mark.filterwarnings("ignore")  # of peft, which advises its own users

# Both sum in float32: one rounding each of W + s BA, in another order. Weights here are below 4, so 1e-6 is a few of them.
TOLERANCE = 1e-6
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 12}),
    "rslora": ("llama", {"target_modules": ["v_proj"], "r": 4, "lora_alpha": 12, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"], "r": 4, "lora_alpha": 4,
            "rank_pattern": {"k_proj": 2, "layers.1.self_attn.q_proj": 7}, "alpha_pattern": {r".*\.0\.mlp\.up_proj": 31},
        },
    ),
    "all biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "its biases": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "up_proj", "norm"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "gate_proj"], "r": 5}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "square conv1d": ("gpt2", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True, "bias": "all"}),
}  # fmt: skip


def adapter(tmp_path: Path, arch: str, seed: int = 0, base: str | None = "base", **options: Any) -> dict[str, Any]:
    """A base and a random adapter of it under `tmp_path`; returns what peft folds them to."""
    if not (tmp_path / "base").exists():
        save(tmp_path / "base", arch=arch)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(tiny_model(arch, vocab_size=59), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / base) if base else None
    model.save_pretrained(tmp_path / "adapter")
    return dict(model.merge_and_unload().state_dict())


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(tmp_path: Path, case: str) -> None:
    arch, options = CASES[case]
    folded = adapter(tmp_path, arch, **options)
    found = open_source(tmp_path / "adapter")
    base = tensors(tmp_path / "base")
    assert isinstance(found, Adapter) and found.entries.keys() == base.keys()
    changed = 0
    for name, entry in found.entries.items():
        whole = found.read(name).to(base[name].dtype)
        assert torch.allclose(whole, folded[name], rtol=0, atol=TOLERANCE), name
        changed += not torch.equal(whole, base[name])
        # By rows: the same sums, though a matrix product may add them up in another order.
        if entry.shape:
            cuts = [found.read(name, start, start + 7).to(whole.dtype) for start in range(0, entry.shape[0], 7)]
            assert torch.allclose(torch.cat(cuts), whole, rtol=0, atol=TOLERANCE), name
    assert changed >= len(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"])


def test_a_merge_of_adapters_is_the_merge_of_what_they_fold_to(tmp_path: Path) -> None:
    folded = adapter(tmp_path, "llama", target_modules=["q_proj", "down_proj"])
    (tmp_path / "adapter").rename(tmp_path / "one")
    other = adapter(tmp_path, "llama", seed=1, target_modules=["q_proj"])
    base = tensors(tmp_path / "base")
    recipe = Recipe(
        "task-arithmetic", (str(tmp_path / "one"), str(tmp_path / "adapter")), str(tmp_path / "base"), [0.5, 2.0]
    )
    run(recipe, tmp_path / "out")
    for name, tensor in tensors(tmp_path / "out").items():
        wanted = base[name] + 0.5 * (folded[name] - base[name]) + 2 * (other[name] - base[name])
        assert torch.allclose(tensor, wanted, rtol=0, atol=4 * TOLERANCE), name


def test_a_sum_is_not_rounded_to_a_narrow_base(tmp_path: Path) -> None:
    """A change below half a bfloat16 step of every weight is lost when rounded, and is there when scaled up in a merge."""
    save(tmp_path / "base", dtype=torch.bfloat16)
    adapter(tmp_path, "llama", target_modules=["q_proj"], r=2)
    path, name = tmp_path / "adapter" / "adapter_model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    save_file({key: tensor * 0.001 for key, tensor in load_file(path).items()}, path)
    found, base = open_source(tmp_path / "adapter"), tensors(tmp_path / "base")[name]
    rows = found.read(name)
    assert rows.dtype == torch.float64 and found.entries[name].dtype == torch.bfloat16
    assert torch.equal(rows.to(torch.bfloat16), base) and not torch.equal(rows, base.double())


def test_the_base_is_the_one_given_or_the_one_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(tmp_path, "llama", target_modules=["q_proj"], base="nowhere")
    words = ["linear", "--models", tmp_path / "adapter"]
    assert "is no folder here: give --base" in refused(capsys, tmp_path / "out", *words)
    given = save(tmp_path / "given", seed=3)
    found = open_source(tmp_path / "adapter", Folder(given))
    assert isinstance(found, Adapter) and found.base.folder == given
    # A tensor that the adapter leaves alone is the given base's.
    assert torch.equal(found.read("model.norm.weight"), tensors(given)["model.norm.weight"])
    reconfigure_adapter(tmp_path, lambda options: options.update(base_model_name_or_path=str(tmp_path / "base")))
    noted = open_source(tmp_path / "adapter", Folder(given))
    assert isinstance(noted, Adapter) and "was trained on" in noted.note
    same = open_source(tmp_path / "adapter", Folder(tmp_path / "base"))
    assert isinstance(same, Adapter) and same.note == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda options: options.update(use_dora=True), "use_dora"),
        (lambda options: options.update(init_lora_weights="pissa"), "pissa"),
        (lambda options: options.update(init_lora_weights="olora"), "olora"),
        (lambda options: options.update(peft_type="IA3"), "IA3"),
        (lambda options: options.update(layer_replication=[[0, 1]]), "layer_replication"),
        (lambda options: options.update(target_parameters=["x"]), "target_parameters"),
        (lambda options: options.update(trainable_token_indices=[1]), "trainable_token_indices"),
    ],
)
def test_what_is_more_than_a_sum_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], None], said: str
) -> None:
    adapter(tmp_path, "llama", target_modules=["q_proj"])
    reconfigure_adapter(tmp_path, change)
    line = refused(capsys, tmp_path / "out", "linear", "--models", tmp_path / "adapter")
    assert said in line and "merge_and_unload" in line


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(tmp_path, "llama", target_modules=["q_proj", "down_proj"])
    smaller = save(tmp_path / "smaller", intermediate_size=40)
    words = ["task-arithmetic", "--models", tmp_path / "adapter", "--base"]
    line = refused(capsys, tmp_path / "out", *words, smaller)
    assert "down_proj" in line and "(32, 48)" in line and "(32, 40)" in line
    shallower = save(tmp_path / "shallower", num_hidden_layers=1)
    assert "layers.1" in refused(capsys, tmp_path / "out", *words, shallower)


def test_a_tied_head_cannot_change_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "base", tie_word_embeddings=True)
    adapter(tmp_path, "llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert "where they are one" in refused(capsys, tmp_path / "out", "linear", "--models", tmp_path / "adapter")


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_grew_with_the_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tied: bool
) -> None:
    """peft saves embeddings and head whole when they were resized: the parent has their rows, and its own tokenizer."""
    base, to, out = save(tmp_path / "base", tie_word_embeddings=tied), tmp_path / "adapter", tmp_path / "out"
    grown = tiny_tokenizer()
    grown.add_tokens(["<a>", "<b>", "<c>"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(62, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[59:] = torch.arange(96.0).view(3, 32)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(to)
    grown.save_pretrained(to)
    folded = model.merge_and_unload().state_dict()
    words = ["task-arithmetic", "--models", to, "--base", base]
    assert "3 tokens of" in refused(capsys, out, *words)
    code, said = merge(capsys, *words, "--tokenizer", to, "--out", out)
    assert code == 0, said
    found = tensors(out)
    assert ("lm_head.weight" in found) != tied and config_of(out)["vocab_size"] == 62
    for name, tensor in found.items():
        assert torch.allclose(tensor, folded[name], rtol=0, atol=TOLERANCE), name
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<c>") == 61


def test_damaged_and_pickled_adapters_are_refused(tmp_path: Path) -> None:
    adapter(tmp_path, "llama", target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    with pytest.raises(UsageError, match="cut short"):
        open_source(tmp_path / "adapter")
    path.rename(path.with_name("adapter_model.bin"))
    with pytest.raises(UsageError, match="save it as safetensors"):
        open_source(tmp_path / "adapter")


def test_checkpoints_without_the_outermost_name(tmp_path: Path) -> None:
    """GPT-2's own files say h.0.attn, its adapters transformer.h.0.attn."""
    folded = adapter(tmp_path, "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors(tmp_path / "base").items()}
    save_file(short, tmp_path / "base" / "model.safetensors")
    found = open_source(tmp_path / "adapter")
    name = "h.0.attn.c_attn.weight"
    assert torch.allclose(found.read(name).float(), folded[f"transformer.{name}"], rtol=0, atol=TOLERANCE)
    assert not torch.equal(found.read(name), short[name])


def reconfigure_adapter(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = tmp_path / "adapter" / "adapter_config.json"
    options = json.loads(path.read_text())
    change(options)
    path.write_text(json.dumps(options))
