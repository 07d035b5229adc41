"""InfAlign: its law by enumeration, its limits, the bound on its KL, its cost."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from oracles.categorical import Categorical
from tiny import tiny_lm
from trimtab import Sampling, Steered
from trimtab.decode import BestOfN
from trimtab.decode.calibration import Calibrator, prompt_hash
from trimtab.decode.infalign import InfAlign, entropy, inverse_cdf, ranks_within, selection_kl_bound
from trimtab.errors import UsageError
from trimtab.measure.kl import best_of_n_bound
from trimtab.measure.win_rates import Array, Transform, kl, mid_ranks, of_n_law, tilt
from trimtab.rewards import Function
from trimtab.steer.static_re import StaticRE

P = np.array([20, 8, 16, 12, 4, 4]) / 64
SCORES = [0.5, -1.0, 0.5, 1.0, 3.0, -2.0]
PROMPTS = ["ba da fa la", "ma na", "pe"]
KINDS = ["identity", "exp", "log", "fixed-point"]


def score(prompts: Sequence[Any], texts: Sequence[str]) -> list[float | None]:
    return [SCORES[int(text)] for text in texts]


def never(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
    raise RuntimeError("called")


def exactly_calibrated(policy: Categorical, reward: Any, scores: Sequence[float], draws: int = 64) -> Calibrator:
    """A calibrator whose table for the prompt "x" has exactly the shares of the policy."""
    source = Calibrator.fit(policy, ["y"], reward, 16).source
    table = np.sort(np.repeat(scores, np.round(policy.p * draws).astype(int)))
    return Calibrator({prompt_hash("x"): table}, draws, source)


def law(p: Array, w: Array, n: int) -> Array:
    """[A] by enumeration of all A^n draws: one of the n with probability proportional to its weight."""
    out = np.zeros(len(p))
    for draws in itertools.product(range(len(p)), repeat=n):
        chosen = w[list(draws)] / w[list(draws)].sum()
        np.add.at(out, list(draws), p[list(draws)].prod() * chosen)
    return out


def counts(policy: Any, rows: int, outcomes: int = 6) -> Array:
    done = policy.generate(["x"], Sampling(samples=rows, seed=1))
    return np.bincount([int(text) for text in done.texts], minlength=outcomes).astype(float)


# what it draws


@pytest.mark.parametrize("procedure", ["best", "worst"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_law_at_finite_n_is_that_of_enumeration(kind: Any, procedure: Any) -> None:
    """6,000 answers of 3 draws each; neither the base nor the limit of many draws would pass the same test."""
    base, strength = Categorical(P), 4.0
    calibrator = exactly_calibrated(base, score, SCORES)
    policy = InfAlign(base, score, 3, strength, kind, procedure, calibrator=calibrator)
    c = np.array([(P[np.array(SCORES) < r].sum() + P[np.array(SCORES) <= r].sum()) / 2 for r in SCORES])
    w = np.exp(strength * policy.transform(c))
    seen = counts(policy, 6000)
    assert chisquare(seen, law(P, w, 3) * seen.sum()).pvalue > 1e-3
    assert chisquare(seen, P * w / (P * w).sum() * seen.sum()).pvalue < 1e-3
    if not (
        kind == "exp" and procedure == "worst"
    ):  # that one moves the lowest ranks alone: too little to be seen here
        assert chisquare(seen, P * seen.sum()).pvalue < 1e-6


@pytest.mark.parametrize("kind", ["exp", "log"])
def test_without_a_table_the_draws_are_ranked_among_themselves(kind: Any) -> None:
    """draws=0, 3 draws: enumeration of all 6^3, each ranked among the other two; 6,000 answers. No further cost."""
    base, strength = Categorical(P), 2.0
    policy = InfAlign(base, score, 3, strength, kind, draws=0)
    expected = np.zeros(6)
    for draws in itertools.product(range(6), repeat=3):
        r = np.array(SCORES)[list(draws)]
        c = np.array([sum((r[i] > r[j]) + (r[i] == r[j]) / 2 for j in range(3) if j != i) / 2 for i in range(3)])
        w = np.exp(strength * policy.transform(c))
        np.add.at(expected, list(draws), P[list(draws)].prod() * w / w.sum())
    seen = counts(policy, 6000)
    assert chisquare(seen, expected * seen.sum()).pvalue > 1e-3
    assert chisquare(seen, P * seen.sum()).pvalue < 1e-6
    assert base.calls == 18_000


def test_ranks_among_the_draws_themselves() -> None:
    """By hand, and unbiased: their mean over 4,000 rows of 5 draws is C within 3 standard errors, outcome by outcome."""
    assert ranks_within([2.0, None, 1.0, 2.0]) == [0.75, None, 0.0, 0.75]
    assert ranks_within([None, 4.0]) == [None, 0.5] and ranks_within([None]) == [None]
    rng, table = np.random.default_rng(0), np.array(SCORES)
    first = np.array(
        [ranks_within(table[[k, *rng.choice(6, 4, p=P)]].tolist())[0] for k in range(6) for _ in range(4000)]
    )
    found = first.astype(float).reshape(6, 4000)
    c = [(P[table < r].sum() + P[table <= r].sum()) / 2 for r in SCORES]
    assert (abs(found.mean(1) - c) < 3 * found.std(1) / 4000**0.5).all()


def test_many_draws_reach_the_tilted_target() -> None:
    """n = 200: the law is p exp(Phi / beta) / Z to a chi-squared test on 2,000 answers (its bias is of order 1/200)."""
    base = Categorical(P)
    calibrator = exactly_calibrated(base, score, SCORES)
    policy = InfAlign(base, score, 200, 4.0, "exp", calibrator=calibrator)
    level = np.unique(SCORES, return_inverse=True)[1]
    c = mid_ranks(np.bincount(level, weights=P))[level]
    seen = counts(policy, 2000)
    assert chisquare(seen, tilt(P, Transform("exp")(c), 1 / 4) * seen.sum()).pvalue > 1e-3


def test_the_log_transform_reaches_best_of_m() -> None:
    """Strength m - 1 = 3 over 64 equally likely rewards, n = 200: best-of-4, whose law is F^4 - F_-^4."""
    base, scores = Categorical(np.ones(64)), list(map(float, range(64)))

    def rank(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
        return [scores[int(text)] for text in texts]

    policy = InfAlign(base, rank, 200, 3.0, "log", calibrator=exactly_calibrated(base, rank, scores))
    seen = counts(policy, 2000, 64)
    four = of_n_law(base.p, 4).reshape(16, 4).sum(1)  # by fours, so that every cell has enough
    seen = seen.reshape(16, 4).sum(1)
    low = int((four * 2000 < 5).sum())
    merged = [np.append(x[low:], x[:low].sum()) for x in (seen, four * 2000)]
    assert chisquare(*merged).pvalue > 1e-3


def test_without_end_it_is_best_of_n() -> None:
    base = Categorical(P)
    calibrator = exactly_calibrated(base, score, SCORES)
    sampling = Sampling(samples=300, seed=4)
    best = BestOfN(base, Function(score), 5).generate(["x"], sampling)
    for kind in ("identity", "exp", "log"):
        done = InfAlign(base, score, 5, 1e9, kind, calibrator=calibrator).generate(["x"], sampling)  # type: ignore[arg-type]
        assert score([], done.texts) == score([], best.texts)  # ties are drawn, not given to the earliest


@pytest.mark.parametrize("options", [{"n": 1}, {"strength": 0.0}])
def test_one_draw_or_no_strength_is_the_policy_without_a_reward_call(options: dict[str, Any]) -> None:
    lm, sampling = tiny_lm(), Sampling(max_new_tokens=8, samples=2, seed=5)
    policy = InfAlign(lm, never, **options)
    done, plain = policy.generate(PROMPTS, sampling), lm.generate(PROMPTS, sampling)
    assert (done.tokens, done.texts, done.logprobs) == (plain.tokens, plain.texts, plain.logprobs)
    assert done.cost.tokens == plain.cost.tokens and done.cost.reward_calls == 0
    assert policy.kl_bound == 0


def test_it_nests() -> None:
    """Over a steered policy, and best-of-2 over it: the rows are draws of what lies below."""
    lm = tiny_lm()
    steered = Steered(lm, StaticRE(torch.arange(lm.hidden_size) == 1, strength=2.0))
    sampling = Sampling(max_new_tokens=5, samples=2)
    done = BestOfN(InfAlign(steered, "length:target=2", 4, draws=16), "length:target=2", 2).generate(PROMPTS, sampling)
    drawn = steered.generate(PROMPTS, sampling.but(samples=16))
    for row in range(6):
        assert (
            done.tokens[row]
            in drawn.tokens[16 * (row // 2) : 16 * (row // 2 + 1)] + drawn.tokens[8 * row : 8 * row + 8]
        )
    assert len(done) == 6


# what it tells


def test_telemetry_is_what_the_choice_was_made_from() -> None:
    base = Categorical(P)
    done = InfAlign(base, score, 4, 3.0, calibrator=exactly_calibrated(base, score, SCORES)).generate(
        ["x"], Sampling(samples=20)
    )
    drawn = base.generate(["x"], Sampling(samples=80))
    for row, told in enumerate(done.telemetry):
        assert told["rewards"] == score([], drawn.texts[4 * row : 4 * row + 4])
        assert done.texts[row] == drawn.texts[4 * row + told["chosen"]]
        w = np.exp(3.0 * Transform("exp")(np.array(told["calibrated"])))
        assert told["kl_bound"] == pytest.approx(math.log(4) - entropy(w / w.sum()), abs=1e-12)


def test_what_cannot_be_judged_is_passed_over() -> None:
    def some(prompts: Sequence[Any], texts: Sequence[str]) -> list[float | None]:
        return [None if text in "013" else SCORES[int(text)] for text in texts]

    done = InfAlign(Categorical(P), some, 8, 2.0).generate(["x"], Sampling(samples=300))
    assert not {"0", "1", "3"} & {t for t, told in zip(done.texts, done.telemetry, strict=True) if any_judged(told)}
    nothing = InfAlign(Categorical(P), lambda p, t: [None] * len(t), 3).generate(["x"], Sampling(samples=3000))
    seen = np.bincount([int(text) for text in nothing.texts], minlength=6)
    assert chisquare(seen, P * 3000).pvalue > 1e-3  # then it is the policy below
    assert nothing.telemetry[0]["calibrated"] == [None] * 3


def any_judged(told: dict[str, Any]) -> bool:
    return any(value is not None for value in told["rewards"])


# the bound on its KL


def test_the_kl_never_passes_the_bounds() -> None:
    """Exact laws of 3 draws under random bases and weights: below the bound from the spread, and the mean bound told."""
    rng = np.random.default_rng(0)
    closest = 1.0
    for _ in range(60):
        p, spread = rng.dirichlet(np.ones(5)), float(rng.choice([0.3, 1.0, 3.0, 10.0]))
        phi = rng.uniform(size=5).round(int(rng.integers(0, 3)))
        w = np.exp(spread * phi)
        exact = kl(law(p, w, 3), p)
        told = 0.0
        for draws in itertools.product(range(5), repeat=3):
            shares = w[list(draws)] / w[list(draws)].sum()
            told += p[list(draws)].prod() * (math.log(3) - entropy(shares))
        assert exact <= told + 1e-12 <= math.log(3) + 1e-9
        assert exact <= selection_kl_bound(3, spread) + 1e-12
        closest = min(closest, 1 - exact / selection_kl_bound(3, spread))
    assert closest < 0.5  # it is no idle bound


def test_the_bound_is_that_of_the_worst_weights() -> None:
    """No weights within the spread are further from uniform: 20,000 random ones, and their corners."""
    rng = np.random.default_rng(1)
    for n, spread in ((2, 0.5), (4, 1.0), (6, 3.0)):
        a = np.concatenate([rng.uniform(0, spread, (20_000, n)), spread * rng.integers(0, 2, (200, n))])
        shares = np.exp(a) / np.exp(a).sum(1, keepdims=True)
        most = max(math.log(n) - entropy(row) for row in shares)
        assert most <= selection_kl_bound(n, spread) + 1e-12 or most > best_of_n_bound(n)
        assert min(most, best_of_n_bound(n)) == pytest.approx(selection_kl_bound(n, spread), rel=1e-9)
    assert selection_kl_bound(8, 0.0) == 0
    assert selection_kl_bound(8, 1e4) == best_of_n_bound(8)
    bounds = [InfAlign(Categorical(P), score, 8, strength).kl_bound for strength in (0.0, 0.1, 1.0, 1e3)]
    assert bounds == sorted(bounds) and bounds[-1] == best_of_n_bound(8)


def test_the_draw_never_takes_what_weighs_nothing() -> None:
    shares = np.array([0.0, 0.3, 0.0, 0.7, 0.0])
    for uniform in (0.0, 0.29, 0.31, 0.999, np.nextafter(1.0, 0.0)):
        assert shares[inverse_cdf(shares, float(uniform))] > 0


# what it costs


def test_prompts_are_forwarded_once_for_the_answers_and_once_for_a_table() -> None:
    lm, sampling = tiny_lm(), Sampling(max_new_tokens=6, samples=2)
    prompts = [*PROMPTS, PROMPTS[0]]  # a prompt asked twice has one table
    made = Calibrator.fit(lm, PROMPTS, "length:target=3", 16, sampling)
    drawn = lm.generate(prompts, sampling.but(samples=10))
    fresh = InfAlign(lm, "length:target=3", 5, draws=16).generate(prompts, sampling)
    assert fresh.cost.tokens == {lm.name: drawn.cost.tokens[lm.name] + made.cost.tokens[lm.name]}
    assert fresh.cost.reward_calls == 4 * 2 * 5 + 3 * 16 and fresh.cost.seconds > 0
    given = InfAlign(lm, "length:target=3", 5, calibrator=made).generate(prompts, sampling)
    assert given.cost.tokens == drawn.cost.tokens and given.cost.reward_calls == 40
    assert given.tokens == fresh.tokens  # the same tables, drawn from the same seed
    part = Calibrator.fit(lm, PROMPTS[:2], "length:target=3", 16, sampling)
    rest = InfAlign(lm, "length:target=3", 5, draws=16, calibrator=part).generate(prompts, sampling)
    assert rest.cost.reward_calls == 40 + 16 and len(part.tables) == 2


def test_the_same_seed_gives_the_same_answers() -> None:
    lm, sampling = tiny_lm(), Sampling(max_new_tokens=6, samples=3, seed=2)
    policy = InfAlign(lm, "length:target=3", 4, draws=16)
    a, b = policy.generate(PROMPTS, sampling), policy.generate(PROMPTS, sampling)
    assert a.tokens == b.tokens and a.telemetry == b.telemetry
    assert a.tokens != policy.generate(PROMPTS, sampling.but(seed=3)).tokens


# bad input


def test_bad_options_are_refused() -> None:
    base = Categorical(P)
    for options, said in (
        ({"n": 0}, "n must be 1 or more"),
        ({"strength": -1.0}, "strength must be 0"),
        ({"strength": math.inf}, "strength must be 0"),
        ({"draws": 1}, "draws must be 2 or more"),
        ({"inference_n": 0}, "n must be 1 or more"),
        ({"t": 0.0}, "t must be above 0"),
        ({"transform": "cube"}, "transform 'cube' is not one of"),
        ({"procedure": "mean"}, "neither best nor worst"),
    ):
        with pytest.raises(UsageError, match=said):
            InfAlign(base, score, **options)  # type: ignore[arg-type]


def test_a_calibrator_of_something_else_is_refused_before_anything_is_given() -> None:
    lm, other = tiny_lm(), tiny_lm(seed=5)
    sampling = Sampling(max_new_tokens=4)
    made = Calibrator.fit(other, PROMPTS, "length:target=3", 16, sampling)
    with pytest.raises(UsageError, match="made with the policy"):
        InfAlign(lm, "length:target=3", 2, calibrator=made).generate(PROMPTS, sampling)
    with pytest.raises(UsageError, match="made with the sampling"):
        InfAlign(other, "length:target=3", 2, calibrator=made).generate(PROMPTS, sampling.but(temperature=0.5))
    with pytest.raises(UsageError, match="made with the reward"):
        InfAlign(other, "length:target=4", 2, calibrator=made).generate(PROMPTS, sampling)


def test_too_few_draws_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="8 draws rank answers too coarsely for best-of-4: give 16"):
        InfAlign(Categorical(P), score, draws=8)
    with pytest.warns(UserWarning, match="64 draws rank answers too coarsely for worst-of-50: give 100"):
        InfAlign(Categorical(P), score, procedure="worst", inference_n=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InfAlign(Categorical(P), score)
