r"""A language model that reads question and answer and gives a score: at a chat endpoint, or a local model.

    judge:url=http://localhost:8000/v1,model=NAME          a service; its key from $OPENAI_API_KEY, or key_env=NAME
    judge:path=pocket/chat                                  a local model, asked exactly

Score from token probabilities (arXiv 2502.17424), where they are offered: sum_v v p_v / sum_v p_v over the tokens that are
whole numbers in low..high; None where these hold less than `least_mass`. Where they are not, or where the tokenizer splits
numbers, the number that the words state; words that state none are asked for again, up to `retries` times, then None. A
local model is never sampled: each number's probability is computed, and the score is their mean.

The scale is 1 to 9, not 1 to 10: nine scores of one digit each are one token in every tokenizer, so that probabilities can
be read. The rubric is a sentence, a file, or a whole question with {prompt}, {response}, {low} and {high}.

None is a judgement that was not made, never 0; `last` holds what happened to each row of the last call (the raw words, the
kind of failure). Cost: one request, or one forward of the question, an answer; with samples=k, k requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.measure.cache import Cache
from trimtab.measure.refusal import is_refusal
from trimtab.policy import Cost, Message, Prompt
from trimtab.rewards.base import Reward
from trimtab.rewards.endpoint import DEFAULT_KEY, Endpoint, Reply
from trimtab.rewards.local_judge import LocalJudge
from trimtab.rewards.verdicts import (
    LEAST_MASS,
    expected_score,
    fill,
    parse_score,
    shown,
    tokens_are_whole,
    verdict_token,
    without_thinking,
)

RUBRIC = "Judge how right, helpful and clear the answer is, not how long."
QUESTION = """Score an answer with a whole number from {low} (useless) to {high} (as good as can be). {rubric} Say the \
number alone.

Question: {prompt}

Answer: {response}

