"""InfAlign: tilt by a calibrated, transformed reward, made for the best-of-N (or worst-of-N) that will be run on top.

Balashankar et al., "InfAlign: Inference-aware language model alignment", ICML 2025, arXiv 2412.19792. The policy with the
highest win rate under a procedure T at a given KL has the form

    pi*(y|x) = p(y|x) exp(Phi(C(x, y)) / beta) / Z(x)

C the calibrated reward (`decode.calibration`), Phi a transform that depends on T and N alone (`measure.win_rates`):
identity for a single draw, steep at the top for best-of-N, steep at the bottom for worst-of-N.

This file draws from pi* at answering time, without training, by self-normalised importance sampling: draw n answers from
the policy below, calibrate each, give one with probability proportional to exp(strength Phi(C)), strength = 1 / beta. To
train toward pi*, give `Calibrated(reward, calibrator, transform)` to a trainer instead.

How exact this is: with K draws a table and n draws an answer, the law is n p(y) E[w(y) / (w(y) + w_2 + ... + w_n)] with
w = exp(strength Phi(C)) of independent answers: the base at n = 1, pi* as n and K grow, with an error of the order of
E[w^2] / E[w]^2 / n; short of that it is nearer the base than pi*. With Phi = log and strength m - 1 the limit is exactly
best-of-m (for a reward without ties); with strength to infinity at fixed n and any rising Phi it is best-of-n. Its KL from
the policy below never exceeds log n - (n - 1) / n, nor the mean over draws of log n - H(w / sum w), which telemetry has.

Departures from the paper: no reinforcement learning; the fixed-point transform comes from this package's exact solver;
exponential transforms are rescaled to [0, 1] so that strength means the same for every t.
Cost an answer: n answers and n reward calls, and for each prompt without a table K answers and K reward calls more. With
draws=0 there is no table: each answer is ranked among the other n - 1 of its row, which is unbiased too, coarser, and
costs n answers alone.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.card import Card
from trimtab.decode.calibration import FEWEST, Calibrator, draw_tables
from trimtab.decode.selection import weights
from trimtab.errors import UsageError
from trimtab.measure.kl import best_of_n_bound
from trimtab.measure.win_rates import Kind, Procedure, Transform
from trimtab.policy import Completions, Policy, Prompt
from trimtab.rewards import as_reward
from trimtab.sampling import Sampling, derive_seed, uniforms

CARD = Card(
    slug="infalign",
    name="InfAlign",
    paper="arXiv 2412.19792",
    summary="Draws answers in proportion to exp(strength x transform(calibrated reward)), made for the best-of-N run on top.",
    goal="preference",
    stage="decode",
    mechanism="mcmc/best-of-n",
    signal=("scalar reward",),
    access="black-box text",
    produces="decoder",
    needs=("a policy", "a reward on finished text, at answering time"),
    infer_multiplier="n + draws / samples (the prompt once each); n with draws=0",
    fit_cost="none (or draws answers a prompt for a calibrator that is kept)",
    benefit_metrics=("best_of_n_win_rate", "reward"),
    cost_metrics=("tokens_forwarded_per_answer", "reward_calls_per_answer", "kl_bound"),
    limits=(
        "needs the reward at answering time",
        "a prompt without a table costs `draws` more answers",
        "at finite n nearer the base than its target",
    ),
    risks=("over-optimisation of a proxy reward at large strength",),
    composes_with=("best-of-n", "natural-control", "re-control", "pref-ctrl", "static-re", "steering-vector"),
    choose="When best-of-n (or a worst-of-n attacker) will run on top: it spends the same KL where that "
    "procedure looks. For a single draw, plain calibration (transform=identity) or best-of-n itself.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/base --reward pocket/reward --prompts prompts.txt --policy infalign:n=8,strength=5",
)


@dataclass(frozen=True)
class InfAlignConfig:
    # answers drawn for each one given
    n: int = 8
    # 1 / beta: how far to tilt; 0 is the policy below
    strength: float = 5.0
    # identity (for single draws), exp, log (in the limit best-of-(strength + 1)) or fixed-point (the exact optimum)
    transform: Kind = "exp"
    # whether the best or the worst of several answers will be taken on top of this policy
    procedure: Procedure = "best"
    # of how many
    inference_n: int = 4
    # steepness of the exp transform
    t: float = 10.0
    # answers drawn from the policy below to calibrate the reward for a prompt; 0: rank the n draws among themselves
    draws: int = 64

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UsageError(f"n must be 1 or more, not {self.n}")
        if not 0 <= self.strength < math.inf:
            raise UsageError(f"strength must be 0 (the policy below) or more, and finite, not {self.strength}")
        if self.draws < 0 or self.draws == 1:
            raise UsageError(f"draws must be 2 or more (64 is usual), or 0 for none, not {self.draws}")
        self.made_transform()

    def made_transform(self, draws: int | None = None) -> Transform:
        """Phi. The fixed point is that at beta = 1 / strength; log stops at half of the lowest step of a table."""
        beta = 1 / self.strength if self.strength else 1.0
        floor = 1 / (2 * max(1, draws or self.draws or self.n - 1))
        return Transform(self.transform, self.procedure, self.inference_n, self.t, beta, floor)


class InfAlign:
    """`InfAlign(policy, reward, n=8, transform="exp", procedure="best")` is a policy; `policy` may be any.

    calibrator: tables made before (`Calibrator.fit`), refused where they are of another policy, sampling or reward;
    prompts that it lacks are calibrated on the fly, anew in every call.
    """

    slug = "infalign"
    Config = InfAlignConfig
    KNOB = "n"
    DIAL = "strength"

    def __init__(
        self,
        policy: Policy,
        reward: Any,
        n: int = 8,
        strength: float = 5.0,
        transform: Kind = "exp",
        procedure: Procedure = "best",
        inference_n: int = 4,
        t: float = 10.0,
        draws: int = 64,
        calibrator: Calibrator | None = None,
        name: str | None = None,
    ):
        self.config = InfAlignConfig(n, strength, transform, procedure, inference_n, t, draws)
        self.policy, self.reward, self.calibrator = policy, as_reward(reward), calibrator
        used = draws if calibrator is None else calibrator.draws
        self.transform = self.config.made_transform(used)
        self.name = name or f"infalign-{n}"
        if 0 < used < max(FEWEST, 2 * inference_n):
            warnings.warn(
                f"{used} draws rank answers too coarsely for {procedure}-of-{inference_n}: "
                f"give {max(FEWEST, 2 * inference_n)} or more",
                stacklevel=2,
            )

    @property
    def kl_bound(self) -> float:
        """Upper bound on the KL of an answer's distribution from the policy's, in nats an answer.

        It holds for any reward that judges every draw. Draws that could not be judged are passed over, which moves the law
        by itself; log n - (n - 1) / n holds even so.
        """
        return selection_kl_bound(self.config.n, self.config.strength * self.transform.span)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        """telemetry of each row: `rewards` and `calibrated` rewards of its n draws (None: could not judge), which was
        `chosen`, and `kl_bound`, log n - H of the weights it was chosen with."""
        start = time.perf_counter()
        n, strength = self.config.n, self.config.strength
        if n == 1 or strength == 0:
            return self.policy.generate(prompts, sampling)
        drawn = self.policy.generate(prompts, sampling.but(samples=sampling.samples * n))
        rewards = self.reward.score(drawn.prompts, drawn.texts, drawn.cost)
        groups = [range(first, first + n) for first in range(0, len(drawn), n)]
        if self.calibrator is None and not self.config.draws:
            tables = None
            ranks = [rank for group in groups for rank in ranks_within([rewards[row] for row in group])]
        else:
            tables = self._tables(prompts, sampling)
            ranks = tables.calibrate(drawn.prompts, rewards)
        phi = self.transform.each(ranks)
        seed = derive_seed(sampling.seed, self.slug, sampling.samples)  # one InfAlign over another has its own picks
        picks = uniforms(len(groups), 1, seed)[:, 0].tolist()
        chosen, telemetry = [], []
        for group, pick in zip(groups, picks, strict=True):
            shares = weights([phi[row] for row in group], 1 / strength)
            chosen.append(group[inverse_cdf(shares, pick)])
            telemetry.append(
                {
                    "rewards": [rewards[row] for row in group],
                    "calibrated": [ranks[row] for row in group],
                    "chosen": chosen[-1] - group[0],
                    "kl_bound": math.log(n) - entropy(shares),
                }
            )
        kept = drawn.select(chosen)
        kept.telemetry = telemetry
        if tables is not None and tables is not self.calibrator:
            kept.cost = kept.cost + tables.cost
        kept.cost.seconds = time.perf_counter() - start
        return kept

    def _tables(self, prompts: Sequence[Prompt], sampling: Sampling) -> Calibrator:
        """The calibrator given, or it and tables for the prompts that it lacks; `cost` is that of the new ones."""
        known = self.calibrator
        if known is not None:
            known.check(self.policy, sampling, self.reward)
        missing = list(prompts) if known is None else known.lacks(prompts)
        if known is not None and not missing:
            return known
        draws = self.config.draws if known is None else known.draws
        made = draw_tables(self.policy, missing, self.reward, draws, sampling)
        if known is not None:
            made.tables = {**known.tables, **made.tables}
        return made


def ranks_within(rewards: Sequence[float | None]) -> list[float | None]:
    """The mid-rank of each reward among the other judged ones: an unbiased C. 1/2 where there is no other."""
    known = np.array([reward for reward in rewards if reward is not None])
    others = max(1, len(known) - 1)
    found: list[float | None] = []
    for reward in rewards:
        if reward is None:
            found.append(None)
        else:
            below, equal = (known < reward).sum(), (known == reward).sum()
            found.append(float((below + (equal - 1) / 2) / others) if len(known) > 1 else 0.5)
    return found


def inverse_cdf(shares: np.ndarray, uniform: float) -> int:
    """The first index whose cumulative share exceeds `uniform` in [0, 1); never one of share 0."""
    cdf = np.cumsum(shares)
    return int(np.searchsorted(cdf, min(uniform * cdf[-1], np.nextafter(cdf[-1], 0)), side="right"))


def entropy(shares: np.ndarray) -> float:
    """In nats."""
    some = shares[shares > 0]
    return float(-(some * np.log(some)).sum())


def selection_kl_bound(n: int, spread: float) -> float:
    """The most that choosing one of n independent draws with weights exp(a), a within `spread`, moves their law, in nats.

    KL(law of the chosen || law of a draw) is at most the mean of log n - H(weights), which is largest where every `a` is
    at one of the two ends, k of them at the top; and at most that of best-of-n, whatever the rule.
    """
    worst = 0.0
    for k in range(1, n):
        top = 1 / (k + (n - k) * math.exp(-spread))
        low = top * math.exp(-spread)
        worst = max(worst, math.log(n) - entropy(np.array([top] * k + [low] * (n - k))))
    return min(worst, best_of_n_bound(n))
