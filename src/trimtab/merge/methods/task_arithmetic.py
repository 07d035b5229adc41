"""Task arithmetic: what each fine-tune changed, added up on the base.

    d_t = m_t - b;  o = b + scale * sum_t w_t d_t            and divided by sum_t w_t if `normalize`

Ilharco et al. 2023, arXiv 2212.04089. A negative weight takes a skill away. Equal to mergekit's in float32 (its lambda is our
scale), except that weights which sum to 0 are refused with normalize, where that leaves the division out.

Cost: each parent and the base read once, the result written once; 2 T operations an entry. tensors T x [any shape].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trimtab.merge.method import Method, Part, merge_card, weighted_sum
from trimtab.merge.methods.linear import normalized

CARD = merge_card(
    slug="task-arithmetic",
    name="Task arithmetic",
    paper="Editing models with task arithmetic, arXiv 2212.04089",
    summary="Adds what each fine-tune changed to the base, times a weight; a negative weight takes it away.",
    needs=("one or more fine-tunes", "the base they share"),
    fit_cost="reads every parent once, writes one model",
    limits=("the sum of several changes overshoots where they agree: the scale must be found, `trimtab merge search`",),
    risks=("a large negative weight unlearns more than the skill",),
    conflicts=("align",),
    status=("implemented", "verified_cpu"),
    example="trimtab merge task-arithmetic --models A B --base BASE --scale 0.5 --out merged",
    choose="The first thing to try with a base: one dial, and the only method here that also weakens or negates a skill "
    "predictably.",
)


@dataclass(frozen=True)
class TaskArithmeticConfig:
    # divide by the sum of the weights
    normalize: bool = False
    # the merged change is multiplied by this (lambda)
    scale: float = 1.0


class TaskArithmetic(Method):
    """See the module."""

    slug = "task-arithmetic"
    Config = TaskArithmeticConfig

    def check_weights(self, weights: Sequence[float]) -> None:
        if self.config.normalize:
            normalized(self.slug, weights)

    def merge(self, part: Part, found: object) -> Tensor:
        weights = normalized(self.slug, part.weights) if self.config.normalize else part.weights
        return weighted_sum(part.tensors, [self.config.scale * weight for weight in weights])
