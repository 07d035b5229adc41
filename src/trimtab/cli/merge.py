"""`trimtab merge`: several checkpoints into one; and what belongs to it, each in a file of its own (cli/merge_WHAT.py)."""

from __future__ import annotations

import importlib
import shlex
import sys
import textwrap
from argparse import Namespace
from typing import Any

from trimtab.cli.arguments import Parser, add_json, whole
from trimtab.cli.output import check_json, progress, text_stream, write_result
from trimtab.errors import UsageError, unknown
from trimtab.merge import METHODS

# trimtab merge WHAT -> what it does; its code is trimtab.cli.merge_WHAT, with `run(words: list[str])`
VERBS = {
    "run": "merge as a YAML file says, ours or mergekit's",
    "inspect": "compare checkpoints: do they fit together, and how do their changes lie? writes nothing",
    "search": "find a method's options by a reward, within a budget",
    "align": "permute the units of one model so that they match another's",
    "pleas": "merge two models that share no base: match units, keep some apart, refit by least squares",
}

EXAMPLES = """\
  trimtab merge ties --models A B C --base BASE --density 0.3 --weights 1 1 0.5 --out merged
  trimtab merge linear --models A B --weights 0.2..0.8 0.8..0.2 --out merged       # a gradient over depth
  trimtab merge task-arithmetic --models A --base BASE --weights -1 --out negated
  trimtab merge dare-ties --models A B --base BASE --density mlp=0.3 0.5 --out merged   # by module
  trimtab merge run merge.yaml --out merged
  trimtab merge inspect A B --base BASE
  trimtab methods ties            # a method's options, each as --KEY VALUE"""


def run(words: list[str]) -> None:
    """Merges, or hands over to one of `VERBS`."""
    if words and words[0] in VERBS:
        importlib.import_module(f"trimtab.cli.merge_{words[0]}").run(words[1:])
        return
    parser = _parser()
    # Looked at first: a mistyped verb would be told of options that it does not have.
    if not words:
        raise UsageError(f"trimtab merge needs a method ({', '.join(METHODS)}) or one of {', '.join(VERBS)}")
    if not (words[0].startswith("-") or words[0] in METHODS or words[0] in _plugins()):
        raise unknown("merging method", words[0], {**METHODS, **VERBS})
    if words[0] in METHODS and {"-h", "--help"} & {*words}:
        parser.description = f"{parser.description}\n\n{_own_options(words[0])}"
    ours, options = split_words(words, parser.flags())
    args = parser.parse(ours)
    if args.method not in METHODS and args.method not in _plugins():
        raise unknown("merging method", args.method, {**METHODS, **VERBS})
    check_json(args.json)
    _merge(args, options, parser.flags(), words)


