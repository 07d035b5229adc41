"""Rewards by name: `parse_reward("0.7*sentiment+0.3*length:target=30")` gives a `Reward`; `REWARDS` is the list.

Importing this imports no torch: a classifier does so when it is made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.errors import UsageError, unknown
from trimtab.rewards.base import Reward, judged
from trimtab.rewards.calibrated import Calibrated, Calibration, preference, probability
from trimtab.rewards.classifier import Classifier
from trimtab.rewards.composite import Composite, Ensemble, Gate, LogSigmoid, Min, Product
from trimtab.rewards.format import Json, Tags
from trimtab.rewards.from_trl import FromTrl
from trimtab.rewards.function import Function, PythonFile
from trimtab.rewards.implicit import Implicit
from trimtab.rewards.judge import Judge
from trimtab.rewards.ngrams import Blocklist, Repetition
from trimtab.rewards.pocket import PocketJudge, PocketReward
from trimtab.rewards.reference import Cosine, ExactMatch, TokenF1
from trimtab.rewards.rule import Keyword, Length, Regex
from trimtab.rewards.sentiment import Sentiment
from trimtab.rewards.verifier import Verifier
from trimtab.rewards.weighted_sum import WeightedSum
from trimtab.spec import build, parse_spec

REWARDS: dict[str, type[Reward]] = {
    "sentiment": Sentiment,
    "length": Length,
    "keyword": Keyword,
    "regex": Regex,
    "json": Json,
    "tags": Tags,
    "repetition": Repetition,
    "blocklist": Blocklist,
    "exact-match": ExactMatch,
    "token-f1": TokenF1,
    "cosine": Cosine,
    "verifier": Verifier,
    "pocket/judge": PocketJudge,
    "pocket/reward": PocketReward,
    "classifier": Classifier,
    "judge": Judge,
    "python": PythonFile,
    "implicit": Implicit,
    "calibrated": Calibrated,
    "min": Min,
    "product": Product,
    "log-sigmoid": LogSigmoid,
    "ensemble": Ensemble,
    "gate": Gate,
}

_WEIGHT = re.compile(r"\s*(-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*")


def parse_reward(spec: str) -> Reward:
    """A reward from `NAME[:key=value,...]`, a model folder, or a weighted sum `0.7*NAME[:...]+0.3*NAME[:...]`.

    Inside a value a '+' ends the part only before a weight ("0.3*") or the name of a reward, and never after a
    backslash, so `regex:pattern=a+b` is one reward. Raises `UsageError` for an unknown name or key (nearest match).
    """
    parts = [spec] if os.path.isdir(spec) else _split_sum(spec)
    if len(parts) == 1 and not _WEIGHT.match(parts[0]):
        return _parse_one(parts[0])
    terms = []
    for part in parts:
        weight = _WEIGHT.match(part)
        terms.append((float(weight[1]) if weight else 1.0, _parse_one(part[weight.end() :] if weight else part)))
    return WeightedSum(terms)


def as_reward(reward: Reward | Callable[..., Any] | str) -> Reward:
    """A reward as it is, a function `fn(prompts, texts)` wrapped, or a spec parsed: what every method accepts."""
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, str):
        return parse_reward(reward)
    if callable(reward):
        return Function(reward)
    raise UsageError(f"a reward is a Reward, a function or a text such as 'sentiment', not {type(reward).__name__}")


def _parse_one(spec: str) -> Reward:
    if spec not in REWARDS and os.path.isdir(spec):
        return Classifier(path=Path(spec))
    name, options = parse_spec(spec)
    if name in REWARDS:
        return build(REWARDS[name], options, f"reward {name!r}")
    if os.path.isdir(name):
        return build(Classifier, {"path": name, **options}, "reward 'classifier'")
    raise unknown("reward", name, REWARDS)


def _split_sum(spec: str) -> list[str]:
    """The parts of a weighted sum; one part where there is no sum."""
    names = "|".join(re.escape(name) for name in sorted(REWARDS, key=len, reverse=True))
    next_part = re.compile(rf"\s*(?:{_WEIGHT.pattern}\S|(?:{names})(?=\s*(?:[:+]|$)))")
    parts, start, position = [], 0, 0
    while position < len(spec):
        weight = _WEIGHT.match(spec, position) if position == start else None
        if weight:  # a sign inside a weight ("1e+3*") splits nothing
            position = weight.end()
            continue
        in_name = ":" not in spec[start:position]
        if spec[position] == "+" and position > start and spec[position - 1] != "\\":
            if in_name or next_part.match(spec, position + 1):
                parts.append(spec[start:position].strip())
                start = position + 1
        position += 1
    return [*parts, spec[start:].strip()]


__all__ = [
    "REWARDS",
    "Blocklist",
    "Calibrated",
    "Calibration",
    "Classifier",
    "Composite",
    "Cosine",
    "Ensemble",
    "ExactMatch",
    "FromTrl",
    "Function",
    "Gate",
    "Implicit",
    "Json",
    "Judge",
    "Keyword",
    "Length",
    "LogSigmoid",
    "Min",
    "PocketJudge",
    "PocketReward",
    "Product",
    "PythonFile",
    "Regex",
    "Repetition",
    "Reward",
    "Sentiment",
    "Tags",
    "TokenF1",
    "Verifier",
    "WeightedSum",
    "as_reward",
    "judged",
    "parse_reward",
    "preference",
    "probability",
]
