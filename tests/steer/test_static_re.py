"""Static RE: the regression against its normal equations, the edit against a logit bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import nn

from oracles.toy import Toy, free_reward
from tiny import tiny_lm
from trimtab import Sampling, Steered
from trimtab.errors import UsageError
from trimtab.steer import ReControl, StaticRE, static_re
from trimtab.steer.static_re import StaticREConfig, fit_direction, regression_rows, ridge_regression

PROMPTS = ["ba da fa la", "ma na", "pa ra sa ta be", "pe"]


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy(free_reward)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_ridge_is_the_minimum_of_its_objective(ridge: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_re, "CHUNK", chunk)
    states, target = randn(60, 5) + 3, randn(40, seed=1).double()
    index = torch.randperm(60, generator=torch.Generator().manual_seed(2))[:40]
    w = ridge_regression(states, index, target, ridge)
    x = states[index].double()
    x, y = x - x.mean(0), target - target.mean()
    variance = (x**2).mean()
    slope = 2 * x.T @ (x @ w - y) / 40 + 2 * max(ridge, 1e-9) * variance * w
    assert slope.abs().max() < 1e-6
    scaled = ridge_regression(100 * states, index, target, ridge)
    assert torch.allclose(scaled * 100, w, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("states", ["prompt", "all"])
def test_rows_are_the_first_state_or_every_state(toy: Toy, states: Literal["prompt", "all"]) -> None:
    rollouts = toy.rollouts(50)
    answers = torch.tensor([4, 0, 17])
    index, target = regression_rows(rollouts, answers, states)
    expected, values = [], []
    for answer in answers.tolist():
        start, length = int(rollouts.offsets[answer]), int(rollouts.lengths[answer])
        own = [start] if states == "prompt" else list(range(start, start + length))
        expected += own
        values += [float(rollouts.standardised[answer])] * len(own)
    assert index.tolist() == expected and target.tolist() == pytest.approx(values)


def test_a_known_direction_is_found(toy: Toy) -> None:
    rollouts = toy.rollouts(400)
    rollouts.states = randn(len(rollouts.states), 16)
    w = randn(16, seed=5)
    first = rollouts.states[rollouts.offsets]
    noisy = replace(rollouts, rewards=first @ w + 0.1 * randn(400, seed=6))
    found, metrics = fit_direction(noisy, StaticREConfig())
    assert torch.cosine_similarity(found, w, dim=0) > 0.99 and metrics["correlation_held_out"] > 0.98


def test_one_prompt_has_one_state_and_is_refused(toy: Toy) -> None:
    with pytest.raises(UsageError, match="hidden states do not vary.* give more prompts, or states=all"):
        fit_direction(toy.rollouts(100), StaticREConfig())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_the_edit_is_a_logit_bias(arch: str) -> None:
    lm = tiny_lm(arch)
    control = StaticRE(randn(lm.hidden_size), strength=2.5)
    tokens = torch.tensor([[5, 9, 30, 4, 11]])
    before = lm.model(tokens).logits
    with control.attached(lm.model, positions="all"):
        after = lm.model(tokens).logits
    assert (after - before - control.logit_bias(lm)).abs().max() < 1e-5
    greedy = Sampling(max_new_tokens=10, temperature=0)
    steered = Steered(lm, control).generate(PROMPTS, greedy)
    head = lm.model.get_output_embeddings()
    bias = control.logit_bias(lm)
    hook = head.register_forward_hook(lambda _m, _i, logits: logits + bias)
    try:
        assert lm.generate(PROMPTS, greedy).tokens == steered.tokens
    finally:
        hook.remove()
    assert lm.generate(PROMPTS, greedy).tokens != steered.tokens


def test_a_model_that_caps_its_logits_has_no_such_bias() -> None:
    lm = tiny_lm("gemma2")
    with pytest.raises(UsageError, match="caps its logits"):
        StaticRE(randn(32), strength=1.0).logit_bias(lm)


def test_it_is_re_control_with_a_linear_value() -> None:
    w, o = randn(32), randn(6, 32, seed=1)

    class Linear(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden @ w

    climbed = ReControl(Linear(), step_size=0.02, steps=30).edit(o)
    static = StaticRE(w, strength=0.02 * 30 * float(w.norm())).edit(o)
    assert (climbed - static).abs().max() < 1e-5


def test_fit_gains_reward_on_a_reward_without_context(toy: Toy) -> None:
    control = StaticRE.learn(
        toy.lm,
        [toy.prompt] * 4,
        toy.reward,
        toy.sampling,
        StaticREConfig(states="all", strength=2.0),
        toy.rollouts(4096),
    )
    base, steered = (toy.evaluate(toy.logprobs(s)) for s in (toy.states, control.edit(toy.states)))
    assert steered.reward > base.reward + 0.2 and steered.kl < 0.5


def test_strength_zero_is_the_base_and_the_dial_is_linear() -> None:
    o, control = randn(3, 8), StaticRE(randn(8), strength=4.0)
    assert control.scaled(0).edit(o) is o
    assert torch.allclose(control.scaled(0.5).edit(o) - o, 0.5 * (control.edit(o) - o), atol=1e-6)
    assert torch.allclose((control.edit(o) - o).norm(dim=-1), torch.full((3,), 4.0), atol=1e-5)
    assert torch.allclose(control.trace(o)["edit_norm"], torch.full((3,), 4.0), atol=1e-5)


@pytest.mark.parametrize(
    ("direction", "options", "message"),
    [
        (torch.zeros(4), {"strength": 1.0}, "not all 0"),
        (torch.full((4,), float("nan")), {"strength": 1.0}, "finite numbers"),
        (torch.ones(2, 2), {"strength": 1.0}, r"a direction \[D\]"),
        (torch.ones(4), {"strength": -1.0}, "strength must be 0 or more, not -1.0"),
        (torch.ones(4), {"ridge": -1.0}, "ridge must be 0 or more"),
        (torch.ones(4), {"strenght": 1.0}, "did you mean 'strength'"),
        (torch.ones(4), {"states": "last"}, "states='last' is not one of prompt, all"),
    ],
)
def test_bad_input(direction: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        StaticRE(direction, **options)


def test_another_width_is_refused() -> None:
    with pytest.raises(UsageError, match="the direction has 16 numbers; this model's hidden size is 32"):
        Steered(tiny_lm(), StaticRE(torch.ones(16), strength=1.0))
