"""Builds the pages that come from the code: one a method (card, options, docstring), the commands, and the guide.

mkdocs runs this as a hook; nothing is written to the source folder, so a page cannot fall behind its method.
"""

from __future__ import annotations

import importlib
import inspect
import io
import os
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from trimtab import catalogue, cli
from trimtab.card import Card

ROOT = Path(__file__).resolve().parent.parent


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The order of the pages; a new method appears by itself."""
    config.nav = [
        {"trimtab": "index.md"},
        {"Methods": ["methods/index.md", *(f"methods/{slug}.md" for slug in catalogue.METHODS)]},
        {"Natural Control, measured": "natural-control.md"},
        {"Commands": "commands.md"},
        {"Resuming, files and errors": "runs.md"},
        {"Add a method": "add-a-method.md"},
        {"Changelog": "changelog.md"},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    pages: dict[str, Callable[[], str]] = {
        "methods/index.md": _methods,
        "commands.md": _commands,
        "add-a-method.md": lambda: _text("CONTRIBUTING.md"),
        "changelog.md": lambda: _text("CHANGELOG.md"),
    }
    pages |= {f"methods/{slug}.md": lambda slug=slug: _method(catalogue.card(slug)) for slug in catalogue.METHODS}
    for name, make in pages.items():
        files.append(File.generated(config, name, content=make()))
    return files


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _text(name: str) -> str:
    return (ROOT / name).read_text()


def _methods() -> str:
    rows = [
        "# Methods",
        "",
        "| method | stage | status | access | tokens per answer | what it does |",
        "|---|---|---|---|---|---|",
    ]
    for card in catalogue.cards():
        cells = (f"[{card.slug}]({card.slug}.md)", card.stage, ", ".join(card.status), card.access)
        rows.append(_row(*cells, card.infer_multiplier, card.summary))
    return "\n".join(rows) + "\n"


def _method(card: Card) -> str:
    method = catalogue.method(card.slug)
    module = importlib.import_module(method.__module__)
    parts = [f"# {card.name}", card.summary, f"Paper: {card.paper}. Status: {', '.join(card.status)}."]
    if card.example:
        parts.append(f"```bash\n{card.example}\n```")
    facts = {
        "goal": card.goal,
        "mechanism": card.mechanism,
        "signal": ", ".join(card.signal),
        "access": card.access,
        "produces": card.produces,
        "cost of an answer": card.infer_multiplier,
        "cost of the fit": card.fit_cost,
        "gain shows in": ", ".join(card.benefit_metrics),
        "price shows in": ", ".join(card.cost_metrics),
    }
    parts.append("\n".join(["| | |", "|---|---|", *(_row(*fact) for fact in facts.items())]))
    for title, items in (("Needs", card.needs), ("Limits", card.limits), ("Risks", card.risks)):
        if items:
            parts.append(f"## {title}\n\n" + "\n".join(f"- {item}" for item in items))
    options = [
        _row(f"`{name}`", help.type, "must be given" if help.default is None else f"`{help.default}`", help.help)
        for name, help in catalogue.options(card.slug).items()
    ]
    if options:
        parts.append("## Options\n\n" + "\n".join(["| option | type | default | |", "|---|---|---|---|", *options]))
    parts.append(f"## How it works\n\n```text\n{inspect.getdoc(module)}\n```")
    return "\n\n".join(parts) + "\n"


def _commands() -> str:
    os.environ["COLUMNS"] = "100"
    parts = ["# Commands", f"```text\n{_output([])}```"]
    parts += [f"## {verb}\n\n```text\n{_output([verb, '--help'])}```" for verb in cli.VERBS]
    return "\n\n".join(parts) + "\n"


def _output(words: list[str]) -> str:
    out = io.StringIO()
    with redirect_stdout(out), suppress(SystemExit):
        cli.main(words)
    return out.getvalue()
