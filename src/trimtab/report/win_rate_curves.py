"""Win rate against KL, a line a transform: what `measure.win_rates.curve` computes as one SVG that carries its own style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trimtab.errors import UsageError
from trimtab.measure.win_rates import Rates
from trimtab.report.svg import Panel, Scale, element, figure, num, text

Lines = Mapping[str, Sequence[Rates]]  # label -> points
WIDTH, HEIGHT, GAP = 860.0, 380.0, 62.0
# colour on light and on dark ground, dash
INKS = (
    ("#5d626c", "#a4a9b3", "6 4"),
    ("#1a5fb4", "#74b0f7", "6 4"),
    ("#1a5fb4", "#74b0f7", ""),
    ("#b9540a", "#f2a263", ""),
    ("#0b8a6f", "#4fd0b3", "2 3"),
    ("#8a4fae", "#c99be6", ""),
)


def win_rate_figure(panels: Sequence[tuple[str, str, Lines]], most_kl: float = 1.0) -> str:
    """Panels side by side: (title, which rate of `Rates` is drawn, lines). Lines of the same label share a colour.

    most_kl: where the horizontal axis, and every line, ends, in nats an answer; the axis ends at a tick.
    """
    labels = list(dict.fromkeys(label for _, _, lines in panels for label in lines))
    if not labels or len(labels) > len(INKS):
        raise UsageError(f"a figure of win rates takes 1 to {len(INKS)} lines, not {len(labels)}")
    inks = dict(zip(labels, INKS, strict=False))
    width = (WIDTH - 30 - GAP * len(panels)) / len(panels)
    parts = [element("rect", x="0", y="0", width=num(WIDTH), height=num(HEIGHT), class_="ground")]
    for place, (heading, rate, lines) in enumerate(panels):
        left = GAP + place * (width + GAP)
        x = Scale.nice([0.0, most_kl], left, left + width, count=4)
        shown = {
            label: _up_to([(one.kl, float(getattr(one, rate))) for one in line], x.high)
            for label, line in lines.items()
        }
        highest = max((value for line in shown.values() for _, value in line), default=1.0)
        panel = Panel(x, Scale.nice([0.5, highest], HEIGHT - 104.0, 46.0))
        panel.axes("KL, nats an answer →", f"↑ {heading}")
        for label, line in shown.items():
            panel.path(line, f"line l{labels.index(label)}")
        parts.append(panel.markup)
    parts.append(_legend(labels))
    said = "; ".join(f"{heading}, lines {', '.join(lines)}" for heading, _, lines in panels)
    return figure(
        WIDTH, HEIGHT, f"Win rate over the base against KL: {said}", _style(list(inks.values())), *parts
    ).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def _up_to(points: Sequence[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """The line from the base (KL 0, win rate 1/2) through the points in order of KL, cut at `end`."""
    line = [(0.0, 0.5), *sorted(points)]
    kept = [point for point in line if point[0] <= end]
    if len(kept) < len(line):
        (a, low), (b, high) = line[len(kept) - 1], line[len(kept)]
        kept.append((end, low + (high - low) * (end - a) / (b - a)))
    return kept


def _legend(labels: Sequence[str]) -> str:
    out, at = [], GAP
    for number, label in enumerate(labels):
        out.append(element("path", d=f"M{num(at)} {num(HEIGHT - 22)}h26", class_=f"line l{number}"))
        out.append(text(at + 33, HEIGHT - 17.5, label))
        at += 33 + 7.6 * len(label) + 28
    return "".join(out)


def _style(inks: Sequence[tuple[str, str, str]]) -> str:
    common = (
        "text{font:13px system-ui,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif;fill:#191b20}"
        ".tick,.axis-title{font-size:12px;fill:#5d626c}.strong{font-weight:600;fill:#191b20}"
        ".grid{stroke:#e3e3de;fill:none}.axis{stroke:#8b909a;fill:none}.ground{fill:#fff}"
        ".line{fill:none;stroke-width:2.2;stroke-linejoin:round}"
    )
    dark = (
        "text,.strong{fill:#e9eaec}.tick,.axis-title{fill:#a4a9b3}.grid{stroke:#31363e}"
        ".axis{stroke:#7d838e}.ground{fill:#1b1e23}"
    )
    for number, (light, night, dash) in enumerate(inks):
        common += f".l{number}{{stroke:{light}" + (f";stroke-dasharray:{dash}}}" if dash else "}")
        dark += f".l{number}{{stroke:{night}}}"
    return f"<style>{common}@media(prefers-color-scheme:dark){{{dark}}}</style>"
