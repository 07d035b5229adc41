"""Tiny language models taught on the spot, on a vocabulary of whole words: `taught(rows, ...)` in a second or two.

    lm = taught([("ask cat", "fine cat"), ...], steps=200, seed=0)      # (prompt, completion) rows
    lm = taught_text(["sentence one", ...], steps=200, seed=0)          # plain language modelling
    lm2 = sft(lm, rows, epochs, lr, batch, seed, name="tuned")          # trimtab.prompt.tuning.sft, to go on training

Every word of `words` and of the rows is one token. Training is deterministic in (rows, steps, seed).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from tiny import BOS, EOS, PAD, SPECIAL
from trimtab.lm import LM
from trimtab.prompt.tuning import sft

__all__ = ["blank", "sft", "taught", "taught_text", "word_tokenizer"]


def word_tokenizer(words: Sequence[str]) -> Any:
    """A token a word (split at white space), after <pad>, <s>, </s>, <unk>."""
    vocab = {word: number for number, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def blank(
    words: Sequence[str], seed: int = 0, name: str = "taught", layers: int = 2, width: int = 64, context: int = 64
) -> LM:
    """An untrained Llama over these words."""
    tokenizer = word_tokenizer(words)
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=context, initializer_range=0.1,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LM(tf.LlamaForCausalLM(config), tokenizer, name)


def taught(
    rows: Sequence[tuple[str, str]],
    epochs: int = 4,
    seed: int = 0,
    *,
    words: Sequence[str] = (),
    lr: float = 3e-3,
    batch: int = 32,
    **shape: Any,
) -> LM:
    """A model trained on (prompt, completion) rows; the loss is on the completions."""
    every = [word for prompt, text in rows for word in f"{prompt} {text}".split()]
    return sft(
        blank([*words, *every], seed, **shape), list(rows), epochs, lr, batch, seed, name=shape.get("name", "taught")
    )


def taught_text(
    texts: Sequence[str],
    steps: int = 300,
    seed: int = 0,
    *,
    words: Sequence[str] = (),
    lr: float = 3e-3,
    batch: int = 32,
    start: LM | None = None,
    **shape: Any,
) -> LM:
    """A model trained on plain texts (each between <s> and </s>); start: go on from this one (a copy of it)."""
    every = [word for text in texts for word in text.split()]
    lm = blank([*words, *every], seed, **shape) if start is None else start
    config, state = lm.model.config, lm.model.state_dict()
    model = tf.LlamaForCausalLM(config)
    model.load_state_dict(state)
    model.train()
    rows = [[BOS, *lm.tokenizer(text, add_special_tokens=False)["input_ids"], EOS] for text in texts]
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / steps)
        part = [rows[i] for i in torch.randint(len(rows), (batch,), generator=generator).tolist()]
        longest = max(map(len, part))
        ids = torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in part])
        seen = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part])
        logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1]
        targets = ids[:, 1:].masked_fill(seen[:, 1:] == 0, -100)
        loss = F.cross_entropy(logits.transpose(1, 2), targets)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return LM(model, lm.tokenizer, shape.get("name", lm.name))
