"""The page of `trimtab measure --out DIR`: one self-contained HTML file beside measure.json, readable without a script."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from trimtab import catalogue
from trimtab.files import write_atomic, write_json
from trimtab.report.drawings import drawn
from trimtab.report.page import STYLES, clean, environment, resource

_SECTIONS = ("What it means", "What it does not mean", "When it misleads")


def write_measured(found: Mapping[str, Any], out: Path, command: Sequence[str]) -> None:
    """Writes measure.json and report.html into `out`, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "measure.json", {**found, "command": list(command)})
    write_atomic(out / "report.html", render(found, command))


def render(found: Mapping[str, Any], command: Sequence[str] = ()) -> str:
    """The page as HTML. The same input gives the same bytes."""
    found = clean(dict(found))
    card = catalogue.card(found["name"])
    return environment().get_template("measured.html.j2").render(
        found=found,
        name=found["name"],
        card=card,
        heads=found["measurements"][0]["table"][:3],
        about=about(found["name"]),
        command=shlex.join(command) if command else "",
        css=Markup("".join(resource(name) for name in STYLES)),
        drawn=drawn,
        Markup=Markup,
    )  # fmt: skip


def about(slug: str) -> list[str]:
    """The paragraphs of a diagnostic's docstring that say what it means, what not, and when it misleads."""
    module = inspect.cleandoc(sys.modules[catalogue.method(slug).__module__].__doc__ or "")
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", module)]
    wanted = [part for part in paragraphs if part.startswith(_SECTIONS)]
    return wanted or paragraphs[:1]
