"""What is taken from a worked answer, and what counts as equal to the right one."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from trimtab.measure.adapters import read_items
from trimtab.measure.matching import as_number, boxed, evaluate, last_number, same_expression, same_words


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 18.", "18"),
        ("2 + 3 = 5, so she pays $1,234.50.", "1234.5"),
        ("3-4=-1", "-1"),
        ("it is \u22122 degrees", "-2"),
        ("6 * 7 = 42\n#### 42\nThere are 9 lines.", "42"),
        ("#### 1,000", "1000"),
        ("####7", "7"),
        ("so \\boxed{3/4} of the 8", "0.75"),
        ("The answer is 10 apples, not 12", "10"),
        ("about 50% of 4", "4"),
        ("the 3rd of May 2020", "2020"),
        ("step 1: 2. Then .5", "0.5"),
    ],
)
def test_last_number(text: str, number: str) -> None:
    assert last_number(text) == Fraction(number)


@pytest.mark.parametrize("text", ["", "none", "the answer is ten", "1/0"])
def test_no_number(text: str) -> None:
    assert last_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"), [("$1,000", 1000), ("50%", 50), ("10 apples", 10), ("7.00", 7), ("2x", None), ("1,00", None)]
)
def test_a_number_alone(text: str, number: int | None) -> None:
    assert as_number(text) == number


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("so \\boxed{\\frac{1}{2}} is it", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\fbox{3}", "3"),
        ("$\\boxed 4$", "4"),
        ("\\boxed{5", None),
        ("5", None),
    ],
)
def test_boxed(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


SAME = [
    ("\\frac12", "0.5"), ("\\dfrac{1}{2}", "\\frac{1}{2}"), ("1,000", "1000"), ("10\\text{ cm}", "10"),
    ("90^\\circ", "90"), ("x=5", "5"), ("(1, 2)", "(1,2)"), ("\\left(1,\\frac12\\right)", "(1,0.5)"),
    ("x+1", "1+x"), ("2x(x+1)", "2x^2+2x"), ("2\\sqrt{3}", "\\sqrt{12}"), ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"),
    ("\\pi/2", "0.5\\pi"), ("\\text{Yes}", "Yes"), ("x^{2}", "x\\cdot x"), ("\\frac{x^2-1}{x-1}", "x+1"),
]  # fmt: skip
OTHER = [
    ("1", "2"), ("x", "y"), ("-x", "x"), ("(1,2)", "[1,2)"), ("(1,2)", "(2,1)"), ("3,4", "3"), ("", "0"), ("x^2", "2x"),
    ("9^9^9^9^9", "1"), ("__import__('os')", "1"), ("2x", "2"), ("Yes", "No"), ("1/3", "0.3333"),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), SAME)
def test_same_expression(a: str, b: str) -> None:
    assert same_expression(a, b) and same_expression(b, a)


@pytest.mark.parametrize(("a", "b"), OTHER)
def test_other_expression(a: str, b: str) -> None:
    assert not same_expression(a, b) and not same_expression(b, a)


def test_expressions_are_not_run() -> None:
    for text in ("__import__('os').system('true')", "open('x')", "a.b", "f(x)[0]", "lambda:0", "(" * 500):
        assert evaluate(text) is None or text == "f(x)[0]"


def test_same_words() -> None:
    assert same_words(" Paris.", "paris") and not same_words("Paris, France", "Paris")


def test_all_reference_answers_of_gsm8k_are_read(shared: Path) -> None:
    """1,319 of 1,319 (test) and 7,473 of 7,473 (train) have a final number, and it is the one after the mark."""
    for name, count in (("test", 1319), ("train", 7473)):
        items = read_items(shared / "data" / "gsm8k" / f"{name}.jsonl")
        assert len(items) == count
        assert all(last_number(item["reference"]) == as_number(item["answer"]) is not None for item in items)
