"""VADER sentiment (Hutto & Gilbert 2014): compound = s / sqrt(s^2 + 15) in [-1, 1], s the summed valence after rules.

English only. A text without any word of the lexicon, the empty answer included, is neutral: 0, which is VADER's own
judgement and not a missing one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trimtab.errors import UsageError
from trimtab.policy import Prompt
from trimtab.rewards.base import Reward


@dataclass(eq=False)
class Sentiment(Reward):
    """The compound sentiment of the answer in [-1, 1]. Needs vaderSentiment (`pip install "trimtab[text]"`)."""

    slug = "sentiment"

    def __post_init__(self) -> None:
        self._analyzer  # noqa: B018  a missing package is said here, not in the middle of a run

    @cached_property
    def _analyzer(self) -> Any:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise UsageError(
                "reward 'sentiment' needs the vaderSentiment package; run: pip install \"trimtab[text]\""
            ) from None
        return SentimentIntensityAnalyzer()

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        return [self._analyzer.polarity_scores(text)["compound"] for text in texts]
