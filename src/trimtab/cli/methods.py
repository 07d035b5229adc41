"""`trimtab methods`: the catalogue, and one method's card and options."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from trimtab import catalogue
from trimtab.card import Card
from trimtab.cli.arguments import Parser, add_json
from trimtab.cli.output import check_json, console_for, text_stream, write_result

EXAMPLES = """\
  trimtab methods
  trimtab methods natural-control
  trimtab methods --json - | python -m json.tool"""


def run(words: list[str]) -> None:
    """Prints the catalogue, or one method."""
    parser = Parser("methods", "Lists the methods with their true status, or shows one with its options.", EXAMPLES)
    parser.add_argument("name", nargs="?", metavar="NAME", help="one method")
    add_json(parser)
    args = parser.parse(words)
    check_json(args.json)
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


def _record(card: Card) -> dict[str, Any]:
    options = {name: help._asdict() for name, help in catalogue.options(card.slug).items()}
    return {**card.to_dict(), "options": options}


def _print_cards(cards: list[Card], stream: TextIO) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("method", "stage", "status", "needs", "tokens/answer", "what it does"):
        table.add_column(column, overflow="fold")
    for card in cards:
        table.add_row(card.slug, card.stage, ", ".join(card.status), card.access, card.infer_multiplier, card.summary)
    console_for(table, stream)[0].print(table, markup=False)
    print("\ntrimtab methods NAME shows one with its options.", file=stream)


def _print_card(card: Card, stream: TextIO) -> None:
    lines = [f"{card.slug}: {card.name}", card.summary, "", f"paper        {card.paper}"]
    lines += [f"status       {', '.join(card.status)}", f"goal, stage  {card.goal}, {card.stage} ({card.mechanism})"]
    lines += [f"signal       {', '.join(card.signal)}", f"access       {card.access}", f"produces     {card.produces}"]
    lines += [f"answering    {card.infer_multiplier}", f"fitting      {card.fit_cost}"]
    for title, items in (("needs", card.needs), ("limits", card.limits), ("risks", card.risks)):
        lines += ["", f"{title}:", *(f"  - {item}" for item in items)] if items else []
    lines += ["", f"options (NAME:key=value,... in --policy; --key value in trimtab fit {card.slug}):"]
    for name, (kind, default, text) in catalogue.options(card.slug).items():
        lines += [f"  {name} ({kind}; {'must be given' if default is None else f'default {default}'})", f"      {text}"]
    lines += ["", "example:", *(f"  {line}" for line in card.example.splitlines())] if card.example else []
    print("\n".join(lines), file=stream)
