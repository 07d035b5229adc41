"""Which of two answers is better? One protocol for an endpoint, a local model, any policy, a reward.

    judge.compare(prompts, a, b) -> [Verdict(p_a, tie, flipped, ...), ...]

A judge that reads both answers is always asked twice, with the answers in both orders:

    p_a = (P(a wins | a shown first) + P(a wins | a shown second)) / 2

Only a judge that prefers the same answer in both orders has preferred it: anything else is a tie, and where the preferred
answer changed with the order the pair is `flipped`. (A judge that always takes the first gives ties and p_a = 1/2.) If one
of the two orders gives no verdict there is none: half a verdict would favour a position.

Equal answers are a tie without a call. A reward needs no order: p_a = sigmoid(r_a - r_b) where it is calibrated with a
temperature (`calibrated`), else 1, 1/2 or 0, which says who wins and not how likely.

The other way round, `anchored.Anchored` makes a reward of a pair judge.

`parse_judge` reads what a user writes: `judge:url=...,model=...`, `judge:path=DIR`, `pocket/chat`, a folder, a reward.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from trimtab.errors import UsageError, unknown
from trimtab.fingerprint import fingerprint_of
from trimtab.measure.cache import Cache
from trimtab.policy import Cost, Policy, Prompt
from trimtab.rewards.base import Reward
from trimtab.rewards.endpoint import Endpoint, Reply
from trimtab.rewards.judge import Judge, Judgement, Service, ask, unparsed
from trimtab.rewards.verdicts import fill, first_choice, parse_choice, shown, verdict_token
from trimtab.sampling import Sampling
from trimtab.spec import build, parse_spec

RUBRIC = "Which is more right, helpful and clear? Length is no merit."
QUESTION = """Compare two answers. {rubric} Say A or B alone.

Question: {prompt}

Answer A: {a}

Answer B: {b}

