"""Token-wise controlled decoding: its distribution against enumeration, the optimum of whole answers, and its limits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from oracles.exact_value import Lookup, drawn_from, exact, numbers_of, soft, total_variation
from oracles.toy import Toy, context_reward
from tiny import tiny_lm
from trimtab import LM, Sampling, Steered
from trimtab.control import FunctionControl
from trimtab.decode.args import Args
from trimtab.decode.cd import CdSession
from trimtab.decode.cd_fudge import CdFudge, CdFudgeConfig
from trimtab.decode.cd_q import CdQ
from trimtab.decode.prefix_value import AfterToken, BeforeToken
from trimtab.errors import UsageError
from trimtab.steer.value import ValueNetwork

PROMPTS = ["ba da fa la", "ma na", "pe"]
LAMBDAS = (0.3, 1.0, 3.0)


@pytest.fixture(scope="module")
def toy() -> Toy:
    """3 tokens of which one ends an answer, at most 4 tokens: 15 prefixes, 31 answers. Reward of a token and its place."""
    return Toy(lambda tokens: tokens.count(1) - 0.6 * len(tokens) * (tokens[-1:] == (2,)), vocab=3, horizon=4)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


def random_values(lm: LM, tap: str, seed: int = 0) -> Any:
    """A value with random weights: what it says is nonsense, and different for every state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if tap == "before":
            value: Any = BeforeToken(lm.hidden_size, 16)
            torch.nn.init.normal_(value.push.weight, std=0.3)
        else:
            value = AfterToken(ValueNetwork(lm.hidden_size, 16), ValueNetwork(lm.hidden_size, 16))
    return value.eval().requires_grad_(False)


# what it draws from


def test_31_answers(toy: Toy) -> None:
    assert (len(toy.prefixes), len(toy.answers)) == (15, 31)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_every_state_is_p_exp_v(toy: Toy, lam: float) -> None:
    """In float64 to 1e-10; through the model's float32 logits to 1e-5."""
    values = exact(toy)

    class Prefixes:
        """A session whose rows are the toy's prefixes."""

        guided, logits = False, toy.base
        prompts = torch.zeros(len(toy.prefixes), dtype=torch.long)
        tokens = [list(prefix) for prefix in toy.prefixes]

    session = CdSession(values, Prefixes(), [""] * 15, 0, lam)
    wanted = (toy.base.exp() * (lam * values.q).exp()).log()
    wanted -= wanted.logsumexp(-1, keepdim=True)
    assert torch.allclose(session.logits.log_softmax(-1), wanted, atol=1e-10)
    for policy in (CdFudge(toy.lm, values, weight=lam, k=3), CdQ(toy.lm, values, weight=lam)):
        assert torch.allclose(drawn_from(toy, policy), wanted, atol=1e-5)
        assert torch.allclose(drawn_from(toy, policy), toy.controlled_decoding(lam), atol=1e-5)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_it_maximises_j_at_every_state(toy: Toy, lam: float) -> None:
    """J(pi) = lam (E_pi V - V) - KL(pi || p), against 1,000 random policies and 1,000 small changes of it."""
    q, v = toy.values()
    generator = torch.Generator().manual_seed(0)

    def objective(pi: torch.Tensor) -> torch.Tensor:
        kl = torch.where(pi > 0, pi * (pi.log() - toy.base), 0).sum(-1)
        return lam * ((pi * q).sum(-1) - v) - kl

    best = toy.controlled_decoding(lam)
    others = torch.randn(1000, 15, 3, dtype=torch.float64, generator=generator) * 2
    nearby = best + 0.05 * torch.randn(1000, 15, 3, dtype=torch.float64, generator=generator)
    assert (objective(others.softmax(-1)) < objective(best.exp())).all()
    assert (objective(nearby.softmax(-1)) <= objective(best.exp()) + 1e-12).all()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_p_is_the_policy_at_the_temperature_of_the_draw(toy: Toy, temperature: float) -> None:
    policy = CdQ(toy.lm, exact(toy), weight=1.5)
    p = (toy.base / temperature).log_softmax(-1)
    wanted = (p + 1.5 * toy.values()[0]).log_softmax(-1)
    assert torch.allclose(drawn_from(toy, policy, temperature), wanted, atol=1e-5)


