"""Align: put the units of one model in the order of another's, so that the two can be averaged.

Two networks trained apart may hold the same units in other places. Permuting B's changes nothing that it computes, and may
bring it next to A:

    wm    by the weights: maximise <A, pi(B)>                    Git Re-Basin, arXiv 2209.04836        `matching`
    am    by what units answer to texts                          arXiv 1511.07543                      `activations`
    ste   by the loss of the mean, from wm on                    Git Re-Basin, section 3.3             `straight_through`

What may be permuted in which architecture: `specs`. The straight path between A and B before and after, and why it is flat
or not (arXiv 2402.04051): `path`, `analysis`. On folders: `run`; the command: `trimtab merge align A B --out DIR`.

What it means: an L2 reduction and R that rise say that B's units have counterparts in A; a barrier near 0 says that the mean
of A and the permuted B is about as good as the two are. The permuted B computes what B did, whatever else is said.

What it does not mean: that the models can be merged because the distance fell. In wide perceptrons the barrier falls with it;
between small language models trained apart weight matching lowered the distance as much and left the barrier where it was.
Without texts there is no barrier, and no way to tell.

When it misleads: fine-tunes of one base have their units in the same places already; the identity is the right answer there,
and a merge needs no alignment. A barrier of 0 between two bad models is no success: look at the losses at the ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.merge.align.activations import activation_match
from trimtab.merge.align.matching import match
from trimtab.merge.align.permutation import Spec
from trimtab.merge.align.straight_through import Loss, straight_through

CARD = Card(
    slug="align",
    name="Permutation alignment (weight matching)",
    paper="Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching, arXiv 2402.04051",
    summary="Permutes the units of one model so that they match another's, and says whether the two can be averaged.",
    goal="capability",
    stage="merge",
    mechanism="weight-arithmetic",
    signal=("checkpoints",),
    access="weights",
    produces="weights",
    needs=("two models of one architecture and size", "texts, for am, ste and the loss barrier"),
    infer_multiplier="1",
    fit_cost="linear assignments of every group of units; with texts, 2 x points evaluations",
    benefit_metrics=("reward",),
    cost_metrics=("nll_base_per_token",),
    limits=(
        "both models are held in memory",
        "between language models trained apart the weights alone (wm) hardly lower the barrier: give texts and ste",
    ),
    composes_with=("linear", "slerp"),
    status=("implemented", "verified_cpu"),
    data_format="texts",
    example="trimtab merge align A B --residual --texts texts.txt --out b-like-a",
    choose="Two models of one architecture that share no base (other seeds), before any weight averaging.",
    dimensions=("capability",),
)


@dataclass(frozen=True)
class AlignConfig:
    # match units by the weights (wm), by their activations on texts (am), or by the loss of the mean on texts (ste); am and
    # ste match by three of four texts, and the path is measured on the others
    method: Literal["wm", "am", "ste"] = "wm"
    # permute the residual stream too: for models that share no base
    residual: bool = False
    # permute the dimensions within query and key heads (none: where positions are not rotated into them)
    query_key: bool | None = None
    # wm: most sweeps over all groups
    sweeps: int = 100
    # wm: further starts, from random permutations; the best counts
    restarts: int = 0
    # am: most positions at which activations are compared
    rows: int = 4096
    # am: centre and normalise each unit's activations first
    correlation: bool = False
    # ste: steps of Adam
    steps: int = 200
    # ste: its learning rate
    lr: float = 1e-2
    # texts forwarded together, and in one step of ste
    batch: int = 16
    # models on the path whose loss is measured, the ends included
    points: int = 25
    # singular directions count from this share of the largest singular value on
    gamma: float = 0.3
    # order of the groups, restarts, batches
    seed: int = 0

    def __post_init__(self) -> None:
        for key, least in (("sweeps", 1), ("restarts", 0), ("rows", 1), ("steps", 1), ("batch", 1), ("points", 3)):
            if getattr(self, key) < least:
                raise UsageError(f"align: {key} must be {least} or more, not {getattr(self, key)}")
        if not 0.0 <= self.gamma <= 1.0:
            raise UsageError(f"align: gamma must be between 0 and 1, not {self.gamma:g}")
        if not 0.0 < self.lr < float("inf"):
            raise UsageError(f"align: lr must be above 0, not {self.lr:g}")


class Align:
    """See the module."""

    slug: ClassVar[str] = "align"
    Config: ClassVar[type[AlignConfig]] = AlignConfig

    def __init__(self, config: AlignConfig | None = None) -> None:
        self.config = config if config is not None else AlignConfig()

    def permutations(
        self,
        spec: Spec,
        a: Mapping[str, Tensor],
        b: Mapping[str, Tensor],
        *,
        modules: tuple[nn.Module, nn.Module] | None = None,
        batches: Sequence[Any] = (),
        forward: Callable[[nn.Module, Any], Any] | None = None,
        keep: Callable[[Any], Tensor | None] | None = None,
        loss: Loss | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> dict[str, Tensor]:
        """B's permutations, one a group. am needs modules (A's and B's) and batches, ste batches and a loss.

        keep: of a batch, which of its positions are real (`activations.collect`).
        """
        config = self.config
        if config.method == "am":
            if modules is None or not batches:
                raise UsageError("align: method am compares activations: it needs both models and data")
            return activation_match(
                spec,
                *modules,
                batches,
                correlation=config.correlation,
                rows=config.rows,
                forward=forward,
                keep=keep,
                seed=config.seed,
            ).permutations
        if config.method == "ste":
            if loss is None or not batches:
                raise UsageError("align: method ste follows the loss: it needs a loss and data")
            return straight_through(
                spec, a, b, loss, batches, steps=config.steps, lr=config.lr, seed=config.seed, progress=progress
            ).permutations
        return match(
            spec, a, b, sweeps=config.sweeps, restarts=config.restarts, seed=config.seed, progress=progress
        ).permutations
