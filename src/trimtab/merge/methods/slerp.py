"""SLERP: from one model to another along the arc between them, so that the norm does not shrink on the way.

    theta = the angle between a and b, a tensor at a time, flattened
    o = sin((1 - t) theta) / sin(theta) a + sin(t theta) / sin(theta) b
    o = (1 - t) a + t b                                    where |cos(theta)| > 0.9995

Shoemake 1985; merging of models took it over from image generation. Equal to mergekit's `slerp` (its base_model is our
first model). Two fine-tunes of one base have cosines above 0.999, so there SLERP of weights *is* a line, which nothing
would say: the report of a merge names the branch of every tensor. `on=deltas` turns the differences to the base
instead, whose angles are wide. A line is no loss: where it runs, its norm is short of the arc's by at most theta^2 / 8
= 1.3e-4. Departures: t may be left to the weights (w_2 / (w_1 + w_2)), angles are in float64, and a tensor that is zero
in one parent (a frozen one, on deltas) is mixed on a line, where mergekit takes zero to lie at a right angle to
everything and gives 0.71 b at t = 0.5 instead of 0.5 b. More than two models are refused rather than folded: a fold
depends on their order.

Cost: two passes over the parents; some 10 operations an entry. tensors 2 x [any shape].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trimtab.errors import UsageError
from trimtab.merge.method import in_range, merge_card
from trimtab.merge.methods.gram import Found, GramMethod, arc, arc_notes, share, two

CARD = merge_card(
    slug="slerp",
    name="SLERP",
    paper="Animating rotation with quaternion curves, Shoemake 1985",
    summary="Moves from one model to the other along the arc between them.",
    needs=("two checkpoints of one architecture",),
    fit_cost="reads both parents twice, writes one model",
    limits=("between fine-tunes of one base it is a line, tensor after tensor: the report says where",),
    composes_with=("align",),
    status=("implemented", "verified_cpu"),
    example="trimtab merge slerp --models A B --t 0.5 --out merged",
    choose="Two models that lie far apart (long continued training, no common base after `align`), where a straight mean "
    "would shrink the weights. For fine-tunes of one base take linear, or on=deltas.",
)

STRAIGHT = 0.9995  # the cosine above which it is a line, mergekit's


@dataclass(frozen=True)
class SlerpConfig:
    # how far from the first model (0) to the second (1); not given: the second's share of the weights
    t: float | None = None
    # what is turned: the models' weights, or their differences to the base
    on: Literal["weights", "deltas"] = "weights"


class Slerp(GramMethod):
    """See the module."""

    slug = "slerp"
    Config = SlerpConfig
    DELTAS = False
    LEAST = 2

    def check(self, parents: int) -> None:
        super().check(parents)
        two(self.slug, parents)
        if self.config.t is not None:
            in_range(self.slug, "t", [self.config.t], 0.0, 1.0)

    def check_weights(self, weights: Sequence[float]) -> None:
        if self.config.t is None:
            share(self.slug, weights)
        elif weights[0] != weights[1]:
            raise UsageError("slerp: t and weights say the same thing: leave one of them out")

    def on_deltas(self, base: bool) -> bool:
        return bool(self.config.on == "deltas")

    def coefficients(self, gram: Tensor, weights: tuple[float, ...]) -> Found:
        t = share(self.slug, weights) if self.config.t is None else self.config.t
        found, line = arc(gram, t, STRAIGHT)
        return Found(found.tolist(), arc_notes(line, gram))
