"""Calibration: what it is by enumeration, what it must not depend on, what it refuses, and as a reward anywhere."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oracles.categorical import Categorical
from tiny import tiny_lm
from trimtab import Sampling, Steered
from trimtab.decode import BestOfN
from trimtab.decode.calibration import FILE, Calibrated, Calibrator, mid_ranks, policy_fingerprint, prompt_hash
from trimtab.errors import UsageError
from trimtab.measure.win_rates import Transform
from trimtab.measure.win_rates import mid_ranks as ranks_of
from trimtab.rewards import Function, WeightedSum, as_reward
from trimtab.steer.static_re import StaticRE

P = np.array([8, 4, 16, 2, 20, 14]) / 64  # so that a table of 64 draws can have exactly these shares
SCORES = [0.5, -1.0, 0.5, 3.0, 0.0, -2.0]
PROMPTS = ["one", "two", [{"role": "user", "content": "three"}]]


def score(prompts: Sequence[Any], texts: Sequence[str]) -> list[float | None]:
    return [SCORES[int(text)] for text in texts]


def exact_table(scores: Sequence[float] = SCORES) -> np.ndarray:
    return np.sort(np.repeat(scores, np.round(P * 64).astype(int)))


def truth() -> list[float]:
    """C of each outcome under the base itself."""
    return [float(P[np.array(SCORES) < r].sum() + P[np.array(SCORES) == r].sum() / 2) for r in SCORES]


# what it is


def test_a_table_with_the_base_shares_gives_c_itself() -> None:
    found = mid_ranks(exact_table(), np.array(SCORES))
    assert found == pytest.approx(truth(), abs=1e-15)
    assert float(P @ found) == pytest.approx(0.5, abs=1e-12)  # the mean under the base
    by_level = ranks_of(np.bincount(np.unique(SCORES, return_inverse=True)[1], weights=P))
    assert mid_ranks(exact_table(), np.unique(SCORES)) == pytest.approx(by_level)


def test_increasing_transforms_of_the_reward_leave_it_bitwise_equal() -> None:
    plain = Calibrator.fit(Categorical(P), PROMPTS, score, 64)
    texts = list(map(str, range(6)))
    for change in (lambda r: 7 * r - 3, np.exp, lambda r: r**3, np.arctan):
        other = Calibrator.fit(
            Categorical(P), PROMPTS, lambda p, t, f=change: [float(f(SCORES[int(x)])) for x in t], 64
        )
        for prompt in PROMPTS:
            a = plain.calibrate([prompt] * 6, score([], texts))
            b = other.calibrate([prompt] * 6, [float(change(value)) for value in SCORES])
            assert a == b


def test_the_estimate_is_unbiased() -> None:
    """Over 2,000 tables of 8 draws the mean estimate of every outcome's C is within 3 standard errors of C."""
    rng = np.random.default_rng(0)
    tables = np.sort(np.array(SCORES)[rng.choice(6, (2000, 8), p=P)], axis=1)
    found = np.array([mid_ranks(table, np.array(SCORES)) for table in tables])
    assert (abs(found.mean(0) - truth()) < 3 * found.std(0, ddof=1) / 2000**0.5).all()


def test_its_mean_under_a_policy_is_the_win_rate_over_the_base() -> None:
    """2,000 answers of another policy: mean C against the exact P(win) + P(tie) / 2, within 3 standard errors."""
    q = P[::-1].copy()
    calibrator = Calibrator({prompt_hash("x"): exact_table()}, 64, Calibrator.fit(Categorical(P), ["x"], score).source)
    drawn = Categorical(q).generate(["x"], Sampling(samples=2000, seed=3))
    found = np.array(calibrator.calibrate(drawn.prompts, score([], drawn.texts)))
    table = np.array(SCORES)
    exact = sum(
        q[i] * P[j] * (1.0 if table[i] > table[j] else 0.5 if table[i] == table[j] else 0)
        for i in range(6)
        for j in range(6)
    )
    assert abs(found.mean() - exact) < 3 * found.std() / 2000**0.5


# what is drawn and what it costs


def test_each_different_prompt_is_drawn_once_and_charged() -> None:
    policy = Categorical(P)
    said: list[str] = []
    made = Calibrator.fit(policy, ["one", "two", "one"], score, 32, progress=said.append)
    assert policy.calls == 64 and made.cost.tokens == {"categorical": 64} and made.cost.reward_calls == 64
    assert made.lacks(["two", "three", "three"]) == ["three"] and said == ["calibrating: prompt 2 of 2"]
    assert made.tables[prompt_hash("one")].tolist() != made.tables[prompt_hash("two")].tolist()  # draws of their own
    assert all((np.diff(table) >= 0).all() and len(table) == 32 for table in made.tables.values())
    again = Calibrator.fit(policy, ["one", "two"], score, 32)
    assert made.fingerprint == again.fingerprint
    assert Calibrator.fit(policy, ["one", "two"], score, 32, Sampling(seed=1)).fingerprint != made.fingerprint


