"""The answer-by-answer part: 2x2 counts, the rows of the table, picked pairs, and the data embedded for download."""

from __future__ import annotations

import json
import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.report.analysis import Estimate, GoodRule, Pair, Row, net_wins, number, pair_rows, picks

BUDGET_BYTES = 1_900_000  # of answers in the page (table and embedded data together); the page stays below 3 MB
LONGEST_IN_TABLE = 4_000  # characters of one answer in the table; picked pairs show up to LONGEST_PICKED
LONGEST_PICKED = 20_000
CELL_MARKUP_BYTES = 330  # what a table cell costs besides its text
QUADRANTS = ("both", "method", "base", "neither", "unjudged")
COLUMNS = (
    "prompt_index",
    "sample",
    "prompt",
    "family",
    "policy",
    "text",
    "reward",
    "gold",
    "kl",
    "nll_base",
    "length",
    "finish",
)


def cut(text: str, limit: int) -> str:
    """The text, or its first `limit` characters and how many were left out."""
    return (
        text
        if len(text) <= limit
        else f"{text[:limit]} … [{len(text) - limit:,} more characters, left out of this page]"
    )


@dataclass(frozen=True)
class Method:
    """One policy against the base: counts of the 2x2, net share of wins, picked pairs."""

    index: int  # position in compare.json
    name: str
    counts: dict[str, int]
    net: Estimate | None
    picked: list[dict[str, Any]]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def judged(self) -> int:
        return self.total - self.counts["unjudged"]


def read_method(index: int, name: str, pairs: Sequence[Pair], rule: GoodRule, seed: int) -> Method:
    counts = dict.fromkeys(QUADRANTS, 0)
    for pair in pairs:
        counts[rule.quadrant(pair)] += 1
    return Method(index, name, counts, net_wins(pairs, rule), [_picked(why, pair) for why, pair in picks(pairs, seed)])


def _picked(why: str, pair: Pair) -> dict[str, Any]:
    base, method = (cut(row["text"], LONGEST_PICKED) for row in pair)
    same = len(os.path.commonprefix([base, method])) if base != method else 0
    while 0 < same < min(len(base), len(method)) and base[same - 1].isalnum():
        same -= 1  # a shared beginning ends between words
    return {
        "why": why,
        "prompt": cut(pair[0]["prompt"], LONGEST_PICKED),
        "family": pair[0].get("family"),
        "where": f"prompt {pair[0]['prompt_index']}, sample {pair[0]['sample']}",
        "sides": [(row, text[:same], text[same:]) for row, text in zip(pair, (base, method), strict=True)],
        "difference": difference(pair),
        "identical": base == method,
    }


def difference(pair: Pair) -> float | None:
    a, b = number(pair[0].get("reward")), number(pair[1].get("reward"))
    return None if a is None or b is None else b - a


@dataclass(frozen=True)
class Table:
    """Rows that fit the page, one a (prompt, sample): the base's answer and each method's. `total`: rows of the run."""

    rows: list[dict[str, Any]]
    total: int


def read_table(samples: Sequence[Row], names: Sequence[str], rule: GoodRule, budget: int = BUDGET_BYTES) -> Table:
    """The rows in order of prompt and sample, until their size passes `budget` bytes."""
    base = names[0]
    cells: dict[tuple[int, int], dict[str, Row]] = {}
    for row in samples:
        cells.setdefault((row["prompt_index"], row["sample"]), {})[row["policy"]] = row
    ordered = [by_policy for _, by_policy in sorted(cells.items()) if base in by_policy]
    rows: list[dict[str, Any]] = []
    used = 0
    for by_policy in ordered:
        first = by_policy[base]
        used += sum(
            2 * len(json.dumps(cut(row["text"], LONGEST_IN_TABLE))) + CELL_MARKUP_BYTES for row in by_policy.values()
        )
        used += 2 * len(json.dumps(cut(first["prompt"], LONGEST_IN_TABLE)))
        if used > budget and rows:
            break
        methods = [
            {
                "index": i,
                "row": by_policy[name],
                "quadrant": rule.quadrant((first, by_policy[name])),
                "difference": difference((first, by_policy[name])),
            }
            for i, name in enumerate(names)
            if i > 0 and name in by_policy
        ]
        rows.append({"base": first, "methods": methods, "policies": by_policy})
    return Table(rows, len(ordered))


def payload(table: Table, names: Sequence[str]) -> str:
    """The table's answers as JSON for the download buttons; safe inside `<script type="application/json">`."""
    order = {name: i for i, name in enumerate(names)}
    rows = [
        [
            cut(row["text"], LONGEST_IN_TABLE)
            if key == "text"
            else cut(row["prompt"], LONGEST_IN_TABLE)
            if key == "prompt"
            else row.get(key)
            for key in COLUMNS
        ]
        for line in table.rows
        for row in sorted(line["policies"].values(), key=lambda row: order.get(row["policy"], len(order)))
    ]
    return safe_json({"columns": COLUMNS, "rows": rows})


def safe_json(value: Any) -> str:
    """Compact JSON in which no `</`, `<!--` or line separator can end or upset the script element that holds it."""
    dumped = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return dumped.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def read_methods(samples: Sequence[Row], names: Sequence[str], rule: GoodRule, seed: int) -> list[Method]:
    return [
        read_method(i, name, pair_rows(samples, names[0], name), rule, seed) for i, name in enumerate(names) if i > 0
    ]
