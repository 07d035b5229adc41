"""Answers of the policy: their distribution against enumeration, ensembles, costs, stops, nesting."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from oracles.byte_table import BOS, EOS, MERGES, Table, tokenizer
from tiny import tiny_lm, tiny_tokenizer
from trimtab import Cost, Sampling, Steered
from trimtab.control import FunctionControl
from trimtab.decode.best_of_n import BestOfN
from trimtab.decode.byte_level import ByteLevel, ByteLevelConfig, Leak, mixture
from trimtab.decode.byte_lm import END, ByteLM
from trimtab.errors import UsageError
from trimtab.parts import make

TEXTS = ["".join(text) for size in range(1, 4) for text in itertools.product("abc", repeat=size)]
PLAIN = Sampling()


@pytest.fixture(scope="module")
def table() -> Table:
    return Table(tokenizer(MERGES))


def test_a_leaking_model_is_warned_about(table: Table) -> None:
    """A random table puts most of its mass where no encoding goes."""
    with pytest.warns(Leak, match=r"byte-level: \d\d% of a model's mass is on tokens that no encoding has there"):
        done = ByteLevel(table).generate(["<s>ab"], Sampling(max_new_tokens=6))
    assert done.telemetry[0]["leak"] > 0.05


# sampling

quiet = pytest.mark.filterwarnings("ignore::trimtab.decode.byte_level.Leak")


def continuations(model: ByteLM, prompt: str, size: int = 3) -> dict[str, float]:
    """Probability of everything that may follow in `size` bytes, "." being the end."""
    texts = [text for text in ["", *TEXTS] if len(text) <= size]
    out = {}
    for text in texts:
        (logprobs,) = model.score([prompt], [text], end=len(text) < size)
        out[text if len(text) == size else f"{text}."] = math.exp(float(logprobs.sum()))
    return out


def p_value(drawn: Sequence[str], chances: dict[str, float]) -> float:
    often = [text for text, chance in chances.items() if chance * len(drawn) >= 5]
    observed = [sum(text == one for text in drawn) for one in often]
    expected = [chances[text] * len(drawn) for text in often]
    rest = len(drawn) - sum(observed), len(drawn) - sum(expected)
    if rest[1] > 1e-6:
        observed, expected = [*observed, rest[0]], [*expected, rest[1]]
    return float(chisquare(observed, expected).pvalue)


@quiet
def test_cover_sampling_and_byte_sampling_have_the_same_distribution(table: Table) -> None:
    """Both against the exact probability of every continuation of 3 bytes: a member of the cover and then tokens (5,000
    draws), and byte by byte (an ensemble of the model with itself, 1,000). The prompt's own encoding alone is refuted."""
    lm, prompt = Table(table.tokenizer, seed=5), "<s>aba"
    chances = continuations(ByteLM(lm), prompt)
    assert sum(chances.values()) == pytest.approx(1, abs=1e-12)
    for policy, count in ((ByteLevel(lm), 5_000), (ByteLevel(lm, [lm]), 1_000)):
        done = policy.generate([prompt], Sampling(max_new_tokens=3, samples=count, seed=1))
        drawn = [
            f"{text}." if len(text) < 3 and reason == "stop" else text[:3]
            for text, reason in zip(done.texts, done.finish_reasons, strict=True)
        ]
        assert p_value(drawn, chances) > 0.01
    naive = continuations(ByteLM(lm, boundary="tokens"), prompt)
    assert p_value(drawn, naive) < 1e-6


@quiet
def test_logprobs_are_those_of_what_was_drawn(table: Table) -> None:
    """Every piece's log-probability stands once: byte by byte they add up to the exact one of the answer."""
    model = ByteLM(table)
    done = ByteLevel(table, [table]).generate(["<s>ab"], Sampling(max_new_tokens=8, samples=20, seed=2))
    for text, row, reason in zip(done.texts, done.logprobs, done.finish_reasons, strict=True):
        (exact,) = model.score(["<s>ab"], [text], end=reason == "stop")
        if reason == "stop":
            assert sum(row) == pytest.approx(float(exact.sum()), abs=1e-5)