def test_answers_that_cannot_be_judged_are_left_out() -> None:
    def half(prompts: Sequence[Any], texts: Sequence[str]) -> list[float | None]:
        return [
            None if prompt == "two" or text == "4" else SCORES[int(text)]
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    with pytest.warns(UserWarning, match="1 of 2 prompts"):
        made = Calibrator.fit(Categorical(P), ["one", "two"], half, 64)
    assert 0 < len(made.tables[prompt_hash("one")]) < 64 and not len(made.tables[prompt_hash("two")])
    assert made.calibrate(["one", "one", "two"], [None, 9.0, 0.0]) == [None, 1.0, None]
    assert made.informative(["one", "two", "new"]) == ["one", "new"]


def test_tied_prompts_are_counted_and_said() -> None:
    def sometimes(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
        return [1.0 if prompt == "flat" else SCORES[int(text)] for prompt, text in zip(prompts, texts, strict=True)]

    with pytest.warns(UserWarning, match="1 of 2 prompts have one reward"):
        made = Calibrator.fit(Categorical(P), ["flat", "one"], sometimes, 16)
    assert made.tied == 1 and made.informative(["flat", "one"]) == ["one"]
    assert made.calibrate(["flat"], [1.0]) == [0.5]


def test_cut_answers_are_scored_and_counted() -> None:
    lm = tiny_lm()
    made = Calibrator.fit(lm, ["ba da", "ma"], "length:target=3", 16, Sampling(max_new_tokens=3))
    drawn = lm.generate(["ba da", "ma"], Sampling(max_new_tokens=3, samples=200))
    assert made.truncated == pytest.approx(drawn.finish_reasons.count("length") / 400, abs=0.2)
    assert made.truncated > 0 and sum(map(len, made.tables.values())) == 32


def test_few_draws_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="4 draws a prompt rank answers coarsely"):
        Calibrator.fit(Categorical(P), ["x"], score, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Calibrator.fit(Categorical(P), ["x"], score, 16)


# on disk


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    made = Calibrator.fit(Categorical(P), PROMPTS, score, 32)
    path = made.save(tmp_path / "with space")
    again = Calibrator.load(tmp_path / "with space")
    assert path.name == FILE and (again.draws, again.source, again.truncated) == (32, made.source, made.truncated)
    assert list(again.tables) == list(made.tables) and again.fingerprint == made.fingerprint
    assert all((again.tables[key] == made.tables[key]).all() for key in made.tables)
    empty = Calibrator({}, 8, made.source)
    empty.save(tmp_path / "none")
    assert Calibrator.load(tmp_path / "none").tables == {}


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    made = Calibrator.fit(Categorical(P), ["x"], score, 16)
    with pytest.raises(UsageError, match="is not a calibrator"):
        Calibrator.load(tmp_path)
    whole = made.save(tmp_path).read_bytes()
    for broken in (whole[:40], whole[:-8], b"", whole.replace(b'\\"draws\\"', b'\\"drown\\"')):
        (tmp_path / FILE).write_bytes(broken)
        with pytest.raises(UsageError, match="is damaged"):
            Calibrator.load(tmp_path)
    for table in (np.array([1.0, 0.0]), np.array([0.0, np.nan])):
        Calibrator({"k": table}, 2, made.source).save(tmp_path)
        with pytest.raises(UsageError, match="do not fit together"):
            Calibrator.load(tmp_path)


# another base, other sampling, another reward


def test_tables_of_something_else_are_refused() -> None:
    lm, other = tiny_lm(), tiny_lm(seed=5)
    reward = Function(score)
    sampling = Sampling(max_new_tokens=4)
    made = Calibrator.fit(lm, ["ba"], "length:target=3", 16, sampling)
    length = as_reward("length:target=3")
    made.check(lm, sampling.but(seed=9, samples=4), length)  # neither is part of the law
    for policy, drawn, judge, said in (
        (other, sampling, length, "policy"),
        (BestOfN(lm, reward, 2), sampling, length, "policy"),
        (lm, sampling.but(temperature=0.7), length, "sampling"),
        (lm, sampling.but(max_new_tokens=5), length, "sampling"),
        (lm, sampling, as_reward("length:target=4"), "reward"),
        (lm, sampling, reward, "reward"),
    ):
        with pytest.raises(UsageError, match=f"was made with the {said} "):
            made.check(policy, drawn, judge)
    with pytest.raises(UsageError, match="was made with the reward"):
        Calibrated("length:target=4", made)
    with pytest.raises(UsageError, match="was made with the policy"):
        Calibrated("length:target=3", made, policy=other, sampling=sampling)
    with pytest.raises(UsageError, match="was made with the policy"):
        made.merged(Calibrator.fit(other, ["ma"], "length:target=3", 16, sampling))
    both = made.merged(Calibrator.fit(lm, ["ma"], "length:target=3", 16, sampling))
    assert not both.lacks(["ba", "ma"]) and both.cost.reward_calls == 32


def test_a_policy_is_known_by_what_it_draws_from() -> None:
    lm = tiny_lm()

    def steered(first: int, strength: float = 1.0) -> Steered:
        return Steered(lm, StaticRE(torch.arange(lm.hidden_size) == first, strength=strength))

    policies = [
        lm, tiny_lm(seed=5), steered(1), steered(2), steered(1, 3.0), BestOfN(lm, score, 2), BestOfN(lm, score, 3),
        BestOfN(lm, "length:target=3", 2), BestOfN(steered(1), score, 2),
    ]  # fmt: skip
    assert len({policy_fingerprint(policy) for policy in policies}) == len(policies)
    assert policy_fingerprint(tiny_lm()) == policy_fingerprint(lm)
    assert policy_fingerprint(steered(2)) == policy_fingerprint(steered(2))
    assert policy_fingerprint(BestOfN(lm, score, 2)) == policy_fingerprint(BestOfN(lm, score, 2))


# as a reward anywhere


def test_it_is_the_transform_of_the_rank() -> None:
    made = Calibrator({prompt_hash("x"): exact_table()}, 64, Calibrator.fit(Categorical(P), ["x"], score).source)
    transform = Transform("exp", "worst")
    reward = Calibrated(Function(score), made, transform)
    texts = list(map(str, range(6)))
    assert reward.score(["x"] * 6, texts) == pytest.approx(transform(np.array(truth())).tolist(), abs=1e-12)
    assert Calibrated(Function(score), made).score(["x"] * 6, texts) == pytest.approx(truth(), abs=1e-12)
    assert reward.name == "exp(calibrated(score))" and not reward.on_prefixes
    others = [Calibrated(Function(score), made, Transform("exp", "worst", t=5)), Calibrated(Function(score), made)]
    assert len({reward.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_it_is_used_like_any_reward() -> None:
    policy = Categorical(P)
    made = Calibrator.fit(policy, ["x", "y"], Function(score), 64)
    reward = Calibrated(Function(score), made, Transform("exp"))
    chosen = BestOfN(policy, reward, 4).generate(["x", "y"], Sampling(samples=50))
    plain = BestOfN(policy, Function(score), 4).generate(["x", "y"], Sampling(samples=50))
    assert chosen.texts == plain.texts and chosen.cost.reward_calls == 400  # a rising transform changes no argmax
    total = WeightedSum([(2.0, reward), (1.0, Function(score))]).score(["x"], ["3"])
    assert total == pytest.approx([2 * (reward.score(["x"], ["3"])[0] or 0) + 3.0])
    trl = reward.as_trl()
    assert trl(prompts=["x", "y"], completions=["0", "1"], other=[1, 2]) == reward.score(["x", "y"], ["0", "1"])
    with pytest.raises(UsageError, match="no table for the prompt 'z'"):
        reward.score(["z"], ["0"])


def test_prompts_without_a_table_are_sampled_where_a_policy_is_given() -> None:
    policy = Categorical(P)
    made = Calibrator.fit(policy, ["x"], Function(score), 64)
    reward = Calibrated(Function(score), made, policy=policy)
    before, mark = policy.calls, reward.fingerprint
    first = reward.score(["new", "x", "new"], ["0", "1", "2"])
    assert policy.calls == before + 64 and made.cost.reward_calls == 128 and reward.fingerprint == mark
    assert reward.score(["new", "x", "new"], ["0", "1", "2"]) == first and policy.calls == before + 64


def test_what_could_not_be_judged_stays_so() -> None:
    reward = Function(lambda prompts, texts: [None if text == "1" else float(text) for text in texts], name="some")
    made = Calibrator.fit(Categorical(P), ["x"], reward, 64)
    scores = Calibrated(reward, made, Transform("log")).score(["x", "x"], ["1", "0"])
    assert scores[0] is None and scores[1] is not None


# bad input


def test_nothing_to_calibrate_on_is_refused() -> None:
    with pytest.raises(UsageError, match="2 draws a prompt or more"):
        Calibrator.fit(Categorical(P), ["x"], score, 1)
    with pytest.raises(UsageError, match="at least one prompt"):
        Calibrator.fit(Categorical(P), [], score)


def test_a_calibrator_read_back_needs_no_policy(tmp_path: Path) -> None:
    Calibrator.fit(Categorical(P), ["x"], Function(score), 64).save(tmp_path)
    reward = Calibrated(Function(score), Calibrator.load(tmp_path), Transform("fixed-point", beta=0.3))
    low, high = reward.score(["x", "x"], ["5", "3"])
    assert low is not None and high is not None and high > low
