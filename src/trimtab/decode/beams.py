"""Beam search on a session, by log-probability or by log-probability and what a look ahead finds.

    c(y) = log P(y) + weight * h(y)        h of the text that y leads to; the tokens looked ahead add nothing to log P

Every row of the session is searched by itself: of its (at most `width`) prefixes times k next tokens the best `width` are
kept. A prefix that has ended keeps its place and its score, so the search may stop once all kept ones have ended. With
weight 0 a prefix only falls: the best answer found is that of transformers' beam search at length_penalty 0.
Cost: `width` tokens of the model at each step, the shared prefix once; a step copies the cache of the kept rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Prefix:
    """The tokens that a search has added to row `origin` of the session it began with.

    logprobs, kl: of each token, log P under the session and -log P under the model at the bottom (the KL of a certain
    choice); objectives: h at each step, where there was a look ahead. row: where it stands in the session now.
    """

    origin: int
    row: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    objectives: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    done: bool = False

    def score(self, weight: float) -> float:
        return sum(self.logprobs) + (weight * self.objectives[-1] if self.objectives else 0.0)

    def grown(self, token: int, logprob: float, objective: float | None = None, kl: float | None = None) -> Prefix:
        """A new prefix, one token longer."""
        return Prefix(
            self.origin, self.row, [*self.tokens, token], [*self.logprobs, logprob],
            self.objectives if objective is None else [*self.objectives, objective],
            self.kl if kl is None else [*self.kl, kl],
        )  # fmt: skip


@torch.no_grad()
def beam_search(
    session: Any,
    width: int,
    k: int,
    steps: int,
    rank: Callable[[Prefix], Any] = lambda prefix: prefix.score(0.0),
    look: Callable[[Any, torch.Tensor], torch.Tensor] | None = None,
    stop: tuple[str, ...] = (),
    temperature: float = 1.0,
) -> list[list[Prefix]]:
    """The best `width` prefixes of each row after `steps` tokens, the best first; fewer where there are no more.

    rank: what is larger for a better prefix. look(session, candidates [B, k]) -> h [B, k]; the session is then a
    `Guided` one whose inner logits are searched. The session is used up.
    """
    limit = session.lm.context_length or torch.inf
    kept = [[Prefix(row, row, done=bool(length >= limit))] for row, length in enumerate(session.lengths)]
    for step in range(steps):
        logits = (session.inner if look is not None else session).logits
        logprobs, tokens = logits.log_softmax(-1).topk(min(k, logits.shape[-1]), -1)  # [B, k]
        columns = [tokens, logprobs]
        if look is not None:
            columns.append(look(session, tokens))
        if (base := session.base_logits) is not None:
            columns.append(-(base / temperature).log_softmax(-1).gather(-1, tokens))
        table = list(zip(*(column.tolist() for column in columns), strict=True))  # of each row, k values a column
        full = (session.lengths + 1 >= limit).tolist()
        pools: list[list[Prefix]] = []
        for group in kept:
            pools.append([prefix for prefix in group if prefix.done])
            for prefix in (prefix for prefix in group if not prefix.done):
                for token, logprob, *rest in zip(*table[prefix.row], strict=True):
                    new = prefix.grown(token, logprob, rest.pop(0) if look is not None else None, *rest)
                    new.done = token in session.lm.eos_ids or full[prefix.row] or _said(session.lm, new.tokens, stop)
                    pools[-1].append(new)
        kept = [sorted(pool, key=rank, reverse=True)[:width] for pool in pools]
        live = [prefix for group in kept for prefix in group if not prefix.done]
        if not live or step + 1 == steps:
            break
        session = session.fork([prefix.row for prefix in live])
        session.append(torch.tensor([prefix.tokens[-1] for prefix in live]))
        for row, prefix in enumerate(live):
            prefix.row = row
    return kept


def segment_search(
    session: Any, width: int, k: int, segment: int, steps: int, judged: Callable[[Any, Sequence[int], Any], list[float]],
    stop: tuple[str, ...] = (), temperature: float = 1.0,
) -> list[Prefix]:  # fmt: skip
    """Of each row the best text seen, by h alone, where whole segments are proposed and committed.

    A beam search by log P proposes k segments after each kept prefix; the best `width` of all texts, ended or not, are
    kept and those that have not ended go on. judged(session, rows, continuations) -> h of each. The session, a `Guided`
    one, is used up.
    """
    kept = [[Prefix(row, row)] for row in range(session.rows)]
    best = [group[0] for group in kept]
    while steps > 0:
        live = [prefix for group in kept for prefix in group if not prefix.done]  # in the order of the session's rows
        span = min(segment, steps)
        plain = session.inner.fork(range(session.rows))
        proposed = [
            part for group in beam_search(plain, k, k, span, stop=stop, temperature=temperature) for part in group
        ]
        scores = judged(session, [part.origin for part in proposed], [part.tokens for part in proposed])
        pools = [[prefix for prefix in group if prefix.done] for group in kept]
        for part, score in zip(proposed, scores, strict=True):
            before = live[part.origin]
            part.tokens, part.logprobs, part.kl = (
                before.tokens + part.tokens, before.logprobs + part.logprobs, before.kl + part.kl,
            )  # fmt: skip
            part.objectives = [*before.objectives, score]
            part.origin, part.row = before.origin, part.origin
            pools[part.origin].append(part)
        kept = [sorted(pool, key=_objective, reverse=True)[:width] for pool in pools]
        best = [max(group[0], held, key=_objective) for group, held in zip(kept, best, strict=True)]
        ahead = [prefix for group in kept for prefix in group if not prefix.done]
        steps -= span
        if not ahead or not steps:
            break
        session = session.fork([prefix.row for prefix in ahead])
        session.append([prefix.tokens[-span:] for prefix in ahead])
    return best


def _objective(prefix: Prefix) -> float:
    """What could not be judged, and the start, come last."""
    last = prefix.objectives[-1] if prefix.objectives else -torch.inf
    return last if last == last else -torch.inf


def _said(lm: Any, tokens: list[int], stop: tuple[str, ...]) -> bool:
    return bool(stop) and any(word in lm.decode(tokens) for word in stop)
