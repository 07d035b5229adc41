"""Byte probabilities against enumeration of token sequences; sampling, ensembles and refusals.

`Table` is a language model whose logits are a random function of the whole history in float64, so sums over token sequences
and over bytes agree to rounding (1e-12 where a few hundred products of probabilities are added up).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from scipy.stats import chisquare
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tiny import tiny_lm, tiny_tokenizer
from trimtab import LM, Completions, Cost, Sampling, Steered
from trimtab.control import FunctionControl
from trimtab.decode.best_of_n import BestOfN
from trimtab.decode.byte_level import ByteLevel, ByteLevelConfig, Leak, mixture
from trimtab.decode.byte_lm import END, ByteLM
from trimtab.decode.byte_splits import MARKER
from trimtab.errors import TrimtabError, UsageError
from trimtab.parts import make

BOS, EOS = 0, 1
MERGES = [("a", "b"), ("b", "a"), ("ab", "a"), ("a", "a"), ("ab", "ab"), ("c", "ab"), ("aba", "c")]
TEXTS = ["".join(text) for size in range(1, 6) for text in itertools.product("abc", repeat=size)]
PLAIN = Sampling()


def tokenizer(merges: Sequence[tuple[str, str]] = (), units: str = "abc", bos: bool = True, **options: Any) -> Any:
    """<s>, </s>, the units and what merges make of them."""
    vocab = {text: number for number, text in enumerate(["<s>", "</s>", *units])}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    raw = Tokenizer(models.BPE(vocab, list(merges), **options))
    template = "<s> $A" if bos else "$A"
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", BOS)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


class TableSession:
    """The part of a session that byte-level uses."""

    guided, base_logits = False, None

    def __init__(self, lm: Table, rows: Sequence[Sequence[int]], meter: Cost | None):
        self.lm, self.content, self.meter = lm, [list(row) for row in rows], meter or Cost()

    rows = property(lambda self: len(self.content))
    lengths = property(lambda self: torch.tensor([len(row) for row in self.content]))

    @property
    def logits(self) -> torch.Tensor:
        return torch.stack([self.lm.logits_after(tuple(row)) for row in self.content])

    def append(self, tokens: Any) -> None:
        more = tokens[:, None].tolist() if isinstance(tokens, torch.Tensor) else tokens
        for row, added in zip(self.content, more, strict=True):
            row.extend(added)

    def fork(self, rows: Sequence[int]) -> TableSession:
        return TableSession(self.lm, [self.content[row] for row in rows], self.meter)

    def drop(self, rows: Sequence[int]) -> list[int]:
        kept = [row for row in range(self.rows) if row not in set(rows)]
        self.content = [self.content[row] for row in kept]
        return kept

    def rewind(self, lengths: Sequence[int]) -> None:
        self.content = [row[:length] for row, length in zip(self.content, lengths, strict=True)]


class Table(LM):
    """See the module. "<s>" alone is the empty prompt."""

    def __init__(self, tokenizer: Any, seed: int = 0, spread: float = 2.0, name: str = "table"):
        self.tokenizer, self.seed, self.spread, self.name = tokenizer, seed, spread, name
        self.context_length, self.batch_rows = None, 10**6
        self.logits_after = lru_cache(maxsize=None)(self._logits_after)

    vocab_size = property(lambda self: len(self.tokenizer))  # type: ignore[assignment]
    eos_ids = frozenset({EOS})  # type: ignore[assignment]

    def _logits_after(self, tokens: tuple[int, ...]) -> torch.Tensor:
        seed = random.Random(f"{self.seed} {tokens}").getrandbits(60)
        return self.spread * torch.randn(
            self.vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )

    def session(self, prompts: Any, control: Any = None, meter: Cost | None = None) -> Any:
        return TableSession(self, prompts, meter)


class Brute:
    """Probabilities by enumeration of token sequences; a token is valid iff the text so far, encoded again, says so."""

    def __init__(self, lm: Table):
        self.lm = lm
        self.text = [lm.tokenizer.convert_ids_to_tokens(token) for token in range(lm.vocab_size)]
        self.after = lru_cache(maxsize=None)(self._after)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.lm.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _after(self, tokens: tuple[int, ...]) -> list[float]:
        said = "".join(self.text[token] for token in tokens)
        valid = [False, True, *(self.encode(said + text) == (*tokens, at) for at, text in enumerate(self.text[2:], 2))]
        cut = self.lm.logits_after((BOS, *tokens)).masked_fill(~torch.tensor(valid), -torch.inf)
        return list(cut.softmax(-1).tolist())

    def prefix(self, text: str, tokens: tuple[int, ...] = ()) -> float:
        """P(text begins so), every path of tokens followed until it covers the text."""
        total = 0.0
        for token, chance in enumerate(self.after(tokens)):
            if token > EOS and chance:
                piece = self.text[token]
                if piece.startswith(text):
                    total += chance
                elif text.startswith(piece):
                    total += chance * self.prefix(text[len(piece) :], (*tokens, token))
        return total

    def whole(self, text: str) -> float:
        """P(text, end)."""
        tokens = self.encode(text)
        steps = [self.after(tokens[:at])[token] for at, token in enumerate(tokens)]
        return math.prod(steps) * self.after(tokens)[EOS]


@pytest.fixture(scope="module")
def table() -> Table:
    return Table(tokenizer(MERGES))


@pytest.fixture(scope="module")
def brute(table: Table) -> Brute:
    return Brute(table)


# exact


def test_prefix_probabilities_are_those_of_enumeration(table: Table, brute: Brute) -> None:
    """All 363 texts of 1 to 5 bytes."""
    found = ByteLM(table).prefix_logprobs([f"<s>{text}" for text in TEXTS])
    assert len(found) == 363
    for text, logprob in zip(TEXTS, found, strict=True):
        assert abs(math.exp(logprob) - brute.prefix(text)) < 1e-12


def test_probabilities_add_up(table: Table) -> None:
    """sum_b P(x b) + P(x, end) = P(x); all texts of 4 bytes and all shorter whole ones have probability 1."""
    model = ByteLM(table)
    prefix = dict(zip(TEXTS, map(math.exp, model.prefix_logprobs([f"<s>{text}" for text in TEXTS])), strict=True))
    prefix[""] = 1.0
    short = [text for text in prefix if len(text) < 5]
    ends = dict(zip(short, model.start([f"<s>{text}" for text in short]).logprobs[:, END].exp().tolist(), strict=True))
    for text in short:
        assert abs(sum(prefix[text + byte] for byte in "abc") + prefix[text] * ends[text] - prefix[text]) < 1e-12
    stopped = sum(prefix[text] * ends[text] for text in short if len(text) < 4)
    assert abs(sum(prefix[text] for text in prefix if len(text) == 4) + stopped - 1) < 1e-12


def test_whole_texts_have_the_probability_of_their_encoding(table: Table, brute: Brute) -> None:
    """The chain rule: the byte model and the token model agree on complete texts."""
    texts = TEXTS[::7]
    for text, logprobs in zip(texts, ByteLM(table).score(["<s>"] * len(texts), texts, end=True), strict=True):
        assert len(logprobs) == len(text) + 1
        assert float(logprobs.sum()) == pytest.approx(math.log(brute.whole(text)), abs=1e-12)


def test_the_empty_prompt_has_probability_one(table: Table) -> None:
    model = ByteLM(table)
    assert model.prefix_logprobs(["<s>"]) == [0.0]
    chances, branches = model.start(["<s>"]).cover(0)
    assert chances.tolist() == [1.0] and model.start(["<s>"]).member(branches, 0) == ((), b"")


def test_narrowing_a_cover_is_searching_it_afresh(table: Table) -> None:
    """For every text of 5 bytes and every next byte: the same members with the same probabilities."""
    model = ByteLM(table)
    prompts = [text for text in TEXTS if len(text) == 5]
    narrowed = model.start([f"<s>{text}" for text in prompts])
    for byte in "abc":
        after = narrowed.fork(range(len(prompts)))
        after.step([ord(byte)] * len(prompts))
        fresh = model.start([f"<s>{text}{byte}" for text in prompts])
        for row, text in enumerate(prompts):
            covers = []
            for session in (after, fresh):
                chances, branches = session.cover(row)
                found = {session.member(branches, at): chance for at, chance in enumerate(chances.tolist()) if chance}
                covers.append(found)
            assert set(covers[0]) == set(covers[1])
            assert {tokens for tokens, _ in covers[0]} <= model.view.members(f"{text}{byte}".encode())
            assert all(abs(covers[0][member] - covers[1][member]) < 1e-12 for member in covers[0])


def test_long_texts_stay_exact(table: Table) -> None:
    """200 random bytes in float64: every step's distribution adds up to 1, and equals that of a fresh search to 1e-10."""
    model, rng = ByteLM(table), random.Random(0)
    session, text = model.start(["<s>"]), ""
    for at in range(200):
        assert abs(float(session.mass) - 1) < 1e-12
        if at % 40 == 0:
            fresh = model.start([f"<s>{text}"])
            assert torch.allclose(
                fresh.logprobs[:, [97, 98, 99, END]], session.logprobs[:, [97, 98, 99, END]], atol=1e-10
            )
        text += rng.choice("abc")
        session.step([ord(text[-1])])
    (whole,) = model.prefix_logprobs([f"<s>{text}"])
    assert session.texts[0].logprob == pytest.approx(whole, abs=1e-10)


