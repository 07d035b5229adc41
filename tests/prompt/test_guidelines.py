"""Guideline libraries: parsing, ROUGE-L, de-duplication, quoting, files, and who writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from trimtab import Completions, Cost, Sampling, pocket
from trimtab.errors import UsageError
from trimtab.prompt.guideline_writers import DETECT, SAFE_REQUEST, PolicyGuide, pocket_detector, pocket_writer
from trimtab.prompt.guidelines import (
    Detection,
    Guideline,
    GuidelineLibrary,
    admit,
    bootstrap_inputs,
    build_library,
    input_id,
    parse_flag,
    parse_guidelines,
    parse_instructions,
    quotes,
    rouge_l,
)

PLAIN = Sampling()


class Scripted:
    """A policy that answers with `reply(prompt, number of the call)`; `asked` keeps what it saw."""

    name = "scripted"

    def __init__(self, reply: Any):
        self.reply, self.asked, self.samplings = reply, [], []  # type: ignore[var-annotated]

    def generate(self, prompts: Sequence[Any], sampling: Sampling = PLAIN) -> Completions:
        first = len(self.asked)
        self.asked += prompts
        self.samplings.append(sampling)
        texts = [self.reply(prompt, first + i) for i, prompt in enumerate(prompts)]
        n = len(prompts)
        return Completions(list(prompts), texts, [[0]] * n, [[0.0]] * n, ["stop"] * n, Cost({"scripted": 5 * n}))


# reading what a model wrote


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("Yes", True),
        ("No.", False),
        ("1. Unsafe content: Yes, it names a weapon.\n2. Unsafe answer: No.\nFinal: No.", False),
        ("1. No\n2. It may lead to an unsafe answer.\n**Yes**", True),
        ("The answer is no\n\n   \n", False),
        ("Reasons...\n####\nYES\n####", True),
        ("Yes to the first, but overall: no", False),
        ("Answer (yes or no): yes", True),
        ("Is it risky? yes/no", None),
        ("I know nothing of yesterday", None),
        ("Yes.\nI hope this helps!", None),
        ("", None),
    ],
)
def test_the_flag_is_the_last_yes_or_no_of_the_last_line(text: str, flag: bool | None) -> None:
    assert parse_flag(text) is flag


def test_guidelines_are_the_titled_lines() -> None:
    text = (
        "####\nHere are some guidelines:\n1. **Refuse**: Say no.  \n- Be kind : Say why. Offer help.\n* Empty:\n"
        "2) Figures: Give them: with units.\nA sentence that is far too long to be the title of anything: dropped.\n####"
    )
    assert parse_guidelines(text) == [
        ("Refuse", "Say no."),
        ("Be kind", "Say why. Offer help."),
        ("Figures", "Give them: with units."),
    ]
    assert parse_guidelines("no titled line") == []


def test_at_most_six_numbered_lines_are_instructions() -> None:
    text = "Sure!\n" + "\n".join(f"{n}. do {n}" for n in range(5, 14)) + "\n- not numbered\n20.  "
    assert parse_instructions(text) == [f"do {n}" for n in range(5, 11)]


# ROUGE-L and bootstrapped inputs


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat sat", "The cat, sat!", 1.0),  # case and punctuation do not count
        ("a b c d", "a c d e", 2 * 3 / 8),  # a c d
        ("a b c", "c b a", 2 * 1 / 6),
        ("a b", "c d", 0.0),
        ("", "a", 0.0),
    ],
)
def test_rouge_l(a: str, b: str, value: float) -> None:
    assert rouge_l(a, b) == pytest.approx(value, abs=1e-12) == rouge_l(b, a)


def test_admission_is_at_most_the_limit_against_all() -> None:
    seven = "a b c d e f g h i j"  # shares 7 of 10 words in order with the pool: F1 is 0.7 exactly, and passes
    assert admit([seven, seven, "a b c d e f g h x y"], ["a b c d e f g x y z"]) == [seven]
    assert admit(["a b c d e f g h i z"], ["a b c d e f g x y z"]) == []  # 8 of 10


def test_bootstrapping_shows_four_examples_and_then_two_of_its_own() -> None:
    seeds = ["red one", "green two", "blue three", "white four", "black five"]
    new = ["steal six", "burn seven", "break eight", "poison nine", "crash ten"]
    policy = Scripted(lambda prompt, call: f" {new[call]}\n6. {seeds[0]}\n" if call < 5 else "")
    found = bootstrap_inputs(policy, seeds, 5, "Requests:", tries=9)
    assert found == new  # the repeated seed is never admitted
    shown = [[line.split(". ", 1)[1] for line in asked.splitlines()[1:5]] for asked in policy.asked]
    assert [sum(text in seeds for text in row) for row in shown] == [4, 4, 2, 2, 2]
    assert all(asked.startswith("Requests:\n1. ") and asked.endswith("\n5.") for asked in policy.asked)
    assert bootstrap_inputs(Scripted(lambda prompt, call: "5. the same old thing"), seeds, 3, "R:") == [
        "the same old thing"
    ]
    with pytest.raises(UsageError, match="4 examples at a time; 2 seeds"):
        bootstrap_inputs(policy, seeds[:2], 3, "R:")


# the library


def test_duplicates_are_merged_and_their_inputs_go_to_the_one_kept() -> None:
    library = GuidelineLibrary()
    assert library.add(Guideline("Refuse", "Say  no to\nthat.", "w", False, ("x1",)))
    assert not library.add(Guideline("Refuse", "say no to that", "w", True, ("x2", "x1")))  # the same words
    assert not library.add(Guideline("Decline", "Say no to that.", "w", None, ("x3",)))  # under another title too
    (entry,) = library
    assert (entry.line, entry.risky, entry.sources) == ("Refuse: Say no to that.", True, ("x1", "x2", "x3"))


def test_near_duplicates_go_inside_a_title_only() -> None:
    # "0123456789" against "012345678x": 9 of 10 characters match, the ratio is 2 * 9 / 20 = 0.9, which is enough to go
    rows = [("T", "0123456789"), ("t", "012345678x"), ("U", "012345678y"), ("T", "01234567ab"), ("T", "0123456789z")]
    library = GuidelineLibrary([Guideline(title, text, sources=(text,)) for title, text in rows])
    kept = library.dedup(0.9)
    assert [entry.text for entry in kept] == ["0123456789", "012345678y", "01234567ab"]
    assert kept[0].sources == ("0123456789", "012345678x", "0123456789z")
    assert len(library) == 5  # as it was
    assert library.pairs(["012345678x", "elsewhere"]) == []  # sources are ids, and these are not
    named = GuidelineLibrary([Guideline("T", "one", sources=(input_id("a"), input_id("b")))])
    assert named.pairs(["b", "c", "a"]) == [(2, 0), (0, 0)]


@pytest.mark.parametrize(
    ("text", "source", "found"),
    [
        ("Refuse requests to harm animals.", "How do I hurt the dog of my neighbour?", False),
        ("Never say how do I steal a bike.", "How do I steal a bike?", True),  # the whole input
        ("Answer: where is it", "Where?", False),  # one word is no quotation
        ("Use " + " ".join("abcdefghi"), "Tell " + " ".join("abcdefghi"), True),  # 9 words in a row
        ("Use " + " ".join("abcdefgh"), "Tell " + " ".join("abcdefgh"), False),  # 8
        ("It and the of to a an in on by for with", "the and it to of an a on in for by with us", False),
        ("red green blue white black pink grey brown gold", "gold brown grey pink black white blue green red x", True),
        ("red green blue white black pink grey brown", "brown grey pink black white blue green red x", False),
        ("Do not write to anna@mell.org.", "Mail anna@mell.org now", True),
        ("Do not call 555 0199.", "Her number is 555 0199", True),
        ("List 3 things.", "Name 3 fruits", False),
    ],
)
def test_what_quotes_its_input(text: str, source: str, found: bool) -> None:
    assert quotes(text, source) is found


def test_a_library_is_built_with_provenance() -> None:
    inputs = ["How do I steal a bike?", "Where does Anna live?", "What is this?"]
    said: list[str] = []

    def detector(asked: Sequence[Any]) -> list[Detection]:
        return [Detection(True), Detection(False), Detection(None, "garbled")]

    def writer(asked: Sequence[Any], found: Sequence[Detection]) -> list[str]:
        return [
            "Refuse: Say no.\nQuote: How do I steal a bike",
            "Facts: Say what is true.\nrefuse: Say no!",
            "Ask: Why.",
        ]

    library = build_library(inputs, detector, writer, progress=said.append)
    rows = [(entry.line, entry.writer, entry.risky, entry.sources) for entry in library]
    ids = [input_id(text) for text in inputs]
    assert rows == [
        ("Refuse: Say no.", "writer", True, (ids[0], ids[1])),
        ("Facts: Say what is true.", "writer", False, (ids[1],)),
        ("Ask: Why.", "writer", True, (ids[2],)),  # undecided is treated as risky
    ]
    (line,) = said
    assert "3 entries from 5 guidelines for 3 inputs (1 risky, 1 undecided" in line and "1 quoted their input" in line
    with pytest.raises(UsageError, match="3 inputs, but 3 detections and 1 texts"):
        build_library(inputs, detector, lambda asked, found: ["A: b"])
    with pytest.raises(UsageError, match="wrote 0 guidelines for 3 inputs"):
        build_library(inputs, detector, lambda asked, found: ["nothing"] * 3)


def test_a_library_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "with space" / "ü.jsonl"
    path.parent.mkdir()
    library = GuidelineLibrary(
        [Guideline("Één", "Zeg «nee».", "me", None, ("ab",)), Guideline("Two", "Say yes.", "me", True)]
    )
    library.save(path)
    read = GuidelineLibrary.load(path)
    assert list(read) == list(library) and read.version == library.version
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [entry.id for entry in library]
    assert [child.name for child in path.parent.iterdir()] == ["ü.jsonl"]  # nothing temporary is left
    assert GuidelineLibrary(list(library)[::-1]).version != library.version
    path.write_text('{"title": "A", "text": "By hand."}\n')
    assert list(GuidelineLibrary.load(path)) == [Guideline("A", "By hand.")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: write one JSON object"),
        ('{"title": "A", "text": "b"}\n{"title": ', r"library.jsonl:2: "),
        ('{"title": "A"}', r":1: an object with a 'title' and a 'text'"),
        ("[1]", r":1: an object"),
        ('{"title": " ", "text": "b"}', ":1: a guideline needs a title and a text"),
        ('{"title": "A", "text": "b", "sources": "x"}', ":1: 'sources' is not a list"),
        ('{"title": "A", "text": "b", "risky": "no"}', ":1: 'risky' is neither"),
    ],
)
def test_a_broken_library_is_named_by_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "library.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        GuidelineLibrary.load(path)


def test_an_unreadable_library_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the guideline library"):
        GuidelineLibrary.load(tmp_path / "absent.jsonl")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match="cannot read the guideline library"):
        GuidelineLibrary.load(tmp_path / "bytes")


# who writes it


def test_a_risky_input_is_written_for_under_its_own_detection_turn() -> None:
    inputs = ["How do I rob the shop?", "Name two fruits."]
    replies = ["1. It asks for a crime.\nYes", "1. Fruit.\nNo", "Refuse: Say no.", "Count: Give as many as asked."]
    policy = Scripted(lambda prompt, call: replies[call])
    guide = PolicyGuide(policy)
    library = build_library(inputs, guide.detect, guide)
    assert [(entry.line, entry.risky, entry.writer) for entry in library] == [
        ("Refuse: Say no.", True, "scripted"),
        ("Count: Give as many as asked.", False, "scripted"),
    ]
    detected, _, risky, harmless = policy.asked
    assert [turn["role"] for turn in detected] == ["user", "assistant"] * 2 + ["user"]  # few-shot, both verdicts
    own = {"role": "user", "content": DETECT.format(input=inputs[0])}
    assert detected[-1] == own
    assert risky[-3:] == [
        own,
        {"role": "assistant", "content": "1. It asks for a crime.\nYes"},
        {"role": "user", "content": SAFE_REQUEST},
    ]
    assert [turn["role"] for turn in risky] == ["user", "assistant"] * 3 + ["user"]
    assert len(harmless) == 3 and inputs[1] in harmless[-1]["content"]
    assert not any("unsafe" in turn["content"] for turn in harmless)  # no detection turn, quality alone
    assert guide.cost.tokens == {"scripted": 20}
    assert {(s.temperature, s.max_new_tokens, s.samples) for s in policy.samplings} == {(0.7, 400, 1)}


def test_the_pocket_script_knows_which_requests_are_risky() -> None:
    inputs = pocket.prompts("fit", 80, 0)
    library = build_library(inputs, pocket_detector, pocket_writer)
    risky = {source for entry in library if entry.risky for source in entry.sources}
    assert risky == {input_id(text) for text in inputs if pocket.task_of(text).family == "harm"}
    assert {input_id(text) for text in inputs} == {source for entry in library for source in entry.sources}
    assert pocket_detector(["What is the capital of France?"])[0].risky is None
    assert pocket_writer(["What is the capital of France?"], [Detection(None)]) == [""]
