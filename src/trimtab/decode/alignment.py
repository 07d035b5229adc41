"""Alignments: what the tokens of one model are in the tokens of another. The ground that ensembles stand on.

Surfaces are bytes: the space markers of both families (byte-level "Ġ", sentencepiece "▁") become a space, "<0x41>" its
byte, so that " the" is the same in both. (Published code maps one marker to "_" and keeps the other: tokens with a leading
space then never match.) Case is kept.

    union         every surface of either model; a surface only the assistant has is spelled in the main model's tokens (GaC)
    intersection  the main model's tokens; what only the assistant has is lost, and the loss is reported
    mined         each assistant token becomes the main token at the least edit distance of their surfaces
    eva           each assistant token becomes the main token nearest to it after an orthogonal map of the embeddings that
                  is fitted on the surfaces both share

An alignment is an index array, never a matrix V x V.
GaC: arXiv 2406.12585. MinED: edit-distance alignment from knowledge fusion. EVA: arXiv 2404.09492.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trimtab.divergence import same_tokens
from trimtab.errors import UsageError

Index = npt.NDArray[np.int64]


@dataclass
class Alignment:
    """Where the tokens of an assistant go.

    index  [V_i] place of each token in the common space, -1 where it has none
    size   U, of the common space; its first V_0 places are the main model's tokens
    extra  the surfaces at the places from V_0 on
    """

    index: torch.Tensor
    size: int
    extra: list[bytes]

    def project(self, p: torch.Tensor) -> torch.Tensor:
        """p [..., V_i] -> [..., U]; what has no place is lost."""
        known = self.index >= 0
        out = p.new_zeros((*p.shape[:-1], self.size))
        index = self.index.to(p.device)
        return out.index_add_(-1, index[known.to(p.device)], p[..., known.to(p.device)])


def surfaces(lm: Any) -> list[bytes | None]:
    """[V] the bytes each token stands for inside a text; None for special tokens and unused places."""
    tokenizer = lm.tokenizer
    special = {*tokenizer.all_special_ids, *lm.eos_ids}
    strings = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    alphabet = byte_alphabet() if _is_byte_level(tokenizer) else None
    out: list[bytes | None] = []
    for token, string in enumerate(strings):
        if token in special or string is None:
            out.append(None)
        elif alphabet is not None and all(character in alphabet for character in string):
            out.append(bytes(alphabet[character] for character in string))
        elif len(string) == 6 and string.startswith("<0x") and string.endswith(">"):
            out.append(bytes([int(string[3:5], 16)]))
        else:
            out.append(string.replace("\u2581", " ").encode())
    return out + [None] * (lm.vocab_size - len(out))


def _is_byte_level(tokenizer: Any) -> bool:
    decoder = str(getattr(tokenizer.backend_tokenizer, "decoder", ""))
    return "ByteLevel" in decoder


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte, reversed: character -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def ends(index: npt.NDArray[np.int64], main: Any, other: Any) -> None:
    """The end token is one symbol: every end token of the assistant is the first of the main model's."""
    for token in other.eos_ids:
        index[token] = min(main.eos_ids)


def union(main: Any, others: Sequence[Any]) -> list[Alignment]:
    """GaC: one common space of the main model's tokens and every surface that only an assistant has."""
    ours = surfaces(main)
    place = _places(ours)
    extra: list[bytes] = []
    indices = []
    for other in others:
        index = np.full(other.vocab_size, -1, dtype=np.int64)
        if same_tokens(other, main):  # special tokens too
            indices.append(np.arange(other.vocab_size))
            continue
        for token, surface in enumerate(surfaces(other)):
            if surface:
                if surface not in place:
                    place[surface] = len(ours) + len(extra)
                    extra.append(surface)
                index[token] = place[surface]
        ends(index, main, other)
        indices.append(index)
    return [Alignment(torch.from_numpy(index), len(ours) + len(extra), extra) for index in indices]


def intersection(main: Any, others: Sequence[Any]) -> list[Alignment]:
    """Only tokens that both have."""
    place = _places(surfaces(main))
    return [_mapped(main, other, lambda surface: place.get(surface, -1)) for other in others]


