"""Attention for one query a row on a CPU: grouped matrix products, without copying keys to every query head.

torch's fused kernel is made for many queries: for one it takes about 1.4 times as long as the products themselves.
`LM.load` chooses this one for models on a CPU; what it does not handle (more than one query, soft-capping, attention
sinks) goes to transformers' own sdpa. Equal to sdpa to 1e-5.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "trimtab"
_UNKNOWN = ("softcap", "s_aux", "position_bias", "cache")  # arguments that change the products


def single_query_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, H, S, d], key and value [B, K, T, d] with K dividing H, mask [B, 1, S, T] (True or 0: seen).

    Returns [B, S, H, d], as transformers expects it.
    """
    rows, heads, queries, width = query.shape
    masked_by_head = attention_mask is not None and attention_mask.shape[1] != 1
    if queries != 1 or dropout or masked_by_head or any(more.get(name) is not None for name in _UNKNOWN):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    grouped = query.reshape(rows, key.shape[1], -1, width) * (width**-0.5 if scaling is None else scaling)
    scores = grouped @ key.transpose(2, 3)  # [B, K, H/K, T]
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            attention_mask = additive(attention_mask, scores.dtype)
        scores += attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).reshape(rows, 1, heads, value.shape[-1]), None


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where `mask` is True, the lowest number of `dtype` where it is False."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def adopt(model: Any) -> None:
    """Let `model`, which is ours, use this attention where that is known to be right and of use."""
    if model.device.type != "cpu" or not model._supports_attention_backend:
        return
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def takes_ready_mask(model: Any) -> bool:
    """Whether one mask [B, 1, 1, T] serves every layer: this attention, and no sliding or chunked windows."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    return config._attn_implementation == NAME and kinds == {"full_attention"} and not any(windows)


AttentionInterface.register(NAME, single_query_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
