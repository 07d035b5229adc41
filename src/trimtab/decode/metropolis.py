"""Metropolis-Hastings over answers: the maths of one step, and `Walk`, which takes many chains side by side.

    i uniform on 0..|y|-1;    y' = y_<i + a suffix drawn from p(. | y_<i);    accept with probability min(1, a)
    posterior   a = exp((r' - r) / beta) |y| / |y'|                              leaves p(y) exp(r / beta) as it is
    quest       a = the same times p(y_>=i | y_<i) / p(y'_>=i | y_<i)            leaves exp(r / beta) as it is

p is what proposes, so its likelihood cancels from the posterior; |y| / |y'| is what is left of choosing i (lengths in
tokens, the end token counted). A prefix leads back to y from y' as it led there, so each i is in balance by itself.
A reward of -inf stands for an answer that could not be judged. B chains; uniform numbers in [0, 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from trimtab.decode.chains import Chain, Chains, State
from trimtab.decode.rows import can_take, take
from trimtab.errors import UsageError
from trimtab.generation import Drawn, cut_at, sample
from trimtab.rewards.base import Reward
from trimtab.sampling import derive_seed, uniforms
from trimtab.stepping import Steppable


def cut_points(uniform: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Where the suffix begins: uniform on 0..length-1. [B] float64, [B] -> [B]."""
    return (uniform * lengths).long().minimum(lengths - 1)


def log_gain(reward: torch.Tensor, proposed: torch.Tensor, beta: float) -> torch.Tensor:
    """(r' - r) / beta, [B] float64; 0 where neither could be judged."""
    return ((proposed - reward) / beta).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)


def suffix_ratio(logprobs: Sequence[float], proposed: Sequence[float], cut: int) -> float:
    """log p(y_>=i | y_<i) - log p(y'_>=i | y_<i) from the log-probabilities of all tokens of both: sums, not means."""
    return math.fsum(logprobs[cut:]) - math.fsum(proposed[cut:])


