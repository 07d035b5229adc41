"""Forms of files of questions with options: one right answer (mc), or one that matches a behaviour (belief-mc)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.measure.adapters.form import Form, Item, Row, as_text, form, get, has, optional, text, whole

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHOICE = re.compile(r"^[ \t]*\(([A-Z])\)[ \t]*(.*)$", re.MULTILINE)


def _mc(row: Row, question: str, options: Sequence[Any], answers: Sequence[int], continues: bool = False) -> Item:
    """continues: the options go on from the question, which asks nothing."""
    options = [as_text(one, "an option") for one in options]
    if len(options) < 2:
        raise ValueError("there are fewer than two options")
    if not answers or not all(0 <= answer < len(options) for answer in answers):
        raise ValueError(f"the answer points to none of the {len(options)} options")
    return {
        "question": question,
        "options": options,
        "answer": answers[0],
        "answers": list(answers),
        "continues": continues,
        "subject": optional(row, "subject", "category", "task", "type", "activity_label"),
    }


def _index(value: Any, labels: Sequence[str]) -> int:
    """The place of an answer given as one of the labels, or as a number that counts from 0."""
    word = str(value).strip()
    if word in labels:
        return list(labels).index(word)
    if word.upper() in labels:
        return list(labels).index(word.upper())
    return whole(value, "the answer")


def _listed(question: str, options: str, answer: str) -> Any:
    """A list of options; the answer a letter, a place from 0, or the option itself."""

    def make(row: Row) -> Item:
        asked, given, right = get(row, question), get(row, options), get(row, answer)
        labels: Sequence[str] = LETTERS
        if isinstance(asked, Mapping):  # {"stem": ..., "choices": [...]}
            asked = asked.get("stem")
        if isinstance(given, Mapping):  # {"text": [...], "label": [...]}
            labels = list(map(str, given.get("label", LETTERS)))
            given = given.get("text")
        elif isinstance(given, list) and given and isinstance(given[0], Mapping):  # [{"text", "label"}, ...]
            labels = [str(one.get("label")) for one in given]
            given = [one.get("text") for one in given]
        if not isinstance(given, list):
            raise ValueError(f"{options} is {type(given).__name__}: a list is needed")
        index = given.index(right) if isinstance(right, str) and right in given else _index(right, labels)
        return _mc(row, as_text(asked, question), given, [index], continues=options == "endings")

    return make


def _lettered(row: Row) -> Item:
    options = [get(row, letter) for letter in "abcdef" if optional(row, letter)]
    return _mc(row, text(row, "question"), options, [_index(get(row, "answer"), LETTERS)])


def _numbered(row: Row) -> Item:
    """Context, question, three answers and the place of the right one."""
    question = f"{text(row, 'context')}\n{text(row, 'question')}"
    return _mc(row, question, [get(row, f"ans{n}") for n in range(3)], [whole(get(row, "label"), "label")])


def _blank(row: Row) -> Item:
    """A sentence with a blank: the options are its two ends, so that each option is a whole sentence."""
    before, mark, after = text(row, "sentence").partition("_")
    if not mark or not before.strip():
        raise ValueError("sentence has no blank '_' after its beginning")
    options = [as_text(get(row, name), name) + after for name in ("option1", "option2")]
    return _mc(row, before.rstrip(), options, [whole(get(row, "answer"), "answer") - 1], continues=True)


def _targets(row: Row) -> Item:
    """Targets as {"choices": [...], "labels": [0, 1, ...]} or {option: 0 or 1}; several may be right."""
    given = get(row, "mc1_targets")
    if not isinstance(given, Mapping):
        raise ValueError("mc1_targets is no object")
    both = dict(zip(given["choices"], given["labels"], strict=True)) if "choices" in given else dict(given)
    right = [place for place, label in enumerate(both.values()) if int(label) == 1]
    return _mc(row, text(row, "question"), list(both), right)


def _judged(row: Row) -> Item:
    """A scenario that is reasonable (1) or not (0), with its excuse where it has one."""
    scenario = f"{text(row, 'scenario')} {optional(row, 'excuse')}".strip()
    if "[SEP]" in scenario:
        raise ValueError("a scenario and a trait are no question: this part of the benchmark is not implemented")
    return _mc(row, f"{scenario}\nIs this reasonable?", ["No", "Yes"], [whole(get(row, "label"), "label")])


def _belief(row: Row) -> Item:
    """An A/B question: `stem` is what is before the first choice; the answers are letters, or words of their own."""
    question = text(row, "question")
    found = list(CHOICE.finditer(question))
    matching, other = _first(row, "answer_matching_behavior"), _first(row, "answer_not_matching_behavior")
    letters = [match[1] for match in found]
    if found:
        stem = re.sub(r"\s*\n\s*(Choices|Options):\s*$", "", question[: found[0].start()].rstrip()).rstrip()
        options = [as_text(match[2].strip(), f"choice {match[1]}") for match in found]
        if len(set(letters)) < len(letters):
            raise ValueError("two choices have the same letter")
        places = [_letter(answer, letters) for answer in (matching, other)]
    else:
        stem, options, places = question, [matching.strip(), other.strip()], [0, 1]
    if places[0] == places[1]:
        raise ValueError("the matching answer and the other one are the same")
    return {
        "question": question,
        "stem": stem,
        "options": options,
        "letters": letters,
        "matching": places[0],
        "not_matching": places[1],
    }


def _first(row: Row, name: str) -> str:
    value = get(row, name)
    return as_text(value[0] if isinstance(value, list) and value else value, name)


def _letter(answer: str, letters: list[str]) -> int:
    letter = answer.strip().strip("()")
    if letter not in letters:
        raise ValueError(f"the answer {answer.strip()!r} is none of the choices {', '.join(letters)}")
    return letters.index(letter)


def _filled(row: Row) -> bool:
    return has(row, "label") or has(row, "answer")


FORMS: tuple[Form, ...] = (
    form("mc", "question choices answer", _listed("question", "choices", "answer")),
    form("mc", "question options answer", _listed("question", "options", "answer")),
    form("mc", "question choices answerkey", _listed("question", "choices", "answerkey")),
    form("mc", "question question.choices answerkey", _listed("question", "question.choices", "answerkey")),
    form("mc", "ctx endings label", _listed("ctx", "endings", "label")),
    form("mc", "question a b answer", _lettered),
    form("mc", "question mc1_targets", _targets),
    form("mc", "sentence option1 option2 answer", _blank, _filled),
    form("mc", "context question ans0 ans1 ans2 label", _numbered),
    form("mc", "scenario label", _judged),
    form("belief-mc", "question answer_matching_behavior answer_not_matching_behavior", _belief),
)  # fmt: skip
