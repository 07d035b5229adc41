"""One vocabulary, tokenizer and chat template for all parents, as --tokenizer and --chat-template say, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import UsageError, unknown
from trimtab.merge.heads import embedding_of, set_setting, setting, token_tensors
from trimtab.merge.recipe import Recipe
from trimtab.merge.remapped import remap
from trimtab.merge.source import Source
from trimtab.merge.vocabulary import (
    Template,
    Vocabulary,
    differences,
    read_vocabularies,
    tokenizer_files,
    unite,
)

Files = dict[str, Path | bytes]


def common_tokens(
    sources: list[Source], recipe: Recipe, whole: bool, config: dict[str, Any], problems: list[str], warnings: list[str]
) -> tuple[list[Source], Files, bool]:
    """The sources with the rows of one vocabulary, the output's tokenizer files, and whether vocabularies were refused.

    sources: the base, if there is one, and the models. Sets the config's vocab_size and token ids; adds to problems and
    warnings. whole False: some parents could not be opened, so a choice by name may mean one of those.
    """
    try:
        vocabularies = read_vocabularies(sources)
    except UsageError as error:
        problems.append(str(error))
        return sources, {}, False
    known = [one for one in vocabularies if one is not None]
    if not known:
        if len(sources) > 1:
            warnings.append("no parent has a tokenizer: their rows are taken to be of the same tokens")
        generation = sources[0].folder / "generation_config.json"
        return sources, {generation.name: generation} if generation.is_file() else {}, False
    template = _template(known, recipe, problems)
    rows = [_rows(source) for source in sources]
    if not recipe.tokenizer:
        found = _same(sources, vocabularies, rows, recipe, warnings)
        problems += found
        return sources, tokenizer_files(known[0], None, template), bool(found)
    missing = [source.name for source, one in zip(sources, vocabularies, strict=True) if one is None]
    if missing:
        problems.append(
            f"{missing[0]!r} has no tokenizer, which --tokenizer {recipe.tokenizer} needs: copy its files there"
        )
    unseen = [source.name for source, count in zip(sources, rows, strict=True) if not count]
    if unseen:
        problems.append(f"no tensor of {unseen[0]!r} is named like token embeddings: leave --tokenizer out")
    try:
        place = _chosen(recipe, whole)
    except UsageError as error:
        problems.append(str(error))
        return sources, {}, True
    if missing or unseen or not whole:
        return sources, {}, True
    if place is None:
        try:
            ids, united, notes = unite(known, rows)
        except UsageError as error:
            problems.append(str(error))
            return sources, {}, True
        warnings += notes
        place, count = 0, max(rows[0], max(ids.values(), default=-1) + 1)
        files = tokenizer_files(known[0], united, template)
    else:
        ids, count = known[place].owned(rows[place]), rows[place]
        files = tokenizer_files(known[place], None, template)
    owned = [one.owned(number) for one, number in zip(known, rows, strict=True)]
    tensors = sorted({name for source in sources for name in token_tensors(source)})
    base = 0 if recipe.base is not None else None
    set_setting(config, "vocab_size", count)
    if place:
        _take_ids(config, sources[place].config)
    return remap(sources, base, owned, rows, tensors, ids, count), files, False


def _rows(source: Source) -> int:
    embedding = embedding_of(source.entries)
    return source.entries[embedding].shape[0] if embedding is not None else 0


def _chosen(recipe: Recipe, whole: bool) -> int | None:
    """The place, among the sources, of the parent whose vocabulary is taken; None: the union."""
    wanted, based = recipe.tokenizer, recipe.base is not None
    if wanted == "union":
        return None
    if wanted == "base":
        if not based:
            raise UsageError("--tokenizer base needs a --base; or name one of the models, or give union")
        return 0
    if wanted in recipe.models:
        return recipe.models.index(wanted) + based
    if wanted == recipe.base:
        return 0
    raise unknown("choice for --tokenizer", wanted, {"union", *(["base"] if based else []), *recipe.models})


def _choices(recipe: Recipe) -> str:
    return f"{'base, ' if recipe.base is not None else ''}union or one of the models"


def _same(
    sources: Sequence[Source],
    vocabularies: Sequence[Vocabulary | None],
    rows: Sequence[int],
    recipe: Recipe,
    warnings: list[str],
) -> list[str]:
    """Problems where parents differ in their vocabulary, its rows or the tokens with a role."""
    problems = []
    first = next(place for place, one in enumerate(vocabularies) if one is not None)
    like = vocabularies[first]
    assert like is not None
    embedding = embedding_of(sources[first].entries)
    for place, (source, one) in enumerate(zip(sources, vocabularies, strict=True)):
        if place == first:
            continue
        if one is None:
            warnings.append(
                f"{source.name!r} has no tokenizer: its rows are taken to be of the tokens of {like.name!r}"
            )
        said = (
            [differences(like.owned(rows[first]), one.owned(rows[place]), like.name, one.name)]
            if one is not None
            else []
        )
        if rows[place] != rows[first] and embedding is not None and embedding in source.entries:
            shapes = sources[first].entries[embedding].shape, source.entries[embedding].shape
            said.append(f"{embedding!r} has the shape {shapes[0]} in {like.name!r} and {shapes[1]} in {source.name!r}")
        if any(said):
            words = ", ".join(text for text in said if text)
            problems.append(
                f"{source.name!r} has another vocabulary than {like.name!r}: {words}: give --tokenizer {_choices(recipe)}"
            )
            continue
        special = one.special if one is not None else {}
        roles = _roles(like.special, special, like.name, source.name, pad=False)
        if roles:
            problems.append(f"{roles}: give --tokenizer {_choices(recipe)}")
        elif one is not None and one.splitting() != like.splitting():
            warnings.append(
                f"{source.name!r} splits text otherwise than {like.name!r}, whose tokenizer the merged model gets"
            )
        pads = _roles(like.special, special, like.name, source.name, pad=True)
        if pads:
            warnings.append(f"{pads}: the merged model has that of {like.name!r}")
    return problems


def _roles(one: Mapping[str, str], two: Mapping[str, str], first: str, second: str, pad: bool) -> str:
    return ", ".join(
        f"{key} is {one[key]!r} in {first!r} and {two[key]!r} in {second!r}"
        for key in sorted(one.keys() & two.keys())
        if one[key] != two[key] and (key == "pad_token") == pad
    )


def _template(known: Sequence[Vocabulary], recipe: Recipe, problems: list[str]) -> Template:
    """The output's chat template; a problem where parents differ and none was chosen."""
    wanted = recipe.chat_template
    if wanted == "none":
        return None
    if wanted in (*recipe.models, recipe.base, "base"):
        name = recipe.base if wanted == "base" else wanted
        found = next((one for one in known if one.name == name), None)
        if name is None or (found is None and recipe.base is None):
            problems.append("--chat-template base needs a --base; or name one of the models, or give none")
        elif found is None:
            problems.append(
                f"{name!r} has no tokenizer to take a chat template from: give --chat-template none or another"
            )
        return found.template if found is not None else None
    if wanted:
        problems.append(str(unknown("choice for --chat-template", wanted, {"none", "base", *recipe.models})))
        return None
    other = next((one for one in known if one.template != known[0].template), None)
    if other is not None:
        have = [f"{one.name!r} has {'one' if one.template else 'none'}" for one in (known[0], other)]
        both = f"{known[0].name!r} and {other.name!r} have different ones"
        said = both if known[0].template and other.template else " and ".join(have)
        choices = f"{'base, ' if recipe.base is not None else ''}none or one of the models"
        problems.append(f"chat templates differ ({said}): give --chat-template {choices}")
    return known[0].template


def _take_ids(config: dict[str, Any], other: Mapping[str, Any]) -> None:
    """The ids that a config gives to tokens, from the model whose vocabulary is taken."""
    for part in (config, config.get("text_config")):
        for key in [key for key in part or () if key.endswith(("_token_id", "_token_ids"))]:
            set_setting(config, key, setting(other, key))
    for key, value in other.items():
        if key.endswith(("_token_id", "_token_ids")):
            config[key] = value
