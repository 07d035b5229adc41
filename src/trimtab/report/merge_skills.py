"""The pages of `trimtab merge --evaluate` (skills.html) and `trimtab merge search` (search.html)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

import trimtab
from trimtab.files import write_atomic
from trimtab.report.drawings import drawn
from trimtab.report.page import STYLES, clean, environment, resource


def render(found: Mapping[str, Any], command: Sequence[str] = ()) -> str:
    """The page of an evaluation as HTML. The same input gives the same bytes."""
    return _page(skills=clean(dict(found)), searched=None, command=command)


def render_search(found: Mapping[str, Any], command: Sequence[str] = ()) -> str:
    """The page of a search as HTML."""
    plain = clean(dict(found))
    return _page(skills=plain["test"], searched=plain, command=command)


def write_search(found: Mapping[str, Any], out: str | Path, command: Sequence[str] = ()) -> None:
    """Writes search.html beside search.json."""
    write_atomic(Path(out) / "search.html", render_search(found, command))


def _page(skills: Any, searched: Any, command: Sequence[str]) -> str:
    figures = [_dots(line) for line in skills["lines"]] if skills else []
    if searched:
        figures.insert(0, _trials(searched))
    return environment().get_template("merge_skills.html.j2").render(
        skills=skills, searched=searched, command=shlex.join(command), css=Markup("".join(resource(name) for name in STYLES)),
        drawn=drawn, figures=figures, Markup=Markup, version=trimtab.__version__,
    )  # fmt: skip


def _dots(line: Mapping[str, Any]) -> dict[str, Any]:
    dots = [(one["name"], one["value"], one["low"], one["high"]) for one in line["models"]]
    base = next((one["value"] for one in line["models"] if one["kind"] == "base"), None)
    return {
        "kind": "dots", "title": f"{line['name']}: {line['label']}", "x": line["label"], "dots": dots,
        "reference": [] if base is None else [("base", base)], "note": "",
    }  # fmt: skip


def _trials(found: Mapping[str, Any]) -> dict[str, Any]:
    dots = [
        (f"{row['trial']}: {row['settings']}", row["score"], row["low"], row["high"]) for row in found["trials"][:40]
    ]
    plain = next(row["score"] for row in found["trials"] if row["trial"] == 0)
    return {
        "kind": "dots", "title": "Trials, best first", "x": "validation score", "dots": dots,
        "reference": [("default", plain)], "note": "Selected on these texts: the best is too good on others.",
    }  # fmt: skip
