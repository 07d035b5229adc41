"""Exact values of the enumerable toy as what controlled decoding reads, and what its session draws from at each prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from oracles.toy import Toy
from trimtab.policy import Cost


class Lookup:
    """`Values` from tables: Q [N, V] and V [N] by prefix."""

    def __init__(self, toy: Toy, q: torch.Tensor, v: torch.Tensor):
        self.q, self.v = q, v
        self.number = {prefix: row for row, prefix in enumerate(toy.prefixes)}

    def check(self, lm: Any) -> None:
        """Right for its toy."""

    def at(self, session: Any) -> list[int]:
        starts = session.prompts.tolist()
        return [self.number[tuple(row[start:])] for row, start in zip(session.tokens, starts, strict=True)]

    def following(self, session: Any, tokens: torch.Tensor) -> torch.Tensor:
        return self.q[self.at(session)].gather(-1, tokens)

    def reached(self, session: Any) -> torch.Tensor:
        return self.v[self.at(session)]


def exact(toy: Toy) -> Lookup:
    """The value of the base."""
    return Lookup(toy, *toy.values())


def soft(toy: Toy, lam: float) -> Lookup:
    """The soft value: with it token-wise decoding is the optimum of whole answers."""
    return Lookup(toy, *toy.backup(lambda level, q: torch.logsumexp(toy.base[level] + lam * q, -1) / lam))


def drawn_from(toy: Toy, policy: Any, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities [N, V] of a steppable policy's own session at every prefix of the toy."""
    sampling = toy.sampling.but(temperature=temperature)
    session = policy.open([toy.prompt], sampling, Cost())
    out = torch.full((len(toy.prefixes), toy.vocab), torch.nan, dtype=torch.float64)
    for number, level in enumerate(toy.levels):
        if number:
            parents = toy.levels[number - 1]
            longer = [toy.prefixes[row] for row in range(level.start, level.stop)]
            above = {toy.prefixes[row]: row - parents.start for row in range(parents.start, parents.stop)}
            session = session.fork([above[prefix[:-1]] for prefix in longer])
            session.append(torch.tensor([prefix[-1] for prefix in longer]))
        out[level] = sampling.logprobs(session.logits).double()
    return out


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    return 0.5 * float((p - q).abs().sum())


def numbers_of(toy: Toy, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """Which of the toy's answers each row is."""
    number = {tuple(answer): i for i, answer in enumerate(toy.answers)}
    return torch.tensor([number[tuple(row)] for row in tokens])
