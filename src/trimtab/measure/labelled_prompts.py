"""Prompts labelled safe or unsafe, in one file or two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError
from trimtab.measure.adapters import read_items
from trimtab.policy import Prompt
from trimtab.prompts import read_prompts

Flags = npt.NDArray[np.bool_]


def read_sets(paths: Sequence[Path], expected: str) -> list[tuple[list[Prompt], Flags]]:
    """One or two labelled sets: (prompts, unsafe). A file that holds both kinds is a set; two others make one, the first
    unsafe and the second safe unless they say otherwise."""
    out: list[tuple[list[Prompt], Flags]] = []
    files = [(path, *_read(path)) for path in paths]
    while files:
        path, prompts, flags = files.pop(0)
        if flags is None or len(set(flags)) == 1:
            if not files or (files[0][2] is not None and len(set(files[0][2])) > 1):
                raise UsageError(f"{path} holds one kind of prompt and no file of the other follows it: {expected}")
            _, others, second = files.pop(0)
            flags = [*(flags or [True] * len(prompts)), *(second or [False] * len(others))]
            prompts = [*prompts, *others]
        if len(set(flags)) == 1:
            raise UsageError(f"{path} and the file after it hold one kind of prompt: {expected}")
        out.append((prompts, np.array(flags, dtype=bool)))
    if len(out) > 2:
        raise UsageError(f"{len(out)} sets of prompts were given: two at most ({expected})")
    return out


def _read(path: Path) -> tuple[list[Prompt], list[bool] | None]:
    """The prompts of a file, and whether each is unsafe (None: the file has no labels)."""
    if not _has_labels(path):
        return read_prompts(path), None
    items = read_items(path, "refusal")
    flags = [item["should_refuse"] for item in items]
    if None in flags:
        raise UsageError(f"{path}: row {flags.index(None) + 1} does not say whether its prompt is unsafe")
    return [item["prompt"] for item in items], flags


def _has_labels(path: Path) -> bool:
    if path.suffix == ".txt" or not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.readline(10_000)
    return any(name in first for name in (b"label", b"should_refuse"))
