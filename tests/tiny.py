"""Tiny random models and tokenizers, built in code: `from tiny import tiny_lm`.

Weights are drawn wide enough that distributions differ from token to token; every bias and norm weight is random, so an
implementation that ignores one is seen.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from trimtab.lm import LM

CONTEXT = 64
PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [f"{a}{b}" for a in "bdfglmnprst" for b in ("a", "e", "i", "o", "u")]
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)

_rope = {"num_attention_heads": 4, "num_key_value_heads": 2}
_size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": CONTEXT}
_gemma = {**_size, "num_attention_heads": 4, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 5}
_layers = ["sliding_attention", "full_attention"]

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_size, **_rope}),
    "qwen2": ("Qwen2", {**_size, **_rope}),
    "qwen3": ("Qwen3", {**_size, **_rope, "head_dim": 16}),
    "gemma": ("Gemma", {**_size, "num_attention_heads": 4, "head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        {**_gemma, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3Text", {**_gemma, "layer_types": _layers}),
    "mistral": ("Mistral", {**_size, **_rope, "sliding_window": 5}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}),
    "gpt_neox": ("GPTNeoX", {**_size, "num_attention_heads": 4}),
    "opt": (
        "OPT",
        {
            "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 16, "max_position_embeddings": CONTEXT,
        },
    ),
    "phi": ("Phi", {**_size, "num_attention_heads": 4}),
    "phi3": ("Phi3", {**_size, **_rope, "original_max_position_embeddings": CONTEXT}),
}  # fmt: skip
ARCHITECTURES = list(CONFIGS)


def word_tokenizer() -> Tokenizer:
    """59 tokens, one a word."""
    vocab = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    out = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    out.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return out


def byte_tokenizer() -> Tokenizer:
    """260 tokens: every byte, and a few merges (so that a text's tokens depend on what follows)."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("b", "a"), ("Ġ", "m"), ("Ġm", "o"), ("t", "u")]
    vocab = {token: number for number, token in enumerate([*SPECIAL, *letters, *("".join(pair) for pair in merges)])}
    out = Tokenizer(models.BPE(vocab, merges))
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    return out


def tiny_tokenizer(
    kind: str = "word",
    side: str = "left",
    pad: str | None = "<pad>",
    bos: bool = False,
    eos: bool = False,
    chat: str | None = None,
) -> tf.PreTrainedTokenizerFast:
    """pad: "<pad>", "</s>" (pad == eos) or None. bos, eos: the tokenizer adds them. chat: a chat template."""
    raw = word_tokenizer() if kind == "word" else byte_tokenizer()
    template = [*(["<s>"] if bos else []), "$A", *(["</s>"] if eos else [])]
    raw.post_processor = processors.TemplateProcessing(
        single=" ".join(template), special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    out = tf.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=pad, padding_side=side
    )
    out.chat_template = chat
    return out


def tiny_model(
    arch: str = "llama", tied: bool | None = None, seed: int = 0, vocab_size: int = 59, **config: Any
) -> Any:
    """A random causal language model of `arch` in float32, without touching the global generator."""
    if tied is not None:
        config["tie_word_embeddings"] = tied
    kind, settings = CONFIGS[arch]
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    configuration = getattr(tf, f"{kind}Config")(
        **{**settings, **ids, "dtype": "float32", **config}, vocab_size=vocab_size
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tf.AutoModelForCausalLM.from_config(configuration)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * (0.6 if "embed" in name or "wte" in name else 0.25))
    return model.eval()


def tiny_lm(
    arch: str = "llama",
    tied: bool | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    name: str = "tiny",
    batch_rows: int | None = None,
    **config: Any,
) -> LM:
    """A random `LM` of an architecture in `ARCHITECTURES`; `config` goes to its transformers config."""
    tokenizer = tokenizer if tokenizer is not None else tiny_tokenizer()
    model = tiny_model(arch, tied, seed, vocab_size=len(tokenizer), **config)
    return LM(model, tokenizer, name, batch_rows)
