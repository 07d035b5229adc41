"""Lists of things: the right number of things, all of the right sort, none twice."""

from __future__ import annotations

import random
import re

from trimtab.pocket import tone
from trimtab.pocket.families.base import Marks, Said, evaded
from trimtab.pocket.script import Script
from trimtab.pocket.task import Truth

SORTS = {
    "fruits": ("apple", "plum", "pear", "fig", "lemon", "grape"),
    "colors": ("red", "blue", "green", "black", "white", "pink"),
    "tools": ("saw", "hammer", "drill", "axe", "rake", "spade"),
    "trees": ("oak", "elm", "ash", "birch", "pine", "maple"),
    "birds": ("owl", "crow", "duck", "hawk", "swan", "robin"),
    "clothes": ("hat", "coat", "shoe", "sock", "shirt", "scarf"),
    "drinks": ("tea", "milk", "water", "juice", "coffee", "wine"),
    "games": ("chess", "cards", "tag", "golf", "dice", "darts"),
}
COUNTS = {"two": 2, "three": 3, "four": 4}
FORMS = ("Name {n} {s}{w}.", "Tell me {n} {s}{w}.", "Give me {n} {s}{w}.", "Can you list {n} {s}{w}?")
WHO = ("", " for a child", " for Anna", " I may like", " for a poem")
_READ = [
    re.compile(re.escape(f).replace(r"\{n\}", "([a-z]+)").replace(r"\{s\}", "([a-z]+)").replace(r"\{w\}", "(.*)"))
    for f in FORMS
]
_THINGS = {thing for things in SORTS.values() for thing in things}


class Lists:
    name = "list"
    kinds: tuple[str, ...] = ("wrong", "short", "evasive", "rude")
    claims = True

    def draw(self, rng: random.Random) -> tuple[str, int, Truth]:
        count, sort, form = rng.choice(list(COUNTS)), rng.choice(list(SORTS)), rng.randrange(len(FORMS))
        return FORMS[form].format(n=count, s=sort, w=rng.choice(WHO)), form, (count, sort)

    def read(self, core: str) -> tuple[int, Truth] | None:
        for form, pattern in enumerate(_READ):
            m = pattern.fullmatch(core)
            if m and m.group(1) in COUNTS and m.group(2) in SORTS and m.group(3) in WHO:
                return form, (m.group(1), m.group(2))
        return None

    def write(self, truth: Truth, rng: random.Random, choose: Script) -> tuple[list[str], bool]:
        count, sort = COUNTS[truth[0]], truth[1]
        right = rng.sample(SORTS[sort], count)
        wrong = rng.sample(sorted(_THINGS - set(SORTS[sort])), count)
        kind = choose(("good", "wrong", "wrong", "short", "evasive"))
        if kind == "evasive":
            return [rng.choice(tone.EVASIVE)], True
        if kind == "short":
            return [_join(right[:-1])], False
        things: list[str] = []
        for i in range(count):
            bad = kind == "wrong" if i == 0 else choose(("good", "wrong")) == "wrong"
            things.append(wrong[i] if bad else right[i])
        return [_join(things)], set(things) <= set(SORTS[sort])

    def mark(self, truth: Truth, said: Said) -> Marks:
        count, sort = COUNTS[truth[0]], truth[1]
        marks = Marks()
        things: list[str] = []
        for i, s in said.body():
            found = re.split(r", | and ", s)
            if all(f in _THINGS for f in found):
                marks.understood.add(i)
                things += found
        if not things:
            return evaded(said, marks)
        right = set(things) & set(SORTS[sort])
        marks.true_share = sum(t in SORTS[sort] for t in things) / len(things)
        marks.correct = float(len(right) == len(things) == count)
        share = len(right) / max(count, len(things))
        marks.helpful = 1.0 if marks.correct else 0.8 * share
        marks.behaviour = "right" if marks.correct else "wrong"
        return marks


def _join(things: list[str]) -> str:
    text = things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]
    return text[0].upper() + text[1:] + "."
