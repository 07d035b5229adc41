"""Parallel sentences from files, repeats left out; and task scores by language.

eng.txt fra.txt deu.txt     one file a language, named after it: line i of each means the same
FOLDER, or one file         what the adapter `parallel` reads (see `measure.adapters`)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from trimtab.errors import UsageError
from trimtab.measure.adapters import read_items

ENGLISH = ("eng_Latn", "eng", "en", "english")


def read_parallel(paths: Sequence[Path]) -> dict[str, list[str]]:
    """language -> lines. UsageError for files that are not parallel, with the line."""
    if len(paths) == 1:
        items = read_items(paths[0], "parallel")
        out = {language: [str(item["texts"].get(language, "")) for item in items] for language in items[0]["texts"]}
        if len(out) < 2:
            raise UsageError(f"{paths[0]} holds one language; two or more are needed")
        return out
    out = {}
    for file in paths:
        language = file.name.partition(".")[0]
        if language in out:
            raise UsageError(f"two files are named {language!r}: a file's name is its language's")
        try:
            lines = file.read_bytes().decode("utf-8-sig").rstrip("\r\n").split("\n")
        except OSError as error:
            raise UsageError(f"cannot read {file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{file} is not UTF-8 (byte {error.start + 1})") from error
        empty = [str(number) for number, line in enumerate(lines, start=1) if not line.strip()]
        if empty:
            raise UsageError(f"{file}: line {', '.join(empty[:6])} is empty: every line needs its sentence")
        out[language] = [line.strip() for line in lines]
    counts = {language: len(lines) for language, lines in out.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{language} {count}" for language, count in counts.items())
        raise UsageError(f"parallel files need equally many lines; these have {said}")
    return out


def distinct_lines(texts: Mapping[str, list[str]], most: int) -> tuple[dict[str, list[str]], list[int], list[int]]:
    """The first `most` (0: all) lines that repeat no earlier one in any language; their numbers from 1, and those of
    the repeats left out."""
    seen: dict[str, set[str]] = {language: set() for language in texts}
    kept: list[int] = []
    dropped: list[int] = []
    for number, lines in enumerate(zip(*texts.values(), strict=True), start=1):
        if most and len(kept) == most:
            break
        pairs = list(zip(seen.values(), lines, strict=True))
        repeats = any(line in known for known, line in pairs)
        (dropped if repeats else kept).append(number)
        if not repeats:
            for known, line in pairs:
                known.add(line)
    if len(kept) < 2:
        raise UsageError(f"2 different sentences or more are needed, not {len(kept)}")
    return {language: [lines[number - 1] for number in kept] for language, lines in texts.items()}, kept, dropped


def pivot_of(texts: Mapping[str, object], named: str | None) -> str:
    """The language that the others are measured against: the one named, else English, else the first."""
    if named is None:
        return next((language for language in ENGLISH if language in texts), next(iter(texts)))
    if named not in texts:
        raise UsageError(f"there are no sentences of the pivot {named!r} (languages: {', '.join(texts)})")
    return named


def read_scores(path: Path) -> dict[str, dict[str, float]]:
    """task -> language -> score, from lines of language, task and score separated by tabs."""
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    out: dict[str, dict[str, float]] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        parts = line.split("\t")
        try:
            language, task, score = parts[0], parts[1], float(parts[2])
        except (IndexError, ValueError):
            language, task, score = "", "", math.nan
        if len(parts) != 3 or not math.isfinite(score):
            raise UsageError(f"{path}:{number}: language, task and score separated by tabs are needed, not {line!r}")
        out.setdefault(task, {})[language] = score
    return out
