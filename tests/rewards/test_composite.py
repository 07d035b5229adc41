"""Rewards made of rewards: each by hand, missing parts, and the spec they are written as."""

from __future__ import annotations

import math

import pytest

from trimtab.errors import UsageError
from trimtab.rewards import Ensemble, Function, Gate, LogSigmoid, Min, Product, parse_reward


def fixed(*values: float | None) -> Function:
    """The i-th answer's score is values[i]."""
    return Function(lambda prompts, texts: [values[int(text)] for text in texts], name=f"fixed{values}")


def score(reward: object, rows: int) -> list[float | None]:
    return reward.score(["p"] * rows, [str(row) for row in range(rows)])  # type: ignore[attr-defined]


def test_each_by_hand() -> None:
    a, b = fixed(0.2, 0.9), fixed(0.5, 0.4)
    assert score(Min((a, b)), 2) == [0.2, 0.4]
    assert score(Product((a, b)), 2) == pytest.approx([0.1, 0.36], abs=1e-12)
    assert score(Ensemble((a, b)), 2) == pytest.approx([0.35, 0.65], abs=1e-12)
    # population sd of two numbers is half their distance: 0.15 and 0.25
    assert score(Ensemble((a, b), k=2), 2) == pytest.approx([0.05, 0.15], abs=1e-12)
    by_hand = [-math.log1p(math.exp(-(x - 0.1))) - math.log1p(math.exp(-(y - 1))) for x, y in ((0.2, 0.5), (0.9, 0.4))]
    assert score(LogSigmoid((a, b), references=(0.1, 1.0)), 2) == pytest.approx(by_hand, abs=1e-12)
    assert score(Gate((a, b), threshold=0.5, floor=0.45, margin=2), 2) == [pytest.approx(-1.55), 0.45]


def test_log_sigmoid_saturates_and_does_not_overflow() -> None:
    reward = LogSigmoid((fixed(800.0, -800.0), fixed(0.0, 0.0)))
    assert score(reward, 2) == pytest.approx([-math.log(2), -800 - math.log(2)], abs=1e-9)


def test_everything_behind_a_gate_is_above_everything_before_it() -> None:
    gate = Gate((fixed(0.4, 0.6, 0.6), fixed(99.0, -50.0, 0.3)), threshold=0.5, floor=-1.0, margin=0.5)
    assert score(gate, 3) == [-1.5, -1.0, 0.3]


def test_a_part_that_cannot_judge() -> None:
    a, b = fixed(0.2, None, None), fixed(None, 0.4, None)
    assert score(Min((a, b)), 3) == [None, None, None]
    assert score(Min((a, b), optional=(2,)), 3) == [0.2, None, None]
    assert score(Ensemble((a, b), optional=(1, 2)), 3) == [0.2, 0.4, None]
    assert score(LogSigmoid((a, b), optional=(1,), references=(9.0, 0.4)), 3) == [
        None,
        pytest.approx(-math.log(2)),
        None,
    ]


def test_parts_are_kept_by_name() -> None:
    reward = parse_reward("min:rewards=length:target=2|length:target=4")
    assert reward.parts(["p"], ["a b"]) == {"length:target=2": [0.0], "length:target=4": [-0.5]}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("min:rewards=regex:pattern=a|length:target=30", ["regex:pattern=a", "length:target=30"]),
        ("min:rewards=keyword:words=good|fine|length:target=3", ["keyword:words=good|fine", "length:target=3"]),
        (r"gate:rewards=json:keys=a:number|length:target=9\,hard=true,floor=-1",
         ["json:keys=a:number", "length:target=9,hard=true"]),
    ],
)  # fmt: skip
def test_spec(spec: str, parts: list[str]) -> None:
    reward = parse_reward(spec)
    assert [part.name for _, part in reward.terms] == parts  # type: ignore[attr-defined]
    assert parse_reward(reward.name).fingerprint == reward.fingerprint
    assert parse_reward(f"0.5*{spec}+2*length:target=7").fingerprint != reward.fingerprint


def test_a_sum_is_made_of_composites() -> None:
    reward = parse_reward("0.5*min:rewards=length:target=2|length:target=4+2*length:target=2")
    assert reward.score(["p"], ["a b"]) == [pytest.approx(0.5 * -0.5)]
    inside = Min((parse_reward("0.5*length:target=2+0.5*length:target=4"), "length:target=3"))  # from Python
    assert inside.score(["p"], ["a b"]) == [pytest.approx(-1 / 3)]


def test_fingerprint_follows_parts_and_options() -> None:
    specs = ("rewards=length:target=3|length:target=4", "rewards=length:target=3|length:target=5",
             "rewards=length:target=3|length:target=4,k=1", "rewards=length:target=3|length:target=4,optional=2")  # fmt: skip
    assert len({parse_reward(f"ensemble:{spec}").fingerprint for spec in specs}) == 4


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("min:rewards=length:target=3", "two rewards or more"),
        ("min:rewards=length:target=3|length:target=4,optional=3", "must name parts 1..2"),
        ("log-sigmoid:rewards=length:target=3|length:target=4,references=1", "2 parts and 1 references"),
        ("ensemble:rewards=length:target=3|length:target=4,k=-1", "k of 0 or more"),
        ("gate:rewards=length:target=3|length:target=4|length:target=5", "two parts"),
        ("gate:rewards=length:target=3|length:target=4,optional=1", "neither optional"),
        ("gate:rewards=length:target=3|length:target=4,margin=0", "margin above 0"),
        ("min:rewards=nothing|length:target=4", "unknown reward 'nothing'"),
        ("min", "needs rewards"),
    ],
)
def test_what_is_refused(spec: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_reward(spec)


def test_a_product_of_what_is_no_share_is_refused() -> None:
    with pytest.raises(UsageError, match=r"length:target=4' gave -0.75, and parts must lie in \[0, 1\]"):
        parse_reward("product:rewards=keyword:words=a|length:target=4").score(["p"], ["a"])
