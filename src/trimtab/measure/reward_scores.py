"""The scores that a reward benchmark is made of: which reward is measured, its scores in batches that are kept, pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.measure.diagnostic import Subject
from trimtab.measure.diversity import words
from trimtab.measure.measurement import Measurement
from trimtab.measure.reward_pairs import Pairs
from trimtab.policy import Prompt, prompt_text
from trimtab.rewards import Composite, FromTrl, Function, PythonFile, Reward, WeightedSum, parse_reward

BATCH = 256  # answers scored, and kept, together


def reward_of(subject: Subject) -> Reward:
    """The reward that is measured: that of --reward, else the subject where it is a reward (a classifier's folder)."""
    for candidate in (subject.reward, subject.policy):
        if isinstance(candidate, Reward):
            return candidate
    raise UsageError(
        f"reward-benchmark measures a reward and {subject.name} is none: give --reward SPEC "
        "(sentiment, pocket/reward, a folder of a sequence classifier, ...)"
    )


def gold_of(spec: str, reward: Reward, subject: Subject) -> Reward:
    gold = parse_reward(spec)
    if gold.fingerprint == reward.fingerprint:
        raise UsageError(f"gold={spec} is the reward itself: the gold must be another one, held out")
    if isinstance(subject.policy, Reward):
        raise UsageError(f"gold needs a model that answers, and {subject.name} is a reward: name a model and --reward")
    return gold


def scored(reward: Reward, prompts: Sequence[Prompt], texts: Sequence[str], subject: Subject) -> list[float | None]:
    """Scores in order, in fixed batches, each kept as soon as it is there (not those of functions, which may change)."""
    out: list[float | None] = []
    keep = _settled(reward)
    for first in range(0, len(texts), BATCH):
        part = slice(first, first + BATCH)
        key = fingerprint_of(reward.fingerprint, prompts[part], texts[part]) if keep else ""
        known = subject.cache.load("scores", key) if keep else None
        if known is None:
            subject.say(f"{reward.name}: {first + len(texts[part])} of {len(texts)} answers")
            known = reward.score(prompts[part], texts[part], subject.meter)
            if keep:
                subject.cache.save("scores", key, known)
        out += known
    return out


def scored_with_parts(
    reward: Reward, prompts: Sequence[Prompt], texts: Sequence[str], subject: Subject
) -> tuple[list[float | None], list[dict[str, Any]]]:
    """The scores, and those of the parts of a composite or a sum (none for others); each part is asked once."""
    if not isinstance(reward, (Composite, WeightedSum)):
        return scored(reward, prompts, texts, subject), []
    parts = [scored(part, prompts, texts, subject) for _, part in reward.terms]
    kept = [{"reward": part.name, "scores": scores} for (_, part), scores in zip(reward.terms, parts, strict=True)]
    if isinstance(reward, Composite):
        return reward.combined(parts), kept
    weights = [weight for weight, _ in reward.terms]
    rows = [[value for value in row if value is not None] for row in zip(*parts, strict=True)]
    sums = [sum(w * v for w, v in zip(weights, row, strict=True)) if len(row) == len(weights) else None for row in rows]
    return sums, kept


def _settled(reward: Reward) -> bool:
    """Whether the fingerprint speaks for everything that a score depends on."""
    inner: Sequence[tuple[float, Reward]] = getattr(reward, "terms", ())
    return not isinstance(reward, (FromTrl, Function, PythonFile)) and all(_settled(one) for _, one in inner)


def paired(items: Sequence[dict[str, Any]], scores: Sequence[float | None]) -> Pairs:
    values = np.array(scores, dtype=np.float64)
    numbers: dict[str, int] = {}
    prompt = [numbers.setdefault(prompt_text(item["prompt"]), len(numbers)) for item in items]
    lengths = [
        np.array([len(words(item[side])) for item in items], dtype=np.float64) for side in ("chosen", "rejected")
    ]
    return Pairs(values[: len(items)], values[len(items) :], prompt, [item["subset"] for item in items], *lengths)


def stored_pairs(measurement: Measurement) -> Pairs:
    kept = measurement.details["pairs"]
    sides = [np.array(kept[side], dtype=np.float64) for side in ("chosen", "rejected")]
    return Pairs(sides[0], sides[1], kept["prompt"], kept["subset"])
