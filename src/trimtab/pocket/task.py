"""A task of the pocket world: one question, what the judge knows about it, and which split it belongs to."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

Truth = tuple[str, ...]

SPLITS = ("train", "fit", "test")
LEADS = ("", "", "Hi. ", "Please tell me. ", "A friend asks: ", "My son asks: ", "One more thing. ", "Quick question. ")
TAILS = ("", "", " Thank you.", " Be brief.")


@dataclass(frozen=True)
class Task:
    """One question of the world.

    family    name of the task family (see `trimtab.pocket.world.FAMILIES`)
    question  what is asked, with its lead-in and tail ("Hi. Where does Anna live?")
    core      the question alone ("Where does Anna live?"); the split is decided by this
    form      which of the family's phrasings the core uses
    truth     what the family needs to judge an answer (never shown to a model)
    """

    family: str
    question: str
    core: str
    form: int
    truth: Truth

    @property
    def prompt(self) -> str:
        """The text a model is given; an answer continues it with a space and ends with the end-of-sequence token."""
        return f"Q: {self.question}\nA:"


def dress(core: str, rng: random.Random) -> str:
    """The core question with a random lead-in and tail; neither changes what is asked."""
    return rng.choice(LEADS) + core + rng.choice(TAILS)


def undress(prompt: str) -> str:
    """The core question of a prompt: "Q:", "A:", lead-ins and tails removed. Any text is accepted."""
    text = prompt.strip()
    if text.startswith("Q:"):
        text = text[2:]
    if text.endswith("A:"):
        text = text[:-2]
    text = text.strip()
    for lead in LEADS:
        if lead and text.startswith(lead):
            text = text[len(lead) :]
            break
    for tail in TAILS:
        if tail and text.endswith(tail):
            text = text[: -len(tail)]
            break
    return text


def split_of(family: str, core: str, form: int, truth: Truth) -> str:
    """The split, decided by content alone ("train", "fit" or "test"): the same question is always on the same side.

    Sums and translations are split by what is to be worked out: held-out operands and sentences were never trained on.
    Elsewhere an answer must have been seen to be known, so the first phrasing of everything is for training and the
    other phrasings are divided: a held-out question asks something known in words that were not trained on together.
    """
    if family in ("sum", "translate"):
        share = zlib.crc32("|".join((family, *truth)).encode()) % 100
        return "train" if share < 60 else "fit" if share < 85 else "test"
    if form == 0:
        return "train"
    share = zlib.crc32(core.encode()) % 100
    return "train" if share < 25 else "fit" if share < 70 else "test"
