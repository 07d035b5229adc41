"""Prints measurements and comparisons (as `measure.json` holds them) as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TextIO

from rich.table import Table
from rich.text import Text

from trimtab.cli.output import console_for
from trimtab.measure.measurement import decimals

_STYLE = {"better": "green", "worse": "red", "changed": "cyan"}


def print_measured(found: Mapping[str, Any], stream: TextIO) -> None:
    """One table a measurement, then one a comparison, notes and warnings under each."""
    for number, one in enumerate(found["measurements"]):
        if number:
            print(file=stream)
        _print_measurement(one, stream)
    for number, one in enumerate(found["comparisons"]):
        if number or found["measurements"]:
            print(file=stream)
        _print_comparison(one, stream)


def _print_measurement(one: Mapping[str, Any], stream: TextIO) -> None:
    table = _table("", "value", "95 % interval", "n", "good")
    for row in one["table"]:
        good = {"higher": "high", "lower": "low"}.get(row["better"], "")
        label = f"{row['label']} ({row['note']})" if row["note"] else row["label"]
        table.add_row(Text(label), number(row["value"]), interval(row["low"], row["high"]), str(row["n"] or ""), good)
    tokens = one["cost"]["tokens_forwarded"]
    spent = f"{tokens:,} tokens forwarded" if tokens else "nothing forwarded"
    _show(f"{one['name']} of {one['subject']} (unit: {one['unit']}; {spent}; {one['fingerprint']})", table, one, stream)


def _print_comparison(one: Mapping[str, Any], stream: TextIO) -> None:
    table = _table("", "first", "second", "difference", "95 % interval", "n", "verdict", "p")
    for row in one["changes"]:
        p = "" if row["p_value"] is None else f"{row['p_value']:.2g}"
        label = f"{row['label']} ({row['note']})" if row["note"] else row["label"]
        table.add_row(
            Text(label), number(row["first"]), number(row["second"]), number(row["difference"], signed=True),
            interval(row["low"], row["high"]), str(row["n"] or ""),
            Text(row["verdict"], style=_STYLE.get(row["verdict"], "")), p,
        )  # fmt: skip
    _show(f"{one['first']} against {one['second']} (paired by {one['unit']})", table, one, stream)


def _show(title: str, table: Table, one: Mapping[str, Any], stream: TextIO) -> None:
    console, _ = console_for(table, stream)
    console.print(Text(title, style="bold"))
    console.print(table)
    for note in one.get("notes", ()):
        console.print(Text(note, style="dim"))
    for warning in one.get("warnings", ()):
        console.print(Text(f"warning: {warning}", style="yellow"))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if not place or column in ("verdict", "good") else "right")
    return table


def number(value: float | None, signed: bool = False) -> str:
    """Three decimals; five where the number is small, one or none where it is large; '-' where undefined."""
    if value is None:
        return "-"
    digits = decimals(value)
    return f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"


def interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"[{number(low)}, {number(high)}]"
