"""The figures of docs/natural-control.md, written with the report's chart writer. Each SVG carries its own style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import t

from trimtab.report.svg import Panel, Scale, element, figure, num, text

WIDTH, HEIGHT = 760.0, 420.0
# label, colour on light and on dark ground, dash
STYLE = {
    "base": ("base", "#191b20", "#e9eaec", ""),
    "natural-control": ("natural control", "#1a5fb4", "#74b0f7", ""),
    "2 rounds": ("two rounds", "#0b8a6f", "#4fd0b3", ""),
    "3 rounds": ("three rounds", "#0b8a6f", "#4fd0b3", "6 4"),
    "4 rounds": ("four rounds", "#0b8a6f", "#4fd0b3", "2 3"),
    "extra-block": ("extra block", "#1a5fb4", "#74b0f7", "6 4"),
    "re-control": ("RE-Control", "#b9540a", "#f2a263", ""),
    "re-control mc": ("RE-Control, V on returns", "#b9540a", "#f2a263", "6 4"),
    "pref-ctrl": ("Pref-CTRL", "#8a4fae", "#c99be6", ""),
    "controlled decoding": ("controlled decoding, exact Q", "#8a4fae", "#c99be6", "6 4"),
    "natural control": ("natural control, exact", "#1a5fb4", "#74b0f7", ""),
    "natural control, 8 rounds": ("eight exact rounds", "#0b8a6f", "#4fd0b3", ""),
    "fitted": ("fitted on 8,192 answers", "#1a5fb4", "#74b0f7", "6 4"),
    "fitted, 3 rounds": ("fitted, 3 rounds", "#0b8a6f", "#4fd0b3", "6 4"),
}
TITLES = {
    "reward": "mean reward, held-out prompts",
    "gold": "gold judge, held-out prompts",
    "diversity": "distinct n-grams over all answers",
}


def slug(family: str) -> str:
    return "s-" + "".join(c if c.isalnum() else "-" for c in family)


def style(families: Sequence[str]) -> str:
    """The page's own colours, and a dark set for readers whose system asks for it."""
    common = (
        "text{font:13px system-ui,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif;fill:#191b20}"
        ".tick,.axis-title{font-size:12px;fill:#5d626c}.strong{font-weight:600}.grid{stroke:#e3e3de;fill:none}"
        ".axis,.zero{stroke:#8b909a;fill:none}.zero{stroke-dasharray:2 3}"
        ".line{fill:none;stroke-width:2.2;stroke-linejoin:round}"
        ".ground{fill:#fff}.whisker{stroke-width:1.4;fill:none;opacity:.65}"
    )
    dark = (
        "text{fill:#e9eaec}.tick,.axis-title{fill:#a4a9b3}.grid{stroke:#31363e}"
        ".axis,.zero{stroke:#7d838e}.ground{fill:#1b1e23}"
    )
    for family in families:
        _, light, night, dash = STYLE[family]
        name = slug(family)
        common += f".{name}{{stroke:{light}}}.{name}.dot,.{name}.label{{fill:{light};stroke:none}}"
        if dash:
            common += f".line.{name}{{stroke-dasharray:{dash}}}"
        dark += f".{name}{{stroke:{night}}}.{name}.dot,.{name}.label{{fill:{night};stroke:none}}"
    return f"<style>{common}@media(prefers-color-scheme:dark){{{dark}}}</style>"


def curves(
    seeds: dict[str, dict[str, Any]], judge: str, along: str = "kl"
) -> dict[str, list[tuple[float, float, float | None]]]:
    """family -> (mean of `along`, mean of `judge`, half width over seeds), the sweep's points in order."""
    rows: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for points in seeds.values():
        place: dict[str, int] = {}
        for point in sorted(points.values(), key=lambda one: one.get("dial") or 0):
            family = point["family"]
            at = place.get(family, 0)
            place[family] = at + 1
            if point["kl"] is not None and family in STYLE:
                rows.setdefault(family, {}).setdefault(at, []).append(point)
    out = {}
    for family, by_place in rows.items():
        line = []
        for points_here in by_place.values():
            values = np.array([point[judge] for point in points_here])
            n = len(values)
            half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5) if n > 1 else None
            line.append((float(np.mean([point[along] for point in points_here])), float(values.mean()), half))
        out[family] = sorted(line)
    return out


def drawn(
    lines: dict[str, list[tuple[float, float, float | None]]],
    x: Scale,
    y: Scale,
    x_title: str,
    y_title: str,
    label: str,
    dots: bool = True,
) -> str:
    """Lines with intervals, a dot a point, and names at the right in an order that does not collide."""
    panel = Panel(x, y)
    panel.axes(x_title, y_title)
    ends = []
    for family, line in lines.items():
        name = slug(family)
        shown = [(a, b, half) for a, b, half in line if x.low <= a <= x.high and y.low <= b <= y.high]
        if len(shown) > 1:
            panel.path([(a, b) for a, b, _ in shown], f"line {name}")
        for a, b, half in shown if dots else []:
            if half is not None:
                low, high = y.at(max(y.low, b - half)), y.at(min(y.high, b + half))
                panel.parts.append(
                    element("path", d=f"M{num(x.at(a))} {num(low)}V{num(high)}", class_=f"whisker {name}")
                )
            panel.parts.append(element("circle", cx=x.at(a), cy=y.at(b), r=3.6, class_=f"dot {name}"))
        if shown:
            ends.append((y.at(shown[-1][1]), family))
    at = -1e9
    for height, family in sorted(ends):
        at = max(height, at + 17)
        panel.parts.append(text(x.end + 12, at + 4, STYLE[family][0], f"label {slug(family)}"))
    ground = element("rect", x="0", y="0", width=num(WIDTH), height=num(HEIGHT), class_="ground")
    return figure(WIDTH, HEIGHT, label, style(list(lines)), ground, panel.markup).replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1
    )


