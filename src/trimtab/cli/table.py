"""A comparison as a table for the terminal: an interval beside every figure, the cost beside every quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.table import Table
from rich.text import Text

from trimtab.cli.output import console_for

_STYLE = {"better": "green", "worse": "red", "undecided": "yellow", "base": "dim"}
_QUALITY = ("reward", "gold", "wins vs base", "verdict", "KL/token", "NLL(base)", "diversity", "coherence", "length")
_COST = ("tokens fwd", "reward calls", "s/answer", "peak MB", "fit s", "fit tokens")


def print_table(result: Mapping[str, Any], file: TextIO) -> None:
    """Prints a comparison (the dict of compare.json): one table, or quality and cost apart on a narrow terminal."""
    rows = [cells(policy, result["policies"][0]) for policy in result["policies"]]
    title = (
        f"{result['model']} on {result['prompts']} prompts x {result['samples']} samples: "
        f"reward {result['reward']}, gold {result['gold'] or 'none'}, seed {result['seed']}"
    )
    whole = _table(rows, (*_QUALITY, *_COST))
    console, needed = console_for(whole, file)
    console.print(Text(title))
    if needed <= console.width:
        console.print(whole)
    else:
        console.print(_table(rows, _QUALITY))
        console.print(_table(rows, _COST))
    for line in budget_lines(result["policies"]):
        console.print(Text(line, style="yellow"))
    console.print(
        Text(
            "± is half of a 95% interval. Verdict: the paired difference to the base, by the gold score where there is "
            "one. KL in nats; ≤ marks a bound. Tokens forwarded are relative to the base.",
            style="dim",
        )
    )


def budget_lines(policies: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table has to say about the budget: how each policy was sized, and which do not meet it."""
    lines = []
    for policy in policies:
        if (budget := policy.get("budget")) is None:
            continue
        sized = ", ".join(f"{name}={value:.4g}" for name, value in budget["changes"].items()) or "as given"
        state = {True: "meets", False: "does not meet", None: "cannot be held against"}[budget["met"]]
        spent = "" if budget["spent"] is None else f" with {budget['spent']:.4g}"
        note = f" ({budget['note']})" if budget["note"] else ""
        lines.append(f"{policy['name']}: {sized} {state} {budget['kind']}={budget['amount']:g}{spent}{note}")
    return lines


def cells(policy: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, str]:
    """One policy's row as text, by column; '-' where there is no figure."""
    cost, base_tokens = policy["cost"], base["cost"]["tokens_forwarded_per_answer"]
    kl, bound = policy["kl_per_token"], policy["kl_bound"]
    return {
        "policy": policy["name"],
        "reward": _interval(policy["reward"]),
        "gold": _interval(policy["gold"]),
        "wins vs base": _interval(policy["win_rate"], 0, percent=True),
        "verdict": policy["verdict"],
        "KL/token": _interval(kl, 3) if kl is not None else "-" if bound is None else f"≤{bound:.2f}",
        "NLL(base)": _number(policy["nll_base_per_token"]),
        "diversity": _number(policy["diversity"], 3),
        "coherence": _number(policy.get("coherence")),
        "length": _number(policy["length_tokens"], 1),
        "tokens fwd": f"{cost['tokens_forwarded_per_answer'] / base_tokens:.1f}x" if base_tokens else "-",
        "reward calls": _number(cost["reward_calls_per_answer"], 0),
        "s/answer": _number(cost["seconds_per_answer"], 3),
        "peak MB": "-" if cost.get("peak_memory_bytes") is None else f"{cost['peak_memory_bytes'] / 1e6:,.0f}",
        "fit s": _number(cost["fit_seconds"], 1),
        "fit tokens": "-" if cost["fit_tokens"] is None else f"{cost['fit_tokens']:,.0f}",
    }


def _table(rows: list[dict[str, str]], columns: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("policy", no_wrap=True)
    columns = tuple(name for name in columns if any(row[name] != "-" for row in rows))
    for column in columns:
        table.add_column(column, justify="left" if column == "verdict" else "right", no_wrap=True)
    for row in rows:
        styled = [Text(row[name], style=_STYLE.get(row[name], "") if name == "verdict" else "") for name in columns]
        table.add_row(Text(row["policy"]), *styled)
    return table


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(estimate: Mapping[str, Any] | None, digits: int = 2, percent: bool = False) -> str:
    """mean ±half width; ±? where the interval is undefined (one prompt, no variance)."""
    if estimate is None or estimate["mean"] is None:
        return "-"
    form = f".{digits}{'%' if percent else 'f'}"
    undefined = estimate["low"] is None or estimate["high"] is None
    half = "?" if undefined else format((estimate["high"] - estimate["low"]) / 2, form)
    return f"{estimate['mean']:{form}} ±{half}"
