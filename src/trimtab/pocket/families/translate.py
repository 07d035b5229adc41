"""Translation into Mivo (`trimtab.pocket.language`): right, in English word order, or with a wrong word."""

from __future__ import annotations

import random
import re

from trimtab.pocket import language, tone
from trimtab.pocket.families.base import Marks, Said, evaded
from trimtab.pocket.script import Script
from trimtab.pocket.task import Truth

FORMS = (
    "How do you say {e} in Mivo?",
    "Translate {e} into Mivo.",
    "What is {e} in Mivo?",
    "Put {e} into Mivo.",
)
_READ = [re.compile(re.escape(f).replace(r"\{e\}", "(the [a-z ]+)")) for f in FORMS]
_MIVO = set(language.WORDS.values())


class Translate:
    name = "translate"
    kinds: tuple[str, ...] = ("order", "wrong", "evasive", "rude")
    claims = True

    def draw(self, rng: random.Random) -> tuple[str, int, Truth]:
        phrases = []
        for noun in rng.sample(list(language.NOUNS), 2):
            adjective = rng.choice(list(language.ADJECTIVES)) + " " if rng.random() < 0.4 else ""
            phrases.append(f"the {adjective}{noun}")
        english = f"{phrases[0]} {rng.choice(list(language.VERBS))} {phrases[1]}"
        form = rng.randrange(len(FORMS))
        return FORMS[form].format(e=english), form, (english,)

    def read(self, core: str) -> tuple[int, Truth] | None:
        for form, pattern in enumerate(_READ):
            if m := pattern.fullmatch(core):
                try:
                    language.translate(m.group(1))
                except ValueError:
                    return None
                return form, (m.group(1),)
        return None

    def write(self, truth: Truth, rng: random.Random, choose: Script) -> tuple[list[str], bool]:
        kind = choose(("good", "order", "wrong", "evasive"))
        if kind == "evasive":
            return [rng.choice(tone.EVASIVE)], True
        words = (language.word_by_word if kind == "order" else language.translate)(truth[0]).split()
        second = choose(("good", "wrong"))
        half = len(words) // 2
        if kind == "wrong":
            _spoil(words, rng.randrange(half), rng)
        if second == "wrong":
            _spoil(words, rng.randrange(half, len(words)), rng)
        return [f"It is {' '.join(words)}."], kind == second == "good"

    def mark(self, truth: Truth, said: Said) -> Marks:
        target = language.translate(truth[0]).split()
        marks = Marks()
        best: tuple[float, float] | None = None
        tries = 0
        for i, s in said.body():
            words = s.removeprefix("it is ").split()
            if not s.startswith("it is ") or not words or sum(w in _MIVO for w in words) < 0.5 * len(words):
                continue
            marks.understood.add(i)
            tries += 1
            longest = max(len(words), len(target))
            placed = sum(a == b for a, b in zip(words, target, strict=False)) / longest
            bag = sum(min(words.count(w), target.count(w)) for w in set(words)) / longest
            best = max(best or (0.0, 0.0), (placed, bag))
        if best is None:
            return evaded(said, marks)
        placed, bag = best
        marks.correct = float(placed == 1.0 and tries == 1)
        marks.true_share = (0.5 * placed + 0.5 * bag) / tries
        marks.helpful = 1.0 if marks.correct else 0.1 + 0.5 * marks.true_share
        marks.behaviour = "right" if marks.correct else "wrong"
        return marks


def _spoil(words: list[str], at: int, rng: random.Random) -> None:
    """Replace one word by another Mivo word of the same kind, in place."""
    for table in (language.NOUNS, language.VERBS, language.ADJECTIVES):
        if words[at] in table.values():
            words[at] = rng.choice([w for w in table.values() if w != words[at]])
            return
