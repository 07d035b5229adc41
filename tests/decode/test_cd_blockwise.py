"""Blockwise controlled decoding: its whole distribution by enumeration, the two policies it lies between, its bookkeeping."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from oracles.exact_value import Lookup, exact, numbers_of
from oracles.toy import EOS, Toy
from tiny import tiny_lm
from trimtab import LM, Sampling
from trimtab.decode.best_of_n import BestOfN
from trimtab.decode.cd_blockwise import CdBlockwise
from trimtab.decode.cd_q import CdQ
from trimtab.errors import UsageError
from trimtab.generation import sample
from trimtab.measure.kl import best_of_n_bound
from trimtab.rewards import Function
from trimtab.rewards.prefix import UnfinishedText
from trimtab.sampling import uniforms

PROMPTS = ["ba da fa la", "ma na", "pe"]


def letters(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
    """Different words, less a little a word: nearly no ties."""
    return [len(set(text.split())) - 0.1 * len(text.split()) for text in texts]


@pytest.fixture(scope="module")
def toy() -> Toy:
    """15 prefixes, 31 answers; the reward has many ties."""
    return Toy(lambda tokens: float(tokens.count(1) - tokens.count(2)), vocab=3, horizon=4)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


def block_choice(toy: Toy, values: Lookup, prefix: int, block: int, k: int, weight: float | None) -> dict[Any, float]:
    """Probability of each block of at most `block` tokens after a prefix, under the choice of one of k.

    The best: its level of value has F^k - F_-^k, shared as p shares it. Soft: a sum over all multisets of k draws.
    """
    chances: dict[tuple[int, ...], float] = {}
    worth: dict[tuple[int, ...], float] = {}

    def extend(row: int, tokens: tuple[int, ...], chance: float) -> None:
        for token in range(toy.vocab):
            now, p = (*tokens, token), chance * float(toy.base[row, token].exp())
            child = int(toy.child[row, token])
            if child < 0:
                chances[now], worth[now] = p, float(toy.end_reward[row, token])
            elif len(now) == block:
                chances[now], worth[now] = p, float(values.v[child])
            else:
                extend(child, now, p)

    extend(prefix, (), 1.0)
    if weight is None:
        out = {}
        for one, value in worth.items():
            level = sum(p for other, p in chances.items() if math.isclose(worth[other], value, abs_tol=1e-9))
            below = sum(p for other, p in chances.items() if worth[other] < value - 1e-9)
            out[one] = chances[one] / level * ((below + level) ** k - below**k)
        return out
    draws: dict[tuple[Any, ...], float] = {(): 1.0}
    for _ in range(k):
        grown: dict[tuple[Any, ...], float] = {}
        for group, p in draws.items():
            for one, chance in chances.items():
                key = tuple(sorted((*group, one)))
                grown[key] = grown.get(key, 0.0) + p * chance
        draws = grown
    out = dict.fromkeys(chances, 0.0)
    for group, p in draws.items():
        shares = [math.exp(weight * worth[one]) for one in group]
        for one, share in zip(group, shares, strict=True):
            out[one] += p * share / sum(shares)
    return out


def answers_of(
    toy: Toy, values: Lookup, block: int, k: int, weight: float | None = None
) -> tuple[torch.Tensor, float, float]:
    """Probability of every answer [A], the mean number of blocks, and the KL of whole answers as a sum over blocks."""
    number = {tuple(answer): i for i, answer in enumerate(toy.answers)}
    out, blocks = torch.zeros(len(number), dtype=torch.float64), 0.0
    waiting: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while waiting:
        tokens, chance = waiting.pop()
        blocks += chance
        for more, p in block_choice(toy, values, toy.prefixes.index(tokens), block, k, weight).items():
            now = (*tokens, *more)
            if now in number:
                out[number[now]] += chance * p
            else:
                waiting.append((now, chance * p))
    base = toy.answer_probabilities()
    return out, blocks, float(torch.where(out > 0, out * (out / base).log(), 0).sum())


def p_values(toy: Toy, policy: Any, *hypotheses: torch.Tensor, count: int = 2000) -> list[float]:
    """Chi-squared of drawn answers under each distribution; answers expected fewer than 5 times count together."""
    done = policy.generate([toy.prompt], toy.sampling.but(samples=count, seed=1))
    counts = torch.bincount(numbers_of(toy, done.tokens), minlength=len(toy.answers)).double()
    out = []
    for probabilities in hypotheses:
        expected = probabilities * count
        rare = expected < 5
        rare[expected.masked_fill(rare, torch.inf).argmin()] = True
        observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
        wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
        out.append(float(chisquare(observed.numpy(), (wanted / wanted.sum() * count).numpy()).pvalue))
    return out


# what it draws


@pytest.mark.parametrize(("block", "k"), [(1, 2), (2, 3), (3, 4), (4, 4)])
def test_the_whole_distribution_is_that_of_enumeration(toy: Toy, block: int, k: int) -> None:
    """block = 4 is the whole answer: F^k - F_-^k, best-of-k."""
    wanted, blocks, kl = answers_of(toy, exact(toy), block, k)
    assert float(wanted.sum()) == pytest.approx(1, abs=1e-9)
    policy = CdBlockwise(toy.lm, toy.reward, exact(toy), k=k, block=block)
    right, base = p_values(toy, policy, wanted, toy.answer_probabilities())
    assert right > 1e-2 and base < 1e-12
    # the KL never exceeds the bound; nor does what telemetry says of it
    assert 0 < kl <= blocks * best_of_n_bound(k)
    done = policy.generate([toy.prompt], toy.sampling.but(samples=500, seed=7))
    bounds = torch.tensor([row["kl_bound"] for row in done.telemetry])
    counted = torch.tensor([float(row["blocks"]) for row in done.telemetry])
    assert torch.allclose(bounds, counted * best_of_n_bound(k))
    assert float(counted.mean()) == pytest.approx(blocks, abs=4 * float(counted.std()) / 500**0.5 + 1e-9)


@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_the_soft_choice_is_that_of_enumeration(toy: Toy, weight: float) -> None:
    """weight = 0 chooses blindly: the base itself."""
    wanted, blocks, kl = answers_of(toy, exact(toy), 2, 3, weight)
    policy = CdBlockwise(toy.lm, toy.reward, exact(toy), k=3, block=2, weight=weight)
    right, base = p_values(toy, policy, wanted, toy.answer_probabilities())
    assert right > 1e-2 and kl <= blocks * best_of_n_bound(3)
    assert torch.allclose(wanted, toy.answer_probabilities(), atol=1e-9) if weight == 0 else base < 1e-12


@pytest.mark.parametrize("k", [2, 4, 16])
def test_the_kl_of_best_of_k_is_below_its_bound(toy: Toy, k: int) -> None:
    *_, kl = answers_of(toy, exact(toy), 4, k)
    assert 0 < kl < best_of_n_bound(k)


def test_one_block_is_best_of_k_to_the_token(lm: LM) -> None:
    """The same draws, the same rewards, the same ties."""
    sampling = Sampling(max_new_tokens=8, samples=3, seed=3)
    done = CdBlockwise(lm, letters, value="reward", k=5, block=8).generate(PROMPTS, sampling)
    best = BestOfN(lm, letters, 5).generate(PROMPTS, sampling)
    assert (done.tokens, done.texts, done.finish_reasons) == (best.tokens, best.texts, best.finish_reasons)
    for ours, theirs in zip(done.telemetry, best.telemetry, strict=True):
        assert (ours["values"], ours["chosen"]) == ([theirs["rewards"]], [theirs["chosen"]])
    for ours, theirs in zip(done.logprobs, best.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert done.cost.tokens == best.cost.tokens and done.cost.reward_calls == best.cost.reward_calls


@pytest.mark.parametrize("block", [1, 3, 8])
def test_one_candidate_is_the_policy_and_equal_values_are_its_first_draws(lm: LM, block: int) -> None:
    """Whatever the block: the earliest of equals is kept, whose random numbers are those of one draw in five."""
    sampling = Sampling(max_new_tokens=8, samples=2, seed=3)
    plain = lm.generate(PROMPTS, sampling)

    def never(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
        raise RuntimeError("called")

    alone = CdBlockwise(lm, never, value="reward", k=1, block=block)
    done = alone.generate(PROMPTS, sampling)
    assert (done.tokens, done.logprobs) == (plain.tokens, plain.logprobs) and alone.kl_bound == 0
    equal = CdBlockwise(lm, _constant(0.0), value="reward", k=5, block=block).generate(PROMPTS, sampling)
    first = lm.generate(PROMPTS, sampling.but(samples=10)).select(list(range(0, 30, 5)))
    assert (equal.tokens, equal.finish_reasons) == (first.tokens, first.finish_reasons)
    for ours, theirs in zip(equal.logprobs, first.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)  # a fork and a batch of other rows: float32


def test_it_nests_over_a_token_wise_policy(toy: Toy) -> None:
    """One block over CD: best-of-k of CD's answers."""
    inner = CdQ(toy.lm, exact(toy), weight=0.8)
    policy = CdBlockwise(inner, toy.reward, exact(toy), k=3, block=4)
    p = toy.answer_probabilities(toy.controlled_decoding(0.8))
    rewards = torch.tensor([toy.score(tuple(token for token in answer if token)) for answer in toy.answers])
    wanted = torch.zeros_like(p)
    for value in rewards.unique():
        level, below = rewards == value, p[rewards < value].sum()
        wanted[level] = p[level] / p[level].sum() * ((below + p[level].sum()) ** 3 - below**3)
    assert p_values(toy, policy, wanted)[0] > 1e-2
    two = CdBlockwise(inner, toy.reward, exact(toy), k=3, block=2).generate([toy.prompt], toy.sampling)
    assert two.kl is None  # the choice among blocks has a bound only