Score:"""
REMINDER = "That is no verdict. Reply with one whole number from {low} to {high} and nothing else."


@dataclass(frozen=True)
class Judgement:
    """What one question to a judge came to.

    value   the score, or the probability that the first answer is better; None: no verdict
    raw     its words, where there were any
    kind    "" for a verdict; else a kind of `Reply`, "unparsed", "small mass", "too long"
    how     "log-probabilities" or "words"
    mass    the probability that the options had together
    """

    value: float | None
    raw: str | None = None
    kind: str = ""
    error: str = ""
    how: str = ""
    mass: float | None = None


@dataclass(eq=False, kw_only=True)
class Service:
    """Who judges: an endpoint (url and model) or a local model (path). The fields that judges of every form share."""

    url: str | None = None  # the base of an OpenAI-compatible endpoint, such as http://localhost:8000/v1
    model: str | None = None  # the model to ask there
    path: str | None = None  # instead of url: a local model, pocket/NAME or a folder
    key_env: str | None = DEFAULT_KEY  # the environment variable that holds the key; none: no key is sent
    rubric: str = RUBRIC  # what to judge by: a sentence, a text file, or a whole question with slots
    logprobs: bool = True  # read token probabilities where the endpoint offers them
    least_mass: float = LEAST_MASS  # probability that verdicts must have together, at an endpoint
    max_tokens: int = 16  # longest reply of an endpoint; more for a model that thinks aloud
    timeout: float = 60.0  # seconds without a sign of life
    retries: int = 3  # further tries after a failure, and after words that are no verdict
    concurrency: int = 4  # requests at a time
    cache: Cache | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if (self.url is None) == (self.path is None):
            raise UsageError("a judge is url=ADDRESS,model=NAME (an endpoint) or path=MODEL (a local model): give one")
        if self.url is not None and not self.model:
            raise UsageError("a judge at url= needs the name of a model: model=NAME")
        if not 0 <= self.least_mass <= 1 or self.max_tokens < 1:
            raise UsageError(
                f"least_mass lies in [0, 1] and max_tokens is 1 or more, not {self.least_mass} and {self.max_tokens}"
            )
        self.rubric = _text_of(self.rubric)
        self.cache = Cache.default()
        self.behind: Endpoint | LocalJudge
        if self.url is not None:
            self.behind = Endpoint(
                self.url, self.model or "", self.key_env, timeout=self.timeout, retries=self.retries,
                concurrency=self.concurrency, cache=self.cache,
            )  # fmt: skip
        else:
            self.behind = LocalJudge(self.path, self.cache)
        # which model it is, to notice that it judges itself
        self.identity = self.behind.identity if isinstance(self.behind, LocalJudge) else str(self.model)

    @property
    def who(self) -> str:
        """What tables call the judge."""
        if isinstance(self.behind, Endpoint):
            return f"{self.model} at {self.behind.host}"
        return str(self.behind.lm.name)

    def keep_in(self, cache: Cache) -> None:
        """Use another cache from now on."""
        self.cache = self.behind.cache = cache

    def settings(self, temperature: float = 0.0) -> dict[str, Any]:
        """The rest of a request to the endpoint."""
        out: dict[str, Any] = {"temperature": temperature, "max_tokens": self.max_tokens}
        return out | ({"logprobs": True, "top_logprobs": 20} if self.logprobs else {})

    def options_digest(self) -> str:
        """A hash of who judges and by what; the key and how patiently it is asked are no part of it."""
        return fingerprint_of(self.behind.fingerprint, self.rubric, self.logprobs, self.least_mass, self.max_tokens)


@dataclass(eq=False, kw_only=True)
class Judge(Service, Reward):
    """A score in [low, high] from a language model."""

    slug = "judge"
    on_prefixes = False

    low: int = 1  # the worst score
    high: int = 9  # the best score
    samples: int = 1  # replies drawn and averaged; above 1 only with a temperature
    temperature: float = 0.0  # of the endpoint's replies

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1000:
            raise UsageError(f"reward 'judge': 0 <= low < high <= 1000 is needed, not {self.low} and {self.high}")
        if self.samples < 1 or self.temperature < 0 or (self.samples > 1 and self.temperature == 0):
            raise UsageError(
                f"reward 'judge': samples={self.samples} at temperature={self.temperature:g} would be copies of one "
                "reply: give temperature=1, or samples=1"
            )
        super().__post_init__()
        if self.path is not None and self.samples > 1:
            raise UsageError("reward 'judge': a local model's score is exact; samples belongs to an endpoint")
        self.last: list[Judgement] = []

    @property
    def name(self) -> str:
        return f"judge/{self.who}"

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.slug, self.options_digest(), self.low, self.high, self.samples, self.temperature)

    @property
    def last_raw(self) -> list[str | None]:
        """The words behind the last scores."""
        return [judgement.raw for judgement in self.last]

    def question(self, prompt: Prompt, text: str) -> str:
        """What the judge is asked about an answer."""
        slots = {"low": str(self.low), "high": str(self.high), "prompt": shown(prompt), "response": text}
        return _question(QUESTION, self.rubric, ("prompt", "response"), slots)

    def judge(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Judgement]:
        """Every answer's score with all that is known about it; `score` is the scores alone."""
        questions = [self.question(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        if isinstance(self.behind, LocalJudge):
            numbers = range(self.low, self.high + 1)
            meter = Cost()
            chosen = self.behind.choose(questions, [str(number) for number in numbers], meter)
            self.tokens_forwarded += meter.tokens_forwarded
            return [
                Judgement(None, kind="too long", error=one.error)
                if one.p is None
                else Judgement(float(_dot(one.p, numbers)), how="log-probabilities", mass=one.mass)
                for one in chosen
            ]
        before = self.behind.tokens
        reminder = REMINDER.format(low=self.low, high=self.high)
        settings = self.settings(self.temperature)
        takes = [
            ask(self.behind, questions, settings, self._read, reminder, self.retries, take)
            for take in range(self.samples)
        ]
        self.tokens_forwarded += self.behind.tokens - before
        return [_mean(list(row)) for row in zip(*takes, strict=True)]

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
        self.last = self.judge(prompts, texts)
        return [judgement.value for judgement in self.last]

    def _read(self, reply: Reply) -> Judgement:
        text = reply.text or ""
        words = parse_score(text, self.low, self.high)
        number_first = text.strip()[:1].isdigit()
        top = verdict_token(reply.positions, text) if self.logprobs else None
        # "3 reasons why ..." begins with a number that is no verdict
        if top is not None and tokens_are_whole(top, self.high) and (words is not None or not number_first):
            value = expected_score(top, self.low, self.high, self.least_mass)
            if value is not None:
                return Judgement(value, text, how="log-probabilities")
            if number_first:
                return Judgement(None, text, "small mass", "whole numbers in range were unlikely", "log-probabilities")
        return Judgement(words, text, how="words") if words is not None else unparsed(text)


def ask(
    endpoint: Endpoint,
    questions: Sequence[str],
    settings: dict[str, Any],
    read: Callable[[Reply], Judgement],
    reminder: str,
    retries: int,
    take: int = 0,
) -> list[Judgement]:
    """A judgement a question. Words that are no verdict are shown to the judge with a reminder, up to `retries` times."""
    talks: list[list[Message]] = [[{"role": "user", "content": question}] for question in questions]
    out: list[Judgement] = []
    waiting = list(range(len(talks)))
    for turn in range(retries + 1):
        replies = endpoint.chat([talks[row] for row in waiting], settings, take)
        judged = [
            Judgement(None, reply.text, reply.kind, reply.error) if reply.kind else read(reply) for reply in replies
        ]
        if turn == 0:
            out = judged
        for row, judgement in zip(waiting, judged, strict=True):
            out[row] = judgement
        waiting = [row for row, judgement in zip(waiting, judged, strict=True) if judgement.kind == "unparsed"]
        if not waiting:
            break
        for row in waiting:
            said: Message = {"role": "assistant", "content": out[row].raw or ""}
            talks[row] = [*talks[row], said, {"role": "user", "content": reminder}]
    return out


def unparsed(text: str) -> Judgement:
    """Words without a verdict: a refusal, or anything else."""
    said = without_thinking(text)
    if said is None:
        return Judgement(None, text, "unparsed", "the reply ended while the judge was thinking: give more max_tokens")
    if is_refusal(said):
        return Judgement(None, text, "refusal", "the words of the reply are a refusal")
    return Judgement(None, text, "unparsed", "the reply states no verdict")


def _mean(takes: list[Judgement]) -> Judgement:
    """Several samples of one judgement as one: the mean of those that are verdicts, None without any."""
    made = [take.value for take in takes if take.value is not None]
    if len(takes) == 1 or not made:
        return takes[0]
    raw = "\n---\n".join(take.raw or "" for take in takes)
    return Judgement(sum(made) / len(made), raw, how=takes[0].how)


def _question(template: str, rubric: str, needed: Sequence[str], slots: dict[str, str]) -> str:
    if any(f"{{{name}}}" in rubric for name in needed):
        return fill(rubric, **slots)
    return fill(template, **slots, rubric=rubric)


def _text_of(rubric: str) -> str:
    """The rubric, or what stands in the file it names."""
    try:
        named = len(rubric) < 4096 and "\n" not in rubric and Path(rubric).is_file()
        return Path(rubric).read_text(encoding="utf-8").strip() if named else rubric
    except (OSError, ValueError) as error:
        raise UsageError(f"the rubric {rubric[:80]!r} cannot be read as a text file: {error}") from error


def _dot(p: Sequence[float], values: Sequence[int]) -> float:
    return sum(share * value for share, value in zip(p, values, strict=True))
