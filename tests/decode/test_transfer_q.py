"""Transfer Q* against enumeration: a toy of 3 tokens and answers of at most 4, of which everything is a sum."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from oracles.toy import EOS, Toy
from tiny import tiny_lm, tiny_tokenizer
from trimtab import LM, Sampling, Steered
from trimtab.control import FunctionControl
from trimtab.decode.args import Args
from trimtab.decode.best_of_n import BestOfN
from trimtab.decode.transfer_q import CLIP, TransferQ, TransferQConfig, WeightWarning, transferred
from trimtab.errors import UsageError
from trimtab.guided import Guided
from trimtab.parts import Parts
from trimtab.policy import Completions, Cost, Prompt
from trimtab.rewards import Function, PocketReward
from trimtab.rewards.prefix import UnfinishedText
from trimtab.stepping import answer_steps

BETA, WEIGHT = 0.8, 1.3
PROMPTS = ["ba da fa la", "ma na", "pe"]
PLAIN = Sampling()


def other_reward(tokens: tuple[int, ...]) -> float:
    """What the other model was aligned to: the toy's reward and something else."""
    return toy_reward(tokens) + 1.5 * (tokens[:1] == (1,)) - 0.7 * tokens.count(2)


def toy_reward(tokens: tuple[int, ...]) -> float:
    return (
        tokens.count(2)
        - 0.6 * tokens.count(1)
        + 0.9 * sum(pair == (1, 2) for pair in zip(tokens, tokens[1:], strict=False))
    )


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy(toy_reward, vocab=3, horizon=4)


@pytest.fixture(scope="module")
def elsewhere() -> Toy:
    """The same model under the other reward."""
    return Toy(other_reward, vocab=3, horizon=4)


class Table:
    """A policy on a toy whose next-token distributions are given: logprobs [N, V]."""

    def __init__(self, toy: Toy, logprobs: torch.Tensor, name: str = "table"):
        self.lm, self.toy, self.logprobs, self.name = toy.lm, toy, logprobs.float(), name
        self.number = {prefix: row for row, prefix in enumerate(toy.prefixes)}

    def open(self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost) -> Guided:
        session = TableSession(self.lm.open(prompts, sampling, meter), prompts)
        session.table = self
        return session

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = PLAIN) -> Completions:
        return answer_steps(self, prompts, sampling)


class TableSession(Guided):
    table: Table

    def guide(self, logits: torch.Tensor) -> torch.Tensor:
        return self.table.logprobs[[self.table.number[tuple(row)] for row in self.answers()]]


def one_token(logprobs: torch.Tensor) -> torch.Tensor:
    """The policy that always takes the likeliest token, [N, V]."""
    return torch.full_like(logprobs, -torch.inf).scatter(-1, logprobs.argmax(-1, keepdim=True), 0)


def decoder_table(policy: Any, toy: Toy) -> torch.Tensor:
    """The next-token distributions [N, V] of a policy on the toy, by its own session at every prefix."""
    session = policy.open([toy.prompt], toy.sampling, Cost()).fork([0] * len(toy.prefixes))
    session.append([list(prefix) for prefix in toy.prefixes])
    return session.logits.double().log_softmax(-1)


def completions(toy: Toy, logprobs: torch.Tensor, row: int, token: int) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Every answer that a policy may give after prefix `row` and `token`, with its probability."""
    child = int(toy.child[row, token])
    if child < 0:
        yield 1.0, tuple(t for t in (*toy.prefixes[row], token) if t != EOS)
        return
    for after, p in enumerate(logprobs[child].exp().tolist()):
        for mass, tokens in completions(toy, logprobs, child, after):
            yield p * mass, tokens


def expected(
    toy: Toy, logprobs: torch.Tensor, weighted: bool, normalised: bool = True, shift: float = 0.0
) -> torch.Tensor:
    """TQ [N, V] by enumeration of all answers, through the decoder's own function; shift: added to both rewards."""
    out = torch.zeros(len(toy.prefixes), toy.vocab, dtype=torch.float64)
    for row in range(len(toy.prefixes)):
        for token in range(toy.vocab):
            masses, answers = zip(*completions(toy, logprobs, row, token), strict=True)
            mass = torch.tensor(masses, dtype=torch.float64)
            rewards = torch.tensor([toy_reward(tokens) for tokens in answers], dtype=torch.float64)
            logs = (rewards - torch.tensor([other_reward(tokens) for tokens in answers], dtype=torch.float64)) / BETA
            rewards = rewards + shift
            if normalised:
                out[row, token] = transferred(rewards, logs if weighted else None, mass).value
            else:
                out[row, token] = (mass * logs.exp() * rewards).sum()
    return out


