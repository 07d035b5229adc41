"""A row of the table against figures worked out by hand from a few invented answers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trimtab.measure.stats import mean_interval
from trimtab.policies import Built
from trimtab.table import Measured, policy_record


def built(name: str = "steered", **fields: Any) -> Built:
    return Built(name, name, policy=None, **fields)  # type: ignore[arg-type]


def row(prompt: int, reward: float | None, length: int = 4, **fields: Any) -> dict[str, Any]:
    tokens = fields.pop("tokens", [10 * prompt + i for i in range(length)])
    given = {"gold": None, "kl": 0.1, "nll_base": 2.0, **fields}
    return {"prompt_index": prompt, "reward": reward, "length": length, "tokens": tokens, **given}


def measured(of: Built, *chunks: list[dict[str, Any]], **cost: Any) -> Measured:
    out = Measured(of)
    spent = {"tokens_forwarded": 90, "reward_calls": 6, "seconds": 1.5, "peak_memory_bytes": 1000, **cost}
    for rows in chunks:
        out.add({"rows": rows, "cost": spent})
    return out


BASE = [row(i, reward, gold=gold) for i, (reward, gold) in enumerate([(0.0, 0.2), (0.5, None), (0.25, 0.4)])]


def record(rows: list[dict[str, Any]], has_gold: bool = False, of: Built | None = None) -> dict[str, Any]:
    return policy_record(measured(of or built(), rows), measured(built("base"), BASE), has_gold)


# figures


def test_rewards_and_wins() -> None:
    found = record([row(0, 0.5), row(1, 0.5), row(2, 0.0)])
    assert found["reward"]["mean"] == pytest.approx(1 / 3)
    assert found["win_rate"]["mean"] == pytest.approx((1 + 0.5 + 0) / 3)  # a win, a tie, a loss
    assert found["verdict"] == "undecided" and found["gold"] is None
    expected = mean_interval([0.5, 0.5, 0.0], [0, 1, 2])
    assert (found["reward"]["low"], found["reward"]["high"]) == (expected.low, expected.high)


@pytest.mark.parametrize(("sign", "verdict"), [(1, "better"), (-1, "worse")])
def test_the_verdict_is_of_the_paired_difference(sign: int, verdict: str) -> None:
    """Prompts differ by far more than the policies do: only in pairs is the difference seen."""
    levels = [-3.0, -1.0, 0.0, 2.0, 4.0, 7.0]
    base = measured(built("base"), [row(i, level) for i, level in enumerate(levels)])
    steered = [row(i, level + sign * (0.1 + 0.01 * i)) for i, level in enumerate(levels)]
    assert policy_record(measured(built(), steered), base, False)["verdict"] == verdict


def test_three_prompts_that_differ_decide_nothing() -> None:
    """The interval of 3 in 75 excludes 0; exchanged at random, one outcome in four is as one-sided."""
    base = measured(built("base"), [row(i, 0.0) for i in range(75)])
    found = policy_record(measured(built(), [row(i, float(i < 3)) for i in range(75)]), base, False)
    assert found["win_rate"]["low"] > 0.5 and found["verdict"] == "undecided"


def test_gold_decides_where_there_is_gold_and_unjudged_rows_are_left_out_in_pairs() -> None:
    """Row 1 has no gold under the base, row 2 none under the policy: row 0 alone is compared."""
    found = record([row(0, -9.0, gold=0.3), row(1, -9.0, gold=0.9), row(2, -9.0, gold=None)], has_gold=True)
    assert found["gold"]["mean"] == pytest.approx((0.3 + 0.9) / 2)
    assert found["win_rate"] == {"mean": 1.0, "low": None, "high": None}
    assert found["verdict"] == "undecided"  # one pair


def test_gold_that_judged_nothing_has_no_figure() -> None:
    found = record([row(i, 1.0) for i in range(3)], has_gold=True)
    nothing = {"mean": None, "low": None, "high": None}
    assert (found["gold"], found["win_rate"], found["verdict"]) == (nothing, nothing, "undecided")
    assert found["reward"]["mean"] == 1.0


def test_a_reward_that_could_not_judge_is_not_0() -> None:
    assert record([row(0, 0.5), row(1, None), row(2, 1.0)])["reward"]["mean"] == pytest.approx(0.75)


def test_kl_and_nll_weigh_every_token_alike() -> None:
    rows = [
        row(0, 0, 1, kl=0.4, nll_base=3.0),
        row(1, 0, 3, kl=0.2, nll_base=1.0),
        row(2, 0, 0, kl=None, nll_base=None),
    ]
    found = record(rows)
    assert found["kl_per_token"]["mean"] == pytest.approx((0.4 * 1 + 0.2 * 3) / 4)
    assert found["nll_base_per_token"] == pytest.approx((3.0 * 1 + 1.0 * 3) / 4)
    assert found["length_tokens"] == pytest.approx(4 / 3)
    expected = mean_interval([0.4, 0.2, 0.2, 0.2], [0, 1, 1, 1])
    assert found["kl_per_token"] == expected.to_dict()


def test_the_bound_of_an_answer_is_divided_by_its_mean_length() -> None:
    bound = math.log(8) - 7 / 8
    found = record([row(0, 0, 2, kl=None), row(1, 0, 6, kl=None), row(2, 0, 1, kl=None)], of=built(kl_bound=bound))
    assert found["kl_bound"] == pytest.approx(bound / 3) and found["kl_per_token"] is None
    empty = record([row(i, 0, 0, kl=None, nll_base=None) for i in range(3)], of=built(kl_bound=bound))
    assert empty["kl_bound"] is None and empty["nll_base_per_token"] is None and empty["diversity"] is None


def test_diversity_is_over_all_answers_together() -> None:
    """n-grams of 1 2 3 4 5 and 1 2 3 4 6: 5 of 8 pairs, 4 of 6 triples, 3 of 4 quadruples are distinct."""
    rows = [row(0, 0, 5, tokens=[1, 2, 3, 4, 5]), row(1, 0, 5, tokens=[1, 2, 3, 4, 6]), row(2, 0, 0, tokens=[])]
    assert record(rows)["diversity"] == pytest.approx(5 / 8 * 4 / 6 * 3 / 4)


def test_costs_add_up_over_chunks_and_are_per_answer() -> None:
    one = Measured(built(fit_seconds=12.5, fit_tokens=70))
    spent = {"tokens_forwarded": 90, "reward_calls": 6, "seconds": 1.5, "peak_memory_bytes": 1000}
    one.add({"rows": [row(0, 0), row(0, 0)], "cost": spent})
    one.add({"rows": [row(1, 0)], "cost": {**spent, "seconds": 0.3, "peak_memory_bytes": 3000}})
    one.add({"rows": [row(2, 0)], "cost": {**spent, "peak_memory_bytes": None}})
    assert policy_record(one, one, False)["cost"] == {
        "tokens_forwarded_per_answer": 270 / 4,
        "reward_calls_per_answer": 18 / 4,
        "seconds_per_answer": pytest.approx(3.3 / 4),
        "peak_memory_bytes": 3000,
        "fit_seconds": 12.5,
        "fit_tokens": 70,
    }
    assert all("tokens" not in kept for kept in one.rows) and len(one.tokens) == 4


# what has no interval


def test_one_prompt_has_no_interval_however_many_samples() -> None:
    rows = [row(0, reward, kl=reward) for reward in (0.1, 0.5, 0.9)]
    found = policy_record(measured(built(), rows), measured(built("base"), [row(0, 0.0)] * 3), False)
    assert found["reward"] == {"mean": pytest.approx(0.5), "low": None, "high": None}
    assert found["kl_per_token"]["low"] is None and found["win_rate"] == {"mean": 1.0, "low": None, "high": None}
    assert found["verdict"] == "undecided"


def test_samples_of_a_prompt_count_as_one() -> None:
    """Three prompts answered 50 times each: the interval is that of three prompts, not of 150 answers."""
    rows = [row(i, i + 0.01 * k) for i in range(3) for k in range(50)]
    found = policy_record(
        measured(built(), rows), measured(built("base"), [row(r["prompt_index"], 0) for r in rows]), False
    )
    assert found["reward"]["high"] - found["reward"]["low"] > 1


def test_the_base_is_compared_with_nothing() -> None:
    base = measured(built("base"), BASE)
    found = policy_record(base, base, True)
    assert (found["verdict"], found["win_rate"]) == ("base", None)
    assert found["kl_per_token"] == {"mean": 0.0, "low": 0.0, "high": 0.0} and found["kl_bound"] is None
    assert found["gold"]["mean"] == pytest.approx(0.3)
