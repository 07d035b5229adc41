"""Was it in the training data? Texts of a test file that share n words in a row with a training file.

Words are runs of letters and digits in lower case; a text is found if one of its n-grams (13 by default, after the GPT-3
paper, 2005.14165) stands in a training text, or, where it has fewer than n words, if it is a training text word for word
or stands in one whole (at least LEAST words: "yes" is no evidence). All columns of a row count.

What it means: these test rows, or a part of them, were there to be learnt by heart. What it does not mean: that others
were not; a paraphrase or a translation shares no 13 words. Memory is that of the test file's n-grams; the training file is
read row by row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import UsageError

N = 13
LEAST = 5
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """found: the numbers (from 0) of the test rows that stand in the training data, and what of them does."""

    found: dict[int, str]
    rows: int

    def sentence(self, test: Path, train: Path) -> str:
        """What is to be said of it; "" where there is nothing."""
        if not self.found:
            return ""
        at, words = next(iter(self.found.items()))
        return (
            f"{len(self.found)} of {self.rows} rows of {test.name} overlap with {train.name} (the first: row {at + 1}, "
            f"{words[:60]!r}): their figures may be memory"
        )


def overlap(test: Sequence[Sequence[str]], train: Iterable[Sequence[str]], n: int = N) -> Overlap:
    """test, train: rows, each a list of texts. UsageError for an n below 2."""
    if n < 2:
        raise UsageError(f"an n-gram of at least 2 words is needed, not of {n}")
    wanted: dict[tuple[str, ...], list[int]] = {}
    for number, row in enumerate(test):
        for text in row:
            for gram in _grams(words(text), n):
                wanted.setdefault(gram, []).append(number)
    sizes = sorted({len(gram) for gram in wanted})
    found: dict[int, str] = {}
    for row in train:
        for text in row:
            said = words(text)
            for size in sizes:
                for start in range(len(said) - size + 1):
                    gram = tuple(said[start : start + size])
                    for number in wanted.get(gram, ()):
                        found.setdefault(number, " ".join(gram))
    return Overlap(dict(sorted(found.items())), len(test))


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _grams(said: list[str], n: int) -> Iterator[tuple[str, ...]]:
    if len(said) < n:
        if len(said) >= LEAST:
            yield tuple(said)
        return
    for start in range(len(said) - n + 1):
        yield tuple(said[start : start + n])


def texts_of(path: Path) -> list[list[str]]:
    """The texts of every row of a file (any format that an adapter reads; prompts as JSONL or text too)."""
    from trimtab.measure.adapters.files import read_rows

    return [[*_strings(row)] for _, row in read_rows(path, ())]


def check_files(test: Sequence[Path], train: Sequence[Path], n: int = N) -> list[str]:
    """A sentence for each pair of files that overlap. A file against itself is refused."""
    out = []
    for trained in train:
        rows = texts_of(trained)
        for path in test:
            if path.is_dir():
                continue
            if path.resolve() == trained.resolve():
                raise UsageError(f"{trained} was trained or fitted on, and is the very file that is measured on")
            said = overlap(texts_of(path), rows, n).sentence(path, trained)
            out += [said] if said else []
    return out


def _strings(value: Any) -> Iterator[str]:
    """Every text inside a row, JSON inside a text too (messages)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
    elif value is not None and not isinstance(value, (int, float, bool)):
        yield json.dumps(value, default=str)
