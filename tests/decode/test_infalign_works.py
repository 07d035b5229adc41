"""InfAlign on a pocket model: at equal KL the transform made for best-of-4 serves best-of-4, and answers gain reward."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq

from trimtab import LM, Sampling, pocket
from trimtab.decode.calibration import Calibrator, mid_ranks
from trimtab.decode.infalign import InfAlign
from trimtab.measure.stats import Interval, paired_difference
from trimtab.measure.win_rates import Array, Transform, kl, of_n_law, tilt, win_rate
from trimtab.rewards import as_reward


class Pool:
    """80 answers of pocket/base to each of 20 held-out prompts, with the learned reward.

    A base that is the pool itself can be reweighted, and its best of 4 ranked, without any sampling error.
    """

    def __init__(self) -> None:
        self.prompts = pocket.prompts("test", 20, 0)
        lm = LM.load("pocket/base")
        done = lm.generate(self.prompts, Sampling(max_new_tokens=48, samples=80, seed=0))
        scores = as_reward("pocket/reward").score(done.prompts, done.texts)
        self.reward = np.array(scores, dtype=float).reshape(20, 80)
        self.base = np.full(80, 1 / 80)

    def ranks(self) -> Array:
        return np.array([mid_ranks(np.sort(row), row) for row in self.reward])

    def wins(self, phi: Array, nats: float) -> dict[str, Array]:
        """Win rates over the base of p exp(phi / beta) a prompt, beta such that the mean KL is `nats`.

        best, single: of 4 draws and of one, by the reward.
        """

        def tilted(log_beta: float) -> list[Array]:
            return [tilt(self.base, row, math.exp(log_beta)) for row in phi]

        at = brentq(lambda x: np.mean([kl(q, self.base) for q in tilted(x)]) - nats, math.log(1e-3), math.log(1e4))
        out: dict[str, list[float]] = {"best": [], "single": []}
        for q, r in zip(tilted(at), self.reward, strict=True):
            ours, theirs = of_n_law(q, 4, "best", r), of_n_law(self.base, 4, "best", r)
            out["best"].append(beats(ours, theirs, r))
            out["single"].append(beats(q, self.base, r))
        return {name: np.array(values) for name, values in out.items()}


def beats(q: Array, p: Array, scores: Array) -> float:
    """P(a draw of q scores more than one of p), ties counting half; q and p [A] over the same outcomes."""
    level = np.unique(scores, return_inverse=True)[1]
    masses = [np.bincount(level, weights=one) for one in (q, p)]
    return win_rate(masses[0], masses[1], 1)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool()


def above(difference: Interval) -> bool:
    return difference.low is not None and difference.low > 0


@pytest.mark.parametrize("nats", [0.1, 0.3, 0.6])
def test_at_equal_kl_the_best_of_four_wins_more_with_the_transform_made_for_it(pool: Pool, nats: float) -> None:
    """Baselines: the raw reward, and the calibrated one. 95% intervals over 20 prompts, at matched mean KL.

    Best of 4: exp > calibrated > raw. A single draw: the other way round, exp < calibrated.
    """
    raw, ranks = pool.wins(pool.reward, nats), pool.wins(pool.ranks(), nats)
    made = pool.wins(Transform("exp")(pool.ranks()), nats)
    assert above(paired_difference(made["best"], ranks["best"]))
    assert above(paired_difference(ranks["best"], raw["best"]))
    assert above(paired_difference(ranks["single"], made["single"]))
    assert made["best"].mean() - ranks["best"].mean() > 0.04


def test_answers_gain_reward_over_the_policy_below() -> None:
    """pocket/base, 24 held-out prompts, 2 seeds of 3 answers, learned reward: paired 95% interval above 0."""
    lm, reward, prompts = LM.load("pocket/base"), as_reward("pocket/reward"), pocket.prompts("test", 24, 0)
    made = Calibrator.fit(lm, prompts, reward, 32, Sampling(max_new_tokens=48))
    tilted = InfAlign(lm, reward, 4, 5.0, calibrator=made)
    scores: dict[str, list[float | None]] = {"base": [], "infalign": []}
    for seed in range(2):
        sampling = Sampling(max_new_tokens=48, seed=seed, samples=3)
        for name, policy in (("base", lm), ("infalign", tilted)):
            done = policy.generate(prompts, sampling)  # type: ignore[attr-defined]
            scores[name] += reward.score(done.prompts, done.texts)
    owners = [number for number in range(24) for _ in range(3)] * 2
    assert above(paired_difference(scores["infalign"], scores["base"], owners))
