"""`Reward`: one interface for every score of an answer.

`reward.score(prompts, texts) -> list[float | None]` is the primitive: one finite number a row, or None where the reward
could not judge the row. None is never 0. `reward(prompts, texts) -> float32[N]` is the same as an array in which NaN is
the marker of None and of nothing else; mask it with `judged(scores)`. Larger is better. Consumers count the calls.

A new reward is one file: a dataclass deriving from `Reward`, whose fields are its options, and `_score`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from trimtab.errors import TrimtabError, UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.policy import Cost, Prompt, prompt_text
from trimtab.spec import changed, format_spec


class Reward(ABC):
    """A score of (prompt, answer). Subclasses write `_score`; everything given back has been checked.

    slug: the NAME of the reward in `NAME[:key=value,...]`. failure: the error an exception in `_score` becomes.
    on_prefixes: whether its score of an unfinished answer means something; methods that ask for one warn where not.
    tokens_forwarded: tokens its own model has forwarded so far, 0 where it has none.
    """

    slug: ClassVar[str] = "reward"
    failure: ClassVar[type[TrimtabError]] = TrimtabError
    on_prefixes: bool = True
    tokens_forwarded: int = 0

    @abstractmethod
    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Any:
        """N numbers (list, array or tensor), None where a row cannot be judged. Never called with N = 0."""

    @property
    def name(self) -> str:
        """What tables call it: the slug and the options that are not defaults."""
        return format_spec(self.slug, changed(self) if dataclasses.is_dataclass(self) else {})

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when the configuration (or the weights, where there are some) changes."""
        config: dict[str, Any] = (
            dataclasses.asdict(self) if dataclasses.is_dataclass(self) and not isinstance(self, type) else {}
        )
        return fingerprint_of(self.slug, config)

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], meter: Cost | None = None) -> list[float | None]:
        """One finite float or None (could not judge) a row; `prompts[i]` was answered by `texts[i]`.

        The calls, and the tokens that the reward's own model forwards, are charged to `meter`.

        Raises `UsageError` naming the reward and the row for NaN, infinity, a wrong number of scores or a value that
        is no number, and `failure` (`UsageError` for a user's function) naming them for an exception inside the reward.
        """
        if len(prompts) != len(texts):
            raise UsageError(f"reward {self.name!r}: {len(prompts)} prompts but {len(texts)} texts; one each is needed")
        if not texts:
            return []
        before = self.tokens_forwarded
        try:
            raw = self._score(prompts, texts)
        except TrimtabError:
            raise
        except Exception as error:
            row = self._failing_row(prompts, texts)
            raise self.failure(f"reward {self.name!r} raised {_say(error)} on {_where(row, prompts)}") from error
        if meter is not None:
            meter.reward_calls += len(texts)
            if spent := self.tokens_forwarded - before:
                meter.tokens[self.name] = meter.tokens.get(self.name, 0) + spent
        return self._checked(raw, prompts)

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """`score` as float32[N]; NaN marks "could not judge" (see `judged`)."""
        return np.array([np.nan if value is None else value for value in self.score(prompts, texts)], dtype=np.float32)

    def as_trl(self) -> Callable[..., list[float | None]]:
        """A TRL reward function `(prompts, completions, **columns) -> list[float | None]` (GRPOTrainer's reward_funcs).

        Prompts and completions may be strings or lists of messages; other columns are accepted and ignored.
        """

        def reward_function(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
            return self.score([_plain_prompt(p) for p in prompts], [_plain_text(c) for c in completions])

        reward_function.__name__ = self.name
        return reward_function

    def _failing_row(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> int | None:
        """The first row on which the reward raises by itself; None where only the batch does. For the message alone."""
        for row in range(len(texts)):
            try:
                self._score(prompts[row : row + 1], texts[row : row + 1])
            except Exception:  # noqa: BLE001  the error itself is already on its way up; this finds its row
                return row
        return None

    def _checked(self, raw: Any, prompts: Sequence[Prompt]) -> list[float | None]:
        values = raw.tolist() if hasattr(raw, "tolist") else raw
        if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != len(prompts):
            given = f"{len(values)} values" if isinstance(values, Sequence) else type(values).__name__
            raise UsageError(
                f"reward {self.name!r} gave {given} for {len(prompts)} rows, the first {_where(0, prompts)}; "
                "it must give one number, or None, a row"
            )
        out: list[float | None] = []
        for row, value in enumerate(values):
            if value is None:
                out.append(None)
                continue
            if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
                value = value.item()
            if not isinstance(value, (int, float)):
                raise UsageError(f"reward {self.name!r} gave {value!r}, which is no number, on {_where(row, prompts)}")
            if not abs(value) <= float(np.finfo(np.float32).max):
                raise UsageError(
                    f"reward {self.name!r} gave {value} on {_where(row, prompts)}; a score must be finite in float32 "
                    "(give None where a row cannot be judged)"
                )
            out.append(float(value))
        return out


def judged(scores: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which rows have a score, bool [N]. `scores` is what `reward(...)` or `reward.score(...)` gave."""
    return ~np.isnan(np.asarray(scores, dtype=np.float64))


def _where(row: int | None, prompts: Sequence[Prompt]) -> str:
    if row is None:
        return f"a batch of {len(prompts)} rows of which each alone works, the first {_where(0, prompts)}"
    text = prompt_text(prompts[row])
    return f"row {row} (prompt {text[:60] + ('...' if len(text) > 60 else '')!r})"


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _plain_text(completion: Any) -> str:
    """A completion as text: itself, or the contents of its messages joined by newlines."""
    if isinstance(completion, str):
        return completion
    return "\n".join(_content(message) for message in completion)


def _plain_prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    return [{"role": message["role"], "content": _content(message)} for message in prompt]


def _content(message: Any) -> str:
    """A message's text: its content, or the text parts of it where it is a list of parts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or [] if part.get("type") == "text")
