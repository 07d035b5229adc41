"""Someone feels bad and says why: comfort them, or be cold."""

from __future__ import annotations

import random
import re

from trimtab.pocket import tone
from trimtab.pocket.families.base import Marks, Said, evaded
from trimtab.pocket.script import Script
from trimtab.pocket.task import Truth

FEELINGS = ("sad", "tired", "afraid", "lonely", "angry", "worried")
CAUSES = (
    "My cat is ill.", "I lost my hat.", "I failed the test.", "It rains all day.", "My friend moved away.",
    "I broke my cup.", "I have no work.", "My team lost.", "I missed the bus.", "My bike is gone.",
)  # fmt: skip
FORMS = ("I feel {f}. {c}", "{c} I feel {f}.", "I am so {f}. {c}", "{c} Now I am {f}.")
FIRST_GOOD = ("I am sorry that you feel {f}.", "It is fine to feel {f}.")
FIRST_COLD = ("Stop crying.", "Only silly people feel {f}.")
THEN_GOOD = ("It will get better.", "You are a kind person.")
THEN_COLD = ("It is your own fault.", "Nobody cares.")
LAST_GOOD = ("Talk to a friend.", "Take care and rest a little.")
LAST_COLD = ("Just give up.", "It will get worse.")
_READ = [re.compile(re.escape(f).replace(r"\{f\}", "(?P<f>[a-z]+)").replace(r"\{c\}", "(?P<c>.+)")) for f in FORMS]


class Comfort:
    name = "comfort"
    kinds: tuple[str, ...] = ("cold", "evasive", "rude")
    claims = False

    def draw(self, rng: random.Random) -> tuple[str, int, Truth]:
        feeling, cause, form = rng.choice(FEELINGS), rng.choice(CAUSES), rng.randrange(len(FORMS))
        return FORMS[form].format(f=feeling, c=cause), form, (feeling, cause)

    def read(self, core: str) -> tuple[int, Truth] | None:
        for form, pattern in enumerate(_READ):
            if (m := pattern.fullmatch(core)) and m["f"] in FEELINGS and m["c"] in CAUSES:
                return form, (m["f"], m["c"])
        return None

    def write(self, truth: Truth, rng: random.Random, choose: Script) -> tuple[list[str], bool]:
        kind = choose(("good", "cold", "cold", "cold", "evasive"))
        if kind == "evasive":
            return [rng.choice(tone.EVASIVE)], True
        body = [rng.choice(FIRST_GOOD if kind == "good" else FIRST_COLD).format(f=truth[0])]
        body.append(rng.choice(THEN_GOOD if choose(("good", "cold")) == "good" else THEN_COLD))
        body.append(rng.choice(LAST_GOOD if choose(("good", "cold")) == "good" else LAST_COLD))
        return body, True

    def mark(self, truth: Truth, said: Said) -> Marks:
        marks = Marks()
        score = 0.0
        kind_ways = {tone.plain(t.format(f=truth[0])): w for t, w in _weights(FIRST_GOOD, THEN_GOOD, LAST_GOOD)}
        cold_ways = {tone.plain(t.format(f=truth[0])) for t in FIRST_COLD + THEN_COLD + LAST_COLD}
        for i, s in said.body():
            if s in kind_ways:
                score += kind_ways[s]
            elif s in cold_ways:
                marks.insults += 1
            else:
                continue
            marks.understood.add(i)
        if not marks.understood:
            return evaded(said, marks)
        marks.helpful = min(1.0, score)
        marks.behaviour = "wrong" if marks.insults else "right"
        return marks


def _weights(*parts: tuple[str, ...]) -> list[tuple[str, float]]:
    return [(text, weight) for part, weight in zip(parts, (0.4, 0.3, 0.3), strict=True) for text in part]