Better:"""
REMINDER = "That is no verdict. Reply with A or B and nothing else."
_SIDES = {"A": 1.0, "tie": 0.5, "B": 0.0}


@dataclass(frozen=True)
class Verdict:
    """What a judge said of answers a and b to one prompt.

    p_a        the probability that a is better, mean of both orders; None: not judged
    tie        neither was preferred in both orders
    flipped    the preferred answer changed with the order; None where no order was shown
    identical  the answers are the same: a tie without a call
    orders     P(a wins) with a shown first, and with a shown second
    raw        the judge's words, where there were any, in these two orders
    kind       why there is no verdict ("timeout", "refusal", "unparsed", ...), "" where there is one; error: in words
    mass       what a local model gives to "A" and "B" together, the mean of both orders
    """

    p_a: float | None
    tie: bool = False
    flipped: bool | None = None
    identical: bool = False
    orders: tuple[float | None, float | None] = (None, None)
    raw: tuple[str | None, str | None] = (None, None)
    kind: str = ""
    error: str = ""
    mass: float | None = None

    @property
    def outcome(self) -> float | None:
        """1: a won, 1/2: a tie, 0: b won; None: not judged."""
        if self.p_a is None:
            return None
        return 0.5 if self.tie else float(self.p_a > 0.5)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"outcome": self.outcome}


class PairJudge(ABC):
    """Compares answers.

    name         what tables call it
    fingerprint  everything that a verdict depends on
    identity     which model judges: a local one's fingerprint, an endpoint's name for it, None where no model does
    reward       the reward that judges, None for none
    chance       whether p_a is a probability, and not only 1, 1/2 or 0
    """

    name: str
    fingerprint: str
    identity: str | None = None
    reward: Reward | None = None
    chance: bool = False

    def compare(
        self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str], meter: Cost | None = None
    ) -> list[Verdict]:
        """One verdict a row; `a[i]` and `b[i]` answer `prompts[i]`. What it took is charged to `meter`."""
        if not len(prompts) == len(a) == len(b):
            raise UsageError(
                f"judge {self.name}: {len(prompts)} prompts, {len(a)} and {len(b)} answers; one each is needed"
            )
        out: list[Verdict] = [Verdict(0.5, True, None, True, (0.5, 0.5))] * len(prompts)
        rows = [row for row in range(len(prompts)) if a[row] != b[row]]
        if rows:
            found = self._compare([prompts[i] for i in rows], [a[i] for i in rows], [b[i] for i in rows], meter)
            for row, verdict in zip(rows, found, strict=True):
                out[row] = verdict
        return out

    def _compare(
        self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str], meter: Cost | None
    ) -> list[Verdict]:
        both = self.prefer([*prompts, *prompts], [*a, *b], [*b, *a], meter)
        return [in_both_orders(first, second) for first, second in zip(both[: len(a)], both[len(a) :], strict=True)]

    def keep_in(self, cache: Cache) -> None:  # noqa: B027  most judges keep nothing
        """Use this cache from now on."""

    @abstractmethod
    def prefer(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], meter: Cost | None
    ) -> list[Judgement]:
        """For each row P(the answer shown first is better) in this one order."""


def in_both_orders(first: Judgement, second: Judgement) -> Verdict:
    """The verdict on (a, b): first was shown (a, b), second (b, a); both values are of the answer shown first."""
    raw = (first.raw, second.raw)
    one, two = first.value, None if second.value is None else 1 - second.value
    if one is None or two is None:
        why = first if one is None else second
        return Verdict(None, orders=(one, two), raw=raw, kind=why.kind, error=why.error)
    agreed = (one > 0.5 and two > 0.5) or (one < 0.5 and two < 0.5)
    masses = [judgement.mass for judgement in (first, second) if judgement.mass is not None]
    return Verdict(
        (one + two) / 2, not agreed, (one - 0.5) * (two - 0.5) < 0, False, (one, two), raw,
        mass=sum(masses) / len(masses) if masses else None,
    )  # fmt: skip


@dataclass(eq=False, kw_only=True)
class LanguageJudge(Service, PairJudge):  # type: ignore[misc]  # its identity is never None
    """A language model that reads both answers, at an endpoint or local; see `Service` for its options."""

    slug: ClassVar[str] = "judge"

    rubric: str = RUBRIC  # what to judge by: a sentence, a text file, or a whole question with {prompt}, {a} and {b}
    by: Literal["auto", "words"] = "auto"  # words: read what it says even where probabilities can be had

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by == "words":
            self.logprobs = False
        self.name = f"{self.who} (words)" if self.by == "words" else self.who
        self.fingerprint = fingerprint_of("pair judge", self.options_digest(), self.by)
        self.chance = self.by != "words"

    def question(self, prompt: Prompt, first: str, second: str) -> str:
        slots = {"prompt": shown(prompt), "a": first, "b": second}
        if "{a}" in self.rubric and "{b}" in self.rubric:
            return fill(self.rubric, **slots)
        return fill(QUESTION, **slots, rubric=self.rubric)

    def prefer(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], meter: Cost | None
    ) -> list[Judgement]:
        questions = [self.question(*row) for row in zip(prompts, first, second, strict=True)]
        if isinstance(self.behind, Endpoint):
            before, calls = self.behind.tokens, self.behind.calls
            out = ask(self.behind, questions, self.settings(), self._read, REMINDER, self.retries)
            if meter is not None:
                _charge(meter, self.name, self.behind.tokens - before, self.behind.calls - calls)
            return out
        if self.by == "words":
            return by_words(self.behind.lm, questions, self.max_tokens, meter)
        return [
            Judgement(None, kind="too long", error=chosen.error)
            if chosen.p is None
            else Judgement(chosen.p[0], how="log-probabilities", mass=chosen.mass)
            for chosen in self.behind.choose(questions, ["A", "B"], meter)
        ]

    def _read(self, reply: Reply) -> Judgement:
        text = reply.text or ""
        top = verdict_token(reply.positions, text) if self.logprobs else None
        if top is not None and (value := first_choice(top, self.least_mass)) is not None:
            return Judgement(value, text, how="log-probabilities")
        said = parse_choice(text)
        return Judgement(_SIDES[said], text, how="words") if said is not None else unparsed(text)


class PolicyJudge(PairJudge):
    """Any policy (a steered model, best-of-n, ...) as a judge, by the words of its greedy answer."""

    def __init__(self, policy: Policy, identity: str | None = None, rubric: str = RUBRIC, max_tokens: int = 16) -> None:
        self.policy, self.rubric, self.max_tokens = policy, rubric, max_tokens
        self.name = f"{policy.name} (words)"
        self.fingerprint = fingerprint_of("policy judge", identity or policy.name, rubric, max_tokens)
        self.identity = identity or policy.name

    def prefer(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], meter: Cost | None
    ) -> list[Judgement]:
        rows = zip(prompts, first, second, strict=True)
        questions = [fill(QUESTION, rubric=self.rubric, prompt=shown(p), a=a, b=b) for p, a, b in rows]
        return by_words(self.policy, questions, self.max_tokens, meter)


class RewardJudge(PairJudge):
    """A reward as a judge: each answer is scored by itself, so there is no order.

    temperature: of sigmoid((r_a - r_b) / temperature); none: that of a `calibrated` reward, else no probability.
    """

    def __init__(self, reward: Any, temperature: float | None = None) -> None:
        from trimtab.rewards import Calibrated, as_reward

        self.scorer: Reward = as_reward(reward)
        if temperature is not None and not temperature > 0:
            raise UsageError(f"the temperature of judge {self.scorer.name!r} must be above 0, not {temperature}")
        if temperature is None and isinstance(self.scorer, Calibrated):
            temperature = 1.0 if self.scorer.calibration.kind == "temperature" else None
        self.temperature, self.chance, self.reward = temperature, temperature is not None, self.scorer
        self.name = self.scorer.name
        self.identity = self.scorer.identity if isinstance(self.scorer, Service) else None
        self.fingerprint = fingerprint_of("reward judge", self.scorer.fingerprint, temperature)

    def keep_in(self, cache: Cache) -> None:
        if isinstance(self.scorer, Service):
            self.scorer.keep_in(cache)

    def _compare(
        self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str], meter: Cost | None
    ) -> list[Verdict]:
        scores = self.scorer.score([*prompts, *prompts], [*a, *b], meter)
        said = [Judgement(score) for score in scores] if not isinstance(self.scorer, Judge) else self.scorer.last
        half = len(a)
        return [self._verdict(said[i], said[half + i]) for i in range(half)]

    def prefer(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], meter: Cost | None
    ) -> list[Judgement]:
        found = self._compare(prompts, first, second, meter)
        return [Judgement(verdict.p_a, kind=verdict.kind, error=verdict.error) for verdict in found]

    def _verdict(self, a: Judgement, b: Judgement) -> Verdict:
        raw = (a.raw, b.raw)
        if a.value is None or b.value is None:
            why = a if a.value is None else b
            error = why.error or f"{self.scorer.name} gave no score"
            return Verdict(None, raw=raw, kind=why.kind or "no score", error=error)
        gap = a.value - b.value
        p = (1 + math.tanh(gap / self.temperature / 2)) / 2 if self.temperature else (1 + (gap > 0) - (gap < 0)) / 2
        return Verdict(p, gap == 0, None, False, (p, p), raw)


def by_words(policy: Policy, questions: Sequence[str], max_tokens: int, meter: Cost | None) -> list[Judgement]:
    """What a policy's greedy answers choose. One that cannot be asked (a question over the context) gives no verdict."""
    asked: list[int] = []
    out = [Judgement(None)] * len(questions)
    encode = getattr(getattr(policy, "lm", None), "encode", None)
    for row, question in enumerate(questions):
        try:
            if encode is not None:
                encode([question])
            asked.append(row)
        except UsageError as error:
            out[row] = Judgement(None, kind="too long", error=str(error).replace("prompt 0", "the judge's question"))
    if not asked:
        return out
    drawn = policy.generate([questions[row] for row in asked], Sampling(max_new_tokens=max_tokens, temperature=0))
    if meter is not None:
        for name, count in drawn.cost.tokens.items():
            meter.tokens[name] = meter.tokens.get(name, 0) + count
        meter.reward_calls += len(asked)
    for row, text in zip(asked, drawn.texts, strict=True):
        said = parse_choice(text)
        out[row] = Judgement(_SIDES[said], text, how="words") if said is not None else unparsed(text)
    return out


