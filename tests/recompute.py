"""Oracles for the core: a model's own forward and transformers' own `generate`, one row at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tiny import EOS, PAD, WORDS
from trimtab import LM

PROMPTS = ["ba da fa la", "ma na", "pa ra sa ta be de fe ge le me ne", "pe", "re se te bi di fi"]


@torch.no_grad()
def recompute(lm: LM, rows: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits [T, V] and final hidden states [T, D] of each row, alone, without a cache, by the model's own forward."""
    out = []
    seen: list[torch.Tensor] = []
    hook = lm.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        for row in rows:
            logits = lm.model(torch.tensor([list(row)]), use_cache=False).logits[0]
            out.append((logits, seen.pop()[0]))
    finally:
        hook.remove()
    return out


def transformers_generate(lm: LM, prompt: Sequence[int], steps: int) -> list[int]:
    """Greedy tokens of transformers for one row, up to and including the first end token."""
    ids = torch.tensor([list(prompt)])
    out = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False, pad_token_id=PAD
    )
    new = out[0, ids.shape[1] :].tolist()
    return new[: new.index(EOS) + 1] if EOS in new else new


def random_rows(generator: torch.Generator, count: int, low: int = 1, high: int = 9) -> list[list[int]]:
    """Rows of random word tokens, ragged."""
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(4, 4 + len(WORDS), (length,), generator=generator).tolist() for length in lengths]
