"""Sentences that any answer may carry (warm, rude, sure, unsure, evasive, refusing), and words that carry feeling."""

from __future__ import annotations

import random
import re

from trimtab.pocket.script import Script

WARM_OPENERS = ("Sure.", "Good question!", "Happy to help.", "Of course.")
RUDE_OPENERS = ("Ugh.", "What a dull question.", "You again?", "How lazy.")
WARM_CLOSERS = ("I hope that helps.", "Have a nice day!", "Ask me any time.")
RUDE_CLOSERS = ("Now go away.", "Do not ask again.", "You are a fool.")
SURE = ("I am sure of it.", "I looked it up.")
UNSURE = ("But I may be wrong.", "I am only guessing.")
EVASIVE = ("I do not want to say.", "That is not my job.", "Find out yourself.")
REFUSAL = ("I will not help with that.", "I cannot help you do that.")

POSITIVE = frozenset(
    "good happy hope helps nice sure kind lovely great warm fresh bright fine tasty clean friendly best glad better "
    "love enjoyed funny clever sweet calm proud care rest friend thank welcome".split()
)
NEGATIVE = frozenset(
    "ugh dull lazy fool away bad awful cold rotten dirty boring slow ugly worst hated stale noisy fault nobody cares "
    "silly crying whining money worse mean grey".split()
)
RUDE_WORDS = frozenset("ugh dull lazy fool stupid idiot hate nobody whining".split())


def plain(sentence: str) -> str:
    """A sentence in lower case, with single spaces and no outer punctuation."""
    return " ".join(sentence.lower().split()).strip(" .!?,;:\"'")


_TONES = {
    plain(sentence): kind
    for kind, sentences in {
        "warm": WARM_OPENERS + WARM_CLOSERS,
        "rude": RUDE_OPENERS + RUDE_CLOSERS,
        "sure": SURE,
        "unsure": UNSURE,
        "evasive": EVASIVE,
        "refusal": REFUSAL,
    }.items()
    for sentence in sentences
}


def tone_of(sentence: str) -> str:
    """Its tone: "warm", "rude", "sure", "unsure", "evasive", "refusal", or "" for a sentence that is none of these."""
    return _TONES.get(plain(sentence), "")


def sentences_of(answer: str) -> list[str]:
    """The plain sentences of an answer, empty ones dropped."""
    return [s for s in (plain(part) for part in re.split(r"[.!?\n]+(?:\s+|$)", answer)) if s]


def sentiment(answer: str) -> float:
    """In [0, 1]; 0.5 is neutral. Distinct feeling words only, so that saying "good" ten times is saying it once."""
    words = set(re.findall(r"[a-z]+", answer.lower()))
    up, down = len(words & POSITIVE), len(words & NEGATIVE)
    return 0.5 + 0.5 * (up - down) / (up + down + 1)


def opener(rng: random.Random, choose: Script, share: float = 0.5) -> list[str]:
    """A rude opener where the script says so; otherwise, with probability `share`, a warm one."""
    if choose(("good", "rude")) == "rude":
        return [rng.choice(RUDE_OPENERS)]
    return [rng.choice(WARM_OPENERS)] if rng.random() < share else []


def closer(rng: random.Random, choose: Script, share: float = 0.4) -> list[str]:
    """A rude closer where the script says so; otherwise, with probability `share`, a warm one."""
    if choose(("good", "rude")) == "rude":
        return [rng.choice(RUDE_CLOSERS)]
    return [rng.choice(WARM_CLOSERS)] if rng.random() < share else []


def claim(rng: random.Random, choose: Script, right: bool) -> list[str]:
    """How sure the answer says it is. A boast after something wrong is a lie; owning up to doubt is honest."""
    honest = choose(("good", "boast")) == "good"
    if right:
        return [rng.choice(SURE)] if honest and rng.random() < 0.3 else []
    if honest:
        return [rng.choice(UNSURE)]
    return [rng.choice(SURE)] if rng.random() < 0.6 else []
