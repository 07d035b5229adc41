"""`NAME[:key=value,...]` and the dataclasses behind it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from trimtab.errors import UsageError
from trimtab.spec import build, changed, coerce, format_spec, parse_spec


@dataclass
class Options:
    count: int
    rate: float = 0.5
    loud: bool = False
    unit: Literal["words", "characters"] = "words"
    layers: tuple[int, ...] = ()
    limit: float | None = None
    place: Path = Path("here")
    text: str = ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sentiment", ("sentiment", {})),
        ("pocket/judge:aspect=honest", ("pocket/judge", {"aspect": "honest"})),
        ("best-of-n:n=8,reward=length:target=30", ("best-of-n", {"n": "8", "reward": "length:target=30"})),
        ("regex:pattern=a=b:c", ("regex", {"pattern": "a=b:c"})),
        (r"regex:pattern=\d{1\,2}\.,mode=all", ("regex", {"pattern": r"\d{1,2}\.", "mode": "all"})),
        (r"a:b=length:target=3\,unit=words,n=2", ("a", {"b": "length:target=3,unit=words", "n": "2"})),
        (r"a:b=x\\,y", ("a", {"b": r"x\,y"})),
        ("a:b=", ("a", {"b": ""})),
        (" a : b = 1 ", ("a", {"b": "1"})),
    ],
)
def test_parse(text: str, expected: tuple[str, dict[str, str]]) -> None:
    assert parse_spec(text) == expected


@pytest.mark.parametrize("text", ["", ":a=1", "a:", "a:b", "a:b=1,", "a:=1", "a:b=1,b=2"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UsageError):
        parse_spec(text)


def test_format_is_the_inverse() -> None:
    for text in ("sentiment", r"regex:pattern=a{1\,2},mode=all", "x:layers=1|2,limit=none,loud=true,rate=3"):
        name, options = parse_spec(text)
        assert parse_spec(format_spec(name, options)) == (name, options)
    assert format_spec("x", {"layers": (1, 2), "limit": None, "loud": True, "rate": 3.0}) == (
        "x:layers=1|2,limit=none,loud=true,rate=3"
    )


def test_build_takes_types_from_annotations() -> None:
    given = {
        "count": "3",
        "rate": "1e-3",
        "loud": "False",
        "unit": "characters",
        "layers": "1|2",
        "limit": "none",
        "place": "a b/c",
        "text": "3",
    }
    assert build(Options, given, "test") == Options(3, 0.001, False, "characters", (1, 2), None, Path("a b/c"), "3")
    assert build(Options, {"count": 3, "rate": 2, "layers": [1], "limit": 2}, "test") == Options(
        3, 2.0, layers=(1,), limit=2.0
    )


@pytest.mark.parametrize(
    ("word", "value"), [("False", False), ("no", False), ("0", False), ("TRUE", True), ("on", True)]
)
def test_false_is_false(word: str, value: bool) -> None:
    assert coerce(word, bool) is value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": "3.5"}, "test: count='3.5' is not a whole number"),
        ({"count": True}, "count='true' is not a whole number"),
        ({"count": "1", "rate": "nan"}, "rate='nan' is not a number"),
        ({"count": "1", "loud": "maybe"}, "loud='maybe' is not true or false"),
        ({"count": "1", "unit": "word"}, "unit='word' is not one of words, characters"),
        (
            {"count": "1", "layers": "1|x"},
            "layers='1|x' is not a list separated by '|' of which each is a whole number",
        ),
        ({"count": "1", "limit": "x"}, "limit='x' is not a number or none"),
        ({"count": "1", "text": 3}, "text='3' is not text"),
        ({"cuont": "1"}, "unknown key of test 'cuont'; did you mean 'count'?"),
        ({"rate": "1"}, r"test needs count \(a whole number\)"),
    ],
)
def test_build_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("|", r"\|")):
        build(Options, options, "test")


def test_keys_may_be_written_with_dashes() -> None:
    @dataclass
    class Dashed:
        kl_target: float = 1.0

    assert changed(build(Dashed, {"kl-target": "0.05"}, "test")) == {"kl_target": 0.05}


def test_changed_lists_what_is_not_a_default() -> None:
    assert changed(Options(3)) == {"count": 3}
    assert changed(Options(3, loud=True, layers=(1,))) == {"count": 3, "loud": True, "layers": (1,)}


def test_rewards_and_measure_import_no_torch() -> None:
    code = "import sys, trimtab.spec, trimtab.rewards, trimtab.measure; print({'torch', 'scipy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
