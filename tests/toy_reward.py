"""Reward models trained on the spot with TRL's RewardTrainer: `train_reward(pairs, folder)` in half a minute."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf

from taught import word_tokenizer
from tiny import BOS, EOS, PAD
from trimtab.policy import Completions
from trimtab.rewards import Classifier
from trimtab.sampling import Sampling

TEMPLATE = "{prompt} {response}"


def sst2(shared: Path, split: str) -> list[tuple[int, str]]:
    """(1 positive or 0, sentence), of the Stanford Sentiment Treebank."""
    lines = (shared / "data" / "sst2" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    return [(int(label), text) for label, text in (line.split("\t", 1) for line in lines if line[:2] in ("0\t", "1\t"))]


def pairs_by(texts: Sequence[str], score: Callable[[str], float], count: int, gap: float, seed: int) -> list[Any]:
    """`count` pairs of different texts, the higher score first, at least `gap` apart."""
    generator = np.random.default_rng(seed)
    scores = [score(text) for text in texts]
    out: list[Any] = []
    while len(out) < count:
        i, j = generator.integers(0, len(texts), 2).tolist()
        if scores[i] - scores[j] >= gap > 0:
            out.append({"prompt": "Review :", "chosen": texts[i], "rejected": texts[j]})
    return out


def train_reward(
    pairs: Sequence[dict[str, str]],
    folder: Path,
    *,
    epochs: float = 1,
    seed: int = 0,
    width: int = 64,
    lr: float = 3e-3,
) -> Classifier:
    """A one-layer Llama with a head, trained on pairs; words seen once or never are <unk>."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    counts = Counter(word for pair in pairs for text in dict.fromkeys(pair.values()) for word in text.split())
    tokenizer = word_tokenizer([word for word, count in counts.most_common() if count > 1])
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=256, num_labels=1,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tf.LlamaForSequenceClassification(config)
        options = RewardConfig(
            output_dir=str(folder / "trainer"), num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=lr,
            logging_strategy="no", save_strategy="no", report_to=[], use_cpu=True, seed=seed, max_length=128,
            center_rewards_coefficient=0.01, gradient_checkpointing=False, bf16=False, disable_tqdm=True,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = RewardTrainer(
                model, options, train_dataset=Dataset.from_list(list(pairs)), processing_class=tokenizer
            )
            trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Classifier(folder, template=TEMPLATE, append_eos=True, device="cpu")


# ---------------------------------------------------------------- a world of words whose sentiment VADER knows

GOOD = "great wonderful happy love excellent superb delightful brilliant charming perfect joy beautiful".split()
BAD = "awful terrible sad hate horrible dreadful boring ugly stupid painful worst disgusting".split()
PLAIN = "the a film story actor scene it was is this plot with and one of music time camera".split()


def sentence(generator: np.random.Generator, tricky: float = 0.0) -> str:
    """Twelve words, of which up to half speak; with probability `tricky` denied praise ("not great happy superb not ...").

    "not" turns the three words after it round for VADER, and is a word that the rewards trained here have never seen.
    """
    if generator.random() < tricky:
        return " ".join(f"not {' '.join(generator.choice(GOOD, 3))}" for _ in range(3))
    speak, lean = generator.random() / 2, generator.random()
    out = []
    for _ in range(12):
        kind = GOOD if generator.random() < lean else BAD
        out.append(str(generator.choice(kind if generator.random() < speak else PLAIN)))
    return " ".join(out)


class Speaker:
    """A policy that says sentences of this world, whatever it is asked."""

    def __init__(self, tricky: float = 0.0):
        self.name, self.tricky = f"speaker, tricky {tricky}", tricky

    def generate(self, prompts: Sequence[Any], sampling: Sampling = Sampling()) -> Completions:
        generator = np.random.default_rng(sampling.seed)
        asked = [prompt for prompt in prompts for _ in range(sampling.samples)]
        texts = [sentence(generator, self.tricky) for _ in asked]
        return Completions(asked, texts, [[] for _ in asked], [[] for _ in asked], ["stop"] * len(asked))
