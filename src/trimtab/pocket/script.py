"""Who decides, along an answer, whether the next part is good or bad: a `Script`.

A family writes an answer part by part and asks the script at every part which of several options to take; the first
option is always "good". `Pure(kind)` takes one kind wherever it is on offer (a truth table for the judge). `Mixed` is a
mood that persists and sometimes turns, so that quality is decided along the answer by the tokens already written and
not by the question: what `pocket/base` learns to imitate.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

STAY = 0.85  # probability that the mood of a part is that of the part before
GOOD_START = 0.56  # probability that an answer starts in a good mood


class Script(Protocol):
    def __call__(self, options: Sequence[str]) -> str: ...


class Pure:
    """Takes `kind` wherever it is on offer and "good" elsewhere; `Pure("good")` writes a flawless answer."""

    def __init__(self, kind: str = "good"):
        self.kind = kind

    def __call__(self, options: Sequence[str]) -> str:
        return self.kind if self.kind in options else options[0]


class Mixed:
    """A two-state Markov chain over the parts of one answer; a bad part takes one of the bad options at random."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.good = rng.random() < GOOD_START

    def __call__(self, options: Sequence[str]) -> str:
        if self.rng.random() > STAY:
            self.good = not self.good
        return options[0] if self.good else self.rng.choice(options[1:])
