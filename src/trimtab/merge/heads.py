"""Which tensors have a row for every token, and whether a model's head is its embeddings.

Three ways to store one and the same model: tied without a head of its own, tied with a copy of the embeddings in its files,
and untied. The names of checkpoints tell them apart, so that no model need be built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from trimtab.merge.schedule import layer_of
from trimtab.merge.source import SAMPLE, Entry, Source

_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|word_embeddings|tok_embeddings|wte|embeddings?)\.weight$")
_PLACES = re.compile(r"position|(?:^|\.)wpe\.")  # a table with a row a place, and sometimes as many as tokens
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_layer|output)\.(?:weight|bias)$")


def setting(config: Mapping[str, Any], key: str) -> Any:
    """A value of a config, or of the text part of a config of several parts; None where neither has it."""
    inner = config.get("text_config")
    return config[key] if key in config else inner.get(key) if isinstance(inner, Mapping) else None


def set_setting(config: dict[str, Any], key: str, value: Any) -> None:
    """Sets a value where `setting` finds it."""
    inner = config.get("text_config")
    if key not in config and isinstance(inner, Mapping) and key in inner:
        config["text_config"] = {**inner, key: value}
    else:
        config[key] = value


def embedding_of(entries: Mapping[str, Entry]) -> str | None:
    """The name of the token embeddings [V, D]; None where no name is like one."""
    found = [name for name in entries if layer_of(name) is None and _EMBEDDING.search(name)]
    return min(found, key=lambda name: (-entries[name].numel, name)) if found else None


def head_of(entries: Mapping[str, Entry]) -> str | None:
    """The name of the head's weight [V, D], where the files have one."""
    embedding = embedding_of(entries)
    if embedding is None:
        return None
    for name, entry in sorted(entries.items()):
        if name != embedding and _HEAD.search(name) and name.endswith("weight") and layer_of(name) is None:
            return name if entry.shape == entries[embedding].shape else None
    return None


def token_tensors(source: Source) -> tuple[str, ...]:
    """Tensors with a row a token: the embeddings, the head and its bias, and other tables of as many rows."""
    embedding = embedding_of(source.entries)
    if embedding is None:
        return ()
    rows, width = source.entries[embedding].shape[:1], setting(source.config, "hidden_size")
    width = setting(source.config, "n_embd") if width is None else width
    return tuple(
        name
        for name, entry in sorted(source.entries.items())
        if layer_of(name) is None
        and entry.shape[:1] == rows
        and not _PLACES.search(name)
        and (name == embedding or _HEAD.search(name) or (len(entry.shape) == 2 and rows != (width,)))
    )


def tied(source: Source) -> bool:
    """Whether the head is the embeddings. A config that does not say so: where the files have no head, or the same bytes."""
    said = setting(source.config, "tie_word_embeddings")
    embedding, head = embedding_of(source.entries), head_of(source.entries)
    if isinstance(said, bool):
        return said
    return embedding is not None and (head is None or same_ends(source, embedding, head))


def same_ends(source: Source, one: str, two: str) -> bool:
    """Whether the first and last rows of two tensors are the same, as far as a fingerprint looks."""
    first, second = source.entries[one], source.entries[two]
    if first != second or not first.shape or not first.shape[0]:
        return first == second
    rows = max(1, min(first.shape[0], SAMPLE * first.shape[0] // max(first.nbytes, 1)))
    return all(
        torch.equal(source.read(one, start, start + rows).double(), source.read(two, start, start + rows).double())
        for start in (0, first.shape[0] - rows)
    )