def test_the_answers_are_drawn_from_it(toy: Toy) -> None:
    """4,000 answers against the 31 exact probabilities, and the exact KL of whole answers."""
    policy, lam = CdQ(toy.lm, exact(toy), weight=2.0), 2.0
    done = policy.generate([toy.prompt], toy.sampling.but(samples=4000, seed=3))
    counts = torch.bincount(numbers_of(toy, done.tokens), minlength=31).double()
    for logprobs, lowest, highest in ((toy.controlled_decoding(lam), 1e-3, 1.0), (toy.base, -1.0, 1e-12)):
        expected = toy.answer_probabilities(logprobs) * 4000
        often = expected >= 5  # the others are counted together, with the rarest of these
        often[expected.masked_fill(~often, torch.inf).argmin()] = False
        observed = torch.cat([counts[often], counts[~often].sum()[None]])
        wanted = torch.cat([expected[often], expected[~often].sum()[None]])
        assert lowest < chisquare(observed.numpy(), (wanted * 4000 / wanted.sum()).numpy()).pvalue <= highest
    found = np.array([sum(row) for row in done.kl])
    outcome = toy.evaluate(toy.controlled_decoding(lam))
    assert found.mean() == pytest.approx(outcome.kl, abs=4 * found.std() / 4000**0.5)


def test_it_nests_on_a_steered_policy(toy: Toy) -> None:
    """p is then the steered distribution, and V still that of the bare model."""
    push = 0.8 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    steered = Steered(toy.lm, FunctionControl(lambda hidden: hidden + push))
    wanted = (toy.logprobs(toy.states + push) + toy.values()[0]).log_softmax(-1)
    assert torch.allclose(drawn_from(toy, CdQ(steered, exact(toy))), wanted, atol=1e-5)
    twice = CdQ(CdQ(steered, exact(toy), weight=0.4), exact(toy), weight=0.6)
    assert torch.allclose(drawn_from(toy, twice), wanted, atol=1e-5)


# against the optimum of whole answers


@pytest.mark.parametrize("beta", [0.3, 0.7, 2.0])
def test_the_soft_value_gives_the_optimum_of_whole_answers_and_v_does_not(toy: Toy, beta: float) -> None:
    p = toy.answer_probabilities()
    rewards = torch.tensor([toy.score(tuple(token for token in answer if token)) for answer in toy.answers])
    optimum = p * (rewards.double() / beta).exp()
    optimum /= optimum.sum()
    assert torch.allclose(toy.answer_probabilities(toy.soft_optimal(1 / beta)), optimum, atol=1e-12)
    drawn = drawn_from(toy, CdQ(toy.lm, soft(toy, 1 / beta), weight=1 / beta))
    assert total_variation(toy.answer_probabilities(drawn), optimum) < 1e-5  # float32 logits
    with_v = toy.answer_probabilities(drawn_from(toy, CdQ(toy.lm, exact(toy), weight=1 / beta)))
    assert total_variation(with_v, optimum) > 0.02


def test_the_optimum_dominates_at_equal_kl() -> None:
    """Along a sweep of lambda: never more reward than the exact frontier has at that KL, and less where V misleads."""
    toy = Toy(context_reward, vocab=5, horizon=4)
    shares = []
    for lam in (0.1, 1.0, 3.0, 10.0):
        outcome = toy.evaluate(toy.controlled_decoding(lam))
        assert outcome.reward <= toy.most_reward(outcome.kl) + 1e-9
        shares.append(toy.share_of_optimum(outcome))
    assert shares[0] > 1 - 1e-3 > min(shares)


# limits


@pytest.mark.parametrize("cls", [CdFudge, CdQ])
@pytest.mark.parametrize("tap", ["after", "before"])
def test_weight_0_is_the_policy_and_one_candidate_is_greedy(lm: LM, cls: Any, tap: str) -> None:
    values, sampling = random_values(lm, tap), Sampling(max_new_tokens=8, samples=2, seed=5)
    plain, greedy = lm.generate(PROMPTS, sampling), lm.generate(PROMPTS, sampling.but(temperature=0))
    done = cls(lm, values, weight=0.0, k=4).generate(PROMPTS, sampling)
    assert (done.tokens, done.logprobs, done.cost.tokens) == (plain.tokens, plain.logprobs, plain.cost.tokens)
    assert cls(lm, values, weight=3.0, k=1).generate(PROMPTS, sampling).tokens == greedy.tokens
    assert cls(lm, values, weight=0.0, select="greedy").generate(PROMPTS, sampling).tokens == greedy.tokens


