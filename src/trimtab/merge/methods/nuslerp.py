"""NuSLERP: SLERP by weights, on differences where a base is given, of whole tensors or vector by vector.

    t = w_2 / (w_1 + w_2);  theta = the angle between a and b
    o = sin((1 - t) theta) / sin(theta) a + sin(t theta) / sin(theta) b           (1 - t) a + t b where sin(theta) vanishes

    flatten (default)     one angle a tensor
    flatten=false         one a vector along the last axis (a row of a matrix)
    with row_wise         one a vector along the first axis (a column)

mergekit's `nuslerp`, its equality target: there is no paper. With a base the two are differences to it, without one
they are the models' weights. Departures: the line is taken where cos(theta) > 1 - 1e-12 or < -0.9995 (theirs: where
|sin(theta)| < 1e-8, in float32, in which sin(pi) is 9e-8: opposite vectors of unequal length come out 1e7 times too
long); a vector that is zero in one parent, which has no angle, is mixed on a line (theirs: as if at a right angle);
weights that sum to 0 are refused (theirs: t = 0.5).

Cost: two passes over the parents, one with flatten=false along rows; some 10 operations an entry, in float64 for the
angles. With row_wise three numbers a column are kept. tensors 2 x [any shape]; a tensor with one axis is one vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trimtab.errors import UsageError
from trimtab.merge.method import Part, Parts, merge_card
from trimtab.merge.methods.gram import Found, GramMethod, arc, arc_notes, combine, inner_products, share, two

CARD = merge_card(
    slug="nuslerp",
    name="NuSLERP",
    paper="none: mergekit's nuslerp",
    summary="SLERP by weights, of changes where a base is given, for whole tensors or vector by vector.",
    needs=("two checkpoints of one architecture", "or two fine-tunes and their base"),
    fit_cost="reads both parents twice, writes one model",
    limits=(
        "changes that nearly oppose each other have no good arc: up to 2 degrees from it they are mixed on a line",
    ),
    status=("implemented", "verified_cpu"),
    example="trimtab merge nuslerp --models A B --base BASE --weights 0.6 0.4 --out merged",
    choose="Two fine-tunes whose changes are nearly at right angles: the mean would halve both, the arc keeps 71 % of each.",
)

STRAIGHT = 1 - 1e-12


@dataclass(frozen=True)
class NuSlerpConfig:
    # one angle for the whole tensor; false: one for each vector
    flatten: bool = True
    # with flatten=false: vectors along the first axis (columns of a matrix) in place of the last (rows)
    row_wise: bool = False


class NuSlerp(GramMethod):
    """See the module."""

    slug = "nuslerp"
    Config = NuSlerpConfig
    DELTAS = False
    LEAST = 2

    def check(self, parents: int) -> None:
        super().check(parents)
        two(self.slug, parents)
        if self.config.row_wise and self.config.flatten:
            raise UsageError("nuslerp: row_wise says which vectors, and flatten that there is one: add --flatten false")

    def check_weights(self, weights: Sequence[float]) -> None:
        share(self.slug, weights)

    def on_deltas(self, base: bool) -> bool:
        return base

    def survey(self, parts: Parts) -> Found | None:
        axes = len(next(parts()).place.shape)
        if self.config.flatten or axes < 2:
            return super().survey(parts)
        if not self.config.row_wise:
            return None  # every part has its rows whole
        total: Tensor | None = None
        for part in parts():
            gram = inner_products(part.tensors, 0)
            total = gram if total is None else total.add_(gram)
        assert total is not None  # a tensor has a part
        return Found([*self._arc(total, part.weights)[0]])

    def merge(self, part: Part, found: Found | None) -> Tensor:
        if found is not None:
            return combine(part.tensors, found.coefficients)
        weights, _ = self._arc(inner_products(part.tensors, -1), part.weights)
        return combine(part.tensors, [*weights.unsqueeze(-1)])

    def coefficients(self, gram: Tensor, weights: tuple[float, ...]) -> Found:
        found, line = self._arc(gram, weights)
        return Found(found.tolist(), arc_notes(line, gram))

    def _arc(self, gram: Tensor, weights: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        return arc(gram, share(self.slug, weights), STRAIGHT)
