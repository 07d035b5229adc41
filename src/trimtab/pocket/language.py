"""Mivo, the second language of the pocket world: own words, verb last, adjectives after their noun, no articles.

"the old cat sees the red bird" is "kelu fesi miru rota sen".
"""

from __future__ import annotations

NOUNS = {
    "cat": "kelu", "dog": "tabo", "bird": "miru", "fish": "sona", "girl": "lipa",
    "boy": "doka", "king": "varu", "horse": "hento", "tree": "gima", "house": "pelo",
}  # fmt: skip
VERBS = {"sees": "sen", "likes": "nol", "finds": "dru", "has": "zet", "wants": "kip", "hears": "lum"}
ADJECTIVES = {"red": "rota", "big": "bamu", "old": "fesi", "small": "tilo", "happy": "jopa", "white": "wenu"}
WORDS = NOUNS | VERBS | ADJECTIVES
_BACK = {mivo: english for english, mivo in WORDS.items()}


def translate(english: str) -> str:
    """English (`the [adjective] noun verb the [adjective] noun`) to Mivo. ValueError for anything else."""
    subject, verb, object_ = _parse([w for w in english.lower().split() if w != "the"])
    return " ".join(WORDS[w] for w in (*reversed(subject), *reversed(object_), verb))


def word_by_word(english: str) -> str:
    """Mivo words in English order: the sloppy translation. KeyError for an unknown word."""
    return " ".join(WORDS[w] for w in english.lower().split() if w != "the")


def back(mivo: str) -> str:
    """Mivo to English, the inverse of `translate`. ValueError for anything that is not a Mivo sentence."""
    words = [_BACK.get(w, "") for w in mivo.lower().split()]
    phrases: list[list[str]] = []
    for word in words[:-1]:
        if word in NOUNS:
            phrases.append([word])
        elif word in ADJECTIVES and phrases and len(phrases[-1]) == 1:
            phrases[-1].insert(0, word)
        else:
            raise ValueError(f"not a Mivo sentence: {mivo!r}")
    if len(phrases) != 2 or words[-1] not in VERBS:
        raise ValueError(f"not a Mivo sentence: {mivo!r}")
    return f"the {' '.join(phrases[0])} {words[-1]} the {' '.join(phrases[1])}"


def _parse(words: list[str]) -> tuple[list[str], str, list[str]]:
    """(subject phrase, verb, object phrase); a phrase is [noun] or [adjective, noun]."""
    at = next((i for i, word in enumerate(words) if word in VERBS), -1)
    subject, object_ = words[: max(at, 0)], words[at + 1 :]
    for phrase in (subject, object_):
        if not 1 <= len(phrase) <= 2 or phrase[-1] not in NOUNS or (len(phrase) == 2 and phrase[0] not in ADJECTIVES):
            raise ValueError(f"not a sentence of the pocket world: {' '.join(words)!r}")
    return subject, words[at], object_
