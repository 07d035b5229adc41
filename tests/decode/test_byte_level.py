"""Byte probabilities against enumeration of token sequences; prompts; what is refused.

Where all is float64 the tolerance is 1e-12: a few hundred products of probabilities are added up.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from oracles.byte_table import BOS, EOS, MERGES, Brute, Table, tokenizer
from tiny import tiny_lm, tiny_tokenizer
from trimtab import LM, Completions, Sampling
from trimtab.decode.byte_level import ByteLevel
from trimtab.decode.byte_lm import END, ByteLM
from trimtab.decode.byte_splits import MARKER
from trimtab.errors import TrimtabError, UsageError

TEXTS = ["".join(text) for size in range(1, 6) for text in itertools.product("abc", repeat=size)]
PLAIN = Sampling()


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
    long = "abc" * 300  # e^-989, which no float holds (they end at e^-745)
    (whole,), (steps,) = model.prefix_logprobs([f"<s>{long}"]), model.score(["<s>"], [long])
    assert whole == pytest.approx(float(steps.sum()), rel=1e-12) and whole < -745


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


def test_unknown_choices_are_refused(table: Table) -> None:
    with pytest.raises(UsageError, match="unknown prompt_boundary 'token'; did you mean 'tokens'"):
        ByteLevel(table, prompt_boundary="token")  # type: ignore[arg-type]


def test_a_prompt_of_probability_zero_is_refused(table: Table) -> None:
    never = Table(table.tokenizer)
    never.logits_after = lambda tokens: torch.where(torch.arange(never.vocab_size) == EOS, 0.0, -torch.inf)  # type: ignore[assignment]
    with pytest.raises(UsageError, match="table gives prompt 0 probability 0"):
        ByteLM(never).start(["<s>ab"])


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
