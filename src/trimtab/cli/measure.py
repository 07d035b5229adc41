"""`trimtab measure`: one diagnostic on a model or a policy, alone or against others."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from trimtab import measure
from trimtab.cli.arguments import Parser, add_json, add_reward, add_sampling
from trimtab.cli.fit import split_options
from trimtab.cli.output import check_json, progress, text_stream, write_result
from trimtab.errors import UsageError, unknown

EXAMPLES = """\
  trimtab measure refusal pocket/chat --texts harmful.txt harmless.txt --against pocket/base --template plain
  trimtab measure branching-factor pocket/base --texts prompts.txt --samples 16
  trimtab measure panel "natural-control:kl_target=0.05 on pocket/base" --against pocket/base --reward pocket/reward \\
      --texts prompts.txt --out runs/panel
  trimtab measure mexa MODEL --texts eng.txt fra.txt --json -
  trimtab methods aqi             # a diagnostic's options, each as --KEY VALUE"""


def run(words: list[str]) -> None:
    """Measures, prints the table, and writes what was asked for."""
    parser = Parser(
        "measure", "Measures what a model does or holds inside, with intervals; alone or against.", EXAMPLES
    )
    parser.add_argument("name", metavar="NAME", help=f"a diagnostic: {', '.join(sorted(measure.METHODS))}")
    parser.add_argument("model", metavar="MODEL", help="pocket/NAME, a folder, a Hub id, or 'POLICY on MODEL'")
    parser.add_argument("--against", action="append", default=[], metavar="MODEL", help="compare with; may be repeated")
    parser.add_argument("--texts", nargs="+", default=[], metavar="FILE", help="what it is measured on")
    add_reward(parser, required=False)
    parser.add_argument(
        "--judge", metavar="SPEC", help="who compares or grades answers: a reward, a model, judge:url=..."
    )
    parser.add_argument(
        "--template", choices=("own", "plain"), default="own", help="chat template: each model's own (default), or none"
    )
    parser.add_argument("--fit-prompts", metavar="FILE", help="prompts that a policy is fitted on")
    parser.add_argument(
        "--train-texts",
        nargs="+",
        default=[],
        metavar="FILE",
        help="what the models were trained on: overlaps are said",
    )
    add_sampling(parser)
    parser.add_argument("--out", metavar="DIR", help="write measure.json and report.html here")
    add_json(parser)
    parser.usage = f"{parser.format_usage().removeprefix('usage: ').strip()} [--KEY VALUE ...]"
    ours, options = split_options(words, parser.flags())
    args = parser.parse(ours)
    if args.name not in measure.METHODS and args.name not in _plugins():
        raise unknown("diagnostic", args.name, measure.METHODS)
    check_json(args.json)
    _check_files(args)
    _measure(args, options, parser.flags())


def _measure(args: Namespace, options: dict[str, str], flags: list[str]) -> None:
    from trimtab import catalogue
    from trimtab.cli.measured import print_measured
    from trimtab.measure.measuring import Asked, diagnostic, run_measure
    from trimtab.report.measured import write_measured
    from trimtab.sampling import Sampling

    known = [f"--{name.replace('_', '-')}" for name in catalogue.options(args.name)]
    for flag in options:
        if flag.replace("_", "-") not in known:
            raise unknown(f"option of trimtab measure {args.name}", flag, {*known, *flags})
    tool = diagnostic(args.name, {flag.removeprefix("--").replace("-", "_"): text for flag, text in options.items()})
    asked = Asked(
        tuple(Path(path) for path in args.texts), args.reward, args.judge, args.template,
        Sampling(max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed),
        Path(args.fit_prompts) if args.fit_prompts else None,
        tuple(Path(path) for path in args.train_texts),
    )  # fmt: skip
    subjects = [args.model, *args.against]
    with progress() as say:
        found = run_measure(tool, subjects, asked, progress=say).to_dict()
    print_measured(found, text_stream(args.json))
    if args.out:
        command = ["trimtab", "measure", *_command(args, options)]
        out = Path(args.out)
        write_measured(found, out, command)
        print(f"report: {out / 'report.html'}\nfigures: {out / 'measure.json'}", file=text_stream(args.json))
    write_result(args.json, found)


def _command(args: Namespace, options: dict[str, str]) -> list[str]:
    """The words of this command, without where its output went."""
    out = [args.name, args.model]
    out += [word for path in args.against for word in ("--against", path)]
    out += ["--texts", *args.texts] if args.texts else []
    out += ["--train-texts", *args.train_texts] if args.train_texts else []
    for key in ("reward", "judge", "fit_prompts"):
        if getattr(args, key) is not None:
            out += [f"--{key.replace('_', '-')}", getattr(args, key)]
    for key, default in (("template", "own"), ("max_new_tokens", 64), ("temperature", 1.0), ("seed", 0)):
        if getattr(args, key) != default:
            out += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    return out + [word for pair in options.items() for word in pair]


def _check_files(args: Namespace) -> None:
    for path in [*args.texts, *args.train_texts, *([args.fit_prompts] if args.fit_prompts else [])]:
        if not Path(path).exists():
            raise UsageError(f"there is no file {path}")
    if twice := [path for path in args.texts if args.texts.count(path) > 1]:
        raise UsageError(f"--texts {twice[0]} is given twice: its rows would count twice")
    if args.out and Path(args.out).exists():
        out = Path(args.out)
        if not out.is_dir() or (any(out.iterdir()) and not (out / "measure.json").exists()):
            raise UsageError(f"--out {out} holds something else: give an empty folder, or that of a measurement")
    elif args.out:
        above = next(path for path in Path(args.out).absolute().parents if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UsageError(f"--out {args.out} cannot be made: {above} is no folder that can be written to")


def _plugins() -> Any:
    from trimtab import catalogue

    return catalogue.slugs()
