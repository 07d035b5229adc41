"""The value function: its closed forms, its targets at exact fixed points, and the loss bugs of the published code."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from oracles.toy import Toy
from trimtab.errors import UsageError
from trimtab.steer import ValueNetwork
from trimtab.steer import value as value_module
from trimtab.steer.rollouts import Rollouts
from trimtab.steer.value import ValueFit, fit_value, targets, value_loss


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


def rollouts_from(paths: list[list[int]], rewards: list[float], states: int) -> Rollouts:
    """Answers as lists of numbered states with one-hot features: a tabular problem."""
    return Rollouts(
        states=torch.eye(states)[torch.tensor([state for path in paths for state in path])],
        scores=torch.zeros(sum(map(len, paths)), states),
        lengths=torch.tensor([len(path) for path in paths]),
        rewards=torch.tensor(rewards),
        prompt_index=torch.zeros(len(paths), dtype=torch.long),
        ended=torch.ones(len(paths), dtype=torch.bool),
        tokens=[list(range(1, len(path) + 1)) for path in paths],
    )


class Table(nn.Module):
    """V as one number a state."""

    def __init__(self, states: int):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(states))

    def forward(self, one_hot: torch.Tensor) -> torch.Tensor:
        return one_hot @ self.v


def descend(rollouts: Rollouts, fit: ValueFit, states: int, steps: int = 400, lr: float = 0.5) -> list[float]:
    """Full-batch gradient descent of the trainer's own loss, rewards as they are."""
    table, rows = Table(states), torch.arange(len(rollouts))
    for _ in range(steps):
        loss, _ = value_loss(table, rollouts, rows, rollouts.rewards, fit)
        (gradient,) = torch.autograd.grad(loss, [table.v])
        with torch.no_grad():
            table.v -= lr * gradient
    return table.v.tolist()


# targets


def returns_by_hand(values: list[float], z: float, lam: float) -> list[float]:
    out = [z]
    for ahead in reversed(values[1:]):
        out.insert(0, (1 - lam) * ahead + lam * out[0])
    return out


@pytest.mark.parametrize("lam", [0.0, 0.4, 0.95, 1.0])
def test_targets_of_ragged_rows_are_the_recursion(lam: float) -> None:
    values, lengths, z = torch.rand(4, 5), torch.tensor([5, 1, 3, 2]), torch.tensor([1.0, -2.0, 0.5, 3.0])
    found = targets(values, lengths, z, lam)
    for row, length in enumerate(lengths.tolist()):
        by_hand = returns_by_hand(values[row, :length].tolist(), float(z[row]), lam)
        assert found[row, :length].tolist() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize(("target", "lam"), [("mc", 1.0), ("td0", 0.0)])
def test_losses_are_means_over_real_steps(target: str, lam: float) -> None:
    rollouts = rollouts_from([[0, 1, 2], [3]], [2.0, -1.0], 4)
    table = Table(4)
    with torch.no_grad():
        table.v.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    loss, last = value_loss(table, rollouts, torch.arange(2), rollouts.rewards, ValueFit(target=target))  # type: ignore[arg-type]
    goals = [*returns_by_hand([0.1, 0.2, 0.3], 2.0, lam), -1.0]
    errors = [(v - goal) ** 2 for v, goal in zip([0.1, 0.2, 0.3, 0.4], goals, strict=True)]
    assert loss.item() == pytest.approx(sum(errors) / 4, abs=1e-6)
    assert last.tolist() == pytest.approx([0.3, 0.4])


def test_the_end_is_the_last_step_whatever_the_length() -> None:
    """One step (an empty answer's end token), several, and an answer cut by the horizon."""
    rollouts = rollouts_from([[0], [1, 2], [1, 3, 4]], [1.0, 2.0, 3.0], 5)
    rollouts.ended[2] = False
    _, last = value_loss(Table(5), rollouts, torch.arange(3), rollouts.rewards, ValueFit())
    assert last.shape == (3,)
    v = descend(rollouts, ValueFit(target="mc"), 5)
    assert v == pytest.approx([1.0, 2.5, 2.0, 3.0, 3.0], abs=1e-4)


# fixed points


TREE = ([[0, 1], [0, 2]], [0.0, 1.0])  # a root, two leaves with probability 1/2, rewards 0 and 1


@pytest.mark.parametrize(
    ("fit", "expected"),
    [
        (ValueFit(target="td0"), (0.5, 0.0, 1.0)),
        (ValueFit(target="mc"), (0.5, 0.0, 1.0)),
        (ValueFit(target="td_lambda", td_lambda=0.7), (0.5, 0.0, 1.0)),
        # the published code: no stop-gradient is biased by the variance of what follows ...
        (ValueFit(target="residual"), (0.5, 0.25, 0.75)),
        # ... and with the reward at the first step V knows the prompt and nothing of the answer
        (ValueFit(target="residual", terminal="first"), (0.5, 0.5, 0.5)),
    ],
    ids=["td0", "mc", "td_lambda", "residual", "residual-first"],
)
def test_two_leaf_tree(fit: ValueFit, expected: tuple[float, float, float]) -> None:
    assert descend(rollouts_from(*TREE, 3), fit, 3) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_expected_updates_converge_to_the_enumerated_value(toy: Toy, lam: float) -> None:
    """Every answer weighted by its probability: the tabular fixed point is V*(prefix) = E[r | prefix], a martingale."""
    count, answers = len(toy.prefixes), len(toy.answers)
    every = toy.rollouts_of(torch.arange(answers), states=torch.arange(count)[:, None].float())
    index, mask = every.padded(torch.arange(answers))
    prefix = every.states[index][..., 0].long()
    weight = toy.answer_probabilities()[:, None].expand_as(mask)[mask]
    v = torch.zeros(count, dtype=torch.float64)
    for _ in range(toy.horizon):
        goal = targets(v[prefix], every.lengths, every.rewards.double(), lam)[mask]
        total = torch.zeros_like(v).index_add_(0, prefix[mask], weight * goal)
        v = total / torch.zeros_like(v).index_add_(0, prefix[mask], weight)
    q, exact = toy.values()
    assert (v - exact).abs().max() < 1e-6
    after = torch.where(toy.child >= 0, v[toy.child], toy.end_reward)
    assert ((toy.base.exp() * after).sum(-1) - v).abs().max() < 1e-6
    assert ((toy.base.exp() * q).sum(-1) - exact).abs().max() < 1e-12