def q_star(toy: Toy) -> torch.Tensor:
    return toy.values(toy.soft_optimal(1 / BETA))[0]


# 1, 2, 6: exact expectations


def test_direct_transfer_from_the_optimal_policy_is_q_star(toy: Toy) -> None:
    assert torch.allclose(expected(toy, toy.soft_optimal(1 / BETA), False), q_star(toy), atol=1e-10, rtol=0)


def test_indirect_transfer_is_q_star_and_needs_its_normaliser(toy: Toy, elsewhere: Toy) -> None:
    """rho_BL is optimal for another reward. 1e-9: sums of up to 15 float64 products."""
    other = elsewhere.soft_optimal(1 / BETA)
    exact = q_star(toy)
    assert torch.allclose(expected(toy, other, True), exact, atol=1e-9, rtol=0)
    plain, direct = expected(toy, other, True, normalised=False), expected(toy, other, False)
    assert (plain - exact)[0].abs().max() > 0.5 and (direct - exact)[0].abs().max() > 0.1
    lower = expected(toy, other, True, shift=-10)
    assert torch.allclose(lower, exact - 10, atol=1e-9, rtol=0)
    worst = expected(toy, other, True, normalised=False, shift=-10)[0].argmin()
    assert worst == exact[0].argmax()  # with negative rewards a large weight makes the best token the worst


def test_the_policy_s_own_roll_outs_are_the_value_of_controlled_decoding(toy: Toy) -> None:
    assert torch.allclose(expected(toy, toy.base, False), toy.values()[0], atol=1e-9, rtol=0)


def test_equal_rewards_make_indirect_transfer_direct(toy: Toy) -> None:
    options: dict[str, Any] = {"k": 0, "select": "sample", "rollouts": 6, "weight": WEIGHT}
    base = toy.sampling.but(samples=8, seed=5)
    direct = TransferQ(toy.lm, toy.reward, **options).generate([toy.prompt], base)
    indirect = TransferQ(toy.lm, toy.reward, aligned_reward=toy.reward, **options).generate([toy.prompt], base)
    assert direct.tokens == indirect.tokens
    for a, b in zip(direct.telemetry, indirect.telemetry, strict=True):
        assert a["candidates"] == [pytest.approx(step, abs=1e-9) for step in b["candidates"]]
        assert b["ess"] == pytest.approx([6.0] * len(b["ess"])) and b["clipped"] == 0


# 3: by sampling


