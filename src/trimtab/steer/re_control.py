"""RE-Control: gradient ascent of a learned value function in the final hidden state, at every token.

Paper: "Aligning Large Language Models with Representation Editing: A Control Perspective", Kong et al., arXiv 2406.05954.
    fit     V(o_t) from rollouts of the unedited model (see `value`)
    decode  u = 0;  repeat n times: u <- u + alpha dV/do (o + u);  draw from softmax(W (o + u))
o [B, D] is the final hidden state (after the final norm), W [V, D] the output embedding. The key-value cache is never
touched. With a linear V this is one constant logit bias n alpha W w (see `static_re`).

Departures from the published code, each a defect there: the reward is regressed at the *last* step (theirs: the first),
targets carry a stop-gradient, the loss is a mean over steps, only the last position is edited and only in live rows, V is
trained on the standardised reward so that alpha transfers between rewards. The gradient is a closed form: no autograd, no
optimiser object. `l2`, `trust`, `kl_cap`, `normalised` and `objective="reach"` are ours (reach: arXiv 2510.12121).

Raising V(o + u) is no evidence: V rises by construction. Only the realised reward of answers counts.
Cost a token: n products with a [H, H] Gram matrix (H the width of V), two with W1; no model forward.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import nn

from trimtab.card import Card
from trimtab.divergence import kl_between
from trimtab.errors import UsageError
from trimtab.head import Head
from trimtab.lm import LM
from trimtab.policy import Cost, Prompt
from trimtab.rewards.base import Reward
from trimtab.sampling import Sampling, derive_seed
from trimtab.spec import build
from trimtab.steer.controller import Controller, Origin, origin_of, restored_module
from trimtab.steer.rollouts import Progress, Rollouts, collect
from trimtab.steer.value import Extra, ValueFit, ValueNetwork, fit_value

CARD = Card(
    slug="re-control",
    name="RE-Control",
    paper="arXiv 2406.05954",
    summary="Gradient ascent of a learned value function in the final hidden state, at every token of a frozen model.",
    goal="preference",
    stage="steer",
    mechanism="value-function-control",
    signal=("scalar reward",),
    access="hidden states",
    produces="decoder",
    needs=("a local causal language model", "a reward on finished text", "prompts to roll out"),
    infer_multiplier="1",
    fit_cost="rollouts x answer tokens forwarded, one reward call a rollout, a small MLP",
    benefit_metrics=("reward",),
    cost_metrics=("kl_per_token", "nll_base_per_token", "diversity"),
    limits=("beam search, assisted decoding and compiled graphs are refused",),
    risks=("over-optimisation: V is unbounded, only step_size x steps stops it",),
    composes_with=("best-of-n",),
    status=("implemented", "verified_cpu"),
    example="trimtab fit re-control pocket/base --reward pocket/reward --prompts prompts.txt --out my-controller",
)


@dataclass(frozen=True)
class ReControlConfig:
    # answers drawn from the model to fit the value function on
    rollouts: int = 4096
    # what V is regressed on: td_lambda, td0 (the paper), mc; residual reproduces the published code
    target: Literal["td_lambda", "td0", "mc", "residual"] = "td_lambda"
    # lambda of td_lambda
    td_lambda: float = 0.95
    # which state gets the reward: last; first reproduces the published code
    terminal: Literal["last", "first"] = "last"
    # width of V's hidden layers; 0 means the model's hidden size, at least 128
    width: int = 0
    # hidden layers of V (the paper's "2-layer" is 1)
    hidden_layers: int = 1
    # learning rate (use 1e-4 for hidden sizes of 1024 and more)
    lr: float = 1e-3
    # answers in a batch of the fit
    batch: int = 128
    # passes over the rollouts; the best one by held-out error is kept
    epochs: int = 8
    # seed of the fit
    seed: int = 0
    # alpha, the size of one ascent step (V is in units of standardised reward); not given: tuned to kl_target
    step_size: float | None = None
    # n, ascent steps a token
    steps: int = 30
    # nats per token that step_size is tuned to where it is not given
    kl_target: float = 0.1
    # lambda of u <- u + alpha (dV/do - 2 lambda u)
    l2: float = 0.0
    # rho: u is projected to a norm of at most rho |o| after each step; 0 is off
    trust: float = 0.0
    # nats: a row stops before the step that would take its next-token KL beyond this; 0 is off
    kl_cap: float = 0.0
    # divide the gradient by its norm
    normalised: bool = False
    # ascend V, or reach a set value of it (in reward units, see goal)
    objective: Literal["ascend", "reach"] = "ascend"
    # the reward that objective=reach drives V to
    goal: float = 0.0
    # how near to the goal is near enough, in standardised units
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        alpha = self.step_size or 0.0
        if self.steps < 0 or alpha < 0 or not math.isfinite(alpha):
            raise UsageError(f"step_size and steps must be 0 or more, not {self.step_size} and {self.steps}")
        if self.l2 < 0 or self.trust < 0 or self.kl_cap < 0 or self.kl_target <= 0:
            raise UsageError("l2, trust and kl_cap must be 0 or more and kl_target above 0")
        if self.rollouts < 2 or self.epochs < 1 or self.batch < 1 or self.hidden_layers < 1 or self.width < 0:
            raise UsageError("rollouts must be 2 or more; epochs, batch and hidden_layers 1 or more; width 0 or more")
        if self.lr <= 0 or not 0 <= self.td_lambda <= 1:
            raise UsageError(
                f"lr must be above 0 and td_lambda lie between 0 and 1, not {self.lr} and {self.td_lambda}"
            )
        if 2 * alpha * self.l2 >= 2:
            raise UsageError(f"2 x step_size x l2 = {2 * alpha * self.l2:g} diverges: keep it below 2")


class ReControl(Controller):
    """`ReControl(value, step_size=1.0, steps=30)`: value is a `ValueNetwork` or any module [..., D] -> [...]."""

    slug = "re-control"
    Config = ReControlConfig
    DIAL, START = "step_size", 2.0
    DECODE = (
        "step_size", "steps", "kl_target", "l2", "trust", "kl_cap", "normalised", "objective", "goal", "tolerance"
    )  # fmt: skip

    def __init__(
        self, value: nn.Module, config: ReControlConfig | None = None, origin: Origin | None = None, **options: Any
    ):
        self.value = value
        self.config = config or build(self.Config, options, f"method {self.slug!r}")
        self.origin = origin or Origin()
        self._head: Head | None = None

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
        drawn = rollouts or collect(lm, prompts, reward, sampling, config.rollouts, progress=progress)
        start = time.perf_counter()
        value, metrics = fit_value(drawn, value_fit(config), cls.extra_loss(config, drawn), progress)
        cost = drawn.cost + Cost(seconds=time.perf_counter() - start)
        return cls(value, config, origin_of(lm, reward, prompts, drawn, sampling, cost, metrics))

    @classmethod
    def extra_loss(cls, config: Any, rollouts: Rollouts) -> Extra | None:
        """More terms for the value loss (Pref-CTRL has some)."""
        return None

    def edit(self, hidden: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        c = self.config
        if self.strength == 0 or c.steps == 0:
            return hidden
        o = hidden.float()
        plain = not (c.l2 or c.trust or c.kl_cap or c.normalised or c.objective == "reach")
        if plain and isinstance(self.value, ValueNetwork):
            u = self.value.to(o.device).ascend(o, self.strength, c.steps)
        else:
            u = self._loop(o)
        self.examine(o, u, lambda: self._kl(o, o + u))
        return hidden + u.to(hidden.dtype)

    def _loop(self, o: torch.Tensor) -> torch.Tensor:
        """The ascent with its options, one gradient a step."""
        c = self.config
        u, live = torch.zeros_like(o), torch.ones(o.shape[:-1], dtype=torch.bool, device=o.device)
        goal = None
        if c.objective == "reach":
            goal = (c.goal - float(self.reward_mean)) / float(self.reward_std)
        for _ in range(c.steps):
            g = gradient(self.value, o + u)
            if goal is not None:
                gap = goal - value_of(self.value, o + u)
                live = live & (gap.abs() > c.tolerance)
                g = g * gap[..., None]
            if c.normalised:
                g = g / g.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            new = u + self.strength * (g - 2 * c.l2 * u)
            if c.trust:
                most = c.trust * o.norm(dim=-1, keepdim=True)
                new = new * (most / new.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
            if c.kl_cap:
                live = live & (self._kl(o, o + new) <= c.kl_cap)
            u = torch.where(live[..., None], new, u)
            if not bool(live.any()):
                break
        return u

    def _kl(self, o: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
        if self._head is None:
            raise UsageError("kl_cap needs the model's output embedding: check(model) or attached(model) first")
        with torch.no_grad():
            logits, base = self._head(edited), self._head(o)
        return kl_between(logits.log_softmax(-1), base.log_softmax(-1))

    def check(self, model: nn.Module) -> None:
        super().check(model)
        self._head = Head(model)
        width = getattr(self.value, "hidden_size", None)
        if width is not None and width != self._head.hidden_size:
            raise UsageError(
                f"the value network reads {width} numbers; this model's hidden size is {self._head.hidden_size}"
            )

    @property
    def reward_mean(self) -> torch.Tensor:
        return getattr(self.value, "reward_mean", torch.zeros(()))

    @property
    def reward_std(self) -> torch.Tensor:
        return getattr(self.value, "reward_std", torch.ones(()))

    def trace(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """Adds V before and after the edit, in reward units."""
        edited = self.edit(hidden)
        return {
            "edit_norm": (edited.float() - hidden.float()).norm(dim=-1),
            "value_before": value_of(self.value, hidden.float()) * self.reward_std + self.reward_mean,
            "value_after": value_of(self.value, edited.float()) * self.reward_std + self.reward_mean,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        if not isinstance(self.value, ValueNetwork):
            raise UsageError(f"only a ValueNetwork can be saved and loaded again, not {type(self.value).__name__}")
        return {f"value.{key}": tensor for key, tensor in self.value.state_dict().items()}

    @classmethod
    def restore(cls, config: Any, tensors: dict[str, torch.Tensor], origin: Origin) -> Self:
        first = tensors.get("value.hidden.0.weight")
        if first is None or first.dim() != 2:
            raise UsageError("the controller's tensors do not fit: value.hidden.0.weight [H, D] is missing")
        depth = sum(key.startswith("value.hidden.") and key.endswith(".weight") for key in tensors)
        value = ValueNetwork(first.shape[1], first.shape[0], depth)
        return cls(restored_module(value, tensors, "value."), config, origin)


def value_fit(config: Any) -> ValueFit:
    """The value trainer's share of a method's options."""
    return ValueFit(
        config.target, config.td_lambda, config.terminal, config.width, config.hidden_layers,
        config.lr, config.batch, config.epochs, derive_seed(config.seed, "value"),
    )  # fmt: skip


def value_of(value: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return value(hidden)


def gradient(value: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """dV/do [..., D]: closed form for a `ValueNetwork`, autograd for any other module (also inside inference mode)."""
    if isinstance(value, ValueNetwork):
        return value.gradient(hidden)
    if any(parameter.is_inference() for parameter in value.parameters()):
        raise UsageError("the value network was created under torch.inference_mode: create it outside")
    with torch.inference_mode(False), torch.enable_grad():
        point = hidden.detach().clone().requires_grad_(True)
        # rows do not interact, so the gradient of the sum is every row's own gradient
        return torch.autograd.grad(value(point).sum(), point)[0].detach()
