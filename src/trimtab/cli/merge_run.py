"""`trimtab merge run`: a merge as a YAML file says, in our form (a merged folder's merge.yaml) or in mergekit's."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from typing import Any

from trimtab.cli.arguments import Parser
from trimtab.cli.merge import add_after, add_output, carry_out
from trimtab.cli.output import check_json
from trimtab.errors import UsageError

EXAMPLES = """\
  trimtab merge run merge.yaml --out merged
  trimtab merge run mergekit_config.yml --out merged --dtype float32
  trimtab merge run merged/merge.yaml --out again          # a merged folder's own recipe: the same bytes"""

# Options that stand for a key of the file where they are given; all of them have None as their default here.
KEYS = ("dtype", "work_dtype", "max_shard_size", "tokenizer", "chat_template", "untie", "seed")


def run(words: list[str]) -> None:
    """Reads the file, says what differs from mergekit, merges."""
    parser = Parser(
        "merge run",
        "Merges as a YAML file says: our own form (merge.yaml of any merged folder) or mergekit's configuration.\n"
        "Paths in it are relative to the working directory, as on the command line.",
        EXAMPLES,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="method and models, or merge_method and models or slices")
    add_output(parser)
    add_after(parser)
    parser.set_defaults(**dict.fromkeys(KEYS))
    for word in words:
        if (flag := word.partition("=")[0]).startswith("--") and flag not in parser.flags() and flag in _in_the_file():
            raise UsageError(f"{flag} stands in the file that trimtab merge run reads: change it there")
    args = parser.parse(words)
    check_json(args.json)

    recipe, notes = recipe_of(args.config)
    recipe = replace(recipe, **_given(args))
    for note in notes:
        print(f"trimtab: note: {note}", file=sys.stderr)
    carry_out(recipe, args, ["run", *words])


def recipe_of(path: str) -> tuple[Any, list[str]]:
    """A file's recipe, and notes on what mergekit would do otherwise."""
    from trimtab.merge.mergekit import is_mergekit, read_mergekit
    from trimtab.merge.recipe import Recipe, read_yaml

    data = read_yaml(path)
    try:
        if is_mergekit(data):
            read = read_mergekit(data)
            return read.recipe, read.notes
        return Recipe.from_dict(data), []
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _in_the_file() -> set[str]:
    """Options of `trimtab merge METHOD` that a file has in their place."""
    from trimtab import catalogue
    from trimtab.merge import METHODS

    keys = {"models", "base", "weights", *(key for method in METHODS for key in catalogue.options(method))}
    return {f"--{key.replace('_', '-')}" for key in keys}


def _given(args: Namespace) -> dict[str, Any]:
    return {key: value for key in KEYS if (value := getattr(args, key)) is not None}
