"""The reward that a tuned model implies: r = beta * (log pi(y | x) - log pi_ref(y | x)), in nats times beta.

DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 5) up to a term that depends on the prompt alone: compare answers to one
prompt, never answers to different ones. Summed over the answer's tokens (the end token included), so it is no rate: a
longer answer can move further from 0. Both models must spell text alike (one vocabulary).

Cost: two forwards of prompt and answer, one of each model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.policy import Prompt
from trimtab.rewards.base import Reward


@dataclass(eq=False)
class Implicit(Reward):
    """beta * (log pi - log pi_ref) of the whole answer, for two local models with one vocabulary.

    None for the empty text without an end token, and for an answer that does not fit into the context.
    """

    slug = "implicit"
    on_prefixes = False

    model: str  # the tuned model: pocket/NAME, a folder or a Hub id
    reference: str  # the model that it was tuned from
    beta: float = 0.1  # the KL coefficient that it was tuned with
    end: bool = True  # whether the end-of-sequence token is part of the answer

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UsageError(f"reward 'implicit' needs beta above 0, not {self.beta}")
        self._models  # noqa: B018  a model that does not load is refused here, not in the middle of a run

    @cached_property
    def _models(self) -> tuple[Any, Any]:
        from trimtab.lm import LM

        tuned, base = LM.load(self.model), LM.load(self.reference)
        if tuned.tokenizer.get_vocab() != base.tokenizer.get_vocab():
            raise UsageError(f"reward 'implicit': {self.model} and {self.reference} do not share a vocabulary")
        return tuned, base

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        return fingerprint_of(self.slug, [lm.fingerprint for lm in self._models], self.beta, self.end)

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
        tuned, base = self._models
        closing = [min(tuned.eos_ids)] if self.end and tuned.eos_ids else []
        answers = [[*tuned.tokenizer(text, add_special_tokens=False)["input_ids"], *closing] for text in texts]
        asked = [[len(ids) for ids in lm.encode(prompts)] for lm in (tuned, base)]  # each in its own chat template
        room = [math.inf if lm.context_length is None else lm.context_length for lm in (tuned, base)]
        out: list[float | None] = [None] * len(texts)
        rows = [
            i
            for i, answer in enumerate(answers)
            if answer and all(length[i] + len(answer) <= most for length, most in zip(asked, room, strict=True))
        ]
        for first in range(0, len(rows), 32):  # whole next-token distributions are held for this many answers
            part = rows[first : first + 32]
            given = [prompts[i] for i in part], [answers[i] for i in part]
            for i, own, other in zip(part, tuned.score(*given), base.score(*given), strict=True):
                out[i] = self.beta * float(own.double().sum() - other.double().sum())
        self.tokens_forwarded += sum(length[i] + len(answers[i]) - 1 for length in asked for i in rows)
        return out
