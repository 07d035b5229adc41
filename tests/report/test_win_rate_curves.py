"""The figure of win rates against KL: well-formed, one colour a label, lines from the base to the end of the axis."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from trimtab.errors import UsageError
from trimtab.measure.win_rates import Rates, Transform, curve, uniform
from trimtab.report.win_rate_curves import Lines, win_rate_figure


@pytest.fixture(scope="module")
def lines() -> Lines:
    betas = [20.0, 5.0, 1.0, 0.5, 0.2, 0.1, 0.05]
    return {
        name: [rate for _, rate in curve(transform, betas, uniform(128))]
        for name, transform in (("identity", Transform("identity")), ("exp <10>", Transform("exp")))
    }


def test_it_is_a_picture_on_its_own(lines: Lines) -> None:
    svg = win_rate_figure([("best of 4", "best", lines), ("one draw", "single", lines)])
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("role") == "img"
    assert "exp &lt;10&gt;" in svg and "prefers-color-scheme:dark" in svg and "http" not in svg.split(">", 1)[1]
    assert svg == win_rate_figure([("best of 4", "best", lines), ("one draw", "single", lines)])


def test_lines_run_from_the_base_to_the_end_of_the_axis(lines: Lines) -> None:
    svg = win_rate_figure([("best of 4", "best", lines)], most_kl=0.6)
    for number in (0, 1):
        drawn = next(d for d in re.findall(rf'd="(M[^"]+)" class="line l{number}"', svg) if "L" in d)
        points = [tuple(map(float, point.split())) for point in drawn[1:].split("L")]
        assert points[0] == (62.0, 276.0)  # KL 0, win rate 1/2: the corner of the axes
        assert points[-1][0] == 830.0  # the end of the axis, though no point lies there
        assert points == sorted(points) and [y for _, y in points] == sorted((y for _, y in points), reverse=True)


def test_a_line_shorter_than_the_axis_ends_where_it_ends() -> None:
    svg = win_rate_figure([("best", "best", {"only": [Rates(0.25, 0.6, 0.7, 0.55)]})], most_kl=1.0)
    drawn = next(d for d in re.findall(r'd="(M[^"]+)" class="line l0"', svg) if "L" in d)
    assert drawn.count("L") == 1


def test_too_many_lines_are_refused(lines: Lines) -> None:
    with pytest.raises(UsageError, match="1 to 6 lines, not 7"):
        win_rate_figure([("best", "best", {str(i): lines["identity"] for i in range(7)})])
    with pytest.raises(UsageError, match="not 0"):
        win_rate_figure([("best", "best", {})])
