"""The side-effect panel as one picture: a row a line of the panel, a column a policy, what moved and whether for good."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from trimtab.report.svg import element, figure, num, shorten, text, title

_SIGNS = {"better": "▲", "worse": "▼", "undecided": "·", "changed": "●", "": "·"}


def moved(one: Mapping[str, Any]) -> str:
    """The lines whose verdict is not undecided, in words."""
    found: dict[str, list[str]] = {}
    for change in one["changes"]:
        if change["verdict"] in ("better", "worse", "changed"):
            found.setdefault(change["verdict"], []).append(change["label"])
    said = [f"{verdict}: {', '.join(found[verdict])}" for verdict in ("better", "worse", "changed") if verdict in found]
    return "; ".join(said) or "nothing moved beyond its interval"


def picture(effects: Mapping[str, Any] | None) -> str:
    """The verdicts of all policies side by side; an empty string where there is nothing to compare."""
    compared = list((effects or {}).get("comparisons") or [])
    labels = list(dict.fromkeys(c["label"] for one in compared for c in one["changes"] if c["verdict"]))
    if not compared or not labels:
        return ""
    left, cell, high = 190.0, min(150.0, max(44.0, 700.0 / len(compared))), 27.0
    names = [shorten(one["first"], 26) for one in compared]
    top = 16.0 + 5.2 * max(map(len, names))
    parts = []
    for c, name in enumerate(names):
        x, y = left + (c + 0.5) * cell, top - 8
        turn = f"rotate(-55 {num(x)} {num(y)})"
        parts.append(
            element("text", title(compared[c]["first"]), escape(name), x=x, y=y, class_="tick", transform=turn)
        )
    for r, label in enumerate(labels):
        y = top + r * high
        parts.append(element("path", d=f"M10 {num(y)}H{num(left + cell * len(compared))}", class_="grid"))
        parts.append(text(left - 12, y + 18, shorten(label, 24), "", "end"))
        for c, one in enumerate(compared):
            change = next((found for found in one["changes"] if found["label"] == label), None)
            if change is None or change["difference"] is None:
                continue
            x = left + (c + 0.5) * cell
            mark = {"better": "steered", "worse": "other", "changed": "base"}.get(change["verdict"], "")
            span = f" [{change['low']:.3g}, {change['high']:.3g}]" if change["low"] is not None else ""
            tip = title(f"{one['first']}, {label}: {change['difference']:+.3g}{span}, {change['verdict']}")
            sign = element("tspan", _SIGNS[change["verdict"]], class_=f"sign {mark}")
            value = element("tspan", f" {change['difference']:+.2f}".replace("-", "−") if cell >= 60 else "")
            parts.append(
                element("text", tip, sign, value, x=x, y=y + 18, text_anchor="middle", class_=None if mark else "tick")
            )
    told = "; ".join(f"{one['first']}: {moved(one)}" for one in compared)
    width, height = left + cell * len(compared) + 60, top + high * len(labels) + 8
    drawing = figure(max(width, 900.0), height, f"Side effects against the base. {told}", *parts)
    return f"<figure><figcaption>Against the base, line by line</figcaption>{drawing}</figure>"
