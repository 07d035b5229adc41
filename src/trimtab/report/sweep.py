"""The strength sweep: proxy and gold against KL, one picture a family, and where over-optimisation starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from trimtab.report import svg
from trimtab.report.analysis import Estimate, OverOptimisation, number, over_optimisation
from trimtab.report.figures import Chart, PolicyView, describe


@dataclass(frozen=True)
class SweepPoint:
    """One strength of a family. `x`: KL per token (or the multiplier where KL is unknown)."""

    x: float
    multiplier: float | None
    reward: Estimate
    gold: Estimate | None


@dataclass(frozen=True)
class Family:
    name: str
    axis: str  # "kl" | "multiplier"
    points: tuple[SweepPoint, ...]
    turn: OverOptimisation

    @property
    def where(self) -> str:
        """The turning point in words, for the sentence that follows; empty where there is none."""
        if self.turn.index is None:
            return ""
        point = self.points[self.turn.index]
        at = "the base itself" if not point.multiplier else f"×{point.multiplier:g}"
        return f"at {at}" + (f", {point.x:.3f} nats/token" if self.axis == "kl" else "") + ": "

    @staticmethod
    def read(record: dict[str, Any], base: PolicyView) -> Family | None:
        """A family of sweep.json in order of strength, the base before it. None where no reward is known."""
        rows = [row for row in record.get("policies", []) if Estimate.read(row.get("reward")) is not None]
        by_kl = all(number(row.get("kl_per_token")) is not None for row in rows)
        points = []
        for row in rows:
            multiplier, reward = number(row.get("strength_multiplier")), Estimate.read(row["reward"])
            x = number(row.get("kl_per_token")) if by_kl else multiplier
            if x is not None and reward is not None:
                points.append(SweepPoint(x, multiplier, reward, Estimate.read(row.get("gold"))))
        if not points:
            return None
        if base.reward is not None and all(point.multiplier != 0 for point in points):
            points.append(SweepPoint(0.0, 0.0, base.reward, base.gold))
        points.sort(key=lambda p: (p.x, p.multiplier or 0.0))
        turn = over_optimisation([p.reward for p in points], [p.gold for p in points])
        return Family(str(record.get("family", "")), "kl" if by_kl else "multiplier", tuple(points), turn)


def read_families(sweep: dict[str, Any] | None, base: PolicyView) -> list[Family]:
    return [family for record in (sweep or {}).get("families", []) if (family := Family.read(record, base))]


def _extent(estimates: Sequence[Estimate | None]) -> list[float]:
    return [v for e in estimates if e is not None for v in (e.mean, *(e.interval or ()))]


def sweep_chart(family: Family, families: Sequence[Family], reward_title: str, gold_title: str | None) -> Chart:
    """Proxy above, gold below, one shared x; scales are those of all families, so that pictures can be compared."""
    peers = [other for other in families if other.axis == family.axis]
    golds = [p.gold for other in peers for p in other.points]
    with_gold = gold_title is not None and any(g is not None for g in golds)
    width, height = 400.0, 450.0 if with_gold else 290.0
    by_kl = family.axis == "kl"  # KL grows with the square of the strength: its root spreads the points evenly
    values = [p.x for other in peers for p in other.points]
    x = svg.Scale.nice(values, 58.0, width - 14.0, count=4, zero=True, root=by_kl)
    above = svg.Panel(
        x, svg.Scale.nice(_extent([p.reward for o in peers for p in o.points]), 210.0, 48.0, count=4), inset=10.0
    )
    x_title = "KL from the base, nats per token (root scale) →" if by_kl else "strength, × the family's own →"
    above.axes("" if with_gold else x_title, "↑ " + reward_title, x_labels=not with_gold)
    parts: list[str] = []
    if family.turn.index is not None:
        parts.append(_turn_line(family, x, 48.0, height - 54.0))
    _series(above, family, [p.reward for p in family.points], "proxy")
    _strength_labels(above, family)
    if with_gold:
        below = svg.Panel(x, svg.Scale.nice(_extent(golds), height - 54.0, 272.0, count=4), inset=10.0)
        below.axes(x_title, "↑ " + str(gold_title))
        _series(below, family, [p.gold for p in family.points], "gold")
        parts.append(below.markup)
    told = "; ".join(
        f"at {p.x:.3g}: proxy {describe(p.reward)}" + (f", gold {describe(p.gold)}" if p.gold else "")
        for p in family.points
    )
    label = f"Strength sweep of {family.name}. {family.turn.sentence}. {told}"
    return Chart(svg.figure(width, height, label, above.markup, *parts))


def _series(panel: svg.Panel, family: Family, estimates: Sequence[Estimate | None], class_: str) -> None:
    known = [(p, e) for p, e in zip(family.points, estimates, strict=True) if e is not None]
    panel.band([(p.x, *(e.interval or (e.mean, e.mean))) for p, e in known], f"band {class_}")
    panel.path([(p.x, e.mean) for p, e in known], f"series {class_}")
    for p, e in known:
        x, y = panel.x.at(p.x), panel.y.at(e.mean)
        name = "base" if p.multiplier == 0 else f"×{p.multiplier:g}" if p.multiplier is not None else ""
        kind = "base" if p.multiplier == 0 else "steered" if class_ == "proxy" else "gold"
        shape = (
            svg.marker(x, y, kind, 4.5)
            if kind != "gold"
            else svg.element("path", d=f"M{svg.num(x)} {svg.num(y - 6)}l5.5 10h-11z", class_="mark gold")
        )
        panel.parts.append(
            svg.element("g", svg.title(f"{family.name} {name}: {class_} {describe(e)} at {p.x:.3g}"), shape)
        )


def _strength_labels(panel: svg.Panel, family: Family) -> None:
    """The multiplier beside each point, where there is room for it; the strongest first."""
    at = [(panel.x.at(p.x), panel.y.at(p.reward.mean)) for p in family.points]
    marks = [(x - 6, y - 6, x + 6, y + 6) for x, y in at]
    steps = [(a[0] + (b[0] - a[0]) * k / 8, a[1] + (b[1] - a[1]) * k / 8) for a, b in pairwise(at) for k in range(9)]
    line = [(x - 3, y - 3, x + 3, y + 3) for x, y in steps]
    named = [(x, y, f"×{p.multiplier:g}") for p, (x, y) in zip(family.points, at, strict=True) if p.multiplier][::-1]
    bounds = (panel.x.start - 8, panel.y.end - 14, panel.x.end + 12, panel.y.start - 2)
    for (_, _, label), box in zip(named, svg.place_labels(named, bounds, marks, line, rings=(11.0, 17.0)), strict=True):
        if box is not None:
            panel.parts.append(svg.text((box[0] + box[2]) / 2, box[3] - 3, label, "strength", "middle"))


def _turn_line(family: Family, x: svg.Scale, top: float, bottom: float) -> str:
    """A vertical through both panels where gold is highest, its name between them on the side that has room."""
    at = x.at(family.points[family.turn.index or 0].x)
    words = "over-optimisation starts here" if family.turn.state == "starts" else "gold stops rising here (undecided)"
    width = svg.text_width(words) * 0.88
    line = svg.element("path", d=f"M{svg.num(at)} {svg.num(top)}V{svg.num(bottom)}", class_=f"turn {family.turn.state}")
    left = at + 8 if at + 8 + width <= x.end + 12 else at - 8 - width
    left = min(max(left, 4.0), x.end + 12 - width)
    side = "start" if left > at else "end"
    return line + svg.text(
        left if side == "start" else left + width, 232.0, words, f"turn-label {family.turn.state}", side
    )
