"""Entropy and surprise of given answers under the distribution they were drawn from: temperature and cuts applied.

At each position t, with P the distribution that `Sampling` draws from (whole vocabulary, renormalised after top-k, top-p
or min-p):   entropy h_t = -sum_v P(v) log P(v),   surprise s_t = -log P(y_t).

Answers are forwarded again (teacher forcing), a prompt's own tokens once for all of its answers. Rounding may put a token
that was drawn at the edge of the nucleus just outside of the recomputed one: it is then added to it, and counted. Policies
that guide token by token are stepped through their own sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trimtab.errors import UsageError
from trimtab.policy import Cost, Prompt
from trimtab.sampling import Sampling

BEST = 5  # most probable tokens that are kept of each position


@dataclass(frozen=True)
class Scored:
    """One answer of T tokens: entropy [T] and surprise [T] in nats, best [T, BEST] token ids, most probable first, and
    outside [T]: whether the token lay outside of the recomputed cut."""

    entropy: npt.NDArray[np.float64]
    surprise: npt.NDArray[np.float64]
    best: npt.NDArray[np.int64]
    outside: npt.NDArray[np.bool_]

    def part(self, where: slice) -> Scored:
        """Some of its positions."""
        return Scored(self.entropy[where], self.surprise[where], self.best[where], self.outside[where])


def scores_of(logits: torch.Tensor, tokens: torch.Tensor, sampling: Sampling) -> Scored:
    """From logits [T, V] and the tokens [T] that were drawn from them."""
    logprobs = sampling.logprobs(logits)
    at = torch.arange(len(tokens), device=logits.device), tokens.to(logits.device)
    outside = logprobs[at] == -torch.inf
    if bool(outside.any()):
        kept = logprobs > -torch.inf
        kept[at] = True
        whole = (logits.float() / sampling.temperature).masked_fill(~kept, -torch.inf).log_softmax(-1)
        logprobs = torch.where(outside[:, None], whole, logprobs)
    entropy = torch.special.entr(logprobs.double().exp()).sum(-1)
    best = logits.topk(min(BEST, logits.shape[-1]), dim=-1).indices
    surprise = -logprobs[at].double()
    return Scored(*(column.cpu().numpy() for column in (entropy, surprise, best, outside)))


@torch.no_grad()
def score_answers(
    policy: Any,
    prompts: Sequence[Prompt],
    tokens: Sequence[Sequence[int]],
    sampling: Sampling,
    meter: Cost | None = None,
) -> list[Scored]:
    """Score tokens[i] as the answer of a steppable policy to prompts[i]. Answers to one prompt should be neighbours."""
    if sampling.temperature == 0:
        raise UsageError("greedy answers have entropy 0 by construction: sample at a temperature above 0")
    if sampling.repetition_penalty != 1:
        raise UsageError("a repetition penalty makes every answer its own distribution: leave it at 1")
    lm, meter = policy.lm, Cost() if meter is None else meter
    out: list[Scored] = []
    for first in range(0, len(prompts), lm.batch_rows):
        part = [list(map(int, row)) for row in tokens[first : first + lm.batch_rows]]
        asked, owners = _distinct(prompts[first : first + lm.batch_rows])
        session = policy.open(asked, sampling, meter).fork(owners)
        out += _stepped(session, part, sampling) if session.guided else _forced(lm, session, part, sampling)
    return out


def _distinct(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[int]]:
    """Neighbouring equal prompts taken together, and which of these each row asks."""
    asked: list[Prompt] = []
    owners = []
    for prompt in prompts:
        if not asked or asked[-1] != prompt:
            asked.append(prompt)
        owners.append(len(asked) - 1)
    return asked, owners


def _forced(lm: Any, session: Any, answers: list[list[int]], sampling: Sampling) -> list[Scored]:
    """All positions of all answers in one forward. A final edit is applied as it was while they were drawn."""
    session.append([answer[:-1] for answer in answers])
    out = []
    for row, answer in enumerate(answers):
        states = session.states(row)[-len(answer) :] if answer else session.states(row)[:0]
        if session.final is not None and answer:
            states = session.final.edit(states, torch.arange(len(states))).to(states.dtype)
        out.append(scores_of(lm.head(states), torch.tensor(answer, dtype=torch.long), sampling))
    return out


def _stepped(session: Any, answers: list[list[int]], sampling: Sampling) -> list[Scored]:
    """Token by token, as they were drawn; rows leave when their answer ends."""
    steps: list[list[Scored]] = [[] for _ in answers]
    rows = list(range(len(answers)))
    if empty := [row for row in rows if not answers[row]]:
        rows = [rows[old] for old in session.drop(empty)]
    step = 0
    while rows:
        scored = scores_of(session.logits, torch.tensor([answers[row][step] for row in rows]), sampling)
        for at, row in enumerate(rows):
            steps[row].append(scored.part(slice(at, at + 1)))
        ending = [at for at, row in enumerate(rows) if len(answers[row]) == step + 1]
        if len(ending) == len(rows):
            break
        rows = [rows[old] for old in session.drop(ending)] if ending else rows
        session.append(torch.tensor([answers[row][step] for row in rows]))
        step += 1
    return [joined(parts) for parts in steps]


def joined(parts: Sequence[Scored]) -> Scored:
    """One answer from its pieces."""
    if not parts:
        return Scored(np.empty(0), np.empty(0), np.empty((0, BEST), np.int64), np.empty(0, np.bool_))
    names = [field.name for field in fields(Scored)]
    return Scored(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
