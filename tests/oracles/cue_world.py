"""A world in which how one asks matters: a tiny target that answers well only where the right cue is in the instruction.

An instruction is "VERB TOPIC TOPIC": sums want the cue "stepwise", stories want "vividly"; each is useless to the other,
"briefly" and "please" help nobody. The target is trained on the spot. A good answer repeats the first topic and ends with
"fine", a bad one ends with "poor"; the reward, which knows the instruction as it was, wants that topic and "fine".
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from tiny import BOS, EOS, PAD, SPECIAL
from trimtab import LM
from trimtab.prompt.principles import Principle, PrincipleLibrary
from trimtab.prompt.rewriter import HEADER, rewrite_prompt
from trimtab.prompt.tuning import sft
from trimtab.rewards import as_reward
from trimtab.rewards.base import Reward

NEEDS = {"sum": "stepwise", "add": "stepwise", "tell": "vividly", "sing": "vividly"}
CUES = ("stepwise", "vividly", "briefly", "please")
TOPICS = [f"{a}{b}" for a in "BDFGLMNP" for b in ("a", "o")]
LIBRARY = PrincipleLibrary({"helpfulness": [Principle(cue, f"add {cue}", "{instruction} " + cue) for cue in CUES]})


def tokenizer() -> Any:
    """A token a word, those of the rewriter's template included."""
    template = f"{rewrite_prompt('x')} {HEADER}".split()
    words = dict.fromkeys([*SPECIAL, *NEEDS, *CUES, *TOPICS, "fine", "poor", *template])
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def blank(seed: int, name: str) -> LM:
    """An untrained model over the words of this world."""
    words = tokenizer()
    config = tf.LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.1, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LM(tf.LlamaForCausalLM(config), words, name)


def instruction(rng: random.Random) -> str:
    return f"{rng.choice(list(NEEDS))} {rng.choice(TOPICS)} {rng.choice(TOPICS)}"


def helped(text: str) -> bool:
    words = text.split()
    return NEEDS.get(words[0], "") in words


def target(seed: int = 0, rows: int = 1500, epochs: int = 8) -> LM:
    """F: with the right cue 9 of 10 answers are good, without it 2 of 10."""
    rng = random.Random(f"target-{seed}")
    examples = []
    for _ in range(rows):
        asked = " ".join([instruction(rng), *(rng.choice(CUES) for _ in range(rng.randint(0, 3)))])
        good = rng.random() < (0.9 if helped(asked) else 0.2)
        examples.append((asked, f"{asked.split()[1]} {'fine' if good else 'poor'}"))
    return sft(blank(seed, "target"), examples, epochs, 3e-3, 32, seed, name="target")


def reward() -> Reward:
    def fits(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
        return [float(text.split() == [prompt.split()[1], "fine"]) for prompt, text in zip(prompts, texts, strict=True)]

    return as_reward(fits)
