"""A small SVG writer: scales with readable ticks, marks with intervals, lines, bands, bars, labels that do not collide.

Everything is a string, every colour is a CSS class of `theme.css` (so dark mode and print need no second picture), and
the same input gives the same bytes. Coordinates are in pixels of the figure's own viewBox.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

CHARACTER_WIDTH = 0.56  # mean width of a character of a sans-serif face, in em; wide enough that labels do not touch
LABEL_SIZE = 13.0
RINGS = (15.0, 24.0, 38.0, 54.0)  # distances from a mark at which a label is tried
CROWD = 9  # marks up to which all of a scatter are named


def num(value: float) -> str:
    """A coordinate with at most two decimals and no trailing zeros."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def element(name: str, *children: str, **attributes: object) -> str:
    """One SVG element. Children are markup already; attribute values are escaped; `class_` is `class`, `_` is `-`."""
    parts = [name]
    for key, value in attributes.items():
        if value is None:
            continue
        key = key.rstrip("_").replace("_", "-")
        text = num(value) if isinstance(value, float) else str(value)
        parts.append(f'{key}="{escape(text)}"')
    return f"<{' '.join(parts)}>{''.join(children)}</{name}>"


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "start") -> str:
    return element("text", escape(content), x=num(x), y=num(y), class_=class_ or None, text_anchor=anchor)


def title(content: str) -> str:
    """The native tooltip and accessible name of the element that holds it."""
    return element("title", escape(content))


def figure(width: float, height: float, label: str, *children: str, class_: str = "chart") -> str:
    """The outer `<svg>`, with `label` as its text alternative."""
    box = f"0 0 {num(width)} {num(height)}"
    return f'<svg viewBox="{box}" class="{class_}" role="img" aria-label="{escape(label)}">{"".join(children)}</svg>'


def nice_step(span: float, count: int) -> float:
    """The step of 1, 2, 2.5 or 5 times a power of ten that cuts `span` (> 0) into about `count` parts."""
    raw = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    return next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999), 10 * power)


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to [start, end] pixels; `log` maps logarithmically (low > 0), `root` by the square root (low 0)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    step: float = 1.0
    root: bool = False

    @staticmethod
    def nice(
        values: Sequence[float],
        start: float,
        end: float,
        *,
        count: int = 5,
        zero: bool = False,
        log: bool = False,
        root: bool = False,
    ) -> Scale:
        """A scale whose ends are ticks, holding all values; `zero` includes 0. No values: [0, 1]."""
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if log and low > 0:
            return Scale(low / 1.25, high * 1.25, start, end, log=True)
        if root:
            return Scale(0.0, max(high, 1e-6) * 1.1, start, end, root=True)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if high - low <= 1e-12 * max(1.0, abs(high)):
            half = 0.5 * abs(high) or 0.5
            low, high = (low, high + 2 * half) if zero else (low - half, high + half)
        step = nice_step(high - low, count)
        return Scale(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, start, end, step=step)

    def at(self, value: float) -> float:
        if self.root:
            return self.start + math.sqrt(max(0.0, value) / self.high) * (self.end - self.start)
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.root:
            powers = range(math.floor(math.log10(self.high)) - 2, math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**p for p in powers for m in (1, 3) if 0.02 * self.high < m * 10.0**p <= self.high]
            return [0.0, *found]
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**p for p in powers for m in (1, 2, 5) if self.low <= m * 10.0**p <= self.high]
            return found if len(found) <= 7 else [tick for tick in found if f"{tick:e}"[0] == "1"]
        return [self.low + i * self.step for i in range(round((self.high - self.low) / self.step) + 1)]

    def tick_label(self, value: float) -> str:
        if self.log or self.root:
            return f"{value:g}"
        decimals = max(0, -math.floor(math.log10(self.step) + 1e-9))
        if abs(self.step * 10**decimals - round(self.step * 10**decimals)) > 1e-6:
            decimals += 1  # steps of 2.5
        label = f"{value:.{decimals}f}"
        return f"{0:.{decimals}f}" if float(label) == 0 else label


@dataclass(frozen=True)
class Mark:
    """A point of a scatter. `kind`: base | steered | bound | other; `front`: it is on the Pareto front."""

    x: float
    y: float
    label: str
    kind: str = "steered"
    front: bool = False
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    tooltip: str = ""
    shift: float = 0.0  # pixels to the right of the true place
    number: int = 0  # stands for the label where there is no room for it


