"""Best-of-n: draw n answers, keep the one the reward likes best. The honest alternative to every cleverer method.

All n share one prefill of the prompt (`LM.generate` forks it), so a prompt is forwarded once. The KL of the answer's
distribution from the base is at most log n - (n - 1) / n nats an answer (Beirami et al., arXiv 2401.01879), whatever the
reward. Ties go to the earliest draw; an answer the reward could not judge is kept only if none could be judged; n = 1 is
the policy itself, without a reward call.
Cost an answer: the prompt once, n answers, n reward calls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.measure.kl import best_of_n_bound
from trimtab.policy import Completions, Policy, Prompt
from trimtab.rewards import as_reward
from trimtab.sampling import Sampling

CARD = Card(
    slug="best-of-n",
    name="Best-of-n",
    paper="arXiv 2401.01879 (KL bound), folklore",
    summary="Draw n answers from one shared prefill and keep the one with the highest reward.",
    goal="preference",
    stage="decode",
    mechanism="mcmc/best-of-n",
    signal=("scalar reward",),
    access="black-box text",
    produces="decoder",
    needs=("a policy", "a reward on finished text, at answering time"),
    infer_multiplier="n (the prompt once)",
    fit_cost="none",
    benefit_metrics=("reward",),
    cost_metrics=("tokens_forwarded_per_answer", "reward_calls_per_answer", "kl_bound"),
    limits=("needs the reward at answering time", "gain grows only with log n"),
    risks=("over-optimisation of a proxy reward at large n",),
    composes_with=("natural-control", "re-control", "pref-ctrl", "static-re", "steering-vector"),
    choose="The first thing to try when a reward is at hand: no fit, no access to the model's insides, and hard "
    "to beat at a few samples. Take another method when the reward is imperfect and the budget large (it "
    "over-optimises), or when each answer must cost one.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/base --reward pocket/reward --prompts prompts.txt --policy best-of-n:n=8",
)


@dataclass(frozen=True)
class BestOfNConfig:
    # answers drawn for each one kept
    n: int = 8

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UsageError(f"n must be 1 or more, not {self.n}")


class BestOfN:
    """`BestOfN(policy, reward, n=8)` is a policy; `policy` may be any policy, a steered one too."""

    slug = "best-of-n"
    Config = BestOfNConfig
    KNOB = "n"

    def __init__(self, policy: Policy, reward: Any, n: int = 8, name: str | None = None):
        self.policy, self.reward, self.config = policy, as_reward(reward), BestOfNConfig(n)
        self.name = name or f"best-of-{n}"

    @property
    def kl_bound(self) -> float:
        """Upper bound on the KL of an answer's distribution from the policy's, in nats an answer."""
        return best_of_n_bound(self.config.n)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        """telemetry of each row: `rewards` of its n candidates (None: could not judge) and which was `chosen`."""
        start = time.perf_counter()
        n = self.config.n
        if n == 1:
            return self.policy.generate(prompts, sampling)
        drawn = self.policy.generate(prompts, sampling.but(samples=sampling.samples * n))
        scores = self.reward.score(drawn.prompts, drawn.texts, drawn.cost)
        groups = [range(first, first + n) for first in range(0, len(drawn), n)]
        judged = [-math.inf if (score := scores[row]) is None else score for row in range(len(scores))]
        chosen = [max(group, key=judged.__getitem__) for group in groups]
        kept = drawn.select(chosen)
        kept.telemetry = [
            {"rewards": [scores[row] for row in group], "chosen": row - group[0]}
            for group, row in zip(groups, chosen, strict=True)
        ]
        kept.cost.seconds = time.perf_counter() - start
        return kept
