"""A language model over byte pairs whose every probability can be enumerated.

`Table` draws its logits from the whole history in float64, so sums over token sequences and over bytes agree to rounding;
`Brute` is the enumeration. "<s>" alone is the empty prompt.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, processors

from trimtab import LM, Cost

BOS, EOS = 0, 1
MERGES = [("a", "b"), ("b", "a"), ("ab", "a"), ("a", "a"), ("ab", "ab"), ("c", "ab"), ("aba", "c")]


def tokenizer(merges: Sequence[tuple[str, str]] = (), units: str = "abc", bos: bool = True, **options: Any) -> Any:
    """<s>, </s>, the units and what merges make of them."""
    vocab = {text: number for number, text in enumerate(["<s>", "</s>", *units])}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    raw = Tokenizer(models.BPE(vocab, list(merges), **options))
    template = "<s> $A" if bos else "$A"
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", BOS)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


class TableSession:
    """The part of a session that byte-level uses."""

    guided, base_logits = False, None

    def __init__(self, lm: Table, rows: Sequence[Sequence[int]], meter: Cost | None):
        self.lm, self.content, self.meter = lm, [list(row) for row in rows], meter or Cost()

    rows = property(lambda self: len(self.content))
    lengths = property(lambda self: torch.tensor([len(row) for row in self.content]))

    @property
    def logits(self) -> torch.Tensor:
        return torch.stack([self.lm.logits_after(tuple(row)) for row in self.content])

    def append(self, tokens: Any) -> None:
        more = tokens[:, None].tolist() if isinstance(tokens, torch.Tensor) else tokens
        for row, added in zip(self.content, more, strict=True):
            row.extend(added)

    def fork(self, rows: Sequence[int]) -> TableSession:
        return TableSession(self.lm, [self.content[row] for row in rows], self.meter)

    def drop(self, rows: Sequence[int]) -> list[int]:
        kept = [row for row in range(self.rows) if row not in set(rows)]
        self.content = [self.content[row] for row in kept]
        return kept

    def rewind(self, lengths: Sequence[int]) -> None:
        self.content = [row[:length] for row, length in zip(self.content, lengths, strict=True)]


class Table(LM):
    """See the module."""

    def __init__(self, tokenizer: Any, seed: int = 0, spread: float = 2.0, name: str = "table"):
        self.tokenizer, self.seed, self.spread, self.name = tokenizer, seed, spread, name
        self.context_length, self.batch_rows = None, 10**6
        self.logits_after = lru_cache(maxsize=None)(self._logits_after)

    vocab_size = property(lambda self: len(self.tokenizer))  # type: ignore[assignment]
    eos_ids = frozenset({EOS})  # type: ignore[assignment]

    def _logits_after(self, tokens: tuple[int, ...]) -> torch.Tensor:
        seed = random.Random(f"{self.seed} {tokens}").getrandbits(60)
        return self.spread * torch.randn(
            self.vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )

    def session(self, prompts: Any, control: Any = None, meter: Cost | None = None) -> Any:
        return TableSession(self, prompts, meter)


class Brute:
    """Probabilities by enumeration of token sequences; a token is valid iff the text so far, encoded again, says so."""

    def __init__(self, lm: Table):
        self.lm = lm
        self.text = [lm.tokenizer.convert_ids_to_tokens(token) for token in range(lm.vocab_size)]
        self.after = lru_cache(maxsize=None)(self._after)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.lm.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _after(self, tokens: tuple[int, ...]) -> list[float]:
        said = "".join(self.text[token] for token in tokens)
        valid = [False, True, *(self.encode(said + text) == (*tokens, at) for at, text in enumerate(self.text[2:], 2))]
        cut = self.lm.logits_after((BOS, *tokens)).masked_fill(~torch.tensor(valid), -torch.inf)
        return list(cut.softmax(-1).tolist())

    def prefix(self, text: str, tokens: tuple[int, ...] = ()) -> float:
        """P(text begins so), every path of tokens followed until it covers the text."""
        total = 0.0
        for token, chance in enumerate(self.after(tokens)):
            if token > EOS and chance:
                piece = self.text[token]
                if piece.startswith(text):
                    total += chance
                elif text.startswith(piece):
                    total += chance * self.prefix(text[len(piece) :], (*tokens, token))
        return total

    def whole(self, text: str) -> float:
        """P(text, end)."""
        tokens = self.encode(text)
        steps = [self.after(tokens[:at])[token] for at, token in enumerate(tokens)]
        return math.prod(steps) * self.after(tokens)[EOS]
