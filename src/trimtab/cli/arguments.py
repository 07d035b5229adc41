"""The parser of a verb's options, and the options that verbs share. An error is a `UsageError` of one sentence."""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from collections.abc import Collection
from typing import Any, NoReturn

from trimtab.errors import UsageError, unknown
from trimtab.spec import FALSE, TRUE


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with examples under the help and the nearest match for an unknown option."""

    def __init__(self, verb: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"trimtab {verb}",
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        # argparse knows -1 for a number, and takes -1e-3, -1..1 (a gradient) and -1:1 (a range) for options.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')} ({self.prog} --help shows the options)")

    def flags(self) -> list[str]:
        """All long options."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]

    def parse(self, words: list[str]) -> argparse.Namespace:
        """The options of a command. UsageError for an unknown one (nearest match), a missing or a wrong value."""
        # Looked for first: argparse would complain of a missing argument where the cause is a mistyped option.
        for word in words[: words.index("--")] if "--" in words else words:
            flag = word.partition("=")[0]
            if word.startswith("--") and flag not in self.flags():
                raise unknown(f"option of {self.prog}", flag, self.flags())
        # Intermixed: `generate MODEL --n 4 PROMPT` is as good as `generate MODEL PROMPT --n 4`.
        return self.parse_intermixed_args(words)


def whole(least: int) -> Any:
    """A type for argparse: a whole number of at least `least`."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return number

    return convert


def temperature(text: str) -> float:
    """A type for argparse: 0 (greedy) or more, finite."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 (greedy) or more")
    return number


def add_sampling(parser: Parser) -> None:
    """--max-new-tokens, --temperature, --seed."""
    parser.add_argument("--max-new-tokens", type=whole(0), default=64, metavar="N", help="longest answer (64)")
    parser.add_argument("--temperature", type=temperature, default=1.0, metavar="T", help="0 is greedy (1.0)")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="S", help="same seed, same bytes (0)")


def add_reward(parser: Parser, required: bool) -> None:
    """--reward."""
    parser.add_argument(
        "--reward",
        required=required,
        metavar="NAME[:key=value,...]",
        help="what is good: sentiment, length:target=30, keyword:words=a|b, regex:pattern=..., pocket/reward, "
        "pocket/judge, classifier:path=DIR, judge:url=...,model=..., verifier, json:keys=..., repetition, "
        "python:path=FILE,function=NAME, min:rewards=A|B, a sum such as 0.7*sentiment+0.3*... (docs: Rewards has all)",
    )


def add_json(parser: Parser) -> None:
    """--json."""
    parser.add_argument("--json", metavar="FILE", help="also as JSON; - is stdout, and the rest then goes to stderr")


def switches(config: type[Any], without: Collection[str] = ()) -> dict[str, bool]:
    """The options of a config dataclass as flags -> whether each is true or false; `without`: fields that are no option."""
    hints = typing.get_type_hints(config)
    return {
        f"--{field.name.replace('_', '-')}": bool in (hints[field.name], *typing.get_args(hints[field.name]))
        for field in dataclasses.fields(config)
        if field.name not in without
    }


def with_values(words: list[str], known: dict[str, bool]) -> list[str]:
    """`--residual` alone means `--residual true`. known: of `switches`."""
    out = []
    for i, word in enumerate(words):
        out.append(word)
        after = words[i + 1].lower() if i + 1 < len(words) else ""
        if known.get(word) and after not in (*TRUE, *FALSE, "none"):
            out.append("true")
    return out
