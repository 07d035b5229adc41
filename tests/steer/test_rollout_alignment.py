"""Rollouts must pair each state with its own token, also after other rows of the batch have ended and been dropped."""

from __future__ import annotations

import torch

from trimtab import pocket
from trimtab.lm import LM
from trimtab.rewards import as_reward
from trimtab.sampling import Sampling
from trimtab.steer.rollouts import collect


def test_states_and_scores_are_those_of_teacher_forcing_on_ragged_answers() -> None:
    lm = LM.load("pocket/base")
    prompts = pocket.prompts("fit", 24, seed=0)
    reward = as_reward("pocket/judge")
    rollouts = collect(lm, prompts, reward, Sampling(max_new_tokens=40, seed=3), rollouts=48)
    assert len(set(rollouts.lengths.tolist())) > 5  # rows ended at different steps
    asked = [prompts[i] for i in rollouts.prompt_index.tolist()]
    states = torch.cat(list(lm.hidden_states(asked, rollouts.tokens)))
    torch.testing.assert_close(rollouts.states, states, atol=2e-4, rtol=0)  # fp32, cached against uncached
    drawn = torch.tensor([token for answer in rollouts.tokens for token in answer])
    weights = -lm.head(states).softmax(-1)
    weights[torch.arange(len(drawn)), drawn] += 1
    torch.testing.assert_close(rollouts.scores, weights @ lm.unembedding, atol=2e-3, rtol=0)
