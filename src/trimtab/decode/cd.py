"""Token-wise controlled decoding, shared by `cd-fudge` and `cd-q`, which differ in how V is learned.

    pi(z | x, y) proportional to p(z | x, y) exp(weight V(x, y + z))      z among the k likeliest of p

Mudgal et al., "Controlled Decoding from Language Models", arXiv 2310.17022. V is the value of the model itself, so pi is
the unique maximiser of weight (E_pi V - V) - KL(pi || p) at every state. It is not the policy of most reward at its KL:
that one needs the soft value log E_p exp(weight r) / weight in place of V. p is the wrapped policy at the temperature of
the draw; weight = 0 is that policy itself, uncut; `select=greedy` takes the best candidate.

V is always that of the bare model, whatever is wrapped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch

from trimtab.decode.candidates import Candidates, check_candidates
from trimtab.decode.prefix_value import PrefixValue, Tap, Values, fit_prefix_value, load_value, save_value
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.parts import Parts
from trimtab.policy import Completions, Cost, Policy, Prompt
from trimtab.rewards import as_reward
from trimtab.sampling import Sampling
from trimtab.spec import build
from trimtab.steer.rollouts import Progress, collect
from trimtab.steer.value import ValueFit
from trimtab.stepping import answer_steps, steppable


@dataclass(frozen=True)
class ValueConfig:
    # answers drawn from the model to fit V on
    rollouts: int = 4096
    # width of V's hidden layer; 0 means the model's hidden size, at least 128
    width: int = 0
    # learning rate (use 1e-4 for hidden sizes of 1024 and more)
    lr: float = 1e-3
    # answers in a batch of the fit
    batch: int = 32
    # passes over the rollouts; the best one by held-out error is kept
    epochs: int = 20
    # seed of the fit
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rollouts < 2 or self.epochs < 1 or self.batch < 1 or self.width < 0 or not self.lr > 0:
            raise UsageError(
                "rollouts must be 2 or more, epochs and batch 1 or more, width 0 or more and lr above 0, not "
                f"{self.rollouts}, {self.epochs}, {self.batch}, {self.width} and {self.lr}"
            )

    def value_fit(self, target: Literal["mc", "td0"]) -> ValueFit:
        return ValueFit(
            target=target, width=self.width, lr=self.lr, batch=self.batch, epochs=self.epochs, seed=self.seed
        )


@dataclass(frozen=True)
class TokenwiseConfig(ValueConfig):
    # likeliest next tokens that are weighed; 0: the whole vocabulary
    k: int = 10
    # of V, in units of the reward, against the log-probability
    weight: float = 1.0
    # draw among the candidates, or take the best one
    select: Literal["sample", "greedy"] = "sample"
    # nats a token that the KL from what is wrapped never exceeds (select=sample); none: no cap
    kl_cap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_candidates(self.k, self.weight, self.kl_cap)
        if self.kl_cap is not None and self.select == "greedy":
            raise UsageError("kl_cap needs select=sample: the KL of a certain choice is what its token costs")


class ControlledDecoding:
    """`CdFudge(lm, value, weight=1.0)`, or `CdFudge.fit(lm, prompts, reward)`; `lm` may be any steppable policy.

    value: a fitted `PrefixValue`, or anything with its methods (`prefix_value.Values`).
    """

    slug: ClassVar[str]
    Config: ClassVar[type[TokenwiseConfig]]
    target: ClassVar[Literal["mc", "td0"]]
    DIAL = "weight"

    def __init__(self, policy: Policy, value: Values, name: str | None = None, **options: Any):
        self.policy = steppable(policy, self.slug)
        self.lm, self.value = self.policy.lm, value
        self.config: Any = build(self.Config, options, f"method {self.slug!r}")
        self.name = name or self.slug
        value.check(self.lm)

    @classmethod
    def fit(
        cls,
        lm: LM,
        prompts: Sequence[Prompt],
        reward: Any,
        sampling: Sampling = Sampling(),
        progress: Progress | None = None,
        **options: Any,
    ) -> Self:
        """Draw answers of `lm`, fit V to their rewards, and decode `lm` with it."""
        config, judge = build(cls.Config, options, f"method {cls.slug!r}"), as_reward(reward)
        drawn = collect(lm, prompts, judge, sampling, config.rollouts, progress=progress)
        fit = config.value_fit(cls.target)
        value, _ = fit_prefix_value(lm, drawn, tap_of(config), fit, judge.name, sampling.temperature, progress)
        return cls(lm, value, **options)

    @classmethod
    def make(cls, parts: Parts, config: Any) -> Self:
        value = kept_value(parts, config, tap_of(config), cls.target)
        return cls(parts.policy, value, **dataclasses.asdict(config))

    def open(self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost) -> CdSession:
        inner, config = self.policy.open(prompts, sampling, meter), self.config
        greedy = config.select == "greedy"
        return CdSession(
            self.value, inner, prompts, config.k, config.weight, greedy, config.kl_cap, sampling.temperature
        )

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        return answer_steps(self, prompts, sampling)


class CdSession(Candidates):
    def __init__(self, value: Values, *arguments: Any):
        super().__init__(*arguments)
        self.value = value

    def bonus(self, tokens: torch.Tensor) -> torch.Tensor:
        # times the temperature, which the scores are divided by when a token is drawn: p is meant at that temperature
        return self.temperature * self.value.following(self.inner, tokens)


def tap_of(config: Any) -> Tap:
    """CD-Q has no choice of tap."""
    tap: Tap = getattr(config, "tap", "before")
    return tap


def kept_value(parts: Parts, config: ValueConfig, tap: Tap, target: Literal["mc", "td0"]) -> PrefixValue:
    """V for a policy named on the command line: policies that ask for the same one share a fit."""
    fit, temperature = config.value_fit(target), parts.sampling.temperature

    def fitted() -> tuple[PrefixValue, Cost]:
        drawn = parts.rollouts(config.rollouts)
        if parts.progress is not None:
            for warning in drawn.warnings:
                parts.progress(f"prefix value: {warning}")
        return fit_prefix_value(parts.lm, drawn, tap, fit, parts.reward.name, temperature, parts.progress)

    key = f"value {tap} {target} " + " ".join(map(str, (config.rollouts, *dataclasses.astuple(fit))))
    return parts.kept(key, fitted, save_value, lambda folder: load_value(folder, parts.lm, tap))
