"""Vocabularies of the parents: read from their tokenizers' files, compared, and made one.

    --tokenizer base     the base's tokenizer and vocabulary
    --tokenizer MODEL    that model's
    --tokenizer union    the base's (without one, the first model's), with the tokens that the others have more

A union keeps all ids of the tokenizer it begins with and puts new tokens after them. Tokens that another model had *added* to
its tokenizer (<|im_start|> and the like) are added tokens in the union, and are found in text. Ordinary pieces of another
vocabulary get a row and an id, so the merged model may write them; but text is still split as the first tokenizer splits it:
two lists of BPE merges do not make a third, and as added tokens such pieces would cut words in two. A Unigram vocabulary is a
list of scores that sum to something, so ordinary pieces cannot join it.

What is compared is token -> id, whatever else in the files differs. Chat templates are chosen on their own (--chat-template).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.errors import UsageError
from trimtab.merge.source import Source, read_json

JSON, CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
# What belongs to a tokenizer; generation_config.json is among them because it names tokens by their ids.
FILES = (JSON, CONFIG, SPECIAL, *TEMPLATES, "generation_config.json")
SLOW = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model", "spiece.model")  # the same, in older forms
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")

Template = str | dict[str, str] | None


@dataclass
class Vocabulary:
    """A tokenizer. ids: token -> id, all of them; added: those outside its model, as tokenizer.json has them."""

    name: str
    folder: Path
    ids: dict[str, int]
    added: dict[str, dict[str, Any]]
    data: dict[str, Any] | None  # tokenizer.json; None where there is none
    special: dict[str, str] = field(default_factory=dict)
    template: Template = None

    def owned(self, rows: int) -> dict[str, int]:
        """The tokens that have one of `rows` rows: a tokenizer may know more than its model."""
        return {token: number for token, number in self.ids.items() if 0 <= number < rows}

    def splitting(self) -> str:
        """A hash of all that decides which tokens a text becomes, but for the vocabulary itself."""
        data = self.data or {}
        model = {key: value for key, value in (data.get("model") or {}).items() if key not in ("vocab", "dropout")}
        if model.get("merges"):  # "a b" in older files
            model["merges"] = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
        parts = {key: value for key, value in model.items() if value not in (None, False, "")}
        ends = _added_around(data.get("post_processor"))
        text = json.dumps([parts, data.get("normalizer"), data.get("pre_tokenizer"), ends], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def read_vocabularies(sources: Sequence[Source]) -> list[Vocabulary | None]:
    """Each source's tokenizer; None for a folder without one. Equal files are parsed once. UsageError if damaged."""
    parsed: dict[str, Vocabulary] = {}
    return [_read(source, parsed) for source in sources]


def _read(source: Source, parsed: dict[str, Vocabulary]) -> Vocabulary | None:
    folder, path = source.folder, source.folder / JSON
    if not path.is_file():
        return _slow(source) if any((folder / name).is_file() for name in SLOW) else None
    try:
        text = path.read_bytes()
        digest = hashlib.sha256(text).hexdigest()
        if digest not in parsed:
            parsed[digest] = _parse(json.loads(text))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"the model {source.name!r}: {JSON} cannot be read ({error})") from error
    found = parsed[digest]
    return Vocabulary(source.name, folder, found.ids, found.added, found.data, _special(source), _template(source))


def _parse(data: dict[str, Any]) -> Vocabulary:
    pieces = data["model"]["vocab"]
    ids = dict(pieces) if isinstance(pieces, dict) else {piece: number for number, (piece, _) in enumerate(pieces)}
    added = {one["content"]: one for one in data.get("added_tokens") or []}
    ids |= {token: one["id"] for token, one in added.items()}
    if not all(isinstance(number, int) for number in ids.values()):
        raise ValueError("an id is no whole number")
    return Vocabulary("", Path(), ids, added, data)


def _slow(source: Source) -> Vocabulary:
    """A tokenizer in an older form: transformers knows how to read those."""
    from transformers import AutoTokenizer

    try:
        ids = dict(AutoTokenizer.from_pretrained(source.folder).get_vocab())
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"the model {source.name!r} has no {JSON}, and its other files give no tokenizer ({first})"
        ) from error
    return Vocabulary(source.name, source.folder, ids, {}, None, _special(source), _template(source))


def _special(source: Source) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in (SPECIAL, CONFIG):
        if (source.folder / name).is_file():
            data = read_json(source.folder / name, source.name)
            for key in NAMED:
                value = data.get(key)
                value = value.get("content") if isinstance(value, dict) else value
                if isinstance(value, str):
                    found[key] = value
    return found


def _template(source: Source) -> Template:
    """A chat template, or several by name; one that is called default is just that."""
    path = source.folder / TEMPLATES[0]
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found: Any = None
    for name in (TEMPLATES[1], CONFIG):
        if found is None and (source.folder / name).is_file():
            found = read_json(source.folder / name, source.name).get("chat_template")
    if isinstance(found, list):
        named = {str(one.get("name")): str(one.get("template")) for one in found if isinstance(one, dict)}
        return named["default"] if set(named) == {"default"} else named or None
    return found if isinstance(found, str) else None


def _added_around(processor: Any) -> Any:
    """The template of tokens that a tokenizer puts around a text."""
    if not isinstance(processor, dict):
        return None
    inner = [found for one in processor.get("processors") or [] if (found := _added_around(one)) is not None]
    return processor.get("single") or (inner or None)