def _parser() -> Parser:
    verbs = "\n".join(f"  trimtab merge {verb:<9}{text}" for verb, text in VERBS.items())
    methods = "\n".join(
        textwrap.wrap(", ".join(METHODS), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    )
    about = "Merges checkpoints of one architecture into one, without training."
    parser = Parser("merge", f"{about}\n\nmethods:\n{methods}\n\nbesides:\n{verbs}", EXAMPLES)
    parser.add_argument("method", metavar="METHOD", help="one of the methods above")
    parser.add_argument(
        "--models", nargs="+", required=True, metavar="MODEL", help="folders, LoRA adapters, pocket/NAME"
    )
    parser.add_argument("--base", metavar="MODEL", help="what they were fine-tuned from")
    parser.add_argument("--weights", nargs="+", default=None, metavar="W", help="one a model (1 each)")
    add_output(parser)
    add_after(parser)
    parser.usage = (
        "trimtab merge METHOD --models A B [C ...] [--base BASE] [--weights W ...] [--KEY VALUE ...] --out DIR"
    )
    return parser


def _own_options(method: str) -> str:
    """What a method takes besides the options of all. Only for its --help: the list is read from code that needs torch."""
    from trimtab import catalogue

    lines = [f"{method}: {catalogue.card(method).summary}"]
    for key, (_, default, text) in catalogue.options(method).items():
        flag = f"  --{key.replace('_', '-')} VALUE"
        lines += textwrap.wrap(f"{text} ({default})", 100, initial_indent=f"{flag:<23} ", subsequent_indent=" " * 24)
    return "\n".join(lines)


def add_output(parser: Parser) -> None:
    """The options that every merge has."""
    parser.add_argument("--out", required=True, metavar="DIR", help="the merged model; the same command resumes")
    parser.add_argument(
        "--dtype", metavar="T", help="float32, bfloat16, float16, float64 (the base's or first model's)"
    )
    parser.add_argument(
        "--work-dtype", default="float32", metavar="T", help="arithmetic in float32 (default) or float64"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="longest file (5GB)")
    add_choices(parser)
    parser.add_argument("--seed", type=whole(0), default=0, metavar="S", help="for methods that draw at random (0)")
    parser.add_argument("--threads", type=whole(1), default=None, metavar="N", help="tensors at a time (one a core)")
    add_json(parser)


def add_choices(parser: Parser) -> None:
    """What to do where parents differ in more than their weights."""
    parser.add_argument(
        "--tokenizer", default="", metavar="FROM", help="where vocabularies differ: base, union or a model"
    )
    parser.add_argument("--chat-template", default="", metavar="FROM", help="where they differ: base, none or a model")
    parser.add_argument("--untie", action="store_true", help="write a head of its own where only some parents have one")


def add_after(parser: Parser) -> None:
    """What can be looked at once a model is merged: see `carry_out`."""
    parser.add_argument(
        "--evaluate", nargs="+", default=[], metavar="SKILL",
        help="parents, base and merge on nll:texts=FILE, reward:reward=SPEC,texts=FILE, refusal:texts=A|B, any diagnostic",
    )  # fmt: skip
    parser.add_argument("--report", action="store_true", help="DIR/report: lengths, angles and signs of every tensor")


def _merge(args: Namespace, options: dict[str, list[str]], flags: list[str], words: list[str]) -> None:
    from trimtab import catalogue
    from trimtab.merge.recipe import Recipe
    from trimtab.merge.schedule import parse_words

    settings = settings_of(args.method, options, catalogue.options(args.method), flags)
    commas = next((word for word in args.weights or () if "," in word), None)
    if commas is not None:
        raise UsageError(f"--weights {commas}: separate the weights by spaces, one a model")
    weights = None if args.weights is None else [parse_words([word], "--weights") for word in args.weights]
    if weights is not None and len(weights) == 1:
        weights *= len(args.models)
    recipe = Recipe(
        args.method, tuple(args.models), args.base, weights, settings, args.dtype, args.work_dtype, args.max_shard_size,
        args.tokenizer, args.chat_template, args.untie, args.seed,
    )  # fmt: skip
    carry_out(recipe, args, words)


def carry_out(recipe: Any, args: Namespace, words: list[str]) -> None:
    """Merges, evaluates and reports, as the options of `add_output` and `add_after` say, and says what was done."""
    from trimtab.cli.merge_skills import Evaluation
    from trimtab.merge.checks import refuse_inside
    from trimtab.merge.engine import run as run_merge

    command = ["trimtab", "merge", *words]
    found: dict[str, Any] = {}
    refuse_inside(recipe.parents, args.out)
    with progress() as say:
        evaluation = Evaluation.before(args.evaluate, recipe, args.out, say) if args.evaluate else None
        done = run_merge(recipe, args.out, args.threads, say, shlex.join(command))
        if evaluation is not None:
            found["skills"] = evaluation.of(done.path, say, command)
        if args.report:
            from trimtab.merge.after import write_report

            found["report"] = str(write_report(recipe, done.path, args.threads, say, command))
    report_merged(done, args.json, **found)


def settings_of(method: str, options: dict[str, list[str]], known: Any, flags: list[str]) -> dict[str, Any]:
    """--KEY WORD ... pairs as a recipe's options. UsageError for a key that the method lacks (nearest match)."""
    from trimtab.merge.schedule import parse_words

    settings = {}
    for flag, values in options.items():
        key = flag.removeprefix("--").replace("-", "_")
        key = "scale" if key == "lambda" else key
        if key not in known:
            raise unknown(
                f"option of trimtab merge {method}", flag, {*(f"--{name.replace('_', '-')}" for name in known), *flags}
            )
        if key in settings:
            raise UsageError(f"{flag} is given twice")
        settings[key] = parse_words(values, flag)
    return settings


def report_merged(done: Any, json_to: str | None, **more: Any) -> None:
    """Says what was merged and how to use it, and what became of the skills; --json, with `more`."""
    for warning in done.warnings:
        print(f"trimtab: warning: {warning}", file=sys.stderr)
    again = f", {_size(done.resumed_bytes)} of it earlier" if done.resumed_bytes else ""
    print(
        f"merged: {done.path} ({done.tensors} tensors, {_size(done.nbytes)} in {done.seconds:.1f} s{again})\n"
        f"use it: trimtab generate {shlex.quote(str(done.path))} PROMPT",
        file=text_stream(json_to),
    )
    if "skills" in more:
        from trimtab.cli.merge_skills import print_skills
        from trimtab.merge.after import FOLDER as REPORT

        print_skills(more["skills"], text_stream(json_to))
        print(f"skills: {done.path / REPORT / 'skills.html'}", file=text_stream(json_to))
    if "report" in more:
        print(f"report: {more['report']}", file=text_stream(json_to))
    found = {"schema": 1, "path": str(done.path), "tensors": done.tensors, "bytes": done.nbytes}
    write_result(json_to, {**found, "seconds": done.seconds, "warnings": list(done.warnings), **more})


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def split_words(words: list[str], flags: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words of the verb itself, and the method's own `--KEY WORD [WORD ...]` (those not in `flags`)."""
    ours: list[str] = []
    options: dict[str, list[str]] = {}
    current: list[str] = ours
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            if flag in flags:
                current = ours
                ours.append(word)
                continue
            if flag in options:
                raise UsageError(f"{flag} is given twice")
            options[flag] = current = [value] if equals else []
        else:
            current.append(word)
    for flag, values in options.items():
        if not values:
            raise UsageError(f"{flag} needs a value: {flag} VALUE")
    return ours, options


def _plugins() -> Any:
    from trimtab import catalogue

    return [slug for slug in catalogue.slugs() if slug not in catalogue.METHODS]
