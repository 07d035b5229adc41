"""Rollouts: the states and score vectors belong to the tokens that were drawn, and what cannot be learnt from is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from oracles.toy import EOS, Toy
from trimtab import Sampling
from trimtab.errors import UsageError
from trimtab.rewards import Function
from trimtab.steer import StaticRE, collect
from trimtab.steer.rollouts import Rollouts


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def drawn(toy: Toy) -> Rollouts:
    return collect(toy.lm, prompts(toy), toy.reward, toy.sampling, 600)


def prompts(toy: Toy) -> list[str]:
    return [toy.prompt, "1 2 3", "2", "5 4 3 2"]


def rows_of(rollouts: Rollouts) -> list[slice]:
    ends = rollouts.lengths.cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, rollouts.lengths.tolist(), strict=True)]


def test_states_are_those_of_a_teacher_forced_run(toy: Toy, drawn: Rollouts) -> None:
    asked = [prompts(toy)[number] for number in drawn.prompt_index[:60].tolist()]
    forced = toy.lm.hidden_states(asked, drawn.tokens[:60])
    for states, rows in zip(forced, rows_of(drawn), strict=False):
        assert (drawn.states[rows] - states).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_the_gradient_of_the_drawn_tokens_log_probability(toy: Toy, temperature: float) -> None:
    rollouts = collect(toy.lm, prompts(toy), toy.reward, toy.sampling.but(temperature=temperature), 40)
    states = rollouts.states.clone().requires_grad_(True)
    logprobs = (toy.lm.head(states) / temperature).log_softmax(-1)
    drawn = torch.tensor([token for row in rollouts.tokens for token in row])
    (expected,) = torch.autograd.grad(logprobs.gather(-1, drawn[:, None]).sum(), states)
    assert (rollouts.scores - expected).abs().max() < 1e-5


def test_scores_under_an_edit_are_taken_at_the_edited_state(toy: Toy) -> None:
    control = StaticRE(torch.arange(1.0, 17), strength=2.0)
    rollouts = collect(toy.lm, prompts(toy), toy.reward, toy.sampling, 40, control)
    edited = control.edit(rollouts.states).requires_grad_(True)
    drawn = torch.tensor([token for row in rollouts.tokens for token in row])
    picked = toy.lm.head(edited).log_softmax(-1).gather(-1, drawn[:, None])
    (expected,) = torch.autograd.grad(picked.sum(), edited)
    assert (rollouts.scores - expected).abs().max() < 1e-5


def test_every_answer_has_its_reward_prompt_and_end(toy: Toy, drawn: Rollouts) -> None:
    assert len(drawn) == 600 and drawn.lengths.sum() == len(drawn.states) == len(drawn.scores)
    assert drawn.prompt_index.tolist() == [i % 512 % 4 for i in range(600)]
    for row, tokens in enumerate(drawn.tokens):
        assert float(drawn.rewards[row]) == pytest.approx(toy.score(tuple(t for t in tokens if t != EOS)), abs=1e-6)
        assert bool(drawn.ended[row]) == (tokens[-1] == EOS)
        assert len(tokens) == toy.horizon or drawn.ended[row]
    lengths = set(drawn.lengths.tolist())
    assert {1, toy.horizon} <= lengths  # an end token at once, and answers cut by the horizon
    assert drawn.cost.reward_calls == 600 and drawn.cost.tokens_forwarded > 0


def test_samples_agree_with_the_enumeration(toy: Toy) -> None:
    rollouts = collect(toy.lm, [toy.prompt] * 4, toy.reward, toy.sampling, 2048)
    exact = toy.evaluate(toy.base)
    error = 4 * float(rollouts.rewards.std()) / 2048**0.5
    assert float(rollouts.rewards.mean()) == pytest.approx(exact.reward, abs=error)
    assert float(rollouts.lengths.float().mean()) == pytest.approx(exact.tokens, abs=0.15)


def test_padded_rows_point_at_their_own_steps(drawn: Rollouts) -> None:
    rows = torch.tensor([7, 0, 31])
    index, mask = drawn.padded(rows)
    for at, row in enumerate(rows.tolist()):
        own = rows_of(drawn)[row]
        assert index[at][mask[at]].tolist() == list(range(own.start, own.stop))
        assert set(index[at][~mask[at]].tolist()) <= {own.stop - 1}


def test_the_same_seed_gives_the_same_rollouts(toy: Toy, drawn: Rollouts) -> None:
    again = collect(toy.lm, prompts(toy), toy.reward, toy.sampling, 600)
    other = collect(toy.lm, prompts(toy), toy.reward, toy.sampling.but(seed=1), 600)
    assert again.tokens == drawn.tokens and torch.equal(again.states, drawn.states)
    assert other.tokens != drawn.tokens


def test_answers_without_a_judgement_are_left_out_and_counted(toy: Toy) -> None:
    reward = Function(lambda _, texts: [None if not text else float(len(text)) for text in texts], name="length")
    rollouts = collect(toy.lm, prompts(toy), reward, toy.sampling, 100)
    assert rollouts.unjudged > 0 and len(rollouts) == 100 - rollouts.unjudged
    assert all(row != [EOS] for row in rollouts.tokens) and len(rollouts.states) == rollouts.lengths.sum()
    assert any(f"could not judge {rollouts.unjudged} of 100" in warning for warning in rollouts.warnings)


def test_warnings_carry_their_numbers(toy: Toy, drawn: Rollouts) -> None:
    few = collect(toy.lm, prompts(toy), toy.reward, toy.sampling.but(max_new_tokens=2), 50)
    cut = 1 - float(few.ended.float().mean())
    assert any("only 50 rollouts" in warning for warning in few.warnings)
    assert cut > 0.2 and any(f"{cut:.0%} of the rollouts were cut" in warning for warning in few.warnings)
    assert not any("rollouts: expect" in warning for warning in drawn.warnings)
    same = collect(toy.lm, [toy.prompt] * 4, toy.reward, toy.sampling, 50)
    assert any("all prompts are the same" in warning for warning in same.warnings)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda _, texts: [2.5] * len(texts), r"the reward 'r' gives every answer 2.5: nothing to learn"),
        (lambda _, texts: [float("nan")] * len(texts), r"reward 'r' gave nan on row 0"),
        (lambda _, texts: [float("inf")] * len(texts), r"reward 'r' gave inf on row 0"),
        (lambda _, texts: [None] * len(texts), r"the reward 'r' judged 0 of 40 answers: nothing to learn from"),
        (lambda _, texts: [1.0], r"reward 'r' gave 1 values for 40 rows"),
    ],
    ids=["constant", "nan", "inf", "none", "shape"],
)
def test_rewards_that_teach_nothing_are_refused(toy: Toy, fn: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        collect(toy.lm, prompts(toy), Function(fn, name="r"), toy.sampling, 40)


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(top_k=2), Sampling(top_p=0.9), Sampling(repetition_penalty=1.2)]
)
def test_sampling_that_does_not_explore_is_refused(toy: Toy, sampling: Sampling) -> None:
    with pytest.raises(UsageError, match="rollouts must explore: temperature above 0, without top-k"):
        collect(toy.lm, prompts(toy), toy.reward, sampling, 40)


def test_a_handful_of_prompts_is_needed(toy: Toy) -> None:
    with pytest.raises(UsageError, match="3 prompts are too few to fit on: give at least 4"):
        collect(toy.lm, prompts(toy)[:3], toy.reward, toy.sampling, 40)