def test_finished_texts_get_their_reward_and_others_v(toy: Toy) -> None:
    values = exact(toy)
    policy = CdBlockwise(toy.lm, toy.reward, values, k=4, block=2)
    done = policy.generate([toy.prompt], toy.sampling.but(samples=40, seed=5))
    wanted = {round(float(v), 6) for v in values.v} | {float(value) for value in range(-4, 5)}
    seen = {round(value, 6) for row in done.telemetry for block in row["values"] for value in block}
    assert seen <= wanted and any(value not in range(-4, 5) for value in seen)
    for row, tokens in zip(done.telemetry, done.tokens, strict=True):
        last = row["values"][-1][row["chosen"][-1]]
        assert last == toy.score(tuple(token for token in tokens if token != EOS))
        assert all(values[at] == max(values) for values, at in zip(row["values"], row["chosen"], strict=True))


# the path it takes


def test_the_cached_path_is_the_one_from_scratch(lm: LM) -> None:
    """By hand: every block drawn by a fresh call on prompt and answer so far, with the same random numbers."""
    k, block, steps = 3, 3, 8
    sampling = Sampling(max_new_tokens=steps, seed=2)
    done = CdBlockwise(lm, letters, value="reward", k=k, block=block).generate(PROMPTS, sampling)
    numbers = uniforms(len(PROMPTS) * k, steps, 2).view(len(PROMPTS), k, steps)
    for row, ids in enumerate(lm.encode(PROMPTS)):
        answer: list[int] = []
        while len(answer) < steps and not set(answer) & lm.eos_ids:
            length = min(block, steps - len(answer))
            part = numbers[row, :, len(answer) : len(answer) + length]
            drawn = sample(lm.session([[*ids, *answer]] * k), sampling.but(max_new_tokens=length), part)
            scores = letters([], [lm.decode([*answer, *tokens]) for tokens in drawn.tokens])
            answer += drawn.tokens[scores.index(max(scores))]
        assert done.tokens[row] == answer


