"""Tiny random reward models, built in code: `from tiny_reward import classifier`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tiny import PAD, tiny_tokenizer
from trimtab.rewards import Classifier

TEMPLATE = "{prompt} {response}"
LIMIT = 40  # tokens it reads


def classifier(
    folder: Path, family: str = "llama", tokenizer: Any = None, labels: int = 1, **options: Any
) -> Classifier:
    """A random decoder (or BERT) with a head; scores of about one."""
    tokenizer = tokenizer or tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "num_labels": labels, "pad_token_id": PAD, "bos_token_id": None}
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "gpt2":
            config = tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=LIMIT, **sizes)
            model: Any = tf.GPT2ForSequenceClassification(config)
        elif family == "bert":
            model = tf.BertForSequenceClassification(tf.BertConfig(max_position_embeddings=LIMIT, **width, **sizes))
        else:
            config = tf.LlamaConfig(num_key_value_heads=1, max_position_embeddings=LIMIT, **width, **sizes)
            model = tf.LlamaForSequenceClassification(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Classifier(folder, **{"template": TEMPLATE, "device": "cpu", **options})
