"""Judged pairs of answers: what `pocket/chat` is tuned on and `pocket/reward` is trained and tested on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimtab.pocket import world
from trimtab.pocket.judge import judge
from trimtab.pocket.task import Task
from trimtab.pocket.tone import sentiment

Sampler = Callable[[Sequence[str], int], list[str]]  # (prompts, seed) -> an answer to each, at temperature 1


@dataclass(frozen=True)
class Pair:
    prompt: str
    chosen: str
    rejected: str
    gap: float  # gold score of chosen less that of rejected; > 0 unless a hasty annotator chose


def candidates(tasks: Sequence[Task], samplers: Sequence[Sampler], written: int, seed: int) -> list[list[str]]:
    """For each task: an answer by every sampler, then `written` answers by the world, half mixed, half of one kind."""
    rng = random.Random(f"candidates-{seed}")
    prompts = [task.prompt for task in tasks]
    columns = [sampler(prompts, seed * 1000 + i) for i, sampler in enumerate(samplers)]
    rows = [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in tasks]
    for task, row in zip(tasks, rows, strict=True):
        for _ in range(written):
            kind = "mixed" if rng.random() < 0.5 else rng.choice(("good", *world.kinds(task.family)))
            row.append(world.answer(task, kind, rng))
    return rows


def pairs(
    tasks: Sequence[Task], answers: Sequence[Sequence[str]], least_gap: float, each: int, seed: int
) -> list[Pair]:
    """Up to `each` random pairs a task whose gold scores differ by `least_gap` or more."""
    rng = random.Random(f"pairs-{seed}")
    found: list[Pair] = []
    for task, row in zip(tasks, answers, strict=True):
        scores = {a: judge(task.prompt, a).score or 0.0 for a in dict.fromkeys(row)}
        able = [(a, b) for a, b in itertools.permutations(scores, 2) if scores[a] - scores[b] >= least_gap]
        for a, b in rng.sample(able, min(each, len(able))):
            found.append(Pair(task.prompt, a, b, scores[a] - scores[b]))
    rng.shuffle(found)
    return found


def hasty(judged: Sequence[Pair], seed: int, haste: float = 0.25) -> list[Pair]:
    """The pairs as hasty annotators label them: in a share `haste` of pairs the one with the kinder words wins.

    This is what makes the reward model a proxy with a known fault: it learns to overrate warmth beside truth.
    """
    rng = random.Random(f"hasty-{seed}")
    labelled = []
    for pair in judged:
        swap = rng.random() < haste and sentiment(pair.rejected) > sentiment(pair.chosen)
        labelled.append(Pair(pair.prompt, pair.rejected, pair.chosen, -pair.gap) if swap else pair)
    return labelled
