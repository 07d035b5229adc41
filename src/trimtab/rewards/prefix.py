"""The reward of unfinished answers, many candidates at a time: what token-by-token methods ask of a reward.

    scorer = prefix_scorer(reward, lm, asked, meter)     # one row a prompt, answers still empty
    scorer.score([0, 0, 1], [[5], [7], [5]])             # reward of row 0 + token 5, row 0 + token 7, row 1 + token 5
    scorer.append(tokens)                                # the answers grow; fork, drop, rewind as a `Session` does

Where the reward is a causal classifier with the model's own tokens, its key-value cache is kept beside the answer and
shared by all candidates (see `branches`): a candidate costs its own tokens (2 k T tokens over an answer of T with k
candidates and an end token, against k T^2 / 2 from scratch). Any other reward is given the decoded text of all
candidates in one batch.

The cached path reads token ids as the model wrote them. The text path reads their text, which the reward tokenizes
anew: the two differ where a model spells a word in pieces that its tokenizer would not have chosen, and where it writes
special tokens (other than those that end an answer), which its text does not show.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch

from trimtab import attention
from trimtab.branches import Branches, keep, look
from trimtab.policy import Cost, Prompt
from trimtab.rewards.base import Reward
from trimtab.rewards.classifier import Classifier
from trimtab.session import Session

if TYPE_CHECKING:
    from trimtab.lm import LM


class UnfinishedText(UserWarning):
    """A reward that was made for whole answers is asked about prefixes."""


def prefix_scorer(
    reward: Reward, lm: LM, asked: Sequence[Prompt], meter: Cost, cache: bool = True
) -> CachedScorer | TextScorer:
    """The fastest scorer that `reward` allows; `cache=False` asks for text. Tokens and calls are charged to `meter`.

    Prompts that do not fit into the reward model's context go as text too: there their beginning can be cut.
    """
    if cache and isinstance(reward, Classifier) and reward.causal and reward.shares_tokens(lm.tokenizer):
        frames = [reward.frame(prompt) for prompt in asked]
        if all(before and len(before) + len(after) < reward.limit for before, after in frames):
            return CachedScorer(reward, lm, frames, meter)
    return TextScorer(reward, lm, asked, meter)


def warn_unfinished(reward: Reward, method: str) -> None:
    """Say once a method that a reward made for whole answers is about to judge unfinished ones."""
    if not reward.on_prefixes:
        warnings.warn(
            f"{method} asks {reward.name} about unfinished answers, which it was not made for: "
            "its score of a prefix is not the reward to expect",
            UnfinishedText,
            stacklevel=3,
        )


class TextScorer:
    """Scores the decoded text. lengths [B]: tokens of each answer so far."""

    def __init__(self, reward: Reward, lm: LM, asked: Sequence[Prompt], meter: Cost):
        self.reward, self.lm, self.asked, self.meter = reward, lm, list(asked), meter
        self.answers: list[list[int]] = [[] for _ in asked]

    @property
    def lengths(self) -> torch.Tensor:
        return torch.tensor([len(answer) for answer in self.answers], dtype=torch.long)

    def score(self, rows: Sequence[int], continuations: Sequence[Sequence[int]]) -> torch.Tensor:
        """[n] float32: the reward of row `rows[i]` continued by `continuations[i]`; NaN where it could not judge."""
        texts = [self.lm.decode([*self.answers[row], *more]) for row, more in zip(rows, continuations, strict=True)]
        scores = self.reward.score([self.asked[row] for row in rows], texts, self.meter)
        return torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float32)

    def append(self, tokens: torch.Tensor | Sequence[Sequence[int]]) -> None:
        new = tokens[:, None].tolist() if isinstance(tokens, torch.Tensor) else tokens
        self.answers = [[*answer, *more] for answer, more in zip(self.answers, new, strict=True)]

    def fork(self, rows: Sequence[int]) -> Self:
        new = type(self)(self.reward, self.lm, [self.asked[row] for row in rows], self.meter)
        new.answers = [list(self.answers[row]) for row in rows]
        return new

    def drop(self, rows: Sequence[int]) -> list[int]:
        order = kept_order(len(self.answers), rows)
        self.answers, self.asked = [self.answers[i] for i in order], [self.asked[i] for i in order]
        return order

    def rewind(self, lengths: torch.Tensor | Sequence[int]) -> None:
        ends = torch.as_tensor(lengths).tolist()
        self.answers = [answer[:end] for answer, end in zip(self.answers, ends, strict=True)]


class CachedScorer:
    """Scores token ids in the reward model's own session.

    frames   the token ids that the reward reads before and after each row's answer
    lengths  [B] tokens of each row so far, the prompt's included; the session holds those that its context has room for

    What was scored last stays in the session's cache, behind its end: where the tokens appended are among it, nothing is
    forwarded again.
    """

    def __init__(self, reward: Classifier, lm: LM, frames: Sequence[tuple[list[int], list[int]]], meter: Cost):
        self.reward, self.ends, self.meter = reward, lm.eos_ids, meter
        self.suffixes = [after for _, after in frames]
        body: Any = _Body(reward)
        self.session = Session(body, [before for before, _ in frames], None, meter)
        self.over = torch.zeros(len(frames), dtype=torch.long)  # [B] tokens beyond the context
        self.seen: Branches | None = None  # what was scored last

    @property
    def lengths(self) -> torch.Tensor:
        return self.session.lengths + self.over

    def score(self, rows: Sequence[int], continuations: Sequence[Sequence[int]]) -> torch.Tensor:
        """[n] float32, as `TextScorer.score`; NaN too where the text outgrows the reward model's context."""
        more = [self._spoken(row, tokens) for row, tokens in zip(rows, continuations, strict=True)]
        out = torch.full((len(more),), math.nan)
        lengths, limit = self.lengths.tolist(), self.reward.limit
        fits = [i for i, row in enumerate(rows) if lengths[row] + len(more[i]) <= limit]
        self.meter.reward_calls += len(fits)
        if fits:
            self.seen = look(self.session, [rows[i] for i in fits], [more[i] for i in fits])
            out[fits] = self.reward.head(self.seen.hidden)[:, self.reward.column or 0].cpu()
        return out

    def _spoken(self, row: int, tokens: Sequence[int]) -> list[int]:
        """What the reward reads after the row: an end token is not text, what its template puts after the answer is."""
        return [*(token for token in tokens if token not in self.ends), *self.suffixes[row]]

    def append(self, tokens: torch.Tensor | Sequence[Sequence[int]]) -> None:
        seen, self.seen = self.seen, None
        if isinstance(tokens, torch.Tensor) and seen is not None and keep(self.session, seen, tokens.tolist()):
            return
        new = tokens[:, None].tolist() if isinstance(tokens, torch.Tensor) else tokens
        room = (self.reward.limit - self.session.lengths).tolist()
        kept = [list(row[:free]) for row, free in zip(new, room, strict=True)]
        self.session.append(kept)
        cut = [len(row) - len(some) for row, some in zip(new, kept, strict=True)]
        self.over = self.over + torch.tensor(cut, dtype=torch.long)

    def fork(self, rows: Sequence[int]) -> Self:
        new = object.__new__(type(self))
        new.reward, new.ends, new.meter = self.reward, self.ends, self.meter
        new.suffixes = [self.suffixes[row] for row in rows]
        new.session, new.over, new.seen = self.session.fork(rows), self.over[list(rows)], None
        return new

    def drop(self, rows: Sequence[int]) -> list[int]:
        order = self.session.drop(rows)
        self.suffixes, self.over = [self.suffixes[i] for i in order], self.over[order]
        self.seen = None if self.seen is None else self.seen.reindex(order)
        return order

    def rewind(self, lengths: torch.Tensor | Sequence[int]) -> None:
        target, limit = torch.as_tensor(lengths, dtype=torch.long), self.reward.limit
        self.seen = None
        self.session.rewind(target.clamp(max=limit))
        self.over = (target - limit).clamp(min=0)


class _Body:
    """A classifier as `Session` wants its model: backbone, head [B, D] -> [B, labels], context."""

    def __init__(self, reward: Classifier):
        attention.adopt(reward.model)
        self.model, self.name, self.device = reward.model, reward.name, reward.model.device
        self.backbone, self.head = reward.model.base_model, reward.head
        self.context_length = reward.limit
        self.unembedding = reward.model.get_input_embeddings().weight  # for its dtype
        self.takes_position_ids = "position_ids" in inspect.signature(self.backbone.forward).parameters
        self.takes_ready_mask = attention.takes_ready_mask(reward.model)


def kept_order(count: int, dropped: Sequence[int]) -> list[int]:
    """The old numbers of the rows that stay, as `Session.drop` orders them: the last ones fill the gaps."""
    gone = set(dropped)
    stay = [row for row in range(count) if row not in gone]
    spare = [row for row in stay if row >= len(stay)]
    return [row if row not in gone else spare.pop() for row in range(len(stay))]