def test_a_real_model_in_float32() -> None:
    """A byte-level Llama with its cache: stepping equals starting afresh to float32 (1e-4 relative, 32 layers' worth)."""
    lm = tiny_lm(tokenizer=tiny_tokenizer("byte"))
    model, prompts = ByteLM(lm), ["ba mo", " tuba", "x\u00e9 mo", "bb"]
    texts = ["ba motu ba", "ba \u00e9 mo", "tu mo mob ", "a mba tuuu"]
    session = model.start(prompts)
    sizes = [len(text.encode()) for text in texts]
    for at in range(min(sizes)):
        assert torch.allclose(session.mass, torch.ones(4, dtype=torch.float64), atol=1e-6)
        try:
            fresh = [prompt + text.encode()[:at].decode() for prompt, text in zip(prompts, texts, strict=True)]
        except UnicodeDecodeError:
            fresh = []
        if fresh:
            assert torch.allclose(model.start(fresh).logprobs.exp(), session.logprobs.exp(), rtol=1e-4, atol=1e-9)
        session.step([text.encode()[at] for text in texts])


@pytest.mark.parametrize("name", ["pocket/base", "pocket/nano"])
def test_pocket_models_add_up(name: str) -> None:
    """sum_b P(x b) + P(x, end) = P(x) to 1e-6, each of these by its own search in the model's float32."""
    model = ByteLM(LM.load(name))
    for prompt in ("Q: Where does An", "Q: What is 3 + 4 ", "Q: It's no"):
        data = prompt.encode()
        legal = [bytes([byte]) for byte in range(0x80) if model.view.cover(data + bytes([byte]))]
        (whole, *longer) = model.prefix_logprobs([prompt, *((data + byte).decode() for byte in legal)])
        session = model.start([prompt])
        wide = float(session.logprobs.exp()[0, 0x80:END].sum())  # these are no texts of their own
        end = float(session.logprobs.exp()[0, END])
        assert sum(map(math.exp, longer)) / math.exp(whole) + wide + end == pytest.approx(1, abs=1e-6)
        assert float(session.mass) == pytest.approx(1, abs=1e-6)


