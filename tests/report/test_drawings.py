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


def labels(markup: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(markup).iter("text")]


def test_layers_are_whole_numbers_and_shares_lie_between_0_and_1() -> None:
    layers = labels(draw(plain(Lines("t", "layer", "F1", [Line("a", [(x, 0.0) for x in range(1, 5)])]))))
    assert layers[:10] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0", "1", "2", "3", "4"]
    many = labels(draw(plain(Lines("t", "layer", "F1", [Line("a", [(x, x) for x in range(16)])]))))
    assert many[:8] == ["0", "5", "10", "15"] * 2  # not 2.5
    assert labels(draw(plain(Dots("t", "share", [("a", 0.0, None, None)]))))[:2] == ["0.0", "0.2"]


def test_names_of_lines_do_not_touch_and_are_whole() -> None:
    name = "answers of 24 tokens or more, up to this one"
    lines = Lines(
        "t", "x", "y", [Line(name, [(0, 0.1), (1, 0.9)])], [("chance", 0.5), ("TF-IDF", 0.51), ("floor", 0.8)]
    )
    root = ET.fromstring(draw(plain(lines)))
    at = {element.text: float(element.get("y", "nan")) for element in root.iter("text")}
    assert at["chance"] - at["TF-IDF"] >= 12 and at["TF-IDF"] - at["floor"] >= 12 and name in at


def test_no_band_lies_over_a_line_or_bridges_what_is_unknown() -> None:
    known = [(0, 0.5, 0.4, 0.6), (1, 0.5, 0.4, 0.6), (2, 0.5, None, None), (3, 0.5, 0.4, 0.6), (4, 0.5, 0.4, 0.6)]
    markup = draw(plain(Lines("t", "x", "y", [Line("a", known), Line("b", known)])))
    assert markup.rindex('class="band') < markup.index('class="series') and markup.count('class="band') == 4


def test_a_bracket_joins_its_matches() -> None:
    root = ET.fromstring(draw(plain(FIGURES[3])))
    ends = [path.get("d", "") for path in root.iter("path")]
    assert len(ends) == 2 and len({end.split("V")[1] for end in ends}) == 1  # both arrive at the final


def test_a_small_heat_map_is_not_blown_up() -> None:
    assert draw(plain(Heat("t", ["a"], ["b"], [[0.5]]))).startswith('<svg viewBox="0 0 560 ')


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
