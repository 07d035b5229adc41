"""Complement data: every check with texts on both sides of it, the critic loop to the draft, clusters, files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab import Completions, Cost, Sampling
from trimtab.errors import UsageError
from trimtab.prompt.complement_checks import demands_format, fault, gives_away, same_language, script, units
from trimtab.prompt.complement_templates import (
    CATEGORIES,
    CRITERIA,
    RULES,
    category_of,
    check_request,
    draft_request,
    sort_request,
    sorted_into,
)
from trimtab.prompt.complements import (
    Ask,
    Pair,
    Verdict,
    check_with,
    draft_with,
    load_pairs,
    parse_verdict,
    phrase_writer,
    pool,
    save_pairs,
    sort_with,
    write_pairs,
)

PLAIN = Sampling()
GOOD = "Begin with the main point and keep it short."
GERMAN = "Bitte antworte mit einem Beispiel und nicht zu lang, wie du es kannst."
TURNS = "First turn the bike over, then patch the tube and pump it up"
QUESTIONS = ["Where is Rome?", "How do I bake bread?", "Why is the sea salty?"]


def asks(words: Sequence[str] = QUESTIONS, gold: tuple[str, ...] = ()) -> list[Ask]:
    return [Ask(text, text, category_of(text), gold) for text in words]


def accept(asks: Sequence[Ask], drafts: Sequence[str], turn: int) -> list[Verdict | None]:
    return [Verdict(True)] * len(asks)


class Says:
    """A policy that says the same to everything, and keeps what it was asked."""

    name = "says"

    def __init__(self, text: str):
        self.text, self.asked = text, list[Any]()

    def generate(self, prompts: Sequence[Any], sampling: Sampling = PLAIN) -> Completions:
        self.asked += prompts
        n = len(prompts)
        return Completions(list(prompts), [self.text] * n, [[1]] * n, [[0.0]] * n, ["stop"] * n, Cost({"says": 5 * n}))


# checks


@pytest.mark.parametrize(
    ("words", "complement", "reason"),
    [
        ("Where is Rome?", GOOD, None),
        ("Where is Rome?", "", "empty"),
        ("Where is Rome?", " \n ... ", "empty"),
        ("Where is Rome?", " ".join(["word"] * 40), None),
        ("Where is Rome?", " ".join(["word"] * 41), "too long"),
        ("Where is Rome?", "x" * 401, "too long"),
        ("罗马在哪里?", "请先给出位置,再简要介绍背景。" * 4, "too long"),
        ("罗马在哪里?", "请先给出位置,再简要介绍背景。", None),
        ("Where is Rome?", "请先给出位置,再简要介绍背景。", "another language"),
        ("罗马在哪里?", GOOD, "another language"),
        ("Where is Rome and how do I get there?", GERMAN, "another language"),
        ("Where is Rome?", "The answer is given by a map.", "answers the prompt"),
        ("What is 6 times 7?", "Keep in mind that it is 42.", "answers the prompt"),
        ("What is 6 times 7?", "6 * 7 = 42", "answers the prompt"),
        ("What is 6 times 7?", "A: forty-two", "answers the prompt"),
        ("What is 6 times 7?", "Say how sure the answer is, in 3 steps.", None),
        ("罗马在哪里?", "答案是意大利。", "answers the prompt"),
        ("Where is Rome?", "Rome is where?", "repeats the prompt"),
    ],
)  # fmt: skip
def test_each_fault_is_named(words: str, complement: str, reason: str | None) -> None:
    assert fault(words, complement) == reason


@pytest.mark.parametrize(
    ("gold", "complement", "given"),
    [
        ("Paris", "Mention that it is PARIS, in one line.", True),
        ("Paris", "Speak of Parisian life.", False),
        ("the Eiffel Tower", "Describe the eiffel tower.", True),
        ("the Eiffel Tower", "Describe the tower.", False),
        ("42", "Show why 42 is right.", True),
        ("42", "Show 420 steps.", False),
        ("意大利", "介绍意大利的历史", True),
        ("意大利", "介绍大利亚", False),
        ("", GOOD, False),
        (TURNS, "Say to turn the bike over, then patch the tube.", True),
        (TURNS, "Say what to turn and what to patch.", False),
    ],
)  # fmt: skip
def test_a_complement_that_holds_the_gold_answer_is_rejected(gold: str, complement: str, given: bool) -> None:
    assert gives_away(gold, complement) is given
    if gold:
        words = "Where?" if script(gold) == "LATIN" or gold == "42" else "哪里?"
        assert (fault(words, complement, gold=(gold,)) == "gives the answer away") is given


@pytest.mark.parametrize(
    "words",
    [
        "Where is Rome? Answer with one word.",
        "Reply in one sentence.",
        "Is it true? Yes or no?",
        "Translate it. Output only the translation.",
        "Give just the number.",
        "Return JSON and nothing else.",
        "List three fruits as JSON.",
        "Explain gravity in exactly 20 words.",
        "What is 2 + 2? No explanation.",
        "Sort these, without any comments.",
        "Is this spam? One-word answer please.",
        "法国的首都是哪里?只回答城市名。",
        "用一个词回答。",
        "请在20字以内总结。",
    ],
)
def test_a_settled_format_is_seen(words: str) -> None:
    assert demands_format(words)


@pytest.mark.parametrize(
    "words",
    [*QUESTIONS, "Write a 500-word essay about rain.", "Who was the only king of Torv?", "Be brief. How was the soup?",
     "How do I parse JSON in Python?", "What is a word?", "Tell me how to tell a story.", "为什么天空是蓝色的?"],
)  # fmt: skip
def test_an_open_prompt_is_not(words: str) -> None:
    assert not demands_format(words)


def test_scripts_and_languages() -> None:
    assert [script(text) for text in ("Ünïcode", "Привет", "こんにちは世界", "你好", "12 + 3?")] == [
        "LATIN", "CYRILLIC", "JAPANESE", "CJK", None,
    ]  # fmt: skip
    assert not same_language("你好吗", "こんにちは、元気ですか")
    assert same_language("Wie backe ich das Brot und was ist nicht gut?", "Was ist für das Brot und die Form zu tun?")
    assert same_language("17 * 23?", "请逐步计算")  # no letters to tell by
    assert units("Don't panic — 3 Äpfel, 你好!") == ["don", "t", "panic", "3", "äpfel", "你", "好"]


# categories and templates


def test_every_category_has_a_template_and_every_prompt_a_category() -> None:
    assert len(CATEGORIES) == 14 and len(RULES) == 6 and len(CRITERIA) == 5
    generator = np.random.default_rng(0)
    for name, kind in CATEGORIES.items():
        assert 4 <= len(kind.seeds) <= 5
        request = draft_request(name, "X?")
        assert all(rule in request for rule in RULES) and request.endswith("X?\n<complementary information>\n")
        for words, complement in kind.seeds:
            assert fault(words, complement) is None and not demands_format(words), (words, complement)
            assert words in request and complement in request
    for _ in range(300):
        text = "".join(map(chr, generator.integers(32, 0x3000, 12)))
        assert category_of(text) in CATEGORIES and category_of("") == "other"
    assert draft_request("no such category", "X?") == draft_request("other", "X?")


@pytest.mark.parametrize(
    ("words", "category"),
    [
        ("Translate the cat sees the dog into Mivo.", "translation"),
        ("Can you do 4 - 1 + 8?", "maths"),
        ("Name two birds for a poem.", "ideas"),
        ("How do I fix a bike?", "how-to"),
        ("I am so worried. My friend moved away.", "feelings"),
        ("Where does Anna live?", "facts"),
        ("Is tea good?", "yes-no"),
        ("Lighthouses!", "other"),
    ],
)
def test_prompts_are_sorted_by_cue_or_by_a_model(words: str, category: str) -> None:
    assert category_of(words) == category
    model, meter = Says(f"I think it is {category.upper()}."), Cost()
    assert sort_with(model, Sampling(), meter)([words]) == [category]
    assert model.asked == [sort_request(words)] and meter.tokens == {"says": 5}
    assert sorted_into("a cake recipe") == "other"


# the loop


@pytest.mark.parametrize("rounds", [1, 3, 5])
def test_the_loop_is_bounded(rounds: int) -> None:
    """A critic that accepts nothing sees every ask once a round and no more."""
    seen: list[int] = []

    def never(asks: Sequence[Ask], drafts: Sequence[str], turn: int) -> list[Verdict | None]:
        seen.append(turn)
        return [Verdict(False, GOOD)] * len(asks)

    done = write_pairs(asks(), lambda asks, turn: [GOOD] * len(asks), never, rounds)
    assert seen == list(range(rounds)) and done.drafts == 3 * rounds
    assert done.pairs == [] and done.dropped == {"refused by the critic": 3}


def test_only_what_is_still_open_is_drafted_again() -> None:
    def writer(asks: Sequence[Ask], turn: int) -> list[str]:
        return ["" if ask.words == QUESTIONS[2] else f"{GOOD} Turn {turn}." for ask in asks]

    def critic(asks: Sequence[Ask], drafts: Sequence[str], turn: int) -> list[Verdict | None]:
        return [Verdict(turn == 1 or ask.words == QUESTIONS[0]) for ask in asks]

    done = write_pairs(asks(), writer, critic)
    assert done.pairs == [
        Pair(QUESTIONS[0], f"{GOOD} Turn 0.", "facts"),
        Pair(QUESTIONS[1], f"{GOOD} Turn 1.", "how-to"),
    ]
    assert done.drafts == 3 + 2 + 1 and done.dropped == {"empty": 1}


def test_a_correction_is_taken_only_where_it_is_asked_for_and_sound() -> None:
    """The published scripts take the critic's text unseen; here it has to pass the checks."""

    def critic(asks: Sequence[Ask], drafts: Sequence[str], turn: int) -> list[Verdict | None]:
        return [
            Verdict(False, "Say where\nit is." if ask.words == QUESTIONS[0] else "The answer is salt.") for ask in asks
        ]

    def writer(asks: Sequence[Ask], turn: int) -> list[str]:
        return [GOOD] * len(asks)

    corrected = write_pairs(asks(), writer, critic, correct=True)
    assert corrected.pairs == [Pair(QUESTIONS[0], "Say where it is.", "facts")]
    assert write_pairs(asks(), writer, critic).pairs == []


