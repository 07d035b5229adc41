"""Fronts, over-optimisation, paired differences and picks, on cases small enough to do by hand."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.report.analysis import (
    Estimate,
    GoodRule,
    correlation,
    net_wins,
    number,
    over_optimisation,
    pair_rows,
    paired_difference,
    pareto_front,
    picks,
)


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1, 1)], [0]),
        ([(0, 0), (1, 1), (2, 2)], [0, 1, 2]),
        ([(0, 1), (1, 0)], [0]),
        ([(0, 0), (2, 3), (1, 3), (3, 2)], [0, 2]),  # equal value at lower cost wins
        ([(1, 1), (1, 2)], [1]),  # equal cost, higher value wins
        ([(1, 1), (1, 1), (0, 0)], [2, 0, 1]),  # equal points stand together
        ([(5, 5), (0, -1), (3, 5), (4, 6)], [1, 2, 3]),
    ],
)
def test_pareto_front(points: list[tuple[float, float]], front: list[int]) -> None:
    assert pareto_front(points) == front


def estimates(means: list[float], half: float | None) -> list[Estimate]:
    return [Estimate(m) if half is None else Estimate(m, m - half, m + half) for m in means]


@pytest.mark.parametrize(
    ("proxy", "gold", "half", "state", "index"),
    [
        ([0, 1, 2, 3], [0, 0.5, 0.3, 0.1], 0.05, "starts", 1),
        ([0, 1, 2, 3], [0, 0.5, 0.6, 0.7], 0.05, "not seen", None),
        ([0, 1, 2, 3], [0, 0.5, 0.49, 0.48], 0.05, "undecided", 1),  # the fall lies within the intervals
        ([0, 1, 2, 3], [0, 0.5, 0.3, 0.1], None, "undecided", 1),  # no interval, no certainty
        ([0, 1, 0.9, 0.8], [0, 0.5, 0.3, 0.1], 0.05, "not seen", None),  # the proxy falls too: not over-optimisation
        ([0, 1, 2, 3], [0.9, 0.5, 0.3, 0.1], 0.05, "starts", 0),  # every step was too far
        ([0, 1, 2, 3], [0, 0.5, 0.1, 0.5], 0.05, "starts", 1),  # a dip counts; the first of equal peaks is taken
        ([0, 1], [0, 1], 0.05, "too few points", None),
    ],
)
def test_over_optimisation(
    proxy: list[float], gold: list[float], half: float | None, state: str, index: int | None
) -> None:
    found = over_optimisation(estimates(proxy, half), estimates(gold, half))
    assert (found.state, found.index) == (state, index) and found.sentence


def test_over_optimisation_needs_gold() -> None:
    assert over_optimisation(estimates([0, 1, 2], 0.1), [None, None, None]).state == "no gold"


def test_number_accepts_only_finite_numbers() -> None:
    assert [number(v) for v in (1, 2.5, {"mean": 3}, None, float("nan"), float("inf"), True, "4", {})] == [
        *(1.0, 2.5, 3.0, None, None, None, None, None, None)
    ]


def rows(policy: str, scores: list[list[float | None]], key: str = "reward") -> list[dict[str, Any]]:
    """scores[prompt][sample]"""
    return [
        {"policy": policy, "prompt_index": i, "sample": k, key: score, "text": "", "prompt": ""}
        for i, column in enumerate(scores)
        for k, score in enumerate(column)
    ]


def test_paired_difference_is_that_of_the_table() -> None:
    pairs = pair_rows([*rows("base", [[0, 0], [0]]), *rows("m", [[1, 1], [4]])], "base", "m")
    found = paired_difference(pairs, "reward")
    assert (
        found is not None and found.mean == 2.0
    )  # (1 + 1 + 4) / 3: rows are pooled, prompts are the clusters of the interval
    assert paired_difference([], "reward") is None


def test_paired_difference_skips_what_could_not_be_judged() -> None:
    pairs = pair_rows([*rows("base", [[0], [None], [0]]), *rows("m", [[1], [9], [None]])], "base", "m")
    found = paired_difference(pairs, "reward")
    assert found == Estimate(1.0) and found.interval is None  # one prompt is left: no interval


def test_good_rule_and_net_wins() -> None:
    base, method = rows("base", [[1], [0], [1], [0], [None]], "gold"), rows("m", [[1], [1], [0], [1], [1]], "gold")
    rule = GoodRule.choose([*base, *method], "base")
    pairs = pair_rows([*base, *method], "base", "m")
    assert [rule.quadrant(pair) for pair in pairs] == ["both", "method", "base", "method", "unjudged"]
    net = net_wins(pairs, rule)
    assert net is not None and net.mean == 0.25
    proxy = GoodRule.choose(rows("base", [[1.0], [2.0], [3.0]]), "base")
    assert proxy.key == "reward" and proxy.threshold == 2.0 and proxy.good({"reward": 2.0}) is False


def test_picks_follow_their_rule() -> None:
    pairs = pair_rows([*rows("base", [[0.0]] * 5), *rows("m", [[0.5], [-2.0], [0.1], [3.0], [0.2]])], "base", "m")
    found = {why: pair[0]["prompt_index"] for why, pair in picks(pairs, seed=0)}
    assert found["median improvement"] == 4 and found["worst regression"] == 1
    assert found["random"] not in (1, 4) and picks(pairs, 0) == picks(pairs, 0)
    assert picks([], 0) == []
    [(why, _), *rest] = picks(pairs[:1], 0)
    assert why == "median improvement and smallest improvement (no regression)" and not rest


def test_correlation_needs_variation() -> None:
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert correlation([1, 1, 1], [1, 2, 3]) is None and correlation([1, 2], [1, 2]) is None