@quiet
@pytest.mark.parametrize("others", [0, 1])
def test_tokens_are_the_encoding_of_the_text(table: Table, others: int) -> None:
    done = ByteLevel(table, [table] * others).generate(
        ["<s>ab", "<s>c"], Sampling(max_new_tokens=5, samples=12, seed=3)
    )
    for text, tokens, logprobs, reason in zip(done.texts, done.tokens, done.logprobs, done.finish_reasons, strict=True):
        ended = reason == "stop"
        assert tokens == table.tokenizer(text, add_special_tokens=False)["input_ids"] + [EOS] * ended
        assert len(tokens) == len(logprobs) <= 5 and (ended or len(tokens) == 5)
    assert done.prompts == ["<s>ab"] * 12 + ["<s>c"] * 12
    assert len(set(done.texts)) > 5 and {"stop", "length"} == set(done.finish_reasons)


@quiet
def test_the_same_seed_gives_the_same_answers_and_others_others(table: Table) -> None:
    sampling = Sampling(max_new_tokens=6, samples=4, seed=7)
    for policy in (ByteLevel(table), ByteLevel(table, [table])):
        first, again = (policy.generate(["<s>ab", "<s>ca"], sampling) for _ in range(2))
        assert (first.texts, first.tokens, first.logprobs) == (again.texts, again.tokens, again.logprobs)
        assert policy.generate(["<s>ab", "<s>ca"], sampling.but(seed=8)).texts != first.texts


@quiet
def test_greedy_takes_the_likeliest_member_and_bytes(table: Table) -> None:
    """One model: the likeliest member of the cover, then the likeliest tokens. Several: the likeliest byte."""
    greedy = Sampling(max_new_tokens=3, temperature=0)
    session = ByteLM(table).start(["<s>aba"])
    chances, branches = session.cover(0)
    tokens, rest = session.member(branches, int(chances.argmax()))
    done = ByteLevel(table).generate(["<s>aba"], greedy)
    assert done.texts[0].encode().startswith(rest)
    together = ByteLevel(table, [table]).generate(["<s>aba"], greedy)
    text, walk = "", ByteLM(table).start(["<s>aba"])
    while (symbol := int(walk.logprobs.argmax())) != END and len(text) < 20:
        text += chr(symbol)
        walk.step([symbol])
    assert text.startswith(together.texts[0]) and (together.texts[0] or symbol == END)


@quiet
def test_stop_strings_across_the_cut(table: Table) -> None:
    for policy in (ByteLevel(table), ByteLevel(table, [table])):
        done = policy.generate(["<s>ab"], Sampling(max_new_tokens=8, samples=40, seed=1, stop=("ba", "c")))
        assert not any("ba" in text or "c" in text for text in done.texts)
        assert "stop" in done.finish_reasons


# ensembles


def byte_table(seed: int) -> Table:
    """One token is one byte."""
    return Table(tokenizer(), seed=seed)


def test_a_vocabulary_of_bytes_is_plain_softmax() -> None:
    lm = byte_table(1)
    (logprobs,) = ByteLM(lm).start(["<s>ab"]).logprobs
    tokens = lm.tokenizer("ab", add_special_tokens=False)["input_ids"]
    logits = lm.logits_after((BOS, *tokens)).clone()
    logits[BOS] = -torch.inf
    own = logits.log_softmax(-1)
    ids = lm.tokenizer.convert_tokens_to_ids(["a", "b", "c", "</s>"])
    assert torch.allclose(logprobs[[97, 98, 99, END]], own[ids], atol=1e-12)


def test_an_ensemble_averages_probabilities() -> None:
    """Two models over bytes: the mean of their probabilities; with itself a model is itself; a lost model has no part."""
    first, second = (ByteLM(byte_table(seed)).start(["<s>ab"]).logprobs for seed in (1, 2))
    even = torch.zeros(2, 1, dtype=torch.float64)
    assert torch.allclose(mixture(torch.stack([first, second]), even).exp(), (first.exp() + second.exp()) / 2)
    assert torch.allclose(mixture(torch.stack([first, first]), even), first)
    lost = torch.full_like(first, -torch.inf)
    assert torch.allclose(mixture(torch.stack([lost, second]), even), second)