def test_sentencepiece_with_byte_fallback(stories260k: Any) -> None:
    """stories260k: the dummy space and characters as bytes. Its text, drawn greedily byte by byte, is its greedy answer."""
    lm = LM.load(stories260k)
    start, greedy = "Once upon a time, there was a li", Sampling(max_new_tokens=12, temperature=0)
    done = ByteLevel(lm).generate([start], greedy)
    plain = lm.generate(["Once upon a time, there was a"], greedy.but(max_new_tokens=16))
    assert plain.texts[0].startswith("little girl") or plain.texts[0].startswith(" little girl")
    assert done.texts[0].startswith("ttle girl")
    session = ByteLM(lm).start([start, "a caf\u00e9 \u2014 "])
    for byte in "\u4e2d".encode():
        assert torch.allclose(session.mass, torch.ones(2, dtype=torch.float64), atol=1e-6)
        session.step([byte, byte])
    assert session.logprobs.exp().sum(-1).tolist() == pytest.approx([1, 1])


def test_the_bias_of_a_cut_prompt() -> None:
    """After "ab" of a model that writes aba or ab, end: the prompt's own token has been chosen by training already."""
    lm = Table(tokenizer([("a", "b"), ("ab", "a")]))
    ab, aba = (lm.tokenizer.convert_tokens_to_ids(text) for text in ("ab", "aba"))
    favours = {(BOS,): {aba: 0.9, ab: 0.1}, (BOS, ab): {EOS: 1.0}, (BOS, aba): {EOS: 1.0}}
    lm.logits_after = lambda tokens: torch.tensor(  # type: ignore[assignment]
        [math.log(favours.get(tokens, {}).get(token, 1e-9)) for token in range(lm.vocab_size)], dtype=torch.float64
    )
    chance = {
        boundary: float(ByteLM(lm, boundary=boundary).start(["<s>ab"]).logprobs[0, ord("a")].exp())  # type: ignore[arg-type]
        for boundary in ("exact", "healed", "tokens")
    }
    assert chance["exact"] == pytest.approx(0.9, abs=1e-6) and chance["healed"] == pytest.approx(0.9, abs=1e-6)
    assert chance["tokens"] < 1e-6


