"""Builds the pages that come from the code: one a method (card, options, docstring), the commands, and the guide.

mkdocs runs this as a hook; nothing is written to the source folder, so a page cannot fall behind its method.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import io
import json
import os
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import ModuleType

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from trimtab import catalogue, cli, measure, merge
from trimtab.card import Card
from trimtab.policies import layers
from trimtab.rewards import REWARDS
from trimtab.spec import parse_spec

ROOT = Path(__file__).resolve().parent.parent
MERGING = {**merge.METHODS, **merge.TOOLS}
RESULTS = ROOT / "benchmarks" / "results" / "shootout.json"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The order of the pages; a new method appears by itself."""
    config.nav = [
        {"trimtab": "index.md"},
        {
            "Methods": [
                "methods/index.md",
                *(f"methods/{slug}.md" for slug in catalogue.METHODS if slug not in {**measure.METHODS, **MERGING}),
            ]
        },
        {
            "Merging": [
                "merging.md",
                "merge-inspect.md",
                "merge-run.md",
                "merging-skills.md",
                *(f"methods/{slug}.md" for slug in MERGING),
                "merging-sentiment.md",
                "mix-or-merge.md",
            ]
        },
        {"Measuring": ["measuring.md", *(f"methods/{slug}.md" for slug in measure.METHODS), "coverage.md"]},
        {"Rewards": "rewards.md"},
        {"The shoot-out": "shootout.md"},
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
        "rewards.md": _rewards,
        "coverage.md": lambda: _coverage().page(catalogue.cards(), RESULTS),
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
    for card in sorted(catalogue.cards(), key=lambda card: card.stage == "audit"):
        cells = (f"[{card.slug}]({card.slug}.md)", card.stage, ", ".join(card.status), card.access)
        rows.append(_row(*cells, card.infer_multiplier, card.summary))
    return "\n".join(rows) + "\n"


def _method(card: Card) -> str:
    method = catalogue.method(card.slug)
    module = importlib.import_module(method.__module__)
    parts = [f"# {card.name}", card.summary, f"Paper: {card.paper}. Status: {', '.join(card.status)}."]
    if card.example:
        parts.append(f"```bash\n{card.example}\n```")
    if card.choose:
        parts.append(f"## When to choose it\n\n{card.choose}")
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
    if measured := _measured(card.slug):
        parts.append(measured)
    if (written := ROOT / "docs" / "measured" / f"{card.slug}.md").exists():
        parts.append(written.read_text().strip())
    parts.append(f"## How it works\n\n```text\n{inspect.getdoc(module)}\n```")
    return "\n\n".join(parts) + "\n"


def _measured(slug: str) -> str:
    """The method's rows of the shoot-out, beside the model's own and best-of-n's at the same budget."""
    if not RESULTS.exists():
        return ""
    rows = []
    for world, entry in json.loads(RESULTS.read_text()).items():
        for budget, policies in entry["budgets"].items():
            names = [name for name in policies if any(parse_spec(part)[0] == slug for part in layers(name))]
            for name in ["base", "best-of-n", *names] if names else []:
                if name in policies and name in dict.fromkeys(["base", "best-of-n", *names]):
                    one = policies[name]
                    sized = ", ".join(
                        f"{key}={value:.3g}" for key, value in (one["budget"] or {"changes": {}})["changes"].items()
                    )
                    cells = (f"`{name}`{f' ({sized})' if sized else ''}", _figure(one["reward"]), _figure(one["gold"]))
                    rows.append(_row(world, budget if budget != "0" else "-", *cells, f"{one['tokens']:.0f}"))
    if not rows:
        return ""
    head = ["| model | budget | policy | reward | gold | tokens |", "|---|---|---|---|---|---|"]
    lines = "\n".join([*head, *dict.fromkeys(rows)])
    note = "From the [shoot-out](../shootout.md): ± is half of a 95 % interval, tokens are those of every model, an answer."
    return f"## Measured\n\n{lines}\n\n{note}"


def _rewards() -> str:
    """Every reward with its options and what its class says of itself."""
    parts = [
        "# Rewards",
        "A reward says how good an answer is: `--reward NAME[:key=value,...]` on the command line, "
        "`trimtab.rewards.parse_reward` in Python. A list inside a value is divided by `|`, a comma in a value is written "
        "`\\,`; `0.7*sentiment+0.3*length:target=30` is a weighted sum. A row that could not be judged has no score, and is "
        "never 0. `trimtab measure reward-benchmark` says how good a reward is.",
    ]
    for name, cls in REWARDS.items():
        parts.append(f"## {name}\n\n{inspect.getdoc(cls) or ''}")
        rows = [
            _row(f"`{key}`", help.type, "must be given" if help.default is None else f"`{help.default}`", help.help)
            for key, help in catalogue.field_help(cls).items()
            if not key.startswith("_")
        ]
        if rows:
            parts.append("\n".join(["| option | type | default | |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _coverage() -> ModuleType:
    """docs/coverage.py: mkdocs runs this file by its path, so its neighbour is loaded by its path too."""
    spec = importlib.util.spec_from_file_location("coverage_page", ROOT / "docs" / "coverage.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _figure(interval: dict[str, float | None] | None) -> str:
    if interval is None or interval["mean"] is None:
        return "-"
    half = "?" if interval["low"] is None else f"{(interval['high'] - interval['low']) / 2:.2f}"  # type: ignore[operator]
    return f"{interval['mean']:.2f} ±{half}"


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
