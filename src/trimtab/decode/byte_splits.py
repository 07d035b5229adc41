r"""Where a pre-tokenizer may cut a text whose continuation is not known yet: a small automaton over characters.

A pre-tokenizer cuts a text into pieces, and BPE merges inside a piece only. Whether it cuts between two characters may
depend on what comes later: GPT-2's pattern gives the last space of a run to the word behind it, and cuts "'ll" off as a
piece but "'la" behind the apostrophe. So the automaton guesses, and a wrong guess dies at a later character: a text has
one run that survives, and its cuts are the pre-tokenizer's. A text that may go on has one run, or a few.

Read exactly are: no pre-tokenizer; `Metaspace`; GPT-2's pattern (`ByteLevel`, or written out in a `Split`); the patterns of
Llama-3 and Qwen; and before or beside them characters that are pieces by themselves (`Digits` one by one, `Split` of single
characters). Any other is refused by name. States are bits of an int, kinds of characters are letters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, pre_tokenizers

from trimtab.errors import UsageError

MARKER = "\u2581"  # stands for a space in sentencepiece vocabularies
CODES = 0x110000
WHITE = [*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]
KindsOf = Callable[[int, int], set[str]]  # first and last code point -> the kinds that characters between them have


@dataclass(frozen=True)
class Rules:
    """starts: kind -> states that a piece may be in after its first character. stays: state -> kinds -> state, the piece
    going on. cuts: state -> kinds that may begin the next piece (`kind>state/state`: in these states only). ends: states
    that a text may end in. The first state is START."""

    starts: Mapping[str, str]
    stays: Mapping[str, Mapping[str, str]]
    cuts: Mapping[str, str]
    ends: str


# X any character, M the marker, I one that is a piece by itself
_PLAIN = Rules(
    {"X": "X", "M": "X", "I": "I"}, {"X": {"XM": "X"}}, {"START": "X M I", "X": "I", "I": "X M I"}, "START X I"
)
_METASPACE = Rules(_PLAIN.starts, {"X": {"X": "X"}}, {**_PLAIN.cuts, "X": "M I"}, _PLAIN.ends)

# Kinds of the patterns below: L letters, of which q (s t m d), r (r v), e and l may end a contraction; N numbers; ' the
# apostrophe; O others; S the space; W other white space, of which B breaks lines (Llama-3 and Qwen); I a piece by itself.
_ANY = "L q r e l N S W ' O I"
_CONTRACTION = {"C": {"q": "E", "r": "Cr", "l": "Cl"}, "Cr": {"e": "E"}, "Cl": {"l": "E"}}
_LETTERS = {"Lqrel": "L"}
# L, N, O: in a run of such. A: an apostrophe began the piece and no contraction follows, so not "r" and "e" (Ar forbids
# the "e"), nor "l" and "l" (Al). C: a contraction follows; Cr, Cl wait for its last letter; E: it ended. S: a space that
# belongs to the word behind it. R: a run of white space; Q: its last character, a piece by itself.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2 = Rules(
    starts={
        **dict.fromkeys("Lqrel", "L"), "N": "N", "O": "O", "'": "A C", "S": "S R", "W": "Q R", "I": "I",
    },
    stays={
        **_CONTRACTION, "L": _LETTERS, "N": {"N": "N"}, "O": {"O'": "O"}, "S": {**_LETTERS, "N": "N", "O'": "O"},
        "R": {"SW": "R"}, "A": {"O'": "O"}, "Ar": {"Lqrl": "L"}, "Al": {"Lqre": "L"},
    },
    cuts={
        **dict.fromkeys(("START", "E", "I"), _ANY), **dict.fromkeys(("L", "Ar", "Al"), "N S W ' O I"),
        "N": "L q r e l S W ' O I", "O": "L q r e l N S W I", "A": "L e r>Ar l>Al N S W I",
        "R": "S>S W>Q I", "Q": "L q r e l N ' O",
    },
    ends="START L N O A Ar Al E R I",
)  # fmt: skip

# L, N, N2, N3, C to E: as above. X: one character that is no letter, number or line break, and letters follow (XA: an
# apostrophe, and no contraction). O1: it began a run of others, and no letter follows; P: a space before such a run; O, OB:
# in the run, and in the line breaks that end it. RB: white space up to a later line break; BE: the last break of the white
# space here; R: white space with no break to come; TS, TW: its last character, a piece by itself before what X, P exclude.
_QWEN_N: dict[str, dict[str, str]] = {"N": {}}
_LLAMA3_N: dict[str, dict[str, str]] = {"N": {"N": "N2"}, "N2": {"N": "N3"}, "N3": {}}
_SPACES = "S>X/P/TS/R W>X/TW/R"


def _modern(numbers: Mapping[str, Mapping[str, str]]) -> Rules:
    words, others = "L q r e l", "' O S W B N I"
    return Rules(
        starts={
            **dict.fromkeys("Lqrel", "L"), "N": "N", "O": "X O1", "'": "XA O1 C", "S": "X P TS R RB", "W": "X TW R RB",
            "B": "RB BE", "I": "I",
        },
        stays={
            **_CONTRACTION, **numbers, "L": _LETTERS, "X": _LETTERS, "XA": {"Le": "L", "r": "Lr", "l": "Ll"},
            "Lr": {"Lqrl": "L"}, "Ll": {"Lqre": "L"}, "O1": {"O'": "O", "B": "OB"}, "O": {"O'": "O", "B": "OB"},
            "OB": {"B": "OB"}, "P": {"O'": "O"}, "RB": {"SW": "RB", "B": "RB BE"}, "R": {"SW": "R"},
        },
        cuts={
            **dict.fromkeys(("START", "E", "I"), f"{words} {others}"), **dict.fromkeys(("L", "Lr", "Ll"), others),
            **{state: f"{words} ' O S W B I" + ("" if kinds else " N") for state, kinds in numbers.items()},
            "O1": "S W N I", "O": f"{words} S W N I", "OB": f"{words} ' O S W N I", "BE": f"{words} ' O N I {_SPACES}",
            "R": "S>X/P/TS W>X/TW I", "TS": "N", "TW": "N O '",
        },
        ends="START L Lr Ll O1 O OB E I BE R " + " ".join(numbers),
    )  # fmt: skip


_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|@| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    GPT2: _GPT2,
    _CL100K.replace("@", r"\p{N}"): _modern(_QWEN_N),
    _CL100K.replace("@", r"\p{N}{1,3}"): _modern(_LLAMA3_N),
}


@dataclass
class Splitter:
    """A pre-tokenizer as an automaton. start: the states before any text; ends: those that a text may end in."""

    rules: Rules
    base: KindsOf
    digits: bool = False
    alone: frozenset[str] = frozenset()
    start: int = 1
    ends: int = field(init=False)

    def __post_init__(self) -> None:
        rules = self.rules
        named = [*rules.cuts, *rules.stays, *(name for names in rules.starts.values() for name in names.split())]
        bits = {name: 1 << number for number, name in enumerate(dict.fromkeys(["START", *named]))}
        self._moves: dict[tuple[int, str, bool], int] = {}
        for state, kinds in rules.stays.items():
            for letters, after in kinds.items():
                for kind in letters:
                    self._moves[bits[state], kind, False] = sum(bits[name] for name in after.split())
        for state, cuts in rules.cuts.items():
            for cut in cuts.split():
                kind, _, only = cut.partition(">")
                names = only.split("/") if only else rules.starts[kind].split()
                self._moves[bits[state], kind, True] = sum(bits[name] for name in names)
        self.ends = sum(bits[name] for name in rules.ends.split())

    def step(self, states: int, kind: str, cut: bool) -> int:
        """The states after one more character, which begins a piece (`cut`) or goes on with one."""
        out = 0
        while states:
            bit = states & -states
            out |= self._moves.get((bit, kind, cut), 0)
            states ^= bit
        return out

    def kinds(self, first: int, last: int) -> set[str]:
        """The kinds that characters from one code point to another have."""
        if first == last and chr(first) in self.alone:
            return {"I"}
        found = {"I" if self.digits and kind == "N" else kind for kind in self.base(first, last)}
        return found | {"I" for character in self.alone if first <= ord(character) <= last}

    def kind(self, character: str) -> str:
        (kind,) = self.kinds(ord(character), ord(character))
        return kind


def splitter(parts: list[dict[str, Any]], marked: bool = False) -> Splitter:
    """The automaton of a tokenizer's pre-tokenizers (the JSON of each, in order). UsageError for one not known exactly.

    marked: spaces have become markers before.
    """
    rules, digits, alone = _PLAIN, False, frozenset[str]()
    for part in parts:
        kind, pattern, isolated = part["type"], part.get("pattern", {}), part.get("behavior") == "Isolated"
        whole = GPT2 if kind == "ByteLevel" and part.get("use_regex", True) else pattern.get("Regex")
        if whole in PATTERNS and (isolated or kind == "ByteLevel") and not part.get("invert") and rules is _PLAIN:
            rules = PATTERNS[whole]
        elif kind == "ByteLevel" and not part.get("use_regex", True):
            continue
        elif kind == "Metaspace" and rules is _PLAIN:
            rules = _METASPACE if part.get("split", True) else _PLAIN
        elif kind == "Split" and pattern == {"String": " "} and marked:
            continue
        elif kind == "Digits" and part["individual_digits"] and rules in (_PLAIN, _METASPACE):
            digits = True
        elif kind == "Split" and isolated and not part.get("invert") and rules in (_PLAIN, _METASPACE):
            alone |= _characters(pattern)
        else:
            raise UsageError(
                f"byte-level does not know the pre-tokenizer {part} exactly (it knows Metaspace, the patterns of GPT-2, "
                "Llama-3 and Qwen, and before them Digits one by one and Split of single characters): use another model"
            )
    if rules in (_PLAIN, _METASPACE):
        return Splitter(rules, _plain_kinds if digits else _plain_kinds_without_digits, digits, alone)
    return Splitter(rules, _gpt2_kinds if rules is _GPT2 else _modern_kinds, digits, alone)


def _characters(pattern: Mapping[str, str]) -> frozenset[str]:
    """The characters of a `Split` pattern that matches single characters: one, or `[...]` and single ones with `|`."""
    text, source = pattern.get("String"), pattern.get("Regex", "")
    if text is not None and len(text) == 1:
        return frozenset(text)
    single = r"\[(?!\^)(?:[^\]\\\-]|\\[^\w])+\]|\\[^\w]|\\n|[^\\\[\](){}.*+?|^$]"
    if not re.fullmatch(rf"(?:{single})(?:\|(?:{single}))*", source):
        raise UsageError(
            f"byte-level knows Split of single characters exactly, not of {text or source!r}: use another model"
        )
    found = re.compile(source)
    return frozenset(character for character in map(chr, range(0x3000)) if found.fullmatch(character))


# kinds of characters


def _plain_kinds(first: int, last: int) -> set[str]:
    if first != last:
        return {"X", "N"}
    character = chr(first)
    return {"M" if character in (" ", MARKER) else "N" if unicodedata.category(character)[0] == "N" else "X"}


def _plain_kinds_without_digits(first: int, last: int) -> set[str]:
    return {"X" if kind == "N" else kind for kind in _plain_kinds(first, last)}


_ENDINGS = {**dict.fromkeys("stmd", "q"), "r": "r", "v": "r", "e": "e", "l": "l", "'": "'", " ": "S"}
_ANY_CASE = _ENDINGS | {letter.upper(): kind for letter, kind in _ENDINGS.items()} | {"\n": "B", "\r": "B"}
_ANY_CASE["\u017f"] = "q"  # the long s is an s to a pattern that ignores case


@lru_cache(maxsize=2**16)
def _gpt2_kinds(first: int, last: int) -> set[str]:
    if first == last and chr(first) in _ENDINGS:
        return {_ENDINGS[chr(first)]}
    return {chr(kind) for kind in np.unique(_code_kinds()[first : last + 1]).tolist()} - {"-"}


@lru_cache(maxsize=2**16)
def _modern_kinds(first: int, last: int) -> set[str]:
    if first == last and chr(first) in _ANY_CASE:
        return {_ANY_CASE[chr(first)]}
    return _gpt2_kinds(first, last) | ({"q"} if first <= 0x17F <= last else set())


@lru_cache(maxsize=1)
def _code_kinds() -> npt.NDArray[np.uint8]:
    r"""L, N, W, O or - (surrogates) of every code point [CODES], as \p{L}, \p{N} and \s of the tokenizers library have it.

    Python's table is quick; the library is asked about the code points that newer versions of Unicode assign.
    """
    classes = "".join(map(unicodedata.category, map(chr, range(CODES))))[::2]
    kinds = np.frombuffer(classes.encode(), np.uint8).copy()
    kinds[~np.isin(kinds, list(b"LN"))] = ord("O")
    kinds[WHITE] = ord("W")
    kinds[0xD800:0xE000] = ord("-")
    unknown = [code for code in range(0x32400) if unicodedata.category(chr(code)) == "Cn"]
    for kind in "LN":
        found = np.ones(len(unknown), bool)
        left = pre_tokenizers.Split(Regex(rf"\p{{{kind}}}"), "removed").pre_tokenize_str("".join(map(chr, unknown)))
        for _, (start, end) in left:
            found[start:end] = False
        kinds[np.array(unknown)[found]] = ord(kind)
    return kinds


# UTF-8


def character_size(lead: int) -> int:
    """Bytes of a character that begins with this byte; 0 where none does."""
    return (
        1
        if lead < 0x80
        else 2
        if 0xC2 <= lead < 0xE0
        else 3
        if 0xE0 <= lead < 0xF0
        else 4
        if 0xF0 <= lead < 0xF5
        else 0
    )


def code_range(data: bytes) -> tuple[int, int] | None:
    """First and last code point of the characters whose UTF-8 begins with (or is) `data`; None where there is none."""
    size = character_size(data[0])
    if len(data) > size or any(byte & 0xC0 != 0x80 for byte in data[1:]):
        return None
    value = data[0] if size == 1 else data[0] & (0x7F >> size)
    for byte in data[1:]:
        value = value << 6 | byte & 0x3F
    free = 6 * (size - len(data))
    first = max(value << free, (0, 0x80, 0x800, 0x10000)[size - 1])
    last = min((value + 1 << free) - 1, CODES - 1)
    return (first, last) if first <= last and not 0xD800 <= first <= last < 0xE000 else None
