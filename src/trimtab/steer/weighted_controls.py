"""Several rewards at once: one control signal a reward, fitted on the same rollouts, mixed while answering.

The minimiser of the natural-control regression is linear in the reward, so sum_i w_i u_i is the control of the reward
sum_i w_i z_i (z_i the standardised rewards): the weights are a dial that needs no new fit.

    happy, short = learn_many(lm, prompts, [Sentiment(), Length(target=20)], strength=8)
    Steered(lm, WeightedControls([happy, short], [0.7, 0.3])).generate(prompts)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trimtab.control import Control
from trimtab.errors import UsageError
from trimtab.generation import cut_at
from trimtab.lm import LM
from trimtab.policy import Cost, Prompt
from trimtab.rewards.base import Reward
from trimtab.sampling import Sampling
from trimtab.spec import build
from trimtab.steer.natural_control import NaturalControl, NaturalControlConfig
from trimtab.steer.rollouts import Progress, Rollouts, collect


class WeightedControls(Control):
    """o + sum_i w_i strength_i u_i(o).

    weights: one number a controller, or a tensor [B, k] with a row of weights for every answer. Rows of weights belong to
    rows of the batch, so they need code that keeps finished rows in place (transformers' `generate` inside `attached`);
    `LM.generate` drops finished rows and is refused: answer each group of prompts with its own weights there.
    """

    def __init__(self, controllers: Sequence[NaturalControl], weights: Sequence[float] | torch.Tensor):
        self.controllers = list(controllers)
        self.weights = torch.as_tensor(weights, dtype=torch.float32)
        if not self.controllers or self.weights.dim() not in (1, 2) or self.weights.shape[-1] != len(self.controllers):
            raise UsageError(
                f"{len(self.controllers)} controllers need as many weights, not {tuple(self.weights.shape)}"
            )
        if not all(controller.final for controller in self.controllers):
            raise UsageError("controllers of form=block cannot be mixed: fit them with form=hook")
        self.name = "+".join(f"{c.name}({c.origin.reward or i})" for i, c in enumerate(self.controllers))

    def edit(self, hidden: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        weights = self.weights.to(hidden.device)
        if weights.dim() == 2:
            if len(weights) != len(hidden):
                raise UsageError(f"there are weights for {len(weights)} rows and {len(hidden)} rows to edit")
            weights = weights.view(len(weights), *[1] * (hidden.dim() - 2), -1)
        u = torch.stack([controller.signal(hidden) for controller in self.controllers], -1)  # [..., D, k]
        return hidden + (u * weights[..., None, :]).sum(-1).to(hidden.dtype)

    def check(self, model: nn.Module) -> None:
        for controller in self.controllers:
            controller.check(model)


def learn_many(
    lm: LM,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    *,
    sampling: Sampling = Sampling(),
    progress: Progress | None = None,
    **options: Any,
) -> list[NaturalControl]:
    """One fitted `NaturalControl` a reward, all from the same rollouts, which are drawn and charged once (to the first).

    Options are those of natural-control; `strength` (or the one tuned to `kl_target`) is each controller's own. Rounds
    need rollouts of their own for each reward and are refused.
    """
    if not rewards:
        raise UsageError("learn_many needs at least one reward")
    config = build(NaturalControlConfig, options, "method 'natural-control'")
    if config.rounds > 1 or config.form != "hook":
        raise UsageError("several rewards share the rollouts of one round: rounds=1 and form=hook are needed")
    drawn = collect(lm, prompts, rewards[0], sampling, config.rollouts, progress=progress)
    out = []
    for number, reward in enumerate(rewards):
        scored = drawn if number == 0 else rescored(drawn, lm, prompts, reward, sampling)
        learnt = NaturalControl.learn(lm, prompts, reward, sampling, config, scored, progress)
        out.append(learnt.ready(lm, prompts, sampling, progress))
    return out


def rescored(
    rollouts: Rollouts, lm: LM, prompts: Sequence[Prompt], reward: Reward, sampling: Sampling = Sampling()
) -> Rollouts:
    """The same answers with another reward; those it cannot judge are left out. Costs the reward calls alone."""
    asked = [prompts[number] for number in rollouts.prompt_index.tolist()]
    texts = [cut_at(lm.decode(row), sampling.stop) for row in rollouts.tokens]
    scores = reward.score(asked, texts)
    kept = [row for row, score in enumerate(scores) if score is not None]
    values = torch.tensor([scores[row] for row in kept], dtype=torch.float32)
    if len(kept) < 2 or not float(values.std()) > 1e-8:
        raise UsageError(f"the reward {reward.name!r} tells none of {len(scores)} answers apart: nothing to learn")
    chosen = rollouts if len(kept) == len(rollouts) else selected(rollouts, torch.tensor(kept))
    return dataclasses.replace(
        chosen, rewards=values, unjudged=len(scores) - len(kept), cost=Cost(reward_calls=len(scores))
    )


def selected(rollouts: Rollouts, rows: torch.Tensor) -> Rollouts:
    """Some of the answers [n], in the given order."""
    index, mask = rollouts.padded(rows)
    steps = index[mask]
    return dataclasses.replace(
        rollouts,
        states=rollouts.states[steps],
        scores=rollouts.scores[steps],
        lengths=rollouts.lengths[rows],
        rewards=rollouts.rewards[rows],
        prompt_index=rollouts.prompt_index[rows],
        ended=rollouts.ended[rows],
        tokens=[rollouts.tokens[row] for row in rows.tolist()],
    )
