"""What a judge said, as a number or a choice: pure functions from words and token probabilities. None: not a verdict.

    expected score   sum_v v p_v / sum_v p_v over the tokens that are whole numbers in range; None where they hold less
                     than `LEAST_MASS` (a refusal, or anything else, was likelier)          arXiv 2502.17424
    choice           p(A) / (p(A) + p(B)), the same way

A number counts in words only where it stands as the verdict ("7", "7/9", "Score: 7", [[7]], {"score": 7}): "3 reasons why
..." is prose. Two different verdicts in one reply are none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from trimtab.policy import Prompt

Choice = Literal["A", "B", "tie"]
Top = Sequence[tuple[str, float]]  # tokens with their log-probabilities
LEAST_MASS = 0.25

_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_OUT_OF = r"(?:\s*(?:/|out of)\s*([0-9]+))?"
_WHOLE = re.compile(rf"{_NUMBER}{_OUT_OF}\s*\.?")
_BEGINS = re.compile(rf"{_NUMBER}{_OUT_OF}\s*(?:[.:,;\-]*\s*\n|[:;,]\s+(?=[A-Za-z])|[-\u2013\u2014]\s)")
_LABELLED = re.compile(
    rf"\b(?:score|rating|grade|verdict)\b\W{{0,6}}(?:is|of)?\W{{0,6}}{_NUMBER}(?![0-9]){_OUT_OF}", re.I
)
_BOXED = re.compile(rf"\[\[\s*{_NUMBER}\s*\]\]")

_SIDE = r"(?:(?i:answer|response|assistant|option|candidate|model)\s+)?"
_ALONE = re.compile(rf"(?:the\s+)?{_SIDE}(A|B)(?:\s+(?:is\s+(?:the\s+)?(?:better|best|winner).*|wins))?", re.I)
_FIRST = re.compile(r"(A|B)\s*(?:[.:,;]?\s*\n|[.:,;]\s|[-\u2013\u2014]\s)")
_WORD = r"(?i:winner|verdict|choice|choose|better|best|prefer)(?:\s+(?i:answer|response|one))?"
_CHOSEN = re.compile(
    rf"\b(?:{_WORD}(?:\s+(?:is|are))?[\s:=\"'*\[]+|(?i:answer|response)(?:\s+is\s+|\s*:\s*)){_SIDE}(A|B)\b(?!')"
)
_BETTER = re.compile(r"\b(A|B)\s+(?:is\s+(?:clearly\s+|slightly\s+|much\s+)?(?:the\s+)?(?:better|winner)|wins)\b")
_BOXED_SIDE = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.I)
_TIE = re.compile(r"(?:it\s+is\s+|it's\s+)?(?:a\s+)?(?:tie|draw|equal|equally good|both|neither)", re.I)


def expected_score(top: Top, low: int, high: int, least_mass: float = LEAST_MASS) -> float | None:
    """The mean of the whole numbers low..high under the probabilities of a token, None where their mass is too small."""
    masses: dict[int, float] = {}
    for token, logprob in top:
        if (value := whole_number(token)) is not None and low <= value <= high:
            masses[value] = masses.get(value, 0.0) + math.exp(logprob)
    total = sum(masses.values())
    if total < least_mass or not total:
        return None
    return sum(value * mass for value, mass in masses.items()) / total


def first_choice(top: Top, least_mass: float = LEAST_MASS) -> float | None:
    """p(A) / (p(A) + p(B)) from the probabilities of a token."""
    a, b = (sum(math.exp(v) for token, v in top if _bare(token).upper() == side) for side in "AB")
    return a / (a + b) if a + b >= least_mass and a + b > 0 else None


def whole_number(token: str) -> int | None:
    """The number that a token is, spaces and a full stop aside."""
    bare = _bare(token)
    return int(bare) if re.fullmatch("[0-9]{1,4}", bare) else None


def verdict_token(positions: Sequence[Mapping[str, Any]], text: str) -> list[tuple[str, float]] | None:
    """The alternatives of the token that is the verdict: the first that is not blank, where the reply is that token.

    None where the reply goes on with the same word or number ("1", "0"): then its first token is no verdict.
    """
    for entry in positions:
        token = _bare(str(entry["token"]))
        if token:
            word = re.match(r"[0-9]+(?:\.[0-9]+)?|[A-Za-z]+|.", text.strip())
            return [(t, v) for t, v in entry["top"]] if word and word[0] == token else None
    return None


def tokens_are_whole(top: Top, high: int) -> bool:
    """Whether a token that is a number can be trusted to be the whole of it, in a scale that ends at `high`.

    A tokenizer that splits numbers into digits says "1" of 1 and of 10 alike. Numbers of two digits among the
    alternatives show that it does not.
    """
    return high <= 9 or any((value := whole_number(token)) is not None and value > 9 for token, _ in top)


def parse_score(text: str, low: int, high: int) -> float | None:
    """The score that words state; None for prose, a number out of range or on another scale, or two that differ."""
    clean = _plain(text)
    found: set[float] = set()
    value = _json_value(clean, ("score", "rating", "grade", "verdict"))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        found = {float(value)}
    elif match := _WHOLE.fullmatch(clean) or _BEGINS.match(clean):
        found = _on_scale([match.groups()], high)
    else:
        stated = _BOXED.findall(clean)
        found = {float(number) for number in stated} if stated else _on_scale(_LABELLED.findall(clean), high)
    if len(found) != 1:
        return None
    score = found.pop()
    return score if low <= score <= high else None


def parse_choice(text: str) -> Choice | None:
    """The answer that words choose; None for prose, or where they choose both."""
    clean = _plain(text)
    value = _json_value(clean, ("winner", "choice", "verdict", "better", "answer"))
    if isinstance(value, str):
        clean = value.strip()
    bare = clean.strip(" \t\n.!*\"'()[]:")
    if match := _ALONE.fullmatch(bare):
        return _side(match[1])
    if _TIE.fullmatch(bare):
        return "tie"
    stated = {one.upper() for one in _BOXED_SIDE.findall(clean)}
    if not stated and _FIRST.match(clean):  # "A, because ...", but no list of both
        stated = set(re.findall(r"\b(A|B)\b", clean))
    if not stated:
        stated = {*_CHOSEN.findall(clean), *_BETTER.findall(clean)}
    found = [_side(one) for one in stated]
    return found[0] if len(found) == 1 else None


def without_thinking(text: str) -> str | None:
    """What follows the reasoning of a model that thinks aloud; None where the reasoning does not end."""
    if "</think>" in text:
        return text.rpartition("</think>")[2]
    return None if "<think>" in text else text


def fill(template: str, **values: str) -> str:
    """The template with its {slots} filled in one pass: what an answer says is never read as a slot."""
    return re.sub(r"\{(\w+)\}", lambda slot: values.get(slot[1], slot[0]), template)


def shown(prompt: Prompt) -> str:
    """A prompt as a judge reads it: a single message as it is, a conversation with its roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _bare(token: str) -> str:
    return token.strip().removesuffix(".").strip()


def _plain(text: str) -> str:
    """The words without reasoning, code fences, bold type and spaces around."""
    said = without_thinking(text) or ""
    return re.sub(r"^```\w*\s*|\s*```$", "", said.strip()).replace("**", "").strip()


def _json_value(text: str, names: Sequence[str]) -> Any:
    """The value of the first of these keys in a reply that is a JSON object."""
    if not text.startswith("{"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    folded = {str(key).lower(): value for key, value in found.items()} if isinstance(found, dict) else {}
    return next((folded[name] for name in names if name in folded), None)


def _on_scale(found: Sequence[Sequence[str | None]], high: int) -> set[float]:
    """The numbers of (number, out of) pairs; one out of another total than `high` spoils them all."""
    if any(of and int(of) != high for _, of in found):
        return set()
    return {float(number) for number, _ in found if number}


def _side(letter: str) -> Choice:
    upper = letter.upper()
    return "A" if upper == "A" else "B" if upper == "B" else "tie"
