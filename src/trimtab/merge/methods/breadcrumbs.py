"""Model breadcrumbs: drop the smallest entries of each change, and the very largest too; add up the rest.

    of n entries of d_t (a tensor at a time) by magnitude: the top int(gamma n) go, and as many of the bottom as leave
    int(density n); where the top alone would leave fewer, less of the top goes
    o = b + scale * sum_t w_t d'_t                           and divided by sum_t w_t if `normalize`

Davari and Belilovsky 2024, arXiv 2312.06795: large outliers disturb the other tasks. Equal to mergekit's in float32 but for
a fault: where int(gamma n) is 0 (any tensor below 100 entries at gamma 0.01, all at gamma 0) that drops the whole change.
Here the top then stays; compat=mergekit repeats the fault. Where int(density n) is 0 the tensor stays the base's.

Cost: three passes over the parents (two find the cuts where density < 1); some 12 T operations an entry. tensors T x [any
shape].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trimtab.merge.method import Part, Parts, in_range, merge_card
from trimtab.merge.methods.sparsify import Combining
from trimtab.merge.select import NONE, Cut, largest

CARD = merge_card(
    slug="breadcrumbs",
    name="Model breadcrumbs",
    paper="Model Breadcrumbs, arXiv 2312.06795",
    summary="Drops the smallest entries of each change and its largest outliers, and adds the changes up.",
    needs=("one or more fine-tunes", "the base they share"),
    fit_cost="reads every parent three times, writes one model",
    limits=("where the largest entries are the skill (short or sparse fine-tunes), dropping them drops it",),
    conflicts=("align",),
    status=("implemented", "verified_cpu"),
    example="trimtab merge breadcrumbs --models A B C --base BASE --density 0.85 --gamma 0.01 --scale 0.3 --out merged",
    choose="Many fine-tunes added up with one setting for all: outliers of one stop hurting the others.",
)


NOTHING = Cut(NONE, 0)


@dataclass(frozen=True)
class BreadcrumbsConfig:
    # share of each change's entries that is kept; one number, or one a model
    density: float | tuple[float, ...] = 1.0
    # share of each change's entries, the largest, that is dropped; one number, or one a model
    gamma: float | tuple[float, ...] = 0.01
    # mergekit: drop the whole change where gamma comes to no entry at all
    compat: Literal["paper", "mergekit"] = "paper"
    # divide by the sum of the weights
    normalize: bool = False
    # the merged change is multiplied by this (lambda)
    scale: float = 1.0


class Breadcrumbs(Combining):
    """See the module."""

    slug = "breadcrumbs"
    Config = BreadcrumbsConfig

    def check(self, parents: int) -> None:
        super().check(parents)
        for key in ("density", "gamma"):
            in_range(self.slug, key, self.each(key, parents), 0.0, 1.0)

    def survey(self, parts: Parts) -> list[tuple[Cut, Cut]]:
        """For each parent, what is not too small and what is too large."""
        first = next(parts(), None)
        if first is None:  # a tensor without rows
            return []
        count, parents = first.place.numel, len(first.weights)
        counts = [
            kept_counts(count, density, gamma, self.config.compat == "mergekit")
            for density, gamma in zip(self.each("density", parents), self.each("gamma", parents), strict=True)
        ]
        cuts = largest(
            lambda: ((part.start, [*part.tensors, *part.tensors]) for part in parts()),
            [*(one[0] for one in counts), *(one[1] for one in counts)],
            count,
        )
        return list(zip(cuts[:parents], cuts[parents:], strict=True))

    def merge(self, part: Part, found: list[tuple[Cut, Cut]]) -> Tensor:
        kept = []
        for tensor, (inside, outliers) in zip(part.tensors, found, strict=True):
            wild = outliers.trim(tensor, part.start) if outliers != NOTHING else None
            one = inside.trim(tensor, part.start)
            kept.append(one if wild is None else one.sub_(wild))  # x - x is exactly 0
        return self.combined(kept, part.weights)


def kept_counts(count: int, density: float, gamma: float, erase: bool) -> tuple[int, int]:
    """How many of `count` entries, the largest first, are not too small, and how many of those are too large.

    erase: keep none where gamma comes to no entry.
    """
    if density >= 1:
        return count, 0
    kept, top = int(density * count), int(gamma * count)
    if erase and not top:
        return 0, 0
    top = min(top, count - kept)
    return kept + top, top
