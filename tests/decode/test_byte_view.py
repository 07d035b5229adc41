"""The tokenizer seen from the bytes: cuts, pairs, reachable sequences and covers, each against the tokenizers library."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tiny import byte_tokenizer
from trimtab import pocket
from trimtab.decode.byte_bpe import BYTE_ALPHABET, Vocabulary
from trimtab.decode.byte_splits import MARKER, PATTERNS, Splitter, code_range, splitter
from trimtab.decode.byte_view import START, ByteView, Config
from trimtab.errors import UsageError

GPT2, QWEN, LLAMA3 = PATTERNS
NANO = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Metaspace(prepend_scheme="never"),
        pre_tokenizers.Split(Regex(r"[.,!?:]|\n"), "isolated"),
    ]
)
DIGITS_GPT2 = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
BYTES = {byte: character for character, byte in BYTE_ALPHABET.items()}


def bpe(units: Iterable[str], merges: Sequence[tuple[str, str]], pre: Any = None, **options: Any) -> Tokenizer:
    vocab = {unit: number for number, unit in enumerate(units)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    out = Tokenizer(models.BPE(vocab, list(merges), **options))
    if pre is not None:
        out.pre_tokenizer = pre
    return out


def random_merges(alphabet: str, count: int, rng: random.Random, ordered: bool = True) -> list[tuple[str, str]]:
    """A merge list that training could have made; not `ordered`: the same merges shuffled, and other splits of a token."""
    pieces, merges = list(alphabet), list[tuple[str, str]]()
    while len(merges) < count:
        pair = rng.choice(pieces), rng.choice(pieces)
        if pair not in merges and "".join(pair) not in pieces and len("".join(pair)) <= 5:
            merges.append(pair)
            pieces.append("".join(pair))
    if not ordered:
        more = [(one[:cut], one[cut:]) for one in pieces for cut in range(1, len(one)) if one[:cut] in pieces]
        merges = list(dict.fromkeys([*merges, *(pair for pair in more if pair[1] in pieces)]))
        rng.shuffle(merges)
    return merges


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


# where pieces are cut


def cuts(automaton: Splitter, text: str) -> list[tuple[int, ...]]:
    """The starts of pieces in every run over the whole text that may end there."""
    runs: dict[tuple[int, ...], int] = {(): automaton.start}
    for at, character in enumerate(text):
        kind = automaton.kind(character)
        after = {
            (*starts, at) if cut else starts: automaton.step(states, kind, cut)
            for starts, states in runs.items()
            for cut in (True, False)
        }
        runs = {starts: states for starts, states in after.items() if states}
    return [starts for starts, states in runs.items() if states & automaton.ends]


@pytest.mark.parametrize(
    ("pre", "alphabet", "length"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "xsrel1!' \n", 4),
        (DIGITS_GPT2, "xsl1' \n", 4),
        (NANO, "a1. \n", 5),
        (pre_tokenizers.Split(Regex(QWEN), "isolated"), "xl1!' \n", 4),
        (pre_tokenizers.Split(Regex(LLAMA3), "isolated"), "x1' \n", 5),
    ],
    ids=["gpt2", "digits+gpt2", "nano", "qwen", "llama3"],
)
def test_every_text_is_cut_in_one_way_and_it_is_the_librarys(pre: Any, alphabet: str, length: int) -> None:
    """All texts over the kinds of characters that the pattern tells apart, and longer ones at random."""
    rng = random.Random(0)
    texts = ["".join(text) for size in range(1, length + 1) for text in itertools.product(alphabet, repeat=size)]
    letters = "xsrveltmdLS1'! \n\t\r.\u00a0\u017f\u00e9\u4e2d\u0661\u0301"
    texts += ["".join(rng.choices(letters, k=rng.randint(5, 12))) for _ in range(2000)]
    spec = json.loads(pre.__getstate__())
    automaton = splitter(spec["pretokenizers"] if spec["type"] == "Sequence" else [spec])
    for text in texts:
        assert cuts(automaton, text) == [tuple(start for _, (start, _) in pre.pre_tokenize_str(text))], repr(text)


def test_kinds_of_characters_are_the_librarys() -> None:
    """Letters, numbers, white space and others all over Unicode: newer versions assign points that Python's may not have."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    automaton = splitter([json.loads(pre.__getstate__())])
    rng = random.Random(1)
    codes = [*range(0x80, 0x800), *rng.sample([*range(0x800, 0xD800), *range(0xE000, 0x32400)], 4000), 0x1C89, 0xA7CB]
    for character in map(chr, codes):
        joins = {after: len(pre.pre_tokenize_str(after + character)) == 1 for after in "a1!"}
        expected = {"a": "L", "1": "N", "!": "O"}.get(next((after for after in "a1!" if joins[after]), ""), "W")
        assert automaton.kind(character) == expected, hex(ord(character))


