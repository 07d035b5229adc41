"""`Diagnostic`: one way to measure a policy. `Subject`: the policy, the files, the cache it is measured with.

A diagnostic is a class in one file, with `CARD`, a `Config` whose fields are its options, and `measure(subject)`. Its
table says the unit that intervals resample; what it was taken with goes into `Measurement.measured`. Two measurements are
compared unit by unit: by default the paired difference of every column of `samples` that is also a row of the table.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trimtab.errors import UsageError
from trimtab.files import digest
from trimtab.fingerprint import fingerprint_of
from trimtab.measure.cache import Cache
from trimtab.measure.measurement import Better, Change, Comparison, Measurement, Said, check_alike
from trimtab.measure.stats import Interval, paired_difference, sign_test, swap_test, verdict
from trimtab.policy import Completions, Cost, Policy, Prompt
from trimtab.prompts import read_prompts
from trimtab.sampling import Sampling, derive_seed

Progress = Callable[[str], None]
CHUNK = 16  # prompts answered and cached together
OVERRULED = "undecided: exchanging the two at random differs as much"


@dataclass
class Subject:
    """What is measured, and what with.

    policy     anything that answers prompts; `lm` is its local model where it has one
    identity   which policy this is (weights, options), for fingerprints and the cache
    texts      the files of --texts, in order
    prompts    prompts that are at hand already (those of a comparison); `read_prompts` prefers `texts`
    sampling   how answers are drawn: length, temperature, seed
    reward     a `Reward` where one was given; judge: a judge's spec where one was given
    reference  what this subject is compared with, for diagnostics that need both at once (`Diagnostic.REFERENCE`)
    """

    policy: Policy
    identity: str
    texts: list[Path] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    sampling: Sampling = Sampling()
    reward: Any | None = None
    judge: str | None = None
    reference: Subject | None = None
    cache: Cache = field(default_factory=lambda: Cache(None))
    progress: Progress | None = None
    meter: Cost = field(default_factory=Cost)

    @property
    def name(self) -> str:
        return self.policy.name

    @property
    def lm(self) -> Any:
        """The local model whose hidden states and logits can be read. UsageError where there is none."""
        lm = getattr(self.policy, "lm", None)
        if lm is None or not hasattr(self.policy, "token_logprobs"):
            raise UsageError(f"{self.name} is measured by its words alone: this diagnostic needs a local model itself")
        return lm

    @property
    def control(self) -> Any | None:
        """The control that steers the local model, or None."""
        return getattr(self.policy, "control", None)

    @property
    def chat(self) -> bool:
        """Whether prompts go through a chat template."""
        return bool(getattr(getattr(self.lm, "tokenizer", None), "chat_template", None))

    def say(self, message: str) -> None:
        if self.progress is not None:
            self.progress(message)

    def file(self, what: str, number: int = 0) -> Path:
        """The file `number` of --texts; UsageError, saying `what` it should hold, where it was not given."""
        if number >= len(self.texts):
            raise UsageError(f"--texts FILE is needed: {what}")
        return self.texts[number]

    def read_prompts(self, what: str) -> list[Prompt]:
        """Prompts from all files of --texts, else those at hand."""
        if self.texts:
            return [prompt for path in self.texts for prompt in read_prompts(path)]
        if self.prompts:
            return self.prompts
        raise UsageError(f"--texts FILE is needed: {what}")

    def measured(self, texts: Any, config: Any, **more: Any) -> dict[str, Any]:
        """`Measurement.measured`: the model, a hash of the texts, the template, the options, and what else matters."""
        template = template_of(self.policy)
        return {
            "model": self.identity,
            "texts": fingerprint_of(texts),
            "template": fingerprint_of(template) if template else "none",
            "settings": asdict(config),
            **more,
        }

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling | None = None) -> Completions:
        """Answers in fixed chunks of prompts, each with its own seed and cached as soon as it is drawn.

        Their `cost` is what drawing them took, then or now; `meter` is charged for what is drawn now.
        """
        if not hasattr(self.policy, "generate"):
            raise UsageError(f"{self.name} is a reward model: it answers no prompts")
        sampling = sampling or self.sampling
        if sampling.max_new_tokens < 1:
            raise UsageError("answers of 0 tokens say nothing: give --max-new-tokens 1 or more")
        parts = []
        for first in range(0, len(prompts), CHUNK):
            part = list(prompts[first : first + CHUNK])
            seeded = sampling.but(seed=derive_seed(sampling.seed, "measured", first // CHUNK))
            key = fingerprint_of("answers", self.identity, part, seeded.to_dict())
            known = self.cache.load("answers", key)
            if known is not None:
                parts.append(Completions(**{**known, "cost": Cost(**known["cost"])}))
                continue
            self.say(f"{self.name}: prompts {first + 1} to {first + len(part)} of {len(prompts)}")
            start = time.perf_counter()
            drawn = self.policy.generate(part, seeded)
            drawn.cost.seconds = time.perf_counter() - start
            merged = self.meter + drawn.cost
            for name in ("tokens", "reward_calls", "seconds"):
                setattr(self.meter, name, getattr(merged, name))
            columns = ("prompts", "texts", "tokens", "logprobs", "finish_reasons", "kl", "cost")
            self.cache.save("answers", key, {name: getattr(drawn, name) for name in columns})
            parts.append(drawn)
        return Completions.concatenate(parts)


class Diagnostic(ABC):
    """One way to measure. Subclasses set `slug` and `Config`, and implement `measure`.

    TEXTS        what --texts must hold, in words; "" where none is needed
    REFERENCE    the first subject is measured with the second at hand (`Subject.reference`)
    TEMPLATED    prompts go through chat templates, so models with different ones cannot be compared
    TOGETHER     it measures several subjects in one go: `measure_together` instead of `measure` and `compare`
    OUTPUTS      options that name a file it writes; with one of them nothing is taken from the cache of measurements
    DUELS        (TOGETHER) it sets the first subject against each of the others; else all against all
    """

    slug: ClassVar[str]
    Config: ClassVar[type[Any]]
    TEXTS: ClassVar[str] = ""
    REFERENCE: ClassVar[bool] = False
    TEMPLATED: ClassVar[bool] = True
    TOGETHER: ClassVar[bool] = False
    DUELS: ClassVar[bool] = False
    OUTPUTS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any | None = None) -> None:
        self.config = config if config is not None else self.Config()

    @property
    def writes(self) -> bool:
        """Whether an option asks for a file to be written."""
        return any(getattr(self.config, name) for name in self.OUTPUTS)

    @abstractmethod
    def measure(self, subject: Subject) -> Measurement:
        """Measure one subject. Bad input raises `UsageError` before anything is forwarded."""

    def measure_together(self, subjects: Sequence[Subject]) -> Measurement:
        """Measure several subjects in one table (TOGETHER)."""
        raise UsageError(f"{self.slug} measures one model at a time")

    def compare(self, first: Measurement, second: Measurement) -> Comparison:
        """first - second, unit by unit, for every column of `samples` that is a row of the table."""
        check_alike(first, second)
        out = Comparison(self.slug, first.subject, second.subject, first.unit)
        for row in first.table:
            if row.label in first.samples and row.label in second.samples:
                out.changes.append(paired_change(first, second, row.label))
        return out


def paired_change(first: Measurement, second: Measurement, label: str) -> Change:
    """The mean difference of one column with its interval (BCa over units), and what it means for the first.

    A verdict needs the interval and `swap_test`; where all units differ alike there is no interval, and the exact sign test
    stands in its place.
    """
    row = first.row(label)
    a, b = (np.array(side.samples[label], dtype=np.float64) for side in (first, second))  # None: NaN
    difference, gaps = paired_difference(a, b), a - b
    alike = difference.low is None
    p = sign_test(int((gaps > 0).sum()), int((gaps < 0).sum())) if alike else swap_test(gaps)
    found = said(difference, row.better, p)
    overruled = not alike and found == "undecided" != said(difference, row.better)
    return Change(
        label, row.value, second.row(label).value, difference.mean, difference.low, difference.high,
        difference.prompts, found, p if alike or overruled else None, OVERRULED if overruled else "",
    )  # fmt: skip


def said(difference: Interval, better: Better, p_value: float | None = None) -> Said:
    """The verdict on first - second where `better` is good; "changed" where neither direction is.

    p_value: of an exact test that has to agree, and decides where there is no interval (see `stats.verdict`).
    """
    found = verdict(difference, p_value)
    if found == "undecided" or better == "higher":
        return found
    if better == "":
        return "changed"
    return "worse" if found == "better" else "better"


def template_of(policy: Any) -> str | None:
    """The chat template that a policy's prompts go through: that of the model at the bottom; None without one."""
    while policy is not None and not hasattr(policy, "tokenizer"):
        below = getattr(policy, "lm", None) or getattr(policy, "policy", None)
        policy = None if below is policy else below
    return getattr(getattr(policy, "tokenizer", None), "chat_template", None)


def config_files(tool: Diagnostic) -> list[Path]:
    """The files that a diagnostic's options name and that exist, those that it writes left out."""
    read = [one.name for one in fields(tool.config) if one.name not in tool.OUTPUTS]
    values = [getattr(tool.config, name) for name in read]
    flat = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
    return [item for item in flat if isinstance(item, Path) and item.exists()]


def files_digest(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file or folder; UsageError for one that is absent."""
    for path in paths:
        if not path.exists():
            raise UsageError(f"there is no file {path}")
    return [digest(path) for path in paths]
