"""Policies whose answers are known, to measure with: `subjects(20, Answers("ours", lambda prompt, sample: "yes"))`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.measure.diagnostic import Subject
from trimtab.policy import Completions, Cost, Prompt
from trimtab.sampling import Sampling


class Answers:
    """A policy whose answers are known: says(prompt number, sample number)."""

    def __init__(self, name: str, says: Any, reason: str = "stop") -> None:
        self.name, self.says, self.reason = name, says, reason

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        rows = [(prompt, k) for prompt in prompts for k in range(sampling.samples)]
        texts = [self.says(int(str(prompt)), k) for prompt, k in rows]
        none: list[Any] = [[] for _ in rows]
        reasons = [self.reason] * len(rows)
        return Completions([prompt for prompt, _ in rows], texts, none, none, reasons, Cost({self.name: len(rows)}))


def subjects(count: int, *policies: Any, **options: Any) -> list[Subject]:
    """The policies, to be asked the prompts "0", "1", ..."""
    prompts: list[Prompt] = [str(i) for i in range(count)]
    return [Subject(policy, policy.name, prompts=prompts, **options) for policy in policies]
