"""`trimtab methods`: the catalogue, and one method's card and options."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any, TextIO

from trimtab import catalogue
from trimtab.card import VOCABULARY, Card
from trimtab.cli.arguments import Parser, add_json
from trimtab.cli.output import check_json, console_for, text_stream, write_result
from trimtab.errors import UsageError
from trimtab.planner import BYTES, SIGNALS, Plan, Situation, access_of, memory_of, plan, signals_of, size_of

EXAMPLES = """\
  trimtab methods
  trimtab methods natural-control
  trimtab methods plan --model-size 7B --memory 24GB --signals pairs,reward --access hidden-states --goal preference
  trimtab methods --json - | python -m json.tool"""


def run(words: list[str]) -> None:
    """Prints the catalogue, one method, or what fits a situation."""
    parser = Parser("methods", "Lists the methods, shows one with its options, or plans which to use.", EXAMPLES)
    parser.add_argument("name", nargs="?", metavar="NAME", help="one method; or `plan`, with what is at hand:")
    parser.add_argument("--model-size", metavar="7B", help="plan: parameters of the model")
    parser.add_argument("--memory", metavar="24GB", help="plan: memory of the device")
    parser.add_argument("--signals", metavar="A,B", help=f"plan: what says what is good: {', '.join(SIGNALS)}")
    parser.add_argument(
        "--access", metavar="A", help="plan: text, logits, hidden-states, weights, gradients or training"
    )
    parser.add_argument("--goal", choices=sorted(VOCABULARY["goal"]), help="plan: what it is for")
    parser.add_argument("--stage", choices=sorted(VOCABULARY["stage"]), help="plan: only this stage")
    parser.add_argument("--dtype", choices=sorted(BYTES), help="plan: how weights are stored (bfloat16)")
    add_json(parser)
    args = parser.parse(words)
    check_json(args.json)
    if args.name == "plan":
        _plan(args)
        return
    for name in ("model_size", "memory", "signals", "access", "goal", "stage", "dtype"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} goes with `trimtab methods plan`")
    if args.name:
        card = catalogue.card(args.name)
        if args.json != "-":
            _print_card(card, text_stream(args.json))
        write_result(args.json, _record(card))
        return
    cards = catalogue.cards()
    if args.json != "-":
        _print_cards(cards, sys.stdout)
    write_result(args.json, {"schema": 1, "methods": [_record(card) for card in cards]})


def _plan(args: Namespace) -> None:
    situation = Situation(
        size_of(args.model_size) if args.model_size else None,
        memory_of(args.memory) if args.memory else None,
        signals_of(args.signals or ""),
        access_of(args.access) if args.access else "training",
        args.goal,
        args.stage,
        args.dtype or "bfloat16",
    )
    found = plan(situation, catalogue.cards())
    if args.json != "-":
        _print_plan(found, text_stream(args.json))
    write_result(args.json, found.to_dict())


def _print_plan(found: Plan, stream: TextIO) -> None:
    from rich.table import Table

    if found.chosen:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("", "method", "stage", "why here"):
            table.add_column(column, overflow="fold")
        for place, one in enumerate(found.chosen, start=1):
            why = [reason for reason in one.reasons if not reason.startswith("fitting")]
            table.add_row(str(place), one.slug, one.stage, "; ".join(why))
        console_for(table, stream)[0].print(table, markup=False)
    else:
        print("nothing fits; every method and why:", file=stream)
    if found.pipelines:
        print(f"\ntogether: {'; '.join(found.pipelines[:8])}", file=stream)
    told = {slug: why for slug, why in found.excluded.items() if not why[0].startswith("it belongs to the stage")}
    if told:
        print("\nleft out:", file=stream)
        for slug, reasons in told.items():
            print(f"  {slug}: {'; '.join(reasons)}", file=stream)
    if len(told) < len(found.excluded):
        print(f"\nand {len(found.excluded) - len(told)} methods of other stages", file=stream)
    if found.measure_with:
        print(f"\nmeasure with: {', '.join(found.measure_with)}", file=stream)


def _record(card: Card) -> dict[str, Any]:
    options = {name: help._asdict() for name, help in catalogue.options(card.slug).items()}
    return {**card.to_dict(), "options": options}


def _print_cards(cards: list[Card], stream: TextIO) -> None:
    from rich.table import Table

    methods = [card for card in cards if card.stage not in ("audit", "merge")]
    merges = [card for card in cards if card.stage == "merge"]
    audits = [card for card in cards if card.stage == "audit"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("method", "stage", "status", "needs", "tokens/answer", "what it does"):
        table.add_column(column, overflow="fold")
    for card in methods:
        table.add_row(card.slug, card.stage, ", ".join(card.status), card.access, card.infer_multiplier, card.summary)
    console_for(table, stream)[0].print(table, markup=False)
    print("\nand ways of making one model of several, for `trimtab merge NAME`:\n", file=stream)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("merge", "status", "cost", "what it does"):
        table.add_column(column, overflow="fold")
    for card in merges:
        table.add_row(card.slug, ", ".join(card.status), card.fit_cost, card.summary)
    console_for(table, stream)[0].print(table, markup=False)
    print("\nand diagnostics, for `trimtab measure NAME` and `trimtab compare --measure NAME`:\n", file=stream)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("diagnostic", "status", "needs", "speaks of", "what it measures"):
        table.add_column(column, overflow="fold")
    for card in audits:
        table.add_row(card.slug, ", ".join(card.status), card.access, ", ".join(card.dimensions), card.summary)
    console_for(table, stream)[0].print(table, markup=False)
    print("\ntrimtab methods NAME shows one with its options.", file=stream)


def _print_card(card: Card, stream: TextIO) -> None:
    lines = [f"{card.slug}: {card.name}", card.summary, "", f"paper        {card.paper}"]
    lines += [f"status       {', '.join(card.status)}", f"goal, stage  {card.goal}, {card.stage} ({card.mechanism})"]
    lines += [f"signal       {', '.join(card.signal)}", f"access       {card.access}", f"produces     {card.produces}"]
    lines += [f"answering    {card.infer_multiplier}", f"fitting      {card.fit_cost}"]
    for title, items in (("needs", card.needs), ("limits", card.limits), ("risks", card.risks)):
        lines += ["", f"{title}:", *(f"  - {item}" for item in items)] if items else []
    policy, verb = {"audit": ("--measure", "measure"), "merge": ("", "merge")}.get(card.stage, ("--policy", "fit"))
    form = f"NAME:key=value,... in {policy}; " if policy else ""
    lines += ["", f"options ({form}--key value in trimtab {verb} {card.slug}):"]
    for name, (kind, default, text) in catalogue.options(card.slug).items():
        lines += [f"  {name} ({kind}; {'must be given' if default is None else f'default {default}'})", f"      {text}"]
    lines += ["", "example:", *(f"  {line}" for line in card.example.splitlines())] if card.example else []
    print("\n".join(lines), file=stream)