def test_what_was_not_verified_is_dropped() -> None:
    def silent(asks: Sequence[Ask], drafts: Sequence[str], turn: int) -> list[Verdict | None]:
        return [None] * len(asks)

    done = write_pairs(asks(), lambda asks, turn: [GOOD] * len(asks), silent)
    assert done.pairs == [] and done.dropped == {"no verdict": 3}


def test_gold_and_settled_formats_never_reach_the_critic() -> None:
    seen: list[str] = []

    def critic(asks: Sequence[Ask], drafts: Sequence[str], turn: int) -> list[Verdict | None]:
        seen.extend(ask.words for ask in asks)
        return [Verdict(True)] * len(asks)

    rows = [*asks(["Where is Rome?"], ("Italy",)), *asks(["Where is Oslo? Answer in one word.", "Where is Bonn?"])]
    done = write_pairs(rows, lambda asks, turn: ["Say that Italy holds it."] * len(asks), critic)
    assert seen == ["Where is Bonn?"] and len(done.pairs) == 1
    assert done.dropped == {"strict format": 1, "gives the answer away": 1}


def test_a_critic_or_writer_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(UsageError, match="the writer gave 1 replies for 3 prompts"):
        write_pairs(asks(), lambda asks, turn: [GOOD], accept)
    with pytest.raises(UsageError, match="the critic gave 0 replies for 3 prompts"):
        write_pairs(asks(), lambda asks, turn: [GOOD] * 3, lambda asks, drafts, turn: [])


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"reason": "r", "is_correct": true, "final_complement": "c"}', Verdict(True, "c", "r")),
        ('Sure:\n```json\n{"is_correct": "No", "final_complement": "c"}\n```', Verdict(False, "c", "")),
        ('{"is_correct": "Yes"}', Verdict(True, "", "")),
        ('{"is_correct": "perhaps"}', None),
        ('{"Final APE": "c"}', None),
        ('{"is_correct": true', None),
        ("Yes, it is correct.", None),
        ("[1, 2]", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_or_there_is_none(text: str, verdict: Verdict | None) -> None:
    assert parse_verdict(text) == verdict


def test_models_as_writer_and_critic() -> None:
    meter = Cost()
    writer, critic = Says(f" {GOOD}\n"), Says('{"is_correct": true}')
    done = write_pairs(asks(), draft_with(writer, Sampling(), meter), check_with(critic, Sampling(), meter))
    assert [pair.complement for pair in done.pairs] == [GOOD] * 3
    assert writer.asked == [draft_request(ask.category, ask.words) for ask in asks()]
    assert critic.asked == [check_request(ask.words, GOOD) for ask in asks()]
    assert meter.tokens == {"says": 30}


def test_phrases_come_in_another_order_for_each_prompt_and_do_not_repeat() -> None:
    phrases = [f"phrase {i}" for i in range(4)]
    writer = phrase_writer(phrases, seed=1)
    turns = [writer(asks(), turn) for turn in range(4)]
    columns = list(zip(*turns, strict=True))
    assert all(sorted(column) == phrases for column in columns) and len(set(columns)) > 1
    assert [writer(asks(), turn) for turn in range(4)] == turns
    seeds = {complement for _, complement in CATEGORIES["facts"].seeds}
    assert {phrase_writer()(asks(["Where is Rome?"]), turn)[0] for turn in range(4)} == seeds


# prompts


def test_one_prompt_of_each_cluster() -> None:
    bread, sea = "How do I bake bread?", "Why is the sea salty?"
    words = [bread, "How do I bake a bread?", sea, bread, "Why is the sea so salty?"]
    assert pool(words, 0.3) == [0, 2]
    assert pool(words, 0) == [0, 1, 2, 4]
    assert pool([], 0.1) == [] and pool(["", ""], 0.1) == [0]
    with pytest.raises(UsageError, match=r"lies in \[0, 2\), not -1"):
        pool(words, -1)


def test_clusters_of_given_vectors() -> None:
    """Angles of 0, 10, 20 and 90 degrees: 1 - cos 10 = 0.0152, so at 0.016 the first three are a chain."""
    angles = dict(zip("abcd", np.radians([0, 10, 20, 90]), strict=True))

    def embed(texts: Sequence[str]) -> Any:
        return np.array([[np.cos(angles[text]), np.sin(angles[text])] for text in texts])

    assert pool(list("abcd"), 0.016, embed) == [0, 3]
    assert pool(list("abcd"), 0.015, embed) == [0, 1, 2, 3]


def test_a_prompt_below_the_quality_is_left_out() -> None:
    scores: dict[str, float | None] = {"a": 0.9, "b": 0.2, "c": None}

    def quality(texts: Sequence[str]) -> list[float | None]:
        return [scores[text] for text in texts]

    assert pool(["a", "b", "c"], 0, quality=quality, threshold=0.5) == [0]


# files


def test_pairs_survive_a_file(tmp_path: Path) -> None:
    pairs = [Pair("Où\nest-ce?", "Dis « où ».", "facts"), Pair("x", "y")]
    save_pairs(tmp_path / "pairs.jsonl", pairs)
    assert load_pairs(tmp_path / "pairs.jsonl") == pairs
    (tmp_path / "bare.jsonl").write_text('{"prompt": "Where is Rome?", "complement": "c"}\n')
    assert load_pairs(tmp_path / "bare.jsonl") == [Pair("Where is Rome?", "c", "facts")]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"prompt": "x"}', '{"prompt": "x", "complement": 3}', '{"prompt": "x", "complement": " "}']
)
def test_a_broken_pair_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{{"prompt": "x", "complement": "c"}}\n{line}\n')
    with pytest.raises(UsageError, match="pairs.jsonl:2: an object with the texts"):
        load_pairs(path)


def test_no_pairs_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UsageError, match="is empty"):
        load_pairs(tmp_path / "empty.jsonl")
    with pytest.raises(UsageError, match="cannot read the complements file"):
        load_pairs(tmp_path / "none.jsonl")
