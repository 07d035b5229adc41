"""Pref-CTRL: RE-Control whose value function also learns from pairs of a preferred and a rejected answer.

Paper: "Preference Driven LLM Alignment using Representation Editing", arXiv 2604.23543. With s_N the last state of a
rollout, s^p and s^q the last states of a preferred and a rejected answer to the same prompt (the position that predicts
the end token; the state a value function reads before the end is drawn):
    L = L_value + w_margin * -log sigmoid(V(s^p) - V(s^q)) + w_anchor * (V(s_N) - V(s^p))^2
L_value is RE-Control's loss and the terms are means over the rollouts of a batch that have a pair. Decoding is
RE-Control's. With both weights 0 the fit is RE-Control's, bit for bit.

Pairs come from a file, or from the rollouts: of every `group` answers to a prompt the best and the worst. Their states
are already there, and V is standardised, so a margin of 1 is one standard deviation of the reward.

Departures from the published code, each a defect there: pair states are read at the right position (theirs are shifted
by the pads), the end token is appended, pads after the end do not count, and the value loss is RE-Control's corrected
one, so that the gain is the pairs' own. `anchor_detach="preferred"` is ours: the anchor as published also pulls V(s^p)
down to V(s_N), against the margin; detached it moves V(s_N) only.

Cost a token: RE-Control's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import nn

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.policy import Cost, Prompt
from trimtab.sampling import Sampling
from trimtab.steer.controller import origin_of
from trimtab.steer.pairs import PairStates, pairs_drawn, pairs_given, read_pairs
from trimtab.steer.re_control import ReControl, ReControlConfig, value_fit
from trimtab.steer.rollouts import Progress, Rollouts, collect
from trimtab.steer.value import fit_value

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.rewards.base import Reward

CARD = Card(
    slug="pref-ctrl",
    name="Pref-CTRL",
    paper="arXiv 2604.23543",
    summary="RE-Control with a value function that also ranks preferred answers above rejected ones.",
    goal="preference",
    stage="steer",
    mechanism="value-function-control",
    signal=("scalar reward", "pairs"),
    requires=("scalar reward",),
    access="hidden states",
    produces="decoder",
    needs=("a local causal language model", "a reward on finished text", "prompts to roll out", "pairs (or none)"),
    infer_multiplier="1",
    fit_cost="RE-Control's, and one forward of each pair of a file",
    benefit_metrics=("reward",),
    cost_metrics=("kl_per_token", "nll_base_per_token", "diversity"),
    limits=("beam search, assisted decoding and compiled graphs are refused",),
    risks=("over-optimisation: V is unbounded, only step_size x steps stops it",),
    composes_with=("best-of-n",),
    data_format="prompts; optionally pairs (prompt, chosen, rejected)",
    status=("implemented", "verified_cpu"),
    example="trimtab fit pref-ctrl pocket/base --reward pocket/reward --prompts prompts.txt --out my-controller",
)


@dataclass(frozen=True)
class PrefCtrlConfig(ReControlConfig):
    # weight of -log sigmoid(V(preferred) - V(rejected))
    w_margin: float = 1.0
    # weight of (V(rollout) - V(preferred))^2
    w_anchor: float = 1.0
    # what the anchor does not move: none (the published code), preferred
    anchor_detach: Literal["none", "preferred"] = "none"
    # JSONL file of pairs: prompt (one of those fitted on), chosen, rejected; empty: pairs are built from the rollouts
    pairs: str = ""
    # answers to a prompt of which the best and the worst make a pair, where pairs are built from the rollouts
    group: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.w_margin < math.inf and 0 <= self.w_anchor < math.inf):
            raise UsageError(f"w_margin and w_anchor must be 0 or more, not {self.w_margin} and {self.w_anchor}")
        if self.group < 2:
            raise UsageError(f"group must be 2 or more answers, not {self.group}")


class PrefCtrl(ReControl):
    """See the module. `PrefCtrl(value, step_size=..., steps=...)` decodes as `ReControl` does."""

    slug = "pref-ctrl"
    Config = PrefCtrlConfig

    @classmethod
    def learn(
        cls,
        lm: LM,
        prompts: Sequence[Prompt],
        reward: Reward,
        sampling: Sampling,
        config: Any,
        rollouts: Rollouts | None = None,
        progress: Progress | None = None,
    ) -> Self:
        if config.w_margin == 0 and config.w_anchor == 0:
            return super().learn(lm, prompts, reward, sampling, config, rollouts, progress)
        given = read_pairs(config.pairs) if config.pairs else []  # a broken file is refused before anything is drawn
        drawn = rollouts or collect(lm, prompts, reward, sampling, config.rollouts, progress=progress)
        start = time.perf_counter()
        pairs = pairs_given(lm, prompts, given, drawn) if config.pairs else pairs_drawn(drawn, config.group)
        pairs.required()
        terms = PairTerms(pairs, config.w_margin, config.w_anchor, config.anchor_detach)
        value, metrics = fit_value(drawn, value_fit(config), terms, progress)
        metrics |= {"pairs": float(len(pairs)), "pairs_ranked_right_in_sample": ranked_right(value, pairs)}
        metrics |= {"pairs_dropped": float(sum(pairs.dropped.values()))}
        cost = drawn.cost + pairs.cost + Cost(seconds=time.perf_counter() - start)
        origin = origin_of(lm, reward, prompts, drawn, sampling, cost, metrics)
        origin.warnings += [f"{count} pairs were left out: {reason}" for reason, count in pairs.dropped.items()]
        return cls(value, config, origin)


class PairTerms:
    """The margin and the anchor term, called by the value trainer at every batch.

    A rollout with several pairs is shown them in turn, one each time it comes up: no randomness is used.
    """

    def __init__(self, pairs: PairStates, w_margin: float, w_anchor: float, anchor_detach: str):
        self.pairs, self.w_margin, self.w_anchor, self.anchor_detach = pairs, w_margin, w_anchor, anchor_detach
        self.turns = [0] * len(pairs.choices)

    def __call__(self, value: nn.Module, rows: torch.Tensor, last_values: torch.Tensor) -> torch.Tensor:
        """rows [n] of the rollouts, V at their last states [n] -> the weighted terms, a scalar."""
        at, chosen = [], []
        for position, row in enumerate(rows.tolist()):
            if choices := self.pairs.choices[row]:
                at.append(position)
                chosen.append(choices[self.turns[row] % len(choices)])
                self.turns[row] += 1
        if not at:
            return last_values.new_zeros(())
        preferred, rejected = value(self.pairs.preferred[chosen]), value(self.pairs.rejected[chosen])
        return self.w_margin * margin_loss(preferred, rejected) + self.w_anchor * anchor_loss(
            last_values[at], preferred.detach() if self.anchor_detach == "preferred" else preferred
        )


def margin_loss(preferred: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean of -log sigmoid(V(preferred) - V(rejected)), values [n]."""
    return -nn.functional.logsigmoid(preferred - rejected).mean()


def anchor_loss(own: torch.Tensor, preferred: torch.Tensor) -> torch.Tensor:
    """Mean of (V(own last state) - V(preferred))^2, values [n]."""
    return ((own - preferred) ** 2).mean()


@torch.no_grad()
def ranked_right(value: nn.Module, pairs: PairStates) -> float:
    """Share of the pairs whose preferred answer has the higher value (of those the fit saw: no held-out figure)."""
    return float((value(pairs.preferred) > value(pairs.rejected)).float().mean())