def curves_figure(seeds: dict[str, dict[str, Any]], judge: str) -> str:
    """Reward (or gold, or diversity) against KL on a logarithmic axis, so that a distance along it is a ratio of KLs."""
    lines = curves(seeds, judge)
    base = lines.pop("base")[0]
    kls = [kl for line in lines.values() for kl, _, _ in line if kl > 0]
    values = [value for line in lines.values() for _, value, _ in line] + [base[1]]
    x = Scale.nice([max(min(kls), 1e-3), min(max(kls), 1.5)], 62.0, WIDTH - 190.0, log=True)
    y = Scale.nice(values, HEIGHT - 54.0, 42.0)
    out = drawn(
        lines, x, y, "KL from the base, nats a token (log scale) →", "↑ " + TITLES[judge],
        f"{TITLES[judge]} against KL per token for {', '.join(STYLE[f][0] for f in lines)}",
    )  # fmt: skip
    at = y.at(base[1])
    mark = element("path", d=f"M{num(x.start)} {num(at)}H{num(x.end)}", class_="zero") + text(
        x.start + 6, at - 6, "base"
    )
    return out.replace("</svg>", mark + "</svg>")


def diversity_figure(seeds: dict[str, dict[str, Any]]) -> str:
    """Diversity against reward: what a reward costs in variety."""
    lines = curves(seeds, "diversity", "reward")
    base = lines.pop("base")[0]
    values = [value for line in lines.values() for _, value, _ in line]
    x = Scale.nice([base[0], *(reward for line in lines.values() for reward, _, _ in line)], 62.0, WIDTH - 190.0)
    y = Scale.nice([0.0, base[1], *values], HEIGHT - 54.0, 42.0)
    out = drawn(
        {family: [base, *line] for family, line in lines.items()}, x, y, TITLES["reward"] + " →",
        "↑ " + TITLES["diversity"], "Distinct n-grams against reward",
    )  # fmt: skip
    return out.replace("</svg>", text(x.at(base[0]) + 8, y.at(base[1]) - 8, "base") + "</svg>")


def exact_figure(data: dict[str, Any]) -> str:
    """Share of the largest possible gain against KL, every model of hidden size 16 a line's worth of points, averaged."""
    runs = [points for key, points in data.items() if key.startswith("d=16 ")]
    grid = np.linspace(0.2, 3.0, 15)
    lines = {}
    for name in ("natural control, 8 rounds", "natural control", "fitted, 3 rounds", "fitted"):
        shares = np.array(
            [np.interp(grid, [r["kl"] for r in run[name]], [100 * r["share"] for r in run[name]]) for run in runs]
        )
        lines[name] = [
            (float(kl), float(column.mean()), float(np.ptp(column)) / 2)
            for kl, column in zip(grid, shares.T, strict=True)
        ]
    cloud = [(r["kl"], 100 * r["share"]) for run in runs for r in run["re-control"] if r["kl"] <= 3.1]
    x = Scale(0.0, 3.0, 62.0, WIDTH - 190.0, step=0.5)
    y = Scale(-60.0, 100.0, HEIGHT - 54.0, 42.0, step=20.0)
    lines["re-control"] = []
    out = drawn(
        lines, x, y, "KL of a whole answer, nats →", "↑ % of the largest possible gain at that KL",
        "Share of the exact optimum's gain: natural control near 100 %, RE-Control between -60 and 80 %", dots=False,
    )  # fmt: skip
    dots = "".join(
        element("circle", cx=x.at(kl), cy=y.at(max(-60.0, share)), r=4.0, class_=f"dot {slug('re-control')}")
        for kl, share in cloud
    )
    lowest = max(cloud, key=lambda point: point[0])
    name = text(x.end + 12, y.at(max(-55.0, lowest[1])), "RE-Control, exact V", f"label {slug('re-control')}")
    return out.replace("</svg>", dots + name + "</svg>")


def ablation_figure(rows: Sequence[tuple[str, str, list[float]]]) -> str:
    """One row a variant: reward at 0.06 nats a token, the default's as a vertical line."""
    default = float(np.mean(rows[0][2]))
    height = 70.0 + 24.0 * len(rows)
    values = [value for _, _, found in rows for value in found]
    x = Scale.nice([*values, default], 230.0, WIDTH - 40.0)
    parts = [element("rect", x="0", y="0", width=num(WIDTH), height=num(height), class_="ground")]
    bottom = height - 44.0
    for tick in x.ticks():
        parts.append(element("path", d=f"M{num(x.at(tick))} 20V{num(bottom)}", class_="grid"))
        parts.append(text(x.at(tick), bottom + 18, x.tick_label(tick), "tick", "middle"))
    parts.append(text(x.end, bottom + 36, "reward at 0.06 nats a token →", "axis-title", "end"))
    parts.append(element("path", d=f"M{num(x.at(default))} 20V{num(bottom)}", class_="zero"))
    for row, (variant, _, found) in enumerate(rows):
        y = 34.0 + 24.0 * row
        parts.append(text(214.0, y + 4, variant, "strong" if row == 0 else "", "end"))
        mean = float(np.mean(found))
        parts.append(
            element("path", d=f"M{num(x.at(default))} {num(y)}H{num(x.at(mean))}", class_="whisker s-natural-control")
        )
        parts.append(element("circle", cx=x.at(mean), cy=y, r=4.5, class_="dot s-natural-control"))
    label = "Reward at 0.06 nats a token when one option is changed: " + "; ".join(
        f"{variant} {np.mean(found):.3f}" for variant, _, found in rows
    )
    return figure(WIDTH, height, label, style(["natural-control"]), *parts).replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1
    )
