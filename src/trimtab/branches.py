"""`look`: the states at the end of many continuations of a session's rows, which stays as it is.

    seen = look(session, [0, 0, 1], [[5], [7, 8], [5]])     # row 0 + 5, row 0 + 7 8, row 1 + 5
    seen.hidden                                             # [3, D]
    keep(session, seen, [7, 5])                             # rows 0 and 1 grow by a token that was looked at: no forward

A fork copies the keys and values of everything before: k candidates of a token cost k copies of the prefix. Where the
model's attention takes a mask of ours, candidates are further columns of their row instead, each of which sees the row
and its own continuation: one forward, nothing copied, and the one that is chosen need not be forwarded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.attention import NAME, additive
from trimtab.session import Session

WIDEST = 256  # columns a row's continuations may take together: they are multiplied with each other, mask or not
ROWS = 512  # continuations forwarded together on forks
MASKED = {NAME, "sdpa", "eager"}  # attention that takes any mask


@dataclass
class Branches:
    """What was looked at.

    hidden  [n, D] the final hidden state at the end of each continuation, before any edit
    first   of every row of the session, the column of each first token; empty where forks were looked at
    states  [B, W, D] of all columns; prefix [B, columns] what the rows held
    """

    hidden: torch.Tensor
    first: list[dict[int, int]]
    states: torch.Tensor
    prefix: torch.Tensor

    def reindex(self, rows: Sequence[int]) -> Branches:
        """After rows of the session were dropped: row i was number `rows[i]`."""
        index = list(rows)
        return Branches(self.hidden, [self.first[row] for row in index], self.states[index], self.prefix[index])


@torch.no_grad()
def look(session: Session, rows: Sequence[int], continuations: Sequence[Sequence[int]]) -> Branches:
    """Row rows[i] continued by continuations[i], which may be empty. The tokens are charged to the session's meter."""
    widths = [0] * session.rows
    for row, tokens in zip(rows, continuations, strict=True):
        widths[row] += len(tokens)
    balanced = session.rows * max(widths) <= 2 * sum(widths)  # every row gets as many columns as the widest
    if 0 < max(widths) <= WIDEST and balanced and takes_masks(session):
        return _beside(session, rows, continuations)
    hidden = session.hidden.new_empty(len(rows), session.hidden.shape[-1])
    for width in sorted(set(map(len, continuations))):  # rows that grow alike need no realignment of their cache
        alike = [i for i, tokens in enumerate(continuations) if len(tokens) == width]
        for at in range(0, len(alike), ROWS):
            part = alike[at : at + ROWS]
            fork = session.fork([rows[i] for i in part])
            fork.append([list(continuations[i]) for i in part])
            hidden[part] = fork.hidden
    empty = hidden.new_empty(session.rows, 0)
    return Branches(hidden, [{} for _ in widths], empty, empty)


@torch.no_grad()
def keep(session: Session, seen: Branches, tokens: Sequence[int]) -> bool:
    """Append a token a row where all of them were among the last that was looked at; else do nothing and say so."""
    columns, device = session.columns, session.lm.device
    if any(token not in known for token, known in zip(tokens, seen.first, strict=True)):
        return False
    if not torch.equal(seen.prefix, session._ids[: session.rows, :columns]):
        return False
    at = torch.tensor([known[token] for token, known in zip(tokens, seen.first, strict=True)], device=device)
    rows = torch.arange(session.rows, device=device)
    session._store(torch.tensor(tokens)[:, None], seen.states[rows, at][:, None])
    for layer in session._layers():
        for buffer in layer.buffers:
            buffer[: session.rows, :, columns] = buffer[rows, :, columns + at]
        layer.length = columns + 1
    session.columns += 1
    session.lengths = session.lengths + 1
    session._edited = None
    return True


def takes_masks(session: Session) -> bool:
    """Whether a mask of ours serves every layer: no sliding windows, no positions of the model's own making."""
    config: Any = session.lm.model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    free = session.inside is None and session.lm.takes_position_ids
    return free and config._attn_implementation in MASKED and kinds == {"full_attention"} and not any(windows)


def _beside(session: Session, rows: Sequence[int], continuations: Sequence[Sequence[int]]) -> Branches:
    device, columns = session.lm.device, session.columns
    tables: list[list[list[int]]] = [[[] for _ in range(session.rows)] for _ in range(3)]
    ids, branch, depth = tables
    first: list[dict[int, int]] = [{} for _ in range(session.rows)]
    last = []  # column of the last token of each continuation
    for number, (row, tokens) in enumerate(zip(rows, continuations, strict=True)):
        if tokens:
            first[row].setdefault(tokens[0], len(ids[row]))
        ids[row] += tokens
        branch[row] += [number] * len(tokens)
        depth[row] += range(len(tokens))
        last.append(len(ids[row]) - 1 if tokens else -1)
    width = max(map(len, ids))
    chunk, of, at = (
        torch.tensor([[*row, *[fill] * (width - len(row))] for row in table])
        for table, fill in ((ids, 0), (branch, -1), (depth, 0))
    )  # [B, W]
    before = torch.arange(columns) >= (columns - session.lengths)[:, None]  # [B, columns]
    beside = (of[:, :, None] == of[:, None, :]) & torch.ones(width, width, dtype=torch.bool).tril()  # [B, W, W]
    mask = torch.cat([before[:, None].expand(-1, width, -1), beside], -1)[:, None].to(device)  # [B, 1, W, columns + W]
    with torch.inference_mode(session._unhooked):
        states = session.lm.backbone(
            input_ids=chunk.to(device),
            attention_mask=additive(mask, session.lm.unembedding.dtype),
            position_ids=(session.lengths[:, None] + at).to(device),
            past_key_values=session.cache,
            use_cache=True,
        ).last_hidden_state  # [B, W, D]
    for layer in session._layers():
        layer.length = columns  # the new columns lie behind the end until something is written over them
    spoken = sum(map(len, continuations))
    session.tokens_forwarded += spoken
    session.meter.tokens[session.lm.name] = session.meter.tokens.get(session.lm.name, 0) + spoken
    owners, ends = torch.tensor(rows, device=device), torch.tensor(last, device=device)
    hidden = torch.where(ends[:, None] >= 0, states[owners, ends.clamp(min=0)], session.hidden[owners])
    return Branches(hidden, first, states, session._ids[: session.rows, :columns].clone())
