"""Rows of a file as (number, {column: value}), by its name's ending; nothing is interpreted beyond that.

number: the line that a row ends in, or the number of the row where a format has no lines (.json, .yaml, .parquet).
A .txt has one column, LINE, unless every line is three whole numbers (i, j, k). A .csv or .tsv has a header, unless its
first row names no known column and its shape says what it is: a label and a text; three whole numbers; a question, four
options and one of A to D. A .tsv knows no quotes.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import UsageError
from trimtab.measure.adapters.form import Row

LINE = "(lines of text)"
Rows = list[tuple[int, Row]]
LANGUAGE = re.compile(r"(?:sentence_)?([a-z]{2,3}_[A-Z][a-z]{3}(?:_\w+)?)")


def read_rows(path: Path, known: Collection[str]) -> Rows:
    """The rows of a file. known: column names, to tell a header from a first row."""
    endings = [suffix.lower() for suffix in path.suffixes]
    packed = endings[-1:] == [".gz"]
    ending = (endings[:-1] if packed else endings)[-1:] or [""]
    if ending[0] == ".parquet":
        rows = _parquet(path)
    else:
        content = _content(path, packed)
        match ending[0]:
            case ".jsonl" | ".ndjson":
                rows = _jsonl(path, content)
            case ".json":
                rows = _tree(path, content, json.loads)
            case ".yaml" | ".yml":
                rows = _tree(path, content, _yaml)
            case ".csv" | ".tsv":
                rows = _table(path, content, ending[0] == ".tsv", known)
            case ".txt":
                rows = _lines(path, content)
            case _:
                expected = ".jsonl, .json, .csv, .tsv, .txt, .yaml (each also .gz), .parquet"
                raise UsageError(f"{path}: files are read by their ending, which is one of {expected}")
    if not rows:
        raise UsageError(f"{path} has no rows")
    return rows


def read_folder(folder: Path) -> Rows:
    """One text file a language (named LANGUAGE or LANGUAGE.anything): row i is line i of each."""
    files = sorted(child for child in folder.iterdir() if child.is_file() and not child.name.startswith("."))
    names = [child.name.partition(".")[0] for child in files]
    if len(files) < 2:
        raise UsageError(f"{folder}: a folder of parallel texts holds two files or more, one a language")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{folder} holds two files of the language {twice}: keep one")
    texts = {}
    for name, child in zip(names, files, strict=True):
        texts[name] = _content(child, child.suffix == ".gz").rstrip("\n").split("\n")
    lengths = {name: len(lines) for name, lines in texts.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise UsageError(f"{folder}: the files are not line-aligned (lines: {said})")
    for name, child in zip(names, files, strict=True):
        fail(child, [(at, "empty line") for at, line in enumerate(texts[name], 1) if not line.strip()])
    return [(at + 1, {name: lines[at].strip() for name, lines in texts.items()}) for at in range(lengths[names[0]])]


def fail(path: Path, broken: Sequence[tuple[int, str]]) -> None:
    """UsageError that names the first malformed row as file:line and counts them all; nothing if there is none."""
    if broken:
        number, reason = broken[0]
        others = ", ".join(str(other) for other, _ in broken[1:6]) + (", ..." if len(broken) > 6 else "")
        more = f" ({len(broken)} malformed rows in all; the others: {others})" if others else ""
        raise UsageError(f"{path}:{number}: {reason}{more}")


def _content(path: Path, packed: bool) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise UsageError(f"{path} is no whole gzip file ({error})") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8 (byte {error.start + 1} of the file)") from error


def _jsonl(path: Path, content: str) -> Rows:
    rows: Rows = []
    broken = []
    for number, line in enumerate(content.rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            broken.append((number, f"not JSON ({error})"))
            continue
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            broken.append((number, "an object is needed" if line.strip() else "empty line"))
    if content.strip():
        fail(path, broken)
    return rows


def _tree(path: Path, content: str, parse: Any) -> Rows:
    """A list of objects; or an object that holds such lists, at most two deep."""
    try:
        data = parse(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    objects = list(_objects(data, 2))
    fail(path, [(n, "an object is needed") for n, one in enumerate(objects, 1) if not isinstance(one, Mapping)])
    return list(enumerate(objects, 1))


def _objects(data: Any, depth: int) -> Iterator[Any]:
    if isinstance(data, list):
        yield from data
    elif isinstance(data, Mapping) and depth:
        for value in data.values():
            if isinstance(value, Mapping) or (isinstance(value, list) and value and isinstance(value[0], Mapping)):
                yield from _objects(value, depth - 1)


def _yaml(content: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _parquet(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(enumerate(pq.read_table(path).to_pylist(), 1))
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path} cannot be read as parquet: {error}") from error


def _lines(path: Path, content: str) -> Rows:
    lines = [line.strip() for line in content.rstrip("\n").split("\n")]
    if not content.strip():
        return []
    fail(path, [(number, "empty line") for number, line in enumerate(lines, 1) if not line])
    if all(re.fullmatch(r"\d+\s+\d+\s+\d+", line) for line in lines):
        return [(number, dict(zip("ijk", line.split(), strict=True))) for number, line in enumerate(lines, 1)]
    return [(number, {LINE: line}) for number, line in enumerate(lines, 1)]


def _table(path: Path, content: str, tabs: bool, known: Collection[str]) -> Rows:
    style: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader(io.StringIO(content), **style)
    try:
        cells = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise UsageError(f"{path}:{reader.line_num}: {error}") from error
    if not cells:
        return []
    header = _headerless([row for _, row in cells], known)
    if header is None:
        header = [name.strip() for name in cells.pop(0)[1]]
    doubled = next((name for name in header if name and header.count(name) > 1), None)
    if doubled is not None:
        raise UsageError(f"{path}:1: two columns are called {doubled!r}")
    fail(
        path,
        [(at, f"{len(row)} cells where the header has {len(header)}") for at, row in cells if len(row) != len(header)],
    )
    return [(at, {n: v for n, v in zip(header, row, strict=True) if n or v}) for at, row in cells]


def _headerless(cells: Sequence[Sequence[str]], known: Collection[str]) -> list[str] | None:
    """Column names for a file without a header whose shape is known; None where its first row is the header."""
    first = [cell.strip().lower() for cell in cells[0]]
    headers = {name for name in known if len(name) > 1}  # a single letter may be an answer
    if any(cell in headers or LANGUAGE.fullmatch(name.strip()) for cell, name in zip(first, cells[0], strict=True)):
        return None
    if len(first) == 2:
        for place, names in enumerate((["label", "text"], ["text", "label"])):
            labels = [row[place] for row in cells if len(row) == 2]
            # the name of a column does not come again further down; a label does
            if (
                len(labels) > 2
                and len(set(labels)) <= min(20, len(labels) // 2)
                and first[place] in map(str.lower, labels[1:])
            ):
                return names
    if len(first) == 3 and all(cell.isdigit() for cell in first):
        return ["i", "j", "k"]
    if len(first) == 6 and first[5] in ("a", "b", "c", "d"):
        return ["question", "A", "B", "C", "D", "answer"]
    return None
