"""ARGS: its rule by brute force, its limits, its myopia, its cache."""

from __future__ import annotations

import pytest
import torch

from oracles.toy import EOS, Toy
from tiny import tiny_lm
from trimtab import LM, Cost, Sampling, pocket
from trimtab.decode.args import Args, ArgsConfig
from trimtab.errors import UsageError
from trimtab.rewards import parse_reward
from trimtab.rewards.prefix import UnfinishedText

GREEDY = Sampling(max_new_tokens=24, temperature=0)


def late(tokens: tuple[int, ...]) -> float:
    """3 for an answer that ends in token 3 at full length, -1 for every 3 before: what pays last costs first."""
    before = tokens[:-1].count(3) if len(tokens) == 4 else tokens.count(3)
    return (3.0 if len(tokens) == 4 and tokens[-1] == 3 else 0.0) - before


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy(vocab=5, horizon=4)


def rule(toy: Toy, k: int, weight: float, gain: torch.Tensor | None = None) -> list[int]:
    """The greedy path by brute force: at every prefix the best of log p + weight * r(prefix + z) (or `gain` [N, V])."""
    row, answer = 0, []
    for _ in range(toy.horizon):
        scores = {}
        for z in toy.base[row].topk(k).indices.tolist():
            prefix = toy.prefixes[row]
            r = toy.score(prefix if z == EOS else (*prefix, z)) if gain is None else float(gain[row, z])
            scores[z] = float(toy.base[row, z]) + weight * r
        best = max(scores, key=lambda z: scores[z])
        answer.append(best)
        row = int(toy.child[row, best])
        if row < 0:
            break
    return answer


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("weight", [0.3, 1.0, 4.0])
def test_the_path_is_that_of_its_rule(toy: Toy, k: int, weight: float) -> None:
    found = Args(toy.lm, toy.reward, k=k, weight=weight).generate([toy.prompt], toy.sampling)
    assert found.tokens == [rule(toy, k, weight)]


def test_it_is_myopic_where_the_value_is_not() -> None:
    """On a reward that comes late ARGS shuns the token that pays; the same rule with the exact value takes it."""
    toy = Toy(late, vocab=5, horizon=4)
    short_sighted = Args(toy.lm, toy.reward, k=5, weight=5.0).generate([toy.prompt], toy.sampling).tokens[0]
    values, _ = toy.values()
    far_sighted = rule(toy, 5, 5.0, values)
    best = max(late(tuple(t for t in answer if t != EOS)) for answer in toy.answers)
    assert late(tuple(t for t in far_sighted if t != EOS)) == best == 3.0
    assert 3 not in short_sighted[:3]


def test_the_distribution_of_drawn_tokens(toy: Toy) -> None:
    """select=sample, k = 0: softmax(log p + weight * r) at every first token, to 1e-5; its KL is exact."""
    method = Args(toy.lm, toy.reward, k=0, weight=2.0, select="sample")
    session = method.open([toy.prompt], toy.sampling, Cost())
    rewards = torch.tensor([toy.score(() if z == EOS else (z,)) for z in range(5)], dtype=torch.float64)
    exact = (toy.base[0] + 2 * rewards).log_softmax(-1)
    torch.testing.assert_close(session.logits[0].double().log_softmax(-1), exact, atol=1e-5, rtol=0)
    drawn = method.generate([toy.prompt], toy.sampling.but(samples=4))
    assert drawn.kl is not None
    kl = float((exact.exp() * (exact - toy.base[0])).sum())
    assert all(row[0] == pytest.approx(kl, abs=1e-5) for row in drawn.kl)


def test_limits() -> None:
    """weight 0 draws the plain answers with the same seed and asks no reward; k = 1 is greedy decoding."""
    lm, prompts = tiny_lm(), ["ba da fa la", "ma na", "pe"]
    reward = parse_reward("length:target=3")
    plain = Sampling(max_new_tokens=12, seed=3)
    still = Args(lm, reward, weight=0.0, select="sample").generate(prompts, plain)
    assert still.tokens == lm.generate(prompts, plain).tokens and still.cost.reward_calls == 0
    one = Args(lm, reward, k=1, weight=9.0).generate(prompts, plain)
    assert one.tokens == lm.generate(prompts, plain.but(temperature=0)).tokens and one.cost.reward_calls == 0


@pytest.fixture(scope="module")
def base() -> LM:
    return LM.load("pocket/base")


@pytest.mark.filterwarnings("ignore::trimtab.rewards.prefix.UnfinishedText")
def test_the_cache_changes_the_cost_and_not_the_tokens(base: LM) -> None:
    """pocket/reward reads the same ids either way where the answer is spelled as its tokenizer spells it: greedy ones are."""
    reward, prompts = parse_reward("pocket/reward"), pocket.prompts("test", 12, seed=2)
    cached = Args(base, reward, k=4).generate(prompts, GREEDY)
    spent = cached.cost.tokens["pocket/reward"]
    anew = Args(base, reward, k=4, cache=False).generate(prompts, GREEDY)
    assert cached.tokens == anew.tokens
    assert spent < anew.cost.tokens["pocket/reward"] / 4
    assert [Args(base, reward, k=4).generate([p], GREEDY).tokens[0] for p in prompts[:4]] == cached.tokens[:4]
    ended = [row for row, why in zip(cached.tokens, cached.finish_reasons, strict=True) if why == "stop"]
    assert ended and all(row[-1] in base.eos_ids and not set(row[:-1]) & base.eos_ids for row in ended)


@pytest.mark.filterwarnings("ignore::trimtab.rewards.prefix.UnfinishedText")
def test_the_cap_on_the_kl_is_never_exceeded(base: LM) -> None:
    reward, prompts = parse_reward("pocket/reward"), pocket.prompts("test", 12, seed=3)
    for temperature in (1.0, 0.6):
        drawn = Args(base, reward, k=6, select="sample", kl_cap=0.05).generate(prompts, Sampling(24, temperature))
        assert drawn.kl is not None and max(max(row) for row in drawn.kl) <= 0.05
        assert max(max(row) for row in drawn.kl) > 0.02  # it is used


def test_a_reward_of_whole_answers_is_warned_about(base: LM) -> None:
    with pytest.warns(UnfinishedText, match="args asks pocket/judge about unfinished answers"):
        Args(base, parse_reward("pocket/judge"))


@pytest.mark.parametrize(
    "options",
    [{"k": -1}, {"weight": -1.0}, {"weight": float("inf")}, {"kl_cap": -0.1, "select": "sample"}, {"kl_cap": 0.1}],
)
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        ArgsConfig(**options)  # type: ignore[arg-type]
