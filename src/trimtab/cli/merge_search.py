"""`trimtab merge search`: a method's settings by what validation skills say, within a budget of evaluations."""

from __future__ import annotations

import shlex
from pathlib import Path

from trimtab.cli.arguments import Parser, whole
from trimtab.cli.merge import add_output, split_words
from trimtab.cli.output import check_json, progress, text_stream, write_result
from trimtab.errors import unknown
from trimtab.merge import METHODS

EXAMPLES = """\
  trimtab merge search task-arithmetic --models A B --base BASE --validate nll:texts=valid.txt --scale 0.2:1.5 --out found
  trimtab merge search ties --models A B --base BASE --density 0.1:0.9 --scale 0.3:1.5 --weights 0:1 --budget 20 \\
      --validate "reward:reward=pocket/judge,texts=valid.txt" --test "reward:reward=pocket/judge,texts=test.txt" --out found
  LOW:HIGH is a range; a number is fixed. Several words are one a model; one range for --weights is one dimension a model."""


def run(words: list[str]) -> None:
    """Searches, prints the trials, and leaves the best recipe and the model merged by it."""
    parser = Parser(
        "merge search", "Finds a merging method's settings by validation skills, within a budget.", EXAMPLES
    )
    parser.add_argument("method", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--models", nargs="+", required=True, metavar="MODEL", help="the parents")
    parser.add_argument("--base", metavar="MODEL", help="what they were fine-tuned from")
    parser.add_argument(
        "--weights", nargs="+", default=None, metavar="W", help="a range or number for all, or one a model"
    )
    parser.add_argument(
        "--validate", nargs="+", required=True, metavar="SKILL", help="what to do well on: NAME:texts=FILE,...,weight=W"
    )
    parser.add_argument("--test", nargs="+", default=[], metavar="SKILL", help="measured once, at the end")
    parser.add_argument(
        "--budget", type=whole(2), default=20, metavar="N", help="merges measured, the default's too (20)"
    )
    add_output(parser)
    parser.usage = (
        "trimtab merge search METHOD --models A B [C ...] [--base BASE] --validate SKILL [SKILL ...] [--budget N] "
        "[--KEY LOW:HIGH ...] --out DIR"
    )
    ours, options = split_words(words, parser.flags())
    args = parser.parse(ours)
    from trimtab import catalogue

    if args.method not in METHODS and args.method not in catalogue.slugs():
        raise unknown("merging method", args.method, METHODS)
    check_json(args.json)
    from trimtab.merge.recipe import Recipe
    from trimtab.merge.search import MODEL, read_space, search
    from trimtab.merge.skills import Skill

    known = catalogue.options(args.method)
    ranges: dict[str, list[str]] = {}
    for flag, values in options.items():
        key = flag.removeprefix("--").replace("-", "_")
        key = "scale" if key == "lambda" else key
        if key not in known:
            flags = {*(f"--{name.replace('_', '-')}" for name in known), *parser.flags()}
            raise unknown(f"option of trimtab merge search {args.method}", flag, flags)
        ranges[key] = values
    if args.weights is not None:
        ranges["weights"] = args.weights
    recipe = Recipe(
        args.method, tuple(args.models), args.base, None, {}, args.dtype, args.work_dtype, args.max_shard_size,
        args.tokenizer, args.chat_template, args.untie, args.seed,
    )  # fmt: skip
    default, space = read_space(recipe, ranges)
    skills, test = [Skill.parse(spec) for spec in args.validate], [Skill.parse(spec) for spec in args.test]
    command = ["trimtab", "merge", "search", *words]
    with progress() as say:
        found = search(
            default, space, skills, args.budget, args.seed, args.out, test, args.threads, say, shlex.join(command)
        )
    from trimtab.cli.merge_skills import print_search
    from trimtab.report.merge_skills import write_search

    write_search(found, args.out, command)
    stream = text_stream(args.json)
    print_search(found, stream)
    out = Path(args.out)
    print(f"recipe: {out / 'merge.yaml'}\nmodel: {out / MODEL}\nreport: {out / 'search.html'}", file=stream)
    write_result(args.json, found)