def log_acceptance(
    gain: torch.Tensor, lengths: torch.Tensor, proposed_lengths: torch.Tensor, likelihood: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Log of the probability to accept, [B]: min(0, gain + likelihood + log|y| - log|y'|).

    gain: `log_gain`; likelihood: 0 for the posterior, `suffix_ratio` for quest; lengths in tokens.
    """
    return (gain + likelihood + lengths.double().log() - proposed_lengths.double().log()).clamp(max=0)


class Walk:
    """Some chains of a run, one row each of a session that holds a beginning of every chain's state.

    policy, reward: those of the run; what they take is charged to `run.cost`. New chains draw their first state here.
    """

    def __init__(self, policy: Steppable, reward: Reward, run: Chains, chains: Sequence[Chain]):
        self.lm, self.reward, self.run, self.chains = policy.lm, reward, run, chains
        numbers = sorted({chain.prompt for chain in chains})
        owners = [numbers.index(chain.prompt) for chain in chains]
        self.session: Any = policy.open([run.prompts[number] for number in numbers], run.sampling, run.cost)
        if owners != list(range(len(numbers))):
            self.session = self.session.fork(owners)
        self.takes = can_take(self.session)
        self.uniform = torch.zeros(0)  # [B, 2 + max_new_tokens]: where to cut, whether to accept, the tokens
        self.ended: list[tuple[list[int], Any]] = []
        if not chains[0].path:
            self._begin()

    def step(self) -> None:
        """One step of every chain."""
        states = [chain.state for chain in self.chains]
        proposed, cut = self.propose()
        gain = log_gain(_rewards(states), _rewards(proposed), self.run.beta)
        likelihood = torch.zeros(len(states), dtype=torch.float64)
        if self.run.target == "quest":
            for row, (old, new, at) in enumerate(zip(states, proposed, cut.tolist(), strict=True)):
                likelihood[row] = suffix_ratio(old.logprobs, new.logprobs, at)
        accepted = self.uniform[:, 1].log() < log_acceptance(gain, _lengths(states), _lengths(proposed), likelihood)
        moved = [yes and new is not old for yes, new, old in zip(accepted.tolist(), proposed, states, strict=True)]
        for chain, new, yes in zip(self.chains, proposed, moved, strict=True):
            chain.stand(new, yes)
        self._keep(moved, cut)

    def propose(self) -> tuple[list[State], torch.Tensor]:
        """A proposal to every chain and where its suffix begins [B]. It is the chain's own state where nothing changed."""
        states = [chain.state for chain in self.chains]
        self.uniform = self._numbers()
        cut = cut_points(self.uniform[:, 0], _lengths(states))
        begun = [state.tokens[:at] for state, at in zip(states, cut.tolist(), strict=True)]
        held = (self.session.lengths - self.session.prompts).tolist()
        missing = [row[have:] for row, have in zip(begun, held, strict=True)]
        if any(missing):
            self.session.append(missing)
        branch = self.session.fork(range(self.session.rows))
        branch.rewind(self.session.prompts + cut)
        drawn = self._sample(branch, begun)
        proposed = [
            old if tokens == old.tokens else self._state(drawn, row, old.logprobs[:at])
            for row, (old, tokens, at) in enumerate(zip(states, drawn.tokens, cut.tolist(), strict=True))
        ]
        fresh = [row for row, new in enumerate(proposed) if new is not states[row]]
        for row in fresh:
            self.chains[row].fresh += 1
        self._judge(fresh, proposed)
        return proposed, cut

    def _begin(self) -> None:
        """The first state of every chain: an answer of the policy."""
        self.uniform, everyone = self._numbers(), range(len(self.chains))
        drawn = self._sample(self.session.fork(everyone), [[] for _ in everyone])
        for chain, tokens in zip(self.chains, drawn.tokens, strict=True):
            if not tokens:
                raise UsageError(f"prompt {chain.prompt} fills the context: shorten it, an empty answer has no suffix")
        states = [self._state(drawn, row, []) for row in everyone]
        self._judge(everyone, states)
        for chain, state in zip(self.chains, states, strict=True):
            chain.stand(state, True)
        self._keep([True for _ in everyone], torch.zeros(len(everyone), dtype=torch.long))

    def _numbers(self) -> torch.Tensor:
        """The random numbers of the next step: a stream of each chain's own, whatever stands beside it."""
        seed, width = self.run.sampling.seed, 2 + self.run.sampling.max_new_tokens
        seeds = [derive_seed(seed, chain.prompt, chain.number, len(chain.path)) for chain in self.chains]
        return torch.cat([uniforms(1, width, own) for own in seeds])

    def _sample(self, branch: Any, begun: Sequence[Sequence[int]]) -> Drawn:
        self.ended = []
        return sample(branch, self.run.sampling, self.uniform[:, 2:], None, begun, self.ended if self.takes else None)

    def _keep(self, moved: Sequence[bool], cut: torch.Tensor) -> None:
        """Bring the session to the new states: by their rows, or where rows cannot be taken by what stands before the cut.

        In the second case the next cuts decide how much of an accepted suffix is forwarded once more, in one go.
        """
        for rows, branch in self.ended:
            theirs = [place for place, row in enumerate(rows) if moved[row]]
            if theirs:
                take(self.session, [rows[place] for place in theirs], branch, theirs)
        if not self.takes:
            kept = self.session.prompts + cut
            self.session.rewind(torch.where(torch.tensor(moved), kept, self.session.lengths))

    def _state(self, drawn: Drawn, row: int, before: Sequence[float]) -> State:
        """Not judged yet. before: log-probabilities of the tokens that were not drawn anew."""
        tokens = drawn.tokens[row]
        text = cut_at(self.lm.decode(tokens), self.run.sampling.stop)
        return State(tokens, [*before, *drawn.logprobs[row]], drawn.stopped[row], text, None)

    def _judge(self, rows: Sequence[int], states: Sequence[State]) -> None:
        prompts = [self.run.prompts[self.chains[row].prompt] for row in rows]
        scores = self.reward.score(prompts, [states[row].text for row in rows], self.run.cost)
        for row, score in zip(rows, scores, strict=True):
            states[row].reward = score


def _lengths(states: Sequence[State]) -> torch.Tensor:
    return torch.tensor([len(state.tokens) for state in states])


def _rewards(states: Sequence[State]) -> torch.Tensor:
    known = [-math.inf if state.reward is None else state.reward for state in states]
    return torch.tensor(known, dtype=torch.float64)
