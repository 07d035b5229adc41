"""A weighted sum of rewards: `0.7*sentiment+0.3*length:target=30`. A row that any part cannot judge is not judged.

Parts are added as they are; a part on another scale needs another weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.policy import Prompt
from trimtab.rewards.base import Reward


class WeightedSum(Reward):
    """sum_k weight_k * reward_k. `terms` are (weight, reward) pairs; weights are finite and may be negative."""

    slug = "sum"

    def __init__(self, terms: Sequence[tuple[float, Reward]]) -> None:
        if not terms:
            raise UsageError("a weighted sum of rewards needs at least one reward")
        for weight, reward in terms:
            if not isinstance(reward, Reward):
                raise UsageError(f"a weighted sum takes (weight, reward) pairs; {reward!r} is no reward")
            if not math.isfinite(weight):
                raise UsageError(f"the weight of reward {reward.name!r} must be finite, not {weight}")
        self.terms = tuple((float(weight), reward) for weight, reward in terms)

    @property
    def name(self) -> str:
        return "+".join(f"{weight:g}*{reward.name}" for weight, reward in self.terms)

    @property
    def on_prefixes(self) -> bool:  # type: ignore[override]
        return all(reward.on_prefixes for _, reward in self.terms)

    @property
    def tokens_forwarded(self) -> int:  # type: ignore[override]
        return sum(reward.tokens_forwarded for _, reward in self.terms)

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.slug, [(weight, reward.fingerprint) for weight, reward in self.terms])

    def parts(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[str, list[float | None]]:
        """The unweighted scores of every part, by its name (numbered where two parts share one)."""
        out: dict[str, list[float | None]] = {}
        for _, reward in self.terms:
            twins = sum(key == reward.name or key.startswith(f"{reward.name} #") for key in out)
            out[f"{reward.name} #{twins + 1}" if twins else reward.name] = reward.score(prompts, texts)
        return out

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
        weights = [weight for weight, _ in self.terms]
        rows = zip(*self.parts(prompts, texts).values(), strict=True)
        return [self._combine(weights, row) for row in rows]

    @staticmethod
    def _combine(weights: list[float], row: tuple[float | None, ...]) -> float | None:
        known = [value for value in row if value is not None]
        return sum(w * v for w, v in zip(weights, known, strict=True)) if len(known) == len(row) else None
