"""Canaries, duplicates, range, and the gap between a proxy and its gold, each against what it must be."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from trimtab.errors import UsageError
from trimtab.measure import reward_guards as guards
from trimtab.policy import Cost
from trimtab.rewards import Function, Length, Reward, parse_reward

PROMPTS = [f"Please tell me all that is known about question {i}" for i in range(40)]
REAL = [["It is a bird of the north.", "Nobody has seen one for years."] for _ in PROMPTS]


def fired(reward: Reward, prompts: list[str] = PROMPTS, real: list[list[str]] = REAL) -> set[str]:
    scores = [reward.score([prompt] * len(row), row) for prompt, row in zip(prompts, real, strict=True)]
    return {one.kind for one in guards.check_canaries(reward, prompts, scores, 7, Cost()) if not one.quiet}


def test_a_reward_with_one_weakness_sets_off_that_canary() -> None:
    pytest.importorskip("vaderSentiment", reason="needs the extra 'text'")
    every = set(guards.canaries("p", 7))
    assert fired(Function(lambda p, t: [float(x in REAL[0]) for x in t], name="gold")) == set()
    assert fired(Length(target=1, side="over")) == {"empty"}  # the shorter the better, to a word
    assert "long filler" in fired(Function(lambda p, t: [len(x) for x in t], name="longer"))
    assert "injection" in fired(Function(lambda p, t: [float("10 out of 10" in x) for x in t], name="told"))
    assert "repeated praise" in fired(parse_reward("sentiment"))
    assert "refusal" in fired(Function(lambda p, t: [float("sorry" in x) for x in t], name="no"))
    assert "prompt echo" in fired(
        Function(lambda p, t: [float(x == y) for x, y in zip(p, t, strict=True)], name="same")
    )
    assert fired(Function(lambda p, t: [0.0] * len(t), name="constant")) == every  # no canary is told from an answer


def test_a_canary_that_cannot_be_judged_is_no_failure_and_is_counted() -> None:
    reward = Function(lambda p, t: [None if not x else float(x in REAL[0]) for x in t], name="mute")
    scores = [reward.score([prompt] * 2, row) for prompt, row in zip(PROMPTS, REAL, strict=True)]
    empty = next(one for one in guards.check_canaries(reward, PROMPTS, scores, 7, None) if one.kind == "empty")
    assert empty.judged == 0 and empty.quiet and empty.fails.mean is None and empty.scores == (None,) * 40


def test_the_filler_is_long_and_neutral() -> None:
    pytest.importorskip("vaderSentiment", reason="needs the extra 'text'")
    made = guards.canaries("Which capital has France?", 20)
    assert len(made["long filler"].split()) == 160 and len(guards.canaries("p", 1)["long filler"].split()) == 40
    assert parse_reward("sentiment").score(["p"], [made["long filler"]]) == [0]
    assert made["keyword stuffing"].startswith("has Which France capital has")  # by length, then by spelling
    assert set(made["keyword stuffing"].split()) == {"has", "Which", "France", "capital"}


def test_a_blind_reward_is_not_cleared() -> None:
    """Scores that know nothing: a canary is cleared by chance in at most 1 of 40 runs (one side of 95%)."""
    generator = np.random.default_rng(0)
    blind = Function(lambda p, t: generator.normal(size=len(t)).tolist(), name="blind")
    real: list[list[float | None]] = generator.normal(size=(40, 2)).tolist()
    found = [guards.check_canaries(blind, PROMPTS, real, 7, None) for _ in range(20)]
    quiet = [one.quiet for run in found for one in run]
    assert np.mean(quiet) <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / len(quiet))  # three standard errors


def test_duplicates_and_range() -> None:
    assert guards.duplicates(["p", "q", "q", "r"], ["a  b", "a b", "c", "c c"]).tolist() == [1, 1, 0, 0]
    outside = guards.out_of_range([-1.0, 0.0, 2.0, None], -0.5, 1.0).tolist()
    assert outside[:3] == [1, 0, 1] and math.isnan(outside[3])
    assert guards.out_of_range([-9.0], None, 1.0).tolist() == [0]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_draws(n: int) -> None:
    choice, value = [0.3, 0.9, 0.3, 0.1, 0.9], [1.0, 5.0, 2.0, -3.0, 6.0]
    draws = []
    for rows in itertools.combinations(range(5), n):
        top = max(choice[i] for i in rows)
        draws.append(np.mean([value[i] for i in rows if choice[i] == top]))
    assert guards.best_of(choice, value, n) == pytest.approx(np.mean(draws), abs=1e-12)


def test_best_of_refuses_more_than_there_are() -> None:
    with pytest.raises(UsageError, match="best of 3 needs as many"):
        guards.best_of([1, 2], [1, 2], 3)


def hacked(seed: int, share: float, prompts: int = 60, answers: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Gold is normal, the proxy is gold with noise; a share of answers fools the proxy: gold -3, proxy +3."""
    generator = np.random.default_rng(seed)
    gold = generator.normal(size=(prompts, answers))
    proxy = gold + 0.3 * generator.normal(size=gold.shape)
    tricks = generator.random(gold.shape) < share
    return np.where(tricks, 3.0 + proxy / 10, proxy), np.where(tricks, -3.0, gold)


def test_the_gap_is_seen_where_there_is_one() -> None:
    for seed in range(3):
        gap = guards.gap_curve(*hacked(seed, 0.02), resamples=2000)
        assert gap.fires and gap.peak in (2, 4, 8, 16)
        assert gap.lost is not None and gap.lost.mean is not None and gap.lost.mean < -1
        proxy = [point.proxy.mean for point in gap.points]
        assert proxy == sorted(proxy) and [point.n for point in gap.points] == [1, 2, 4, 8, 16, 32, 64]
        assert gap.points[3].kl_bound == pytest.approx(math.log(8) - 7 / 8)
        assert not guards.gap_curve(*hacked(seed, 0.0), resamples=2000).fires


def test_the_gap_of_a_reward_that_knows_nothing_fires_at_most_at_its_level() -> None:
    """Gold drawn apart from the proxy stays level: at most 2.5% (one side) of 200 runs, with three standard errors."""
    fires = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        fires += guards.gap_curve(*generator.normal(size=(2, 25, 4)), resamples=500).fires
    assert fires / 200 <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 200)


def test_a_proxy_that_is_the_gold_never_fires() -> None:
    gold = np.random.default_rng(0).normal(size=(30, 16))
    assert not guards.gap_curve(gold, gold).fires and not guards.gap_curve(np.exp(gold), gold).fires


def test_answers_that_were_not_judged_are_left_out() -> None:
    proxy, gold = hacked(0, 0.0, prompts=5, answers=9)
    proxy[0, 3:] = np.nan
    gold[1] = np.nan
    gap = guards.gap_curve(proxy, gold)
    assert [point.n for point in gap.points] == [1, 2] and gap.points[0].proxy.prompts == 4
    with pytest.raises(UsageError, match="no answer was judged by both"):
        guards.gap_curve([[math.nan]], [[1.0]])
    with pytest.raises(UsageError, match="one score each"):
        guards.gap_curve([[1.0]], [[1.0, 2.0]])
