"""Learned values: their targets on tables, their fits on the toy, the state they tap, and what is saved."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from oracles.exact_value import numbers_of
from oracles.toy import Toy
from tiny import tiny_lm
from trimtab import LM, Sampling
from trimtab.card import Card
from trimtab.decode import cd_blockwise, cd_fudge, cd_q
from trimtab.decode.cd_blockwise import CdBlockwise
from trimtab.decode.cd_fudge import CdFudge
from trimtab.decode.cd_q import CdQ
from trimtab.decode.prefix_value import (
    AfterToken,
    BeforeToken,
    Fitted,
    PrefixValue,
    fit_prefix_value,
    load_value,
    mean_embedding,
    save_value,
)
from trimtab.errors import UsageError
from trimtab.parts import Parts, make
from trimtab.policy import Cost
from trimtab.steer.rollouts import Rollouts, collect
from trimtab.steer.value import ValueFit, ValueNetwork, targets

SMALL = ValueFit(target="mc", batch=32, epochs=3, width=16)


def mixed(tokens: tuple[int, ...]) -> float:
    return tokens.count(1) - 0.6 * len(tokens) * (tokens[-1:] == (2,))


@pytest.fixture(scope="module")
def toy() -> Toy:
    """15 prefixes, 31 answers."""
    return Toy(mixed, vocab=3, horizon=4)


@pytest.fixture(scope="module")
def sharp() -> Toy:
    """The same with a model that is further from uniform."""
    return Toy(mixed, vocab=3, horizon=4, spread=0.6)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


def uniform_policy(toy: Toy) -> torch.Tensor:
    return torch.full_like(toy.base, 1 / toy.vocab).log()


# on tables, where a fit is a mean


class Table:
    """Every step of some rollouts: the prefix it is at and the token that follows."""

    def __init__(self, toy: Toy, rollouts: Rollouts):
        number = {prefix: row for row, prefix in enumerate(toy.prefixes)}
        self.toy, self.rollouts = toy, rollouts
        self.index, self.mask = rollouts.padded(torch.arange(len(rollouts)))
        self.rows = torch.tensor([number[tuple(row[:t])] for row in rollouts.tokens for t in range(len(row))])
        self.tokens = torch.tensor([token for row in rollouts.tokens for token in row])

    def means(self, aims: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of targets [n, T]: mean, standard error and count by (prefix, token), [N, V] each."""
        flat = aims[self.mask].double()
        at = self.rows * self.toy.vocab + self.tokens
        size = len(self.toy.prefixes) * self.toy.vocab
        count = torch.zeros(size).double().index_add_(0, at, torch.ones_like(flat))
        mean = torch.zeros(size).double().index_add_(0, at, flat) / count
        spread = torch.zeros(size).double().index_add_(0, at, (flat - mean[at]) ** 2) / count
        shape = (len(self.toy.prefixes), self.toy.vocab)
        return mean.view(shape), (spread / count).sqrt().view(shape), count.view(shape)

    def fudge(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rewards = self.rollouts.rewards.double()
        return self.means(targets(torch.zeros(self.index.shape).double(), self.rollouts.lengths, rewards, 1.0))

    def q_step(self, q: torch.Tensor) -> torch.Tensor:
        """One sweep of CD-Q: the exact expectation over the vocabulary of the model."""
        expected = (self.toy.base.exp() * q).sum(-1)[self.rows]  # [M]
        rewards = self.rollouts.rewards.double()
        return self.means(targets(expected[self.index], self.rollouts.lengths, rewards, 0.0))[0]


def test_means_of_returns_are_the_exact_value(toy: Toy) -> None:
    """FUDGE on 100,000 answers: each of 45 values within 4 standard errors (one in 700 runs would have one beyond), the
    15 values of prefixes, the spec's own, within 3 where they vary."""
    mean, error, count = Table(toy, toy.rollouts(100_000, seed=1)).fudge()
    q, v = toy.values()
    assert count.min() > 30
    assert ((mean - q).abs() <= 4 * error + 1e-6).all()
    at_prefix = (mean * count).sum(-1) / count.sum(-1)
    spread = ((error**2 * count + (mean - at_prefix[:, None]) ** 2) * count).sum(-1) / count.sum(-1)
    assert ((at_prefix - v).abs() <= 3 * (spread / count.sum(-1)).sqrt()).all()


def test_cd_q_is_right_on_answers_of_anybody_and_fudge_is_not(toy: Toy) -> None:
    """Answers of a uniform sampler, every prefix covered: sweeps of CD-Q reach the base's value to 1e-6, in as many
    sweeps as an answer has tokens; means of returns are the uniform sampler's value."""
    table = Table(toy, toy.rollouts(3000, seed=2, logprobs=uniform_policy(toy)))
    q, _ = toy.values()
    found = torch.zeros_like(q)
    errors = []
    for _ in range(toy.horizon):
        found = table.q_step(found)
        errors.append(float((found - q).abs().max()))
    assert errors[-1] < 1e-6 < errors[-2]
    mean, error, _ = table.fudge()
    theirs, _ = toy.values(uniform_policy(toy))
    assert ((mean - theirs).abs() <= 4 * error + 1e-6).all()
    assert float((mean - q).abs().max()) > 0.2


# the networks' fits


def predicted(toy: Toy, value: PrefixValue) -> torch.Tensor:
    """What a value says of every next token at every prefix, [N, V]."""
    session = toy.lm.session([[*map(int, toy.prompt.split()), *prefix] for prefix in toy.prefixes])
    return value.following(session, torch.arange(toy.vocab).expand(len(toy.prefixes), -1)).double()


def error_of(toy: Toy, value: PrefixValue, visits: torch.Tensor) -> float:
    """Mean squared error against the base's exact value as a share of its variance; prefixes weighed by `visits`, tokens
    by the base.

    The token that an answer is cut at has no state after it that rollouts could show: it is left out.
    """
    shown = toy.child >= 0
    shown[:, 0] = True
    q, p = toy.values()[0], toy.base.exp() * visits[:, None] * shown
    p = p / p.sum()
    mean = (p * q).sum()
    return float((p * (predicted(toy, value) - q) ** 2).sum() / (p * (q - mean) ** 2).sum())


@pytest.mark.parametrize(("tap", "target"), [("after", "mc"), ("before", "mc"), ("before", "td0")])
def test_each_fit_finds_the_value_of_the_base(sharp: Toy, tap: Any, target: Any) -> None:
    """On the base's own answers at most a fifth of the value's variance is missed; untrained, most of it is."""
    visits, drawn = sharp.visits(sharp.base), sharp.rollouts(2000, seed=3)
    fit = ValueFit(target=target, batch=32, epochs=15, lr=3e-3)
    value, cost = fit_prefix_value(sharp.lm, drawn, tap, fit)
    untrained, _ = fit_prefix_value(sharp.lm, drawn, tap, dataclasses.replace(fit, epochs=1, lr=1e-9))
    assert error_of(sharp, value, visits) < 0.2
    assert error_of(sharp, untrained, visits) > 0.5
    assert value.tap == tap and cost.seconds > 0
    assert 0 < value.fitted.metrics["held_out_error"] < 1


def test_off_policy_the_fit_of_cd_q_is_right_and_that_of_fudge_is_not(sharp: Toy) -> None:
    """The same answers of a uniform sampler, the same network. Measured: 0.03 and 1.04 of the variance missed."""
    drawn, visits = sharp.rollouts(2000, seed=4, logprobs=uniform_policy(sharp)), sharp.visits(uniform_policy(sharp))
    errors = {}
    for target in ("mc", "td0"):
        fit = ValueFit(target=target, batch=32, epochs=15, lr=3e-3)
        errors[target] = error_of(sharp, fit_prefix_value(sharp.lm, drawn, "before", fit)[0], visits)
    assert errors["td0"] < 0.2 and errors["mc"] > 0.5


def test_a_fit_is_the_same_twice(toy: Toy) -> None:
    drawn = toy.rollouts(200, seed=3)
    for tap, target in (("after", "mc"), ("before", "td0")):
        one, two = (fit_prefix_value(toy.lm, drawn, tap, dataclasses.replace(SMALL, target=target))[0] for _ in "ab")
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_without_finished_answers_ending_is_worth_what_is_expected(toy: Toy) -> None:
    """Nothing was seen to end by itself: V of the state before the end stands for it."""
    drawn = toy.rollouts(200, seed=3)
    drawn.ended[:] = False
    value, _ = fit_prefix_value(toy.lm, drawn, "after", SMALL)
    assert isinstance(value, AfterToken)
    assert torch.equal(value.end(toy.states), value.value(toy.states))


# the state that is read


def test_each_tap_reads_its_own_state(toy: Toy) -> None:
    """after: V at the state of the longer prefix. before: Q at the state of the prefix. One off would be another number."""
    drawn = toy.rollouts(200, seed=3)
    after, _ = fit_prefix_value(toy.lm, drawn, "after", SMALL)
    assert isinstance(after, AfterToken)
    inner = toy.child[:, 1] >= 0  # prefixes that can be made longer
    wanted = after.value.in_reward_units(after.value(toy.states))[toy.child[inner, 1:]].double()
    assert torch.allclose(predicted(toy, after)[inner, 1:], wanted, atol=1e-4)
    ending = after.end.in_reward_units(after.end(toy.states)).double()
    assert torch.allclose(predicted(toy, after)[:, 0], ending, atol=1e-4)
    session = toy.lm.session([[*map(int, toy.prompt.split()), *prefix] for prefix in toy.prefixes])
    assert torch.allclose(after.reached(session).double()[toy.child[inner, 1:]], wanted, atol=1e-4)

    before, _ = fit_prefix_value(toy.lm, drawn, "before", SMALL)
    assert isinstance(before, BeforeToken)
    value, push = before.parts(toy.states)
    own = (value[:, None] + push @ toy.unembedding.float().T) * before.reward_std + before.reward_mean
    assert torch.allclose(predicted(toy, before), own.double(), atol=1e-4)
    some = before.following(session, torch.tensor([[2, 0]]).expand(len(toy.prefixes), -1))
    assert torch.allclose(some, own[:, [2, 0]], atol=1e-4)  # few candidates take another path than all of them


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_expectation_over_the_vocabulary_is_exact(toy: Toy, temperature: float) -> None:
    """v + m . E_p[W] is sum_z p(z) Q(z), to float32; it is what a value before the token says of a text so far."""
    before, _ = fit_prefix_value(toy.lm, toy.rollouts(200, seed=3), "before", SMALL, temperature=temperature)
    session = toy.lm.session([[*map(int, toy.prompt.split()), *prefix] for prefix in toy.prefixes])
    p = (toy.base / temperature).softmax(-1)
    wanted = (p * predicted(toy, before)).sum(-1)
    assert torch.allclose(before.reached(session).double(), wanted, atol=1e-4)
    assert torch.allclose(mean_embedding(toy.lm, toy.states, temperature).double(), p @ toy.unembedding, atol=1e-5)


def test_values_are_in_units_of_the_reward(toy: Toy) -> None:
    """A reward of 1000 more and 10 times the size gives a V of 1000 more and 10 times the size."""
    drawn = toy.rollouts(400, seed=3)
    other = dataclasses.replace(drawn, rewards=1000 + 10 * drawn.rewards)
    for tap in ("after", "before"):
        small, large = (predicted(toy, fit_prefix_value(toy.lm, one, tap, SMALL)[0]) for one in (drawn, other))
        assert torch.allclose(large, 1000 + 10 * small, atol=0.05)


# what is saved


@pytest.mark.parametrize("tap", ["after", "before"])
def test_saved_and_loaded_it_says_the_same(toy: Toy, tap: Any, tmp_path: Path) -> None:
    value, _ = fit_prefix_value(toy.lm, toy.rollouts(200, seed=3), tap, SMALL, "toy", 0.7)
    save_value(value, tmp_path)
    loaded = load_value(tmp_path, toy.lm, tap)
    assert torch.equal(predicted(toy, loaded), predicted(toy, value))
    assert loaded.fitted == value.fitted and loaded.fitted.temperature == 0.7 and loaded.fitted.reward == "toy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["value.json", "value.safetensors"]


def test_another_tap_another_model_and_damage_are_refused(toy: Toy, lm: LM, tmp_path: Path) -> None:
    value, _ = fit_prefix_value(toy.lm, toy.rollouts(200, seed=3), "before", SMALL)
    save_value(value, tmp_path)
    with pytest.raises(UsageError, match="taps the state before the token and after is meant"):
        load_value(tmp_path, toy.lm, "after")
    with pytest.raises(UsageError, match="was fitted on toy .*; tiny has weights"):
        load_value(tmp_path, lm, "before")
    with pytest.raises(UsageError, match="was fitted on toy .*; tiny has weights"):
        CdFudge(lm, value)
    with pytest.raises(UsageError, match="was fitted on toy"):
        CdBlockwise(lm, "length:target=3", value)
    record = (tmp_path / "value.json").read_text()
    for broken in ("{", "[]", json.dumps({"format": "other/1", "tap": "before", "fitted": {}}), "{}"):
        (tmp_path / "value.json").write_text(broken)
        with pytest.raises(UsageError, match="no whole prefix value"):
            load_value(tmp_path, toy.lm, "before")
    (tmp_path / "value.json").write_text(record)
    weights = (tmp_path / "value.safetensors").read_bytes()
    (tmp_path / "value.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UsageError, match="no whole prefix value"):
        load_value(tmp_path, toy.lm, "before")
    value.push.weight.data[0, 0] = torch.nan
    save_value(value, tmp_path)
    with pytest.raises(UsageError, match="not finite"):
        load_value(tmp_path, toy.lm, "before")
    with pytest.raises(UsageError, match="no whole prefix value"):
        load_value(tmp_path / "nowhere", toy.lm, "before")


def test_tensors_of_another_form_are_refused(toy: Toy, tmp_path: Path) -> None:
    value, _ = fit_prefix_value(toy.lm, toy.rollouts(200, seed=3), "before", SMALL)
    save_value(value, tmp_path)
    record = json.loads((tmp_path / "value.json").read_text())
    (tmp_path / "value.json").write_text(json.dumps({**record, "tap": "after"}))
    with pytest.raises(UsageError, match="do not fit"):
        load_value(tmp_path, toy.lm, "after")


def test_a_td_target_needs_the_state_before(toy: Toy) -> None:
    with pytest.raises(UsageError, match="CD-Q needs tap=before"):
        fit_prefix_value(toy.lm, toy.rollouts(50, seed=3), "after", ValueFit(target="td0"))


# as policies


@pytest.fixture(scope="module")
def drawn(toy: Toy) -> Rollouts:
    return collect(toy.lm, [toy.prompt] * 4, toy.reward, toy.sampling, 300)


def parts_of(toy: Toy, drawn: Rollouts, log: list[str]) -> Parts:
    """As the command line makes them, with fits kept by key."""
    kept: dict[str, Any] = {}

    def store(key: str, fit: Any, save: Any, load: Any) -> Any:
        log.append(key)
        kept.setdefault(key, None)
        if kept[key] is None:
            kept[key] = fit()
        return kept[key]

    return Parts(
        toy.lm, toy.lm, toy.reward, [toy.prompt] * 4, toy.sampling, lambda path: toy.lm, lambda count: drawn, store,
        log.append,
    )  # fmt: skip


def test_policies_that_need_the_same_value_share_its_fit(toy: Toy, drawn: Rollouts) -> None:
    log: list[str] = []
    parts = parts_of(toy, drawn, log)
    options: dict[str, Any] = {"rollouts": 300, "epochs": 2, "width": 8}
    fudge = make(CdFudge, parts, CdFudge.Config(**options, weight=2.0, k=2))
    again = make(CdFudge, parts, CdFudge.Config(**options, weight=0.5))
    blocks = make(CdBlockwise, parts, CdBlockwise.Config(**options, k=3))
    assert isinstance(fudge, CdFudge) and isinstance(blocks, CdBlockwise)
    assert fudge.value is again.value is blocks.values and fudge.config.weight == 2.0
    q = make(CdQ, parts, CdQ.Config(**options))
    of_q = make(CdBlockwise, parts, CdBlockwise.Config(**options, value="q"))
    assert q.value is of_q.values is not fudge.value and q.value.tap == "before"
    before = make(CdFudge, parts, CdFudge.Config(**options, tap="before"))
    assert before.value.tap == "before" and before.value is not q.value
    assert make(CdBlockwise, parts, CdBlockwise.Config(value="reward")).values is None
    assert fudge.value.fitted == Fitted("toy", toy.lm.fingerprint, "toy", 300, 1.0, fudge.value.fitted.metrics)
    assert any("all prompts" in line or "held-out error" in line for line in log)
    assert parts.cost.tokens_forwarded == 7 * drawn.cost.tokens_forwarded - drawn.cost.tokens_forwarded
    for policy in (fudge, q, before, blocks, of_q):
        done = policy.generate([toy.prompt], toy.sampling.but(samples=4))
        assert len(numbers_of(toy, done.tokens)) == 4


@pytest.mark.parametrize("cls", [CdFudge, CdQ, CdBlockwise])
def test_fit_is_one_call(toy: Toy, cls: Any) -> None:
    policy = cls.fit(toy.lm, [toy.prompt] * 4, toy.reward, toy.sampling, rollouts=64, epochs=2, width=8)
    assert policy.generate([toy.prompt], toy.sampling).cost.tokens_forwarded > 0
    with pytest.raises(UsageError, match="rollouts must explore"):
        cls.fit(toy.lm, [toy.prompt] * 4, toy.reward, Sampling(temperature=0), rollouts=64)


@pytest.mark.parametrize("module", [cd_fudge, cd_q, cd_blockwise])
def test_cards(module: Any) -> None:
    assert isinstance(module.CARD, Card) and "verified_cpu" in module.CARD.status


def test_a_value_made_by_hand_is_not_checked(lm: LM) -> None:
    value = AfterToken(ValueNetwork(lm.hidden_size, 8), ValueNetwork(lm.hidden_size, 8))
    value.check(lm)
    assert Cost().tokens_forwarded == 0 and value.fitted == Fitted()
