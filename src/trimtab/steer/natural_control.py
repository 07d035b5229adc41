"""Natural Control: a learned control signal in the final hidden state that is the natural policy gradient there.

trimtab's own method; see docs/natural-control.md. It keeps RE-Control's idea (arXiv 2406.05954) and replaces its
direction. An edit u of the final hidden state changes the logits by W u. To first order it gains g.u with
g = E_{a~p}[psi_a A(s, a)], psi_a = W_a - E_p[W], and costs KL = 1/2 u'F u with F = E_p[psi psi']. The best direction per
nat is F^+ g, and that is a plain regression (compatible function approximation, Sutton et al. 2000; Kakade 2001):

    u*(s) = argmin_u E_{a~p}[(A(s, a) - psi_a . u)^2]          nothing is inverted

    fit     states o_t [M, D] and score vectors c_t = psi_{y_t} / tau [M, D] of rollouts (see `rollouts`); a value V;
            A^_t = G_t - V(o_t), G the lambda-return with lambda_A; u_theta minimises mean (A^_t - c_t . u_theta(o_t))^2
    decode  o' = o + strength u_theta(o); draw from softmax(W o' / tau)
    rounds  repeat on rollouts of the edited policy and add: the natural gradient flow towards p exp(lambda r) / Z

lambda_A is 1 by default, so V is a baseline alone: bootstrapping from it (0.5) took 1.3 to 1.9 times the KL for the same
reward (docs/natural-control.md).

`strength` runs along the rounds: with rounds that ended at strengths s_1, s_2, ..., a strength up to s_1 scales u_1, what
lies beyond goes to u_2, and so on; the last round may exceed its own. Strength 0 is the base bit for bit.
`form=block` fits the same regression into one more transformer block and writes a plain checkpoint (see `extra_block`).
Cost a token: one MLP of three layers (and, with `kl_cap`, one product with W). No gradient, no extra forward.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.head import Head
from trimtab.lm import LM
from trimtab.policy import Cost, Prompt
from trimtab.rewards.base import Reward
from trimtab.sampling import Sampling, derive_seed
from trimtab.steer.controller import Controller, Origin, origin_of, restored_module
from trimtab.steer.kl_cap import largest_share
from trimtab.steer.rollouts import Progress, Rollouts, collect
from trimtab.steer.value import ValueFit, ValueNetwork, fit_value, targets

CARD = Card(
    slug="natural-control",
    name="Natural Control",
    paper="trimtab's own (docs/natural-control.md); we know of no published method that does this",
    summary="A small network adds the natural policy gradient to the final hidden state at every token of a frozen model.",
    goal="preference",
    stage="steer",
    mechanism="value-function-control",
    signal=("scalar reward",),
    access="hidden states",
    produces="decoder",
    needs=("a local causal language model", "a reward on finished text", "prompts to roll out"),
    infer_multiplier="1",
    fit_cost="rounds x rollouts x answer tokens forwarded, one reward call a rollout, two small MLPs",
    benefit_metrics=("reward",),
    cost_metrics=("kl_per_token", "nll_base_per_token", "diversity"),
    limits=("fit at the temperature you decode at", "rollouts must be plain softmax samples"),
    risks=("over-optimisation of a proxy reward at high strength",),
    composes_with=("best-of-n",),
    status=("implemented", "verified_cpu"),
    example="trimtab fit natural-control pocket/base --reward pocket/reward --prompts prompts.txt --out my-controller",
)


@dataclass(frozen=True)
class NaturalControlConfig:
    # answers drawn from the model in each round
    rollouts: int = 4096
    # rounds: each is fitted on rollouts of the policy the rounds before it made
    rounds: int = 1
    # nats per token that each round but the last moves the policy by before the next one starts
    round_kl: float = 0.03
    # lambda of the advantage estimate: 1 uses V as a baseline alone, less trusts V for what comes after the next tokens
    lambda_advantage: float = 1.0
    # lambda of the value network's targets
    lambda_value: float = 0.95
    # width H of both networks; 0 means the model's hidden size, at least 128
    width: int = 0
    # learning rate (use 1e-4 for hidden sizes of 1024 and more)
    lr: float = 1e-3
    # weight decay of the control network
    weight_decay: float = 0.05
    # answers in a batch of the fit
    batch: int = 128
    # passes over the rollouts, at most; the best one by held-out error is kept
    epochs: int = 8
    # seed of the fit
    seed: int = 0
    # how far along the control signal to go; not given: tuned to kl_target
    strength: float | None = None
    # nats per token that strength is tuned to where it is not given
    kl_target: float = 0.05
    # nats: a token's edit is shrunk until KL(edited || unedited) is at most this; 0 is off
    kl_cap: float = 0.0
    # hook: an edit of the final hidden state; block: one more transformer block, saved as a plain checkpoint
    form: Literal["hook", "block"] = "hook"
    # form=block: the strength that the block is fitted for (its dial is exact there, first order elsewhere)
    block_strength: float = 3.0

    def __post_init__(self) -> None:
        strength = self.strength or 0.0
        if strength < 0 or not math.isfinite(strength):
            raise UsageError(f"strength must be 0 or more, not {self.strength}")
        if self.kl_cap < 0 or self.kl_target <= 0 or self.round_kl <= 0:
            raise UsageError("kl_cap must be 0 or more, kl_target and round_kl above 0")
        if self.form == "block" and (self.rounds > 1 or self.kl_cap or self.block_strength <= 0):
            raise UsageError("form=block has one round, no kl_cap, and a block_strength above 0")
        if self.rounds < 1 or self.rollouts < 2 or self.epochs < 1:
            raise UsageError("rounds and epochs must be 1 or more and rollouts 2 or more")
        if not 0 <= self.lambda_advantage <= 1 or not 0 <= self.lambda_value <= 1:
            raise UsageError("lambda_advantage and lambda_value lie between 0 and 1")


class ControlNetwork(nn.Module):
    """u: [..., D] -> [..., D]; zero before it is fitted."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(hidden_size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, hidden_size)
        )
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layers(hidden)