def test_without_a_limit_on_the_weight_the_best_value_wins(toy: Toy) -> None:
    """Over the support: the candidates of k = 2, and all three tokens."""
    q = toy.values()[0]
    best = drawn_from(toy, CdQ(toy.lm, exact(toy), weight=1e6)).argmax(-1)
    assert torch.equal(best, q.argmax(-1))
    two = toy.base.topk(2, -1).indices
    best = drawn_from(toy, CdFudge(toy.lm, exact(toy), weight=1e6, k=2, select="greedy"))
    assert torch.equal(best.argmax(-1), two.gather(-1, q.gather(-1, two).argmax(-1, keepdim=True))[:, 0])
    assert best.exp().max(-1).values.tolist() == [1.0] * 15


def test_args_is_myopic_where_the_reward_comes_late() -> None:
    """1 pays at once, to begin with 2 only at the end: ARGS takes 1 at every step, greedy CD with the exact V the most."""

    def late(tokens: tuple[int, ...]) -> float:
        return 3.0 if tokens[:1] == (2,) and len(tokens) == 3 else 0.5 * tokens.count(1)

    toy = Toy(late, vocab=3, horizon=3)
    taken = Args(toy.lm, toy.reward, k=0, weight=50.0).generate([toy.prompt], toy.sampling)
    assert taken.tokens == [[1, 1, 1]]
    best = drawn_from(toy, CdQ(toy.lm, exact(toy), weight=50.0, select="greedy"))
    optimal = toy.backup(lambda level, q: q.max(-1).values)[1][0]
    assert toy.evaluate(best).reward == float(optimal) == 3.0


def test_a_kl_cap_is_never_exceeded(toy: Toy) -> None:
    done = CdQ(toy.lm, exact(toy), weight=50.0, kl_cap=0.1).generate([toy.prompt], toy.sampling.but(samples=100))
    reported = [nats for row in done.kl for nats in row]
    assert max(reported) <= 0.1 and sum(reported) > 0.5 * 0.1 * len(reported)


# the path it takes


