"""Alignments: surfaces of both tokenizer families meet, permutations are recovered, edit distance is brute force."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from decode_words import WORDS, permuted
from trimtab import LM
from trimtab.decode.alignment import ALIGNMENTS, Alignment, _Trie, surfaces
from trimtab.errors import UsageError


def test_surfaces_of_both_families_are_the_same_bytes() -> None:
    base, nano = LM.load("pocket/base"), LM.load("pocket/nano")
    ours, theirs = surfaces(base), surfaces(nano)
    text = " Anna lives in the park.\n"
    for lm, table in ((base, ours), (nano, theirs)):
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(table[token] or b"" for token in ids) == text.encode()
        assert all(table[token] is None for token in lm.eos_ids)
    shared = {word for word in ours if word} & {word for word in theirs if word}
    assert b" the" in shared and len(shared) > 200


@pytest.mark.parametrize("align", ["union", "intersection", "mined", "eva"])
def test_a_permutation_is_recovered(align: str) -> None:
    order = list(range(len(WORDS) + 1))
    random.Random(3).shuffle(order)
    main, other = permuted(), permuted(order, rotate=5)
    (found,) = ALIGNMENTS[align](main, [other])
    assert isinstance(found, Alignment) and not found.extra
    assert [int(found.index[order[token]]) for token in range(len(order))] == list(range(len(order)))
    p = torch.rand(2, len(order)).softmax(-1)
    torch.testing.assert_close(found.project(p[:, torch.tensor(order).argsort()]), p[:, :], atol=1e-7, rtol=0)


def test_what_only_an_assistant_has() -> None:
    main, other = permuted(), permuted(words=[*WORDS[:5], "zebra"])
    (union,) = ALIGNMENTS["union"](main, [other])
    assert union.extra == [b" zebra"] and union.size == main.vocab_size + 1
    (shared,) = ALIGNMENTS["intersection"](main, [other])
    assert int(shared.index[6]) == -1 and shared.size == main.vocab_size
    p = torch.full((7,), 1 / 7)
    assert float(shared.project(p).sum()) == pytest.approx(6 / 7)
    assert float(union.project(p).sum()) == pytest.approx(1)


def test_nothing_in_common_is_refused_by_eva() -> None:
    with pytest.raises(UsageError, match="share no token"):
        ALIGNMENTS["eva"](permuted(), [permuted(words=["x", "y", "z"])])


def distance(a: bytes, b: bytes) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def test_the_nearest_surface_is_brute_force() -> None:
    """300 x 300 random tokens: equal distance and, with ties to the lower number, the same token."""
    chance = random.Random(0)

    def words(count: int) -> list[bytes]:
        return [bytes(chance.choice(b"abcd ") for _ in range(chance.randint(1, 8))) for _ in range(count)]

    ours, theirs = words(300), words(300)
    tree = _Trie([(word, token) for token, word in enumerate(ours)])
    first: dict[bytes, int] = {}
    for token, word in enumerate(ours):
        first.setdefault(word, token)
    for word in theirs:
        best = min((distance(word, other), token) for token, other in enumerate(ours))
        assert tree.nearest(word) == first[ours[best[1]]]


def test_an_assistant_of_another_width_can_be_mapped() -> None:
    main, other = permuted(width=16), permuted(width=32)
    found: Any = ALIGNMENTS["eva"](main, [other])[0]
    assert bool((found.index >= 0).all())
