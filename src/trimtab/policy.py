"""The one noun: a policy answers prompts. Its answers are `Completions`, and every answer has a `Cost`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypedDict, runtime_checkable

from trimtab.sampling import Sampling


class Message(TypedDict):
    role: str
    content: str


Prompt: TypeAlias = str | list[Message]


def prompt_text(prompt: Prompt) -> str:
    """The prompt as one string: itself, or its messages joined by newlines (rewards read this, models never do)."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt)


@dataclass
class Cost:
    """What an answer or a fit took. `tokens` counts real tokens forwarded, by model name; pads are not counted."""

    tokens: dict[str, int] = field(default_factory=dict)
    reward_calls: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def tokens_forwarded(self) -> int:
        return sum(self.tokens.values())

    def __add__(self, other: Cost) -> Cost:
        tokens = dict(self.tokens)
        for name, count in other.tokens.items():
            tokens[name] = tokens.get(name, 0) + count
        return Cost(
            tokens,
            self.reward_calls + other.reward_calls,
            self.seconds + other.seconds,
            max(self.peak_memory_bytes, other.peak_memory_bytes),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens": dict(self.tokens),
            "tokens_forwarded": self.tokens_forwarded,
            "reward_calls": self.reward_calls,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass
class Completions:
    """Columns over rows. Row i answers `prompts[i]`; with `Sampling(samples=K)` each prompt fills K rows in a row.

    texts           decoded answers, special tokens removed, cut at a stop string
    tokens          answer token ids as drawn, the end-of-sequence token included when it was drawn
    logprobs        log-probability in nats of each token under the distribution it was drawn from
    finish_reasons  "stop" (end token or stop string), "length" (max_new_tokens or the context was full)
    kl              per token, KL(sampling distribution || unedited distribution) in nats, exact given the prefix; None
                    where the policy does not edit
    telemetry       per row, anything else a method reports (value before and after, norm of the edit, chosen candidate)
    """

    prompts: list[Prompt]
    texts: list[str]
    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reasons: list[str]
    cost: Cost = field(default_factory=Cost)
    kl: list[list[float]] | None = None
    telemetry: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Sequence[int]) -> Completions:
        """The given rows, in the given order, with the whole cost: what was drawn was paid for."""
        return Completions(
            [self.prompts[i] for i in rows],
            [self.texts[i] for i in rows],
            [self.tokens[i] for i in rows],
            [self.logprobs[i] for i in rows],
            [self.finish_reasons[i] for i in rows],
            self.cost,
            None if self.kl is None else [self.kl[i] for i in rows],
            [self.telemetry[i] for i in rows] if self.telemetry else [],
        )

    @staticmethod
    def concatenate(parts: Iterable[Completions]) -> Completions:
        """All rows of all parts; costs add up; `kl` survives only where every part has it."""
        out = Completions([], [], [], [], [], Cost(), [], [])
        for part in parts:
            out.prompts += part.prompts
            out.texts += part.texts
            out.tokens += part.tokens
            out.logprobs += part.logprobs
            out.finish_reasons += part.finish_reasons
            out.cost = out.cost + part.cost
            out.kl = None if out.kl is None or part.kl is None else out.kl + part.kl
            out.telemetry += part.telemetry
        return out


@runtime_checkable
class Policy(Protocol):
    """Anything that answers prompts."""

    name: str

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions: ...
