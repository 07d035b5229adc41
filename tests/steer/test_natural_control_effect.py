"""Natural control on a real language model that nobody here trained: more reward, and for less KL than RE-Control.

stories260k, VADER sentiment, 64 tokens at temperature 1, fitted on 20 openings, measured on 32 others x 3 answers with
common random numbers; two seeds, each with its own 1,024 rollouts, fit and answers. docs/natural-control.md has the study
with 9,600 rollouts and five seeds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab import LM, Sampling, Steered
from trimtab.divergence import divergences
from trimtab.measure.stats import paired_difference
from trimtab.rewards import parse_reward
from trimtab.steer import NaturalControl, ReControl
from trimtab.steer.natural_control import NaturalControlConfig
from trimtab.steer.re_control import ReControlConfig
from trimtab.steer.rollouts import collect

OPENINGS = Path(__file__).resolve().parents[2] / "benchmarks" / "openings"
FIT, TEST = ((OPENINGS / f"{name}.txt").read_text().splitlines() for name in ("fit", "test"))
PROMPTS, ANSWERS = 32, 3


@pytest.mark.parametrize("seed", [0, 1])
def test_more_reward_for_less_kl(stories260k, seed):
    """Measured: base 0.35 and 0.45, natural control +0.45 and +0.37 at 0.07 nats a token.

    RE-Control on the same rollouts: +0.09 and -0.11 at 0.15 and 0.13 nats. Replaced by the base the difference is 0 and the
    lower bound of its interval not above 0.2.
    """
    torch.set_num_threads(1)
    lm, reward = LM.load(stories260k), parse_reward("sentiment")
    draws, sampling = Sampling(64, seed=100 + seed), Sampling(64, samples=ANSWERS, seed=200 + seed)
    rollouts = collect(lm, FIT, reward, draws, 1024)
    natural = NaturalControl.learn(lm, FIT, reward, draws, NaturalControlConfig(seed=seed), rollouts)
    natural = natural.but(strength=natural.strength_for(0.06))
    config = ReControlConfig(seed=seed, epochs=3, step_size=2.5, steps=10)
    theirs = ReControl.learn(lm, FIT, reward, draws, config, rollouts)

    def measured(policy) -> tuple[np.ndarray, float]:
        drawn = policy.generate(TEST[:PROMPTS], sampling)
        found = divergences(policy, lm, drawn.prompts, drawn.tokens, sampling)
        return reward(drawn.prompts, drawn.texts), float(torch.cat([one.kl for one in found]).mean())

    base, _ = measured(lm)
    steered, kl = measured(Steered(lm, natural))
    ascended, their_kl = measured(Steered(lm, theirs))
    prompts = [row // ANSWERS for row in range(len(base))]
    gain = paired_difference(steered, base, prompts)
    print(f"seed {seed}: base {base.mean():.3f} natural {gain} at {kl:.4f}; re {ascended.mean():.3f} at {their_kl:.4f}")
    assert gain.low is not None and gain.low > 0.2
    assert kl < 0.1
    assert their_kl > 1.5 * kl and ascended.mean() < steered.mean()