def test_code_ranges_are_those_of_utf8() -> None:
    points: dict[bytes, list[int]] = {}
    for code in [*range(0xD800), *range(0xE000, 0x110000, 61), 0xFFFF, 0x10000, 0x10FFFF]:
        data = chr(code).encode()
        for size in range(1, len(data) + 1):
            points.setdefault(data[:size], []).append(code)
    for data, codes in points.items():
        found = code_range(data)
        assert found is not None and found[0] <= min(codes) and max(codes) <= found[1]
        assert len(data) < len(chr(codes[0]).encode()) or found == (codes[0], codes[0])
    for data in (b"\x80", b"\xc0\x80", b"\xc1", b"\xe0\x80", b"\xed\xa0", b"\xf4\x90", b"\xf5", b"a\x80", b"\xc3\x41"):
        assert code_range(data) is None, data


# neighbours


@pytest.mark.parametrize("ordered", [True, False])
def test_pairs_decide_whole_sequences(ordered: bool) -> None:
    """100 random merge lists: a sequence of up to 4 tokens is an encoding iff all its neighbours may stand together."""
    rng = random.Random(int(ordered))
    out_of_order = 0
    for _ in range(100):
        tokenizer = bpe("abc", random_merges("abc", rng.randint(2, 7), rng, ordered))
        known = Vocabulary(tokenizer)
        out_of_order += not known.ordered
        texts = {token: data.decode() for token, data in enumerate(known.data) if data is not None}
        assert set(texts) == {token for token, text in enumerate(_vocab(tokenizer)) if ids(tokenizer, text) == [token]}
        for size in (2, 3, 4):
            for _ in range(40):
                tokens = rng.choices(list(texts), k=size)
                stands = ids(tokenizer, "".join(texts[token] for token in tokens)) == tokens
                pairs = all(known.follows(a)[b] for a, b in itertools.pairwise(tokens))
                assert pairs == stands, (tokens, texts)
    assert out_of_order == 0 if ordered else out_of_order > 50


def _vocab(tokenizer: Tokenizer) -> list[str]:
    return [text for text, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]


def test_pairs_do_not_decide_longest_match_vocabularies() -> None:
    """Why these are refused: of a, b, c, abc every pair stands and a|b|c does not."""

    def longest_match(text: str) -> list[str]:
        out = []
        while text:
            out.append(next(piece for piece in ("abc", "a", "b", "c") if text.startswith(piece)))
            text = text[len(out[-1]) :]
        return out

    assert longest_match("ab") == ["a", "b"] and longest_match("bc") == ["b", "c"] and longest_match("abc") == ["abc"]


# reachable sequences


def spelt(view: ByteView, data: bytes) -> set[tuple[int, ...]]:
    return {left.tokens for left in view.lefts(data)[len(data)]}


@pytest.mark.parametrize("pattern", [GPT2, QWEN, LLAMA3], ids=["gpt2", "qwen", "llama3"])
def test_reachable_sequences_are_the_beginnings_of_encodings(pattern: str) -> None:
    """Every text of up to 5 characters, its encoding cut everywhere, against the view: exactly the same sequences spell the
    texts of up to 3 (2 more characters show all that the patterns look ahead for). The vocabulary has no other letters."""
    alphabet = "al' \n\u00e9" if pattern == GPT2 else "al' \n1"
    merges = [("'", "l"), (" ", " "), (" ", "a"), ("l", "l"), ("\n", "\n"), ("a", "l"), (" ", "'"), ("1", "1")]
    as_units = [tuple("".join(BYTES[byte] for byte in side.encode()) for side in pair) for pair in merges]
    units = [BYTES[byte] for byte in sorted(set("".join(alphabet).encode()))]
    merges = [pair for pair in as_units if set("".join(pair)) <= set(units)]
    pre = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer = bpe(units, merges, pre)
    view = ByteView(tokenizer)
    longest, ahead = 3, 2
    begun: dict[bytes, set[tuple[int, ...]]] = {b"": {()}}
    for size in range(1, longest + ahead + 1):
        for text in itertools.product(alphabet, repeat=size):
            tokens = ids(tokenizer, "".join(text))
            for cut in range(1, len(tokens) + 1):
                begun.setdefault(view.bytes_of(tokens[:cut]), set()).add(tuple(tokens[:cut]))
    short = {data for data in begun if len(data.decode(errors="ignore")) < longest or _whole(data, longest)}
    assert {data: spelt(view, data) for data in short} == {data: begun[data] for data in short}
    for size in range(1, longest + 1):
        for text in itertools.product(alphabet, repeat=size):
            data = "".join(text).encode()
            assert view.encode(data) == ids(tokenizer, "".join(text))
            assert spelt(view, data) == begun[data]
    again = [
        prefix for ways in begun.values() for prefix in ways if ids(tokenizer, _text(view, prefix)) != list(prefix)
    ]
    assert again  # encoding again would call these invalid


