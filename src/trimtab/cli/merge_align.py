"""`trimtab merge align`: the units of B in the order of A's, as a model folder, and what it does to the path between them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from trimtab.cli.arguments import Parser, add_json, switches, with_values
from trimtab.cli.fit import split_options
from trimtab.cli.output import check_json, progress, text_stream, write_result
from trimtab.errors import UsageError, unknown

EXAMPLES = """\
  trimtab merge align A B --out b-like-a                                    # by the weights
  trimtab merge align A B --residual --texts texts.txt --out b-like-a       # no common base; and is the path flat?
  trimtab merge align A B --method am --texts texts.txt --out b-like-a      # by activations
  trimtab merge linear --models A b-like-a --out merged                     # then average
  trimtab methods align                                                     # all options, each as --KEY VALUE"""


def run(words: list[str]) -> None:
    """Aligns, writes the folder and prints the table."""
    parser = Parser(
        "merge align",
        "Permutes the units of B so that they match A's, for models that share no base.\nThe permuted B does what B does.",
        EXAMPLES,
    )
    parser.add_argument("a", metavar="A", help="the model whose order counts")
    parser.add_argument("b", metavar="B", help="the model that is permuted; of A's architecture and size")
    parser.add_argument("--out", required=True, metavar="DIR", help="the permuted B, align.json and report.html")
    parser.add_argument(
        "--texts", "--prompts", dest="texts", metavar="FILE", help="a text a line: the loss on the path from A to B"
    )
    parser.add_argument("--spec", metavar="FILE", help="permutation groups as JSON, for an unknown architecture")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="longest file (5GB)")
    add_json(parser)
    parser.usage = "trimtab merge align A B --out DIR [--texts FILE] [--residual] [--KEY VALUE ...]"
    from trimtab.merge.adapter import is_adapter
    from trimtab.merge.align.align import AlignConfig  # here: it imports torch
    from trimtab.merge.checks import refuse_inside
    from trimtab.merge.recipe import Recipe
    from trimtab.spec import build

    known = switches(AlignConfig)
    for word in words:
        flag = word.partition("=")[0]
        if word.startswith("--") and flag not in known and flag not in parser.flags():
            raise unknown("option of trimtab merge align", flag, {*known, *parser.flags()})
    ours, options = split_options(with_values(words, known), parser.flags())
    args = parser.parse(ours)
    check_json(args.json)
    values = {flag.removeprefix("--").replace("-", "_"): value for flag, value in options.items()}
    config = build(AlignConfig, values, "trimtab merge align")
    for path in (args.texts, args.spec):
        if path is not None and not Path(path).is_file():
            raise UsageError(f"there is no file {path}")
    _check_out(args.out)
    refuse_inside((args.a, args.b), args.out)
    for model in (args.a, args.b):
        if is_adapter(model):
            raise UsageError(
                f"{model} is a LoRA adapter: fold it first, trimtab merge linear --models {shlex.quote(model)} --out FOLDED"
            )
    size = Recipe("linear", (args.a,), max_shard_size=args.max_shard_size).shard_bytes
    from trimtab.cli.measured import print_measured
    from trimtab.merge.align.run import Asked, align_folders

    asked = Asked(
        args.a, args.b, Path(args.texts) if args.texts else None, Path(args.spec) if args.spec else None, size
    )
    command = ["trimtab", "merge", "align", *words]
    with progress() as say:
        found = align_folders(asked, args.out, config, say, command)
    print_measured(found, text_stream(args.json))
    out = Path(args.out)
    pair = shlex.join([args.a, str(out)])
    print(
        f"aligned: {out}\nreport: {out / 'report.html'}\n"
        f"average: trimtab merge linear --models {pair} --weights 0.5 0.5 --out merged",
        file=text_stream(args.json),
    )
    write_result(args.json, found)


def _check_out(out: str) -> None:
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise UsageError(f"--out {out} is a file: give a new or empty folder")
    above = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if not os.access(above, os.W_OK):
        raise UsageError(f"--out {out} cannot be made: {above} cannot be written to")
