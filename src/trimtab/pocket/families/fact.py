"""Facts about people, animals and places: right, wrong, or kept back."""

from __future__ import annotations

import random
import re

from trimtab.pocket import tone
from trimtab.pocket.facts import RELATIONS, value_of
from trimtab.pocket.families.base import Marks, Said, evaded
from trimtab.pocket.script import Script
from trimtab.pocket.task import Truth

FACTS = [(relation, subject) for relation, (_, subjects, _, _) in RELATIONS.items() for subject in subjects]
QUESTIONS = {
    question.format(s=subject): (form, relation, subject)
    for relation, subject in FACTS
    for form, question in enumerate(RELATIONS[relation][2])
}


class Fact:
    name = "fact"
    kinds: tuple[str, ...] = ("wrong", "evasive", "rude")
    claims = True

    def draw(self, rng: random.Random) -> tuple[str, int, Truth]:
        relation, subject = rng.choice(FACTS)
        questions = RELATIONS[relation][2]
        form = rng.randrange(len(questions))
        return questions[form].format(s=subject), form, (relation, subject, value_of(relation, subject))

    def read(self, core: str) -> tuple[int, Truth] | None:
        if core not in QUESTIONS:
            return None
        form, relation, subject = QUESTIONS[core]
        return form, (relation, subject, value_of(relation, subject))

    def write(self, truth: Truth, rng: random.Random, choose: Script) -> tuple[list[str], bool]:
        relation, subject, value = truth
        values, _, _, statement = RELATIONS[relation]
        kind = choose(("good", "wrong", "wrong", "evasive"))
        if kind == "evasive":
            return [rng.choice(tone.EVASIVE)], True
        said = value if kind == "good" else rng.choice([v for v in values if v != value])
        text = statement.format(s=subject, v=said)
        return [text[0].upper() + text[1:] + "."], kind == "good"

    def mark(self, truth: Truth, said: Said) -> Marks:
        relation, subject, value = truth
        values, _, _, statement = RELATIONS[relation]
        marks = Marks()
        pattern = re.escape(statement.format(s=subject, v="@").lower()).replace("@", "([a-z]+)")
        told = [(i, m.group(1)) for i, s in said.body() if (m := re.fullmatch(pattern, s))]
        marks.understood = {i for i, v in told if v in {w.lower() for w in values}}
        if not told:
            return evaded(said, marks)
        right = sum(v == value.lower() for _, v in told)
        marks.true_share = right / len(told)
        marks.correct = float(right == len(told))
        marks.helpful = 1.0 if marks.correct else 0.5 if right else 0.2
        marks.behaviour = "right" if marks.correct else "wrong"
        return marks
