"""`Guided`: a session over a session. Its rows, cache and tokens are the inner one's; the next token's logits are its own.

A token-level method is a subclass that overrides `guide`; sampling, nesting, forking and cost need nothing more. What has
to keep step with the rows (a reward model's cache, another model's session) is a companion: it gets every append, fork,
drop and rewind too.

    class Sharper(Guided):
        def guide(self, logits):            # [B, V], the inner session's
            return 2 * logits               # -inf cuts a token away
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch

from trimtab.policy import Cost, Prompt


class Companion(Protocol):
    """What can be kept in step with a session's rows. `drop` fills gaps as `Session.drop` does."""

    def append(self, tokens: Any) -> None: ...

    def fork(self, rows: Sequence[int]) -> Any: ...

    def drop(self, rows: Sequence[int]) -> list[int]: ...

    def rewind(self, lengths: torch.Tensor) -> None: ...


def bottom(session: Any) -> Any:
    """The model's own session under any number of guided ones."""
    while session.guided:
        session = session.inner
    return session


class Guided(ABC):
    """See the module.

    inner        a `Session` or another `Guided`
    asked        [B] the prompt of each live row
    companions   by name; attributes of the same name follow forks
    logits       [B, V] guided; computed once per position, however often it is read
    base_logits  [B, V] of the model at the bottom, unguided and unsteered; None where they are not computed
    """

    guided = True

    def __init__(self, inner: Any, asked: Sequence[Prompt], **companions: Companion):
        self.inner, self.asked = inner, list(asked)
        self.companions: dict[str, Any] = companions
        self._logits: torch.Tensor | None = None

    @abstractmethod
    def guide(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits [B, V] to draw from, given the inner session's [B, V]."""

    def reindex(self, rows: Sequence[int]) -> None:  # noqa: B027  a hook: most methods keep no state of their own
        """Called after rows were forked or dropped: row i was number `rows[i]`. Keep state of your own in step here."""

    # what a session shows

    @property
    def logits(self) -> torch.Tensor:
        if self._logits is None:
            self._logits = self.guide(self.inner.logits)
        return self._logits

    @property
    def base_logits(self) -> torch.Tensor | None:
        base: torch.Tensor | None = self.inner.base_logits
        return base

    @property
    def lm(self) -> Any:
        return self.inner.lm

    @property
    def meter(self) -> Cost:
        meter: Cost = self.inner.meter
        return meter

    @property
    def rows(self) -> int:
        return int(self.inner.rows)

    @property
    def lengths(self) -> torch.Tensor:
        lengths: torch.Tensor = self.inner.lengths
        return lengths

    @property
    def prompts(self) -> torch.Tensor:
        prompts: torch.Tensor = self.inner.prompts
        return prompts

    @property
    def tokens(self) -> list[list[int]]:
        tokens: list[list[int]] = self.inner.tokens
        return tokens

    @property
    def input_ids(self) -> torch.Tensor:
        ids: torch.Tensor = self.inner.input_ids
        return ids

    @property
    def hidden(self) -> torch.Tensor:
        hidden: torch.Tensor = self.inner.hidden
        return hidden

    @property
    def edited(self) -> torch.Tensor:
        edited: torch.Tensor = self.inner.edited
        return edited

    def answers(self) -> list[list[int]]:
        """The token ids of every row's answer so far."""
        return [row[start:] for row, start in zip(self.tokens, self.prompts.tolist(), strict=True)]

    # what a session does

    def append(self, tokens: torch.Tensor | Sequence[Sequence[int]]) -> None:
        self._logits = None
        for part in (self.inner, *self.companions.values()):
            part.append(tokens)

    def fork(self, rows: Sequence[int]) -> Self:
        new = copy.copy(self)
        new.inner = self.inner.fork(rows)
        new.companions = {name: part.fork(rows) for name, part in self.companions.items()}
        new.asked = [self.asked[row] for row in rows]
        if self._logits is not None:
            new._logits = self._logits[torch.tensor(list(rows), device=self._logits.device)]
        new.reindex(rows)
        return new

    def drop(self, rows: Sequence[int]) -> list[int]:
        order: list[int] = self.inner.drop(rows)
        for part in self.companions.values():
            part.drop(rows)
        self.asked = [self.asked[row] for row in order]
        if self._logits is not None:
            self._logits = self._logits[torch.tensor(order, dtype=torch.long, device=self._logits.device)]
        self.reindex(order)
        return order

    def rewind(self, lengths: torch.Tensor | Sequence[int]) -> None:
        """Cut every row back to its first `lengths[i]` tokens, prompt included."""
        target = torch.as_tensor(lengths, dtype=torch.long)
        removed = self.lengths - target
        self._logits = None
        self.inner.rewind(target)
        for part in self.companions.values():
            part.rewind(part.lengths - removed)
