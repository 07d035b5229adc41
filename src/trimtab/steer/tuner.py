"""The strength that spends a given KL: nats per token, measured on answers the steered model itself draws.

KL rises with strength, near quadratically while it is small. The search is a secant in log-log on answers drawn with the
same random numbers at every strength, so the measured curve is nearly smooth; it brackets first and then closes in.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.divergence import divergences, kl_between
from trimtab.errors import UsageError
from trimtab.generation import Step
from trimtab.lm import LM
from trimtab.policy import Cost, Prompt
from trimtab.sampling import Sampling, derive_seed
from trimtab.steer.controller import Controller, StrongEdit
from trimtab.steer.rollouts import Progress

ANSWERS = 256  # answers drawn at each strength tried
TOLERANCE = 0.02  # relative; the promise is 5 %
MOST_TRIES = 14


@dataclass
class Tuned:
    """The controller at the strength found, its KL per token on the calibration answers, and what was tried."""

    controller: Any
    kl: float
    tried: list[tuple[float, float]]  # (multiplier of the given controller's strength, nats per token)
    cost: Cost


def kl_per_token(lm: LM, controller: Controller, prompts: Sequence[Prompt], sampling: Sampling) -> tuple[float, Cost]:
    """Mean over tokens of the exact KL from the unedited model, on answers drawn from the steered one.

    An edit of the final hidden state is measured while sampling; one inside the blocks needs the answers scored again.
    """
    if controller.final:
        sums: list[torch.Tensor] = []

        def observe(step: Step) -> None:
            sums.append(kl_between(step.logprobs, sampling.logprobs(lm.head(step.hidden))).cpu())

        cost = lm.generate(prompts, sampling, controller, observe).cost
        return float(torch.cat(sums).mean()) if sums else 0.0, cost
    policy = controller.as_policy(lm)
    answers = policy.generate(prompts, sampling)
    found = divergences(policy, lm, answers.prompts, answers.tokens, sampling)
    kl = torch.cat([one.kl for one in found])
    return float(kl.mean()) if len(kl) else 0.0, answers.cost + Cost({lm.name: 2 * answers.cost.tokens_forwarded})


def tune(
    lm: LM,
    controller: Controller,
    kl_target: float,
    prompts: Sequence[Prompt],
    sampling: Sampling = Sampling(),
    progress: Progress | None = None,
) -> Tuned:
    """Scale `controller` until it spends `kl_target` nats per token (within 5 %) on the given prompts.

    Raises `UsageError` when the target is not positive or no strength reaches it (the controller hardly edits).
    """
    if not 0 < kl_target < math.inf:
        raise UsageError(f"kl_target must be above 0 nats per token, not {kl_target}")
    chosen = [prompts[i % len(prompts)] for i in range(ANSWERS)]
    draws = sampling.but(samples=1, seed=derive_seed(sampling.seed, "tune"))
    tried: list[tuple[float, float]] = []
    total = Cost()
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    factor = 1.0
    for _ in range(MOST_TRIES):
        with warnings.catch_warnings():  # strengths beyond the target are tried only to bracket it
            warnings.simplefilter("ignore", StrongEdit)
            kl, cost = kl_per_token(lm, controller.scaled(factor), chosen, draws)
        total = total + cost
        tried.append((factor, kl))
        if progress is not None:
            progress(
                f"{controller.name}: {kl:.4f} nats/token at {factor:.3g} times the strength (target {kl_target:g})"
            )
        if abs(kl / kl_target - 1) <= TOLERANCE:
            break
        if kl < kl_target:
            low = (factor, kl)
        else:
            high = (factor, kl)
        factor = _next(factor, kl, kl_target, low, high)
    factor, kl = min(tried, key=lambda pair: abs(math.log(max(pair[1], 1e-12) / kl_target)))
    if abs(kl / kl_target - 1) > 0.05 and high is None:
        raise UsageError(
            f"{controller.name} spends {kl:.3g} nats per token even at {factor:.3g} times its strength: "
            f"kl_target={kl_target:g} is out of reach"
        )
    return Tuned(controller.scaled(factor), kl, tried, total)


def _next(
    factor: float,
    kl: float,
    target: float,
    low: tuple[float, float] | None,
    high: tuple[float, float] | None,
) -> float:
    """The next multiplier: a quadratic guess until the target is bracketed, then a safeguarded secant in log-log."""
    if low is None or high is None:
        guess = factor * math.sqrt(target / max(kl, 1e-12))
        return min(max(guess, factor / 8), factor * 8)
    (a, ka), (b, kb) = low, high
    share = math.log(target / max(ka, 1e-12)) / math.log(max(kb, 1e-12) / max(ka, 1e-12))
    share = min(max(share, 0.1), 0.9)
    return math.exp(math.log(a) + share * (math.log(b) - math.log(a)))