def mined(main: Any, others: Sequence[Any]) -> list[Alignment]:
    """The main token at the least edit distance; ties go to the exact surface's length, then the lower number."""
    ours = surfaces(main)
    tree = _Trie([(surface, token) for token, surface in enumerate(ours) if surface])
    return [_mapped(main, other, tree.nearest) for other in others]


def _mapped(main: Any, other: Any, place: Callable[[bytes], int]) -> Alignment:
    if same_tokens(other, main):  # special tokens too
        return Alignment(torch.arange(main.vocab_size), main.vocab_size, [])
    index = np.full(other.vocab_size, -1, dtype=np.int64)
    for token, surface in enumerate(surfaces(other)):
        if surface:
            index[token] = place(surface)
    ends(index, main, other)
    return Alignment(torch.from_numpy(index), main.vocab_size, [])


def eva(main: Any, others: Sequence[Any], threshold: float = -1.0) -> list[Alignment]:
    """Nearest main token by cosine after an orthogonal map of the input embeddings (centred on the shared surfaces).

    threshold: cosine under which a token has no place. UsageError where two models share no surface.
    """
    ours = surfaces(main)
    place = _places(ours)
    target = main.model.get_input_embeddings().weight.float().cpu()
    known = torch.tensor([token for token, surface in enumerate(ours) if surface])
    out = []
    for other in others:
        theirs = surfaces(other)
        pairs = [(token, place[surface]) for token, surface in enumerate(theirs) if surface and surface in place]
        if not pairs:
            raise UsageError(f"{main.name} and {other.name} share no token: align=eva has nothing to fit its map on")
        source = other.model.get_input_embeddings().weight.float().cpu()
        rows, columns = (torch.tensor(side) for side in zip(*pairs, strict=True))
        x_mean, y_mean = source[rows].mean(0), target[columns].mean(0)
        u, _, vt = torch.linalg.svd((source[rows] - x_mean).T @ (target[columns] - y_mean), full_matrices=False)
        mapped = torch.nn.functional.normalize((source - x_mean) @ (u @ vt), dim=-1)
        cosine = mapped @ torch.nn.functional.normalize(target[known] - y_mean, dim=-1).T  # [V_i, V_0]
        best = cosine.max(-1)
        index = torch.where(best.values >= threshold, known[best.indices], -1).numpy().astype(np.int64)
        for token, surface in enumerate(theirs):
            if not surface:
                index[token] = -1
        ends(index, main, other)
        out.append(Alignment(torch.from_numpy(index), main.vocab_size, []))
    return out


def _places(ours: Sequence[bytes | None]) -> dict[bytes, int]:
    """The token of each surface; of several with the same one, the first."""
    place: dict[bytes, int] = {}
    for token, surface in enumerate(ours):
        if surface:
            place.setdefault(surface, token)
    return place


class _Trie:
    """Surfaces in a trie, so that the nearest by Levenshtein distance is found row by row of the dynamic programme.

    A branch is left as soon as the least entry of its row cannot beat the best found; a tie goes to the lower token.
    """

    def __init__(self, words: Sequence[tuple[bytes, int]]):
        self.root: dict[int, Any] = {}
        for word, token in words:
            node = self.root
            for byte in word:
                node = node.setdefault(byte, {})
            node.setdefault(-1, token)

    def nearest(self, word: bytes) -> int:
        best = (len(word) + 1, 1 << 60)  # distance, token
        stack: list[tuple[dict[int, Any], list[int]]] = [(self.root, list(range(len(word) + 1)))]
        while stack:
            node, row = stack.pop()
            if (token := node.get(-1)) is not None and (row[-1], token) < best:
                best = (row[-1], token)
            # the branch of the word's own bytes last: it is popped first and bounds the others
            for byte, child in sorted(node.items(), key=lambda item: item[0] >= 0 and item[0] in word):
                if byte == -1:
                    continue
                new = [row[0] + 1]
                for i, own in enumerate(word, start=1):
                    new.append(min(new[-1] + 1, row[i] + 1, row[i - 1] + (own != byte)))
                if min(new) <= best[0]:
                    stack.append((child, new))
        return best[1]


ALIGNMENTS: dict[str, Callable[[Any, Sequence[Any]], list[Alignment]]] = {
    "union": union,
    "intersection": intersection,
    "mined": mined,
    "eva": eva,
}
