"""`take`: rows of a fork come home, so that what a fork forwarded past its origin need not be forwarded again.

branch = session.fork(range(session.rows))      # try something on every row
...                                             # and keep what came of one of them
take(session, [3], branch, [3])                 # row 3 is now what it is in the branch; nothing is forwarded
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trimtab.guided import Guided
from trimtab.rewards.prefix import CachedScorer, TextScorer
from trimtab.session import Session


def can_take(session: Any) -> bool:
    """Whether `take` knows every part of a session: a guided one may keep state of its own, or other companions."""
    if isinstance(session, Guided):
        plain = type(session).reindex is Guided.reindex
        return plain and all(map(can_take, (session.inner, *session.companions.values())))
    return isinstance(session, Session | TextScorer | CachedScorer)


def take(session: Any, rows: Sequence[int], other: Any, theirs: Sequence[int]) -> None:
    """Row `rows[i]` of `session` becomes a copy of row `theirs[i]` of `other`, a fork of it (or of a fork of it)."""
    if isinstance(session, Guided):
        session._logits = None
        take(session.inner, rows, other.inner, theirs)
        for name, companion in session.companions.items():
            take(companion, rows, other.companions[name], theirs)
    elif isinstance(session, CachedScorer):
        take(session.session, rows, other.session, theirs)
    elif isinstance(session, TextScorer):
        for row, source in zip(rows, theirs, strict=True):
            session.answers[row] = list(other.answers[source])
    else:
        _take(session, torch.tensor(rows), other, torch.tensor(theirs))


def _take(session: Session, rows: torch.Tensor, other: Session, theirs: torch.Tensor) -> None:
    lengths = session.lengths.clone()
    lengths[rows] = other.lengths[theirs]
    session.lengths = lengths
    if int(lengths.max()) != session.columns:
        session._realign(torch.zeros_like(lengths))
    width = int(other.lengths[theirs].max())
    to, source = slice(session.columns - width, session.columns), slice(other.columns - width, other.columns)
    for mine, its in zip(_columns(session), _columns(other), strict=True):
        mine[rows.to(mine.device), to] = its[theirs.to(its.device), source]
    session._edited = None


def _columns(session: Session) -> list[torch.Tensor]:
    """Everything a session keeps by row and column, [rows, columns, ...] each."""
    assert session._states is not None
    return [
        session._ids,
        session._states,
        *(buffer.transpose(1, 2) for layer in session._layers() for buffer in layer.buffers),
    ]
