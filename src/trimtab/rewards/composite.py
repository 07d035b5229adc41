r"""Several rewards as one: `min:rewards=sentiment|length:target=30`. Parts are separated by '|' and kept by name.

    min          the smallest part: an answer is as good as its worst side. The worst case of an ensemble (2310.02743)
    product      the product of parts in [0, 1]
    log-sigmoid  sum_k log sigmoid(r_k - reference_k): a part far above its reference adds nothing more
    ensemble     mean_k r_k - k * sd_k, sd over the members; k = 0 is the mean
    gate         first|second: the second where the first reaches `threshold`, else floor - margin

A piece between two '|' begins a new part if it begins with the name of a reward (or a model folder); any other belongs to
the value before it, so `min:rewards=keyword:words=good|fine|length:target=3` has two parts. A comma inside a part is
written '\,' as everywhere. A '+' before a weight or a name ends the composite: sums are made of composites; a composite of
sums, or of composites, is made in Python (`Min((first, second))`). Scales are the parts' own: an affine calibration
(`calibrated`) brings them to one.

A row that some part cannot judge is not judged, except where that part is named in `optional`: then it is left out of
that row. The published uncertainty-weighted ensemble subtracts a multiple of the variance; here it is the standard
deviation (over all members, not one fewer), so that k has no unit.
"""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.policy import Prompt
from trimtab.rewards.base import Reward
from trimtab.rewards.weighted_sum import WeightedSum
from trimtab.spec import changed, format_spec


@dataclass(eq=False)
class Composite(Reward):
    """What the composites share. Subclasses combine the parts of one row."""

    rewards: tuple[Any, ...]  # the parts, separated by '|': rewards, functions or their specs
    optional: tuple[int, ...] = ()  # the numbers (from 1) of parts that may fail to judge a row

    def __post_init__(self) -> None:
        from trimtab.rewards import as_reward

        found = [as_reward(reward) for reward in _parts(self.rewards)]
        if len(found) < 2:
            raise UsageError(f"reward {self.slug!r} combines two rewards or more; write {self.slug}:rewards=A|B")
        if not set(self.optional) <= set(range(1, len(found) + 1)):
            raise UsageError(
                f"reward {self.slug!r}: optional={'|'.join(map(str, self.optional))} must name parts 1..{len(found)}"
            )
        self._sum = WeightedSum([(1.0, reward) for reward in found])

    @abstractmethod
    def _combine(self, row: Sequence[tuple[int, float]]) -> float:
        """One score from the (number from 0, score) of each part that judged the row: at least one of them."""

    @property
    def terms(self) -> tuple[tuple[float, Reward], ...]:
        """The parts, each with weight 1, as those of a weighted sum."""
        return self._sum.terms

    @property
    def name(self) -> str:
        names = "|".join(reward.name for _, reward in self.terms)
        return format_spec(self.slug, {**changed(self), "rewards": names})

    @property
    def on_prefixes(self) -> bool:  # type: ignore[override]
        return self._sum.on_prefixes

    @property
    def tokens_forwarded(self) -> int:  # type: ignore[override]
        return self._sum.tokens_forwarded

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.slug, {**changed(self), "rewards": None}, self._sum.fingerprint)

    def parts(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[str, list[float | None]]:
        """The scores of every part, by its name (numbered where two parts share one)."""
        return self._sum.parts(prompts, texts)

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
        return self.combined(list(self.parts(prompts, texts).values()))

    def combined(self, parts: Sequence[Sequence[float | None]]) -> list[float | None]:
        """One score a row from the scores of every part, in their order."""
        needed = set(range(len(self.terms))) - {number - 1 for number in self.optional}
        out: list[float | None] = []
        for row in zip(*parts, strict=True):
            known = [(number, value) for number, value in enumerate(row) if value is not None]
            whole = known and needed <= {number for number, _ in known}
            out.append(self._combine(known) if whole else None)
        return out


@dataclass(eq=False)
class Min(Composite):
    """The smallest of the parts."""

    slug = "min"

    def _combine(self, row: Sequence[tuple[int, float]]) -> float:
        return min(value for _, value in row)


@dataclass(eq=False)
class Product(Composite):
    """The product of parts that lie in [0, 1]; `UsageError` where one does not."""

    slug = "product"

    def _combine(self, row: Sequence[tuple[int, float]]) -> float:
        for number, value in row:
            if not 0 <= value <= 1:
                raise UsageError(
                    f"reward 'product': {self.terms[number][1].name!r} gave {value:g}, and parts must lie in [0, 1]; "
                    "calibrate it to a probability, or use min or log-sigmoid"
                )
        return float(np.prod([value for _, value in row]))


@dataclass(eq=False)
class LogSigmoid(Composite):
    """sum_k log sigmoid(r_k - reference_k), at most 0."""

    slug = "log-sigmoid"

    references: tuple[float, ...] = ()  # what each part should reach, separated by '|'; none: 0 each

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.references and len(self.references) != len(self.terms):
            raise UsageError(
                f"reward 'log-sigmoid' has {len(self.terms)} parts and {len(self.references)} references: one each"
            )

    def _combine(self, row: Sequence[tuple[int, float]]) -> float:
        references = self.references or (0.0,) * len(self.terms)
        return float(-sum(np.logaddexp(0, references[number] - value) for number, value in row))


@dataclass(eq=False)
class Ensemble(Composite):
    """mean - k * sd over the members that judged the row."""

    slug = "ensemble"

    k: float = 0.0  # how much disagreement costs, in standard deviations; 0: the mean

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.k < np.inf:
            raise UsageError(f"reward 'ensemble' needs a finite k of 0 or more, not {self.k}")

    def _combine(self, row: Sequence[tuple[int, float]]) -> float:
        values = [value for _, value in row]
        return float(np.mean(values) - self.k * np.std(values))


@dataclass(eq=False)
class Gate(Composite):
    """The second part where the first is at least `threshold`; else floor - margin, below everything that passes.

    For that order to hold, a second part below `floor` counts as `floor`.
    """

    slug = "gate"

    threshold: float = 0.5  # what the first part must reach
    floor: float = 0.0  # the lowest score of an answer that passes
    margin: float = 1.0  # how far below the floor the others are

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.terms) != 2 or self.optional:
            raise UsageError("reward 'gate' takes two parts, the gate and what counts behind it, neither optional")
        if not self.margin > 0:
            raise UsageError(f"reward 'gate' needs a margin above 0, not {self.margin}")

    def _combine(self, row: Sequence[tuple[int, float]]) -> float:
        (_, first), (_, second) = row
        return max(second, self.floor) if first >= self.threshold else self.floor - self.margin


def _parts(pieces: Sequence[Any]) -> list[Any]:
    """Pieces that do not begin with a reward belong to the text before them."""
    out: list[Any] = []
    for piece in pieces:
        if out and isinstance(piece, str) and isinstance(out[-1], str) and not _begins(piece):
            out[-1] += f"|{piece}"
        else:
            out.append(piece)
    return out


def _begins(piece: str) -> bool:
    from trimtab.rewards import REWARDS

    name = re.split(r"[:+]", _WEIGHT.sub("", piece), maxsplit=1)[0].strip()
    return name in REWARDS or os.path.isdir(name)


_WEIGHT = re.compile(r"^\s*-?[\d.]+(?:[eE][+-]?\d+)?\s*\*")
