"""The pocket world: tasks by split, answers good, bad or mixed, and text to train on; all of it follows from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

from trimtab.errors import UsageError, unknown
from trimtab.pocket import tone
from trimtab.pocket.families import FAMILIES
from trimtab.pocket.script import Mixed, Pure
from trimtab.pocket.task import SPLITS, Task, dress, split_of

# Chosen so that requests which need more learning (sums, translations) come more often in training text.
TRAINING_WEIGHTS = {
    "fact": 4, "review": 2, "sum": 5, "harm": 2, "advice": 2, "list": 2, "translate": 5, "comfort": 2,
}  # fmt: skip
_MAX_TRIES = 400  # draws in a row that bring nothing new before a split counts as used up


def tasks(split: str, n: int, seed: int, families: tuple[str, ...] = ()) -> list[Task]:
    """`n` different tasks of a split, families in turn (all eight, or those named), the same ones for the same seed.

    "train" is what the shipped models were trained on; "fit" and "test" are held out from them and from each other.
    UsageError for an unknown split or family, or where the split does not hold `n` different questions.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    for name in families:
        if name not in FAMILIES:
            raise unknown("task family", name, FAMILIES)
    if n < 0:
        raise UsageError(f"the number of tasks must not be negative, got {n}")
    rng = random.Random(f"{split}-{seed}")
    names = list(families or FAMILIES)
    seen: set[str] = set()
    found: list[Task] = []
    while len(found) < n:
        if len(found) % len(names) == 0:
            rng.shuffle(names)
        name = names[len(found) % len(names)]
        for _ in range(_MAX_TRIES):
            task = draw(name, rng)
            if task.question not in seen and split_of(task.family, task.core, task.form, task.truth) == split:
                break
        else:
            raise UsageError(f"the {split} split holds fewer than {n} different {name} questions: ask for less")
        seen.add(task.question)
        found.append(task)
    return found


def prompts(split: str, n: int, seed: int, families: tuple[str, ...] = ()) -> list[str]:
    """The prompts of `tasks(split, n, seed, families)`: strings such as "Q: Where does Anna live?\\nA:"."""
    return [task.prompt for task in tasks(split, n, seed, families)]


def draw(family: str, rng: random.Random) -> Task:
    """A random task of a family, of any split."""
    core, form, truth = FAMILIES[family].draw(rng)
    return Task(family, dress(core, rng), core, form, truth)


def kinds(family: str) -> tuple[str, ...]:
    """The ways in which an answer of a family can be bad, for `answer(task, kind, rng)`."""
    if family not in FAMILIES:
        raise unknown("task family", family, FAMILIES)
    return FAMILIES[family].kinds


def answer(task: Task, kind: str, rng: random.Random) -> str:
    """An answer to a task: "good", one of `kinds(task.family)`, or "mixed" (as in the base's text)."""
    family = FAMILIES[task.family]
    if kind not in ("good", "mixed", *family.kinds):
        raise unknown(f"kind of answer to a {task.family} task", kind, ("good", "mixed", *family.kinds))
    script = Mixed(rng) if kind == "mixed" else Pure(kind)
    parts = tone.opener(rng, script, share=0.0 if task.family in ("harm", "comfort") else 0.5)
    body, right = family.write(task.truth, rng, script)
    parts += body
    if family.claims and tone.tone_of(body[0]) not in ("evasive", "refusal"):
        parts += tone.claim(rng, script, right)
    parts += tone.closer(rng, script)
    return " ".join(parts)


def dialogues(seed: int, kind: str = "mixed") -> Iterator[tuple[Task, str]]:
    """Endless (task, answer) pairs of the training split, harder families more often."""
    rng = random.Random(f"dialogues-{kind}-{seed}")
    names, weights = list(TRAINING_WEIGHTS), list(TRAINING_WEIGHTS.values())
    while True:
        task = draw(rng.choices(names, weights)[0], rng)
        if split_of(task.family, task.core, task.form, task.truth) == "train":
            yield task, answer(task, kind, rng)
