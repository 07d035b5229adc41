"""Model folders of a few numbered layers whose weights are easy to tell by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

VOCABULARY, WIDTH = 6, 4


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """A decoder's tensors by name."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for i in range(layers):
        found[f"model.layers.{i}.input_layernorm.weight"] = (WIDTH,)
        found[f"model.layers.{i}.self_attn.q_proj.weight"] = (WIDTH, WIDTH)
        found[f"model.layers.{i}.mlp.up_proj.weight"] = (2 * WIDTH, WIDTH)
    return {**found, "model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def stack(folder: Path, layers: int, value: Callable[[str], float] | None = None, seed: int = 0, **config: Any) -> Path:
    """A folder of `layers` layers. value: name -> what all of a tensor's entries are; None: random."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) if value is None else torch.full(shape, float(value(name)))
        for name, shape in shapes(layers).items()
    }
    return write(folder, tensors, layers, **config)


def write(folder: Path, tensors: dict[str, Tensor], layers: int, **config: Any) -> Path:
    folder.mkdir(parents=True)
    plain = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**plain, **config}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