def test_sampled_weights_converge(toy: Toy, elsewhere: Toy) -> None:
    """At N = 20,000 within 3 standard errors (delta method), and 16 times the draws leave about a quarter of the error."""
    other = elsewhere.soft_optimal(1 / BETA)
    masses, answers = zip(*completions(toy, other, 0, 1), strict=True)
    rewards = torch.tensor([toy_reward(tokens) for tokens in answers], dtype=torch.float64)
    logs = (rewards - torch.tensor([other_reward(tokens) for tokens in answers], dtype=torch.float64)) / BETA
    exact = float(q_star(toy)[0, 1])
    generator = torch.Generator().manual_seed(0)

    def errors(count: int, times: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = torch.multinomial(torch.tensor(masses), count * times, True, generator=generator).view(times, count)
        found = transferred(rewards[drawn], logs[drawn])
        share = logs[drawn].softmax(-1)
        return found.value - exact, (share**2 * (rewards[drawn] - found.value[:, None]) ** 2).sum(-1).sqrt()

    error, deviation = errors(20_000, 1)
    assert abs(float(error)) < 3 * float(deviation)
    few, many = (errors(count, 400)[0].square().mean().sqrt() for count in (100, 1600))
    assert 3 < float(few / many) < 5.3  # 4 in the limit; 400 repetitions know each to 3.5 %


def test_sampled_roll_outs_of_the_session_converge(toy: Toy, elsewhere: Toy) -> None:
    """The decoder itself, at the first token: 5,000 roll-outs of the table, 4 standard errors."""
    aligned = Table(toy, elsewhere.soft_optimal(1 / BETA))
    policy = TransferQ(
        toy.lm, toy.reward, aligned, Function(_texts(other_reward)), k=0, rollouts=5000, beta=BETA, select="sample"
    )
    session = policy.open([toy.prompt], toy.sampling, Cost())
    found = session.values([0], torch.tensor([[0, 1, 2]]))
    assert torch.allclose(found.value[0], q_star(toy)[0], atol=0.12)
    assert found.value[0, 0] == q_star(toy)[0, 0] and found.ess[0, 0] == pytest.approx(5000)  # nothing to roll out
    assert 2 < found.ess[0, 1] < 4500


def test_one_roll_out_cancels_its_weight() -> None:
    rewards, logs = torch.randn(5, 1, dtype=torch.float64), 3 * torch.randn(5, 1, dtype=torch.float64)
    assert torch.equal(transferred(rewards, logs).value, transferred(rewards).value)
    with pytest.raises(UsageError, match="normalising one roll-out by itself cancels its weight"):
        TransferQConfig(aligned_reward="sentiment", rollouts=1)


# the decoder


@pytest.mark.parametrize("select", ["greedy", "sample"])
def test_the_decoder_is_its_equation_at_every_state(toy: Toy, elsewhere: Toy, select: Any) -> None:
    """A certain rho makes one greedy roll-out its exact expectation: p exp(weight TQ) / C to 1e-5, float32 logits."""
    rho = one_token(elsewhere.soft_optimal(2.0))
    policy = TransferQ(toy.lm, toy.reward, Table(toy, rho), k=0, weight=WEIGHT, select=select)
    exact = (toy.base + WEIGHT * toy.values(rho)[0]).log_softmax(-1)
    found = decoder_table(policy, toy)
    if select == "greedy":
        assert torch.equal(found.argmax(-1), exact.argmax(-1)) and torch.equal(
            found.max(-1).values, found.new_zeros(15)
        )
        assert not torch.equal(exact.argmax(-1), toy.base.argmax(-1))
    else:
        assert torch.allclose(found.exp(), exact.exp(), atol=1e-5, rtol=0)
        assert (exact.exp() - toy.base.exp()).abs().max() > 0.2


def test_drawn_answers_have_the_equation_s_distribution(toy: Toy, elsewhere: Toy) -> None:
    """Chi-squared over whole answers, 4,000 draws; answers expected under 5 times are counted together."""
    rho = one_token(elsewhere.soft_optimal(2.0))
    policy = TransferQ(toy.lm, toy.reward, Table(toy, rho), k=0, weight=WEIGHT, select="sample")
    done = policy.generate([toy.prompt], toy.sampling.but(samples=4000, seed=2))
    number = {tuple(row): i for i, row in enumerate(toy.answers)}
    counts = torch.bincount(torch.tensor([number[tuple(row)] for row in done.tokens]), minlength=len(number)).double()

    def p_value(logprobs: torch.Tensor) -> float:
        exact = toy.answer_probabilities(logprobs) * len(done)
        often = exact >= 5
        cells = [(counts[often], exact[often]), (counts[~often].sum()[None], exact[~often].sum()[None])]
        seen, wanted = (torch.cat(side) for side in zip(*cells[: 1 + bool((~often).any())], strict=True))
        return float(chisquare(seen, wanted).pvalue)

    assert p_value((toy.base + WEIGHT * toy.values(rho)[0]).log_softmax(-1)) > 0.01
    assert p_value(toy.base) < 1e-12


def test_a_batch_equals_singles(toy: Toy) -> None:
    prompts = ["1 2", "2", "2 2 1"]
    for options in ({"rollouts": 3, "select": "sample", "k": 0}, {"k": 2}):
        policy = TransferQ(toy.lm, toy.reward, **options)
        sampling = toy.sampling.but(seed=4, temperature=0.0 if options["k"] else 1.0)
        batch = policy.generate(prompts, sampling)
        if not options["k"]:  # draws of the answers themselves depend on the row: the first is compared
            prompts = prompts[:1]
        for row, prompt in enumerate(prompts):
            single = policy.generate([prompt], sampling)
            assert (single.tokens[0], single.telemetry[0]) == (batch.tokens[row], batch.telemetry[row])


# 4: limits


def test_no_weight_and_one_candidate_are_the_model(toy: Toy) -> None:
    greedy = toy.lm.generate([toy.prompt], toy.sampling.but(temperature=0)).tokens
    for options in ({"weight": 0.0}, {"weight": 1e-9}, {"k": 1}):
        assert TransferQ(toy.lm, toy.reward, **options).generate([toy.prompt], toy.sampling).tokens == greedy
    chat = Table(toy, toy.soft_optimal(9.0))
    for options in ({"weight": 0.0}, {"k": 1}):
        done = TransferQ(toy.lm, toy.reward, chat, **options).generate([toy.prompt], toy.sampling)
        assert done.cost.reward_calls == 0  # nothing is rolled out, and the aligned model is not even opened
        assert done.cost.tokens_forwarded == len(toy.prompt.split()) + len(done.tokens[0]) - 1
    drawn = toy.sampling.but(samples=20, seed=1)
    plain = toy.lm.generate([toy.prompt], drawn).tokens
    assert TransferQ(toy.lm, toy.reward, weight=0, select="sample").generate([toy.prompt], drawn).tokens == plain


@pytest.mark.parametrize("select", ["greedy", "sample"])
def test_without_a_look_ahead_it_is_args(toy: Toy, select: Any) -> None:
    sampling = toy.sampling.but(samples=20, seed=1)
    options: dict[str, Any] = {"k": 2, "weight": WEIGHT, "select": select}
    args = Args(toy.lm, toy.reward, **options).generate([toy.prompt], sampling)
    ours = TransferQ(toy.lm, toy.reward, Table(toy, toy.soft_optimal(9.0)), lookahead=0, **options)
    done = ours.generate([toy.prompt], sampling)
    assert (done.tokens, done.logprobs, done.kl) == (args.tokens, args.logprobs, args.kl)
    assert done.cost.tokens == args.cost.tokens
    longer = TransferQ(toy.lm, toy.reward, lookahead=1, **options).generate([toy.prompt], sampling)
    assert longer.telemetry[0]["candidates"][0] != done.telemetry[0]["candidates"][0]


@pytest.mark.parametrize("select", ["greedy", "sample"])
def test_where_the_model_is_sure_it_is_left_alone(toy: Toy, select: Any) -> None:
    options: dict[str, Any] = {"k": 0, "weight": WEIGHT, "select": select}
    always, some = (decoder_table(TransferQ(toy.lm, toy.reward, sure=sure, **options), toy) for sure in (None, 0.4))
    plain = one_token(toy.base) if select == "greedy" else toy.base
    sure = toy.base.exp().max(-1).values > 0.4
    assert 0 < int(sure.sum()) < len(sure)
    assert torch.allclose(some.exp(), torch.where(sure[:, None], plain, always).exp(), atol=1e-5)


# 7: caches


def test_it_chooses_as_without_any_cache() -> None:
    """Every logit from a forward over the whole text. Scores to 1e-4, the rounding of float32."""
    lm, chat = tiny_lm(), tiny_lm(seed=1, name="chat")
    reward = Function(lambda _, texts: [len(set(text.split())) - 0.1 * len(text.split()) for text in texts])
    budget = 5
    done = TransferQ(lm, reward, chat, k=3).generate(PROMPTS, Sampling(max_new_tokens=budget))

    def logits(model: LM, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model.model(torch.tensor([ids])).logits[0, -1].float()
        return found

    for prompt, tokens, told in zip(PROMPTS, done.tokens, done.telemetry, strict=True):
        (ids,) = lm.encode([prompt])
        for step, token in enumerate(tokens):
            scores, (logprobs, top) = {}, logits(lm, ids + tokens[:step]).log_softmax(-1).topk(3)
            for logprob, candidate in zip(logprobs.tolist(), top.tolist(), strict=True):
                answer = [*tokens[:step], candidate]
                while answer[-1] not in lm.eos_ids and len(answer) < budget:
                    answer.append(int(logits(chat, ids + answer).argmax()))
                (value,) = reward.score([prompt], [lm.decode(answer)])
                assert told["candidates"][step][candidate] == pytest.approx(value, abs=1e-4)
                scores[candidate] = logprob + (value or 0.0)
            assert token == max(scores, key=scores.__getitem__)


def test_the_reward_s_cache_changes_nothing() -> None:
    """Tokens equal, and at least nine values of ten to 1e-4 (float32): the other texts are spelt in pieces that the reward's
    tokenizer would not have chosen, and the text path spells them anew."""
    lm = LM.load("pocket/base")
    prompts, sampling = ["Q: Where does Anna live?\nA:"], Sampling(max_new_tokens=12)
    options: dict[str, Any] = {"k": 3, "lookahead": 12, "weight": 1.0}
    with_cache, without = (
        TransferQ(lm, PocketReward(), cache=cache, **options).generate(prompts, sampling) for cache in (True, False)
    )
    assert with_cache.tokens == without.tokens
    assert with_cache.cost.tokens["pocket/reward"] < without.cost.tokens["pocket/reward"]
    pairs = [
        (value, without.telemetry[0]["candidates"][step][token])
        for step, values in enumerate(with_cache.telemetry[0]["candidates"])
        for token, value in values.items()
    ]
    close = sum(abs(a - b) < 1e-4 for a, b in pairs)
    assert close >= 0.9 * len(pairs) > 20


# what it costs, and what it tells


def test_every_model_is_charged(toy: Toy) -> None:
    chat = Table(toy, toy.soft_optimal(9.0))
    done = TransferQ(toy.lm, toy.reward, k=2).generate([toy.prompt], toy.sampling)
    told = done.telemetry[0]["candidates"]
    assert [len(step) for step in told] == [2] * len(done.tokens[0])
    assert done.cost.reward_calls == sum(map(len, told))
    own = TransferQ(toy.lm, toy.reward, chat, k=2, lookahead=0).generate([toy.prompt], toy.sampling).cost
    assert done.cost.tokens_forwarded > own.tokens_forwarded
    lm, other = tiny_lm(), tiny_lm(seed=1, name="chat")
    reward = Function(lambda _, texts: [float(len(text)) for text in texts])
    cost = TransferQ(lm, reward, other, k=2).generate(PROMPTS, Sampling(max_new_tokens=4)).cost
    prefill = sum(map(len, lm.encode(PROMPTS)))
    assert set(cost.tokens) == {"tiny", "chat"} and cost.tokens["tiny"] == prefill + 3 * 3
    assert cost.tokens["chat"] > prefill + 3 * 3


def test_it_nests(toy: Toy) -> None:
    push = 0.8 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    steered = Steered(toy.lm, FunctionControl(lambda hidden: hidden + push))
    edited = toy.logprobs(toy.states + push)
    table = decoder_table(TransferQ(steered, toy.reward, k=0, weight=WEIGHT, select="sample"), toy)
    exact = (edited + WEIGHT * toy.values(one_token(edited))[0]).log_softmax(-1)
    assert torch.allclose(table.exp(), exact.exp(), atol=1e-5)
    inside = TransferQ(toy.lm, toy.reward, k=2, rollouts=2, select="sample")
    best = BestOfN(inside, toy.reward, 4).generate([toy.prompt], toy.sampling)
    drawn = inside.generate([toy.prompt], toy.sampling.but(samples=4))
    scores = [toy_reward(tuple(t for t in row if t)) for row in drawn.tokens]
    assert best.tokens[0] == drawn.tokens[scores.index(max(scores))]
    again = TransferQ(inside, toy.reward, k=2).generate([toy.prompt], toy.sampling)
    assert len(again.tokens[0]) <= toy.horizon


def test_the_kl_cap_holds(toy: Toy) -> None:
    policy = TransferQ(toy.lm, toy.reward, k=0, weight=5.0, select="sample", kl_cap=0.05)
    done = policy.generate([toy.prompt], toy.sampling.but(samples=50))
    assert 0.03 < max(map(max, done.kl)) <= 0.05


# works: on the toy, exactly


def delayed(tokens: tuple[int, ...]) -> float:
    """2 a token, 3 more if the last one is 1, and -1.5 for each 1 before it: a 1 pays at once and costs later."""
    return 2.0 * len(tokens) + 3 * (tokens[-1:] == (1,)) - 1.5 * tokens[:-1].count(1)


def test_it_looks_past_a_bait() -> None:
    toy = Toy(delayed, vocab=3, horizon=4)

    def reward(logprobs: torch.Tensor) -> float:
        return toy.evaluate(one_token(logprobs)).reward

    optimal = toy.soft_optimal(1 / BETA)
    options: dict[str, Any] = {"k": 0, "weight": 1.0}
    args = reward(decoder_table(Args(toy.lm, toy.reward, **options), toy))
    own = reward(decoder_table(TransferQ(toy.lm, toy.reward, **options), toy))
    star = reward(decoder_table(TransferQ(toy.lm, toy.reward, Table(toy, one_token(optimal)), **options), toy))
    exact_q, exact_base = (
        reward(toy.base + q) for q in (toy.values(optimal)[0], toy.values()[0])
    )  # exact expectations instead of one greedy roll-out
    best = max(delayed(tuple(t for t in answer if t)) for answer in toy.answers)
    assert star == exact_q == best == 11.0
    assert star >= exact_base >= args and own >= args
    assert args < reward(toy.base)  # worse than not looking at the reward at all


# bad input


def test_bad_input_is_refused(toy: Toy) -> None:
    lm = tiny_lm()
    with pytest.raises(UsageError, match="vocabularies differ"):
        TransferQ(lm, "length:target=3", tiny_lm(tokenizer=tiny_tokenizer("byte"), name="bytes"))
    for options, message in (
        ({"beta": 0}, "beta must be above 0"),
        ({"weight": -1.0}, "weight must be a finite number of 0 or more"),
        ({"lookahead": -1}, "lookahead must be 0 tokens or more"),
        ({"rollouts": 0}, "rollouts must be 1 or more, not 0"),
        ({"sure": 2.0}, "sure must be a probability"),
        ({"kl_cap": 0.1}, "kl_cap needs select=sample"),
        ({"aligned_reward": "sentiment", "rollouts": 1}, "rollouts=2 or more"),
    ):
        with pytest.raises(UsageError, match=message):
            TransferQConfig(**options)
    short = tiny_lm(name="short", max_position_embeddings=8)
    with pytest.raises(UsageError, match="short has a context of 8 tokens and an answer to 'ba da fa la' may take 14"):
        TransferQ(lm, "length:target=3", short).generate(PROMPTS, Sampling(max_new_tokens=10))


def test_a_prefix_of_an_answer_is_warned_about_where_the_reward_wants_all_of_it(toy: Toy) -> None:
    toy.reward.on_prefixes = False
    try:
        with pytest.warns(UnfinishedText, match="transfer-q asks toy about unfinished answers"):
            TransferQ(toy.lm, toy.reward, lookahead=1).generate([toy.prompt], toy.sampling)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            TransferQ(toy.lm, toy.reward).generate([toy.prompt], toy.sampling)
    finally:
        toy.reward.on_prefixes = True


def test_weights_that_say_nothing_are_warned_about(toy: Toy) -> None:
    lm = tiny_lm()  # 59 tokens: no roll-out comes up twice
    near = Function(lambda _, texts: [0.0 for _ in texts], name="near")
    far = Function(lambda _, texts: [float(sum(map(ord, text))) for text in texts], name="far")
    with pytest.warns(WeightWarning, match=r"fewer than 2 of 8 roll-outs count.*raise beta"):
        done = TransferQ(lm, near, aligned_reward=far, k=2).generate(PROMPTS, Sampling(max_new_tokens=6))
    assert all(told["clipped"] > 0 and min(told["ess"]) < 2 for told in done.telemetry)
    loud = Function(_texts(lambda tokens: 100.0 * len(tokens)), name="loud")
    with pytest.warns(WeightWarning, match="scale the reward down"):
        TransferQ(toy.lm, loud, k=0).generate([toy.prompt], toy.sampling)


def test_log_weights_are_clipped_and_counted() -> None:
    rewards, logs = torch.tensor([0.0, 0, 0, 1]), torch.tensor([0.0, 0, 0, 1e4])
    found = transferred(rewards, logs)
    e = torch.tensor(2 * CLIP).exp()
    assert found.clipped == 4 and found.value == pytest.approx(
        float(e / (e + 3))
    )  # the mean is 2,500: all four are far
    assert transferred(rewards, logs + 1e3).value == found.value  # a constant on either reward changes nothing


def test_what_was_not_judged_counts_for_nothing() -> None:
    nan = torch.nan
    found = transferred(torch.tensor([[1.0, nan, 3], [nan, nan, nan]]), torch.tensor([[0.0, nan, 0], [nan] * 3]))
    assert found.value[0] == 2 and found.ess[0] == 2 and found.value[1].isnan()


def test_it_is_made_from_its_options() -> None:
    lm, chat = tiny_lm(), tiny_lm(seed=1, name="chat")
    asked: list[str] = []

    def load(path: str) -> LM:
        asked.append(path)
        return chat

    parts: Any = Parts(lm, lm, "length:target=3", PROMPTS, Sampling(), load, None, None)  # type: ignore[arg-type]
    made = TransferQ.make(parts, TransferQConfig(aligned="chat", aligned_reward="length:target=9", k=2))
    assert asked == ["chat"] and made.aligned is chat and made.config.draws == 8
    assert made.config == TransferQConfig(aligned="chat", aligned_reward="length:target=9", k=2)
    assert TransferQ.make(parts, TransferQConfig()).aligned is None


def _texts(score: Any) -> Any:
    def reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        return [score(tuple(map(int, text.split()))) for text in texts]

    return reward
