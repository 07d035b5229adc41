"""Rollouts: answers drawn from a policy, the hidden state before every token, and the reward of every finished answer.

Shared by every method that learns from samples. Besides the state o_t a rollout keeps the score vector
c_t = d log p(y_t) / d o_t = (W[y_t] - sum_a p_t(a) W[a]) / tau (soft-capping and scaling of the head included), the
derivative of the drawn token's log-probability in the hidden state: with it a fit never touches the vocabulary again.
States and score vectors are taken while sampling; nothing is forwarded twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from trimtab.control import Control
from trimtab.errors import UsageError
from trimtab.generation import Step
from trimtab.lm import LM
from trimtab.policy import Cost, Prompt
from trimtab.rewards.base import Reward
from trimtab.sampling import Sampling, derive_seed

Progress = Callable[[str], None]
CHUNK = 512  # answers drawn and scored between two lines of progress
FEWEST_PROMPTS = 4


@dataclass
class Rollouts:
    """N answers of M = sum(lengths) tokens in all, flat: row i owns `offsets[i] : offsets[i] + lengths[i]`.

    states   [M, D] final hidden state before each token, before any edit
    scores   [M, D] score vectors c_t under the distribution the token was drawn from
    lengths  [N] tokens of each answer, the end token included; always >= 1
    rewards  [N] float32
    prompt_index [N], ended [N] (False: cut by the horizon), unjudged: answers dropped because the reward gave None
    """

    states: torch.Tensor
    scores: torch.Tensor
    lengths: torch.Tensor
    rewards: torch.Tensor
    prompt_index: torch.Tensor
    ended: torch.Tensor
    tokens: list[list[int]]
    unjudged: int = 0
    cost: Cost = field(default_factory=Cost)
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def offsets(self) -> torch.Tensor:
        return self.lengths.cumsum(0) - self.lengths

    @property
    def standardised(self) -> torch.Tensor:
        """(reward - mean) / std over the rollouts, [N]."""
        return (self.rewards - self.rewards.mean()) / self.rewards.std()

    def padded(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Index [n, T] into the flat steps for some rows, and the mask [n, T] of real steps (pads repeat the last)."""
        lengths = self.lengths[rows]
        steps = torch.arange(int(lengths.max()))
        mask = steps < lengths[:, None]
        return self.offsets[rows][:, None] + steps.minimum(lengths[:, None] - 1), mask

    def split(self, share: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Row numbers for fitting and for validation (`share` of them, at least 1), at random."""
        order = torch.randperm(len(self), generator=generator)
        held = max(1, int(len(self) * share))
        return order[held:], order[:held]


def collect(
    lm: LM,
    prompts: Sequence[Prompt],
    reward: Reward,
    sampling: Sampling,
    rollouts: int = 4096,
    control: Control | None = None,
    progress: Progress | None = None,
) -> Rollouts:
    """Draw `rollouts` answers, the prompts in turn, and score them. control: the policy is `lm` under this final edit.

    Raises `UsageError` for sampling that is not a plain softmax (greedy explores nothing; cuts and penalties change the
    distribution that the score vectors belong to), for too few prompts, and for a reward without variance.
    """
    if not sampling.is_softmax:
        raise UsageError("rollouts must explore: temperature above 0, without top-k, top-p, min-p or penalties")
    if control is not None and not control.final:
        raise UsageError("rollouts can be drawn under an edit of the final hidden state only")
    if sampling.max_new_tokens < 1 or rollouts < 2:
        raise UsageError(f"{rollouts} rollouts of {sampling.max_new_tokens} tokens teach nothing: give at least 2 of 1")
    if len(prompts) < FEWEST_PROMPTS:
        raise UsageError(
            f"{len(prompts)} prompts are too few to fit on: give at least {FEWEST_PROMPTS}, better 50 or more"
        )
    start = time.perf_counter()
    parts: list[_Part] = []
    total = Cost()
    for first in range(0, rollouts, CHUNK):
        numbers = [(first + i) % len(prompts) for i in range(min(CHUNK, rollouts - first))]
        part = _Part(lm, sampling, numbers)
        chosen = [prompts[number] for number in numbers]
        draws = sampling.but(samples=1, seed=derive_seed(sampling.seed, "rollouts", first))
        answers = lm.generate(chosen, draws, control, part.observe)
        rewards = reward.score(chosen, answers.texts, answers.cost)
        part.finish(answers.tokens, answers.finish_reasons, rewards)
        total = total + answers.cost
        parts.append(part)
        if progress is not None:
            progress(f"rollouts {first + len(numbers)}/{rollouts}")
    out = _joined(parts)
    out.cost = total
    out.cost.seconds = time.perf_counter() - start
    _examine(out, reward.name, rollouts)
    if all(prompt == prompts[0] for prompt in prompts):
        out.warnings.append("all prompts are the same: expect a control that fits this prompt alone")
    return out


class _Part:
    """Gathers one chunk: every step's states and score vectors, then rows sorted into answers."""

    def __init__(self, lm: LM, sampling: Sampling, numbers: list[int]):
        self.lm, self.temperature, self.numbers = lm, sampling.temperature, numbers
        self.rows: list[torch.Tensor] = []
        self.states: list[torch.Tensor] = []
        self.scores: list[torch.Tensor] = []

    def observe(self, step: Step) -> None:
        weights = -step.logprobs.exp()
        weights[torch.arange(len(weights)), step.tokens] += 1
        self.rows.append(step.rows)
        self.states.append(step.hidden.float().cpu())
        self.scores.append(self.lm.head.vjp(step.edited, weights).cpu() / self.temperature)

    def finish(self, tokens: list[list[int]], reasons: list[str], rewards: list[float | None]) -> None:
        keep = torch.tensor([value is not None and bool(row) for value, row in zip(rewards, tokens, strict=True)])
        rows = torch.cat(self.rows) if self.rows else torch.zeros(0, dtype=torch.long)
        order = rows.sort(stable=True).indices
        order = order[keep[rows[order]]]
        width = self.lm.hidden_size
        self.flat_states = torch.cat(self.states)[order] if len(rows) else torch.zeros(0, width)
        self.flat_scores = torch.cat(self.scores)[order] if len(rows) else torch.zeros(0, width)
        self.states, self.scores, self.rows = [], [], []
        self.unjudged = int((~keep).sum())
        kept = keep.nonzero()[:, 0].tolist()
        self.tokens = [tokens[i] for i in kept]
        self.rewards = torch.tensor([float(rewards[i] or 0.0) for i in kept], dtype=torch.float32)
        self.ended = torch.tensor([reasons[i] == "stop" for i in kept], dtype=torch.bool)
        self.prompts = torch.tensor([self.numbers[i] for i in kept], dtype=torch.long)


def _joined(parts: list[_Part]) -> Rollouts:
    tokens = [row for part in parts for row in part.tokens]
    return Rollouts(
        states=torch.cat([part.flat_states for part in parts]),
        scores=torch.cat([part.flat_scores for part in parts]),
        lengths=torch.tensor([len(row) for row in tokens], dtype=torch.long),
        rewards=torch.cat([part.rewards for part in parts]),
        prompt_index=torch.cat([part.prompts for part in parts]),
        ended=torch.cat([part.ended for part in parts]),
        tokens=tokens,
        unjudged=sum(part.unjudged for part in parts),
    )


def _examine(rollouts: Rollouts, reward: str, wanted: int) -> None:
    if len(rollouts) < 2:
        raise UsageError(f"the reward {reward!r} judged {len(rollouts)} of {wanted} answers: nothing to learn from")
    if not float(rollouts.rewards.std()) > 1e-8:
        raise UsageError(f"the reward {reward!r} gives every answer {float(rollouts.rewards[0]):g}: nothing to learn")
    say = rollouts.warnings.append
    if rollouts.unjudged:
        say(f"the reward could not judge {rollouts.unjudged} of {wanted} answers; they were left out")
    if len(rollouts) < 200:
        say(f"only {len(rollouts)} rollouts: expect a poor fit (2,000 to 16,000 are usual)")
    cut = 1 - float(rollouts.ended.float().mean())
    if cut > 0.2:
        say(f"{cut:.0%} of the rollouts were cut at max_new_tokens; their reward is that of the cut text")
