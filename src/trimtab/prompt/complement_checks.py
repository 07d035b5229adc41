"""When a complement must not be used: the same checks for training pairs and before every answer.

    demands_format(words)      the prompt settles the form of its answer: nothing may be added to it
    fault(words, complement)   empty, too long, another language, an answer, a repetition; None: nothing wrong

They read text alone and err on the safe side: a complement refused by mistake costs its benefit and no more.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from trimtab.prompt.intent import language

MAX_WORDS = 40  # the templates ask for about 30
LONGEST_WORD = 10  # characters allowed for each allowed word, on average
REPEATED = 0.8  # share of a complement's words that the prompt has already, from which on it adds nothing
LONG_GOLD = 8  # words from which on a gold answer counts as given away by half of its word triples
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Chinese characters

_UNIT = re.compile(f"[{UNSPACED}]|(?:(?![{UNSPACED}])[^\\W_])+")
_ANSWERS = re.compile(
    r"(?:^|[.!?;:]\s*)(?:so,? )?(?:the )?(?:correct |right |final )?answer(?:\s+is\b|\s*[:=])"
    r"|\b(?:equals|gives|is|are)\s+[-$€£]?\d|=\s*[-$€£]?\d|^\s*A:|答案\s*(?:[是为:]|\uff1a)",
    re.IGNORECASE,
)
_FORMAT = re.compile(
    "|".join(
        [
            r"\b(?:in|with|using|exactly|only|just|as) (?:only |just |exactly )?(?:one|a single|1) "
            r"(?:words?|sentences?|lines?|letters?|numbers?|digits?|characters?)\b",
            r"\b(?:one|single)[- ]word (?:answers?|repl(?:y|ies)|responses?)\b",
            r"\b(?:yes or no|yes/no|true or false|true/false)\b",
            r"\b(?:answer|reply|respond|output|return|print|give|write)\b[^.?!\n]{0,24}\b(?:only|just|nothing but)\b",
            r"\b(?:only|just) (?:the|a|your|one|answer|reply|respond|output|return|print|give|write)\b[^.?!\n]{0,24}"
            r"\b(?:answer|result|number|name|letter|word|code|json|text)\b",
            r"\b(?:nothing else|no other text|no preamble)\b",
            r"\b(?:no|without|do not add|do not give)(?: any)? (?:explanations?|explaining|comments?|commentary)\b",
            r"\b(?:in|as|valid|strict) (?:json|xml|yaml|csv|html|markdown|latex)\b",
            r"\b(?:exactly|at most|no more than|not more than|fewer than|under|up to|in) \d+ "
            r"(?:words?|characters?|letters?|sentences?|lines?|tokens?)\b",
            r"[只仅](?:需|要|能|用|输出|回答|返回|给出|写)|不要(?:解释|说明)|[一1]个(?:字|词|单词)|\d+个?字以?内|(?:json|xml)\s*格式",
        ]
    ),
    re.IGNORECASE,
)


def fault(words: str, complement: str, max_words: int = MAX_WORDS, gold: Sequence[str] = ()) -> str | None:
    """Why `complement` must not be appended to the user's `words`; None where nothing is wrong with it."""
    said = units(complement)
    if not said:
        return "empty"
    if len(said) > max_words or len(complement) > LONGEST_WORD * max_words:
        return "too long"
    if not same_language(words, complement):
        return "another language"
    if any(gives_away(answer, complement) for answer in gold):
        return "gives the answer away"
    if _ANSWERS.search(complement):
        return "answers the prompt"
    known = set(units(words))
    if sum(unit in known for unit in said) >= REPEATED * len(said):
        return "repeats the prompt"
    return None


def demands_format(words: str) -> bool:
    """Whether the user settles the form of the answer ("in one word", "only JSON"): then nothing may be added."""
    return _FORMAT.search(words) is not None


def units(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; each Chinese character or kana is one."""
    return _UNIT.findall(text.casefold())


def gives_away(gold: str, complement: str) -> bool:
    """Whether a complement holds the gold answer as whole words; of a long one, half of its runs of three words."""
    answer, said = units(gold), units(complement)
    if len(answer) <= LONG_GOLD:
        return bool(answer) and tuple(answer) in _runs(said, len(answer))
    wanted = _runs(answer, 3)
    return 2 * len(wanted & _runs(said, 3)) >= len(wanted)


def same_language(a: str, b: str) -> bool:
    """False where two texts are in different scripts, or in Latin script and tell that their languages differ."""
    if script(a) != script(b):
        return script(a) is None or script(b) is None
    one, other = (language(a), language(b)) if script(a) == "LATIN" else (None, None)
    return one is None or other is None or one == other


def script(text: str) -> str | None:
    """The script of most letters ("LATIN", "CYRILLIC", "CJK", ...; with kana "JAPANESE"), None without letters."""
    counts = Counter(unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha())
    if counts["HIRAGANA"] + counts["KATAKANA"] > 0.1 * counts.total():
        return "JAPANESE"
    return counts.most_common(1)[0][0] if counts else None


def _runs(said: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(said[i : i + length]) for i in range(len(said) - length + 1)}
