"""Best-of-n: its distribution against enumeration, its KL against the bound, its cost to the token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from oracles.toy import Toy
from tiny import tiny_lm
from trimtab import LM, Completions, Cost, Sampling, Steered
from trimtab.control import FunctionControl
from trimtab.decode import BestOfN
from trimtab.errors import UsageError
from trimtab.measure.kl import best_of_n_bound

PROMPTS = ["ba da fa la", "ma na", "pe"]
PLAIN = Sampling()


def tied_reward(tokens: tuple[int, ...]) -> float:
    """Three values over 3,906 answers: nearly every group of candidates has ties."""
    return float(min(tokens.count(3), 2))


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy(tied_reward)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


class Fixed:
    """A policy that gives the listed texts in turn, whatever is asked."""

    name = "fixed"

    def __init__(self, texts: Sequence[str]):
        self.texts = list(texts)

    def generate(self, prompts: Sequence[Any], sampling: Sampling = PLAIN) -> Completions:
        count = len(prompts) * sampling.samples
        owners = [prompt for prompt in prompts for _ in range(sampling.samples)]
        tokens = [[number] for number in range(count)]
        return Completions(owners, self.texts[:count], tokens, [[0.0]] * count, ["stop"] * count, Cost({"fixed": 7}))


def exact(toy: Toy, n: int, policy: torch.Tensor | None = None) -> torch.Tensor:
    """Probability [A] of every answer under best-of-n.

    The best reward is r with F(r)^n - F(r-)^n, F the distribution of one draw's reward; among the draws that tie at r the
    earliest has the policy's own conditional distribution.
    """
    p = toy.answer_probabilities(policy)
    rewards = torch.tensor([toy.score(tuple(token for token in answer if token)) for answer in toy.answers])
    out = torch.zeros_like(p)
    for value in rewards.unique():
        level = rewards == value
        below, upto = p[rewards < value].sum(), p[rewards <= value].sum()
        out[level] = p[level] / p[level].sum() * (upto**n - below**n)
    return out


def drawn_counts(toy: Toy, policy: Any, count: int) -> torch.Tensor:
    """How often each answer [A] was given."""
    number = {tuple(answer): i for i, answer in enumerate(toy.answers)}
    done = policy.generate([toy.prompt], toy.sampling.but(samples=count, seed=1))
    return torch.bincount(torch.tensor([number[tuple(row)] for row in done.tokens]), minlength=len(number)).double()


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-squared test of counts [A]; answers expected fewer than 5 times are counted together."""
    expected = probabilities / probabilities.sum() * counts.sum()
    often = expected >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    return float(chisquare(observed.numpy(), torch.cat([expected[often], expected[~often].sum()[None]]).numpy()).pvalue)


# what it draws


@pytest.mark.parametrize("n", [2, 5])
def test_the_whole_distribution_is_that_of_enumeration(toy: Toy, n: int) -> None:
    counts = drawn_counts(toy, BestOfN(toy.lm, toy.reward, n), 4000)
    chances = exact(toy, n)
    assert chances.sum().item() == pytest.approx(1, abs=1e-6)
    assert p_value(counts, chances) > 1e-3
    assert p_value(counts, exact(toy, 1)) < 1e-12  # the test would see it if nothing were chosen
    rewards = torch.tensor([toy.score(tuple(answer)) for answer in toy.answers]).double()
    mean = (chances * rewards).sum()
    deviation = (chances * (rewards - mean) ** 2).sum().sqrt() / len(counts) ** 0.5
    assert abs((counts * rewards).sum() / counts.sum() - mean) < 4 * deviation


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_the_bound_holds(toy: Toy, n: int) -> None:
    p, q = toy.answer_probabilities(), exact(toy, n)
    kl = float(torch.where(q > 0, q * (q / p).log(), 0).sum())
    assert 0 < kl < best_of_n_bound(n) == BestOfN(toy.lm, toy.reward, n).kl_bound