@quiet
@pytest.mark.parametrize("weights", ["uniform", "bayesian"])
def test_the_distribution_of_an_ensemble_is_that_of_enumeration(table: Table, weights: str) -> None:
    """Two models of different vocabularies, 1,000 draws against every continuation of 3 bytes.

    uniform: the mean of next-byte probabilities at every byte. bayesian: the mean of the probabilities of whole texts.
    """
    lms, prompt = (
        (Table(table.tokenizer, seed=5), Table(tokenizer([("b", "c"), ("c", "a")]), seed=6, name="other")),
        "<s>ab",
    )
    steps = [{}, {}]
    for at, lm in enumerate(lms):
        for text in ["", *TEXTS]:
            if len(text) <= 3:
                (steps[at][text],) = ByteLM(lm).score([prompt], [text], end=True)
    chances = {}
    for text in (text for text in steps[0] if len(text) <= 3):
        both = torch.stack([steps[at][text] if len(text) < 3 else steps[at][text][:-1] for at in (0, 1)]).exp()
        whole = both.prod(-1).mean() if weights == "bayesian" else both.mean(0).prod()
        chances[text if len(text) == 3 else f"{text}."] = float(whole)
    assert sum(chances.values()) == pytest.approx(1, abs=1e-9)
    policy = ByteLevel(lms[0], [lms[1]], weights=weights)  # type: ignore[arg-type]
    done = policy.generate([prompt], Sampling(max_new_tokens=3, samples=1_000, seed=2))
    drawn = [text[:3] if len(text) >= 3 else f"{text}." for text in done.texts]
    assert p_value(drawn, chances) > 0.01
    for row in done.telemetry[:50]:
        assert sum(row["weights"]) == pytest.approx(1) and (row["weights"] == [0.5, 0.5]) == (weights == "uniform")


@quiet
def test_a_model_that_cannot_spell_the_text_drops_out() -> None:
    """One that knows no c: texts with a c go on with the other alone."""
    full, poor = Table(tokenizer(MERGES), seed=1), Table(tokenizer([("a", "b")], units="ab"), seed=2, name="poor")
    done = ByteLevel(full, [poor]).generate(["<s>ab"], Sampling(max_new_tokens=12, samples=60, seed=4))
    assert any("c" in text[:-2] for text in done.texts)
    turned = ByteLevel(poor, [full]).generate(["<s>ab"], Sampling(max_new_tokens=12, samples=60, seed=4))
    assert not any("c" in text for text in turned.texts)  # the first model's tokens are what is reported


# cost, context, nesting


@quiet
def test_one_call_a_byte_on_a_shared_prefix() -> None:
    """The prompt once, then what changed of the text's own encoding."""
    lm = tiny_lm(tokenizer=tiny_tokenizer("byte"))
    meter = Cost()
    session = ByteLM(lm).start(["tu mo ba"], meter)
    before = meter.tokens[lm.name]
    assert before <= len(lm.encode(["tu mo ba"])[0]) + 3
    for at, byte in enumerate(b" tub momo"):
        session.step([byte])
        assert meter.tokens[lm.name] - before <= 2 * (at + 1)


@quiet
def test_costs_name_every_model() -> None:
    lm, other = (
        tiny_lm(tokenizer=tiny_tokenizer("byte")),
        tiny_lm("gpt2", tokenizer=tiny_tokenizer("byte"), name="second"),
    )
    done = ByteLevel(lm, [other]).generate(["ba mo"], Sampling(max_new_tokens=4))
    assert set(done.cost.tokens) == {"tiny", "second"} and done.cost.seconds > 0 and done.cost.reward_calls == 0
    alone = ByteLevel(lm).generate(["ba mo"] * 2, Sampling(max_new_tokens=6, samples=3))
    assert alone.cost.tokens["tiny"] <= 2 * (len(lm.encode(["ba mo"])[0]) + 3) + 6 * (6 + 3)


