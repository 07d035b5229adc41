"""Reading concepts and what people think of them: names, embeddings, triplets.

    concepts     one name a line; `NAME: TAG TAG` also says what it is (used as the reference where there is no other)
    embedding    a row of numbers for every name, as text or .npy; or `NAME number number ...`
    triplets     three columns, the odd one LAST (the order of SPoSE): names, or row numbers counted from 0 or 1

Concepts are sorted by name before anything else, and triplets within a row, so the order of a file changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
OWN = Path(__file__).with_name("concepts.txt")
# words with unrelated meanings, which a bare name leaves open
HOMOGRAPHS = frozenset(
    "bank bark bat bolt bow calf club crane date file fan iron jam letter match mint mole mouse mug nail note orange organ "
    "palm pen pitcher pipe plant ring rock ruler seal spring stool straw table tank tie trunk turkey watch wave".split()
)


@dataclass(frozen=True)
class Concepts:
    """names as the file has them, in its order; tags of each."""

    names: tuple[str, ...]
    tags: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Reference:
    """What people think. embedding [N, D] or None; triplets [R, 3] with human [R, 3] counts of the odd one, or None."""

    embedding: Array | None = None
    triplets: Ints | None = None
    human: Array | None = None


def read_concepts(path: Path) -> Concepts:
    """UsageError for fewer than 4, an empty name, or a name given twice."""
    lines = [line.strip() for line in _text(path).splitlines()]
    rows = [line.partition(":") for line in lines if line and not line.startswith("#")]
    names = tuple(name.strip() for name, _, _ in rows)
    if len(names) < 4 or "" in names:
        raise UsageError(f"{path}: four concepts or more are needed, one name a line, not {len(names)}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{path}: the concept {twice[0]!r} is given twice")
    return Concepts(names, tuple(tuple(sorted(set(tags.split()))) for _, _, tags in rows))


def tag_embedding(concepts: Concepts) -> Array:
    """[N, tags] 0 and 1: a dot product is the number of tags shared."""
    if not all(concepts.tags):
        raise UsageError(
            "no reference: give an embedding or triplets as the second file of --texts, or tags after every concept "
            "(NAME: TAG TAG)"
        )
    every = sorted({tag for tags in concepts.tags for tag in tags})
    return np.array([[float(tag in tags) for tag in every] for tags in concepts.tags])


def read_reference(path: Path, names: Sequence[str], known: Sequence[str], base: str) -> Reference:
    """The reference for `names` (sorted) from a file whose rows are those of `known`. base: "detect", "0" or "1"."""
    if path.suffix == ".npy":
        try:
            return Reference(embedding=_rows_of(np.load(path, allow_pickle=False), names, known, path))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the embedding {path}: {error}") from error
    lines = [line.strip() for line in _text(path).splitlines()]
    cells = [_cells(line) for line in lines if line and not line.startswith("#")]
    if not cells:
        raise UsageError(f"the reference {path} is empty")
    if len({len(row) for row in cells}) > 1:
        number = next(n for n, row in enumerate(cells, start=1) if len(row) != len(cells[0]))
        raise UsageError(f"{path}: row {number} has {len(cells[number - 1])} columns and the first has {len(cells[0])}")
    if len(cells[0]) == 3 and all(re.fullmatch("[0-9]+", cell) for row in cells for cell in row):
        return _triplets(_numbered(np.array(cells, dtype=np.int64), len(known), base, path), names, known)
    if all(_is_number(cell) for row in cells for cell in row):
        return Reference(embedding=_rows_of(np.array(cells, dtype=np.float64), names, known, path))
    if all(_is_number(cell) for row in cells for cell in row[1:]):
        values = np.array([row[1:] for row in cells], dtype=np.float64)
        return Reference(embedding=_rows_of(values, names, [row[0] for row in cells], path))
    if len(cells[0]) == 3:
        place = {name: number for number, name in enumerate(known)}
        _check_names({cell for row in cells for cell in row}, place, path)
        return _triplets(np.array([[place[cell] for cell in row] for row in cells]), names, known)
    raise UsageError(f"{path} is neither an embedding (rows of numbers) nor triplets (three columns, the odd one last)")


def _triplets(rows: Ints, names: Sequence[str], known: Sequence[str]) -> Reference:
    """Rows (the odd one last) as sorted triplets with counts. Rows with a concept that is not asked about are left out."""
    place = {name: number for number, name in enumerate(names)}
    moved = np.array([place.get(name, -1) for name in known])[rows]
    moved = moved[(moved >= 0).all(1)]
    if not len(moved):
        raise UsageError("the reference has no triplet of three of the concepts")
    if any(len(set(row)) < 3 for row in moved.tolist()):
        raise UsageError("the reference has a triplet that names one concept twice")
    ordered = np.sort(moved, 1)
    odd = (ordered == moved[:, 2:]).argmax(1)
    unique, at = np.unique(ordered, axis=0, return_inverse=True)
    human = np.zeros((len(unique), 3))
    np.add.at(human, (at.reshape(-1), odd), 1)
    return Reference(triplets=unique, human=human)


def _numbered(rows: Ints, known: int, base: str, path: Path) -> Ints:
    """Row numbers from 0."""
    low, high = int(rows.min()), int(rows.max())
    if base == "detect":
        base = "0" if low == 0 and high < known else "1" if low >= 1 and high == known else "?"
    if base == "?" and low >= 1 and high < known:
        raise UsageError(f"{path} has numbers from {low} to {high} for {known} concepts, so it may count from 0 or from "
                         "1: give --index-base 0 or 1")  # fmt: skip
    shift = 1 if base == "1" else 0
    if base == "?" or low < shift or high - shift >= known:
        raise UsageError(f"{path} has numbers from {low} to {high}, and there are {known} concepts")
    return rows - shift


def _rows_of(values: npt.NDArray[np.generic], names: Sequence[str], known: Sequence[str], path: Path) -> Array:
    if values.ndim != 2 or len(values) != len(known):
        raise UsageError(f"{path} has the shape {values.shape}; a row of numbers is needed for each of {len(known)} names "
                         "(give the file of its names as a third file of --texts)")  # fmt: skip
    out = np.asarray(values, dtype=np.float64)
    if not np.isfinite(out).all():
        raise UsageError(f"{path} holds values that are not finite numbers")
    place = {name: number for number, name in enumerate(known)}
    if len(place) < len(known):
        raise UsageError(f"{path}: a name is given twice")
    _check_names(names, place, path)
    return out[[place[name] for name in names]]


def _check_names(wanted: Sequence[str] | set[str], known: dict[str, int], path: Path) -> None:
    missing = sorted(set(wanted) - known.keys())
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise UsageError(f"{path}: no such name, spelt exactly so: {', '.join(missing[:8])}{more}")


def _cells(line: str) -> list[str]:
    """Columns between commas, semicolons or tabs; where there are none of these, between spaces."""
    parts = re.split(r"[,;\t]", line) if re.search(r"[,;\t]", line) else line.split()
    return [part.strip() for part in parts]


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start + 1})") from error
