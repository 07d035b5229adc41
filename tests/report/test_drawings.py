"""The figures of measurements: each kind draws its numbers, hostile labels are text, nothing to draw draws nothing."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import asdict

import pytest

from trimtab.measure.measurement import Bracket, Dots, Figure, Heat, Line, Lines
from trimtab.report.drawings import draw, drawn
from trimtab.report.side_effects import moved, picture

HOSTILE = "</svg><img onerror=1>"
FIGURES: list[Figure] = [
    Lines("t", "layer", "F1", [Line("a", [(0, 0.1, 0.0, 0.2), (1, None), (2, 0.3, 0.2, 0.4)]), Line(HOSTILE, [(0, 0.5)])],
          [("chance", 0.5)]),
    Heat("t", ["p", HOSTILE], ["greedy", "k=1"], [[1.0, None], [0.0, 0.5]]),
    Dots("t", "rating", [(HOSTILE, 1.0, 0.5, 1.5), ("b", None, None, None), ("c", 2.0, None, None)], [("base", 1.2)]),
    Bracket("t", [[("a", "b", "a"), (HOSTILE, None, HOSTILE)], [("a", HOSTILE, "a")]]),
]  # fmt: skip


def plain(figure: Figure) -> dict:
    return json.loads(json.dumps(asdict(figure)))


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.kind)
def test_it_is_one_well_formed_picture_and_nothing_is_markup(figure: Figure) -> None:
    markup = draw(plain(figure))
    root = ET.fromstring(markup)
    assert (
        root.tag == "svg" and root.get("aria-label", "").startswith("t: ") and "img" not in {e.tag for e in root.iter()}
    )
    assert markup == draw(plain(figure)) and "nan" not in markup


def test_numbers_are_in_the_tooltips() -> None:
    titles = [element.text for element in ET.fromstring(draw(plain(FIGURES[1]))).iter("title")]
    assert titles[:2] == ["p, greedy: 1", "p, k=1: missing"]
    dots = ET.fromstring(draw(plain(FIGURES[2])))
    assert len([*dots.iter("circle")]) == 2  # what is undefined is not drawn at 0


def test_a_band_is_drawn_only_where_an_interval_is_known() -> None:
    markup = draw(plain(FIGURES[0]))
    assert markup.count("band ink-0") == 1 and "band ink-1" not in markup


@pytest.mark.parametrize(
    "figure",
    [Lines("t", "x", "y", [Line("a", [(0, None)])]), Heat("t", [], [], []), Dots("t", "x", []), Bracket("t", [])],
)
def test_nothing_to_draw(figure: Figure) -> None:
    assert drawn([plain(figure)]) == []


def test_a_large_heat_map_is_cut_to_what_can_be_read() -> None:
    big = Heat("t", [str(i) for i in range(500)], [str(i) for i in range(100)], [[0.5] * 100] * 500)
    assert draw(plain(big)).count("<rect") == 40 * 60


def test_the_panel_in_one_picture() -> None:
    change = {"label": "reward", "difference": 0.5, "low": 0.1, "high": 0.9, "verdict": "better"}
    worse = {"label": "length", "difference": -2.0, "low": None, "high": None, "verdict": "worse"}
    one = {"first": HOSTILE, "changes": [change, worse]}
    markup = picture({"comparisons": [one]})
    ET.fromstring(markup)
    assert "+0.50" in markup and "−2.00" in markup and "<img" not in markup
    assert moved(one) == "better: reward; worse: length"
    assert picture(None) == picture({"comparisons": []}) == ""
    assert moved({"changes": [{**change, "verdict": "undecided"}]}) == "nothing moved beyond its interval"
