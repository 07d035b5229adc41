"""Fold a constant edit into the weights: a bias. The result is a plain checkpoint that any stock server runs.

A vector added to a block's output is a bias on the last linear map that writes into it (the MLP's down projection):
GPT-2, GPT-NeoX, OPT and Phi have that bias, Llama has it once its config says `mlp_bias`. A constant added to the final
hidden state is the bias of the final LayerNorm. Architectures without such a bias are refused by name. Nothing about
residual scalings or norms after the MLP is assumed: the folded model is compared with the steered one on a few tokens,
and refused if they differ.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.control import Control, FunctionControl
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.steer.layers import find_blocks, text_config
from trimtab.steer.steering_vector import SteeringVector

# where a block's last write comes from, by architecture
DOWN = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "fc2")
FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "decoder.final_layer_norm")
TOLERANCE = 1e-4  # relative to the largest logit; float32 rounding is near 1e-6


def fold(lm: LM, vector: SteeringVector) -> LM:
    """A plain model with the vector in its weights; `lm` is left alone. Greedy answers are the steered model's.

    Raises `UsageError` for an edit that is not one constant vector at every position (another operator than add,
    renorm, positions other than all), and for an architecture that has no bias there.
    """
    vector.check(lm.model)
    if vector.config.positions != "all":
        raise UsageError(
            f"a bias acts at every position: a vector with positions={vector.config.positions} cannot be folded"
        )
    model = _with_biases(lm.model, vector.config.blocks)
    blocks = find_blocks(model, vector.config.blocks)
    for layer, added in vector.vectors().items():
        _add(_down(blocks[layer], model), added)
    return _checked(lm, model, vector)


def fold_final(lm: LM, added: torch.Tensor) -> LM:
    """A plain model whose final hidden state is larger by the constant `added` [D] (a static edit of that state)."""
    norms = [module for name in FINAL_NORM if (module := _submodule(lm.model.base_model, name)) is not None]
    if len(norms) != 1 or getattr(norms[0], "bias", None) is None:
        raise UsageError(
            f"{type(lm.model).__name__} has no bias on its final norm: a constant edit of the final hidden state cannot "
            "be folded into its weights"
        )
    if added.shape != norms[0].bias.shape:
        raise UsageError(
            f"the final norm of {type(lm.model).__name__} has shape {tuple(norms[0].bias.shape)}, "
            f"the edit {tuple(added.shape)}"
        )
    model = copy.deepcopy(lm.model)
    name = next(name for name, module in lm.model.named_modules() if module is norms[0])
    _add(model.get_submodule(name), added)
    return _checked(lm, model, FunctionControl(lambda hidden: hidden + added.to(hidden), "a constant edit"))


def save_folded(lm: LM, vector: SteeringVector, folder: str | Path) -> Path:
    """Fold and write a checkpoint (weights as safetensors, config, tokenizer) that `AutoModelForCausalLM` loads."""
    where = Path(folder)
    if where.exists() and any(where.iterdir()):
        raise UsageError(f"{str(where)!r} is not empty: give a new folder")
    folded = fold(lm, vector)
    folded.model.save_pretrained(where)
    folded.tokenizer.save_pretrained(where)
    return where


def _with_biases(model: Any, path: str) -> Any:
    """A copy of the model whose blocks can hold a bias: as it is, or rebuilt with `mlp_bias` and biases of 0."""
    if _down(find_blocks(model, path)[0], model, must=False) is not None:
        return copy.deepcopy(model)
    config = copy.deepcopy(model.config)
    if getattr(text_config(model), "mlp_bias", None) is not False:
        raise UsageError(
            f"{type(model).__name__} has no bias on its MLP's output and no option for one: a steering vector cannot "
            "be folded into its weights (attach it instead)"
        )
    config.get_text_config(decoder=True).mlp_bias = True
    reference = next(model.parameters())
    with torch.random.fork_rng():  # the random initial weights are all overwritten; the caller's generator stays
        out = type(model)(config).to(dtype=reference.dtype, device=reference.device)
    loaded = out.load_state_dict(model.state_dict(), strict=False)
    if loaded.unexpected_keys or not all(key.endswith("proj.bias") for key in loaded.missing_keys):
        raise UsageError(f"{type(model).__name__} with mlp_bias has other weights than without: it cannot be folded")
    parameters = dict(out.named_parameters())
    for key in loaded.missing_keys:
        parameters[key].data.zero_()
    if model.generation_config is not None:
        out.generation_config = copy.deepcopy(model.generation_config)
    return out.eval().requires_grad_(False)


def _down(block: nn.Module, model: Any, must: bool = True) -> nn.Module | None:
    """The block's last linear map, if it has a bias; where it `must`, a `UsageError` says that it has none."""
    for name in DOWN:
        module = _submodule(block, name)
        if module is not None and getattr(module, "bias", None) is not None:
            return module
    if must:
        raise UsageError(f"{type(model).__name__} has no bias on its MLP's output: the vector cannot be folded")
    return None


def _submodule(module: nn.Module, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part, None)  # type: ignore[assignment]
        if module is None:
            return None
    return module


def _add(module: nn.Module | None, added: torch.Tensor) -> None:
    bias: Any = getattr(module, "bias", None)
    with torch.no_grad():
        bias.add_(added.to(device=bias.device, dtype=bias.dtype))


@torch.no_grad()
def _checked(lm: LM, model: Any, control: Control) -> LM:
    """The folded model as an `LM`, after its logits were found equal to those of the steered one."""
    ids = torch.arange(8, device=lm.device)[None] * 7 % lm.vocab_size
    with control.attached(lm.model, positions="all"):
        steered = lm.model(ids).logits.float()
    folded = model(ids).logits.float()
    rounding = max(TOLERANCE, 8 * torch.finfo(model.dtype).eps)
    if not torch.allclose(steered, folded, atol=rounding * max(1.0, float(steered.abs().max())), rtol=0):
        raise UsageError(
            f"{type(model).__name__} transforms what its MLP writes (a norm or a scale): a constant vector is no bias "
            "there and cannot be folded (attach it instead)"
        )
    return LM(model, lm.tokenizer, f"{lm.name}+{control.name}", lm.batch_rows)
