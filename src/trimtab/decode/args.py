"""ARGS: at every token, weigh the k likeliest next tokens by the reward of the text they would make.

    score(z) = log p(z | x, y) + weight * r(x, y + z)        z among the k likeliest of p

Khanov et al., "ARGS: Alignment as Reward-Guided Search", arXiv 2402.01694. `select=greedy` takes the best candidate
(ARGS-greedy), `select=sample` draws from softmax(score / temperature) (ARGS-stochastic). A reward of unfinished text is
not the reward to expect: ARGS is myopic by design, and a reward made for whole answers is warned about.

Departures from the published code: it never stops at the end token, passes token ids between models that must then share
a tokenizer (here other tokenizers get the text), and runs one prompt at a time. The log-probability stands for its logit:
the same up to a constant. weight = 0 is the wrapped policy itself, uncut.

Cost an answer of T tokens: T of the model; 2 k T of the reward model where its cache can be forked, else k rewards of
the whole text at every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trimtab.card import Card
from trimtab.decode.candidates import Candidates, check_candidates
from trimtab.errors import UsageError
from trimtab.policy import Completions, Cost, Policy, Prompt
from trimtab.rewards import as_reward
from trimtab.rewards.prefix import prefix_scorer, warn_unfinished
from trimtab.sampling import Sampling
from trimtab.stepping import answer_steps, steppable

CARD = Card(
    slug="args",
    name="ARGS",
    paper="arXiv 2402.01694",
    summary="Weigh the k likeliest next tokens by the reward of the unfinished text each would make.",
    goal="preference",
    stage="decode",
    mechanism="reward-guided-decoding",
    signal=("scalar reward",),
    access="logits",
    produces="decoder",
    needs=("a local causal language model", "a reward that makes sense of unfinished text"),
    infer_multiplier="1 (and 2 k reward-model tokens a token)",
    fit_cost="none",
    benefit_metrics=("reward",),
    cost_metrics=("tokens_forwarded_per_answer", "reward_calls_per_answer", "kl_per_token"),
    limits=("myopic: a candidate is judged by the text so far, not by what may follow",),
    risks=("over-optimisation of a proxy reward, token by token",),
    composes_with=("best-of-n", "natural-control", "re-control"),
    conflicts=("rewards that only understand whole answers",),
    choose="When the reward makes sense of unfinished text (a keyword, a tone, a classifier trained on prefixes) "
    "and no fit is wanted. Not for rewards that only judge whole answers: a learnt value (cd-fudge) or a "
    "lookahead (transfer-q, deal) is right there.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/base --reward pocket/reward --prompts prompts.txt --policy args:k=10,weight=1",
)


@dataclass(frozen=True)
class ArgsConfig:
    # likeliest next tokens that are weighed; 0: the whole vocabulary
    k: int = 10
    # of the reward against the log-probability
    weight: float = 1.0
    # take the best candidate, or draw among the candidates
    select: Literal["greedy", "sample"] = "greedy"
    # nats a token that the KL from the model never exceeds (select=sample); none: no cap
    kl_cap: float | None = None
    # fork the reward model's own cache for each candidate, where it allows that; the tokens are the same
    cache: bool = True

    def __post_init__(self) -> None:
        check_candidates(self.k, self.weight, self.kl_cap)
        if self.kl_cap is not None and self.select == "greedy":
            raise UsageError("kl_cap needs select=sample: the KL of a certain choice is what its token costs")


class Args:
    """`Args(lm, reward, k=10, weight=1.0)` is a policy; `lm` may be any policy that can be stepped."""

    slug = "args"
    Config = ArgsConfig
    KNOB = "k"
    DIAL = "weight"

    def __init__(self, policy: Policy, reward: Any, name: str | None = None, **options: Any):
        self.policy = steppable(policy, "args")
        self.lm, self.reward, self.config = self.policy.lm, as_reward(reward), ArgsConfig(**options)
        self.name = name or "args"
        if self.config.weight:
            warn_unfinished(self.reward, "args")

    def open(self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost) -> ArgsSession:
        inner, config = self.policy.open(prompts, sampling, meter), self.config
        companions = {}
        if config.weight and config.k != 1:  # one candidate is weighed against nothing: the reward is not asked
            companions["scorer"] = prefix_scorer(self.reward, self.lm, prompts, meter, config.cache)
        return ArgsSession(
            inner, prompts, config.k, config.weight, config.select == "greedy", config.kl_cap, sampling.temperature,
            **companions,
        )  # fmt: skip

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        return answer_steps(self, prompts, sampling)


class ArgsSession(Candidates):
    def bonus(self, tokens: torch.Tensor) -> torch.Tensor:
        if "scorer" not in self.companions:
            return torch.zeros(tokens.shape)
        rows = [row for row in range(len(tokens)) for _ in range(tokens.shape[1])]
        scores: torch.Tensor = self.companions["scorer"].score(rows, [[token] for token in tokens.flatten().tolist()])
        return scores.view(tokens.shape)
