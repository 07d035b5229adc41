"""PLeaS: two networks of one architecture into one of any size between 1x and 2x, by permutations and least squares.

    match     unit i of A <-> unit P(i) of B in every group of units; c_i says how well (weights or activations)
    split     the best matched pairs are merged, the rest stay apart: widths n (1 + r), r a group within a size budget
    refit     every linear and convolution layer, by itself, to what the parents' layers do on the same inputs

Nasery, Hayase, Koh, Oh 2024, arXiv 2407.02447, CVPR 2025; code SewoongLab/PLeaS-Merging. Which blocks there are:
`blocks`; the fit: `least_squares`; how wide each group becomes: `size_budget`. Layers never see each other's merged
activations (teacher forcing), so one pass of each parent over unlabelled inputs serves all layers and all sizes. The inputs
need not be the parents' own domains ("data-free" in the paper means public inputs): whatever is given is used.

    pair = Pair(a, b, spec, inputs)            or merge_modules(a, b, spec, inputs, budget=1.2)
    merged = pair.merge(1.2)
    merged.model(x)                            shared heads: the mean of both; merged.task("a")(x): A's own head

Departures from the paper and its code:

- the least squares are solved in closed form with a ridge towards the block average, not by 400 steps of Adam;
- the zero blocks are exact: the code masks the transposed blocks, which is right only where both groups have equal splits;
- activation costs are summed over all batches; the code, whose cache never hits, keeps the last batch's;
- pairs are kept apart by rank: the code's quantile keeps more than it should where scores are equal;
- the budget is solved with scipy; the code draws random ratios where Gurobi is missing. What a group gains (w_g) is probed
  without labels: how much nearer the merged outputs come to the parents' mean output when that group alone is kept apart, and
  how much is lost when it alone is merged (the paper: accuracy);
- layers whose weights are tied to another's keep the block average: a fit would untie them. Embeddings and norms are
  averaged.

A group that a LayerNorm, RMSNorm or GroupNorm reads cannot be widened without changing the function; it is merged in full and
named in `held`. Multiply-adds do not count the zero blocks, as in the paper; a module that stores them as zeros computes
`dense_ratio` times one parent (up to 4x where all is kept apart).

Cost: one forward pass of each parent over the inputs; G of a layer with i inputs takes (2 i + 1)^2 doubles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.merge.align.permutation import Spec
from trimtab.merge.pleas.modules import Merged
from trimtab.merge.pleas.pair import Pair
from trimtab.merge.pleas.size_budget import check_target

CARD = Card(
    slug="pleas",
    name="PLeaS",
    paper="PLeaS: Merging Models with Permutations and Least Squares, arXiv 2407.02447",
    summary="Matches the units of two models that share no base, keeps the worst matches apart and refits each layer.",
    goal="capability",
    stage="merge",
    mechanism="weight-arithmetic",
    signal=("checkpoints",),
    access="hidden states",
    produces="weights",
    needs=("two models of one architecture", "unlabelled inputs that both read"),
    infer_multiplier="budget",
    fit_cost="forwards the inputs through both parents once; solves one linear system a layer",
    benefit_metrics=("reward",),
    cost_metrics=("nll_base_per_token",),
    limits=(
        "both parents must fit in memory",
        "parents that know other labels: averaging without a permutation and refitting may be better at size 1",
        "language models: only the feed-forward nets are widened, all layers alike where the architecture has one width",
    ),
    risks=("inputs of one domain fit the layers to that domain alone",),
    conflicts=("linear",),
    data_format="texts",
    status=("implemented", "verified_cpu"),
    example="trimtab merge pleas A B --budget 1.2 --data texts.txt --out merged",
    choose="Two models trained apart, which plain averaging destroys, where a model up to twice as large is acceptable.",
    dimensions=("capability",),
)


@dataclass(frozen=True)
class PleasConfig:
    # size of the merged model: 1 = one parent, 2 = both side by side
    budget: float = 1.2
    # units are matched by their weights (wm) or by their activations on the inputs (am)
    match: Literal["wm", "am"] = "wm"
    # what merged units are fitted to: the mean of both parents (the paper's), or each parent by itself
    targets: Literal["average", "separate"] = "average"
    # weight of staying near the block average, relative to the mean square of a layer's inputs
    ridge: float = 1e-4
    # at most about so many rows (inputs, positions or tokens) of each layer's regression
    rows: int = 10000
    # where the extra units go: by what they gain (qp), equally (uniform), from the head down (zip); auto: uniform for
    # language models, whose layers must be of one width, qp for others
    scheme: Literal["auto", "qp", "uniform", "zip"] = "auto"
    # shared: one head, the mean of both; separate: each parent's own head reads its own features
    heads: Literal["shared", "separate"] = "shared"
    # language models: match the residual stream too, for models that share no base
    residual: bool = False
    # batches that batch norms' statistics are estimated again on; 0 leaves the parents' mean
    statistics: int = 100
    # most bytes of layer statistics held at once; more layers than fit are done in several passes
    memory: int = 2 << 30
    # which rows are drawn, in which order groups are matched
    seed: int = 0

    def __post_init__(self) -> None:
        check_target(self.budget)
        if not (0.0 <= self.ridge < float("inf")):
            raise UsageError(f"pleas: ridge must be 0 or more, not {self.ridge:g}")
        for key, least in (("rows", 1), ("statistics", 0), ("memory", 1)):
            if getattr(self, key) < least:
                raise UsageError(f"pleas: {key} must be {least} or more, not {getattr(self, key)}")


class Pleas:
    """See the module."""

    slug: ClassVar[str] = "pleas"
    Config: ClassVar[type[PleasConfig]] = PleasConfig

    def __init__(self, config: PleasConfig | None = None) -> None:
        self.config = config if config is not None else PleasConfig()

    def merge(self, a: nn.Module, b: nn.Module, spec: Spec, inputs: Any, **more: Any) -> Merged:
        """Merges two modules (see `Pair`)."""
        return Pair(a, b, spec, inputs, self.config, **more).merge()


def merge_modules(a: nn.Module, b: nn.Module, spec: Spec, inputs: Any, budget: float = 1.2, **options: Any) -> Merged:
    """Merges two modules of one architecture within a budget. options: fields of `PleasConfig`, or arguments of `Pair`."""
    own = {key: options.pop(key) for key in ("permutations", "scores", "widen") if key in options}
    return Pair(a, b, spec, inputs, PleasConfig(budget=budget, **options), **own).merge()
