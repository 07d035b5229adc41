"""Rules: length, keywords and regular expressions. They read the answer alone and can always judge it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from trimtab.errors import UsageError
from trimtab.policy import Prompt
from trimtab.rewards.base import Reward


@dataclass(eq=False)
class Length(Reward):
    """r = -max(0, |length - target| - tolerance) / target: 0 on target, -1 for an empty answer (tolerance 0).

    side=over: a shorter answer is on target too, r = -max(0, length - target - tolerance) / target.
    hard: 1 where that is 0, else 0.
    """

    slug = "length"

    target: int  # the wished length
    unit: Literal["words", "characters"] = "words"  # words are runs of non-space
    tolerance: int = 0  # half the width of the band that scores 0
    side: Literal["both", "over"] = "both"  # what counts as off target: both sides of it, or only what is longer
    hard: bool = False  # 1 on target and 0 off it, instead of the distance

    def __post_init__(self) -> None:
        if self.target < 1 or self.tolerance < 0:
            raise UsageError("reward 'length' needs target >= 1 and tolerance >= 0")

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        lengths = [len(text.split()) if self.unit == "words" else len(text) for text in texts]
        off = [length - self.target if self.side == "over" else abs(length - self.target) for length in lengths]
        missed = [max(0, distance - self.tolerance) for distance in off]
        return [float(not miss) if self.hard else -miss / self.target for miss in missed]


@dataclass(eq=False)
class Keyword(Reward):
    """Whole words or phrases in the answer. any, all: 1 or 0; share: the part of the words that are there; count: how
    many occurrences there are in all.

    A word counts only between word boundaries ("cat" is not in "concatenate").
    """

    slug = "keyword"

    words: tuple[str, ...]  # the words, separated by '|'
    mode: Literal["any", "all", "share", "count"] = "any"  # any, all or which part of the words, or all occurrences
    ignore_case: bool = True  # whether "Cat" counts for "cat"

    def __post_init__(self) -> None:
        if not self.words or any(not word.strip() for word in self.words):
            raise UsageError("reward 'keyword' needs words, none of them empty; write keyword:words=good|great")

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        flags = re.IGNORECASE if self.ignore_case else 0
        return [re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", flags) for word in self.words]

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        out = []
        for text in texts:
            counts = [len(pattern.findall(text)) for pattern in self._patterns]
            found = sum(count > 0 for count in counts)
            judged = {"any": found > 0, "all": found == len(counts), "share": found / len(counts), "count": sum(counts)}
            out.append(float(judged[self.mode]))
        return out


@dataclass(eq=False)
class Regex(Reward):
    """A regular expression (Python's `re`; '.' also matches a newline).

    any: 1 where it matches somewhere; all: 1 where it matches the whole answer; count: the number of matches that do
    not overlap. Python's engine backtracks: a pattern like (a+)+$ can take for ever on a long answer.
    """

    slug = "regex"

    pattern: str  # the expression
    mode: Literal["any", "all", "count"] = "any"  # somewhere, the whole answer, or the number of matches
    ignore_case: bool = False  # whether letters match in either case

    def __post_init__(self) -> None:
        try:
            self._pattern  # noqa: B018  a broken expression is refused here, not in the middle of a run
        except re.error as error:
            raise UsageError(f"reward 'regex': {self.pattern!r} is not a regular expression ({error})") from None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(self.pattern, re.DOTALL | (re.IGNORECASE if self.ignore_case else 0))

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        if self.mode == "count":
            return [float(sum(1 for _ in self._pattern.finditer(text))) for text in texts]
        match = self._pattern.fullmatch if self.mode == "all" else self._pattern.search
        return [float(match(text) is not None) for text in texts]
