"""The MLP half of a transformer block, for the architectures whose blocks can be an MLP alone (see `extra_block`)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from trimtab.errors import UsageError


@dataclass(frozen=True)
class Anatomy:
    """Names of a layer's parts: the norm before the MLP, the last projections of attention and MLP, a norm after the MLP."""

    norm: str = "post_attention_layernorm"
    attention_out: str = "self_attn.o_proj"
    mlp_out: str = "mlp.down_proj"
    post: str | None = None
    final: str = "norm"  # of the backbone


_GEMMA = Anatomy("pre_feedforward_layernorm", post="post_feedforward_layernorm")
ANATOMY = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"), Anatomy()),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi": Anatomy("input_layernorm", "self_attn.dense", "mlp.fc2", final="final_layernorm"),
}


def anatomy_of(model: Any) -> Anatomy:
    kind = model.config.model_type
    if kind not in ANATOMY:
        raise UsageError(
            f"form=block cannot express {type(model).__name__}: it knows pre-norm decoders with a residual MLP "
            f"({', '.join(ANATOMY)}); use form=hook"
        )
    return ANATOMY[kind]


class Block(nn.Module):
    """The MLP half of a layer, h [..., D] -> h + scale * post(mlp(norm(h))); zero before it is fitted."""

    def __init__(self, norm: nn.Module, mlp: nn.Module, post: nn.Module | None):
        super().__init__()
        self.norm, self.mlp, self.post = norm, mlp, post

    def forward(self, h: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        out = self.mlp(self.norm(h))
        return h + scale * (out if self.post is None else self.post(out))

    @staticmethod
    def within(model: Any) -> Block:
        """The MLP half of a model's last layer (its own modules, not a copy)."""
        names, layer = anatomy_of(model), model.base_model.layers[-1]
        post = layer.get_submodule(names.post) if names.post else None
        return Block(layer.get_submodule(names.norm), layer.mlp, post)

    @staticmethod
    def fresh(model: Any, seed: int) -> Block:
        """A zero block in float32: random first projections, norm_b equal to the final norm, nothing comes out."""
        names = anatomy_of(model)
        block = copy.deepcopy(Block.within(model)).float().requires_grad_(True)
        block.norm.load_state_dict(model.base_model.get_submodule(names.final).state_dict())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in block.mlp.named_parameters():
                last = f"mlp.{name}".startswith(names.mlp_out)
                if parameter.dim() == 1 or (last and block.post is None):
                    parameter.zero_()
                else:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise / math.sqrt(parameter.shape[1]))
            if block.post is not None:
                block.post.weight.fill_(-1.0)  # type: ignore[operator, union-attr]  # its gain is 1 + weight
        return block

    def scaled_state(self, names: Anatomy, scale: float) -> dict[str, torch.Tensor]:
        """Its tensors under the layer's names, with the dial folded in."""
        parts = {names.norm: self.norm, "mlp": self.mlp} | ({names.post: self.post} if names.post else {})
        state = {f"{part}.{key}": t for part, m in parts.items() if m is not None for key, t in m.state_dict().items()}
        for key in state:
            if names.post and key == f"{names.post}.weight":
                state[key] = scale * (1 + state[key]) - 1
            elif not names.post and key.startswith(names.mlp_out):
                state[key] = scale * state[key]
        return state


class BlockSignal(nn.Module):
    """Delta(h) / strength, what the regression fits. [..., D] -> [..., D]."""

    def __init__(self, block: Block, final: nn.Module, strength: float):
        super().__init__()
        self.block, self.strength = block, strength
        self.final = final.requires_grad_(False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return (self.final(self.block(h)) - self.final(h)) / self.strength


def read_tensors(folder: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Some tensors of a checkpoint in one or several safetensors files. Raises `UsageError` naming a missing one."""
    out: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as held:
            out |= {name: held.get_tensor(name) for name in set(names) & set(held.keys())}
    missing = [name for name in names if name not in out]
    if missing:
        raise UsageError(f"the checkpoint in {str(folder)!r} lacks {missing[0]!r}")
    return out
