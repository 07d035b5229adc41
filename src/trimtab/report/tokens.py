"""An answer as coloured tokens: the value before each token as background, the KL (or edit) spent on it as underline.

Any page can share this: it emits `<span class="tok up" style="--v:..;--u:..">`, and `tokens.css` turns that into colour
and thickness. `--v` in [0, 1]: how far the value is above (`up`) or below (`down`) the middle of the answers shown
together; `--u` in [0, 1]: the effort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from trimtab.report import svg
from trimtab.report.analysis import number


@dataclass(frozen=True)
class TokenScale:
    """Centre and half-range of the values, and the largest effort, over all answers that share a legend."""

    centre: float
    half: float
    most: float
    effort: str | None  # "kl" | "edit_norm" | None
    span: tuple[float, float] = (0.0, 1.0)  # of the values before and after the edit
    valued: bool = True  # False: no value was traced, and the background shows the effort too

    @staticmethod
    def fit(traces: Sequence[dict[str, Any]]) -> TokenScale:
        values = [v for trace in traces for v in column(trace, "value_before") if v is not None]
        effort = next(
            (key for key in ("kl", "edit_norm") if any(v is not None for t in traces for v in column(t, key))), None
        )
        efforts = sorted(v for trace in traces for v in column(trace, effort or "kl") if v is not None)
        low, high = (min(values), max(values)) if values else (0.0, 0.0)
        edited = [v for trace in traces for v in column(trace, "value_after") if v is not None]
        span = (min([low, *edited]), max([high, *edited]))
        most = efforts[int(0.98 * (len(efforts) - 1))] if efforts else 0.0
        return TokenScale((low + high) / 2, (high - low) / 2, most, effort, span, bool(values))

    def value(self, v: float | None) -> float:
        return 0.0 if v is None or self.half <= 0 else max(-1.0, min(1.0, (v - self.centre) / self.half))

    def underline(self, v: float | None) -> float:
        return 0.0 if v is None or self.most <= 0 else max(0.0, min(1.0, v / self.most))


def column(trace: dict[str, Any], key: str) -> list[float | None]:
    """A per-token column of a trace, one entry a piece; None where it was not recorded."""
    pieces = trace.get("pieces") or []
    values = list(trace.get(key) or [])
    return [number(values[i]) if i < len(values) else None for i in range(len(pieces))]


def spaced(pieces: Sequence[Any], text: str) -> list[str]:
    """The pieces with the white space that `text` has before them: decoders drop it from a token on its own."""
    out, at = [], 0
    for piece in map(str, pieces):
        body = piece.lstrip()
        start = at
        while start < len(text) and text[start].isspace():
            start += 1
        if body and text.startswith(body, start):
            out.append(text[at:start] + body)
            at = start + len(body)
        else:
            out.append(piece)
    return out


def coloured(trace: dict[str, Any], scale: TokenScale, text: str = "") -> str:
    """The answer as spans. Each carries its numbers as a tooltip; pieces are escaped, white space is that of `text`."""
    before, after = column(trace, "value_before"), column(trace, "value_after")
    kl, norm = column(trace, "kl"), column(trace, "edit_norm")
    effort = column(trace, scale.effort) if scale.effort else [None] * len(before)
    spans = []
    for i, piece in enumerate(spaced(trace.get("pieces") or [], text)):
        facts = [f"token {i + 1}"]
        for name, values in (("value before", before), ("after the edit", after), ("edit norm", norm), ("KL", kl)):
            if values[i] is not None:
                facts.append(f"{name} {values[i]:.3f}")
        v = scale.value(before[i]) if scale.valued else scale.underline(effort[i])
        side = "up" if v >= 0 else "down"
        style = f"--v:{abs(v):.2f};--u:{scale.underline(effort[i]):.2f}"
        spans.append(
            f'<span class="tok {side}" style="{style}" title="{escape(" · ".join(facts))}">{escape(piece)}</span>'
        )
    return "".join(spans)


def sparkline(trace: dict[str, Any], scale: TokenScale) -> str:
    """The value over the answer (line; dashed after the edit) and the effort per token (bars), without text."""
    before, after = column(trace, "value_before"), column(trace, "value_after")
    effort = column(trace, scale.effort) if scale.effort else [None] * len(before)
    if not before or (scale.half <= 0 and scale.most <= 0):
        return ""
    parts = []
    for i, e in enumerate(effort):
        if e is not None:
            height = 34 * scale.underline(e)
            parts.append(
                svg.element("rect", x=float(10 * i + 2), y=100 - height, width=6.0, height=height, class_="bar effort")
            )
    low, high = scale.span
    for values, class_ in ((after, "series after"), (before, "series proxy")):
        if not scale.valued or low == high:
            break
        points = [(10 * i + 5, 62 - 56 * (v - low) / (high - low)) for i, v in enumerate(values) if v is not None]
        if points:
            steps = "L".join(f"{svg.num(x)} {svg.num(y)}" for x, y in points)
            parts.append(svg.element("path", d=f"M{steps}", class_=class_, vector_effect="non-scaling-stroke"))
    width = 10 * len(before)
    label = "Value before each token (solid), after the edit (dashed), and effort per token (bars)"
    style = f"max-width:{26 * len(before)}px"
    box = f'viewBox="0 0 {width} 100" preserveAspectRatio="none"'
    return f'<svg {box} class="spark" style="{style}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
