"""Proxy tuning: move a model's next-token distribution by what tuning did to a small one.

    logits(v) = log p_base(v) + weight * (log p_expert(v) - log p_anti(v))        all three with the same tokens

Liu et al., "Tuning Language Models by Proxy", arXiv 2401.08565. The expert is a small tuned model, the anti-expert the
same model untuned. weight = 0 is the base. A baseline for nudging, which needs no common vocabulary and one model at a
time. Each model reads its own form of the prompt (chat template).

Cost an answer: its tokens once with each of the three models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.card import Card
from trimtab.divergence import same_tokens
from trimtab.errors import UsageError
from trimtab.guided import Guided
from trimtab.policy import Completions, Cost, Policy, Prompt
from trimtab.sampling import Sampling
from trimtab.stepping import answer_steps, steppable

CARD = Card(
    slug="proxy-tuning",
    name="Proxy tuning",
    paper="arXiv 2401.08565",
    summary="Add to a model's logits the difference that tuning made to a small model with the same tokens.",
    goal="instruction",
    stage="decode",
    mechanism="contrastive-decoding",
    signal=("weak model",),
    access="logits",
    produces="decoder",
    needs=("a local base model", "a small tuned model and its untuned self, with the same tokens"),
    infer_multiplier="1 (and 1 of each small model)",
    fit_cost="none",
    benefit_metrics=("gold", "reward"),
    cost_metrics=("tokens_forwarded_per_answer", "kl_per_token"),
    limits=("one vocabulary for all three models",),
    composes_with=("best-of-n", "qalign", "natural-control"),
    choose="When a small model was tuned, a large one with the same tokens was not, and the strength of the "
    "tuning should be a dial. Across tokenizers, nudging.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/base --reward pocket/reward --gold pocket/judge --prompts prompts.txt "
    "--policy proxy-tuning:expert=pocket/chat,anti=pocket/base,weight=0.5",
)


@dataclass(frozen=True)
class ProxyTuningConfig:
    # the small tuned model: pocket/NAME, a folder or a Hub id
    expert: str = "pocket/chat"
    # the same model before it was tuned
    anti: str = "pocket/base"
    # of the difference; 0 is the base
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise UsageError(f"weight must be a finite number, not {self.weight}")


class ProxyTuning:
    """`ProxyTuning(base, expert, anti, weight=1.0)` is a policy; all three may be any policies that can be stepped."""

    slug = "proxy-tuning"
    Config = ProxyTuningConfig
    NEEDS_REWARD = False
    MODELS = ("expert", "anti")
    DIAL = "weight"

    def __init__(self, policy: Policy, expert: Policy, anti: Policy, weight: float = 1.0, name: str | None = None):
        self.policy, self.expert, self.anti = (steppable(one, "proxy-tuning") for one in (policy, expert, anti))
        self.config = ProxyTuningConfig(expert.name, anti.name, weight)
        self.lm, self.name = self.policy.lm, name or "proxy-tuning"
        for other in (self.expert, self.anti):
            if not same_tokens(other.lm, self.lm):
                raise UsageError(
                    f"proxy-tuning adds logits token by token: {other.name} has other tokens than {self.lm.name} "
                    "(nudging and ensemble take models of any tokenizer)"
                )

    @classmethod
    def make(cls, parts: Any, config: ProxyTuningConfig) -> ProxyTuning:
        return cls(parts.policy, parts.load(config.expert), parts.load(config.anti), config.weight)

    def open(self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost) -> ProxySession:
        sessions = {
            name: one.open(prompts, sampling, meter) for name, one in (("expert", self.expert), ("anti", self.anti))
        }
        return ProxySession(self.policy.open(prompts, sampling, meter), prompts, self.config.weight, **sessions)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        return answer_steps(self, prompts, sampling)


class ProxySession(Guided):
    def __init__(self, inner: Any, asked: Sequence[Prompt], weight: float, **companions: Any):
        super().__init__(inner, asked, **companions)
        self.weight = weight

    def guide(self, logits: torch.Tensor) -> torch.Tensor:
        expert, anti = (self.companions[name].logits.log_softmax(-1) for name in ("expert", "anti"))
        return logits.log_softmax(-1) + self.weight * (expert - anti)