def marker(x: float, y: float, kind: str, radius: float = 6.0) -> str:
    """base: square; steered: filled circle; bound: open diamond; other: triangle. Shape says what colour says."""
    r = radius
    if kind == "base":
        return element("rect", x=x - r * 0.85, y=y - r * 0.85, width=r * 1.7, height=r * 1.7, class_="mark base")
    if kind == "bound":
        r *= 1.2
        return element(
            "path",
            d=f"M{num(x)} {num(y - r)}l{num(r)} {num(r)}l{num(-r)} {num(r)}l{num(-r)} {num(-r)}z",
            class_="mark bound",
        )
    if kind == "other":
        return element("path", d=f"M{num(x)} {num(y - r)}l{num(r)} {num(1.8 * r)}h{num(-2 * r)}z", class_="mark other")
    return element("circle", cx=float(x), cy=float(y), r=r, class_="mark steered")


Box = tuple[float, float, float, float]  # left, top, right, bottom


def overlap(a: Box, b: Box) -> float:
    """The shared area of two boxes in square pixels."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def text_width(content: str, size: float = LABEL_SIZE) -> float:
    return len(content) * CHARACTER_WIDTH * size


def place_labels(
    anchors: Sequence[tuple[float, float, str]],
    bounds: Box,
    obstacles: Sequence[Box] = (),
    soft: Sequence[Box] = (),
    rings: Sequence[float] = RINGS,
) -> list[Box | None]:
    """A box for each label, near its anchor and free of the others; None where there is no room.

    Greedy in the given order over rings of positions at these distances in pixels. `obstacles` (the marks) may not be
    covered; `soft` boxes (error bars, lines) may, at a price. Labels never leave `bounds`.
    """
    placed: list[Box | None] = []
    for x, y, label in anchors:
        width, height = text_width(label), LABEL_SIZE * 1.15
        best: tuple[float, Box] | None = None
        for ring, gap in enumerate(rings):
            d = gap * 0.72
            corners = [
                (x + gap, y - height / 2), (x - gap - width, y - height / 2),
                (x - width / 2, y - gap - height), (x - width / 2, y + gap),
                (x + d, y - d - height), (x + d, y + d), (x - d - width, y - d - height), (x - d - width, y + d),
            ]  # fmt: skip
            for order, (left, top) in enumerate(corners):
                box = (left, top, left + width, top + height)
                inside = bounds[0] <= box[0] and box[2] <= bounds[2] and bounds[1] <= box[1] and box[3] <= bounds[3]
                if not inside or any(overlap(box, other) > 0 for other in (*obstacles, *(p for p in placed if p))):
                    continue
                price = ring * 30 + order * 2 + sum(min(40.0, overlap(box, other)) for other in soft)
                if best is None or price < best[0]:
                    best = (price, box)
        placed.append(best[1] if best else None)
    return placed


class Panel:
    """A plotting area with axes. Draw in order: `axes`, `band`, `line`, `scatter`; `markup` is what was drawn."""

    def __init__(self, x: Scale, y: Scale, inset: float = 0.0) -> None:
        self.x, self.y = x, y
        self.left = x.start - inset  # where the frame begins; marks at the scale's low end stand `inset` inside it
        self.parts: list[str] = []

    @property
    def markup(self) -> str:
        return "".join(self.parts)

    def axes(self, x_title: str = "", y_title: str = "", *, x_labels: bool = True) -> None:
        """Horizontal grid, ticks, axis names: the x name below at the right end, the y name above at the left end."""
        left, right, bottom, top = self.left, self.x.end, self.y.start, self.y.end
        for tick in self.y.ticks():
            at = self.y.at(tick)
            self.parts.append(element("path", d=f"M{num(left)} {num(at)}H{num(right)}", class_="grid"))
            self.parts.append(text(left - 9, at + 4.5, self.y.tick_label(tick), "tick", "end"))
        self.parts.append(element("path", d=f"M{num(left)} {num(bottom)}H{num(right)}", class_="axis"))
        for tick in self.x.ticks():
            at = self.x.at(tick)
            self.parts.append(element("path", d=f"M{num(at)} {num(bottom)}v5", class_="axis"))
            if x_labels:
                self.parts.append(text(at, bottom + 20, self.x.tick_label(tick), "tick", "middle"))
        if x_title:
            self.parts.append(text(right, bottom + 40, x_title, "axis-title", "end"))
        if y_title:
            self.parts.append(text(left - 40, top - 18, y_title, "axis-title strong"))

    def horizontal(self, value: float, class_: str = "reference") -> None:
        self.parts.append(
            element("path", d=f"M{num(self.x.start)} {num(self.y.at(value))}H{num(self.x.end)}", class_=class_)
        )

    def path(self, points: Sequence[tuple[float, float]], class_: str) -> None:
        steps = "L".join(f"{num(self.x.at(x))} {num(self.y.at(y))}" for x, y in points)
        if points:
            self.parts.append(element("path", d=f"M{steps}", class_=class_))

    def band(self, points: Sequence[tuple[float, float, float]], class_: str) -> None:
        """The area between low and high: points are (x, low, high)."""
        there = [(x, low) for x, low, _ in points]
        back = [(x, high) for x, _, high in reversed(points)]
        if len(points) > 1:
            self.path([*there, *back, there[0]], class_)

    def whiskers(self, mark: Mark) -> list[Box]:
        """Draws the intervals of a mark; returns the boxes that they cover."""
        boxes: list[Box] = []
        x, y = self.x.at(mark.x) + mark.shift, self.y.at(mark.y)
        if mark.y_interval:
            low, high = (self.y.at(v) for v in mark.y_interval)
            self.parts.append(
                element(
                    "path",
                    d=f"M{num(x)} {num(low)}V{num(high)}M{num(x - 4)} {num(low)}h8M{num(x - 4)} {num(high)}h8",
                    class_=f"whisker {mark.kind}",
                )
            )
            boxes.append((x - 4, min(low, high), x + 4, max(low, high)))
        if mark.x_interval:
            low, high = (self.x.at(v) for v in mark.x_interval)
            self.parts.append(
                element(
                    "path",
                    d=f"M{num(low)} {num(y)}H{num(high)}M{num(low)} {num(y - 4)}v8M{num(high)} {num(y - 4)}v8",
                    class_=f"whisker {mark.kind}",
                )
            )
            boxes.append((min(low, high), y - 4, max(low, high), y + 4))
        return boxes

    def scatter(self, marks: Sequence[Mark]) -> list[Mark]:
        """Marks with intervals and direct labels; returns those that bear their number instead, for lack of room.

        In a crowd only the front and the base are named.
        """
        soft = [box for mark in marks for box in self.whiskers(mark)]
        centres = [(self.x.at(mark.x) + mark.shift, self.y.at(mark.y)) for mark in marks]
        for mark, (x, y) in zip(marks, centres, strict=True):
            ring = element("circle", cx=x, cy=y, r=11.0, class_="ring") if mark.front else ""
            tip, shape = title(mark.tooltip or mark.label), marker(x, y, mark.kind)
            classes = "point" if mark.front or mark.kind == "base" else "point off-front"
            self.parts.append(element("g", tip, ring, shape, class_=classes, data_policy=mark.label))
        taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in centres]
        bounds = (self.x.start + 2, self.y.end - 12, self.x.end + 4, self.y.start - 3)
        order = sorted(range(len(marks)), key=lambda i: (not marks[i].front, marks[i].kind != "base", -marks[i].y, i))
        crowd = len(marks) > CROWD
        named = [i for i in order if not crowd or marks[i].front or marks[i].kind == "base"]
        left = [i for i in order if i not in named]
        for numbered in (False, True):
            these = left if numbered else named
            labels = [str(marks[i].number) if numbered else shorten(marks[i].label) for i in these]
            anchors = [(*centres[i], label) for i, label in zip(these, labels, strict=True)]
            boxes = place_labels(anchors, bounds, taken, soft, (11.0, 15.0, 22.0) if numbered else RINGS)
            for i, label, box in zip(these, labels, boxes, strict=True):
                if box is not None:
                    self.parts.append(self._label(marks[i], centres[i], label, box))
                    taken.append(box)
                elif not numbered:
                    left.append(i)
        return sorted((marks[i] for i in left), key=lambda mark: mark.number)

    def _label(self, mark: Mark, centre: tuple[float, float], label: str, box: Box) -> str:
        x, y = centre
        nearest = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
        distance = math.dist(centre, nearest)
        leader = ""
        if distance > 17:
            start = (x + (nearest[0] - x) * 9 / distance, y + (nearest[1] - y) * 9 / distance)
            leader = element(
                "path", d=f"M{num(start[0])} {num(start[1])}L{num(nearest[0])} {num(nearest[1])}", class_="leader"
            )
        anchor = "end" if box[2] <= x else "start" if box[0] >= x else "middle"
        at = {"end": box[2], "start": box[0], "middle": (box[0] + box[2]) / 2}[anchor]
        classes = f"label {mark.kind}" + (" strong" if mark.front else "")
        return leader + element(
            "text",
            escape(label),
            x=at,
            y=box[1] + LABEL_SIZE * 0.92,
            class_=classes,
            text_anchor=anchor,
            data_policy=mark.label,
        )


def shorten(label: str, limit: int = 30) -> str:
    """A label of at most `limit` characters; the middle gives way, since names differ at their ends."""
    return label if len(label) <= limit else f"{label[: limit - 12]}…{label[-11:]}"
