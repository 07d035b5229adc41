"""RE-Control without sampling noise: expected reward and KL of edited models by enumeration, against exact references."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from oracles.toy import Outcome, Toy, context_reward, free_reward
from trimtab.steer import ReControl, ValueNetwork
from trimtab.steer.value import ValueFit, fit_value

pytestmark = pytest.mark.filterwarnings("ignore::trimtab.steer.controller.StrongEdit")


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


def fitted(toy: Toy, value: nn.Module, steps: int = 800) -> Any:
    """V fitted to the exact values of the base, prefixes weighted by how often they are met: no sampling noise."""
    _, exact = toy.values()
    weight = toy.visits(toy.base)
    weight = (weight / weight.sum()).float()
    goal = ((exact - (weight * exact).sum()) / exact.std()).float()
    optimiser = torch.optim.Adam(value.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = (weight * (value(toy.states) - goal) ** 2).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return value.eval().requires_grad_(False)


def network(seed: int = 0) -> ValueNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ValueNetwork(16, 64)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(()))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.w + self.b


def outcome(toy: Toy, control: ReControl) -> Outcome:
    return toy.evaluate(toy.logprobs(control.edit(toy.states)))


def at_kl(toy: Toy, edit: Callable[[float], Outcome], kl: float) -> Outcome:
    """The outcome at a given KL of whole answers, by bisection on the strength (log scale)."""
    low, high = 1e-4, 1e3
    for _ in range(24):
        middle = (low * high) ** 0.5
        found = edit(middle)
        low, high = (middle, high) if found.kl < kl else (low, middle)
    assert found.kl == pytest.approx(kl, rel=0.05)
    return found


def re_control_at(toy: Toy, value: nn.Module, kl: float) -> Outcome:
    return at_kl(toy, lambda alpha: outcome(toy, ReControl(value, step_size=alpha, steps=10)), kl)


# the toy itself


def test_the_toy_is_the_model(toy: Toy) -> None:
    """Sums over all answers, one by one, agree with the recursions; states agree with the model's own forward."""
    p = toy.answer_probabilities()
    assert len(p) == len(toy.answers) == 3906 and float(p.sum()) == pytest.approx(1, abs=1e-12)
    every = toy.rollouts_of(torch.arange(len(p)))
    base = toy.evaluate(toy.base)
    assert base.reward == pytest.approx(float((p * every.rewards).sum()), abs=1e-6)
    assert base.tokens == pytest.approx(float((p * every.lengths).sum()), abs=1e-9) and base.kl == 0
    soft = toy.soft_optimal(1.0)
    q = toy.answer_probabilities(soft)
    tilted = (p * (1.0 * every.rewards.double()).exp()) / (p * every.rewards.double().exp()).sum()
    assert (q - tilted).abs().max() < 1e-6  # the optimum is p exp(lam r) / Z
    assert toy.evaluate(soft).kl == pytest.approx(float((q * (q / p).log()).sum()), abs=1e-9)
    forced = toy.lm.score([toy.prompt] * 20, toy.answers[-20:])
    for tokens, logprobs, number in zip(toy.answers[-20:], forced, range(len(p) - 20, len(p)), strict=True):
        assert float(logprobs.sum()) == pytest.approx(float(p[number].log()), abs=1e-4) and len(tokens) == 5


def test_the_frontier_is_a_frontier(toy: Toy) -> None:
    for lam in (0.3, 1.0, 3.0):
        assert toy.share_of_optimum(toy.evaluate(toy.soft_optimal(lam))) == pytest.approx(1, abs=1e-3)
        assert 0.9 < toy.share_of_optimum(toy.evaluate(toy.controlled_decoding(lam))) <= 1 + 1e-3


# the effect


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reward_rises_and_random_directions_do_not(seed: int) -> None:
    toy = Toy(seed=seed)
    value = fitted(toy, network())
    base = toy.evaluate(toy.base)
    steered = re_control_at(toy, value, 0.3)
    generator = torch.Generator().manual_seed(seed)
    others = []
    for _ in range(8):
        u = torch.randn(16, generator=generator)
        others.append(at_kl(toy, lambda s, u=u: toy.evaluate(toy.logprobs(toy.states + s * u)), 0.3).reward)
    assert steered.reward > base.reward + 0.15
    assert steered.reward > max(others)


def test_it_stays_below_controlled_decoding_and_the_optimum(toy: Toy) -> None:
    """The price of cheapness, at equal KL: RE-Control < token-wise CD with the exact Q <= optimum."""
    value = fitted(toy, network())
    for kl in (0.1, 0.3, 1.0):
        steered = re_control_at(toy, value, kl)
        cd = at_kl(toy, lambda lam: toy.evaluate(toy.controlled_decoding(lam)), kl)
        assert 0 < toy.share_of_optimum(steered) < toy.share_of_optimum(cd) <= 1 + 1e-3


def test_over_optimisation_v_keeps_rising_while_the_reward_turns(toy: Toy) -> None:
    value = fitted(toy, network())
    visits = toy.visits(toy.base)
    curve = []
    for alpha in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0):
        control = ReControl(value, step_size=alpha, steps=10)
        after = float((visits * value(control.edit(toy.states)).double()).sum())
        curve.append((after, outcome(toy, control)))
    believed = [after for after, _ in curve]
    rewards = [found.reward for _, found in curve]
    kls = [found.kl for _, found in curve]
    assert all(b > a for a, b in itertools.pairwise(believed))
    peak = max(range(len(rewards)), key=rewards.__getitem__)
    gain_per_nat = [(r - rewards[0]) / kl for r, kl in zip(rewards[1:], kls[1:], strict=True)]
    assert gain_per_nat[-1] < 0.5 * max(gain_per_nat)
    assert 0 < peak and kls[1] < 0.3  # the sweep spans from gentle to beyond the turn
    assert rewards[-1] < rewards[peak] or peak == len(rewards) - 1


# what the state is good for


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_network_beats_a_linear_value_where_context_matters(seed: int) -> None:
    toy = Toy(context_reward, seed=seed)
    base = toy.evaluate(toy.base).reward
    mlp, linear = (re_control_at(toy, fitted(toy, value), 0.3).reward - base for value in (network(), Linear()))
    print(f"context: network {mlp:+.3f}, linear {linear:+.3f}")
    assert mlp > linear


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_they_tie_where_it_does_not(seed: int) -> None:
    toy = Toy(free_reward, seed=seed)
    base = toy.evaluate(toy.base).reward
    mlp, linear = (re_control_at(toy, fitted(toy, value), 0.3).reward - base for value in (network(), Linear()))
    print(f"free: network {mlp:+.3f}, linear {linear:+.3f}")
    assert 0.5 < mlp / linear < 2


def test_the_published_loss_loses_at_equal_kl(toy: Toy) -> None:
    """Same rollouts, same network, same budget: reward regressed at the first step without stop-gradient, against ours."""
    gains = {"ours": [], "published": []}
    base = toy.evaluate(toy.base).reward
    for seed in (0, 1, 2):
        rollouts = toy.rollouts(2048, seed)
        for name, fit in {"ours": ValueFit(), "published": ValueFit(target="residual", terminal="first")}.items():
            value, _ = fit_value(rollouts, fit)
            gains[name].append(re_control_at(toy, value, 0.3).reward - base)
    print(gains)
    assert min(gains["ours"]) > max(gains["published"])
