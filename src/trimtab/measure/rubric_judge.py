"""Who scores an answer from 0 to 100: a language model with a bank's rubrics, or any reward on a stated scale.

    score = sum_v v p(v) / sum_v p(v)    over the whole numbers v from 0 to 100;    None where sum_v p(v) < 0.25

A local model's p(v) is exact: that of all tokens of v, in both spellings ("30", " 30"), and of the end after them where a
number begins another; so tokenizers that split numbers need no sampling. An endpoint's 20 most likely tokens are read
where it offers them, else its words (`rewards.judge`). The published aggregator loses "30." and " 30".
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.measure.cache import Cache
from trimtab.policy import Cost
from trimtab.rewards.judge import Judge
from trimtab.rewards.local_judge import LocalJudge
from trimtab.rewards.verdicts import LEAST_MASS
from trimtab.spec import build, parse_spec

WORDS = ("TRUE", "FALSE", "UNKNOWN")
Scored = tuple[float | None, str]  # the score; what was said, or what went wrong, where there is none


class Scorer(Protocol):
    """Scores answers to questions from 0 to 100; rubrics are for those that read them."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def score(
        self, rubrics: Sequence[str], questions: Sequence[str], answers: Sequence[str], meter: Cost | None = None
    ) -> list[Scored]: ...


@dataclass
class ScaledReward:
    """A reward as a judge: 100 (r - low) / (high - low), cut to 0..100. `cut` holds the scores that lay outside."""

    reward: Any
    low: float = 0.0
    high: float = 1.0
    cut: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.reward.name} on {self.low:g}..{self.high:g}"

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.reward.fingerprint, self.low, self.high)

    def score(
        self, rubrics: Sequence[str], questions: Sequence[str], answers: Sequence[str], meter: Cost | None = None
    ) -> list[Scored]:
        out: list[Scored] = []
        for value in self.reward.score(list(questions), list(answers), meter):
            scaled = None if value is None else 100 * (value - self.low) / (self.high - self.low)
            if scaled is not None and not -1e-6 <= scaled <= 100 + 1e-6:
                self.cut.append(scaled)
            out.append((None if scaled is None else min(100.0, max(0.0, scaled)), ""))
        return out


class RubricJudge:
    """A language model that reads rubrics. spec: a model, or `judge:url=...,model=...`, or `judge:path=...`.

    words: the rubrics ask for TRUE, FALSE or UNKNOWN; TRUE is 100, FALSE 0 (a local model only).
    """

    def __init__(self, spec: str, words: bool = False, cache: Cache | None = None) -> None:
        name, options = parse_spec(spec)
        if name != "judge":
            name, options = "judge", {"path": spec}
        if taken := {"rubric", "low", "high"} & options.keys():
            raise UsageError(
                f"the bank gives the rubric and the scale of its judge: leave {min(taken)}= out of {spec!r}"
            )
        self.judge = build(Judge, {**options, "low": 0, "high": 100}, "reward 'judge'")
        self.words = words
        if cache is not None:
            self.judge.keep_in(cache)
        if words and not isinstance(self.judge.behind, LocalJudge):
            raise UsageError("a bank of TRUE and FALSE needs a local model as its judge: --judge MODEL")

    @property
    def name(self) -> str:
        return self.judge.name

    @property
    def identity(self) -> str:
        """Which model it is."""
        return self.judge.identity

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.judge.fingerprint, self.words)

    def score(
        self, rubrics: Sequence[str], questions: Sequence[str], answers: Sequence[str], meter: Cost | None = None
    ) -> list[Scored]:
        out: list[Scored] = [(None, "")] * len(answers)
        for rubric in dict.fromkeys(rubrics):
            rows = [row for row, one in enumerate(rubrics) if one == rubric]
            judge = copy.copy(self.judge)  # the model is loaded once
            judge.rubric = rubric.replace("{question}", "{prompt}").replace("{answer}", "{response}")
            before = judge.tokens_forwarded
            scored = self._score(judge, [questions[row] for row in rows], [answers[row] for row in rows], meter)
            if meter is not None:
                meter.reward_calls += len(rows)
                spent = judge.tokens_forwarded - before
                meter.tokens[self.name] = meter.tokens.get(self.name, 0) + spent
            for row, one in zip(rows, scored, strict=True):
                out[row] = one
        return out

    def _score(
        self, judge: Judge, questions: Sequence[str], answers: Sequence[str], meter: Cost | None
    ) -> list[Scored]:
        if self.words and isinstance(judge.behind, LocalJudge):
            asked = [judge.question(*row) for row in zip(questions, answers, strict=True)]
            chosen = judge.behind.choose(asked, WORDS, meter)
            return [(None, one.error) if one.p is None else of_words(one.p, one.mass or 0.0) for one in chosen]
        judged = judge.judge(list(questions), list(answers))
        return [
            (None, one.error or one.raw or one.kind or "small mass")
            if one.value is None or (one.mass is not None and one.mass < LEAST_MASS)
            else (one.value, "")
            for one in judged
        ]


def of_words(p: Sequence[float], mass: float) -> Scored:
    """100 p(TRUE) / (p(TRUE) + p(FALSE)); None where these hold less than a quarter of all probability."""
    true, false, _ = p
    if (true + false) * mass < LEAST_MASS:
        return None, "UNKNOWN"
    return 100 * true / (true + false), ""
