"""A BPE vocabulary as bytes: what each token spells, and which tokens may stand side by side in one piece of text.

Two tokens that are each their own encoding may be neighbours iff bpe(a b) = [a, b], and then a whole sequence stands iff
its neighbours do: up to the first merge across any boundary each side evolves as it does alone. Whether a merge crosses the
boundary of a and b is read off their merge trees: some u at the right end of a's and some w at the left end of b's merge
into one before either is taken by its own parent. That supposes that a merge ranks behind those that make its two parts.
Where a list is out of order (sentencepiece lists give a token several splits) such pairs are suspects, and each is tried.

Longest-match vocabularies have no such rule (of a, b, c, abc the pairs a|b and b|c stand, and a|b|c does not), nor have
Unigram ones: refused.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.decode.byte_splits import MARKER, character_size, code_range, splitter
from trimtab.errors import UsageError

Mask = npt.NDArray[np.bool_]
NEVER = np.iinfo(np.int64).max


class Shape(NamedTuple):
    """A token as characters: the end of one begun before it, the kinds of whole ones, the beginning of the last."""

    head: bytes
    kinds: tuple[str, ...]
    tail: bytes


class Vocabulary:
    """A tokenizer's BPE. tokenizer: a fast one of transformers or a `tokenizers.Tokenizer`; size: V, tokens beyond are not
    used (default: all).

    data     [V] the bytes of each token; None for specials, and for tokens that no text is encoded with
    shapes   the same as characters, for the tokens with bytes
    splits   the automaton of its pre-tokenizer
    lead     what it puts before a text (sentencepiece's space); `lead_always`: even before a space
    notes    what is taken for granted about texts
    follows  a -> the tokens b [V] with bpe(a b) = [a, b]
    """

    def __init__(self, tokenizer: Any, size: int | None = None):
        self.backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(self.backend, "to_str"):
            raise UsageError(f"byte-level needs a fast tokenizer (tokenizer.json), not {type(tokenizer).__name__}")
        spec = json.loads(self.backend.to_str())
        ids, self.merges = _bpe(spec["model"])
        parts = _flat(spec["pre_tokenizer"], "pretokenizers")
        self.byte_level = any(part["type"] == "ByteLevel" for part in parts)
        self._read_text_rules(_flat(spec["normalizer"], "normalizers"), parts)
        self.splits = splitter(parts, self.marked)
        self._kind = lru_cache(maxsize=2**16)(self.splits.kind)
        self.size = size or 1 + max(ids.values())
        self.fallback = bool(spec["model"].get("byte_fallback"))
        self._known = sorted({ord(text) for text in ids if len(text) == 1} | ({32} if self.marked else set()))
        special = {token["id"] for token in spec["added_tokens"] if not (self.fallback and _hex(token["content"]))}
        self.data: list[bytes | None] = [None] * self.size
        self.shapes: dict[int, Shape] = {}
        self._tops: dict[int, tuple[int, int, int] | None] = {}  # the last merge of a token: left, right, rank
        ordinary = {text: token for text, token in ids.items() if token < self.size and token not in special}
        for text, token in ordinary.items():
            self._add(token, text, ids)
        if not self.shapes:
            raise UsageError("byte-level found no token that spells bytes in this vocabulary")
        if spec["model"].get("ignore_merges") and len(self.shapes) < len(ordinary):
            raise UsageError("byte-level cannot use a tokenizer with ignore_merges and tokens that no merges build")
        self._read_trees()
        self.follows = lru_cache(maxsize=max(64, 2**28 // self.size))(self._follows)

    def kinds(self, data: bytes) -> set[str]:
        """The kinds that a character may have whose UTF-8 begins with (or is) `data`; in a vocabulary of characters that
        falls back to bytes, those of a character without a token of its own."""
        span = code_range(data) if data else None
        if span is None:
            return set()
        if not self.fallback:
            return self.splits.kinds(*span)
        first, last = span
        known = bisect_left(self._known, last + 1) - bisect_left(self._known, first)
        surrogates = max(0, min(last, 0xDFFF) - max(first, 0xD800) + 1)
        return {"I"} if last - first + 1 > known + surrogates else set()

    def units(self, token: int) -> list[int]:
        """The tokens that BPE builds a token from: those of its bytes, or of its characters."""
        top = self._tops[token]
        return [token] if top is None else [*self.units(top[0]), *self.units(top[1])]

    def merge(self, tokens: Sequence[int]) -> tuple[list[int], tuple[int, int, int] | None]:
        """BPE: the pair of lowest rank first, the leftmost of several. Also the last merge: left, right, rank."""
        out, top = list(tokens), None
        while True:
            ranked = [(self.merges[pair][0], at) for at, pair in enumerate(pairwise(out)) if pair in self.merges]
            if not ranked:
                return out, top
            rank, at = min(ranked)
            top = (out[at], out[at + 1], rank)
            out[at : at + 2] = [self.merges[out[at], out[at + 1]][1]]

    # inside

    def _read_text_rules(self, normalizers: list[dict[str, Any]], parts: list[dict[str, Any]]) -> None:
        self.marked = any(part["type"] == "Metaspace" for part in parts)
        self.lead_always = any(part["type"] == "Prepend" for part in normalizers)
        sometimes = [part.get("add_prefix_space") or part.get("prepend_scheme", "never") != "never" for part in parts]
        self.lead = b" " if self.lead_always or any(sometimes) else b""
        self.notes: tuple[str, ...] = ()
        for part in normalizers:
            if part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == MARKER:
                self.marked = True
            elif part["type"] == "NFC":
                self.notes += ("texts are taken as composed already (NFC)",)
            elif part != {"type": "Prepend", "prepend": MARKER}:
                raise UsageError(
                    f"this tokenizer changes text before it encodes it ({part['type']}), so bytes have no exact "
                    "probabilities under byte-level: use a model whose tokenizer keeps text as it is"
                )

    def _add(self, token: int, text: str, ids: dict[str, int]) -> None:
        """A token of the vocabulary, unless no text is encoded with it."""
        byte = _hex(text) if self.fallback else None
        if byte is not None:
            data, units = byte, [token]
        elif self.byte_level and all(character in BYTE_ALPHABET for character in text):
            data, units = (
                bytes(BYTE_ALPHABET[character] for character in text),
                [ids.get(character, -1) for character in text],
            )
        elif self.byte_level or (self.marked and " " in text):
            return  # the tokenizer never sees such a character
        else:
            data = (text.replace(MARKER, " ") if self.marked else text).encode()
            units = [ids.get(character, -1) for character in text]
        shape = self._shape(data, byte is not None)
        merged, top = self.merge(units)
        if shape is not None and merged == [token]:
            self.data[token], self.shapes[token], self._tops[token] = data, shape, top

    def _shape(self, data: bytes, byte: bool) -> Shape | None:
        """None for what no legal text holds. byte: a token that spells a byte of a character without a token."""
        start = next((at for at, value in enumerate(data) if value & 0xC0 != 0x80), len(data))
        for end in range(len(data), max(start, len(data) - 3) - 1, -1):
            tail = data[end:]
            if tail and (code_range(tail) is None or len(tail) == character_size(tail[0])):
                continue
            try:
                text = data[start:end].decode()
            except UnicodeDecodeError:
                continue
            kinds = [self.kinds(character.encode()) if byte else {self._kind(character)} for character in text]
            legal = bool(data) and start < 4 and all(kinds)
            return Shape(data[:start], tuple(kind for (kind,) in kinds), tail) if legal else None
        return None

    def _read_trees(self) -> None:
        """The left ends of every merge tree: token, node there, rank of the merge that takes the node."""
        made = {token: -1 if top is None else top[2] for token, top in self._tops.items()}
        self._merges_of: dict[int, list[tuple[int, int]]] = defaultdict(list)  # left -> (right, rank)
        self.ordered = True
        for (left, right), (rank, _) in self.merges.items():
            if left in made and right in made:
                self._merges_of[left].append((right, rank))
                self.ordered &= rank > max(made[left], made[right])
        rows = []
        for token, top in self._tops.items():
            rows.append((token, token, NEVER))
            while top is not None:
                rows.append((token, top[0], top[2] if self.ordered else NEVER))
                top = self._tops[top[0]]
        self._owner, self._node, self._taken = np.array(rows, np.int64).T

    def _follows(self, token: int) -> Mask:
        first = np.full(self.size, NEVER)  # for each w, rank of its first merge with a right end of `token`
        node, taken = token, NEVER
        while True:
            for right, rank in self._merges_of.get(node, ()):
                if rank < taken or not self.ordered:
                    first[right] = min(first[right], rank)
            top = self._tops[node]
            if top is None:
                break
            node, taken = top[1], top[2]
        met = first[self._node]
        crossed = np.unique(self._owner[(met < NEVER) & (met <= self._taken)]).tolist()
        if not self.ordered:
            crossed = [b for b in crossed if self.merge([*self.units(token), *self.units(b)])[0] != [token, b]]
        out = np.zeros(self.size, bool)
        out[list(self.shapes)] = True
        out[crossed] = False
        return out


def _bpe(model: dict[str, Any]) -> tuple[dict[str, int], dict[tuple[int, int], tuple[int, int]]]:
    """The vocabulary, and (left, right) -> (rank, merged)."""
    strange = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    kind = model.get("type") or ("WordPiece" if "continuing_subword_prefix" in model else "not BPE")
    if kind != "BPE" or strange:
        what = f"{kind} with {strange[0]}" if kind == "BPE" else kind
        raise UsageError(f"byte-level is exact for BPE tokenizers only, and this one is {what}: use another model")
    ids: dict[str, int] = model["vocab"]
    pairs = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
    merges: dict[tuple[int, int], tuple[int, int]] = {}
    for rank, (left, right) in enumerate(pairs):
        merges[ids[left], ids[right]] = (rank, ids[left + right])
    return ids, merges


def _flat(spec: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, sequences unrolled."""
    if spec is None:
        return []
    return [inner for part in spec[key] for inner in _flat(part, key)] if spec["type"] == "Sequence" else [spec]


def _hex(text: str) -> bytes | None:
    """The byte that a token like <0x0A> stands for."""
    found = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", text)
    return bytes([int(found[1], 16)]) if found else None


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as a character (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(rest)}


BYTE_ALPHABET = _byte_alphabet()
