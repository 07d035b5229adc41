"""The SVG writer: scales, ticks, label placement; the trade-off picture and the coloured tokens built on it."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ElementTree

import pytest

from report.synthetic import make
from trimtab.report import svg, tokens
from trimtab.report.analysis import Estimate
from trimtab.report.caveats import caveats
from trimtab.report.figures import PolicyView, histograms, trade_off
from trimtab.report.sweep import read_families, sweep_chart


@pytest.mark.parametrize("values", [[0.0, 1.0], [-3.2, 7.7], [1e-6, 3e-6], [5.0, 5.0], [0.0, 0.0], [-1e5, 2e6], []])
def test_a_scale_holds_its_values_between_few_even_ticks(values: list[float]) -> None:
    scale = svg.Scale.nice(values, 50.0, 450.0)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 8
    assert all(50.0 - 1e-6 <= scale.at(v) <= 450.0 + 1e-6 for v in values)
    assert len({scale.tick_label(tick) for tick in ticks}) == len(ticks)
    assert [float(scale.tick_label(tick)) for tick in ticks] == pytest.approx(ticks, abs=1e-9 + 1e-6 * abs(scale.step))


def test_a_log_scale_has_round_ticks() -> None:
    scale = svg.Scale.nice([30.0, 250.0], 0.0, 100.0, log=True)
    assert scale.ticks() == [50.0, 100.0, 200.0]
    assert scale.at(86.6025) == pytest.approx(50.0, abs=0.01)  # the geometric middle


def test_labels_never_overlap_or_leave_the_figure() -> None:
    generator = random.Random(0)
    bounds = (0.0, 0.0, 500.0, 400.0)
    for _ in range(30):
        anchors = [(generator.uniform(20, 480), generator.uniform(20, 380), "policy-name") for _ in range(12)]
        marks = [(x - 8, y - 8, x + 8, y + 8) for x, y, _ in anchors]
        boxes = [box for box in svg.place_labels(anchors, bounds, marks) if box]
        assert len(boxes) >= 8
        for i, box in enumerate(boxes):
            assert bounds[0] <= box[0] and box[2] <= bounds[2] and bounds[1] <= box[1] and box[3] <= bounds[3]
            assert not any(svg.overlap(box, other) for other in (*boxes[:i], *marks))


def views() -> list[PolicyView]:
    return [PolicyView.read(policy, i == 0) for i, policy in enumerate(make()["compare"]["policies"])]


def test_best_of_n_is_drawn_at_its_bound_per_token() -> None:
    policy = next(p for p in make()["compare"]["policies"] if p["name"] == "best-of-8")
    view = PolicyView.read(policy, False)
    assert view.kind == "bound" and view.kl == Estimate(policy["kl_bound"])
    chart = trade_off(views(), "reward", "kl", "reward")
    assert chart and chart.markup.count('class="mark bound"') == 1 and "≤ 0.0" in chart.markup


def test_charts_are_well_formed_and_mark_the_base_and_the_front() -> None:
    for value in ("reward", "gold"):
        for cost in ("kl", "tokens"):
            chart = trade_off(views(), value, cost, value)
            assert chart is not None
            root = ElementTree.fromstring(chart.markup)
            assert len(root.findall(".//rect[@class='mark base']")) == 1
            labels = {e.text for e in root.findall(".//text[@data-policy]")}
            assert {view.name for view in views()} == labels
    assert trade_off(views()[:1], "reward", "kl", "reward") is None


def test_a_crowd_is_numbered_and_listed() -> None:
    crowd = [
        PolicyView(f"policy-{i:02d}", "steered", Estimate(0.5), None, Estimate(0.1), False, 30.0) for i in range(60)
    ]
    chart = trade_off(crowd, "reward", "kl", "reward")
    assert chart and any("By number" in note and "60 policy-59" in note for note in chart.notes)


def test_the_sweep_marks_the_turn() -> None:
    parts = make()
    families = read_families(parts["sweep"], views()[0])
    states = {family.name: family.turn.state for family in families}
    assert states == {"re-control": "starts", "pref-ctrl": "starts", "natural-control": "not seen"}
    for family in families:
        markup = sweep_chart(family, families, "proxy", "gold").markup
        ElementTree.fromstring(markup)
        assert ("over-optimisation starts here" in markup) == (family.turn.state == "starts")
        assert family.points[0].x == 0.0  # the base stands first


def test_histograms_count_every_answer() -> None:
    rewards = {"base": [0.0, 1.0, 2.0, 2.0], "m": [1.0, 3.0]}
    for name, markup in histograms(rewards, "base", "reward"):
        shares = [float(share) for share in re.findall(r"([\d.]+)% of answers", markup)]
        assert sum(shares) == pytest.approx(100.0, abs=0.2)
        assert f"{len(rewards[name])} answers" in markup


def test_tokens_show_value_and_effort() -> None:
    trace = {
        "pieces": ["<b>", " good"],
        "value_before": [0.0, 1.0],
        "value_after": None,
        "edit_norm": None,
        "kl": [0.0, 0.2],
    }
    scale = tokens.TokenScale.fit([trace])
    markup = tokens.coloured(trace, scale)
    assert 'class="tok down" style="--v:1.00;--u:0.00"' in markup and 'class="tok up" style="--v:1.00;' in markup
    assert "&lt;b&gt;" in markup and "value before 1.000" in markup and "KL 0.200" in markup
    ElementTree.fromstring(tokens.sparkline(trace, scale))


def test_tokens_without_any_numbers_are_plain() -> None:
    trace = {"pieces": ["a"], "value_before": None, "value_after": None, "edit_norm": None, "kl": None}
    scale = tokens.TokenScale.fit([trace])
    assert scale.effort is None and "--v:0.00;--u:0.00" in tokens.coloured(trace, scale)
    assert tokens.sparkline(trace, scale) == ""


def test_caveats_come_from_checks() -> None:
    parts = make(prompts=48)
    found = {c.subject for c in caveats(parts["compare"], parts["samples"], views(), {})}
    assert {"Single seed", "Undecided", "KL is a bound", "Truncated answers"} <= found
    assert not found & {"Few prompts", "No gold reward", "Gold is the proxy", "Could not judge"}
    for row in parts["samples"]:
        row["reward"] = 0.1 * row["length"]
        row["gold"] = 1.0 if row["policy"] == "base" else 0.0
    found = {c.subject for c in caveats(parts["compare"], parts["samples"], views(), {})}
    assert {"Reward follows length", "Saturated"} <= found


def test_fitting_on_the_test_prompts_is_a_caveat() -> None:
    parts = make(prompts=3, samples=1)
    for arguments, expected in (
        ({"prompts": ["a", "b", "c"], "fit_prompts": None}, {"Fitted on test prompts", "Few fit prompts"}),
        ({"prompts": ["a", "b"], "fit_prompts": [f"{i}" for i in range(30)]}, set()),
        ({"prompts": ["a", "b"], "fit_prompts": ["a", *map(str, range(40))]}, {"Fitted on test prompts"}),
    ):
        found = {c.subject for c in caveats(parts["compare"], parts["samples"], views(), arguments)}
        assert found & {"Fitted on test prompts", "Few fit prompts"} == expected


def test_a_controller_without_a_value_shows_its_effort() -> None:
    trace = {"pieces": ["a", "b"], "value_before": None, "value_after": None, "edit_norm": [1.0, 2.0], "kl": None}
    scale = tokens.TokenScale.fit([trace])
    assert not scale.valued and scale.effort == "edit_norm"
    assert "--v:1.00;--u:1.00" in tokens.coloured(trace, scale) and "<path" not in tokens.sparkline(trace, scale)


def test_pieces_get_back_the_white_space_that_decoding_alone_drops() -> None:
    assert tokens.spaced(["The", "he", "ron", ".", "It"], "The heron.\n It") == ["The", " he", "ron", ".", "\n It"]
    assert tokens.spaced([" The", " end"], "The end") == ["The", " end"]
    assert tokens.spaced(["\ufffd", "x"], "é x") == ["\ufffd", "x"]  # half a character: left as it is
    assert tokens.spaced(["a", ""], "") == ["a", ""]
