"""`Head`: from the final hidden state to logits, for any model: output embedding, scaling, soft-capping."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.errors import UsageError


class Head:
    """logits = cap tanh(scale (W o + b) / cap), in float32. W is [V, D]; cap and scale come from the model's config."""

    def __init__(self, model: Any):
        self.layer = model.get_output_embeddings()
        if self.layer is None:
            raise UsageError(f"{type(model).__name__} has no output embedding: a causal language model is needed")
        config = model.config.get_text_config(decoder=True)
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        up, down = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
        self.scale = float(up or 1) / float(down or 1)

    @property
    def weight(self) -> torch.Tensor:
        return self.layer.weight

    @property
    def hidden_size(self) -> int:
        return self.layer.weight.shape[1]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., V]."""
        logits = self.layer(hidden.to(self.weight.dtype)).float()
        if self.scale != 1:
            logits = logits * self.scale
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits

    def vjp(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Gradient in `hidden` of sum_a weights[a] logits[a]: [..., D], [..., V] -> [..., D] float32."""
        if self.cap is not None:
            weights = weights * (1 - (self(hidden) / self.cap) ** 2)
        return (weights * self.scale) @ self.weight.float()

    def jvp(self, hidden: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """First-order change of the logits along u: [..., D], [..., D] -> [..., V]."""
        change = self.scale * (u.to(self.weight.dtype) @ self.weight.T).float()
        if self.cap is not None:
            change = change * (1 - (self(hidden) / self.cap) ** 2)
        return change
