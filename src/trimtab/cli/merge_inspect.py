"""`trimtab merge inspect`: do these checkpoints fit together, and how do their changes lie? Writes nothing without --out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from trimtab.cli.arguments import Parser, add_json, whole
from trimtab.cli.merge import add_choices
from trimtab.cli.output import check_json, console_for, progress, text_stream, write_result
from trimtab.errors import UsageError

EXAMPLES = """\
  trimtab merge inspect A B --base BASE
  trimtab merge inspect A B                        # without a base: of the weights themselves
  trimtab merge inspect A B C --base BASE --out inspected   # a page with heat maps, and every tensor as JSON"""

MOST_LAYERS = 12  # rows of the table by depth


def run(words: list[str]) -> None:
    """Prints problems, tables and what they say. Exit code 0 even where the models cannot be merged: it was asked."""
    parser = Parser(
        "merge inspect",
        "Compares checkpoints before a merge: what keeps them from being merged, each with the option that mends it, and\n"
        "how far and in which directions they moved. Merges nothing, and writes nothing without --out or --json.",
        EXAMPLES,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders, LoRA adapters, pocket/NAME")
    parser.add_argument("--base", metavar="MODEL", help="what they were fine-tuned from")
    parser.add_argument("--dtype", metavar="T", help="where they differ: what the merge would be written in")
    add_choices(parser)
    parser.add_argument("--out", metavar="DIR", help="report.html and merge-report.json")
    parser.add_argument("--threads", type=whole(1), default=None, metavar="N", help="tensors at a time (one a core)")
    add_json(parser)
    args = parser.parse(words)
    check_json(args.json)

    from trimtab.merge.checks import refuse_inside
    from trimtab.merge.recipe import Recipe

    out = _empty_or_ours(args.out)
    if out is not None:
        refuse_inside([*args.models, *([args.base] if args.base else [])], out)
    with progress() as say:
        recipe = Recipe(
            "linear" if args.base is None else "task-arithmetic", tuple(args.models), args.base,
            dtype=args.dtype, tokenizer=args.tokenizer, chat_template=args.chat_template, untie=args.untie,
        )  # fmt: skip
        found = inspect(recipe, args.threads, say, ["trimtab", "merge", "inspect", *words])
    if out is not None:
        from trimtab.report.merged import write_merged

        write_merged(found, out)
    stream = text_stream(args.json)
    print_report(found, stream)
    if out is not None:
        print(f"report: {out / 'report.html'}", file=stream)
    write_result(args.json, found)


def inspect(recipe: Any, threads: int | None, say: Any, command: Sequence[str]) -> dict[str, Any]:
    """The report on a recipe's models. UsageError for one that cannot be read at all."""
    from trimtab.merge.adapter import open_source
    from trimtab.merge.advice import advise
    from trimtab.merge.geometry import measure
    from trimtab.merge.plan import make_plan
    from trimtab.report.merged import report

    base_source = None if recipe.base is None else open_source(recipe.base)
    sources = [open_source(model, base_source) for model in recipe.models]
    problems: list[str] = []
    warnings: list[str] = []
    names = None
    try:
        plan = make_plan(recipe)
    except UsageError as error:
        problems = list(getattr(error, "problems", ())) or [str(error)]
    else:
        warnings, sources, base_source = plan.warnings, plan.models, plan.base
        names = [(one.name, one.names, one.base_name) for one in plan.outputs if one.method is not None]
    found = measure(sources, base_source, names, None, threads, say)
    if found.not_finite:
        where = f"{len(found.not_finite)} tensors, first {found.not_finite[0]!r}"
        problems.append(f"weights that are not finite numbers, in {where}: repair them, or leave their model out")
    parents = {source.name: source.fingerprint for source in [*sources, *([base_source] if base_source else [])]}
    return report(found, advise(found), problems, warnings, parents, command)


def print_report(found: Mapping[str, Any], stream: TextIO) -> None:
    """Problems, two tables, and what they say."""
    from rich.text import Text

    console = None
    for title, key in (("by module", "modules"), ("by depth", "layers")):
        rows = dict(found[key])
        if key == "layers" and len(rows) > MOST_LAYERS:
            rows = dict(list(rows.items())[:: -(-len(rows) // MOST_LAYERS)])
            title += f" ({len(rows)} of {len(found[key])}: --out or --json for all)"
        if key == "layers" and found["total"] is not None:
            rows["all"] = found["total"]
        if rows:
            table = _table(found, rows, title)
            console, _ = console_for(table, stream)
            console.print(table)
            console.print()
    if not found["mergeable"]:
        print("These cannot be merged as they are:", file=stream)
        for problem in found["problems"]:
            print(f"- {problem}", file=stream)
    elif found["recipe"] is None:
        print("These can be merged.", file=stream)
    for name in found["not_finite"]:
        print(f"- {name}: not finite in some model, and left out here", file=stream)
    for warning in found["warnings"]:
        print(f"- warning: {warning}", file=stream)
    for one in found["advice"]:
        (console.print(Text(f"- {one['text']}")) if console is not None else print(f"- {one['text']}", file=stream))


def _table(found: Mapping[str, Any], rows: Mapping[str, Any], title: str) -> Any:
    from rich.table import Table
    from rich.text import Text

    from trimtab.report.merged import brief

    several, merged = len(found["models"]) > 1, "merged" in (found["total"] or {})
    names = brief(found["models"])
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title)
    moved = "moved" if found["base"] is not None else "length"
    heads = [f"{moved} {name}" for name in names] + (["cosine", "sign conflict", "cancelled"] if several else [])
    heads += ["kept density", *(f"kept of {name}" for name in names)] if merged else []
    for head in heads:
        table.add_column(Text(head), justify="right")
    for name, one in rows.items():
        based = one["relative_norm"] if found["base"] is not None else one["norm"]
        cells = [_share(x) if found["base"] is not None else _number(x) for x in based]
        if several:
            known = [x for x in one["cosine"].values() if x is not None]
            mean = sum(known) / len(known) if known else None
            cells += [_number(mean), _share(one["sign_conflict"]), _share(one["cancelled"])]
        if merged:
            cells += [_share(one["merged"]["kept_density"]), *(_number(x) for x in one["merged"]["kept_of"])]
        table.add_row(Text(name), *cells)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}" if value >= 0.001 or not value else f"{value:.2%}"


def _empty_or_ours(out: str | None) -> Path | None:
    """The folder of --out. UsageError, before any work, for one that holds something else."""
    if out is None:
        return None
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise UsageError(f"--out {out} is a file: name a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / "merge-report.json").exists():
        raise UsageError(f"--out {out} holds something else: name an empty folder, or one of an earlier inspect")
    return path
