"""The ascent itself against closed forms: linear and quadratic V, every option, the limits in which nothing may change."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tiny import tiny_lm
from trimtab import LM, Sampling, Steered
from trimtab.divergence import divergences, kl_between
from trimtab.errors import UsageError
from trimtab.rewards import Function
from trimtab.steer import ReControl, ValueNetwork
from trimtab.steer.re_control import ReControlConfig, gradient

pytestmark = pytest.mark.filterwarnings("ignore::trimtab.steer.controller.StrongEdit")
PROMPTS = ["ba da fa la", "ma na", "pa ra sa ta be de fe ge le me ne", "pe"]
D = 32


class Linear(nn.Module):
    def __init__(self, w: torch.Tensor):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.w


class Quadratic(nn.Module):
    """-1/2 (o - c)' A (o - c)."""

    def __init__(self, a: torch.Tensor, c: torch.Tensor):
        super().__init__()
        self.a, self.c = nn.Parameter(a), nn.Parameter(c)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gap = hidden - self.c
        return -0.5 * ((gap @ self.a) * gap).sum(-1)


class Constant(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden * 0).sum(-1) + 3


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mlp(hidden_size: int = D, width: int = 24, layers: int = 1, seed: int = 0, scale: float = 3.0) -> ValueNetwork:
    value = ValueNetwork(hidden_size, width, layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in value.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return value


# closed forms


def test_linear_value_is_one_logit_bias_at_every_position(lm: LM) -> None:
    w, alpha, n = randn(D), 0.3, 7
    tokens = torch.tensor([[5, 9, 30, 4, 11]])
    before = lm.model(tokens).logits
    with ReControl(Linear(w), step_size=alpha, steps=n).attached(lm.model, positions="all"):
        after = lm.model(tokens).logits
    bias = n * alpha * (lm.unembedding @ w)
    assert (after - before - bias).abs().max() < 1e-5 * bias.abs().max()


def test_every_position_is_edited_unless_only_the_last_is_asked_for(lm: LM) -> None:
    tokens = torch.tensor([[5, 9, 30, 4, 11]])
    before = lm.model(tokens).logits
    control = ReControl(Linear(randn(D)), step_size=0.3, steps=7)
    with control.attached(lm.model):
        everywhere = lm.model(tokens).logits
    with control.attached(lm.model, positions="last"):
        last = lm.model(tokens).logits
    assert not torch.isclose(everywhere, before).all(-1).any()  # a log-likelihood is steered too
    assert torch.equal(last[:, :-1], before[:, :-1]) and torch.equal(last[:, -1], everywhere[:, -1])


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_quadratic_value_converges_exactly_when_the_step_is_small_enough(share: float) -> None:
    half = randn(6, 6, seed=1)
    a = half @ half.T / 6 + 0.2 * torch.eye(6)
    c, o = randn(6, seed=2), randn(5, 6, seed=3)
    alpha, n = share * 2 / float(torch.linalg.eigvalsh(a).max()), 60
    edited = ReControl(Quadratic(a, c), step_size=alpha, steps=n).edit(o)
    step = torch.eye(6, dtype=torch.float64) - alpha * a.double()
    expected = c + (o - c).double() @ torch.linalg.matrix_power(step, n)
    assert (edited - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    distance = (edited - c).norm(dim=-1) / (o - c).norm(dim=-1)
    assert bool((distance < 1).all()) == (share < 1)
    assert bool((distance > 2).any()) == (share > 1)


def test_l2_has_its_geometric_sum() -> None:
    w, o, alpha, lam, n = randn(D), randn(4, D, seed=1), 0.2, 0.7, 9
    u = ReControl(Linear(w), step_size=alpha, steps=n, l2=lam).edit(o) - o
    assert (u - w / (2 * lam) * (1 - (1 - 2 * alpha * lam) ** n)).abs().max() < 1e-6


def test_trust_bounds_the_edit_by_a_share_of_the_state() -> None:
    o = randn(6, D) * torch.tensor([0.1, 0.5, 1, 2, 5, 100])[:, None]
    u = ReControl(mlp(), step_size=1.0, steps=20, trust=0.25).edit(o) - o
    share = u.norm(dim=-1) / o.norm(dim=-1)
    assert share.max() <= 0.25 + 1e-5  # float32 differences of numbers up to 300
    assert share[0] > 0.25 - 1e-5


def test_normalised_steps_have_length_step_size() -> None:
    o = randn(4, D)
    u = ReControl(Linear(randn(D)), step_size=0.3, steps=5, normalised=True).edit(o) - o
    assert torch.allclose(u.norm(dim=-1), torch.full((4,), 1.5), atol=1e-5)


def test_reach_stops_at_the_goal_in_reward_units() -> None:
    value, o = Linear(randn(D)), randn(5, D, seed=1)
    value.reward_mean, value.reward_std = torch.tensor(2.0), torch.tensor(4.0)
    control = ReControl(value, step_size=0.01, steps=400, objective="reach", goal=3.0, tolerance=0.01)
    reached = value(control.edit(o)).detach() * 4 + 2
    assert (value(o).detach() * 4 + 2 - 3).abs().min() > 0.1
    assert (reached - 3).abs().max() <= 0.01 * 4 + 1e-5


def test_kl_cap_stops_each_row_at_the_last_step_within_it(lm: LM) -> None:
    value, o, alpha, cap = mlp(), randn(8, D), 0.02, 0.05
    control = ReControl(value, step_size=alpha, steps=30, kl_cap=cap)
    control.check(lm.model)
    base = lm.head(o).log_softmax(-1)

    def kl_after(steps: int) -> torch.Tensor:
        plain = ReControl(value, step_size=alpha, steps=steps).edit(o)
        return kl_between(lm.head(plain).log_softmax(-1), base)

    curve = torch.stack([kl_after(steps) for steps in range(31)])
    beyond = curve > cap
    allowed = torch.where(beyond.any(0), beyond.float().argmax(0) - 1, 30)
    found = kl_between(lm.head(control.edit(o)).log_softmax(-1), base)
    assert bool(beyond.any()) and (found - curve.gather(0, allowed[None])[0]).abs().max() < 1e-5


def test_kl_cap_needs_the_model_first() -> None:
    with pytest.raises(UsageError, match="kl_cap needs the model's output embedding"):
        ReControl(mlp(), step_size=1.0, kl_cap=0.1).edit(randn(2, D))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_closed_form_is_the_autograd_loop(layers: int) -> None:
    value, o = mlp(layers=layers), randn(7, D)

    class Hidden(nn.Module):  # hides the type, so that the plain loop with autograd runs
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return value(hidden)

    assert (gradient(value, o) - gradient(Hidden(), o)).abs().max() < 1e-6 * gradient(value, o).abs().max() + 1e-6
    fast = ReControl(value, step_size=0.05, steps=30).edit(o) - o
    slow = ReControl(Hidden(), step_size=0.05, steps=30).edit(o) - o
    assert (fast - slow).abs().max() < 1e-5 * slow.abs().max()


def test_rows_do_not_interact() -> None:
    value, o = mlp(), randn(9, D)
    control = ReControl(value, step_size=0.1, steps=30)
    alone = torch.cat([control.edit(row[None]) for row in o])
    assert (control.edit(o) - alone).abs().max() < 1e-5 * (alone - o).abs().max()


# where nothing may change


def nothing(lm: LM) -> dict[str, ReControl]:
    return {
        "steps": ReControl(mlp(), step_size=1.0, steps=0),
        "step_size": ReControl(mlp(), step_size=0.0, steps=30),
        "constant": ReControl(Constant(), step_size=1.0, steps=30),
        "scaled": ReControl(mlp(), step_size=1.0, steps=30).scaled(0),
    }


@pytest.mark.parametrize("which", ["steps", "step_size", "constant", "scaled"])
def test_no_push_is_the_base_bit_for_bit(lm: LM, which: str) -> None:
    control = nothing(lm)[which]
    tokens = torch.tensor([[5, 9, 30, 4, 11]])
    before = lm.model(tokens).logits
    with control.attached(lm.model, positions="all"):
        assert torch.equal(lm.model(tokens).logits, before)
    for sampling in (Sampling(max_new_tokens=12, temperature=0), Sampling(max_new_tokens=12, seed=3)):
        base, steered = lm.generate(PROMPTS, sampling), Steered(lm, control).generate(PROMPTS, sampling)
        assert steered.tokens == base.tokens and steered.logprobs == base.logprobs


def test_a_push_changes_answers(lm: LM) -> None:
    """What the test above would miss if controls were ignored."""
    sampling = Sampling(max_new_tokens=12, seed=3)
    steered = Steered(lm, ReControl(mlp(), step_size=1.0, steps=30)).generate(PROMPTS, sampling)
    assert steered.tokens != lm.generate(PROMPTS, sampling).tokens


# telemetry


def test_kl_per_token_is_the_brute_force_kl(lm: LM) -> None:
    control = ReControl(mlp(), step_size=0.05, steps=20)
    policy = Steered(lm, control)
    answers = policy.generate(PROMPTS, Sampling(max_new_tokens=8, seed=1))
    found = divergences(policy, lm, answers.prompts, answers.tokens, Sampling())
    for prompt, tokens, one in zip(PROMPTS, answers.tokens, found, strict=True):
        ids = lm.encode([prompt])[0]
        row = torch.tensor([[*ids, *tokens[:-1]]])
        base = lm.model(row).logits[0, len(ids) - 1 :].log_softmax(-1)
        with control.attached(lm.model, positions="all"):
            steered = lm.model(row).logits[0, len(ids) - 1 :].log_softmax(-1)
        brute = (steered.exp() * (steered - base)).sum(-1)
        assert (one.kl - brute).abs().max() < 1e-5 and one.kl.max() > 1e-3
        assert torch.allclose(one.base_logprobs, base.gather(-1, torch.tensor(tokens)[:, None])[:, 0], atol=1e-5)


def test_trace_reports_value_and_norm_in_their_units() -> None:
    value = mlp()
    value.reward_mean.fill_(2.0)
    value.reward_std.fill_(4.0)
    control, o = ReControl(value, step_size=0.05, steps=10), randn(6, D)
    trace, edited = control.trace(o), control.edit(o)
    assert torch.allclose(trace["value_before"], value(o) * 4 + 2, atol=1e-5)
    assert torch.allclose(trace["value_after"], value(edited) * 4 + 2, atol=1e-5)
    assert torch.allclose(trace["edit_norm"], (edited - o).norm(dim=-1))
    assert bool((trace["value_after"] > trace["value_before"]).all())


def test_a_huge_edit_is_said_once_with_the_number(lm: LM) -> None:
    control = ReControl(mlp(), step_size=50.0, steps=30)
    with pytest.warns(UserWarning, match=r"the edit is \d+(\.\d+)? times as long as the state"):
        Steered(lm, control).generate(PROMPTS, Sampling(max_new_tokens=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Steered(lm, control).generate(PROMPTS, Sampling(max_new_tokens=4))
        Steered(lm, ReControl(mlp(), step_size=1e-4)).generate(PROMPTS, Sampling(max_new_tokens=4))


# inside inference mode


@pytest.mark.parametrize("value", [mlp(), Linear(randn(D))], ids=["network", "module"])
def test_inference_mode_is_no_obstacle(lm: LM, value: nn.Module) -> None:
    control, tokens = ReControl(value, step_size=0.1, steps=5), torch.tensor([[5, 9, 30]])
    with control.attached(lm.model):
        expected = lm.model(tokens).logits
        with torch.inference_mode():
            found = lm.model(tokens).logits
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_value_made_under_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        value = Linear(torch.ones(D))
    with pytest.raises(UsageError, match=r"created under torch.inference_mode: create it outside"):
        ReControl(value, step_size=0.1).edit(randn(2, D))


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": -1.0}, r"step_size and steps must be 0 or more, not -1.0 and 30"),
        ({"step_size": 1.0, "steps": -1}, r"step_size and steps must be 0 or more, not 1.0 and -1"),
        ({"step_size": float("inf")}, "step_size and steps must be 0 or more, not inf"),
        ({"step_size": 1.0, "steps": 2.5}, "'re-control': steps='2.5' is not a whole number"),
        ({"step_size": "fast"}, "'re-control': step_size='fast' is not a number or none"),
        ({"step_size": 1.0, "l2": 1.0}, r"2 x step_size x l2 = 2 diverges: keep it below 2"),
        ({"l2": -0.1}, "l2, trust and kl_cap must be 0 or more"),
        ({"kl_target": 0.0}, "kl_target above 0"),
        ({"stepsize": 1.0}, "unknown key of method 're-control' 'stepsize'; did you mean 'step_size'"),
        ({"target": "td1"}, "target='td1' is not one of td_lambda, td0, mc, residual"),
    ],
)
def test_bad_options_say_what_was_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ReControl(mlp(), **options)


def test_fit_refuses_an_unknown_key_with_the_nearest(lm: LM) -> None:
    reward = Function(lambda _, texts: [len(text) for text in texts], name="characters")
    with pytest.raises(UsageError, match="did you mean 'step_size'"):
        ReControl.fit(lm, PROMPTS, reward, stepsize="1")


def test_a_strength_that_was_never_chosen_is_said() -> None:
    with pytest.raises(UsageError, match="no step_size was chosen; give one, or call ready"):
        ReControl(mlp()).edit(randn(2, D))


def test_another_width_is_refused(lm: LM) -> None:
    with pytest.raises(UsageError, match="the value network reads 16 numbers; this model's hidden size is 32"):
        Steered(lm, ReControl(mlp(16), step_size=1.0))


def test_decoding_options_are_options() -> None:
    names = set(ReControlConfig.__dataclass_fields__)
    assert set(ReControl.DECODE) <= names and ReControl.DIAL in ReControl.DECODE
