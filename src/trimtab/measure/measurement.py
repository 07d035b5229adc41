"""`Measurement`: a table with intervals and their unit of resampling, figures, and what exactly was measured.

A measurement keeps one value a unit (a prompt, a sentence, a pair, ...) in `samples`, so that two of them can be compared
unit by unit. Two measurements can be compared only if everything they were taken with is the same (`measured`, the model
left out): `check_alike` refuses otherwise and says what differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.measure.stats import Interval
from trimtab.policy import Cost

Better = Literal["higher", "lower", ""]
Said = Literal["better", "worse", "undecided", "changed", ""]
SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One line of the table. None: undefined, and never 0. n counts the units that the interval resamples."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    better: Better = ""  # which direction is good; "": neither
    note: str = ""

    @classmethod
    def of(cls, label: str, interval: Interval, better: Better = "", note: str = "") -> Row:
        return cls(label, interval.mean, interval.low, interval.high, interval.prompts, better, note)


@dataclass(frozen=True)
class Change:
    """One line of a comparison: first - second, paired by unit; the verdict is about the first.

    "changed": the interval excludes 0 and neither direction is good in itself. "": nothing is claimed.
    """

    label: str
    first: float | None
    second: float | None
    difference: float | None
    low: float | None
    high: float | None
    n: int
    verdict: Said = ""
    p_value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Line:
    """points: (x, y) or (x, y, low, high), in order of x."""

    label: str
    points: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Lines:
    """Lines over one axis: layer curves, sampling curves. reference: (label, y) of horizontal lines such as chance."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    reference: Sequence[tuple[str, float]] = ()
    note: str = ""
    kind: str = "lines"


@dataclass(frozen=True)
class Heat:
    """values[r][c], None where missing; low and high are the ends of the colour scale."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    low: float = 0.0
    high: float = 1.0
    note: str = ""
    kind: str = "heat"


@dataclass(frozen=True)
class Dots:
    """A dot with an interval a label, best first where there is an order: rankings, per-category rates."""

    title: str
    x: str
    dots: Sequence[tuple[str, float | None, float | None, float | None]]  # label, value, low, high
    reference: Sequence[tuple[str, float]] = ()
    note: str = ""
    kind: str = "dots"


@dataclass(frozen=True)
class Bracket:
    """One knockout tournament: rounds[r] are matches (a, b, winner); b is None for a bye."""

    title: str
    rounds: Sequence[Sequence[tuple[str, str | None, str]]]
    note: str = ""
    kind: str = "bracket"


Figure = Lines | Heat | Dots | Bracket
FIGURES: dict[str, type[Any]] = {"lines": Lines, "heat": Heat, "dots": Dots, "bracket": Bracket}


@dataclass
class Measurement:
    """What a diagnostic found on one subject.

    name       the diagnostic's slug
    subject    the policy's name
    measured   what it was taken with: "model" (the policy's identity), "texts", "template", "settings", ... as short
               hashes or words; equal except for "model" where two measurements can be compared
    unit       what one value of `samples` belongs to and intervals resample: "prompt", "sentence", "pair", ...
    units      the ids of the units, in order
    samples    column -> one value a unit (None: could not be judged); a column with a row of the same label in
               the table can be compared with another measurement's
    table, figures, notes, warnings, details (anything else that JSON holds), cost
    """

    name: str
    subject: str
    measured: dict[str, Any]
    unit: str
    units: list[str] = field(default_factory=list)
    samples: dict[str, list[float | None]] = field(default_factory=dict)
    table: list[Row] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of what was measured, the model included."""
        return fingerprint_of(self.name, self.measured)

    def row(self, label: str) -> Row:
        found = [row for row in self.table if row.label == label]
        if not found:
            raise UsageError(f"{self.name} has no row {label!r} (rows: {', '.join(row.label for row in self.table)})")
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        out = {"schema": SCHEMA, "fingerprint": self.fingerprint, **asdict(self)}
        return {**out, "cost": self.cost.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The inverse of `to_dict`. UsageError for another schema."""
        if data.get("schema") != SCHEMA:
            raise UsageError(f"a measurement of schema {data.get('schema')!r}; this version of trimtab reads {SCHEMA}")
        values = {key: data[key] for key in data if key not in ("schema", "fingerprint")}
        cost = {key: value for key, value in values["cost"].items() if key != "tokens_forwarded"}
        values |= {"cost": Cost(**cost), "table": [Row(**row) for row in values["table"]]}
        return cls(**values | {"figures": [figure_from(figure) for figure in values["figures"]]})


@dataclass
class Comparison:
    """The first measurement against the second, unit by unit."""

    name: str
    first: str
    second: str
    unit: str
    changes: list[Change] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def change(self, label: str) -> Change:
        found = [change for change in self.changes if change.label == label]
        if not found:
            raise UsageError(f"{self.name} compares no {label!r} (it does: {', '.join(c.label for c in self.changes)})")
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def figure_from(data: Mapping[str, Any]) -> Figure:
    """A figure from its `asdict`."""
    values = dict(data)
    if values["kind"] == "lines":
        values["lines"] = [Line(**line) for line in values["lines"]]
    figure: Figure = FIGURES[values["kind"]](**values)
    return figure


def check_alike(first: Measurement, second: Measurement) -> None:
    """Refuse to compare measurements that were not taken alike, listing what differs."""
    if first.name != second.name:
        raise UsageError(f"{first.name} and {second.name} measure different things: they cannot be compared")
    keys = sorted({*first.measured, *second.measured} - {"model"})
    one, two = (json.loads(json.dumps(side.measured, default=str)) for side in (first, second))  # tuples are lists
    unlike = [key for key in keys if one.get(key) != two.get(key)]
    if unlike:
        said = "; ".join(f"{key}: {first.measured.get(key)} against {second.measured.get(key)}" for key in unlike)
        hint = "; --template plain measures both without a chat template" if "template" in unlike else ""
        raise UsageError(f"{first.name}: {first.subject} and {second.subject} were not measured alike ({said}){hint}")
    if first.units != second.units:
        raise UsageError(f"{first.name}: {first.subject} and {second.subject} have different {first.unit}s")


def decimals(value: float) -> int:
    """How many decimals a figure is shown with: three; five where it is small, one or none where it is large."""
    size = abs(value)
    return 0 if size >= 1000 else 1 if size >= 100 else 3 if size >= 0.001 or value == 0 else 5
