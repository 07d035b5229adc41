"""The pocket models' shapes, and saving them so that plain transformers loads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

CONTEXT = 256  # tokens


def config(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, **more: Any) -> LlamaConfig:
    """A Llama with tied embeddings, no beginning-of-sequence token, `<pad>` 0 and `</s>` 1."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=CONTEXT,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **more,
    )


def base_config(**more: Any) -> LlamaConfig:
    """0.92 M parameters."""
    return config(vocabulary=512, hidden=128, inner=384, layers=4, heads=4, **more)


def nano_config(**more: Any) -> LlamaConfig:
    """0.30 M parameters."""
    return config(vocabulary=640, hidden=80, inner=240, layers=3, heads=4, **more)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, extra: dict[str, Any]) -> None:
    """Write a model folder, complete or not at all: float16 weights that load as float32 (the config says so).

    `extra` becomes the `trimtab` section of config.json.
    """
    import torch

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tied = "lm_head.weight"  # the embedding under another name
    half = {k: v.to(torch.float16) for k, v in model.state_dict().items() if k != tied}
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=64)
        generation.eos_token_id, generation.pad_token_id, generation.bos_token_id = 1, 0, None
    model.save_pretrained(partial, state_dict=half)
    (partial / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(partial)
    settings = json.loads((partial / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 both know
    (partial / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    written = json.loads((partial / "config.json").read_text())
    written["dtype"] = "float32"
    written["trimtab"] = extra
    (partial / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    _replace(partial, folder)


def _replace(new: Path, old: Path) -> None:
    retired = old.with_name(old.name + ".old")
    shutil.rmtree(retired, ignore_errors=True)
    if old.exists():
        old.rename(retired)
    new.rename(old)
    shutil.rmtree(retired, ignore_errors=True)