@quiet
def test_answers_do_not_depend_on_the_batch() -> None:
    prompts, sampling = ["ba mo t", "tu", "\u00e9 mo"], Sampling(max_new_tokens=5, samples=3, seed=1)
    together, apart = (tiny_lm(tokenizer=tiny_tokenizer("byte"), batch_rows=rows) for rows in (None, 2))
    for others in (0, 1):
        done = [ByteLevel(lm, [lm] * others).generate(prompts, sampling) for lm in (together, apart)]
        assert done[0].texts == done[1].texts and done[0].tokens == done[1].tokens
        assert done[0].prompts == done[1].prompts == [prompt for prompt in prompts for _ in range(3)]


@quiet
def test_a_full_context_ends_answers() -> None:
    lm = tiny_lm(tokenizer=tiny_tokenizer("byte"), max_position_embeddings=16)
    for policy in (ByteLevel(lm), ByteLevel(lm, [lm])):
        done = policy.generate(["ba mo ba mo"], Sampling(max_new_tokens=60, samples=8))
        assert set(done.finish_reasons) <= {"length", "stop"} and "length" in done.finish_reasons
        assert max(map(len, done.tokens)) <= 24
    with pytest.raises(UsageError, match="prompt 0 has .* shorten it"):
        ByteLevel(lm).generate(["x" * 40])
    with pytest.raises(UsageError, match="does not fit the context"):
        ByteLM(lm).score(["ba mo"], ["x" * 40])


@quiet
def test_nothing_to_say_and_nothing_asked(table: Table) -> None:
    for policy in (ByteLevel(table), ByteLevel(table, [table])):
        done = policy.generate(["<s>ab"], Sampling(max_new_tokens=0, samples=2))
        assert (done.texts, done.tokens, done.finish_reasons) == (["", ""], [[], []], ["length"] * 2)
        assert len(policy.generate([], PLAIN)) == 0
    with pytest.raises(UsageError, match="prompt 1 is empty"):
        ByteLevel(table).generate(["<s>ab", " "])


@quiet
def test_the_tokens_boundary_is_the_policy_itself() -> None:
    lm = tiny_lm(tokenizer=tiny_tokenizer("byte"))
    sampling = Sampling(max_new_tokens=6, samples=2)
    done, plain = ByteLevel(lm, prompt_boundary="tokens").generate(["ba m"], sampling), lm.generate(["ba m"], sampling)
    assert (done.texts, done.tokens, done.cost.tokens) == (plain.texts, plain.tokens, plain.cost.tokens)


@quiet
def test_a_steered_model_and_best_of_n() -> None:
    """The control shapes what is read: behind the prompt's own encoding, the pushed logits summed by first byte."""
    lm = tiny_lm(tokenizer=tiny_tokenizer("byte"))
    push = torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(0))
    steered = Steered(lm, FunctionControl(lambda hidden: hidden + push))
    model, ids = ByteLM(steered, boundary="tokens"), lm.encode(["ba mo"])
    allowed = model.view.allowed(model.view.walk(ids[0]))  # type: ignore[arg-type]
    (chances,) = lm.head(lm.session(ids).hidden + push).exp()
    expected = torch.zeros(257)
    for token, data in enumerate(model.view.data):
        if data is not None and allowed[token]:
            expected[data[0]] += chances[token]
    expected[END] = chances[lm.tokenizer.eos_token_id]
    ours = model.start(["ba mo"]).logprobs.exp()[0]
    assert torch.allclose(ours.float(), expected / expected.sum(), atol=1e-6)
    assert not torch.allclose(ours, ByteLM(lm, boundary="tokens").start(["ba mo"]).logprobs.exp()[0], atol=1e-3)
    best = BestOfN(ByteLevel(steered), lambda prompts, texts: [float(len(text)) for text in texts], n=3)
    assert len(best.generate(["ba m", "tu"], Sampling(max_new_tokens=4))) == 2


@quiet
def test_made_by_name() -> None:
    lm, other = tiny_lm(tokenizer=tiny_tokenizer("byte")), tiny_lm(tokenizer=tiny_tokenizer("byte"), name="other")
    parts: Any = SimpleNamespace(policy=lm, load={"b": other}.__getitem__)
    policy: Any = make(ByteLevel, parts, ByteLevelConfig(models=("b",), weights="bayesian"))
    assert [model.lm for model in policy.models] == [lm, other] and policy.config.weights == "bayesian"
    assert policy.name == "byte-level+other" and not ByteLevel.NEEDS_REWARD
