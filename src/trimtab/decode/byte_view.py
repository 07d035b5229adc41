"""`ByteView`: a BPE tokenizer seen from the bytes. Which token sequences begin some encoding, and which of them cover a text.

A token sequence is *reachable* if some text has an encoding that begins with it; a model trained on encodings puts its
mass there. That is decided from token to token, and exactly:

    t is reachable  iff  between any two neighbours a, b there is either a cut of the pre-tokenizer (`byte_splits`) or BPE
                         leaves the boundary alone, bpe(a b) = [a, b] (`byte_bpe`), and some legal text goes on from there

How a sequence may go on depends on its last token, the automaton's states and an unfinished character alone: a `Config`.
Testing by encoding again is not enough: with GPT-2's pattern and a token "'l", [x, 'l, l] is an encoding and [x, 'l] is the
encoding of no text.

Texts are UTF-8. A view is exact or refused: tokenizers that are not BPE, that change text or cut it in an unknown way, and
any whose encodings of a few test texts differ. Special and added tokens have no bytes; text that spells one is text here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.decode.byte_bpe import Mask, Shape, Vocabulary
from trimtab.decode.byte_splits import character_size
from trimtab.errors import UsageError

Guesses = tuple[tuple[str, int], ...]
SAMPLES = (
    "Anna's dog didn't run; we'll see, you're late, I'd 'say so'.",
    "two  spaces,   three\n\nlines \n and\ttabs \t end  ",
    "1 12 123 1234567 + 8=9",
    "caf\u00e9, na\u00efve \u2014 \u4e2d\u6587 \U0001f600\u0301 \u00a0end",
    "def f(x):\n    return x['a'] # ok",
)


class Config(NamedTuple):
    """All that decides how a token sequence may go on.

    last      its last token, -1 before any
    states    of the pre-tokenizer's automaton, as bits
    partial   bytes of an unfinished character; then `states` is 0 and `guesses` has the states by the character's kind
    """

    last: int
    states: int
    partial: bytes = b""
    guesses: Guesses = ()


START = Config(-1, 1)


@dataclass(frozen=True)
class Left:
    """A reachable token sequence that ends `end` bytes into a text."""

    tokens: tuple[int, ...]
    config: Config
    end: int


@dataclass
class Audit:
    """What cutting real encodings everywhere showed.

    differs      texts that the view encodes otherwise than the tokenizer (empty, or the view is wrong)
    unreachable  prefixes of encodings that the view calls unreachable (empty, or the view is wrong)
    closure      prefixes that are not the encoding of their own text: a test by encoding again would call them invalid
    """

    texts: int = 0
    prefixes: int = 0
    differs: list[str] = field(default_factory=list)
    unreachable: list[list[int]] = field(default_factory=list)
    closure: list[list[int]] = field(default_factory=list)


class ByteView:
    """See the module. size: V, the width of the model's logits (default: the vocabulary's).

    data     [V] the bytes of each token, None for specials and for tokens that no text is encoded with
    order    [U] the usable tokens, sorted by their bytes; `sorted` those bytes; `rank` [V] places in it, -1 for others
    longest  bytes of the longest usable token
    step     config, token -> after that token; None where it is impossible (whether some text goes on is for `live` to say)
    allowed  config -> the tokens [V] after which the sequence is reachable
    live     config -> whether some legal text goes on from there
    byte_at  depth -> byte number `depth` of the sorted tokens [U], -1 where they are shorter
    """

    def __init__(self, tokenizer: Any, size: int | None = None):
        self.bpe = Vocabulary(tokenizer, size)
        self.size, self.data, self.notes = self.bpe.size, self.bpe.data, self.bpe.notes
        pairs = sorted((data, token) for token, data in enumerate(self.data) if data is not None)
        self.sorted = [data for data, _ in pairs]
        self.order = np.array([token for _, token in pairs])
        self.rank = np.full(self.size, -1)
        self.rank[self.order] = np.arange(len(pairs))
        self.lengths = np.array([len(data) for data in self.sorted])
        self.longest = int(self.lengths.max())
        self._token_of = dict(pairs)
        self._shaped: dict[Shape, list[int]] = defaultdict(list)
        for token, shape in self.bpe.shapes.items():
            self._shaped[shape].append(token)
        self._headed = [token for token, shape in self.bpe.shapes.items() if shape.head]
        self._tables: dict[int, tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]] = {}
        self._runs: dict[tuple[int, bool, Shape], tuple[int, Guesses]] = {}
        self.step = lru_cache(maxsize=2**16)(self._step)
        self.allowed = lru_cache(maxsize=max(64, 2**28 // self.size))(self._allowed)
        self.live = lru_cache(maxsize=2**16)(self._live)
        self.byte_at = lru_cache(maxsize=256)(self._byte_at)
        found = self.audit(text for text in SAMPLES if self.lefts(self.surface(text))[-1])
        if found.differs or found.unreachable:
            raise UsageError(
                f"byte-level does not encode {(found.differs or found.unreachable)[0]!r} as this tokenizer does, so it "
                "would not be exact: use another model"
            )

    # how a sequence may go on

    def _step(self, config: Config, token: int) -> Config | None:
        shape = self.bpe.shapes.get(token)
        joined = shape is not None and config.last >= 0 and bool(self.bpe.follows(config.last)[token])
        if shape is None or bool(shape.head) != bool(config.partial) or (config.partial and not joined):
            return None
        if not config.partial:
            states, guesses = self._run(config.states, True, shape)
            if joined:
                more, others = self._run(config.states, False, shape)
                states, guesses = states | more, _either(guesses, others)
        else:
            data = config.partial + shape.head
            kinds = self.bpe.kinds(data)
            guesses = tuple((kind, states) for kind, states in config.guesses if kind in kinds)
            if len(data) < character_size(data[0]):
                return Config(token, 0, data, guesses) if guesses and not (shape.kinds or shape.tail) else None
            states, guesses = self._run(sum(states for _, states in guesses), False, shape)
        return Config(token, states, shape.tail, guesses) if states or guesses else None

    def walk(self, tokens: Iterable[int], start: Config = START) -> Config | None:
        """After the given tokens; None where they are not reachable."""
        config: Config | None = start
        for token in tokens:
            config = self.step(config, token) if config is not None and self.allowed(config)[token] else None
        return config

    def may_end(self, config: Config) -> bool:
        """Whether the text may end here."""
        return bool(config.states & self.bpe.splits.ends)

    def _allowed(self, config: Config) -> Mask:
        mask, unsure = self._next(config)
        for token in unsure:
            mask[token] = self._leads_on(config, token)
        return mask

    def _live(self, config: Config) -> bool:
        if self.may_end(config):
            return True
        sure, unsure = self._next(config)
        return bool(sure.any()) or any(self._leads_on(config, token) for token in unsure)

    def _leads_on(self, config: Config, token: int) -> bool:
        after = self.step(config, token)
        return after is not None and self.live(after)

    def _next(self, config: Config) -> tuple[Mask, list[int]]:
        """The tokens that a text may end with here [V], and those that something must follow."""
        if config.partial:
            return np.zeros(self.size, bool), self._headed
        value, bits = np.zeros(self.size, np.int8), config.states
        while bits:
            cut, joined = self._table(bits & -bits)
            value = np.maximum(value, cut)
            if config.last >= 0:
                value = np.maximum(value, joined * self.bpe.follows(config.last))
            bits &= bits - 1
        return value == 2, np.flatnonzero(value == 1).tolist()

    def _table(self, state: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
        """From one state, every token [V] with a cut before it and without: 0 impossible, 2 a text may end there, else 1."""
        if state not in self._tables:
            rows = np.zeros((2, self.size), np.int8)
            for shape, tokens in self._shaped.items():
                for row, cut in enumerate((True, False)):
                    states, guesses = (0, ()) if shape.head else self._run(state, cut, shape)
                    rows[row, tokens] = 2 if states & self.bpe.splits.ends else 1 if states or guesses else 0
            self._tables[state] = rows[0], rows[1]
        return self._tables[state]

    def _run(self, states: int, cut: bool, shape: Shape) -> tuple[int, Guesses]:
        """The automaton over a token's whole characters and the beginning of its last: states, or guesses."""
        key = states, cut, shape
        if key not in self._runs:
            for kind in shape.kinds:
                states, cut = self.bpe.splits.step(states, kind, cut), False
            steps = ((kind, self.bpe.splits.step(states, kind, cut)) for kind in sorted(self.bpe.kinds(shape.tail)))
            guesses = tuple((kind, after) for kind, after in steps if after)
            self._runs[key] = (0, guesses) if shape.tail else (states, ())
        return self._runs[key]

    # texts

    def lefts(self, data: bytes, start: Config = START) -> list[list[Left]]:
        """The reachable sequences that spell exactly the first n bytes, for n = 0 .. len(data): one each, or a few."""
        out: list[list[Left]] = [[] for _ in range(len(data) + 1)]
        out[0] = [Left((), start, 0)]
        for at in range(len(data)):
            for token, end in self._tokens_at(data, at) if out[at] else ():
                for left in out[at]:
                    after = self.step(left.config, token) if self.allowed(left.config)[token] else None
                    if after is not None:
                        out[end].append(Left((*left.tokens, token), after, end))
        return out

    def cover(self, data: bytes, start: Config = START) -> list[Left]:
        """The sequences that end inside `data` and may go past its end with one more token, and those that end with it.

        Together with these next tokens they are the cover: empty where no text begins with `data`.
        """
        lefts = self.lefts(data, start)
        found = []
        for at in range(max(0, len(data) - self.longest), len(data)):
            low, high = self.starting(data[at:])
            found += [left for left in lefts[at] if self.allowed(left.config)[self.order[low:high]].any()]
        return found + lefts[len(data)]

    def members(self, data: bytes, start: Config = START) -> set[tuple[int, ...]]:
        """The cover as whole sequences: those that reach or pass the end of `data` with their last token."""
        out = set()
        for left in self.cover(data, start):
            if left.end == len(data):
                out.add(left.tokens)
                continue
            low, high = self.starting(data[left.end :])
            tokens = self.order[low:high]
            out |= {(*left.tokens, token) for token in tokens[self.allowed(left.config)[tokens]].tolist()}
        return out

    def encode(self, data: bytes, start: Config = START) -> list[int]:
        """The tokenizer's encoding. UsageError with the offset of the first byte that no encoding can spell."""
        found = self.lefts(data, start)[len(data)]
        if not found:
            raise self.refusal(data, start)
        return list(self._encoding(found))

    def refusal(self, data: bytes, start: Config = START) -> UsageError:
        """The error for a text that no encoding begins."""
        offset = next((at for at in range(len(data)) if not self.cover(data[: at + 1], start)), len(data) - 1)
        return UsageError(
            f"byte {offset} ({data[offset : offset + 1]!r}) of {data!r} cannot be spelt with this tokenizer: its "
            "probability is 0; leave it out, or use a model that falls back to bytes"
        )

    def starting(self, data: bytes) -> tuple[int, int]:
        """The places in `order` of the tokens that begin with `data`: the first, and one past the last."""
        above = data.rstrip(b"\xff")
        high = bisect_left(self.sorted, above[:-1] + bytes([above[-1] + 1])) if above else len(self.sorted)
        return bisect_left(self.sorted, data), high

    def bytes_of(self, tokens: Iterable[int]) -> bytes:
        """What tokens spell; specials spell nothing."""
        return b"".join(self.data[token] or b"" for token in tokens)

    def surface(self, text: str) -> bytes:
        """The bytes that the tokenizer's encoding of a whole text spells."""
        led = self.bpe.lead_always or not text.startswith(" ")
        return (self.bpe.lead if led else b"") + text.encode()

    def audit(self, texts: Iterable[str]) -> Audit:
        """Encodes texts, cuts the encodings everywhere, and compares with the tokenizer."""
        out = Audit()
        for text in texts:
            tokens = tuple(self.bpe.backend.encode(text, add_special_tokens=False).ids)
            lefts = self.lefts(self.surface(text))
            out.texts += 1
            out.differs += [] if lefts[-1] and self._encoding(lefts[-1]) == tokens else [text]
            end = 0
            for size, token in enumerate(tokens, start=1):
                out.prefixes += 1
                end += len(self.data[token] or b"")
                found = lefts[end] if end < len(lefts) else []
                if tokens[:size] not in {left.tokens for left in found}:
                    out.unreachable.append(list(tokens[:size]))
                elif tokens[:size] != self._encoding(found):
                    out.closure.append(list(tokens[:size]))
        return out

    def _encoding(self, found: list[Left]) -> tuple[int, ...]:
        """Of the ways to spell a text, the one for when it ends there; inside a character, any."""
        return next((left for left in found if self.may_end(left.config)), found[0]).tokens

    def _tokens_at(self, data: bytes, at: int) -> Iterator[tuple[int, int]]:
        for end in range(at + 1, min(len(data), at + self.longest) + 1):
            piece = data[at:end]
            if piece in self._token_of:
                yield self._token_of[piece], end
            elif (places := self.starting(piece))[0] == places[1]:
                return

    def _byte_at(self, depth: int) -> npt.NDArray[np.int64]:
        return np.array([data[depth] if depth < len(data) else -1 for data in self.sorted])


def _either(first: Guesses, second: Guesses) -> Guesses:
    """Guesses that either side allows."""
    states = dict(first)
    for kind, more in second:
        states[kind] = states.get(kind, 0) | more
    return tuple(sorted(states.items()))
