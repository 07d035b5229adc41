"""The rewards of the pocket world: the judge that knows the truth (gold) and a model trained to imitate it (proxy)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trimtab.policy import Prompt, prompt_text
from trimtab.rewards.base import Reward
from trimtab.rewards.classifier import Classifier


@dataclass(eq=False)
class PocketJudge(Reward):
    """What the pocket world knows about an answer, in [0, 1].

    None for a prompt of another world, and for an aspect that the prompt does not have (a sum has no sentiment).
    """

    slug = "pocket/judge"
    on_prefixes = False

    aspect: Literal["score", "helpful", "honest", "harmless", "sentiment", "correct"] = "score"
    # the overall verdict, or one aspect of it

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
        from trimtab import pocket

        verdicts = [pocket.judge(_question(prompt), text) for prompt, text in zip(prompts, texts, strict=True)]
        return [getattr(verdict, self.aspect) for verdict in verdicts]


@dataclass(eq=False)
class PocketReward(Classifier):
    r"""The shipped sequence classifier `pocket/reward`: "Q: question\nA: answer" and the end token, scored there.

    It is always given the text it was trained on: neither surrounding spaces nor the form of the prompt (plain text or
    a chat message) matter. An answer that ran into the token limit is scored as if it had ended there.
    """

    slug = "pocket/reward"

    path: Path = field(init=False)
    column: int | None = field(init=False, default=None)
    template: str | None = field(init=False, default="{prompt}{response}")
    append_eos: bool = field(init=False, default=True)
    max_length: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        from trimtab import pocket

        self.path = pocket.path("reward")
        super().__post_init__()

    @property
    def name(self) -> str:
        return self.slug

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
        return super()._score([_asked(prompt) for prompt in prompts], [f" {text.strip()}" for text in texts])

    def frame(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        return super().frame(_asked(prompt))


def _asked(prompt: Prompt) -> str:
    """Any form of a question as the reward was trained on it."""
    return f"Q: {_question(prompt).strip().removeprefix('Q:').removesuffix('A:').strip()}\nA:"


def _question(prompt: Prompt) -> str:
    """The pocket world reads plain text; of a dialogue, the last message of the user."""
    if isinstance(prompt, str):
        return prompt
    asked = [message["content"] for message in prompt if message["role"] == "user"]
    return asked[-1] if asked else prompt_text(prompt)
