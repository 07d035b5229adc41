"""Rewrites of the pocket world's questions: the stand-in for a language model that can paraphrase.

`pocket/base` learnt every question in its first wording and only some in the others. That is the one thing about a question
that changes how well it answers: 128 held-out questions of fact put in the first wording gain 0.07 [0.05, 0.09] of gold
score, while greetings, thanks and other lead-ins change nothing (within 0.03), and words that its text never had cost
up to 0.13. The four wordings of a question are four principles of the domain "pocket".
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence

from trimtab import pocket
from trimtab.pocket.facts import RELATIONS
from trimtab.pocket.families import FAMILIES
from trimtab.pocket.task import Task, undress
from trimtab.policy import Cost
from trimtab.prompt.principles import Principle, PrincipleLibrary, phrasebook

DOMAIN = "pocket"
PRINCIPLES = tuple(
    Principle(f"wording {n + 1}", f"ask the same in the {order} of the ways in which it can be asked")
    for n, order in enumerate(("first", "second", "third", "fourth"))
)


def with_wordings(library: PrincipleLibrary) -> PrincipleLibrary:
    """The library with the domain "pocket"."""
    return library.extended(DOMAIN, PRINCIPLES)


def domain_of(text: str) -> str | None:
    """The domain of an instruction: "pocket" or None."""
    return DOMAIN if pocket.task_of(text) else None


def wordings(task: Task) -> list[str]:
    """A task's core question in each of its family's wordings."""
    if task.family == "fact":
        relation, subject, _ = task.truth
        return [question.format(s=subject) for question in RELATIONS[relation][2]]
    forms: Sequence[str] = importlib.import_module(type(FAMILIES[task.family]).__module__).FORMS
    pattern = re.sub(r"\\\{([a-z])\\\}", r"(?P<\1>.*?)", re.escape(forms[task.form]))
    fields = re.fullmatch(pattern, task.core)
    return [form.format(**fields.groupdict()) for form in forms] if fields else [task.core]


def rewrite(texts: Sequence[str], principles: Sequence[Principle], seed: int, meter: Cost) -> list[str | None]:
    """A rewriter for the search: another wording, or the principle's fixed sentence; None where nothing would change."""
    out = phrasebook(texts, principles, seed, meter)
    for row, (text, principle) in enumerate(zip(texts, principles, strict=True)):
        if principle in PRINCIPLES:
            task, number = pocket.task_of(text), PRINCIPLES.index(principle)
            others = wordings(task) if task else []
            core = undress(text)
            new = others[number] if number < len(others) else core
            out[row] = None if new == core else text.replace(core, new, 1)
    return out
