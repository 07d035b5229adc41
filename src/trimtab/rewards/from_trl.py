"""A reward function of TRL as a reward: `FromTrl(think_format_reward)`. The way back is `Reward.as_trl`.

TRL calls `fn(prompts, completions, completion_ids, **columns) -> list[float | None]`. Prompts and completions are handed over
as messages, which every function of `trl.rewards` takes; ids are those of `tokenizer`, else the answer's words stand for
them (a length then counts words). Columns of a data set, such as a solution, are not there: a function that needs one fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from trimtab.errors import TrimtabError, UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.policy import Prompt
from trimtab.rewards.base import Reward
from trimtab.rewards.function import _source


class FromTrl(Reward):
    """`fn` as TRL's trainers call it. The fingerprint hashes its source; values it closes over are not seen."""

    slug = "trl"
    failure: ClassVar[type[TrimtabError]] = UsageError
    on_prefixes = False

    def __init__(self, fn: Callable[..., Any], tokenizer: Any = None, name: str | None = None) -> None:
        if not callable(fn):
            raise UsageError(f"a TRL reward function is needed, not {type(fn).__name__}")
        self.fn, self.tokenizer = fn, tokenizer
        self._name = name or str(getattr(fn, "__name__", type(fn).__name__))

    @property
    def name(self) -> str:
        return self._name

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.slug, self._name, _source(self.fn))

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Any:
        return self.fn(
            prompts=[[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts],
            completions=[[{"role": "assistant", "content": text}] for text in texts],
            completion_ids=[self._ids(text) for text in texts],
        )

    def _ids(self, text: str) -> list[Any]:
        if self.tokenizer is None:
            return text.split()
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
