"""`trimtab merge pleas`: two language models of one architecture into one of 1 to 2 times their size."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from trimtab.cli.arguments import Parser, add_json, switches, with_values
from trimtab.cli.fit import split_options
from trimtab.cli.output import check_json, progress, text_stream, write_result
from trimtab.errors import UsageError, unknown

EXAMPLES = """\
  trimtab merge pleas A B --budget 1.2 --data a.txt b.txt --out merged      # a file a domain
  trimtab merge pleas A B --budget 1.0 --data public.txt --out merged       # "data-free": any texts, the file decides
  trimtab merge pleas A B --budget 1.4 --residual --match am --data texts.txt --out merged    # no common base
  trimtab methods pleas                                                     # all options, each as --KEY VALUE"""
MODULES_ONLY = ("heads", "statistics")


def run(words: list[str]) -> None:
    """Merges, writes the folder and says what it cost and how well each model does on the texts."""
    parser = Parser(
        "merge pleas",
        "Matches the units of two models, keeps the worst matches of the feed-forward nets apart within a size budget,\n"
        "and refits every layer to what the parents' layers do on the texts (unlabelled; any domain).",
        EXAMPLES,
    )
    parser.add_argument("a", metavar="A", help="folder, LoRA adapter or pocket/NAME; its order of units is kept")
    parser.add_argument("b", metavar="B", help="the other, of the same architecture and size")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FILE", help="texts, one a line or JSONL; a file a domain"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the merged model, pleas.json and README.md")
    parser.add_argument("--dtype", metavar="T", help="float32, bfloat16, float16 (A's)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="longest file (5GB)")
    parser.add_argument("--tokenizer", default="", metavar="FROM", help="where vocabularies differ: union, A or B")
    parser.add_argument("--chat-template", default="", metavar="FROM", help="where they differ: none, A or B")
    parser.add_argument("--untie", action="store_true", help="write a head of its own where only one parent has one")
    add_json(parser)
    parser.usage = "trimtab merge pleas A B --budget X --data FILE [FILE ...] --out DIR [--KEY VALUE ...]"
    from trimtab.merge.pleas.pleas import PleasConfig  # here: it imports torch
    from trimtab.spec import build

    known = switches(PleasConfig, MODULES_ONLY)
    untied = [word for word in words if word == "--untie"]  # takes no value, which split_options would give it
    ours, options = split_options(with_values([word for word in words if word not in untied], known), parser.flags())
    for flag in options:
        if flag not in known:
            raise unknown("option of trimtab merge pleas", flag, {*known, *parser.flags()})
    args = parser.parse([*ours, *untied[:1]])
    check_json(args.json)
    values = {flag.removeprefix("--").replace("-", "_"): value for flag, value in options.items()}
    config = build(PleasConfig, values, "trimtab merge pleas")
    for path in args.data:
        if not Path(path).is_file():
            raise UsageError(f"there is no file {path}: --data takes files of texts")
    from trimtab.merge.checks import refuse_inside
    from trimtab.merge.pleas.models import Asked, merge_folders

    refuse_inside((args.a, args.b), args.out)

    asked = Asked(
        args.a, args.b, tuple(map(Path, args.data)), args.dtype, args.max_shard_size, args.tokenizer, args.chat_template,
        args.untie,
    )  # fmt: skip
    command = shlex.join(["trimtab", "merge", "pleas", *words])
    with progress() as say:
        found = merge_folders(asked, args.out, config, say, command)
    _print(found, args.out, text_stream(args.json))
    write_result(args.json, {**found, "path": args.out})


def _print(found: dict[str, Any], out: str, stream: Any) -> None:
    for warning in found["warnings"]:
        print(f"trimtab: warning: {warning}", file=sys.stderr)
    layers = found["layers"].values()
    start, fitted = (sum(one[key] for one in layers) / len(layers) for key in ("start", "fitted"))
    print(
        f"feed-forward nets: {found['width']} wide; {found['ratio']:.3f} times one parent's multiply-adds\n"
        f"layers: mean squared error {start:.4f} of their outputs as block averages, {fitted:.4f} after the fit",
        file=stream,
    )
    width = max(len(name) for name in found["losses"])
    print(f"{'loss (nats a token)':<{max(width, 19)}}       A       B  merged   share of the texts", file=stream)
    for name, row in found["losses"].items():
        values = "  ".join(f"{row[key]:6.3f}" for key in ("a", "b", "merged"))
        print(f"{name:<{max(width, 19)}}  {values}   {found['shares'][name]:.2f}", file=stream)
    print(f"merged: {out}\nuse it: trimtab generate {shlex.quote(out)} PROMPT", file=stream)
