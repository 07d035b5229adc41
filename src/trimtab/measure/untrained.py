"""A model with the same shape and fresh weights: what an architecture and a tokenizer do to texts before any training."""

from __future__ import annotations

import copy

import torch

from trimtab.lm import LM


def untrained(lm: LM, seed: int = 0) -> LM:
    """`lm` as its library initialises it. The same (shape, seed) give the same weights; it takes as much memory again."""
    config = copy.deepcopy(lm.model.config)
    with torch.random.fork_rng(devices=[]):  # the library draws from the global generator: it is put back
        torch.manual_seed(seed)
        model = type(lm.model)(config)
    model = model.to(device=lm.device, dtype=lm.unembedding.dtype)
    return LM(model, lm.tokenizer, f"{lm.name} untrained", lm.batch_rows)
