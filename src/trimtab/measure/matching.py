r"""Whether a worked answer ends in the right number or expression: what is taken from the text, and what counts as equal.

    number   after the last "####", else in the last \boxed{}, else after the last "answer is", else anywhere: the last
             number. 1,000 = 1000 = 1000.0; $, % and units around a number do not matter; 1/2 = 0.5
    boxed    the last \boxed{}: equal as text (spaces, \left, \dfrac, units in \text{} removed), or as a number, or part by
             part where it is a list, or as an expression: the same value at five points of its variables

Departures: published scorers compare expressions with sympy, whose parser runs its text as Python: not something to do
with the answers of a model. Here an expression is a small tree of numbers, one-letter variables, + - * / ^, square roots
and pi, evaluated by us; what is not of that form is compared as text. A decimal comma is not understood.
"""

from __future__ import annotations

import ast
import cmath
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction

NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s?/\s?\d+(?:\.\d+)?)?|(?<![\w.])[-+]?\.\d+"
)
MARKS = (re.compile(r"####(.*)", re.DOTALL), re.compile(r"answer(?: is|:)(.*)", re.DOTALL | re.IGNORECASE))
POINTS = (0.7310586, 1.3617284, 2.2360680, 0.4142136, 3.3028756)  # of variables; no zero of anything written by hand
TOLERANCE = 1e-9
OPERATORS: Mapping[type[ast.operator], Callable[[complex, complex], complex]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def last_number(text: str) -> Fraction | None:
    """The number that an answer ends in, exactly; None where it has none."""
    text = text.replace("\u2212", "-").replace("\u2013", "-")
    inside = boxed(text)
    if "####" not in text and inside is not None and (found := as_number(inside)) is not None:
        return found
    for mark in MARKS:
        found_after = text[text.lower().rfind("####" if mark is MARKS[0] else "answer") :]
        after = mark.search(found_after)
        if after and (first := NUMBER.search(after[1])):
            return as_number(first[0])
    numbers = NUMBER.findall(text)
    return as_number(numbers[-1]) if numbers else None


def as_number(text: str) -> Fraction | None:
    """A number alone, with what may stand around it ($, %, units, a comma after thousands); None for anything else."""
    text = re.sub(r"\s+[A-Za-z][A-Za-z .]*$", "", text.rstrip())
    plain = re.sub(r"\\(?:text|mathrm|mbox)\{[^}]*\}|\\[!,;$%]|[$%\u20ac\u00a3\s]|\\circ|\^|[{}]", "", text).rstrip(".")
    if not NUMBER.fullmatch(plain):
        return None
    whole, _, under = plain.replace(",", "").partition("/")
    try:
        return Fraction(whole) / Fraction(under or "1")
    except ZeroDivisionError:
        return None


def boxed(text: str) -> str | None:
    r"""What is inside the last \boxed{...} (braces balanced), or after \boxed and a space; None without one."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].partition("box")[2].removeprefix("ed")
    if not rest.startswith("{"):
        word = re.match(r"\s+([^\s$]+)", rest)
        return word[1].rstrip(".") if word else None
    depth = 0
    for at, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:at]
    return None


def same_expression(given: str, right: str) -> bool:
    """Whether two answers are the same, as text, numbers, lists or expressions."""
    first, second = plain_latex(given), plain_latex(right)
    if first == second:
        return bool(first)
    numbers = as_number(first), as_number(second)
    if None not in numbers:
        return numbers[0] == numbers[1]
    parts = _parts(first), _parts(second)
    if max(map(len, parts)) > 1:
        return (
            len(parts[0]) == len(parts[1])
            and _ends(first) == _ends(second)
            and all(same_expression(a, b) for a, b in zip(*parts, strict=True))
        )
    values, others = evaluate(first), evaluate(second)
    return values is not None and others is not None and all(map(_close, values, others))


def plain_latex(text: str) -> str:
    """An expression without spaces, size and font commands, units and other dress."""
    text = text.strip().strip("$").rstrip(".")
    text = re.sub(r"\\(?:left|right|displaystyle|!|,|;|:|quad| )", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\d|[a-z])", r"\\sqrt{\1}", text)
    bare = re.sub(r"\\(?:text|mathrm|mbox)\{[^}]*\}|\^\\circ|\^\{\\circ\}|\\%|%|\\\$", "", text)
    text = bare if bare.strip() else re.sub(r"\\(?:text|mathrm|mbox)\{([^}]*)\}", r"\1", text)
    text = re.sub(r"\s+", "", text)
    return re.sub(r"^[a-zA-Z]=", "", text)


def evaluate(text: str) -> list[complex] | None:
    """The values of an expression at the points; None where it is no expression we know."""
    for _ in range(8):  # fractions within fractions
        text, changed = re.subn(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
        text, roots = re.subn(r"\\sqrt\{([^{}]*)\}", r"((\1)^0.5)", text)
        text, powers = re.subn(r"\^\{([^{}]*)\}", r"^(\1)", text)
        if not changed + roots + powers:
            break
    text = text.replace("\\pi", "P").replace("\\cdot", "*").replace("\\times", "*")
    if not re.fullmatch(r"[\w+\-*/^().]{1,200}", text) or "_" in text or re.search(r"[^\W\d]{2}", text):
        return None
    text = re.sub(r"(?<=[\w)])(?=[A-Za-z(])|(?<=[A-Za-z)])(?=\d)", "*", text).replace("^", "**")
    try:
        tree = ast.parse(text, mode="eval").body
        return [_value(tree, point) for point in range(len(POINTS))]
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, point: int) -> complex:
    match node:
        case ast.Constant(value=int() | float() as value):
            return complex(value)
        case ast.Name(id="P"):
            return cmath.pi
        case ast.Name(id=name):
            return complex(POINTS[(point + ord(name[0])) % len(POINTS)] + ord(name[0]) / 100)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, point)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _value(left, point) ** _value(right, point)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, point), _value(right, point))
    raise ValueError(f"no expression: {ast.dump(node)[:40]}")


def _close(a: complex, b: complex) -> bool:
    return cmath.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _ends(text: str) -> tuple[str, str]:
    return (text[0] if text[:1] in "([" else "", text[-1] if text[-1:] in ")]" else "")


def _parts(text: str) -> list[str]:
    """A list split at the commas that are in no bracket of their own."""
    inner = text[1:-1] if text[:1] in "([" and text[-1:] in ")]" and len(text) > 2 else text
    parts, depth = [""], 0
    for character in inner:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def same_words(given: str, right: str) -> bool:
    """Equal but for case, spaces and punctuation at the ends."""
    first, second = (" ".join(text.lower().split()).strip(" .,;:!?\"'") for text in (given, right))
    return first == second
