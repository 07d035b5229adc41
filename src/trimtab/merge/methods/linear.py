"""Linear: the weighted mean of the models themselves (model soups).

    o = sum_t w_t m_t / sum_t w_t                            normalize (default)
    o = sum_t w_t m_t                                        otherwise

Wortsman et al. 2022, arXiv 2203.05482. The base takes no part unless it is listed as a model. Differs from mergekit, its
equality target, in the arithmetic only: float32 parts in place, where that stacks, multiplies and sums in the stored dtype.

Cost: each parent read once, the result written once; 2 T operations an entry. tensors T x [any shape].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trimtab.errors import UsageError
from trimtab.merge.method import Method, Part, merge_card, weighted_sum

CARD = merge_card(
    slug="linear",
    name="Linear merge (model soup)",
    paper="Model soups, arXiv 2203.05482",
    summary="The weighted mean of the models' weights.",
    needs=("two or more checkpoints of one architecture",),
    fit_cost="reads every parent once, writes one model",
    limits=("models that do not share a base are mixed unit by unit that mean different things: align them first",),
    composes_with=("align",),
    status=("implemented", "verified_cpu"),
    example="trimtab merge linear --models A B --weights 0.7 0.3 --out merged",
    choose="Fine-tunes of one base for the same goal (other seeds, other hyperparameters): the mean is as good as anything "
    "and has nothing to tune.",
)


@dataclass(frozen=True)
class LinearConfig:
    # divide by the sum of the weights
    normalize: bool = True


class Linear(Method):
    """See the module."""

    slug = "linear"
    Config = LinearConfig
    DELTAS = False

    def check_weights(self, weights: Sequence[float]) -> None:
        if self.config.normalize:
            normalized(self.slug, weights)

    def merge(self, part: Part, found: object) -> Tensor:
        weights = normalized(self.slug, part.weights) if self.config.normalize else part.weights
        return weighted_sum(part.tensors, weights)


def normalized(slug: str, weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum. UsageError where that is 0."""
    total = sum(weights)
    if abs(total) < 1e-8:
        raise UsageError(
            f"{slug}: the weights sum to {total:g}, so there is no mean: give others, or --normalize false"
        )
    return [weight / total for weight in weights]
