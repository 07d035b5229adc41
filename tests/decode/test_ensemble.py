"""Ensembles: the distribution drawn from is the vote, whatever the tokens; CoRE and proxy tuning on the same sessions."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from decode_words import permuted
from tiny import tiny_lm
from trimtab import LM, Cost, Sampling, Steered, pocket
from trimtab.control import FunctionControl
from trimtab.decode.core import Core
from trimtab.decode.ensemble import Ensemble, EnsembleConfig, LostMass, likeliest, of_words, refuse_normalizer
from trimtab.decode.proxy_tuning import ProxyTuning
from trimtab.errors import UsageError

PROMPTS = [" the cat", " a dog ran on the"]
GREEDY = Sampling(max_new_tokens=8, temperature=0)
PLAIN = Sampling(max_new_tokens=8)


def shuffled(seed: int = 3) -> LM:
    order = list(range(11))
    random.Random(seed).shuffle(order)
    return permuted(order)


@pytest.fixture(scope="module")
def pocket_models() -> dict[str, LM]:
    return {name: LM.load(f"pocket/{name}") for name in ("base", "chat", "nano")}


def logits_of(policy: Any, prompts: list[str], sampling: Sampling = PLAIN) -> torch.Tensor:
    return policy.open(prompts, sampling, Cost()).logits


@pytest.mark.parametrize("align", ["union", "intersection", "mined", "eva", "unite"])
@pytest.mark.parametrize("method", [Ensemble, Core])
def test_a_model_with_itself_under_other_numbers_is_itself(align: str, method: Any) -> None:
    main = permuted()
    both = method(main, [shuffled()], align=align, k=0 if align != "unite" else 11)
    torch.testing.assert_close(
        logits_of(both, PROMPTS).softmax(-1), logits_of(main, PROMPTS).softmax(-1), atol=1e-6, rtol=0
    )
    assert both.generate(PROMPTS, GREEDY).texts == main.generate(PROMPTS, GREEDY).texts


def test_the_plain_average() -> None:
    """Two models with one vocabulary: P is the mean of the two softmaxes; no assistant would be an error."""
    one, two = tiny_lm("llama"), tiny_lm("qwen2")
    both = Ensemble(one, [two])
    prompts = ["ba da fa la", "ma na"]
    mean = (logits_of(one, prompts).softmax(-1) + logits_of(two, prompts).softmax(-1)) / 2
    torch.testing.assert_close(logits_of(both, prompts).softmax(-1), mean, atol=1e-6, rtol=0)
    with pytest.raises(UsageError, match="at least one assistant"):
        Ensemble(one, [])


def test_the_vote_over_surfaces_is_what_is_drawn(pocket_models: dict[str, LM]) -> None:
    """The next whole surfaces of 6,000 draws against the union's exact distribution: chi-square, p > 0.001.

    Surfaces that nano has no token for are spelled; a token drawn for one is followed by its rest.
    """
    from scipy.stats import chisquare

    base, nano = pocket_models["base"], pocket_models["nano"]
    both = Ensemble(nano, [base])
    prompt = str(pocket.prompts("test", 40, seed=0)[29])  # a sum: base writes " 6" as one token, nano as two
    q_nano, q_base = (logits_of(lm, [prompt])[0].softmax(-1) for lm in (nano, base))
    index, extra = both.alignments[0].index, both.alignments[0].extra
    exact = torch.zeros(both.alignments[0].size)
    exact[: nano.vocab_size] = q_nano / 2
    exact.index_add_(0, index[index >= 0], q_base[index >= 0] / 2)
    surface = [word or b"</s>" for word in both.surfaces[0]] + extra
    session = both.open([prompt], PLAIN, Cost())
    mass, choices = session.logits[0].softmax(-1), session.choices[0]
    spelled_mass = sum(p for options in choices.values() for p, rest in options if rest)
    assert spelled_mass > 0.1  # otherwise the test says nothing
    drawn: dict[bytes, int] = {}
    draws = 6000
    tokens = torch.multinomial(mass, draws, True, generator=torch.Generator().manual_seed(0)).tolist()
    for number, token in enumerate(tokens):
        session.seed = number
        rest = session._rest(0, token)
        word = b"".join(both.surfaces[0][t] or b"</s>" for t in [token, *rest])
        drawn[word] = drawn.get(word, 0) + 1
    by_word: dict[bytes, float] = {}
    for word, p in zip(surface, exact.tolist(), strict=True):
        by_word[word] = by_word.get(word, 0.0) + p
    likely = [word for word, p in by_word.items() if p * draws >= 8]
    seen = [drawn.get(word, 0) for word in likely]
    expected = [by_word[word] * draws for word in likely]
    seen.append(draws - sum(seen))
    expected.append(draws - sum(expected))
    assert chisquare(seen, expected, sum_check=False).pvalue > 0.001


def test_a_spelled_surface_is_finished_without_another_vote(pocket_models: dict[str, LM]) -> None:
    both = Ensemble(pocket_models["base"], [pocket_models["nano"]])
    session = both.open(["Q: Where does Anna live?\nA:"] * 3, PLAIN, Cost())
    session.pending = [[], [70, 71], [72]]
    logits = session.logits
    assert logits[1].argmax() == 70 and logits[1].softmax(-1)[70] == 1 and logits[2].argmax() == 72
    session.append(torch.tensor([75, 70, 72]))
    assert session.pending == [[], [71], []]
    assert session.fork([1, 0]).pending == [[71], []]
    order = session.drop([0])
    assert session.pending == [[[], [71], []][old] for old in order]
    session.rewind(session.lengths - 1)
    assert session.pending == [[], []]


def test_batch_equals_singles_and_cache_equals_fresh(pocket_models: dict[str, LM]) -> None:
    prompts = pocket.prompts("test", 4, seed=0)
    for align in ("union", "unite"):
        both = Core(pocket_models["base"], [pocket_models["nano"]], align=align)
        together = both.generate(prompts, Sampling(24, 0))
        assert together.texts == [both.generate([prompt], Sampling(24, 0)).texts[0] for prompt in prompts]
        # the vote after six tokens, with caches, equals the vote of a session that begins there
        session = both.open(prompts, GREEDY, Cost())
        for _ in range(6):
            session.append(session.logits.argmax(-1))
        written = [both.lm.decode(answer) for answer in session.answers()]
        again = both.open(prompts, GREEDY, Cost())
        again.append([list(answer) for answer in session.answers()])
        again.pending = [list(rest) for rest in session.pending]
        assert [both.lm.decode(answer) for answer in again.answers()] == written
        torch.testing.assert_close(again.logits.softmax(-1), session.logits.softmax(-1), atol=1e-4, rtol=0)


def test_the_gate_asks_only_where_the_main_model_is_unsure(pocket_models: dict[str, LM]) -> None:
    base, nano = pocket_models["base"], pocket_models["nano"]
    prompts = pocket.prompts("test", 4, seed=1)
    never = Ensemble(base, [nano], gate=1e-9).generate(prompts, Sampling(24, 0))
    assert never.texts == base.generate(prompts, Sampling(24, 0)).texts
    sometimes = Ensemble(base, [nano], gate=0.5).generate(prompts, Sampling(24, 0))
    always = Ensemble(base, [nano]).generate(prompts, Sampling(24, 0))
    assert never.cost.tokens["pocket/nano"] < sometimes.cost.tokens["pocket/nano"] <= always.cost.tokens["pocket/nano"]


def test_unite_shares_a_sub_token_between_the_surfaces_that_begin_with_it() -> None:
    lm = permuted()
    logits = torch.randn(lm.vocab_size, generator=torch.Generator().manual_seed(0)).double()
    own = [None, *[b" " + word for word in (b"the", b"cat", b"dog")]]
    p = of_words(lm, own, [b" cat", b" dog"], logits)
    torch.testing.assert_close(p, logits[torch.tensor([2, 3])].softmax(-1), atol=1e-12, rtol=0)
    twice = of_words(lm, own, [b" cat", b" cat", b" dog"], logits)
    torch.testing.assert_close(twice[0] + twice[1], p[0], atol=1e-12, rtol=0)


def test_the_likeliest_tokens() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    torch.testing.assert_close(likeliest(logits, 2)[0], torch.tensor([0.0, *torch.tensor([3.0, 2.0]).softmax(-1), 0.0]))
    torch.testing.assert_close(likeliest(logits, 0), logits.softmax(-1))


def test_what_an_alignment_loses_is_said() -> None:
    main, other = permuted(), permuted(words=["x", "y", "z"])
    with pytest.warns(LostMass, match="has a place among the tokens"):
        answers = Ensemble(main, [other], align="intersection").generate(PROMPTS, PLAIN)
    assert answers.telemetry[0]["kept"]["words0"] < 0.9


def test_members_may_be_steered_and_ensembles_nest() -> None:
    one, two = tiny_lm("llama"), tiny_lm("qwen2")
    pushed = Steered(two, FunctionControl(lambda hidden: hidden + 0.5))
    both = Ensemble(Ensemble(one, [two]), [pushed])
    prompts = ["ba da"]
    mean = (logits_of(one, prompts).softmax(-1) + logits_of(two, prompts).softmax(-1)) / 2
    expected = (mean + logits_of(pushed, prompts).softmax(-1)) / 2
    torch.testing.assert_close(logits_of(both, prompts).softmax(-1), expected, atol=1e-6, rtol=0)


def test_the_kl_is_from_the_main_model(pocket_models: dict[str, LM]) -> None:
    answers = Ensemble(pocket_models["base"], [pocket_models["chat"]]).generate(
        pocket.prompts("test", 4, seed=2), PLAIN
    )
    assert answers.kl is not None and all(0 <= kl < 0.7 for row in answers.kl for kl in row)  # at most log 2


def test_proxy_tuning(pocket_models: dict[str, LM]) -> None:
    """base * chat / base is chat; weight 0 is the base; other tokens are refused."""
    base, chat, nano = (pocket_models[name] for name in ("base", "chat", "nano"))
    prompts = pocket.prompts("test", 6, seed=3)
    assert ProxyTuning(base, chat, base).generate(prompts, PLAIN).texts == chat.generate(prompts, PLAIN).texts
    assert ProxyTuning(base, chat, base, 0.0).generate(prompts, PLAIN).texts == base.generate(prompts, PLAIN).texts
    half = ProxyTuning(base, chat, base, 0.5)
    expected = (logits_of(base, prompts).log_softmax(-1) + logits_of(chat, prompts).log_softmax(-1)) / 2
    torch.testing.assert_close(logits_of(half, prompts).softmax(-1), expected.softmax(-1), atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match="other tokens"):
        ProxyTuning(base, nano, base)
    with pytest.raises(UsageError, match="finite"):
        ProxyTuning(base, chat, base, float("inf"))


@pytest.mark.parametrize("options", [{"models": ()}, {"k": -1}, {"gate": 0.0}, {"gate": 1.5}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        EnsembleConfig(**options)


def test_a_tokenizer_that_lower_cases_is_refused() -> None:
    from tokenizers import normalizers

    lm = permuted(words=["The", "Cat", "ran,", "THE", "end.", "the", "cat"])
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    lm.tokenizer.backend_tokenizer.model.unk_token = "</s>"
    with pytest.raises(UsageError, match="changes letters"):
        refuse_normalizer(_Lower(lm))


class _Lower:
    """A tokenizer that gives back lower-cased text."""

    name = "lower"

    def __init__(self, lm: LM):
        self.tokenizer = self

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text.lower()]}

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, tokens))


def test_core_resists_a_broken_alignment(pocket_models: dict[str, LM]) -> None:
    """20 % of the alignment's rows at random: on 64 questions, greedy, CoRE loses less gold than the plain average.

    Paired by question over both ensembles' own loss (clean less broken), 95 % interval of the difference of losses.
    """
    from trimtab.measure.stats import paired_difference

    base, chat = pocket_models["base"], pocket_models["chat"]
    prompts, sampling = pocket.prompts("test", 64, seed=4), Sampling(48, 0)

    def gold(policy: Any) -> torch.Tensor:
        answers = policy.generate(prompts, sampling)
        return torch.tensor(
            [pocket.judge(str(p), t).score for p, t in zip(answers.prompts, answers.texts, strict=True)]
        )

    lost = []
    for method in (Ensemble, Core):
        clean, broken = method(base, [chat]), method(base, [chat])
        index = broken.alignments[0].index
        generator = torch.Generator().manual_seed(0)
        rows = torch.randperm(len(index), generator=generator)[: len(index) // 5]
        index[rows] = torch.randint(0, base.vocab_size, (len(rows),), generator=generator)
        lost.append(gold(clean) - gold(broken))
    found = paired_difference(lost[0].tolist(), lost[1].tolist())
    assert found.low is not None and found.low > 0
