"""Measured behaviour of a pocket model, per task family, for its card and for the tests."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from trimtab.pocket.families import FAMILIES
from trimtab.pocket.judge import Verdict, judge
from trimtab.pocket.task import Task

BEHAVIOURS = ("right", "wrong", "refuses", "complies", "evades", "garbled")
ASPECTS = ("helpful", "honest", "harmless", "sentiment", "correct", "score")


def judged(tasks: Sequence[Task], answers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per family and "all": the rate of each behaviour; mean, half-width (95 %, normal) and count of each aspect."""
    verdicts = [judge(task.prompt, answer) for task, answer in zip(tasks, answers, strict=True)]
    found: dict[str, dict[str, Any]] = {}
    for family in (*FAMILIES, "all"):
        rows = [v for t, v in zip(tasks, verdicts, strict=True) if family in (t.family, "all")]
        if rows:
            found[family] = _summary(rows)
    return found


def _summary(rows: Sequence[Verdict]) -> dict[str, Any]:
    counts = Counter(v.behaviour for v in rows)
    aspects: dict[str, Any] = {}
    for name in ASPECTS:
        values = [value for v in rows if (value := getattr(v, name)) is not None]
        aspects[name] = {"n": len(values), "mean": round(statistics.fmean(values), 4)} if values else None
        if len(values) > 1:
            aspects[name]["half_width"] = round(1.96 * statistics.stdev(values) / math.sqrt(len(values)), 4)
    return {"n": len(rows), "rates": {b: round(counts[b] / len(rows), 4) for b in BEHAVIOURS}, "aspects": aspects}


def table(measured: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a family; rates in per cent, aspects as means."""
    head = ["family", "n", *BEHAVIOURS, *ASPECTS]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for family in (name for name in (*FAMILIES, "all") if name in measured):
        row = measured[family]
        rates = [f"{100 * row['rates'][b]:.0f} %" for b in BEHAVIOURS]
        aspects = ["-" if row["aspects"][a] is None else f"{row['aspects'][a]['mean']:.2f}" for a in ASPECTS]
        lines.append("| " + " | ".join([family, str(row["n"]), *rates, *aspects]) + " |")
    return "\n".join(lines)


def accuracy(right: Sequence[bool]) -> dict[str, Any]:
    """Share of True with its 95 % half-width (normal)."""
    share = sum(right) / len(right)
    return {
        "n": len(right),
        "accuracy": round(share, 4),
        "half_width": round(1.96 * math.sqrt(share * (1 - share) / len(right)), 4),
    }
