"""Rules on n-grams of words: an answer that repeats itself, and one that copies from a list of texts.

Words are those of `trimtab.measure.diversity.words`, in lower case. An answer too short to have an n-gram repeats and
copies nothing: 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.policy import Prompt
from trimtab.rewards.base import Reward


@dataclass(eq=False)
class Repetition(Reward):
    """r = -(1 - |distinct n-grams| / |n-grams|): 0 where nothing repeats, towards -1 where everything does."""

    slug = "repetition"

    n: int = 3  # words an n-gram has

    def __post_init__(self) -> None:
        _check(self.slug, self.n)

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        grams = [_grams(text, self.n) for text in texts]
        return [len(set(some)) / len(some) - 1 if some else 0.0 for some in grams]


@dataclass(eq=False)
class Blocklist(Reward):
    """r = -share of the answer's n-grams that also stand in a text of `file`: -1 for a copy, 0 for nothing in common."""

    slug = "blocklist"

    file: Path  # the texts not to copy, one a line
    n: int = 3  # words an n-gram has

    def __post_init__(self) -> None:
        _check(self.slug, self.n)
        if not self._blocked:
            raise UsageError(f"reward 'blocklist': no line of {self.file} has {self.n} words")

    @cached_property
    def _blocked(self) -> set[tuple[str, ...]]:
        try:
            lines = Path(self.file).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UsageError(f"reward 'blocklist': cannot read {self.file}: {error}") from error
        return {gram for line in lines for gram in _grams(line, self.n)}

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.slug, self.n, sorted(self._blocked))

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        grams = [_grams(text, self.n) for text in texts]
        return [-sum(gram in self._blocked for gram in some) / len(some) if some else 0.0 for some in grams]


def _check(slug: str, n: int) -> None:
    if n < 1:
        raise UsageError(f"reward {slug!r} needs n of 1 or more, not {n}")


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    from trimtab.measure.diversity import words

    found = words(text.lower())
    return list(zip(*(found[i:] for i in range(n)), strict=False))