@pytest.mark.parametrize("value", ["reward", "q"])
def test_a_batch_is_its_rows_alone(lm: LM, value: str) -> None:
    """Answers do not depend on which rows are written together; chunks smaller than a prompt's samples too."""
    values = None if value == "reward" else Length()
    sampling = Sampling(max_new_tokens=9, samples=2, seed=4)
    wanted = CdBlockwise(lm, letters, values, value=value, k=3, block=4).generate(PROMPTS, sampling)
    small = tiny_lm(batch_rows=4)
    done = CdBlockwise(small, letters, values, value=value, k=3, block=4).generate(PROMPTS, sampling)
    assert (done.tokens, done.prompts) == (wanted.tokens, wanted.prompts)
    first = CdBlockwise(lm, letters, values, value=value, k=3, block=4).generate(PROMPTS[:1], sampling)
    assert first.tokens == wanted.tokens[:2]


def test_a_stop_string_may_lie_across_two_blocks(lm: LM) -> None:
    sampling = Sampling(max_new_tokens=8, seed=5)
    words = lm.generate(PROMPTS[:1], sampling).texts[0].split()
    assert len(words) > 3
    stop = f"{words[1]} {words[2]}"  # with blocks of 2 its words fall into two
    policy = CdBlockwise(lm, _constant(0.0), value="reward", k=2, block=2)
    done = policy.generate(PROMPTS[:1], sampling.but(stop=(stop,)))
    assert len(done.tokens[0]) == len(done.logprobs[0]) == 3
    assert done.texts[0].split() == words[:1] and done.finish_reasons == ["stop"]


