"""A policy whose whole law is known: each answer is one of a few words, drawn with given probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trimtab import Completions, Cost, Sampling

PLAIN = Sampling()


class Categorical:
    """Answers are "0", "1", ... with probabilities p [A]; `calls` counts the answers drawn."""

    def __init__(self, p: Sequence[float], name: str = "categorical"):
        self.p, self.name, self.calls = np.array(p) / np.sum(p), name, 0

    def generate(self, prompts: Sequence[Any], sampling: Sampling = PLAIN) -> Completions:
        count = len(prompts) * sampling.samples
        self.calls += count
        drawn = np.random.default_rng(sampling.seed).choice(len(self.p), count, p=self.p).tolist()
        owners = [prompt for prompt in prompts for _ in range(sampling.samples)]
        logprobs = [[float(np.log(self.p[number]))] for number in drawn]
        cost = Cost({self.name: count})
        return Completions(owners, list(map(str, drawn)), [[x] for x in drawn], logprobs, ["stop"] * count, cost)