def _whole(data: bytes, size: int) -> bool:
    try:
        return len(data.decode()) == size
    except UnicodeDecodeError:
        return False


def _text(view: ByteView, tokens: Iterable[int]) -> str:
    return view.bytes_of(tokens).decode(errors="replace")


def test_the_example_of_the_contraction() -> None:
    """GPT-2's pattern with a token "'l": "x'll" is [x, 'l, l], so [x, 'l] begins an encoding, and "x'l" is [x, ', l]."""
    tokenizer = bpe([*"xlsa' ", "\u0120"], [("'", "l")], pre_tokenizers.ByteLevel(add_prefix_space=False))
    view = ByteView(tokenizer)
    x, el, quote, joined = (tokenizer.token_to_id(text) for text in ("x", "l", "'", "'l"))
    assert spelt(view, b"x'l") == {(x, joined), (x, quote, el)}
    assert view.encode(b"x'l") == [x, quote, el] and view.encode(b"x'll") == [x, joined, el]
    config = view.walk([x, joined])
    assert config is not None and not view.may_end(config)
    assert [token for token in range(view.size) if view.allowed(config)[token]] == [el]
    assert view.audit(["x'll"]).closure == [[x, joined]]


def test_what_nothing_goes_on_from_is_not_reachable() -> None:
    """The same with "'ll" a token too: then no text is encoded with 'l, though 'l is what BPE makes of its own bytes."""
    merges = [("'", "l"), ("'l", "l")]
    tokenizer = bpe([*"xlsa' ", "\u0120"], merges, pre_tokenizers.ByteLevel(add_prefix_space=False))
    view = ByteView(tokenizer)
    x, el, quote, joined, whole = (tokenizer.token_to_id(text) for text in ("x", "l", "'", "'l", "'ll"))
    assert spelt(view, b"x'l") == {(x, quote, el)} and view.walk([x, joined]) is None
    assert view.members(b"x'") == {(x, quote), (x, whole)}
    assert view.encode(b"x'll") == ids(tokenizer, "x'll") == [x, whole]


