"""Prints what became of skills, and the trials of a search, as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table
from rich.text import Text

from trimtab.cli.measured import interval, number
from trimtab.cli.output import console_for

_STYLE = {"better": "green", "worse": "red"}


@dataclass
class Evaluation:
    """What `--evaluate` asks for: skills that are known to work on the parents before anything is merged."""

    skills: list[Any]
    subjects: Any

    @classmethod
    def before(cls, specs: Sequence[str], recipe: Any, out: str, say: Callable[[str], None]) -> Evaluation:
        """UsageError for a skill that is none or cannot be measured on the parents, for a bad recipe, for a taken `out`."""
        from trimtab.merge.plan import make_plan
        from trimtab.merge.skills import Skill, Subjects, measure_before
        from trimtab.run import RunDirectory

        skills = [Skill.parse(spec) for spec in specs]
        plan = make_plan(recipe)
        RunDirectory.check(out, "merge", recipe.to_dict(), plan.inputs)  # before minutes of measuring
        subjects = Subjects.of(recipe.models, recipe.base)
        measure_before(skills, subjects, say)
        return cls(skills, subjects)

    def of(self, merged: Path, say: Callable[[str], None], command: Sequence[str]) -> dict[str, Any]:
        """The table as JSON values; also in skills.json and skills.html in the model's report/."""
        from trimtab.merge.after import FOLDER
        from trimtab.merge.skills import evaluate, write_skills

        found = evaluate(self.skills, self.subjects, merged, say)
        write_skills(found, merged / FOLDER, command)
        return found


def print_skills(found: Mapping[str, Any], stream: TextIO) -> None:
    """One block a line of a skill: the merge, then each model with the merge's paired difference to it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("skill", "model", "value", "95 % interval", "merge minus it", "interval", "the merge is", "gain kept"):
        table.add_column(name, justify="left" if name in ("skill", "model", "the merge is") else "right")
    for line in found["lines"]:
        good = {"higher": "more is better, ", "lower": "less is better, "}.get(line["better"], "")
        alike = sum((one["name"], one["label"]) == (line["name"], line["label"]) for one in found["lines"]) > 1
        name = line["skill"] if alike else line["name"]
        titles = [f"{name}: {line['label']}", f"{good}{line['n']} {line['unit']}s"]
        for place, one in enumerate(line["models"]):
            table.add_row(
                Text(titles[place] if place < 2 else "", style="dim" if place else ""),
                Text(one["name"] + (" (base)" if one["kind"] == "base" else "")),
                number(one["value"]), interval(one["low"], one["high"]), number(one["difference"], signed=True)
                if one["difference"] is not None else "", interval(one["difference_low"], one["difference_high"])
                if one["difference"] is not None else "", Text(one["verdict"], style=_STYLE.get(one["verdict"], "")),
                kept_text(one["kept"]) + (" *" if one["name"] == line["specialist"] else ""),
            )  # fmt: skip
    console, _ = console_for(table, stream)
    console.print(Text("What the skills became", style="bold"))
    console.print(table)
    if any(line["specialist"] for line in found["lines"]):
        console.print(Text("* the parent that gained most: gain kept = (merge - base) / (parent - base)", style="dim"))
    _notes(console, found)


def print_search(found: Mapping[str, Any], stream: TextIO, most: int = 10) -> None:
    """The trials, best first, and what can be said of the best."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("trial", "settings", "score", "95 % interval", "minus default", "interval", "verdict"):
        table.add_column(name, justify="left" if name in ("settings", "verdict") else "right")
    shown = [row for place, row in enumerate(found["trials"]) if place < most or row["trial"] == 0]
    for row in shown:
        table.add_row(
            str(row["trial"]), Text(row["settings"]), number(row["score"]), interval(row["low"], row["high"]),
            "" if row["difference"] is None else number(row["difference"], signed=True),
            "" if row["difference"] is None else interval(row["difference_low"], row["difference_high"]),
            Text(row["verdict"], style=_STYLE.get(row["verdict"], "")),
        )  # fmt: skip
    console, _ = console_for(table, stream)
    console.print(Text(f"{found['method']}: {len(found['trials'])} trials, best first", style="bold"))
    console.print(table)
    if len(shown) < len(found["trials"]):
        console.print(Text(f"{len(found['trials']) - len(shown)} more are in search.json", style="dim"))
    parents = ", ".join(f"{name} {number(score)}" for name, score in found["parents"].items())
    console.print(Text(f"scores of the parents and the base: {parents}", style="dim"))
    _notes(console, found)
    if found["test"] is not None:
        print(file=stream)
        print_skills(found["test"], stream)


def kept_text(kept: Mapping[str, Any] | None) -> str:
    if kept is None:
        return ""
    bounds = "" if kept["low"] is None else f" [{100 * kept['low']:.0f}, {100 * kept['high']:.0f}]"
    return f"{100 * kept['share']:.0f} %{bounds}"


def _notes(console: Any, found: Mapping[str, Any]) -> None:
    for note in found.get("notes", ()):
        console.print(Text(note, style="dim"))
    for warning in found.get("warnings", ()):
        console.print(Text(f"warning: {warning}", style="yellow"))
