"""The tuner: the strength it returns spends the KL it was asked for, measured again by enumeration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from oracles.toy import Toy
from trimtab.errors import UsageError
from trimtab.steer import ReControl, StaticRE, ValueNetwork, tune
from trimtab.steer.tuner import Tuned, kl_per_token


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


def direction() -> torch.Tensor:
    return torch.randn(16, generator=torch.Generator().manual_seed(0))


def exact_kl(toy: Toy, controller: Any) -> float:
    return toy.evaluate(toy.logprobs(controller.edit(toy.states))).kl_per_token


def test_the_measure_is_the_enumerated_kl(toy: Toy) -> None:
    control = StaticRE(direction(), strength=3.0)
    found, cost = kl_per_token(toy.lm, control, [toy.prompt] * 800, toy.sampling)
    assert found == pytest.approx(exact_kl(toy, control), rel=0.05)
    assert cost.tokens_forwarded > 0


@pytest.mark.parametrize("target", [0.02, 0.2])
@pytest.mark.parametrize("start", [0.01, 1.0, 40.0])
def test_the_target_is_met_from_any_start(toy: Toy, target: float, start: float) -> None:
    tuned = tune(toy.lm, StaticRE(direction(), strength=start), target, [toy.prompt], toy.sampling)
    assert tuned.kl == pytest.approx(target, rel=0.05)
    again, _ = kl_per_token(toy.lm, tuned.controller, [toy.prompt] * 256, toy.sampling.but(seed=77))
    assert again == pytest.approx(target, rel=0.25)
    assert exact_kl(toy, tuned.controller) == pytest.approx(target, rel=0.2)
    assert len(tuned.tried) <= 14 and tuned.cost.tokens_forwarded > 0


def test_tuning_is_the_same_twice(toy: Toy) -> None:
    def once() -> Tuned:
        return tune(toy.lm, StaticRE(direction(), strength=1.0), 0.1, [toy.prompt], toy.sampling)

    assert once().tried == once().tried


def test_fit_tunes_to_kl_target_unless_a_strength_is_given(toy: Toy) -> None:
    rollouts, prompts = toy.rollouts(512), [toy.prompt] * 4
    options: dict[str, Any] = {"sampling": toy.sampling, "drawn": rollouts, "width": 16, "epochs": 2}
    tuned = ReControl.fit(toy.lm, prompts, toy.reward, kl_target=0.05, **options)
    assert tuned.origin.metrics["calibration_kl_per_token"] == pytest.approx(0.05, rel=0.05)
    assert exact_kl(toy, tuned) == pytest.approx(0.05, rel=0.25)
    given = ReControl.fit(toy.lm, prompts, toy.reward, step_size=0.3, **options)
    assert given.strength == 0.3 and "calibration_kl_per_token" not in given.origin.metrics
    assert tuned.origin.fit_tokens > given.origin.fit_tokens
    assert torch.equal(tuned.value(toy.states), given.value(toy.states))


@pytest.mark.parametrize("target", [0.0, -1.0, float("inf"), float("nan")])
def test_targets_that_make_no_sense_are_refused(toy: Toy, target: float) -> None:
    with pytest.raises(UsageError, match="kl_target must be above 0"):
        tune(toy.lm, StaticRE(direction(), strength=1.0), target, [toy.prompt], toy.sampling)


def test_a_controller_that_cannot_spend_it_is_said(toy: Toy) -> None:
    class Constant(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return (hidden * 0).sum(-1)

    with pytest.raises(UsageError, match=r"re-control spends 0 nats per token .* kl_target=0.1 is out of reach"):
        tune(toy.lm, ReControl(Constant(), step_size=1.0, steps=1), 0.1, [toy.prompt], toy.sampling)
    capped = ReControl(ValueNetwork(16), step_size=1.0, steps=2, trust=0.01)
    with pytest.raises(UsageError, match="out of reach"):
        tune(toy.lm, capped, 2.0, [toy.prompt], toy.sampling)


def test_progress_is_reported(toy: Toy) -> None:
    lines: list[str] = []
    tune(toy.lm, StaticRE(direction(), strength=1.0), 0.1, [toy.prompt], toy.sampling, lines.append)
    assert lines and "nats/token at" in lines[0] and "target 0.1" in lines[0]