def test_error_shrinks_with_the_root_of_the_samples(toy: Toy) -> None:
    """Sample means at the first prefix, 64 repetitions: standard error sigma / sqrt(n) within 25 %."""
    p, exact = toy.answer_probabilities(), toy.values()[1][0]
    rewards = toy.rollouts_of(torch.arange(len(toy.answers))).rewards.double()
    sigma = float(((p * (rewards - exact) ** 2).sum()).sqrt())
    for count in (256, 4096):
        means = torch.stack([toy.rollouts(count, seed).rewards.double().mean() for seed in range(64)])
        error = float(((means - exact) ** 2).mean().sqrt())
        assert error == pytest.approx(sigma / math.sqrt(count), rel=0.25)


# the network


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_gradient_is_autograd(layers: int) -> None:
    value = ValueNetwork(12, 20, layers)
    o = torch.randn(9, 12, requires_grad=True)
    (expected,) = torch.autograd.grad(value(o).sum(), o)
    assert (value.gradient(o.detach()) - expected).abs().max() < 1e-6
    assert value(torch.randn(2, 3, 12)).shape == (2, 3)


@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
@pytest.mark.parametrize("shape", [(10,), (6, 10), (2, 3, 10)])
def test_ascend_is_the_plain_loop(shape: tuple[int, ...], wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(value_module, "WIDE", 1 if wide else 10**9)
    value, o = ValueNetwork(10, 48), 0.3 * torch.randn(shape)
    with torch.no_grad():
        for parameter in value.parameters():
            parameter.mul_(2)
    for alpha in (0.01, 1.0):  # few units switch at a step, and many
        u = torch.zeros_like(o)
        for _ in range(25):
            u = u + alpha * value.gradient(o + u)
        assert (value.ascend(o, alpha, 25) - u).abs().max() < 1e-5 * u.abs().max()
    assert torch.equal(value.ascend(o, 1.0, 0), torch.zeros_like(o))


def test_ascend_sees_that_the_weights_changed() -> None:
    value, o = ValueNetwork(6, 8), torch.randn(3, 6)
    before = value.ascend(o, 0.5, 4)
    with torch.no_grad():
        value.layers[0].weight.mul_(-1.5)
    after = value.ascend(o, 0.5, 4)
    u = torch.zeros_like(o)
    for _ in range(4):
        u = u + 0.5 * value.gradient(o + u)
    assert (after - u).abs().max() < 1e-6 and not torch.allclose(after, before)


@pytest.mark.parametrize("sizes", [(0, 4, 1), (4, -1, 1), (4, 4, 0)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        ValueNetwork(*sizes)


# the trainer


def test_fit_learns_the_enumerated_value(toy: Toy) -> None:
    rollouts = toy.rollouts(4096, seed=1)
    value, metrics = fit_value(rollouts, ValueFit(epochs=12, width=64))
    learnt = value.in_reward_units(value(toy.states)).double()
    _, exact = toy.values()
    visits = toy.visits(toy.base)
    visits = visits / visits.sum()
    mean = (visits * exact).sum()
    explained = 1 - (visits * (learnt - exact) ** 2).sum() / (visits * (exact - mean) ** 2).sum()
    assert explained > 0.6
    assert metrics["correlation_last"] > metrics["correlation_first"] and metrics["correlation_last"] > 0.5
    assert 0 < metrics["held_out_error"] < 0.8


def test_fit_is_the_same_twice_and_leaves_the_global_generator_alone(toy: Toy) -> None:
    rollouts, fit = toy.rollouts(256), ValueFit(epochs=2, width=16)
    state = torch.get_rng_state()
    first, second = fit_value(rollouts, fit)[0], fit_value(rollouts, fit)[0]
    other = fit_value(rollouts, replace(fit, seed=1))[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(toy.states), second(toy.states)) and not torch.equal(first(toy.states), other(toy.states))


def test_fit_does_not_depend_on_the_units_of_the_reward(toy: Toy) -> None:
    rollouts = toy.rollouts(256)
    scaled = replace(rollouts, rewards=100 * rollouts.rewards - 7)
    fit = ValueFit(epochs=2, width=16)
    plain, other = fit_value(rollouts, fit)[0], fit_value(scaled, fit)[0]
    assert torch.allclose(plain(toy.states), other(toy.states), atol=1e-3)
    assert torch.allclose(
        other.in_reward_units(other(toy.states)), 100 * plain.in_reward_units(plain(toy.states)) - 7, atol=0.2
    )