def test_answers_end_at_the_context(lm: LM) -> None:
    """A context of 64: as many tokens as the plain answer has, and none for a prompt that fills it."""
    sampling = Sampling(max_new_tokens=30, seed=6)
    for words in (50, 61, 63, 64):
        prompt = " ".join(["ba"] * words)
        done = CdBlockwise(lm, _constant(0.0), value="reward", k=2, block=4).generate([prompt], sampling)
        plain = lm.generate([prompt], sampling)
        assert (done.tokens, done.finish_reasons) == (plain.tokens, plain.finish_reasons)


def test_what_it_costs(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt once, K times the tokens of each block (the last one of a finished text excepted), no chosen one twice."""
    drawn: list[Any] = []
    blocks_of = CdBlockwise._blocks

    def recorded(*arguments: Any) -> Any:
        found = blocks_of(*arguments)
        drawn.extend(found[0])
        return found

    monkeypatch.setattr(CdBlockwise, "_blocks", recorded)
    sampling = Sampling(max_new_tokens=8, samples=2, seed=3)
    done = CdBlockwise(lm, letters, Length(), value="q", k=3, block=3).generate(PROMPTS, sampling)
    prompt = sum(map(len, lm.encode(PROMPTS)))
    finished = sum(block.over for block in drawn)
    assert done.cost.tokens == {lm.name: prompt + sum(len(block.tokens) for block in drawn) - finished}
    assert done.cost.reward_calls == finished > 6 * 3 - 1
    assert done.cost.tokens[lm.name] > 2 * sum(map(len, done.tokens)) and done.cost.seconds > 0
    empty = CdBlockwise(lm, letters, value="reward").generate(PROMPTS, sampling.but(max_new_tokens=0))
    assert empty.tokens == [[]] * 6 and empty.cost.tokens_forwarded == 0


# what could not be judged, and bad input


def test_what_could_not_be_judged_is_kept_only_alone(lm: LM) -> None:
    sampling = Sampling(max_new_tokens=6, seed=3)
    drawn = lm.generate(PROMPTS, sampling.but(samples=3))

    def shy(prompts: Sequence[Any], texts: Sequence[str]) -> list[float | None]:
        return [-1.0 if text in {drawn.texts[1], drawn.texts[5]} else None for text in texts]

    for weight in (None, 2.0):
        done = CdBlockwise(lm, shy, value="reward", k=3, block=6, weight=weight).generate(PROMPTS, sampling)
        assert [done.tokens[0], done.tokens[1]] == [drawn.tokens[1], drawn.tokens[5]]
        assert done.telemetry[0]["values"] == [[None, -1.0, None]]
        assert done.tokens[2] in drawn.tokens[6:]


def test_a_reward_of_unfinished_text_is_warned_about(lm: LM) -> None:
    whole = Function(letters, name="whole")
    whole.on_prefixes = False
    policy = CdBlockwise(lm, whole, value="reward", k=2, block=4)
    with pytest.warns(UnfinishedText, match="cd-blockwise asks whole about unfinished answers"):
        policy.generate(PROMPTS, Sampling(max_new_tokens=8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.generate(PROMPTS, Sampling(max_new_tokens=4))


def test_options_that_make_no_sense_are_refused(lm: LM) -> None:
    for options, said in [
        ({"k": 0}, "k and block must be 1 or more"),
        ({"block": 0}, "k and block must be 1 or more"),
        ({"weight": -1.0}, "weight must be a finite number"),
        ({"weight": math.inf}, "weight must be a finite number"),
        ({"value": "fudge"}, "value=fudge came without one"),
        ({"value": "guess"}, "value='guess' is not"),
    ]:
        with pytest.raises(UsageError, match=said):
            CdBlockwise(lm, letters, **{"value": "reward", **options})
    with pytest.raises(UsageError, match="value=reward came with one"):
        CdBlockwise(lm, letters, Length(), value="reward")


class Length:
    """A value that counts tokens."""

    def check(self, lm: Any) -> None: ...

    def following(self, session: Any, tokens: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("blocks are valued at their end")

    def reached(self, session: Any) -> torch.Tensor:
        return torch.tensor([float(sum(row) % 17) for row in session.tokens])


def _constant(value: float) -> Callable[..., list[float]]:
    return lambda prompts, texts: [value] * len(texts)
