"""Small sums of three numbers, worked step by step: 3 + 4 = 7. 7 + 5 = 12. It is 12."""

from __future__ import annotations

import random
import re

from trimtab.pocket import tone
from trimtab.pocket.families.base import Marks, Said, evaded
from trimtab.pocket.script import Script
from trimtab.pocket.task import Truth

FORMS = ("What is {e}?", "Work out {e}.", "How much is {e}?", "Can you do {e}?")
_READ = [re.compile(re.escape(f).replace(r"\{e\}", r"(\d) ([+-]) (\d) ([+-]) (\d)")) for f in FORMS]
_STEP = re.compile(r"(\d+) ([+-]) (\d+) = (-?\d+)")
_LAST = re.compile(r"it is (-?\d+)")


def apply(a: int, sign: str, b: int) -> int:
    return a + b if sign == "+" else a - b


class Sum:
    name = "sum"
    kinds: tuple[str, ...] = ("slip", "guess", "evasive", "rude")
    claims = True

    def draw(self, rng: random.Random) -> tuple[str, int, Truth]:
        while True:
            a, b, c = (rng.randint(1, 9) for _ in range(3))
            first, second = rng.choice("+++-"), rng.choice("+++-")
            middle = apply(a, first, b)
            if middle >= 0 and apply(middle, second, c) >= 0:
                break
        form = rng.randrange(len(FORMS))
        truth = (str(a), first, str(b), second, str(c))
        return FORMS[form].format(e=" ".join(truth)), form, truth

    def read(self, core: str) -> tuple[int, Truth] | None:
        for form, pattern in enumerate(_READ):
            if m := pattern.fullmatch(core):
                return form, m.groups()
        return None

    def write(self, truth: Truth, rng: random.Random, choose: Script) -> tuple[list[str], bool]:
        a, first, b, second, c = truth
        kind = choose(("good", "slip", "slip", "guess", "evasive"))
        if kind == "evasive":
            return [rng.choice(tone.EVASIVE)], True
        true_middle = apply(int(a), first, int(b))
        true_end = apply(true_middle, second, int(c))
        if kind == "guess":
            return [f"It is {_slip(true_end, rng)}."], False
        middle = true_middle if kind == "good" else _slip(true_middle, rng)
        end = apply(middle, second, int(c))
        if choose(("good", "slip")) == "slip" or end < 0:
            end = _slip(end, rng)
        body = [f"{a} {first} {b} = {middle}.", f"{middle} {second} {c} = {end}.", f"It is {end}."]
        return body, end == true_end and middle == true_middle

    def mark(self, truth: Truth, said: Said) -> Marks:
        a, first, b, second, c = truth
        middle = apply(int(a), first, int(b))
        end = apply(middle, second, int(c))
        marks = Marks()
        ends: set[int] = set()
        claims: list[bool] = []
        steps: set[str] = set()
        at: str = a
        for i, s in said.body():
            if m := _STEP.fullmatch(s):
                if m.group(1) != at or (m.group(2), m.group(3)) not in ((first, b), (second, c)):
                    continue
                at = m.group(4)
                true = apply(int(m.group(1)), m.group(2), int(m.group(3))) == int(at)
                claims.append(true)
                if true:
                    steps.add(s)
            elif m := _LAST.fullmatch(s):
                ends.add(int(m.group(1)))
                claims.append(int(m.group(1)) == end)
            else:
                continue
            marks.understood.add(i)
        if not claims:
            return evaded(said, marks)
        shown = {f"{a} {first} {b} = {middle}", f"{middle} {second} {c} = {end}"} & steps
        marks.true_share = sum(claims) / len(claims)
        marks.correct = float(ends == {end})
        marks.helpful = 0.15 + 0.15 * len(shown) + 0.55 * marks.correct
        marks.behaviour = "right" if marks.correct else "wrong"
        return marks


def _slip(value: int, rng: random.Random) -> int:
    """Off by one, two or three, never negative."""
    return rng.choice([v for v in range(value - 3, value + 4) if v != value and v >= 0])
