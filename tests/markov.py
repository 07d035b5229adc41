"""Language models whose next-token law is known to the letter: `markov({"go": {"a": 0.6, "</s>": 0.4}, ...})`.

A Llama whose layers add nothing: the final hidden state is the (scaled) one-hot vector of the last token, and the output
embedding maps it to that token's log-probabilities. Tokens that a law leaves out have probability exactly 0 in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import transformers as tf

from taught import word_tokenizer
from tiny import BOS, EOS, PAD
from trimtab.lm import LM

NEVER = -1e4


def markov(
    law: Mapping[str, Mapping[str, float]], name: str = "markov", *, logits: bool = False, ends: bool = True
) -> LM:
    """law[word][next word]: a probability (or, with `logits`, a logit). A word that is no key goes on as "*" says.

    ends=False: the model has no end token.
    """
    words = [*law, *(word for row in law.values() for word in row)]
    tokenizer = word_tokenizer([word for word in words if word != "*"])
    size = len(tokenizer)
    width = 4 * math.ceil(size / 4)
    config = tf.LlamaConfig(
        vocab_size=size, hidden_size=width, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=128, tie_word_embeddings=False, rms_norm_eps=1e-12, pad_token_id=PAD, bos_token_id=BOS,
        eos_token_id=EOS if ends else None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.LlamaForCausalLM(config)
    scale = math.sqrt(width)
    table = torch.full((size, size), NEVER)  # [last, next]
    for last in range(size):
        row = law.get(tokenizer.convert_ids_to_tokens(last), law.get("*", {"<unk>": 0.0 if logits else 1.0}))
        for word, value in row.items():
            table[last, tokenizer.convert_tokens_to_ids(word)] = value if logits else math.log(value)
    with torch.no_grad():
        for module in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            module.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        model.lm_head.weight.copy_(torch.nn.functional.pad(table.T, (0, width - size)) / scale)
    if not ends:
        tokenizer.eos_token = None
        model.generation_config.eos_token_id = None
    return LM(model, tokenizer, name)