# token healing, and the model's own probabilities


def test_token_healing_is_a_part_of_the_cover(table: Table) -> None:
    """The members whose left context is the encoding without its last token, scaled to 1."""
    exact, healed = ByteLM(table), ByteLM(table, boundary="healed")
    for text in TEXTS[20::11]:
        chances, branches = exact.start([f"<s>{text}"]).cover(0)
        members = {exact.start(["<s>"]).member(branches, at)[0]: chance for at, chance in enumerate(chances.tolist())}
        kept = tuple(exact.view.encode(text.encode())[:-1])
        part = {tokens: chance for tokens, chance in members.items() if tokens[:-1] == kept}
        chances, branches = healed.start([f"<s>{text}"]).cover(0)
        found = {healed.start(["<s>"]).member(branches, at)[0]: chance for at, chance in enumerate(chances.tolist())}
        assert set(found) == set(part)
        total = sum(part.values())
        assert all(abs(found[tokens] - part[tokens] / total) < 1e-12 for tokens in part)


def test_raw_probabilities(table: Table, brute: Brute) -> None:
    """semantics="raw": the model's own probability of each member, scaled over the next symbol alone."""
    model = ByteLM(table, semantics="raw")

    def raw(tokens: tuple[int, ...]) -> float:
        steps = [table.logits_after((BOS, *tokens[:at])).softmax(-1)[token] for at, token in enumerate(tokens)]
        return float(math.prod(steps))

    for text in TEXTS[3::17]:
        session = model.start([f"<s>{text}"])
        weights = [sum(raw(t) for t in model.view.members(f"{text}{byte}".encode())) for byte in "abc"]
        own = brute.encode(text)
        weights.append(raw(own) * float(table.logits_after((BOS, *own)).softmax(-1)[EOS]))
        expected = torch.tensor(weights) / sum(weights)
        assert torch.allclose(session.logprobs[0, [97, 98, 99, END]].exp(), expected.double(), atol=1e-7)
        assert float(session.mass) < 1  # it leaks


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


