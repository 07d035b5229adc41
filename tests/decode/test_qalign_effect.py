"""QAlign against best-of-n under an imperfect reward: exactly on enumerated worlds, and measured on pocket/base.

Worlds: 16 random toy models with 121 answers each, gold = 0.5 #3 - 0.25 #2 + 0.3 log p (unlikely text is worse), and the
proxy is gold plus noise of the size of gold: one draw an answer, Laplace (tails exp(-|x|)) unless said otherwise. beta is
2, twice the scale of the noise. Best-of-n is exact at any n. QAlign's law after T steps is p K^T, K from the functions the
chain uses. A step is about half an answer: T = 2 (n - 1) forwards what n answers do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import pytest
import torch

from oracles.toy import Toy
from trimtab.decode.metropolis import log_acceptance, log_gain
from trimtab.decode.qalign import QAlign
from trimtab.measure.stats import mean_interval, paired_difference
from trimtab.rewards import Function

BUDGETS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)  # answers
BETA = 2.0


class World:
    """One toy model with a gold reward and a proxy of it; everything about its 121 answers [A]."""

    def __init__(self, seed: int, noise: str):
        self.toy = Toy(lambda tokens: 0.5 * tokens.count(3) - 0.25 * tokens.count(2), seed=seed, vocab=4, horizon=4)
        p = self.toy.answer_probabilities()
        self.p = p / p.sum()
        plain = torch.tensor([self.toy.score(self.words(answer)) for answer in self.toy.answers]).double()
        self.gold = plain + 0.3 * self.p.log()
        generator = np.random.default_rng(seed)
        draws = generator.laplace(size=len(p)) if noise == "laplace" else generator.standard_t(2, size=len(p))
        self.proxy = self.gold + torch.tensor(draws)
        known = {self.words(answer): float(self.proxy[at]) for at, answer in enumerate(self.toy.answers)}
        self.reward = Function(lambda _, texts: [known[tuple(map(int, text.split()))] for text in texts], name="proxy")

    @staticmethod
    def words(answer: list[int]) -> tuple[int, ...]:
        return tuple(token for token in answer if token)

    def best_of(self, n: int) -> torch.Tensor:
        """The law of best-of-n: F(r)^n - F(r-)^n (no two answers tie)."""
        order = self.proxy.argsort()
        upto = self.p[order].cumsum(0) / self.p.sum()
        law = torch.zeros_like(self.p)
        law[order] = upto**n - torch.cat([torch.zeros(1), upto[:-1]]) ** n
        return law

    @cached_property
    def kernel(self) -> torch.Tensor:
        """K [A, A]."""
        paths, tokens, _ = self.toy._paths
        size = torch.tensor([len(answer) for answer in self.toy.answers])
        own = torch.where(torch.arange(self.toy.horizon) < size[:, None], self.toy.base[paths, tokens], 0.0)
        gain = log_gain(self.proxy[:, None], self.proxy[None], BETA)
        accept = log_acceptance(gain, size[:, None], size[None]).exp()
        out = torch.zeros_like(accept)
        for cut in range(self.toy.horizon):
            same = (tokens[:, None, :cut] == tokens[None, :, :cut]).all(-1) & (size[:, None] > cut) & (size[None] > cut)
            out += torch.where(same, own[None, :, cut:].sum(-1).exp() / size[:, None], 0.0)
        out = out * accept
        return out + (1 - out.sum(1)).diag()

    def walked(self, steps: int) -> torch.Tensor:
        return self.p @ torch.linalg.matrix_power(self.kernel, steps)

    @property
    def target(self) -> torch.Tensor:
        raw = self.p * ((self.proxy - self.proxy.max()) / BETA).exp()
        return raw / raw.sum()


@pytest.fixture(scope="module")
def worlds() -> list[World]:
    return [World(seed, "laplace") for seed in range(16)]


def curve(worlds: list[World], law: Callable[[World, int], torch.Tensor]) -> np.ndarray:
    """Expected gold of every world at every budget, [W, N]."""
    return np.array([[float(law(world, n) @ world.gold) for n in BUDGETS] for world in worlds])


def test_best_of_n_turns_and_qalign_rises_and_stays(worlds: list[World]) -> None:
    best = curve(worlds, lambda world, n: world.best_of(n))
    walk = curve(worlds, lambda world, n: world.walked(2 * (n - 1)))
    turn = int(best.mean(0).argmax())
    assert 0 < turn < len(BUDGETS) - 1
    fall = mean_interval(best[:, turn] - best[:, -1])
    assert fall.low is not None and fall.low > 0
    mean = walk.mean(0)
    assert mean.max() - mean[-1] < 0.1 * (mean[-1] - mean[0])  # having risen, it stays (it may swing by a tenth)
    limits = np.array([float(world.target @ world.gold) for world in worlds])
    assert np.abs(walk[:, -1] - limits).max() < 1e-9
    gain, ahead = mean_interval(limits - walk[:, 0]), paired_difference(walk[:, -1], best[:, -1])
    assert gain.low is not None and gain.low > 0  # better than the base
    assert ahead.low is not None and ahead.low > 0  # and than best-of-n at the same large budget
    # not better than best-of-n that stops at the right n, which nobody knows without the gold reward
    level = paired_difference(walk[:, -1], best[:, turn])
    assert level.low is not None and level.high is not None and level.low < 0


def test_the_chain_walks_that_curve(worlds: list[World]) -> None:
    """The method itself, 64 chains x 20 steps a world: gold and proxy of the last states within 4 standard errors."""
    gold, proxy, ahead = [], [], []
    for world in worlds:
        number = {tuple(answer): at for at, answer in enumerate(world.toy.answers)}
        method = QAlign(world.toy.lm, world.reward, beta=BETA, steps=20, select="last")
        done = method.generate([world.toy.prompt], world.toy.sampling.but(samples=64, seed=1))
        found = torch.tensor([number[tuple(tokens)] for tokens in done.tokens])
        law = world.walked(20)
        for column, errors in ((world.gold, gold), (world.proxy, proxy)):
            errors.append(float(column[found].mean() - law @ column))
        ahead.append(float(world.gold[found].mean() - world.best_of(BUDGETS[-1]) @ world.gold))
    for errors in (gold, proxy):
        assert abs(np.mean(errors)) < 4 * np.std(errors, ddof=1) / len(errors) ** 0.5
    low = mean_interval(ahead).low
    assert low is not None and low > 0


def test_tails_heavier_than_exponential_spoil_the_target_too() -> None:
    """Student t with 2 degrees of freedom: exp(r / beta) has no mean, and no beta helps. A negative result, kept."""
    worlds = [World(seed, "t") for seed in range(16)]
    walk = curve(worlds, lambda world, n: world.walked(2 * (n - 1))).mean(0)
    limits = [float(world.target @ world.gold) for world in worlds]
    assert 0 < int(walk.argmax()) < len(BUDGETS) - 1 and walk.max() - np.mean(limits) > 0.1
    gain = mean_interval(np.array(limits) - curve(worlds, lambda world, n: world.p)[:, 0])
    assert gain.low is not None and gain.low < 0
