"""A form: the columns that a kind of file has, and how one of its rows becomes an item; and what forms read cells with.

A maker raises ValueError for a row it cannot read; the caller adds the file and the line. Column names are compared in
lower case; "prompt.text" is the key "text" of the object in the column "prompt".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Item = dict[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """adapter: whose file it is; columns: those that must be there; make: row -> item; when: a further condition."""

    adapter: str
    columns: frozenset[str]
    make: Callable[[Row], Item]
    when: Callable[[Row], bool] | None = None

    def fits(self, row: Row) -> bool:
        return all(has(row, name) for name in self.columns) and (self.when is None or self.when(row))


def form(adapter: str, columns: str, make: Callable[[Row], Item], when: Callable[[Row], bool] | None = None) -> Form:
    """columns: the names with spaces between them."""
    return Form(adapter, frozenset(columns.split()), make, when)


def get(row: Row, name: str) -> Any:
    """The value of a column (in any case; "a.b" inside an object), or None."""
    if name in row:
        return row[name]
    lowered = {key.strip().lower(): value for key, value in row.items()}
    if name in lowered:
        return lowered[name]
    outer, dot, inner = name.partition(".")
    value = lowered.get(outer) if dot else None
    return value.get(inner) if isinstance(value, Mapping) else None


def has(row: Row, name: str) -> bool:
    return get(row, name) is not None


def text(row: Row, *names: str) -> str:
    """The first of the columns that is there, as text that is not blank."""
    for name in names:
        if (value := get(row, name)) is not None:
            return as_text(value, name)
    raise ValueError(f"{' or '.join(names)} is missing")


def as_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {type(value).__name__}: text is needed")
    if not value.strip():
        raise ValueError(f"{what} is empty")
    return value


def optional(row: Row, *names: str) -> str:
    """The first of the columns that is there and not blank, as text; "" without one."""
    for name in names:
        value = get(row, name)
        if value is not None and str(value).strip():
            return str(value)
    return ""


def number(value: Any, what: str) -> float | None:
    """A finite number; None for an empty cell."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan", "none", "null")):
        return None
    try:
        out = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{what} is {value!r}: a number is needed") from None
    if math.isinf(out):
        raise ValueError(f"{what} is infinite: a number is needed")
    return None if math.isnan(out) else out


def whole(value: Any, what: str) -> int:
    try:
        out = float(value)
    except (TypeError, ValueError):
        out = 0.5
    if not math.isfinite(out) or out != int(out):
        raise ValueError(f"{what} is {value!r}: a whole number is needed")
    return int(out)


def flag(value: Any, what: str, yes: Sequence[str] = (), no: Sequence[str] = ()) -> bool:
    """True or false from a boolean, 0 or 1, or the usual words; `yes` and `no` are further words."""
    word = str(value).strip().lower()
    if word in ("true", "yes", "1", "1.0", *yes):
        return True
    if word in ("false", "no", "0", "0.0", *no):
        return False
    raise ValueError(f"{what} is {value!r}: one of {', '.join([*yes, *no]) or 'true, false'} is needed")