# prompts


def test_special_tokens_are_the_trunk() -> None:
    """What stands before the last special token stays; suffix first, the prefix behind it is what is covered."""
    raw = tokenizer([("a", "b"), ("ab", "a")])
    raw.add_special_tokens({"additional_special_tokens": ["<suf>", "<pre>"]})
    lm = Table(raw)
    model = ByteLM(lm)
    suffix, prefix = raw.convert_tokens_to_ids(["<suf>", "<pre>"])
    context = model.context("<suf>cab<pre>ab")
    assert context.trunk == [BOS, suffix, *raw("cab", add_special_tokens=False)["input_ids"], prefix]
    assert context.data == b"ab"
    assert {model.view.bytes_of(tokens) for tokens in model.view.members(context.data)} == {b"ab", b"aba"}
    assert model.context("ab<pre>").data == b""  # prefix first: nothing to mend
    assert model.view.data[prefix] is None


def test_without_a_special_token_the_first_token_stays() -> None:
    lm = Table(tokenizer(MERGES, bos=False))
    context = ByteLM(lm).context("abab" + "ca")
    first, *rest = lm.tokenizer("ababca")["input_ids"]
    assert context.trunk == [first] and list(context.tokens) == rest and context.config.last == first
    assert ByteLM(lm).prefix_logprobs(["a"]) == [0.0]


def test_a_chat_template_is_text_behind_its_last_special_token() -> None:
    chat = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}ba{% endif %}"
    lm = tiny_lm(tokenizer=tiny_tokenizer("byte", chat=chat))
    context = ByteLM(lm).context("tu mo")
    assert context.trunk == [lm.tokenizer.bos_token_id] and context.data == b"tu moba"


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


# what is refused


class Answers:
    name = "answers"

    def generate(self, prompts: Sequence[Any], sampling: Sampling = PLAIN) -> Completions:
        raise NotImplementedError


def test_what_has_no_logits_is_refused() -> None:
    with pytest.raises(UsageError, match="answers is none: wrap the model"):
        ByteLevel(Answers())


def test_bytes_that_no_token_spells_are_refused_with_their_offset() -> None:
    lm = Table(tokenizer(MERGES, units="abc", unk_token=None))
    model = ByteLM(lm)
    with pytest.raises(UsageError, match=r"byte 1 \(b'd'\) of b'ad' cannot be spelt"):
        model.lefts(model.context("<s>a")._replace(data=b"ad", tokens=(2,)))
    (gone,) = model.score(["<s>a"], ["bdb"])
    assert gone[0] > -math.inf and gone[1:].tolist() == [-math.inf, -math.inf]


def test_a_repetition_penalty_over_bytes_is_refused(table: Table) -> None:
    with pytest.raises(UsageError, match="repetition penalty counts tokens"):
        ByteLevel(table, [table]).generate(["<s>a"], Sampling(repetition_penalty=1.2))


def test_weights_that_are_no_numbers_are_refused(table: Table) -> None:
    broken = Table(table.tokenizer)
    broken.logits_after = lambda tokens: torch.full((broken.vocab_size,), torch.nan)  # type: ignore[assignment]
    with pytest.raises(TrimtabError, match="logits that are not numbers"):
        ByteLM(broken).start(["<s>ab"])


def test_the_marker_is_a_space() -> None:
    """Sentencepiece text with the marker in it cannot be told from a space, so it has no probability of its own."""
    raw = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2, MARKER: 3, f"{MARKER}a": 4}, [(MARKER, "a")]))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    lm = Table(tf.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>"))
    model = ByteLM(lm)
    assert model.context("a a").data == b"a a"
    assert model.view.members(b"a ") == {(2, 3), (2, 4)}
    assert model.view.cover(MARKER.encode()) == []