class NaturalControl(Controller):
    """`networks` are the rounds' control signals; `ends` the strengths at which each round but the last handed over.

    No networks at all: nothing was learnt, and the strength is 0 whatever was asked for. value: V of the policy that the
    last round improved; only telemetry reads it.
    """

    slug = "natural-control"
    Config = NaturalControlConfig
    DIAL, START = "strength", 2.0
    DECODE = ("strength", "kl_target", "kl_cap")

    def __init__(
        self,
        networks: Sequence[nn.Module],
        ends: Sequence[float] = (),
        config: NaturalControlConfig | None = None,
        origin: Origin | None = None,
        value: ValueNetwork | None = None,
        **options: Any,
    ):
        if len(ends) != max(0, len(networks) - 1):
            raise UsageError(f"{len(networks)} rounds need {len(networks) - 1} hand-over strengths, not {len(ends)}")
        self.networks, self.ends = list(networks), [float(end) for end in ends]
        self.value = value
        self.config = config or self.Config(**options)
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
        """Fit every round. `rollouts` of the unedited model serve the first one.

        A round that learns nothing, or after which the reward did not rise, ends the fit with a warning; with nothing
        learnt at all the strength is 0.
        """
        if config.form == "block":
            from trimtab.steer.extra_block import NaturalBlock

            return NaturalBlock.learn(lm, prompts, reward, sampling, config, rollouts, progress)  # type: ignore[return-value]
        rounds, ends = cls([], config=config), []
        cost, metrics, warnings = Cost(), {}, []
        drawn = rollouts or collect(lm, prompts, reward, sampling, config.rollouts, progress=progress)
        for number in range(config.rounds):
            if number:  # the round before hands over where its share of KL is spent
                tuned = rounds.but(strength=None, kl_target=config.round_kl * number, kl_cap=0.0)
                tuned = tuned.ready(lm, prompts, sampling, progress)
                ends = [*rounds.ends, tuned.strength - sum(rounds.ends)]
                metrics[f"round{number + 1}_kl_before"] = tuned.origin.metrics["calibration_kl_per_token"]
                cost = cost + Cost({lm.name: tuned.origin.fit_tokens}, 0, tuned.origin.fit_seconds)
                draws = sampling.but(seed=derive_seed(sampling.seed, "round", number))
                was, drawn = drawn, collect(lm, prompts, reward, draws, config.rollouts, tuned, progress)
            metrics[f"round{number + 1}_reward_before"] = float(drawn.rewards.mean())
            cost = cost + drawn.cost
            if number and drawn.rewards.mean() <= was.rewards.mean():
                warnings.append(f"round {number} did not raise the reward: there is no round {number + 1}")
                break
            start = time.perf_counter()
            network, value, found = fit_round(drawn, config, number, progress)
            cost = cost + Cost(seconds=time.perf_counter() - start)
            metrics.update({f"round{number + 1}_{key}": amount for key, amount in found.items()})
            if found["explained"] <= 0:
                warnings.append(f"round {number + 1} learnt nothing (its held-out error is above that of no control)")
                break
            rounds = cls([*rounds.networks, network], ends, config, Origin(metrics=dict(metrics)), value)
        rounds.origin = origin_of(lm, reward, prompts, drawn, sampling, cost, metrics)
        rounds.origin.warnings += warnings
        return rounds

    def ready(self, lm: LM, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None) -> Self:
        if not self.networks:
            return self.but(strength=0.0)
        first = self.but()
        first.START = self.strength_for(self.config.kl_target)  # type: ignore[misc]  # the tuner's first guess
        out = super(NaturalControl, first).ready(lm, prompts, sampling, progress)
        if len(self.networks) > 1 and out.shares[-1] == 0:
            used = sum(share > 0 for share in out.shares)
            note = f"strength {out.strength:.3g} is reached in round {used} of {len(self.networks)}: raise kl_target"
            out.origin = dataclasses.replace(out.origin, warnings=[*out.origin.warnings, note])
        return out

    def strength_for(self, kl: float) -> float:
        """The strength that spends `kl` nats a token to second order in the first round; `START` where that is unknown."""
        square = self.origin.metrics.get("round1_curvature", 0.0)
        return math.sqrt(2 * kl / square) if square > 0 else self.START

    @property
    def shares(self) -> list[float]:
        """How much of each round's signal the strength amounts to."""
        left, out = self.strength, []
        for end in self.ends:
            out.append(min(left, end))
            left -= out[-1]
        return [*out, left]

    def signal(self, hidden: torch.Tensor) -> torch.Tensor:
        """The whole edit [..., D] in float32, before any cap."""
        o = hidden.float()
        parts = []
        with torch.no_grad():
            for share, network in zip(self.shares, self.networks, strict=bool(self.networks)):
                if share:
                    first = next(network.parameters(), None)
                    if first is not None and first.device != o.device:
                        network.to(o.device)
                    parts.append(share * network(o))
        return sum(parts[1:], parts[0]) if parts else torch.zeros_like(o)

    def edit(self, hidden: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        if self.strength == 0 or not self.networks:
            return hidden
        u = self.signal(hidden)
        if self.config.kl_cap:
            if self._head is None:
                raise UsageError("kl_cap needs the model's output embedding: check(model) or attached(model) first")
            temperature = float(self.origin.sampling.get("temperature", 1.0))
            u = u * largest_share(self._head, hidden.float(), u, self.config.kl_cap, temperature)[..., None]
        return hidden + u.to(hidden.dtype)

    def check(self, model: nn.Module) -> None:
        super().check(model)
        self._head = Head(model)

    def tensors(self) -> dict[str, torch.Tensor]:
        rounds = [
            (f"round{i}.{key}", value) for i, net in enumerate(self.networks) for key, value in net.state_dict().items()
        ]
        value = {} if self.value is None else {f"value.{key}": v for key, v in self.value.state_dict().items()}
        return {"ends": torch.tensor(self.ends, dtype=torch.float64), **dict(rounds), **value}

    @classmethod
    def restore(cls, config: Any, tensors: dict[str, torch.Tensor], origin: Origin) -> Self:
        if "ends" not in tensors:
            raise UsageError("the controller's tensor 'ends' is missing: its earlier rounds are unknown")
        width = config.width or max(128, origin.hidden_size)
        count = len({key.split(".")[0] for key in tensors if key.startswith("round")})
        for number in range(count):
            if f"round{number}.layers.0.weight" not in tensors:
                raise UsageError(
                    f"round {number + 1} of the controller is missing: later rounds are nothing without it"
                )
        nets = [
            restored_module(ControlNetwork(origin.hidden_size, width), tensors, f"round{number}.")
            for number in range(count)
        ]
        value = None
        if "value.out.weight" in tensors:
            value = restored_module(ValueNetwork(origin.hidden_size, width), tensors, "value.")
        return cls(nets, tensors["ends"].tolist(), config, origin, value)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        from trimtab.steer.extra_block import NaturalBlock, holds_block

        if not issubclass(cls, NaturalBlock) and holds_block(folder):
            return NaturalBlock.from_pretrained(folder)  # type: ignore[return-value]
        return super().from_pretrained(folder)

    def trace(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """Adds V before and after the edit, in reward units, where there is a value network."""
        edited = self.edit(hidden).float()
        out = {"edit_norm": (edited - hidden.float()).norm(dim=-1)}
        if self.value is not None:
            value = self.value.to(hidden.device)
            with torch.no_grad():
                out["value_before"] = value.in_reward_units(value(hidden.float()))
                out["value_after"] = value.in_reward_units(value(edited))
        return out


def advantages(rollouts: Rollouts, value: nn.Module, lam: float) -> torch.Tensor:
    """A^_t = G_t - V(o_t) for every step, [M], in standardised units; G is the lambda-return of V."""
    with torch.no_grad():
        values = torch.cat([value(part) for part in rollouts.states.split(65536)])
    z, out = rollouts.standardised, torch.empty_like(values)
    for rows in torch.arange(len(rollouts)).split(1024):
        index, mask = rollouts.padded(rows)
        found = targets(values[index], rollouts.lengths[rows], z[rows], lam) - values[index]
        out[index[mask]] = found[mask]
    return out


def fit_round(
    rollouts: Rollouts, config: NaturalControlConfig, number: int = 0, progress: Progress | None = None
) -> tuple[ControlNetwork, ValueNetwork, dict[str, float]]:
    """One round: value, advantages, regression. `explained` is the held-out share of the advantage's square explained."""
    seed = derive_seed(config.seed, "natural", number)
    value, metrics = value_of_round(rollouts, config, seed, progress)
    size = rollouts.states.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ControlNetwork(size, config.width or max(128, size))
    advantage = advantages(rollouts, value, config.lambda_advantage)
    metrics["explained"] = regress(rollouts, advantage, network, rollouts.states, config, seed, progress)
    metrics["curvature"] = curvature(rollouts, network, rollouts.states)
    return network, value, metrics


@torch.no_grad()
def curvature(rollouts: Rollouts, network: nn.Module, inputs: torch.Tensor) -> float:
    """E[(c.u)^2] = E[u'F u], so that KL(s) = s^2 / 2 of it to second order, in nats a token."""
    parts = zip(inputs.split(65536), rollouts.scores.split(65536), strict=True)
    return sum(float(((c * network(x)).sum(-1) ** 2).sum()) for x, c in parts) / len(inputs)


def value_of_round(
    rollouts: Rollouts, config: NaturalControlConfig, seed: int, progress: Progress | None = None
) -> tuple[ValueNetwork, dict[str, float]]:
    """V of the policy that drew the rollouts, and its held-out correlation with the reward halfway through an answer."""
    settings = ValueFit(
        "td_lambda", config.lambda_value, width=config.width, lr=config.lr, batch=config.batch, seed=seed
    )
    value, metrics = fit_value(rollouts, settings, progress=progress)
    return value, {"value_correlation_middle": metrics["correlation_middle"]}


def regress(
    rollouts: Rollouts,
    advantage: torch.Tensor,
    network: nn.Module,
    inputs: torch.Tensor,
    config: NaturalControlConfig,
    seed: int,
    progress: Progress | None = None,
) -> float:
    """Fits `network` in place: min mean_t (A^_t - c_t . network(x_t))^2, with early stopping on held-out answers.

    What is judged and kept is the mean of the weights over an epoch's steps: the signal is a fraction of a percent of the
    target's variance, so the last step's weights are mostly noise (docs/natural-control.md has the ablation).

    advantage [M]; inputs x [M, D], the states o_t or what else the network reads. The network must start at zero. Returns
    the share of the held-out advantages' square that is explained; 0 or less: nothing was learnt, the network stays zero.
    """
    generator = torch.Generator().manual_seed(seed)
    train, held = rollouts.split(0.1, generator)
    held_steps = torch.cat([torch.arange(a, a + n) for a, n in zip(*_spans(rollouts, held), strict=True)])

    def error(at: torch.Tensor, signal: nn.Module = network) -> torch.Tensor:
        return ((advantage[at] - (rollouts.scores[at] * signal(inputs[at])).sum(-1)) ** 2).mean()

    nothing = float((advantage[held_steps] ** 2).mean())
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    mean = copy.deepcopy(network)
    best, best_error = copy.deepcopy(network.state_dict()), nothing
    for epoch in range(config.epochs):
        order = train[torch.randperm(len(train), generator=generator)]
        for step, rows in enumerate(order.split(config.batch)):
            index, mask = rollouts.padded(rows)
            loss = error(index[mask])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                for average, latest in zip(mean.parameters(), network.parameters(), strict=True):
                    average.lerp_(latest, 1 / (step + 1))
        with torch.no_grad():
            now = float(error(held_steps, mean))
        if progress is not None:
            progress(f"control network, epoch {epoch + 1}/{config.epochs}: held-out R2 {1 - now / nothing:.4f}")
        if now < best_error:
            best, best_error = copy.deepcopy(mean.state_dict()), now
    network.load_state_dict(best)
    network.eval().requires_grad_(False)
    return 1 - best_error / nothing


def _spans(rollouts: Rollouts, rows: torch.Tensor) -> tuple[list[int], list[int]]:
    return rollouts.offsets[rows].tolist(), rollouts.lengths[rows].tolist()
