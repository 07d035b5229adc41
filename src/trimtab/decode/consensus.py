"""What a vote and minimum Bayes risk share: draw n independent answers, weigh them, give the one they agree on."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

from trimtab.decode.selection import Array, weights
from trimtab.errors import UsageError
from trimtab.parts import Parts
from trimtab.policy import Completions, Policy, Prompt
from trimtab.rewards import as_reward
from trimtab.sampling import Sampling


def check_consensus(n: int, beta: float) -> None:
    """What both methods ask of their options."""
    if n < 1:
        raise UsageError(f"n must be 1 or more, not {n}")
    if not beta > 0:
        raise UsageError(f"beta must be above 0, not {beta}")


class Consensus(ABC):
    """Subclasses set `slug` and `Config` (with n, weighted, beta) and write `choose`. n = 1 is the policy itself.

    The reward is called only where `weighted` is set; without one that is refused.
    """

    slug: str
    KNOB = "n"
    NEEDS_REWARD = False

    def __init__(self, policy: Policy, reward: Any, config: Any, name: str | None):
        if config.weighted and reward is None:
            raise UsageError(f"{self.slug}: weighted=true weighs answers by a reward: give one, or weighted=false")
        self.policy, self.config = policy, config
        self.reward = as_reward(reward) if config.weighted else None
        self.name = name or f"{'weighted-' if config.weighted else ''}{self.slug}-{config.n}"

    @classmethod
    @abstractmethod
    def make(cls, parts: Parts, config: Any) -> Self:
        """The policy that a command line names."""

    @abstractmethod
    def choose(self, drawn: Completions, group: range, shares: Array) -> tuple[int, dict[str, Any]]:
        """The place in `group` (rows of `drawn`) that wins under `shares` [n], and what to tell about it."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        """telemetry of each row: which of its n draws was `chosen`, and where weighted their `rewards` and `weights`."""
        start = time.perf_counter()
        n = self.config.n
        if n == 1:
            return self.policy.generate(prompts, sampling)
        drawn = self.policy.generate(prompts, sampling.but(samples=sampling.samples * n))
        judged = None if self.reward is None else self.reward.score(drawn.prompts, drawn.texts, drawn.cost)
        chosen, telemetry = [], []
        for first in range(0, len(drawn), n):
            group = range(first, first + n)
            rewards = [None] * n if judged is None else judged[first : first + n]
            shares = weights(rewards, None if judged is None else self.config.beta)
            place, told = self.choose(drawn, group, shares)
            chosen.append(group[place])
            told |= {"chosen": place}
            telemetry.append(told if judged is None else told | {"rewards": rewards, "weights": shares.tolist()})
        kept = drawn.select(chosen)
        kept.telemetry = telemetry
        kept.cost.seconds = time.perf_counter() - start
        return kept
