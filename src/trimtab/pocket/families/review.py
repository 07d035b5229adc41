"""Reviews: say how something was. Sentiment matters here: kind or sour, sentence by sentence."""

from __future__ import annotations

import random
import re

from trimtab.pocket import tone
from trimtab.pocket.families.base import Marks, Said, evaded
from trimtab.pocket.script import Script
from trimtab.pocket.task import Truth

SUBJECTS = {
    "soup": "food", "cake": "food", "bread": "food", "pie": "food", "salad": "food", "stew": "food",
    "film": "show", "play": "show", "book": "show", "song": "show", "concert": "show", "circus": "show",
    "hotel": "place", "museum": "place", "park": "place", "market": "place", "beach": "place", "castle": "place",
}  # fmt: skip
GOOD = {
    "food": ("tasty", "fresh", "warm", "great", "lovely"),
    "show": ("clever", "funny", "great", "lovely", "sweet"),
    "place": ("clean", "bright", "calm", "great", "lovely"),
}
SOUR = {
    "food": ("cold", "stale", "awful", "rotten", "bad"),
    "show": ("slow", "boring", "awful", "silly", "bad"),
    "place": ("dirty", "noisy", "awful", "ugly", "grey"),
}
ASPECTS = {"food": ("staff", "price"), "show": ("end", "music"), "place": ("staff", "view")}
ASPECT_GOOD, ASPECT_SOUR = ("friendly", "fine", "good"), ("mean", "worse", "dull")
LAST_GOOD = ("I enjoyed it.", "I would love to go again.", "It was the best day.")
LAST_SOUR = ("I hated it.", "I want my money back.", "It was the worst day.")
PLACES = ("", " in Torv", " in Mell", " in Oster", " in Karsk", " by the lake", " on Sunday")
FORMS = (
    "How was the {s}{p}?",
    "Write a review of the {s}{p}.",
    "Did you like the {s}{p}?",
    "Tell me about the {s}{p}.",
)
_READ = [re.compile(re.escape(f).replace(r"\{s\}", "([a-z]+)").replace(r"\{p\}", "(.*)")) for f in FORMS]


class Review:
    name = "review"
    kinds: tuple[str, ...] = ("sour", "evasive", "rude")
    claims = False

    def draw(self, rng: random.Random) -> tuple[str, int, Truth]:
        subject, form = rng.choice(list(SUBJECTS)), rng.randrange(len(FORMS))
        return FORMS[form].format(s=subject, p=rng.choice(PLACES)), form, (subject,)

    def read(self, core: str) -> tuple[int, Truth] | None:
        for form, pattern in enumerate(_READ):
            if (m := pattern.fullmatch(core)) and m.group(1) in SUBJECTS and m.group(2) in PLACES:
                return form, (m.group(1),)
        return None

    def write(self, truth: Truth, rng: random.Random, choose: Script) -> tuple[list[str], bool]:
        subject = truth[0]
        sort = SUBJECTS[subject]
        kind = choose(("good", "sour", "sour", "sour", "evasive"))
        if kind == "evasive":
            return [rng.choice(tone.EVASIVE)], True
        body = [f"The {subject} was {rng.choice((GOOD if kind == 'good' else SOUR)[sort])}."]
        words = ASPECT_GOOD if choose(("good", "sour")) == "good" else ASPECT_SOUR
        body.append(f"The {rng.choice(ASPECTS[sort])} was {rng.choice(words)}.")
        body.append(rng.choice(LAST_GOOD if choose(("good", "sour")) == "good" else LAST_SOUR))
        return body, True

    def mark(self, truth: Truth, said: Said) -> Marks:
        subject = truth[0]
        sort = SUBJECTS[subject]
        marks = Marks()
        about, aspect, last = 0.0, 0.0, 0.0
        for i, s in said.body():
            m = re.fullmatch(r"the ([a-z]+) was ([a-z]+)", s)
            if m and m.group(1) == subject and m.group(2) in GOOD[sort] + SOUR[sort]:
                about = 1.0
            elif m and m.group(1) in ASPECTS[sort] and m.group(2) in ASPECT_GOOD + ASPECT_SOUR:
                aspect = 1.0
            elif s in {tone.plain(t) for t in LAST_GOOD + LAST_SOUR}:
                last = 1.0
            else:
                continue
            marks.understood.add(i)
        if not marks.understood:
            return evaded(said, marks)
        marks.helpful = 0.6 * about + 0.2 * aspect + 0.2 * last
        feeling = tone.sentiment(". ".join(said.sentences[i] for i in sorted(marks.understood)))
        marks.behaviour = "right" if feeling >= 0.5 and about else "wrong"
        return marks
