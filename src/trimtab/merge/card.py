"""What stands around the weights of a merged model: config, tokenizer, the recipe, and a card that says how it was made.

    DIR/README.md      the model card: what was merged, how, from which bytes, and the command that makes it again
    DIR/merge.yaml     the recipe, which `trimtab merge run` reads
    DIR/config.json    last: it is what makes the folder a model

The same merge gives the same bytes: no time, no machine, no path but those that the user wrote.
"""

from __future__ import annotations

from pathlib import PurePath

import yaml

from trimtab import __version__, catalogue
from trimtab.files import dump_json
from trimtab.merge.plan import Plan
from trimtab.merge.source import Source
from trimtab.merge.vocabulary import FILES, SLOW
from trimtab.run import RunDirectory

RECIPE = "merge.yaml"
CARD = "README.md"
TOKENIZER_FILES = (*FILES, *SLOW)


def write_around(plan: Plan, folder: RunDirectory, command: str) -> None:
    """Writes everything but the weights; config.json last, since it is what makes the folder a model."""
    for name, found in plan.tokenizer.items():
        folder.save(name, found if isinstance(found, bytes) else found.read_bytes())
    folder.save(RECIPE, plan.recipe.to_yaml())
    folder.save(CARD, model_card(plan, command))
    folder.save("config.json", dump_json(plan.config))


def model_card(plan: Plan, command: str) -> str:
    """The README.md of a merged model, in Markdown with the front matter that model hubs read."""
    recipe, card = plan.recipe, catalogue.card(plan.recipe.method)
    parents = plan.parents
    names = ", ".join(_code(model.name) for model in plan.models)
    onto = f" onto {_code(plan.base.name)}" if plan.base is not None else ""
    front = {
        "base_model": list(dict.fromkeys(_short(source.name) for source in parents)),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "trimtab", recipe.method],
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        "# A merged model",
        "",
        f"{card.name} of {names}{onto}. {card.summary} Made by trimtab {__version__} without training.",
        "",
        "## How it was made",
        "",
        f"`{RECIPE}`:",
        "",
        "```yaml",
        recipe.to_yaml().rstrip(),
        "```",
        "",
        "| parent | part | fingerprint |",
        "|---|---|---|",
        *(_row(source, number, plan) for number, source in enumerate(parents, 1)),
        "",
        "A fingerprint is of a checkpoint's names, shapes and a sample of every tensor's bytes.",
        "",
    ]
    lines += ["The command:", "", "```bash", command, "```", ""] if command else []
    lines += [
        f"Again, from the recipe in this folder (here DIR), with trimtab {__version__} and the parents at the same paths "
        "(relative ones count from the directory in which the command is given):",
        "",
        "```bash",
        f"trimtab merge run DIR/{RECIPE} --out again",
        "```",
        "",
    ]
    if plan.warnings:
        lines += ["## Warnings", "", *(f"- {' '.join(text.split())}" for text in plan.warnings), ""]
    lines += [
        "## Limits",
        "",
        *(f"- {limit[:1].upper()}{limit[1:]}." for limit in card.limits),
        "- A merge has not been evaluated by being made. `trimtab measure` and `trimtab merge ... --evaluate` do that.",
        "- The licences of all parents apply.",
        "",
    ]
    return "\n".join(lines)


def _row(source: Source, number: int, plan: Plan) -> str:
    part = "base" if number > len(plan.models) else f"model {number}"
    return f"| {_code(source.name)} | {part} | `{source.fingerprint}` |"


def _short(name: str) -> str:
    """A name for the front matter: absolute paths are of no use to others, their last part is."""
    return PurePath(name).name if PurePath(name).is_absolute() else name


def _code(text: str) -> str:
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"