@pytest.mark.parametrize("tap", ["after", "before"])
def test_cached_is_from_scratch(lm: LM, tap: str) -> None:
    """V of every candidate, from states forwarded anew without a cache: greedy answers by hand are its answers."""
    values = random_values(lm, tap)
    done = CdFudge(lm, values, weight=4.0, k=6, select="greedy").generate(PROMPTS, Sampling(max_new_tokens=7))

    def state(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return lm.backbone(torch.tensor([ids])).last_hidden_state[0, -1]

    def value_of(ids: list[int], token: int) -> float:
        if tap == "before":
            found = values(state(ids), lm.unembedding[token])
        elif token in lm.eos_ids:
            found = values.end(state(ids))
        else:
            found = values.value(state([*ids, token]))
        return float(found)

    plain = lm.generate(PROMPTS, Sampling(max_new_tokens=7, temperature=0))
    assert done.tokens != plain.tokens
    for prompt, answer in zip(lm.encode(PROMPTS), done.tokens, strict=True):
        ids = list(prompt)
        for token in answer:
            logprobs = lm.head(state(ids)).log_softmax(-1)
            base, candidates = logprobs.topk(6)
            scores = [float(b) + 4.0 * value_of(ids, z) for b, z in zip(base, candidates.tolist(), strict=True)]
            assert candidates[int(np.argmax(scores))] == token
            ids.append(token)
        assert answer[-1] in lm.eos_ids or len(answer) == 7


@pytest.mark.parametrize("tap", ["after", "before"])
def test_a_batch_is_its_rows_alone_and_the_end_token_ends(lm: LM, tap: str) -> None:
    policy = CdFudge(lm, random_values(lm, tap), weight=2.0, k=8, select="greedy")
    sampling = Sampling(max_new_tokens=12)
    together = policy.generate(PROMPTS, sampling)
    assert together.tokens == [policy.generate([prompt], sampling).tokens[0] for prompt in PROMPTS]
    for row, reason in zip(together.tokens, together.finish_reasons, strict=True):
        assert (row[-1] in lm.eos_ids) == (reason == "stop") and not set(row[:-1]) & lm.eos_ids
    end = next(iter(lm.eos_ids))

    class Ending(Lookup):
        def __init__(self) -> None:
            """Likes the end token and nothing else."""

        def following(self, session: Any, tokens: torch.Tensor) -> torch.Tensor:
            return 100.0 * (tokens == end)

    done = CdFudge(lm, Ending(), k=0).generate(PROMPTS, sampling)
    assert done.tokens == [[end]] * 3 and done.finish_reasons == ["stop"] * 3
    never = Ending()
    never.following = lambda session, tokens: -100.0 * (tokens == end)  # type: ignore[method-assign]
    done = CdFudge(lm, never, k=0).generate(PROMPTS, sampling)
    assert done.finish_reasons == ["length"] * 3 and all(len(row) == 12 for row in done.tokens)


def test_what_it_costs(lm: LM) -> None:
    """after: k + 1 tokens a token, less the candidates that end the answer. before: the plain answer's."""
    sampling = Sampling(max_new_tokens=9, samples=2, seed=1)
    prompt = sum(map(len, lm.encode(PROMPTS)))
    before = CdFudge(lm, random_values(lm, "before"), k=5).generate(PROMPTS, sampling)
    assert before.cost.tokens == {lm.name: prompt + sum(len(row) - 1 for row in before.tokens)}
    after = CdFudge(lm, random_values(lm, "after"), k=5).generate(PROMPTS, sampling)
    drawn = sum(len(row) for row in after.tokens)
    ending = 0
    for one, row in zip(lm.token_logprobs(after.prompts, after.tokens), after.tokens, strict=True):
        candidates = one.topk(5, -1).indices
        ending += int(torch.isin(candidates, torch.tensor(sorted(lm.eos_ids))).sum())
        assert len(candidates) == len(row)
    assert after.cost.tokens == {lm.name: prompt + drawn - len(after) + 5 * drawn - ending}
    assert after.cost.reward_calls == 0


def test_answers_end_at_the_context(lm: LM) -> None:
    """The candidates of the last token that fits are forwarded too."""
    prompt = " ".join(["ba"] * 60)  # the context is 64
    done = CdFudge(lm, random_values(lm, "after"), k=4).generate([prompt], Sampling(max_new_tokens=20, seed=2))
    plain = lm.generate([prompt], Sampling(max_new_tokens=20, seed=2))
    assert len(done.tokens[0]) <= 4 and len(plain.tokens[0]) <= 4
    assert CdFudge(lm, random_values(lm, "after")).generate(PROMPTS, Sampling(max_new_tokens=0)).texts == [""] * 3


# bad input


def test_options_that_make_no_sense_are_refused(lm: LM) -> None:
    values = random_values(lm, "after")
    for options, said in [
        ({"k": -1}, "k must be 1 or more"),
        ({"weight": math.nan}, "weight='nan' is not a number"),
        ({"weight": math.inf}, "weight must be a finite number"),
        ({"weight": -1.0}, "weight must be a finite number"),
        ({"kl_cap": 0.1, "select": "greedy"}, "kl_cap needs select=sample"),
        ({"rollouts": 1}, "rollouts must be 2 or more"),
        ({"lr": 0.0}, "lr above 0"),
        ({"tap": "beside"}, "tap='beside' is not"),
        ({"wieght": 1.0}, "did you mean 'weight'"),
    ]:
        with pytest.raises(UsageError, match=said):
            CdFudge(lm, values, **options)
    assert CdFudge(lm, values).config == CdFudgeConfig()


def test_what_cannot_be_stepped_is_refused(lm: LM) -> None:
    class Remote:
        name = "remote"

        def generate(self, prompts: Any, sampling: Any = None) -> Any: ...

    with pytest.raises(UsageError, match="cd-q chooses token by token and remote gives whole answers only"):
        CdQ(Remote(), random_values(lm, "before"))
