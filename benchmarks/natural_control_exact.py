"""The exact frontier of the enumerable model of the tests: every policy's expected reward and KL, no sampling.

    python benchmarks/natural_control_exact.py

Writes benchmarks/results/natural-control-exact.json: for three models with hidden size 16 and three with 4 (fewer than the
vocabulary needs), reward, KL and the share of the largest possible gain at that KL. The two "fitted" rows are controls
fitted on 8,192 and 3 x 4,096 sampled answers and then evaluated exactly. A minute on one core.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from trimtab.files import dump_json, write_atomic
from trimtab.steer.natural_control import NaturalControl, NaturalControlConfig
from trimtab.steer.value import ValueNetwork

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from oracles.natural import in_rounds, natural_gradient  # noqa: E402
from oracles.toy import Toy  # noqa: E402


def exact_value(toy: Any) -> Any:
    """RE-Control's V, fitted to the exact value of every prefix."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        value = ValueNetwork(toy.states.shape[1], 64)
    exact, optimiser = toy.values()[1].float(), torch.optim.Adam(value.parameters(), 3e-3)
    for _ in range(1500):
        loss = ((value(toy.states) - exact) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return value.requires_grad_(False)


def main() -> None:
    torch.set_num_threads(1)
    out = {}
    lams = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0)
    for size in (16, 4):
        for seed in range(3):
            toy = Toy(seed=seed, hidden_size=size)
            start = toy.evaluate(toy.base).reward
            exact, states = natural_gradient(toy), toy.states.double()

            def rows(policies: list[torch.Tensor], toy: Any = toy) -> list[dict[str, float]]:
                found = [toy.evaluate(policy) for policy in policies]
                return [{"kl": o.kl, "reward": o.reward, "share": toy.share_of_optimum(o)} for o in found]

            def edited(control: Any, toy: Any = toy) -> list[torch.Tensor]:
                return [toy.logprobs(control.but(strength=lam).edit(toy.states)) for lam in lams]

            fit = NaturalControlConfig(lr=3e-3, rollouts=8192)
            many = dataclasses.replace(fit, rounds=3, rollouts=4096, round_kl=0.15)
            prompts = [toy.prompt] * 4
            once = NaturalControl.learn(toy.lm, prompts, toy.reward, toy.sampling, fit, toy.rollouts(8192, seed=1))
            thrice = NaturalControl.learn(toy.lm, prompts, toy.reward, toy.sampling, many)
            out[f"d={size} seed={seed}"] = {
                "base": start,
                "soft optimum": rows([toy.soft_optimal(lam) for lam in lams]),
                "controlled decoding": rows([toy.controlled_decoding(lam) for lam in lams]),
                "natural control": rows([toy.logprobs(states + lam * exact) for lam in lams]),
                "natural control, 8 rounds": rows([toy.logprobs(in_rounds(toy, lam, 8)) for lam in lams]),
                "fitted": rows(edited(once)),
                "fitted, 3 rounds": rows(edited(thrice)),
                "re-control": rows(
                    [
                        toy.logprobs(toy.states + exact_value(toy).ascend(toy.states, a, n))
                        for a, n in (
                            (0.02, 10),
                            (0.05, 10),
                            (0.1, 10),
                            (0.25, 10),
                            (0.5, 10),
                            (1, 10),
                            (1, 20),
                            (1, 40),
                        )
                    ]
                ),
            }
            print(f"exact: d={size} seed={seed}", flush=True)
    write_atomic(ROOT / "benchmarks" / "results" / "natural-control-exact.json", dump_json(out))


if __name__ == "__main__":
    main()
