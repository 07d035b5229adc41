"""Looking ahead: what each candidate token would lead to, rolled out from a session that is left as it is.

    texts = roll_out(session, [0, 0, 1], [5, 7, 5], [8, 8, 8])    # row 0 + token 5, row 0 + token 7, row 1 + token 5,
    scores = judge(scorer, [0, 0, 1], texts)                      # each up to 8 tokens further

The cache of a prefix is forked for every candidate, so a roll-out forwards its own tokens alone. Sampled roll-outs use
random numbers that depend on (seed, the row's tokens) and on nothing else: an answer is the same in any batch, and the
same state is always judged alike. The candidates of one state share them, which takes noise off their differences.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from trimtab.generation import sample
from trimtab.policy import Prompt, prompt_text
from trimtab.sampling import Sampling, derive_seed, uniforms

State = tuple[str, tuple[int, ...]]  # a prompt and the answer so far
Trace = dict[State, dict[int, tuple[float, ...]]]  # what was found out about each candidate there


@torch.no_grad()
def roll_out(
    session: Any,
    rows: Sequence[int],
    tokens: Sequence[int],
    lengths: Sequence[int],
    uniform: torch.Tensor | None = None,
    stop: tuple[str, ...] = (),
    ends: Collection[int] = (),
) -> list[list[int]]:
    """Row rows[i] continued by tokens[i] and up to lengths[i] tokens more, to an end token, a stop string or a full
    context. Gives the continuation, tokens[i] first.

    uniform [n, >= max(lengths)]: random numbers for draws at temperature 1; None: greedy. ends: end tokens besides those
    of the session's own model.
    """
    lm, out = session.lm, [[token] for token in tokens]
    over = lm.eos_ids | set(ends)
    going = [
        i
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True))
        if lengths[i] > 0
        and token not in over
        and (lm.context_length is None or int(session.lengths[row]) + 1 < lm.context_length)
    ]
    for steps in sorted({lengths[i] for i in going}):  # one, where the rows of the session are equally far
        alike = [i for i in going if lengths[i] == steps]
        sampling = Sampling(max_new_tokens=steps, temperature=0.0 if uniform is None else 1.0, stop=stop)
        for first in range(0, len(alike), lm.batch_rows):
            part = alike[first : first + lm.batch_rows]
            fork = session.fork([rows[i] for i in part])
            fork.append(torch.tensor([tokens[i] for i in part]))
            drawn = sample(fork, sampling, torch.empty(len(part), 0) if uniform is None else uniform[part])
            for i, more in zip(part, drawn.tokens, strict=True):
                out[i] += more
    return out


def judge(scorer: Any, rows: Sequence[int], continuations: Sequence[Sequence[int]]) -> torch.Tensor:
    """[n] scores of rows continued; a text that comes up several times is scored once."""
    number: dict[tuple[int, tuple[int, ...]], int] = {}
    at = [number.setdefault((row, tuple(more)), len(number)) for row, more in zip(rows, continuations, strict=True)]
    scores: torch.Tensor = scorer.score([row for row, _ in number], [list(more) for _, more in number])
    return scores[torch.tensor(at)]


def state_uniforms(seed: int, tokens: Sequence[Sequence[int]], draws: int, steps: int) -> torch.Tensor:
    """[B, draws, steps] random numbers; row b's depend on (seed, tokens[b]) alone."""
    return torch.stack([uniforms(draws, steps, derive_seed(seed, "roll-out", *row)) for row in tokens])


def room(answers: Sequence[Sequence[int]], budget: int, lookahead: int) -> list[int]:
    """How many tokens a roll-out of each row may have after its candidate, in an answer of at most `budget` tokens."""
    return [max(0, min(lookahead, budget - len(answer) - 1)) for answer in answers]


def state_of(prompt: Prompt, answer: Sequence[int]) -> State:
    return prompt_text(prompt), tuple(answer)


def looked_up(trace: Trace, prompt: Prompt, tokens: Sequence[int]) -> list[dict[int, tuple[float, ...]]]:
    """What was found out at each step of an answer; empty where nothing was looked at."""
    return [trace.get(state_of(prompt, tokens[:step]), {}) for step in range(len(tokens))]
