"""The report's pictures: what was bought against what was paid, and the reward distributions.

Each function returns markup ready to stand inside a `<figure>`, with its text alternative in `aria-label`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trimtab.report import svg
from trimtab.report.analysis import Estimate, number, pareto_front

WIDTH, HEIGHT = 480.0, 360.0


@dataclass(frozen=True)
class PolicyView:
    """One row of compare.json as the pictures need it. `kl`: nats per token from the base, or its upper bound."""

    name: str
    kind: str  # base | steered | bound | other
    reward: Estimate | None
    gold: Estimate | None
    kl: Estimate | None
    kl_is_bound: bool
    tokens: float | None

    @staticmethod
    def read(policy: dict[str, Any], is_base: bool) -> PolicyView:
        """`kl_bound` is an upper bound in nats per token (for best-of-n: of an answer, divided by the mean length)."""
        kl, bound = Estimate.read(policy.get("kl_per_token")), number(policy.get("kl_bound"))
        is_bound = False
        if is_base:
            kl = Estimate(0.0)
        elif kl is None and bound is not None:
            kl, is_bound = Estimate(bound), True
        kind = "base" if is_base else "bound" if is_bound else "other" if kl is None else "steered"
        cost = policy.get("cost") or {}
        return PolicyView(
            str(policy["name"]),
            kind,
            Estimate.read(policy.get("reward")),
            Estimate.read(policy.get("gold")),
            kl,
            is_bound,
            number(cost.get("tokens_forwarded_per_answer")),
        )


@dataclass
class Chart:
    """A finished picture: `markup`, and sentences that belong below it (what could not be drawn or labelled)."""

    markup: str
    notes: list[str] = field(default_factory=list)


def describe(estimate: Estimate, digits: int = 3) -> str:
    if estimate.interval is None:
        return f"{estimate.mean:.{digits}f}"
    return f"{estimate.mean:.{digits}f} [{estimate.interval[0]:.{digits}f}, {estimate.interval[1]:.{digits}f}]"


def trade_off(policies: Sequence[PolicyView], value: str, cost: str, value_title: str) -> Chart | None:
    """One dot per policy: `value` (reward | gold) against `cost` (kl | tokens), intervals, Pareto front, base marked.

    None where fewer than two policies have both numbers.
    """
    marks: list[svg.Mark] = []
    left_out: list[str] = []
    for number_, policy in enumerate(policies, 1):
        y = getattr(policy, value)
        price = policy.kl if cost == "kl" else None if policy.tokens is None else Estimate(policy.tokens)
        if y is None or price is None:
            left_out.append(policy.name)
            continue
        sign = "≤ " if cost == "kl" and policy.kl_is_bound else ""
        unit = "nats/token" if cost == "kl" else "tokens/answer"
        tooltip = f"{policy.name}: {value} {describe(y)} at {sign}{describe(price, 3 if cost == 'kl' else 1)} {unit}"
        marks.append(
            svg.Mark(
                price.mean, y.mean, policy.name, policy.kind, False, price.interval, y.interval, tooltip, number=number_
            )
        )
    if len(marks) < 2:
        return None
    front = pareto_front([(mark.x, mark.y) for mark in marks])
    marks = [replace(mark, front=i in front) for i, mark in enumerate(marks)]

    ys = [v for mark in marks for v in (mark.y, *(mark.y_interval or ()))]
    xs = [v for mark in marks for v in (mark.x, *(mark.x_interval or ()))]
    log = cost == "tokens" and min(xs) > 0 and max(xs) > 4 * min(xs)
    x = svg.Scale.nice(xs, 70.0, WIDTH - 26.0, zero=True, log=log)
    y = svg.Scale.nice(ys, HEIGHT - 54.0, 40.0)
    panel = svg.Panel(x, y, inset=20.0)
    if cost == "tokens":
        marks = _spread(marks, x)
    names = {
        "kl": "KL from the base, nats per token",
        "tokens": "tokens forwarded per answer" + (" (log scale)" if log else ""),
    }
    panel.axes(names[cost] + " →", "↑ " + value_title)
    _front_line(panel, [(marks[i].x, marks[i].y) for i in front])
    if cost == "kl":
        _family_lines(panel, marks)
    numbered = panel.scatter(marks)
    members = ", ".join(marks[i].label for i in front)
    label = f"Scatter of {value_title} against {names[cost]}. Pareto front: {members}. " + "; ".join(
        m.tooltip for m in marks
    )
    notes = []
    if left_out:
        notes.append(f"Not drawn, no {'KL' if cost == 'kl' else 'count'} known: {', '.join(left_out)}.")
    if numbered:
        notes.append("By number, for lack of room: " + ", ".join(f"{m.number} {m.label}" for m in numbered) + ".")
    if any(mark.shift for mark in marks):
        notes.append("Policies of equal cost stand beside one another, the best at the true place.")
    return Chart(svg.figure(WIDTH, HEIGHT, label, panel.markup), notes)


def _spread(marks: list[svg.Mark], x: svg.Scale) -> list[svg.Mark]:
    """Moves marks at the same place of the x axis to the right of the best of them, so that all can be seen."""
    out, taken = list(marks), list[float]()
    places = [x.at(mark.x) for mark in marks]
    most = max(sum(abs(a - b) < 2 for b in places) for a in places)
    step = min(11.0, 100.0 / most)
    for i in sorted(range(len(marks)), key=lambda i: (not marks[i].front, -marks[i].y, i)):
        at = x.at(marks[i].x)
        same = sum(abs(at - other) < 2 for other in taken)
        taken.append(at)
        out[i] = replace(marks[i], shift=step * same)
    return out


def _family_lines(panel: svg.Panel, marks: Sequence[svg.Mark]) -> None:
    """A thin line through the strengths of one method (names that differ only after the colon)."""
    families: dict[str, list[tuple[float, float]]] = {}
    for mark in marks:
        if mark.kind == "steered":
            families.setdefault(mark.label.split(":")[0], []).append((mark.x, mark.y))
    for points in families.values():
        if len(points) > 1:
            panel.path(sorted(points), "family-line")


def _front_line(panel: svg.Panel, front: list[tuple[float, float]]) -> None:
    """A staircase: what is bought at each price; the last step runs to the edge of the picture."""
    steps: list[tuple[float, float]] = []
    for x, y in front:
        steps += [(x, steps[-1][1]), (x, y)] if steps else [(x, y)]
    steps.append((panel.x.high, steps[-1][1]))
    panel.path([(steps[0][0], panel.y.low), *steps, (panel.x.high, panel.y.low)], "front-area")
    panel.path(steps, "front-line")


def histograms(rewards: dict[str, list[float]], base: str, reward_title: str, bins: int = 22) -> list[tuple[str, str]]:
    """One small histogram a policy on shared axes, the base's outline in each; (name, markup) pairs, the base first."""
    values = [v for column in rewards.values() for v in column]
    if not values:
        return []
    width, height = 340.0, 170.0
    x = svg.Scale.nice(values, 10.0, width - 10.0, count=4)
    edges = np.linspace(x.low, x.high, bins + 1)
    shares = {name: np.histogram(column, edges)[0] / max(1, len(column)) for name, column in rewards.items() if column}
    top = max(float(share.max()) for share in shares.values())
    y = svg.Scale(0.0, top, height - 30.0, 26.0)
    out = []
    for name, share in shares.items():
        panel = svg.Panel(x, y)
        kind = "base" if name == base else "steered"
        for left, right, value in zip(edges[:-1], edges[1:], share, strict=True):
            if value > 0:
                a, b, at = x.at(float(left)), x.at(float(right)), y.at(float(value))
                tip = svg.title(f"{left:.3g} to {right:.3g}: {value:.1%} of answers")
                panel.parts.append(
                    svg.element(
                        "rect",
                        tip,
                        x=a + 0.6,
                        y=at,
                        width=b - a - 1.2,
                        height=y.start - at,
                        rx="1.5",
                        class_=f"bar {kind}",
                    )
                )
        if name != base and base in shares:
            outline = [
                (float(e), float(s))
                for left, right, s in zip(edges[:-1], edges[1:], shares[base], strict=True)
                for e, s in ((left, s), (right, s))
            ]
            panel.path([(x.low, 0.0), *outline, (x.high, 0.0)], "outline")
        panel.parts.append(
            svg.element("path", d=f"M{svg.num(x.start)} {svg.num(y.start)}H{svg.num(x.end)}", class_="axis")
        )
        for tick in x.ticks():
            panel.parts.append(svg.text(x.at(tick), y.start + 18, x.tick_label(tick), "tick", "middle"))
        mean = float(np.mean(rewards[name]))
        at = x.at(mean)
        panel.parts.append(
            svg.element("path", d=f"M{svg.num(at)} {svg.num(y.start)}V{svg.num(y.end - 4)}", class_="mean-line")
        )
        anchor = "start" if at < x.start + 60 else "end" if at > x.end - 60 else "middle"
        panel.parts.append(svg.text(at, y.end - 10, f"mean {mean:.3f}", "label strong", anchor))
        label = f"Histogram of {reward_title} for {name}: {len(rewards[name])} answers, mean {mean:.3f}"
        out.append((name, svg.figure(width, height, label, panel.markup)))
    return out


def interval_cell(estimate: Estimate | None, scale: svg.Scale, base: float | None) -> str:
    """A dot and its interval for a table cell, the base's mean as a faint vertical; hidden from screen readers."""
    if estimate is None:
        return ""
    middle = 9.0
    parts = []
    if base is not None:
        parts.append(svg.element("path", d=f"M{svg.num(scale.at(base))} 1V17", class_="reference"))
    if estimate.interval:
        low, high = (scale.at(v) for v in estimate.interval)
        parts.append(
            svg.element("path", d=f"M{svg.num(low)} {svg.num(middle)}H{svg.num(high)}", class_="whisker steered")
        )
    parts.append(svg.element("circle", cx=scale.at(estimate.mean), cy=middle, r=3.6, class_="mark steered"))
    return f'<svg viewBox="0 0 110 18" class="cell" aria-hidden="true">{"".join(parts)}</svg>'
