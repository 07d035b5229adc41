"""The sampling loop: a few lines on a `Session`. Everything that answers token by token goes through here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.divergence import kl_between
from trimtab.errors import TrimtabError
from trimtab.sampling import Sampling, draw


@dataclass
class Step:
    """What an observer sees at each step, before the token is appended: one entry a live row.

    rows [B] (row numbers of the call), hidden [B, D] before the edit, edited [B, D], logprobs [B, V] of the
    distribution the tokens were drawn from, tokens [B].
    """

    rows: torch.Tensor
    hidden: torch.Tensor
    edited: torch.Tensor
    logprobs: torch.Tensor
    tokens: torch.Tensor


Observer = Callable[[Step], None]


@dataclass
class Drawn:
    """Answers of one batch: tokens and their log-probabilities per row, and whether each row ended by itself.

    kl: of a guided session, per token, KL(distribution drawn from || the model's own) in nats.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    stopped: list[bool]
    kl: list[list[float]] | None = None


@torch.no_grad()
def sample(
    session: Any,
    sampling: Sampling,
    uniform: torch.Tensor,
    observer: Observer | None = None,
    begun: Sequence[Sequence[int]] | None = None,
    aside: list[tuple[list[int], Any]] | None = None,
) -> Drawn:
    """Continue every row of `session` until an end token, a stop string, `max_new_tokens` or a full context.

    uniform [B, max_new_tokens]: the random numbers (see `sampling.draw`). Rows that finish are dropped from the session
    at once: they are neither forwarded nor edited again. session: a `Session` or a `Guided` one; it is used up.

    begun: the tokens of each row's answer that the session holds already. They count toward `max_new_tokens` and the
    stop strings, and lead `Drawn.tokens`; log-probabilities and KL are those of the tokens drawn here.
    aside: gets the rows that end, in the order they do: their numbers and a fork of the session that holds them.
    """
    lm, count, steps = session.lm, session.rows, sampling.max_new_tokens
    begun = begun or [[]] * count
    tokens = torch.tensor([[*row, *[0] * (steps - len(row))] for row in begun], dtype=torch.long)
    logprob, kl = torch.zeros(count, steps), torch.full((count, steps), torch.nan)
    starts = torch.tensor([len(row) for row in begun], dtype=torch.long)
    lengths = starts.clone()
    stopped = torch.zeros(count, dtype=torch.bool)
    rows = torch.arange(count)
    ends = torch.tensor(sorted(lm.eos_ids), dtype=torch.long)
    needs_ids = sampling.repetition_penalty != 1
    # at temperature 0 the distribution drawn from is a point, and its KL is -log p(token)
    with_kl, softmax = session.guided, Sampling(temperature=sampling.temperature or 1.0)
    full = lengths >= steps
    if lm.context_length is not None:
        full = full | (session.lengths >= lm.context_length)
    if bool(full.any()):
        rows = rows[session.drop(full.nonzero()[:, 0].tolist())]
    for step in range(steps):
        if session.rows == 0:
            break
        ids = session.input_ids.to(lm.device) if needs_ids else None
        logprobs = sampling.logprobs(session.logits, ids)
        if sampling.temperature == 0:
            drawn = logprobs.argmax(-1)
        else:
            drawn = draw(logprobs, uniform[rows, step])
        chosen = logprobs.gather(-1, drawn[:, None])[:, 0].cpu()
        if not bool(chosen.isfinite().all()):
            raise TrimtabError(f"{lm.name} gave logits that are not numbers at step {step} (NaN or infinite weights?)")
        if with_kl and (base := session.base_logits) is not None:
            kl[rows, step] = kl_between(logprobs, softmax.logprobs(base)).cpu()
        if observer is not None:
            # copies: the session's buffers move rows when answers end
            observer(Step(rows, session.hidden.clone(), session.edited.clone(), logprobs, drawn))
        drawn = drawn.cpu()
        tokens[rows, lengths[rows]], logprob[rows, step] = drawn, chosen
        lengths[rows] += 1
        ended = torch.isin(drawn, ends)
        for at in _hits(lm.decode, tokens, lengths, rows, sampling.stop):
            ended[at] = True
        stopped[rows] = ended
        ended = ended | (lengths[rows] >= steps)
        if lm.context_length is not None:
            ended = ended | (session.lengths + 1 >= lm.context_length)
        if bool(ended.any()):
            gone = ended.nonzero()[:, 0].tolist()
            if aside is not None:
                aside.append((rows[gone].tolist(), session.fork(gone)))
            order = session.drop(gone)
            rows, drawn = rows[order], drawn[order]
        if session.rows:
            session.append(drawn)
    return Drawn(
        _rows(tokens, lengths),
        _rows(logprob, lengths - starts),
        stopped.tolist(),
        _rows(kl, lengths - starts) if with_kl else None,
    )


def _rows(columns: torch.Tensor, lengths: torch.Tensor) -> list[list[Any]]:
    """The first `lengths[i]` entries of every row [B, T]."""
    return [row[:length] for row, length in zip(columns.tolist(), lengths.tolist(), strict=True)]


def _hits(
    decode: Callable[[list[int]], str],
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    rows: torch.Tensor,
    stop: tuple[str, ...],
) -> list[int]:
    """Positions (among the live rows) whose answer now contains a stop string."""
    if not stop:
        return []
    texts = (decode(tokens[row, : lengths[row]].tolist()) for row in rows.tolist())
    return [at for at, text in enumerate(texts) if any(word in text for word in stop)]


def cut_at(text: str, stop: tuple[str, ...]) -> str:
    """`text` up to the first stop string."""
    ends = [text.find(word) for word in stop if word in text]
    return text[: min(ends)] if ends else text
