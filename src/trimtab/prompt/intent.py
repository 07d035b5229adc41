"""The intent guard: what a rewrite of an instruction must not lose. Ours; the paper has none.

A rewrite is rejected, and the reason named, if it drops a number, quoted text, code, an address or a name of the original,
or is in another language. Names are capitalised words that do not begin a sentence. The language is told by script and,
among a few languages in Latin script, by little words; where either text is too short to tell, nothing is held against it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

LONG = 8  # times the length of the original
_CODE = re.compile(r"```.*?```|`[^`\n]+`", re.S)
_URL = re.compile(r"(?:https?://|www\.)[^\s<>\"')\]]*[^\s<>\"')\].,;:!?]")
_QUOTED = re.compile(r"\"[^\"\n]+\"|“[^”\n]+”|«[^»\n]+»|(?<!\w)'[^'\n]+'(?!\w)")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_LITTLE = {
    "English": "the of and to is what how do does in for with that it my your you are this",
    "German": "der die das und ist ein eine nicht wie was ich du mit für den dem zu von bitte",
    "French": "le la les des est et un une que qui dans pour avec je vous ce pas sur du",
    "Spanish": "el los las es y un una que en por para con mi su se lo qué cómo del",
}
LITTLE = {language: frozenset(words.split()) for language, words in _LITTLE.items()}


def broken_intent(original: str, rewrite: str) -> str | None:
    """Why a rewrite is rejected ("number", "quote", "code", "url", "name", "language", "empty"), or None."""
    if not rewrite.strip():
        return "empty"
    for reason, pattern in (("code", _CODE), ("url", _URL), ("quote", _QUOTED)):
        if any(part not in rewrite for part in pattern.findall(original)):
            return reason
    if Counter(_NUMBER.findall(original)) - Counter(_NUMBER.findall(rewrite)):
        return "number"
    kept = set(_WORD.findall(rewrite))
    if any(name not in kept for name in names(original)):
        return "name"
    before, after = language(original), language(rewrite)
    return "language" if before and after and before != after else None


def names(text: str) -> set[str]:
    """Capitalised words (other than "I" and its forms) that do not begin a sentence."""
    found = set()
    for sentence in re.split(r"[.!?:;\n]+\s*|(?<!\w)[\"'“«(]", text):
        words = _WORD.findall(sentence)
        found |= {word for word in words[1:] if word[0].isupper() and not re.match(r"I(?:['’]|$)", word)}
    return found


def language(text: str) -> str | None:
    """A script ("CYRILLIC", "HANGUL", ...) or a language in Latin script; None where the text does not tell."""
    scripts = Counter(unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha())
    if not scripts:
        return None
    script = scripts.most_common(1)[0][0]
    if script != "LATIN":
        return script
    words = [word.lower() for word in _WORD.findall(text)]
    hits = sorted(((sum(word in little for word in words), name) for name, little in LITTLE.items()), reverse=True)
    return hits[0][1] if hits[0][0] >= 2 and hits[0][0] >= 2 * hits[1][0] else None


def answered(original: str, rewrite: str, answers: Sequence[str]) -> bool:
    """Whether a "rewrite" looks like the answer: nearly all the words it adds (4 or more) are words of an answer."""
    added = {word.lower() for word in _WORD.findall(rewrite)} - {word.lower() for word in _WORD.findall(original)}
    if len(added) < 4:
        return False
    return any(len(added & {w.lower() for w in _WORD.findall(text)}) >= 0.8 * len(added) for text in answers)