def differences(one: Mapping[str, int], two: Mapping[str, int], first: str, second: str) -> str:
    """How two vocabularies differ, in words; "" if they do not."""
    if one == two:
        return ""
    said = []
    for mine, other, who, whose in ((one, two, first, second), (two, one, second, first)):
        more = sorted(mine.keys() - other.keys(), key=lambda token: mine[token])
        if more:
            said.append(f"{len(more)} tokens of {who!r} are not in {whose!r} (first {more[0]!r})")
    moved = [token for token, number in one.items() if token in two and two[token] != number]
    if moved:
        token = min(moved, key=lambda token: one[token])
        said.append(
            f"{len(moved)} tokens have other ids (first {token!r}, {one[token]} in {first!r} and {two[token]} in {second!r})"
        )
    return ", ".join(said)


def unite(vocabularies: Sequence[Vocabulary], rows: Sequence[int]) -> tuple[dict[str, int], bytes, list[str]]:
    """The union: its token -> id, its tokenizer.json, and what should be known of it. rows: how many each model has.

    The first vocabulary is the one that the union begins with. UsageError where a union cannot be made.
    """
    first = vocabularies[0]
    if first.data is None:
        raise UsageError(
            f"--tokenizer union needs a {JSON}, which {first.name!r} lacks: save its tokenizer with transformers 4 or later"
        )
    data: dict[str, Any] = json.loads(json.dumps(first.data))
    ids = first.owned(rows[0])
    number = (
        max(first.ids.values(), default=-1) + 1
    )  # ids without a row stay unused: their tokens would be found in text
    notes, fresh = [], {}
    for vocabulary, count in zip(vocabularies[1:], rows[1:], strict=True):
        more = [
            token
            for token in sorted(vocabulary.owned(count), key=lambda t: vocabulary.ids[t])
            if token not in first.ids
        ]
        # A token that the first tokenizer knows, but its model has no row for.
        ids |= {token: first.ids[token] for token in vocabulary.owned(count) if token in first.ids}
        ordinary = [token for token in more if token not in vocabulary.added]
        if ordinary and not isinstance(data["model"]["vocab"], dict):
            raise UsageError(
                f"{vocabulary.name!r} has {len(ordinary)} ordinary tokens (first {ordinary[0]!r}) that the Unigram tokenizer "
                f"of {first.name!r} cannot take in: give --tokenizer base or a model"
            )
        if ordinary and data["model"].get("type") == "BPE":
            notes.append(
                f"{len(ordinary)} ordinary tokens of {vocabulary.name!r} (first {ordinary[0]!r}) have rows in the union, but "
                f"text is split as {first.name!r} splits it"
            )
        for token in more:
            if token not in fresh:
                fresh[token] = number
                number += 1
                if token in vocabulary.added:
                    data["added_tokens"] = [
                        *(data.get("added_tokens") or []),
                        {**vocabulary.added[token], "id": fresh[token]},
                    ]
    known = {**first.ids, **fresh}
    if isinstance(data["model"]["vocab"], dict) and fresh:
        data["model"]["vocab"] = dict(sorted(known.items(), key=lambda item: item[1]))
    text = json.dumps(data, ensure_ascii=False, indent=2)
    _check_united(text, known, first.name)
    return {**ids, **fresh}, text.encode(), notes


def _check_united(text: str, ids: Mapping[str, int], name: str) -> None:
    """The library has rules of its own for ids of added tokens: what it makes of the file is what counts."""
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except Exception as error:
        raise UsageError(
            f"the tokenizer of {name!r} takes in no more tokens ({error}): give --tokenizer base or a model"
        ) from error
    wrong = sorted(token for token, number in ids.items() if found.get(token) != number)
    if wrong:
        raise UsageError(
            f"the tokenizer of {name!r} gives {wrong[0]!r} the id {found.get(wrong[0])} in a union, not {ids[wrong[0]]}: "
            "give --tokenizer base or a model"
        )


def tokenizer_files(chosen: Vocabulary, united: bytes | None, template: Template) -> dict[str, Path | bytes]:
    """The output's tokenizer: file name -> where it is copied from, or its bytes. united: a generated tokenizer.json."""
    names = FILES if united is not None else (*FILES, *SLOW)
    found: dict[str, Path | bytes] = {name: chosen.folder / name for name in names if (chosen.folder / name).is_file()}
    if united is not None:
        found[JSON] = united
    changed = read_json(chosen.folder / CONFIG, chosen.name) if CONFIG in found else {}
    before = json.dumps(changed)
    decoder = changed.get("added_tokens_decoder")
    if united is not None and isinstance(decoder, dict):  # older configs list the added tokens once more
        for one in json.loads(united).get("added_tokens") or []:
            decoder.setdefault(str(one["id"]), {key: value for key, value in one.items() if key != "id"})
    if template != chosen.template:
        for name in TEMPLATES:
            found.pop(name, None)
        changed.pop("chat_template", None)
        if isinstance(template, str):
            found[TEMPLATES[0]] = template.encode()
        elif template is not None:
            changed["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
    if json.dumps(changed) != before:
        found[CONFIG] = json.dumps(changed, ensure_ascii=False, indent=2).encode()
    return found