def as_judge(judge: PairJudge | Reward | str) -> PairJudge:
    """A pair judge as it is, a reward as one, or a spec parsed."""
    if isinstance(judge, PairJudge):
        return judge
    return parse_judge(judge) if isinstance(judge, str) else RewardJudge(judge)


def parse_judge(spec: str) -> PairJudge:
    """A pair judge from `judge:KEY=VALUE,...`, a local model (`pocket/NAME`, a folder) or a reward (`[reward:]SPEC`).

    A local causal language model judges by the probabilities of "A" and "B"; a folder with a classifier is a reward.
    """
    from trimtab.rewards import REWARDS, parse_reward

    kind, _, rest = spec.partition(":")
    if kind == "reward" and rest:
        return RewardJudge(parse_reward(rest))
    if kind == "judge":
        return build(LanguageJudge, parse_spec(spec)[1], "judge 'judge'")
    if spec in REWARDS:
        return RewardJudge(parse_reward(spec))
    if spec.startswith("pocket/"):
        return LanguageJudge(path=spec)
    if os.path.isdir(spec):
        return RewardJudge(parse_reward(spec)) if _is_classifier(Path(spec)) else LanguageJudge(path=spec)
    try:
        return RewardJudge(parse_reward(spec))
    except UsageError as error:
        if not str(error).startswith("unknown reward "):
            raise
    raise unknown(
        "judge", spec, [*REWARDS, "judge:url=...,model=...", "judge:path=FOLDER", "pocket/chat", "reward:SPEC"]
    )


def _is_classifier(folder: Path) -> bool:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{str(folder)!r} is not a model folder (it has no readable config.json)") from error
    return any(str(name).endswith("ForSequenceClassification") for name in found)


def _charge(meter: Cost, name: str, tokens: int, calls: int) -> None:
    meter.reward_calls += calls
    if tokens:
        meter.tokens[name] = meter.tokens.get(name, 0) + tokens


__all__ = [
    "LanguageJudge",
    "PairJudge",
    "PolicyJudge",
    "RewardJudge",
    "Verdict",
    "as_judge",
    "in_both_orders",
    "parse_judge",
]
