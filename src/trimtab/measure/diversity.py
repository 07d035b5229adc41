r"""Diversity by repeated n-grams, as RE-Control (arXiv 2406.05954) and the contrastive-search papers measure it.

Of one answer, with G_n its n-grams counted with multiplicity:

    rep_n = 100 * (1 - |unique G_n| / |G_n|)          diversity = prod_{n=2..4} (1 - rep_n / 100)

and the mean over answers. The published code divides by |G_n| + 1, so that ten distinct words score 0.7 and one word
0; `compat=True` reproduces it. An answer too short to have an n-gram has nothing to repeat: that factor is 1 and
`too_short` says so.

This sees repetition inside an answer. `distinct` counts n-grams over all answers together, so it also falls when
the answers become alike; it falls with the amount of text too: compare it only at equal numbers and lengths of answers.

Tokens are model tokens, or `words(text)`. The papers use NLTK's word_tokenize, which needs a download; it splits
contractions ("do" + "n't", one word here) and keeps abbreviations ("Mr.", two words here).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

ORDERS = (2, 3, 4)
_WORD = re.compile(r"\d+(?:[.,]\d+)*|\w+(?:['’]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Diversity:
    """value in [0, 1], 1 where nothing repeats. too_short: for some n there was no n-gram, and that factor is 1."""

    value: float
    too_short: bool


def words(text: str) -> list[str]:
    r"""Numbers, words with inner apostrophes, single punctuation marks: `\d+(?:[.,]\d+)*|\w+(?:['’]\w+)*|[^\w\s]`."""
    return _WORD.findall(text)


def diversity(tokens: Sequence[Hashable], *, compat: bool = False) -> Diversity:
    """Of one answer. `compat=True` divides by |G_n| + 1 as the published code does (and then short texts score 0)."""
    value, too_short = 1.0, False
    for n in ORDERS:
        grams = _grams(tokens, n)
        too_short |= not grams
        if grams or compat:
            value *= len(set(grams)) / (len(grams) + compat)
    return Diversity(value, too_short)


def mean_diversity(answers: Sequence[Sequence[Hashable]], *, compat: bool = False) -> float | None:
    """Mean over answers (the corpus value of the papers); None for no answers."""
    values = [diversity(tokens, compat=compat).value for tokens in answers]
    return sum(values) / len(values) if values else None


def distinct(answers: Sequence[Sequence[Hashable]]) -> float | None:
    """prod_{n=2..4} (distinct n-grams / n-grams) over all answers together, in (0, 1]; n-grams do not cross answers.

    None where some n has no n-gram at all.
    """
    value = 1.0
    for n in ORDERS:
        grams = [gram for tokens in answers for gram in _grams(tokens, n)]
        if not grams:
            return None
        value *= len(set(grams)) / len(grams)
    return value


def _grams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))
