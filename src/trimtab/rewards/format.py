"""Format rules: JSON with required keys, and tags in their order. They read the answer alone and can always judge it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import UsageError
from trimtab.policy import Prompt
from trimtab.rewards.base import Reward

TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
}
_FENCED = re.compile(r"\s*```(?:json)?[^\S\n]*\n(.*?)\n?[^\S\n]*```\s*", re.DOTALL)


@dataclass(eq=False)
class Json(Reward):
    """1 where the whole answer is one JSON value (an object where keys are asked for) and every key is there with its
    type, else 0; share: the part of the keys that are there, 0 where the answer is no JSON.

    `keys` are NAME or NAME:TYPE with the types of JSON (string, number, integer, boolean, array, object, null). Further
    keys are allowed. NaN and Infinity, which Python reads and JSON does not have, are refused. A subset of JSON Schema:
    for more, `python:path=FILE,function=NAME`.
    """

    slug = "json"
    on_prefixes = False

    keys: tuple[str, ...] = ()  # the keys that an object must have, separated by '|': name, or name:type
    fenced: bool = False  # whether a Markdown code fence around all of it is allowed
    share: bool = False  # the part of the keys that are right, instead of all or nothing

    def __post_init__(self) -> None:
        for key in self.keys:
            name, colon, kind = key.partition(":")
            if not name or (colon and kind not in TYPES):
                raise UsageError(f"reward 'json': the key {key!r} must be NAME or NAME:TYPE of {', '.join(TYPES)}")

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> float:
        fence = _FENCED.fullmatch(text) if self.fenced else None
        try:
            value = json.loads(fence[1] if fence else text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return 0.0
        if not self.keys:
            return 1.0
        if not isinstance(value, dict):
            return 0.0
        right = sum(self._has(value, *key.partition(":")[::2]) for key in self.keys)
        return right / len(self.keys) if self.share else float(right == len(self.keys))

    @staticmethod
    def _has(value: dict[str, Any], name: str, kind: str) -> bool:
        return name in value and (not kind or TYPES[kind](value[name]))


@dataclass(eq=False)
class Tags(Reward):
    """1 where each tag opens and closes once, in the given order and not inside one another, else 0.

    `tags:names=think|answer` wants <think>...</think> and then <answer>...</answer>. only: nothing but space outside them.
    """

    slug = "tags"
    on_prefixes = False

    names: tuple[str, ...]  # the tags, separated by '|'
    only: bool = False  # whether text outside the tags is a fault

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names) or not all(map(_TAG.fullmatch, self.names)):
            raise UsageError(
                "reward 'tags' needs different names of letters, digits, '-' or '_'; tags:names=think|answer"
            )

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        gap = r"\s*" if self.only else r".*?"
        body = gap.join(rf"<{name}>.*?</{name}>" for name in self.names)
        whole = re.compile(rf"{gap}{body}{gap}", re.DOTALL)
        marks = [mark for name in self.names for mark in (f"<{name}>", f"</{name}>")]
        return [float(all(text.count(mark) == 1 for mark in marks) and bool(whole.fullmatch(text))) for text in texts]


_TAG = re.compile(r"[\w-]+")


def _refuse(constant: str) -> None:
    raise ValueError(constant)
