"""What every token-level method rests on: the choice of candidates, the weights, the cap on the KL."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from scipy.optimize import brentq

from oracles.toy import Toy
from tiny import tiny_lm
from trimtab import LM, Sampling
from trimtab.decode.candidates import Candidates, capped, check_candidates, unjudged_last
from trimtab.divergence import kl_between
from trimtab.errors import UsageError
from trimtab.policy import Cost
from trimtab.stepping import answer_steps

PROMPTS = ["ba da fa la", "ma na", "pe"]
PLAIN = Sampling()
Bonus = Callable[[torch.Tensor], torch.Tensor]


def parity(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens % 2).float()


class Weighed(Candidates):
    def __init__(self, bonus: Bonus, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.of = bonus

    def bonus(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.of(tokens)


class Weigher:
    """A policy of `Weighed` sessions."""

    name = "weigher"

    def __init__(self, policy: Any, bonus: Bonus, *arguments: Any):
        self.policy, self.lm, self.bonus, self.arguments = policy, policy.lm, bonus, arguments

    def open(self, prompts: Sequence[Any], sampling: Sampling, meter: Cost) -> Weighed:
        inner = self.policy.open(prompts, sampling, meter)
        k, weight, greedy, cap = (*self.arguments, *(10, 1.0, False, None)[len(self.arguments) :])
        return Weighed(self.bonus, inner, prompts, k, weight, greedy, cap, sampling.temperature)

    def generate(self, prompts: Sequence[Any], sampling: Sampling = PLAIN) -> Any:
        return answer_steps(self, prompts, sampling)


class Fixed:
    """A session that shows the given logits."""

    guided = False

    def __init__(self, logits: torch.Tensor):
        self.logits = self.base_logits = logits


def guided(logits: torch.Tensor, bonus: Bonus, *arguments: Any, **options: Any) -> torch.Tensor:
    return Weighed(bonus, Fixed(logits), [""] * len(logits), *arguments, **options).logits


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


def random_logits(rows: int = 40, vocab: int = 50, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


# the choice


@pytest.mark.parametrize("k", [1, 5, 50, 0, 99])
def test_scores_of_the_likeliest_and_nothing_else(k: int) -> None:
    """k = 0, and any k of the vocabulary or more, is the whole vocabulary."""
    logits = random_logits().double()
    out = guided(logits, parity, k, 0.7)
    wanted = logits.log_softmax(-1) + 0.7 * parity(torch.arange(50))
    count = 50 if k in (0, 99) else k
    at = logits.topk(count, -1).indices
    assert torch.allclose(out.gather(-1, at), wanted.gather(-1, at), atol=1e-12)
    assert ((out > -torch.inf).sum(-1) == count).all()


def test_greedy_is_certain_and_ties_go_to_the_lower_token() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.3, 0.3, 0.3], [0.4, 0.2, 0.2, 0.2]]))
    out = guided(logits, lambda tokens: (tokens >= 2).float(), 4, 1.0, True)
    assert out.tolist() == [[-math.inf, -math.inf, 0.0, -math.inf]] * 2
    assert guided(logits, parity, 4, 0.0, True).argmax(-1).tolist() == [1, 0]


def test_unjudged_candidates_come_last() -> None:
    nan = math.nan
    bonus = torch.tensor([[1.0, nan, -2.0], [nan, nan, nan], [0.5, 0.0, 3.0]])
    assert unjudged_last(bonus).tolist() == [[1.0, -2.0, -2.0], [0.0, 0.0, 0.0], [0.5, 0.0, 3.0]]
    # a row nobody could judge is the policy's own, cut to its candidates
    logits = random_logits(3, 6)
    out = guided(logits, lambda tokens: torch.full(tokens.shape, nan), 6, 5.0)
    assert torch.allclose(out, logits.log_softmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_weight_0_is_the_policy_itself(lm: LM, temperature: float) -> None:
    """The same tokens for the same seed, with no call of the bonus and not cut to k."""

    def never(tokens: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("called")

    sampling = Sampling(max_new_tokens=8, samples=2, seed=5, temperature=temperature)
    done, plain = Weigher(lm, never, 2, 0.0).generate(PROMPTS, sampling), lm.generate(PROMPTS, sampling)
    assert (done.tokens, done.logprobs) == (plain.tokens, plain.logprobs)
    assert sum(map(sum, done.kl)) == 0 or temperature == 0
    greedy = Weigher(lm, never, 2, 0.0, True).generate(PROMPTS, sampling)
    assert greedy.tokens == lm.generate(PROMPTS, sampling.but(temperature=0)).tokens


def test_one_candidate_is_greedy(lm: LM) -> None:
    sampling = Sampling(max_new_tokens=8, seed=5)
    done = Weigher(lm, parity, 1, 9.0).generate(PROMPTS, sampling)
    assert done.tokens == lm.generate(PROMPTS, sampling.but(temperature=0)).tokens


def test_a_policy_over_a_cut_one_keeps_to_its_cut(lm: LM) -> None:
    """The inner one allows 3 tokens; no weight on others brings them back, and nothing is NaN."""
    sampling = Sampling(max_new_tokens=6, samples=4, seed=1)
    inner = Weigher(lm, parity, 3, 1.0)
    prompts = inner.open(PROMPTS, sampling, Cost())
    allowed = prompts.logits > -torch.inf
    outer = Weighed(lambda tokens: 100 * parity(tokens), prompts, PROMPTS, 10, 1.0)
    assert ((outer.logits > -torch.inf) == allowed).all() and not outer.logits.isnan().any()
    done = Weigher(inner, lambda tokens: 100 * parity(tokens), 10).generate(PROMPTS, sampling)
    assert all(math.isfinite(nats) for row in done.kl for nats in row)


# the cap


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("cap", [0.0, 0.01, 0.3, 2.0])
@pytest.mark.parametrize("k", [3, 50])
def test_the_cap_is_never_exceeded(temperature: float, cap: float, k: int) -> None:
    """Rewards of a size that takes all the probability; in float32, measured in float64."""
    logits = random_logits(200)
    pushes = 20 * torch.randn(200, 50, generator=torch.Generator().manual_seed(1))
    out = guided(logits, lambda tokens: pushes.gather(-1, tokens), k, 1.0, False, cap, temperature)
    plain = (logits.double() / temperature).log_softmax(-1)
    kl = kl_between((out.double() / temperature).log_softmax(-1), plain)
    assert float(kl.max()) <= cap
    if cap == 0:
        assert torch.equal(out, logits)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_cap_is_used_up_and_by_the_right_scale(temperature: float) -> None:
    """All but the rounding (1e-5 nats) of it, and at the scale that a root finder gives for the same equation."""
    logits, cap = random_logits(30, 12).double(), 0.2
    tokens = torch.arange(12).expand(30, 12)
    push = 20 * torch.randn(30, 12, generator=torch.Generator().manual_seed(1)).double()
    logprobs = logits.log_softmax(-1)
    out = capped(logprobs, tokens, push, cap, temperature)
    plain = (logprobs / temperature).log_softmax(-1)

    def kl(row: int, scale: float) -> float:
        moved = ((logprobs[row] + scale * push[row]) / temperature).log_softmax(-1)
        return float(kl_between(moved, plain[row]))

    for row in range(30):
        free = kl(row, 1.0) <= cap - 1e-5  # the model was as good as certain of the token that is pushed most
        scale = 1.0 if free else brentq(lambda s, row=row: kl(row, s) - (cap - 1e-5), 0, 1, xtol=1e-12)
        wanted = ((logprobs[row] + scale * push[row]) / temperature).log_softmax(-1)
        assert torch.allclose((out[row] / temperature).log_softmax(-1), wanted, atol=1e-5)  # 2^-30 of a push of 60


def test_a_cap_that_is_not_reached_changes_nothing() -> None:
    logits = random_logits(20)
    free, capped_ = (guided(logits, parity, 50, 0.5, False, cap) for cap in (None, 5.0))
    assert torch.equal(free, capped_)


def test_where_the_cut_alone_costs_more_nothing_is_cut() -> None:
    """Ten equally likely tokens: keeping 2 costs log 5 = 1.61 nats."""
    logits = torch.zeros(1, 10)
    assert torch.allclose(guided(logits, parity, 2, 1.0, False, 1.6).softmax(-1), torch.full((1, 10), 0.1))
    assert ((guided(logits, lambda tokens: 0.0 * tokens, 2, 1.0, False, 1.62) > -torch.inf).sum()) == 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_the_cap_holds_for_every_token_of_an_answer(temperature: float) -> None:
    toy = Toy()
    sampling = toy.sampling.but(samples=200, seed=2, temperature=temperature)
    done = Weigher(toy.lm, lambda tokens: 50 * (tokens == 3).float(), 0, 1.0, False, 0.05).generate(
        [toy.prompt], sampling
    )
    reported = [nats for row in done.kl for nats in row]
    assert max(reported) <= 0.05 and sorted(reported)[len(reported) // 2] > 0.04
    free = Weigher(toy.lm, lambda tokens: 50 * (tokens == 3).float(), 0).generate([toy.prompt], sampling)
    assert min(nats for row in free.kl for nats in row) > 0.05


# bad input


def test_options_that_make_no_sense_are_refused() -> None:
    for k, weight, cap, said in [
        (-1, 1.0, None, "k must be 1 or more"),
        (5, math.nan, None, "weight must be a finite number"),
        (5, math.inf, None, "weight must be a finite number"),
        (5, -1.0, None, "weight must be a finite number"),
        (5, 1.0, -0.1, "kl_cap must be 0 nats"),
        (5, 1.0, math.nan, "kl_cap must be 0 nats"),
    ]:
        with pytest.raises(UsageError, match=said):
            check_candidates(k, weight, cap)
    check_candidates(0, 0.0, 0.0)


def test_a_cap_and_certainty_exclude_each_other(lm: LM) -> None:
    with pytest.raises(UsageError, match="kl_cap needs a temperature above 0"):
        Weigher(lm, parity, 5, 1.0, False, 0.1).generate(PROMPTS, Sampling(temperature=0))
