"""The figures of a measurement as SVG: lines with bands, heat maps, dots with intervals, a knockout bracket.

Each takes the figure as `measure.json` holds it and returns markup that stands in a `<figure>`, its text alternative in
`aria-label`. Colours are classes of `charts.css`; more than two lines also differ in dash.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from trimtab.report import svg
from trimtab.report.svg import Panel, Scale, element, num, shorten, text, title

Figure = Mapping[str, Any]
WIDTH = 560.0
MOST_ROWS, MOST_COLUMNS = 40, 60


def draw(figure: Figure) -> str:
    """The SVG of one figure; an empty string where there is nothing to draw."""
    return DRAW[figure["kind"]](figure)


def _lines(figure: Figure) -> str:
    lines = [(line["label"], [p for p in line["points"] if p[1] is not None]) for line in figure["lines"]]
    lines = [(label, points) for label, points in lines if points]
    if not lines:
        return ""
    xs = [float(point[0]) for _, points in lines for point in points]
    ys = [float(v) for _, points in lines for point in points for v in point[1:] if v is not None]
    ys += [float(value) for _, value in figure["reference"]]
    abreast = 1 if any(len(label) > 32 for label, _ in lines) else 2  # legend entries side by side
    height = 320.0 + 20 * -(-len(lines) // abreast)
    panel = Panel(_whole(Scale.nice(xs, 64.0, WIDTH - 20.0, count=6), xs), _nice(ys, 262.0, 40.0), inset=10.0)
    panel.axes(f"{figure['x']} →", f"↑ {figure['y']}")
    for number, (_, points) in enumerate(lines[:3]):  # below all lines: a band must hide none
        for run in _known(points):
            panel.band(run, f"band ink-{number}")
    for _, value in figure["reference"]:
        panel.horizontal(float(value))
    for number, (label, points) in enumerate(lines):
        ink = f"ink-{number % 6}"
        if len(points) == 1:
            panel.parts.append(
                element("circle", cx=panel.x.at(points[0][0]), cy=panel.y.at(points[0][1]), r=4.0, class_=f"dot {ink}")
            )
        panel.path([(p[0], p[1]) for p in points], f"series {ink}")
        left, top = 64.0 + (number % abreast) * 250.0, 322.0 + 20 * (number // abreast)
        panel.parts.append(element("path", d=f"M{num(left)} {num(top)}h24", class_=f"series {ink}"))
        panel.parts.append(text(left + 31, top + 4.5, shorten(label, 32 if abreast == 2 else 64)))
    panel.parts += _names(panel, figure["reference"])
    told = "; ".join(f"{label}: {points[0][1]:.3g} at {points[0][0]:g} to {points[-1][1]:.3g} at {points[-1][0]:g}"
                     for label, points in lines)  # fmt: skip
    return svg.figure(WIDTH, height, f"{figure['title']}: {figure['y']} by {figure['x']}. {told}", panel.markup)


def _nice(values: Sequence[float], start: float, end: float, count: int = 5) -> Scale:
    """As `Scale.nice`; where all values are one and the same share, the axis is that of shares, 0 to 1."""
    alike = min(values) == max(values) and 0 <= min(values) <= 1
    return Scale.nice([*values, 0.0, 1.0] if alike else values, start, end, count=count)


def _whole(scale: Scale, values: Sequence[float]) -> Scale:
    """Ticks at whole numbers where all values are whole: there is no layer 1.5."""
    if scale.step % 1 == 0 or len(set(values)) < 2 or any(value % 1 for value in values):
        return scale
    step = float(math.ceil(scale.step))
    step = 5.0 if step == 3.0 else step  # 2.5 goes on to 5, not to 3
    low, high = (step * at for at in (math.floor(min(values) / step), math.ceil(max(values) / step)))
    return replace(scale, low=low, high=high, step=step)


def _known(points: Sequence[Sequence[float | None]]) -> list[list[tuple[float, float, float]]]:
    """Runs of neighbouring points whose intervals are known, as (x, low, high)."""
    runs: list[list[tuple[float, float, float]]] = [[]]
    for x, _, *bounds in points:
        if x is not None and len(bounds) == 2 and bounds[0] is not None and bounds[1] is not None:
            runs[-1].append((x, bounds[0], bounds[1]))
        else:
            runs.append([])
    return [run for run in runs if run]


def _names(panel: Panel, reference: Sequence[tuple[str, float]]) -> list[str]:
    """Names of horizontal lines, above them at the right end, one above the other where they would touch."""
    parts, free = [], math.inf
    for label, value in sorted(reference, key=lambda one: float(one[1])):
        at = panel.y.at(float(value))
        base = min(at - 5, free)
        parts.append(text(panel.x.end, base, label, "tick halo", "end"))
        free = base - 12
    return parts


def _heat(figure: Figure) -> str:
    rows, columns = list(figure["rows"])[:MOST_ROWS], list(figure["columns"])[:MOST_COLUMNS]
    if not rows or not columns:
        return ""
    left = 24.0 + 6.6 * max(len(shorten(row, 26)) for row in rows)
    cell = max(7.0, min(26.0, (760.0 - left) / len(columns)))
    side = min(18.0, max(9.0, cell))
    top = 14.0 + 6.0 * max(len(shorten(column, 18)) for column in columns)
    low, high = float(figure["low"]), float(figure["high"])
    parts = []
    for c, column in enumerate(columns):
        x, y = left + (c + 0.5) * cell + 4, top - 6
        parts.append(
            element(
                "text",
                escape(shorten(column, 18)),
                x=x,
                y=y,
                class_="tick",
                transform=f"rotate(-90 {num(x)} {num(y)})",
            )
        )
    for r, row in enumerate(rows):
        y = top + r * side
        parts.append(text(left - 8, y + side * 0.72, shorten(row, 26), "tick", "end"))
        for c, column in enumerate(columns):
            value = figure["values"][r][c]
            share = 0.0 if value is None else min(1.0, max(0.0, (float(value) - low) / ((high - low) or 1.0)))
            tip = title(f"{row}, {column}: {'missing' if value is None else f'{value:.3g}'}")
            parts.append(
                element(
                    "rect",
                    tip,
                    x=left + c * cell + 0.5,
                    y=y + 0.5,
                    width=cell - 1,
                    height=side - 1,
                    class_="heat missing" if value is None else "heat",
                    fill_opacity=None if value is None else round(0.06 + 0.94 * share, 3),
                )  # fmt: skip
            )
    width, height = left + cell * len(columns) + 10, top + side * len(rows) + 28
    parts.append(text(left, height - 8, f"pale: {low:g}, full colour: {high:g}", "tick"))
    known = [v for line in figure["values"] for v in line if v is not None]
    mean = sum(known) / len(known) if known else 0.0
    label = f"{figure['title']}: {len(figure['rows'])} rows by {len(figure['columns'])} columns, mean {mean:.3g}"
    return svg.figure(max(width, WIDTH), height, label, *parts)


def _dots(figure: Figure) -> str:
    dots = [dot for dot in figure["dots"] if dot[1] is not None]
    if not dots:
        return ""
    left = min(220.0, 20.0 + 7.0 * max(len(shorten(dot[0], 28)) for dot in dots))
    values = [float(v) for dot in dots for v in dot[1:] if v is not None]
    values += [float(value) for _, value in figure["reference"]]
    height = 62.0 + 26.0 * len(dots)
    scale = _nice(values, left, WIDTH - 24.0, count=6)
    parts = []
    for tick in scale.ticks():
        at = scale.at(tick)
        parts.append(element("path", d=f"M{num(at)} 14V{num(height - 44)}", class_="grid"))
        parts.append(text(at, height - 28, scale.tick_label(tick), "tick", "middle"))
    for label, value in figure["reference"]:
        at = scale.at(float(value))
        parts.append(element("path", title(str(label)), d=f"M{num(at)} 10V{num(height - 44)}", class_="reference"))
        parts.append(text(at + 4, 12, str(label), "tick"))
    for place, (label, value, low, high) in enumerate(dots):
        y = 28.0 + 26.0 * place
        parts.append(text(left - 10, y + 4.5, shorten(label, 28), "", "end"))
        if low is not None and high is not None:
            a, b = scale.at(float(low)), scale.at(float(high))
            parts.append(
                element(
                    "path",
                    d=f"M{num(a)} {num(y)}H{num(b)}M{num(a)} {num(y - 4)}v8M{num(b)} {num(y - 4)}v8",
                    class_="whisker steered",
                )
            )
        tip = title(
            f"{label}: {value:.3g}" + (f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else "")
        )
        parts.append(element("circle", tip, cx=scale.at(float(value)), cy=y, r=5.0, class_="mark steered"))
    parts.append(text(WIDTH - 24, height - 8, f"{figure['x']} →", "axis-title", "end"))
    told = "; ".join(f"{dot[0]} {dot[1]:.3g}" for dot in dots)
    return svg.figure(WIDTH, height, f"{figure['title']}: {figure['x']}. {told}", *parts)


def _bracket(figure: Figure) -> str:
    rounds = figure["rounds"]
    if not rounds:
        return ""
    box, gap, high = 150.0, 34.0, 44.0
    tall = 2 ** (len(rounds) - 1) * (high + 12)
    parts = []
    for r, matches in enumerate(rounds):
        x, slot = 10.0 + r * (box + gap), tall / max(1, len(matches))
        for m, (a, b, winner) in enumerate(matches):
            y = 10 + slot * (m + 0.5) - high / 2
            parts.append(element("rect", x=x, y=y, width=box, height=high, rx="5", class_="match"))
            for line, name in enumerate((a, b)):
                shown = "(bye)" if name is None else shorten(name, 19)
                parts.append(text(x + 8, y + 17 + 19 * line, shown, "strong" if name == winner else "tick"))
            if r + 1 < len(rounds):
                meet = 10 + tall / len(rounds[r + 1]) * (m // 2 + 0.5)
                way = f"M{num(x + box)} {num(y + high / 2)}h{num(gap / 2)}V{num(meet)}h{num(gap / 2)}"
                parts.append(element("path", d=way, class_="axis", fill="none"))
    told = f"won by {rounds[-1][-1][2]}" if rounds[-1] else ""
    return svg.figure(20 + len(rounds) * (box + gap), tall + 20, f"{figure['title']}: {told}", *parts)


DRAW: dict[str, Callable[[Figure], str]] = {"lines": _lines, "heat": _heat, "dots": _dots, "bracket": _bracket}


def drawn(figures: Sequence[Figure]) -> list[tuple[Figure, str]]:
    """Each figure with its markup, those with nothing to draw left out."""
    return [(figure, markup) for figure in figures if (markup := draw(figure))]
