"""ARGS: its greedy rule by brute force, its limits, and the cached path against the whole text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from oracles.exact_value import drawn_from
from oracles.toy import EOS, Toy
from tiny import BOS, PAD, UNK, tiny_lm
from tiny_reward import classifier
from trimtab import LM, Completions, Cost, Sampling, Steered
from trimtab.control import FunctionControl
from trimtab.decode.args import Args, ArgsConfig
from trimtab.errors import UsageError
from trimtab.guided import Guided
from trimtab.rewards import Function
from trimtab.rewards.prefix import UnfinishedText
from trimtab.stepping import answer_steps

PROMPTS = ["ba da fa la", "ma na", "pe"]
PLAIN = Sampling()
# of every text of at most 3 words: what a reward would say of it, finished or not
TABLE = {
    (): 0.0, (1,): 0.4, (2,): 0.9, (1, 1): 2.0, (1, 2): 1.0, (2, 1): 0.1, (2, 2): 0.3,
    (1, 1, 1): 0.2, (1, 1, 2): 5.0, (1, 2, 1): 0.0, (1, 2, 2): 0.5, (2, 1, 1): 1.0, (2, 1, 2): 0.7, (2, 2, 1): 2.5,
    (2, 2, 2): 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def toy() -> Toy:
    """3 tokens of which one ends an answer, 3 steps."""
    return Toy(lambda tokens: TABLE[tokens], vocab=3, horizon=3)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


def letters(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
    return [math.sin(sum(map(ord, text))) for text in texts]


def scores_at(toy: Toy, prefix: tuple[int, ...], weight: float) -> list[float]:
    """log p + weight * r of the text with each token; an end token adds no text."""
    row = toy.prefixes.index(prefix)
    texts = [prefix if token == EOS else (*prefix, token) for token in range(3)]
    return [float(toy.base[row, token]) + weight * TABLE[text] for token, text in enumerate(texts)]


@pytest.mark.parametrize("weight", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("k", [2, 3])
def test_the_greedy_path_by_hand(toy: Toy, weight: float, k: int) -> None:
    """Three steps; ties do not occur."""
    answer: tuple[int, ...] = ()
    while len(answer) < 3 and EOS not in answer:
        likeliest = toy.base[toy.prefixes.index(answer)].topk(k).indices.tolist()
        scores = scores_at(toy, answer, weight)
        answer = (*answer, max(likeliest, key=scores.__getitem__))
    done = Args(toy.lm, toy.reward, k=k, weight=weight).generate([toy.prompt], toy.sampling)
    assert done.tokens == [list(answer)]


def test_it_is_myopic(toy: Toy) -> None:
    """2 looks best at first (0.9), and its best end (2.5) is half of what 1, 1, 2 gets."""
    done = Args(toy.lm, toy.reward, k=0, weight=100.0).generate([toy.prompt], toy.sampling)
    assert done.tokens == [[2, EOS]] and TABLE[2,] == 0.9 < max(TABLE.values())


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("k", [2, 0])
def test_the_stochastic_form_is_a_softmax_over_the_candidates(toy: Toy, k: int, temperature: float) -> None:
    """softmax(score / temperature) at every prefix, to float32."""
    weight = 0.8
    wanted = torch.tensor([scores_at(toy, prefix, weight) for prefix in toy.prefixes], dtype=torch.float64)
    if k:
        kept = torch.zeros_like(wanted).scatter(-1, toy.base.topk(k, -1).indices, 1.0)
        wanted = wanted.masked_fill(kept == 0, -torch.inf)
    found = drawn_from(toy, Args(toy.lm, toy.reward, k=k, weight=weight, select="sample"), temperature)
    assert torch.allclose(found.exp(), (wanted / temperature).softmax(-1), atol=1e-5)


# limits


def test_weight_0_is_the_policy_and_one_candidate_is_greedy(lm: LM) -> None:
    def never(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
        raise RuntimeError("called")

    sampling = Sampling(max_new_tokens=8, samples=2, seed=5)
    plain, greedy = lm.generate(PROMPTS, sampling), lm.generate(PROMPTS, sampling.but(temperature=0))
    done = Args(lm, never, weight=0.0, select="sample").generate(PROMPTS, sampling)
    assert (done.tokens, done.logprobs, done.cost.tokens) == (plain.tokens, plain.logprobs, plain.cost.tokens)
    assert done.cost.reward_calls == 0
    assert Args(lm, never, weight=0.0).generate(PROMPTS, sampling).tokens == greedy.tokens
    for select in ("greedy", "sample"):
        assert Args(lm, letters, k=1, weight=5.0, select=select).generate(PROMPTS, sampling).tokens == greedy.tokens


def test_without_a_limit_on_the_weight_the_reward_decides(lm: LM) -> None:
    """The best of the text with each of 6 candidates, at every step (to 0.002: 20 nats of log-probability)."""
    done = Args(lm, letters, k=6, weight=1e4).generate(PROMPTS, Sampling(max_new_tokens=6))
    for logprobs, answer in zip(lm.token_logprobs(PROMPTS, done.tokens), done.tokens, strict=True):
        for step, token in enumerate(answer):
            candidates = logprobs[step].topk(6).indices.tolist()
            values = letters([], [lm.decode([*answer[:step], one]) for one in candidates])
            assert values[candidates.index(token)] > max(values) - 2e-3


# the path it takes


class Barred(Guided):
    """Draws no special token but the one that ends."""

    def guide(self, logits: torch.Tensor) -> torch.Tensor:
        barred = torch.tensor([token in (PAD, BOS, UNK) for token in range(logits.shape[-1])])
        return logits.masked_fill(barred, -torch.inf)


class Words:
    """A model that writes no special token but the one that ends: what it writes is what its text is tokenized to."""

    name = "words"

    def __init__(self, lm: LM):
        self.lm = lm

    def open(self, prompts: Sequence[Any], sampling: Sampling, meter: Cost) -> Guided:
        return Barred(self.lm.open(prompts, sampling, meter), prompts)

    def generate(self, prompts: Sequence[Any], sampling: Sampling = PLAIN) -> Completions:
        return answer_steps(self, prompts, sampling)


@pytest.mark.parametrize("select", ["greedy", "sample"])
def test_cached_and_uncached_choose_the_same_tokens(lm: LM, select: Any, tmp_path: Path) -> None:
    """The reward model's cache forked for every candidate, against the whole text of every candidate."""
    reward, sampling = classifier(tmp_path, append_eos=True), Sampling(max_new_tokens=16, samples=2, seed=1)
    with pytest.warns(UnfinishedText):
        cached, text = (
            Args(Words(lm), reward, k=5, weight=3.0, select=select, cache=cache).generate(PROMPTS, sampling)
            for cache in (True, False)
        )
    assert cached.tokens == text.tokens
    plain = Words(lm).generate(PROMPTS, sampling.but(temperature=0.0 if select == "greedy" else 1.0))
    assert cached.tokens != plain.tokens
    for ours, theirs in zip(cached.kl, text.kl, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    assert cached.cost.reward_calls == text.cost.reward_calls
    assert cached.cost.tokens[reward.name] < 0.3 * text.cost.tokens[reward.name]


def test_a_batch_is_its_rows_alone_and_the_end_token_ends(lm: LM) -> None:
    policy, sampling = Args(lm, letters, k=8, weight=2.0), Sampling(max_new_tokens=12)
    together = policy.generate(PROMPTS, sampling)
    assert together.tokens == [policy.generate([prompt], sampling).tokens[0] for prompt in PROMPTS]
    # a reward that falls with every word: the end token, which adds none, as soon as it is a candidate
    short = Args(lm, lambda prompts, texts: [-float(len(text)) for text in texts], k=0, weight=100.0)
    done = short.generate(PROMPTS, sampling)
    assert done.texts == [""] * 3 and done.finish_reasons == ["stop"] * 3
    # it is no candidate of the two likeliest: the answers run into the limit, which is no error
    done = Args(lm, lambda prompts, texts: [-float(len(text)) for text in texts], k=2).generate(PROMPTS, sampling)
    ended = [bool(set(row) & lm.eos_ids) for row in done.tokens]
    assert [reason == "stop" for reason in done.finish_reasons] == ended
    assert not all(ended) and all(len(row) == 12 for row, end in zip(done.tokens, ended, strict=True) if not end)


def test_it_nests_on_a_steered_policy(toy: Toy) -> None:
    push = 0.8 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    steered = Steered(toy.lm, FunctionControl(lambda hidden: hidden + push))
    rewards = torch.tensor([scores_at(toy, prefix, 1.0) for prefix in toy.prefixes], dtype=torch.float64) - toy.base
    wanted = (toy.logprobs(toy.states + push) + rewards).log_softmax(-1)
    found = drawn_from(toy, Args(steered, toy.reward, k=0, select="sample"))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_what_it_costs(lm: LM) -> None:
    """The model's tokens are the plain answer's; k reward calls a token."""
    sampling = Sampling(max_new_tokens=7, samples=2, seed=3)
    done = Args(lm, letters, k=4, select="sample").generate(PROMPTS, sampling)
    prompt = sum(map(len, lm.encode(PROMPTS)))
    assert done.cost.tokens == {lm.name: prompt + sum(len(row) - 1 for row in done.tokens)}
    assert done.cost.reward_calls == 4 * sum(map(len, done.tokens))


# what is refused, and warned about


def test_unjudged_candidates_are_never_preferred(toy: Toy) -> None:
    """Whatever has a 1 in it cannot be judged: it counts as the worst of the others."""

    def shy(prompts: Sequence[Any], texts: Sequence[str]) -> list[float | None]:
        return [None if "1" in text else TABLE[tuple(map(int, text.split()))] for text in texts]

    done = Args(toy.lm, Function(shy, name="shy"), k=0, weight=100.0).generate([toy.prompt], toy.sampling)
    assert done.tokens == [[2, EOS]]


def test_a_reward_for_whole_answers_is_warned_about(lm: LM) -> None:
    with pytest.warns(UnfinishedText, match="args asks pocket/judge about unfinished answers"):
        Args(lm, "pocket/judge")


def test_a_kl_cap_is_never_exceeded(lm: LM) -> None:
    done = Args(lm, letters, k=0, weight=30.0, select="sample", kl_cap=0.05).generate(
        PROMPTS, Sampling(max_new_tokens=6, samples=3)
    )
    reported = [nats for row in done.kl for nats in row]
    assert max(reported) <= 0.05 and min(reported) > 0.04


def test_options_that_make_no_sense_are_refused(lm: LM) -> None:
    for options, said in [
        ({"k": -1}, "k must be 1 or more"),
        ({"weight": math.nan}, "weight must be a finite number"),
        ({"weight": -0.5}, "weight must be a finite number"),
        ({"kl_cap": 0.1}, "kl_cap needs select=sample"),
        ({"kl_cap": -0.1, "select": "sample"}, "kl_cap must be 0 nats"),
    ]:
        with pytest.raises(UsageError, match=said):
            Args(lm, letters, **options)
    assert (
        Args(lm, letters, k=1000).generate(["ba"], Sampling(max_new_tokens=2)).tokens
    )  # k over 59 tokens: all of them
    assert Args(lm, letters).config == ArgsConfig()


def test_what_cannot_be_stepped_is_refused() -> None:
    class Remote:
        name = "remote"

        def generate(self, prompts: Any, sampling: Any = None) -> Any: ...

    with pytest.raises(UsageError, match="args chooses token by token and remote gives whole answers only"):
        Args(Remote(), letters)