def fallback_tokenizer() -> Tokenizer:
    """A sentencepiece-like vocabulary: characters a, b, \u00e9 and the marker, other characters as bytes."""
    units = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"ab\u00e9", MARKER]
    merges = [("a", "b"), (MARKER, "a"), (MARKER, "ab"), ("\u00e9", "a"), (MARKER, MARKER)]
    out = bpe(units, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    out.normalizer = normalizers.Sequence([normalizers.Prepend(MARKER), normalizers.Replace(" ", MARKER)])
    out.add_special_tokens(["<unk>"])
    return out


def test_reachable_sequences_with_byte_fallback() -> None:
    """Characters with a token never fall back, others always do; a byte that no legal character goes on with is no token."""
    tokenizer = fallback_tokenizer()
    view = ByteView(tokenizer)
    alphabet = "ab \u00e9\u00e8\u4e2d\n"
    begun: dict[bytes, set[tuple[int, ...]]] = {}
    for size in range(1, 5):
        for text in itertools.product(alphabet, repeat=size):
            tokens = ids(tokenizer, "".join(text))
            assert view.encode(view.surface("".join(text))) == tokens
            for cut in range(1, len(tokens) + 1):
                begun.setdefault(view.bytes_of(tokens[:cut]), set()).add(tuple(tokens[:cut]))
    assert all(spelt(view, data) == ways for data, ways in begun.items() if len(data) < 5)
    whole = view.encode(" \u00e9".encode())
    half = view.walk([view.encode(b" ")[0], tokenizer.token_to_id("<0xC3>")])
    assert half is not None and not view.may_end(half)
    after = {view.data[token] for token in range(view.size) if view.allowed(half)[token]}
    assert after == {
        bytes([byte]) for byte in range(0x80, 0xC0) if byte != 0xA9
    }  # C3 A9 is the \u00e9 that has a token
    assert whole[-1] == tokenizer.token_to_id("\u00e9")
    for impossible in ("<0xC0>", "<0xFF>", "<0x61>", "<0x20>"):
        assert view.data[tokenizer.token_to_id(impossible)] is None


# covers


def test_a_cover_is_its_definition() -> None:
    """All sequences that first reach or pass the end with their last token, found by encoding every longer text."""
    merges = [("a", "b"), ("b", "a"), ("ab", "a"), ("a", "a"), ("ab", "ab"), ("c", "ab"), ("aba", "c")]
    tokenizer = bpe("abc", merges)
    view = ByteView(tokenizer)
    longer = ["".join(text) for size in range(1, 9) for text in itertools.product("abc", repeat=size)]
    encodings = [ids(tokenizer, text) for text in longer]
    for size in range(1, 5):
        for text in itertools.product("abc", repeat=size):
            data = "".join(text).encode()
            expected = set()
            for other, tokens in zip(longer, encodings, strict=True):
                if len(other) >= size + view.longest - 1 and other.startswith("".join(text)):
                    ends = list(itertools.accumulate(len(view.data[token] or b"") for token in tokens))
                    expected.add(tuple(tokens[: next(at for at, end in enumerate(ends) if end >= size) + 1]))
            assert view.members(data) == expected
            assert tuple(view.encode(data)) in expected
    assert view.members(b"") == {()}


def test_a_prompt_may_end_inside_a_character() -> None:
    view = ByteView(byte_tokenizer())
    assert {view.bytes_of(tokens) for tokens in view.members(b"ba\xe4")} == {b"ba\xe4"}
    config = view.walk(view.encode(b"ba\xe4"))
    assert config is not None and not view.may_end(config)
    legal = view.data[view.encode("ba\u4e2d".encode())[-2]]
    assert legal == b"\xb8"
    assert {view.data[token] for token in range(view.size) if view.allowed(config)[token]} == {
        bytes([byte]) for byte in range(0x80, 0xC0)
    }
    e0, ed = (view.walk(view.encode(lead)) for lead in (b"\xe0", b"\xed"))
    for config, low, high in ((e0, 0xA0, 0xC0), (ed, 0x80, 0xA0)):  # no overlong forms, no surrogates
        assert isinstance(config, Config)
        after = {view.data[token] for token in range(view.size) if view.allowed(config)[token]}
        assert after == {bytes([byte]) for byte in range(low, high)}


# real tokenizers


def corpus() -> list[str]:
    rng = random.Random(3)
    lines = [f"{task.prompt} {pocket.answer(task, 'good', rng)}" for task in pocket.tasks("test", 40, 3)]
    odd = [
        "It's  Anna's; they'll  go, you'd   say\n\n'lo  'll' 12345",
        "na\u00efve caf\u00e9 \u4e2d\u6587  \U0001f600 don't",
    ]
    return [*lines, *(f"{text} {text}" for text in odd)]


@pytest.mark.parametrize("name", ["base", "chat", "nano"])
def test_audit_of_the_pocket_tokenizers(name: str) -> None:
    """No prefix of an encoding is called unreachable, and (their vocabularies are small) every one encodes to itself."""
    found = ByteView(Tokenizer.from_file(str(pocket.path(name) / "tokenizer.json"))).audit(corpus())
    assert (found.texts, found.differs, found.unreachable, found.closure) == (42, [], [], [])
    assert found.prefixes > 1000


def test_audit_of_stories260k(stories260k: Path) -> None:
    """Sentencepiece BPE with byte fallback, its merges out of order; exact."""
    view = ByteView(Tokenizer.from_file(str(stories260k / "tokenizer.json")))
    found = view.audit(corpus())
    assert (found.differs, found.unreachable, found.closure) == ([], [], [])
    assert not view.bpe.ordered and view.bpe.lead == b" "


def trained(pre: Any, normalizer: Any = None, **options: Any) -> Tokenizer:
    """A BPE tokenizer of 400 tokens (byte-level) or 120 (characters) trained on text full of what pre-tokenizers trip on."""
    out = Tokenizer(models.BPE(**options))
    out.pre_tokenizer = pre or pre_tokenizers.Sequence([])
    if normalizer is not None:
        out.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if not options else []
    texts = [*corpus(), *["we'll  you'll   they'll\n\n  it'll  'll"] * 40]
    trainer = trainers.BpeTrainer(vocab_size=400 if alphabet else 120, initial_alphabet=alphabet, show_progress=False)
    out.train_from_iterator(texts, trainer)
    if not alphabet:
        return out
    out.decoder = decoders.ByteLevel()
    return out


def test_audit_of_a_trained_gpt2_style_tokenizer() -> None:
    """Contractions and runs of spaces break "a sequence is valid iff it is the encoding of its text"; the view does not."""
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    found = ByteView(tokenizer).audit(["we'll  go", "a   b", "they'll\n\n  it'll 'lo", *corpus()])
    assert (found.differs, found.unreachable) == ([], [])
    assert found.closure
    tokens = {tokenizer.id_to_token(prefix[-1]) for prefix in found.closure}
    assert tokens & {"'l", "\u0120", "\u0120\u0120"}


def test_audit_of_a_trained_sentencepiece_style_tokenizer() -> None:
    """Without look-ahead every prefix of an encoding encodes to itself."""
    parts = [normalizers.Prepend(MARKER), normalizers.Replace(" ", MARKER)]
    tokenizer = trained(None, normalizers.Sequence(parts), byte_fallback=False, unk_token=None, fuse_unk=False)
    found = ByteView(tokenizer).audit(["we'll  go", "a   b", "they'll\n\n  it'll 'lo"])
    assert (found.texts, found.differs, found.unreachable, found.closure) == (3, [], [], [])


# what is refused


def test_bytes_that_cannot_be_spelt_are_refused_with_their_offset() -> None:
    view = ByteView(bpe("abc", [("a", "b")]))
    with pytest.raises(UsageError, match=r"byte 2 \(b'd'\).*probability is 0"):
        view.encode(b"abda")
    assert view.cover(b"abd") == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "BPE tokenizers only, and this one is WordPiece"),
        (models.Unigram([("a", 0.0)]), "BPE tokenizers only, and this one is Unigram"),
        (models.WordLevel({"a": 0}, unk_token="a"), "BPE tokenizers only, and this one is WordLevel"),
        (models.BPE({"a": 0, "##b": 1}, [], continuing_subword_prefix="##"), "BPE with continuing_subword_prefix"),
        (models.BPE({"a": 0}, [], dropout=0.1), "BPE with dropout"),
        (models.BPE({"a": 0, "b": 1, "ab": 2}, [], ignore_merges=True), "ignore_merges"),
        (models.BPE({"": 0}, []), "no token that spells bytes"),
    ],
)
def test_other_vocabularies_are_refused(model: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ByteView(Tokenizer(model))


@pytest.mark.parametrize("normalizer", [normalizers.Lowercase(), normalizers.NFKC(), normalizers.StripAccents()])
def test_tokenizers_that_change_text_are_refused(normalizer: Any) -> None:
    tokenizer = bpe("abc", [("a", "b")])
    tokenizer.normalizer = normalizer
    with pytest.raises(UsageError, match="changes text before it encodes it"):
        ByteView(tokenizer)


def test_composition_is_noted() -> None:
    tokenizer = bpe("abc", [("a", "b")])
    tokenizer.normalizer = normalizers.NFC()
    assert ByteView(tokenizer).notes == ("texts are taken as composed already (NFC)",)


@pytest.mark.parametrize(
    "pre",
    [
        pre_tokenizers.Whitespace(),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex(r"\d{3}"), "isolated"),
        pre_tokenizers.Split(Regex(r"[a-z]"), "isolated"),
        pre_tokenizers.Split("ab", "isolated"),
        pre_tokenizers.Split("a", "removed"),
        pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(False), pre_tokenizers.Digits(individual_digits=True)]),
    ],
)
def test_other_pre_tokenizers_are_refused(pre: Any) -> None:
    with pytest.raises(UsageError, match="byte-level (does not know the pre-tokenizer|knows Split of single)"):
        ByteView(bpe("abc", [("a", "b")], pre))


def test_a_tokenizer_that_does_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last resort: the view encodes a few texts itself when it is made, and compares."""
    monkeypatch.setattr(ByteView, "surface", lambda self, text: text.upper().encode())
    with pytest.raises(UsageError, match="as this tokenizer does"):
        ByteView(byte_tokenizer())


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a fast tokenizer"):
        ByteView(object())
    assert START.last == -1
