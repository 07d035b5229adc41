"""What stands around the weights of a merged model: config, tokenizer, the recipe, and a card that says how it was made."""

from __future__ import annotations

from pathlib import Path

import yaml

from trimtab.files import dump_json
from trimtab.merge.plan import Plan
from trimtab.run import RunDirectory

RECIPE = "merge.yaml"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json",
    "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def write_around(plan: Plan, folder: RunDirectory, command: str) -> None:
    """Writes everything but the weights; config.json last, since it is what makes the folder a model."""
    for name in TOKENIZER_FILES:
        path = Path(plan.like.folder) / name
        if path.is_file():
            folder.save(name, path.read_bytes())
    folder.save(RECIPE, yaml.safe_dump(plan.recipe.to_dict(), sort_keys=False, allow_unicode=True))
    folder.save("config.json", dump_json(plan.config))
