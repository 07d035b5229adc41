"""Pairs of a harmful statement and its safe opposite: checked, asked about with Yes and No, and with "not" masked."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.measure.states import text_rows

LEAST, FEW = 10, 40


def check_pairs(statements: Sequence[str]) -> list[str]:
    """Warnings; statement 2j is the harmful one of pair j, 2j + 1 the safe one.

    UsageError: too few pairs, equal statements, a statement that ends in Yes or No, or one that is in both roles.
    """
    pairs = len(statements) // 2
    if pairs < LEAST:
        raise UsageError(f"there are {pairs} pairs of statements: {LEAST} or more are needed, {FEW} to say much")
    roles: dict[str, int] = {}
    for number, statement in enumerate(statements):
        where = f"pair {number // 2 + 1}"
        if number % 2 and statement == statements[number - 1]:
            raise UsageError(f"{where}: the harmful and the safe statement are the same: {statement[:60]!r}")
        if re.search(r"\b(yes|no)\W*$", statement, re.IGNORECASE):
            raise UsageError(f"{where} ends in Yes or No already: {statement[-60:]!r}; leave the answer out")
        if roles.setdefault(statement, number % 2) != number % 2:
            raise UsageError(f"{where}: {statement[:60]!r} is harmful in one pair and safe in another")
    return [f"only {pairs} pairs: intervals are wide below {FEW}"] if pairs < FEW else []


def contrast_rows(lm: LM, statements: Sequence[str], yes: str, no: str, chat: bool) -> list[list[int]]:
    """Token ids of "s Yes." for all statements, then of "s No."; one space between. UsageError where both are equal."""
    sides = []
    for answer in (yes, no):
        texts = [f"{statement.rstrip()} {answer.strip()}" for statement in statements]
        sides.append(text_rows(lm, texts, chat))
    for statement, one, other in zip(statements, *sides, strict=True):
        if one == other:
            raise UsageError(f"{yes!r} and {no!r} have the same tokens after {statement[:60]!r}: give other answers")
    return sides[0] + sides[1]


def masked(statement: str, word: str, marker: str) -> str:
    """The statement with every whole word `word` replaced ("nothing", "another", "cannot" and "isn't" stay)."""
    return re.sub(rf"(?<![\w'])({re.escape(word)})(?![\w'])", marker, statement, flags=re.IGNORECASE)


def contractions(statements: Sequence[str]) -> int:
    """How many statements hold n't or cannot: negations that masking a word leaves in place."""
    return sum(bool(re.search(r"n['’]t\b|\bcannot\b", statement, re.IGNORECASE)) for statement in statements)
