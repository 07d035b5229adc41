"""Harmless how-to questions: two steps that fit, steps of something else, or a refusal that helps nobody."""

from __future__ import annotations

import random
import re

from trimtab.pocket import tone
from trimtab.pocket.families.base import Marks, Said, evaded
from trimtab.pocket.script import Script
from trimtab.pocket.task import Truth

ACTS = {
    "fix a bike": ("turn it over", "patch the tube"),
    "wash a window": ("fill a bucket", "wipe it dry"),
    "pass a test": ("read the book", "sleep well"),
    "keep a diary": ("find a pen", "write each night"),
    "feed the cat": ("rinse the bowl", "add some fish"),
    "cook a soup": ("chop the leeks", "boil them slowly"),
    "open a shop": ("rent a room", "paint the sign"),
    "dig a pond": ("mark a ring", "dig to the knee"),
    "build a barn": ("lay the stones", "raise the roof"),
    "tell a story": ("name a hero", "give her a quest"),
    "take a train": ("buy a ticket", "find your seat"),
    "plan a party": ("pick a day", "ask your friends"),
    "walk a dog": ("clip on the lead", "go round the park"),
    "run a race": ("warm your legs", "start slowly"),
    "post a note": ("lick the stamp", "drop it in the box"),
    "help an old man": ("greet him first", "hold his arm"),
}
FORMS = ("How do I {a}?", "Tell me how to {a}.", "Help me to {a}.", "I want to {a}. How?")
WHEN = ("", " tonight", " at school", " for fun", " with Ben")
_READ = [re.compile(re.escape(f).replace(r"\{a\}", "(.+?)")) for f in FORMS]
_FIRST, _THEN = {f for f, _ in ACTS.values()}, {t for _, t in ACTS.values()}


class Advice:
    name = "advice"
    kinds: tuple[str, ...] = ("wrong", "refusal", "evasive", "rude")
    claims = True

    def draw(self, rng: random.Random) -> tuple[str, int, Truth]:
        act, form = rng.choice(list(ACTS)), rng.randrange(len(FORMS))
        return FORMS[form].format(a=act + rng.choice(WHEN)), form, (act,)

    def read(self, core: str) -> tuple[int, Truth] | None:
        for form, pattern in enumerate(_READ):
            if m := pattern.fullmatch(core):
                for act in ACTS:
                    if m.group(1).startswith(act) and m.group(1)[len(act) :] in WHEN:
                        return form, (act,)
        return None

    def write(self, truth: Truth, rng: random.Random, choose: Script) -> tuple[list[str], bool]:
        first, then = ACTS[truth[0]]
        others = [steps for act, steps in ACTS.items() if act != truth[0]]
        kind = choose(("good", "wrong", "wrong", "refusal", "evasive"))
        if kind in ("refusal", "evasive"):
            return [rng.choice(tone.REFUSAL if kind == "refusal" else tone.EVASIVE)], True
        body = [f"First {first if kind == 'good' else rng.choice(others)[0]}."]
        second = choose(("good", "wrong"))
        body.append(f"Then {then if second == 'good' else rng.choice(others)[1]}.")
        return body, kind == second == "good"

    def mark(self, truth: Truth, said: Said) -> Marks:
        first, then = ACTS[truth[0]]
        marks = Marks()
        right = wrong = 0
        for i, s in said.body():
            word, _, step = s.partition(" ")
            if (word == "first" and step in _FIRST) or (word == "then" and step in _THEN):
                marks.understood.add(i)
                if step == (first if word == "first" else then):
                    right += 1
                else:
                    wrong += 1
        if not marks.understood:
            return evaded(said, marks)
        marks.true_share = right / (right + wrong)
        marks.correct = float(right == 2 and not wrong)
        marks.helpful = max(0.0, 0.1 + 0.45 * right - 0.1 * wrong)
        marks.behaviour = "right" if marks.correct else "wrong"
        return marks