def test_it_nests_on_a_steered_policy(toy: Toy) -> None:
    push = 0.8 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    steered = Steered(toy.lm, FunctionControl(lambda hidden: hidden + push))
    edited = toy.logprobs(toy.states + push)
    counts = drawn_counts(toy, BestOfN(steered, toy.reward, 3), 3000)
    assert p_value(counts, exact(toy, 3, edited)) > 1e-3
    assert p_value(counts, exact(toy, 3)) < 1e-6
    done = BestOfN(steered, toy.reward, 3).generate([toy.prompt], toy.sampling)
    (own,) = toy.lm.score([toy.prompt], done.tokens, steered.control)
    assert torch.allclose(own, torch.tensor(done.logprobs[0]), atol=1e-5)


def test_each_sample_is_the_first_best_of_its_own_draws(lm: LM) -> None:
    def reward(prompts: Sequence[Any], texts: Sequence[str]) -> list[int]:
        return [len(set(text.split())) for text in texts]

    sampling = Sampling(max_new_tokens=8, samples=2, seed=3)
    done = BestOfN(lm, reward, 4).generate(PROMPTS, sampling)
    drawn = lm.generate(PROMPTS, sampling.but(samples=8))
    assert done.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    for row in range(6):
        group = range(4 * row, 4 * row + 4)
        scores = [len(set(drawn.texts[i].split())) for i in group]
        first = scores.index(max(scores))
        assert done.telemetry[row] == {"rewards": scores, "chosen": first}
        for column in ("texts", "tokens", "logprobs", "finish_reasons", "prompts"):
            assert getattr(done, column)[row] == getattr(drawn, column)[group[first]]


# ties, and answers that could not be judged


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ([1, 1, 1], 0),
        ([0, 2, 2], 1),
        ([None, -5, None], 1),
        ([None, None, None], 0),
        ([None, 0, 0], 1),
        ([-1e30, None, None], 0),
    ],
)
def test_ties_go_to_the_earliest_and_none_never_wins(scores: list[float | None], chosen: int) -> None:
    best = BestOfN(Fixed(["a", "b", "c"]), lambda prompts, texts: scores, 3)
    done = best.generate(["x"])
    assert (done.texts, done.telemetry) == (["abc"[chosen]], [{"rewards": scores, "chosen": chosen}])


# what it costs


def test_the_prompt_is_forwarded_once(lm: LM) -> None:
    sampling = Sampling(max_new_tokens=6, samples=2)
    done = BestOfN(lm, lambda prompts, texts: [0.0] * len(texts), 5).generate(PROMPTS, sampling)
    drawn = lm.generate(PROMPTS, sampling.but(samples=10))
    answers = sum(len(row) - 1 for row in drawn.tokens)  # an answer's last token is never forwarded
    assert done.cost.tokens == {lm.name: sum(map(len, lm.encode(PROMPTS))) + answers}
    assert done.cost.reward_calls == len(PROMPTS) * 2 * 5
    assert done.cost.seconds > 0


def test_one_is_the_policy_without_a_reward_call(lm: LM) -> None:
    def never(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
        raise RuntimeError("called")

    sampling = Sampling(max_new_tokens=8, samples=2, seed=5)
    done, plain = BestOfN(lm, never, 1).generate(PROMPTS, sampling), lm.generate(PROMPTS, sampling)
    assert (done.tokens, done.texts, done.logprobs) == (plain.tokens, plain.texts, plain.logprobs)
    assert done.cost.tokens == plain.cost.tokens and done.cost.reward_calls == 0
    assert BestOfN(lm, never, 1).kl_bound == 0


# bad input


def test_a_reward_that_raises_is_named() -> None:
    def broken(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
        return [1 / (text != "b") for text in texts]

    with pytest.raises(UsageError, match="'broken' raised ZeroDivisionError.*row 1"):
        BestOfN(Fixed("abc"), broken, 3).generate(["x"])
    with pytest.raises(UsageError, match="'short' gave 1 values for 3 rows"):
        BestOfN(Fixed("abc"), _named("short", [1.0]), 3).generate(["x"])
    with pytest.raises(UsageError, match="must be finite"):
        BestOfN(Fixed("abc"), _named("infinite", [1.0, float("inf"), 0.0]), 3).generate(["x"])


def test_no_draw_is_refused(lm: LM) -> None:
    with pytest.raises(UsageError, match="n must be 1 or more, not 0"):
        BestOfN(lm, "length:target=3", 0)


def _named(name: str, scores: list[float]) -> Any:
    def reward(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
        return scores

    reward.__name__ = name
    return reward
