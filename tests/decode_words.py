"""Tiny models over whole words, whose ids can be permuted and whose embeddings can be turned: for alignments."""

from __future__ import annotations

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from trimtab import LM

WORDS = ["the", "cat", "dog", "ran", "sat", "Cat", "on", "a", "mat", "far"]


def permuted(order: list[int] | None = None, words: list[str] = WORDS, width: int = 16, rotate: int = 0) -> LM:
    """A one-layer Llama over whole words; `order` permutes its ids, `rotate` turns its embeddings by a random map."""
    pieces = ["</s>", *[" " + word for word in words]]
    count = len(pieces)
    order = order or list(range(count))
    raw = Tokenizer(
        models.WordLevel({piece.replace(" ", "\u2581"): order[i] for i, piece in enumerate(pieces)}, unk_token="</s>")
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="</s>")
    config = tf.LlamaConfig(
        vocab_size=count, hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=order[0], pad_token_id=None,
        bos_token_id=None, tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.LlamaForCausalLM(config).eval()
        place = torch.tensor(order)
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            table.data[place] = table.data.clone()
        if rotate:
            turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(rotate)))[0]
            model.get_input_embeddings().weight.data @= turn
    return LM(model, tokenizer, f"words{rotate}")
