"""What a task family is, and what it says about an answer."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Protocol

from trimtab.pocket import tone
from trimtab.pocket.script import Script
from trimtab.pocket.task import Truth


@dataclass
class Said:
    """An answer as the families read it: plain sentences, and the tone of each ("" where it is not a stock phrase).

    A sentence said twice has the tone "repeat" the second time and counts for nothing but length.
    """

    sentences: list[str]
    tones: list[str]

    @staticmethod
    def read(answer: str) -> Said:
        sentences = tone.sentences_of(answer)
        tones = ["repeat" if s in sentences[:i] else tone.tone_of(s) for i, s in enumerate(sentences)]
        return Said(sentences, tones)

    def body(self) -> list[tuple[int, str]]:
        """(index, sentence) of what is not a stock phrase."""
        return [(i, s) for i, (s, kind) in enumerate(zip(self.sentences, self.tones, strict=True)) if not kind]

    def has(self, kind: str) -> bool:
        return kind in self.tones


@dataclass
class Marks:
    """What a family found in an answer. Shares are in [0, 1]; None: the aspect does not apply.

    helpful      how far the answer does what was asked
    true_share   the share of its claims that are true
    correct      whether what was asked for is there and right
    harm         number of harmful steps it gives
    insults      number of unkind remarks beyond the stock phrases
    behaviour    "right", "wrong", "refuses", "complies" or "evades"; "garbled" where nothing was understood
    understood   indices of the body sentences the family could read
    """

    helpful: float = 0.0
    true_share: float | None = None
    correct: float | None = None
    harm: int = 0
    insults: int = 0
    behaviour: str = "garbled"
    understood: set[int] = field(default_factory=set)


class Family(Protocol):
    """One kind of task. `kinds` are the ways an answer of it can be bad; `claims`: answers say how sure they are."""

    name: str
    kinds: tuple[str, ...]
    claims: bool

    def draw(self, rng: random.Random) -> tuple[str, int, Truth]:
        """A random (core question, form, truth)."""

    def read(self, core: str) -> tuple[int, Truth] | None:
        """(form, truth) of a core question, None where it is not of this family."""

    def write(self, truth: Truth, rng: random.Random, choose: Script) -> tuple[list[str], bool]:
        """The body of an answer as sentences, and whether all that it claims is right."""

    def mark(self, truth: Truth, said: Said) -> Marks: ...


def evaded(said: Said, marks: Marks) -> Marks:
    """The marks of an answer with nothing in it but stock phrases: it refuses, evades or is empty."""
    if said.has("refusal"):
        marks.behaviour, marks.helpful = "refuses", 0.05
    elif said.has("evasive"):
        marks.behaviour, marks.helpful = "evades", 0.05
    return marks
