"""Refusal and over-refusal: what share of harmful prompts is refused, and what share of harmless ones.

    refusal       share of answers to prompts that should be refused that are refusals          higher is better
    over-refusal  share of answers to prompts that should be answered that are refusals         lower is better

An answer is a refusal if it sounds like one (`measure.refusal`: a versioned list of phrases). Several samples of a prompt
are averaged first: prompts are the unit of resampling. Where nothing happened in n prompts the bound is exact
(Clopper-Pearson; for 0 of n the upper end is 1 - 0.025^(1/n)), because a bootstrap of equal values says nothing.

What it means: how often the model says no. What it does not mean: that what it said otherwise was harmful, or useful.
Files differ from published lists in one thing only: they are the user's; none is shipped. Cost: one answer a prompt and
sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.measure.diagnostic import Diagnostic, Subject
from trimtab.measure.measurement import Dots, Measurement, Row
from trimtab.measure.refusal import VERSION, by_phrases
from trimtab.measure.stats import Interval, mean_interval
from trimtab.policy import Prompt, prompt_text
from trimtab.prompts import read_prompts

CARD = Card(
    slug="refusal",
    name="Refusal and over-refusal",
    paper="phrases after 2310.06987 and 2307.15043; over-refusal after XSTest (2308.01263)",
    summary="How often harmful prompts are refused, and harmless ones too.",
    goal="safety",
    stage="audit",
    mechanism="metric",
    signal=("none",),
    access="black-box text",
    produces="report",
    needs=("a file of prompts that should be refused", "a file of prompts that should not (for over-refusal)"),
    infer_multiplier="1",
    fit_cost="none",
    benefit_metrics=("refusal",),
    cost_metrics=("over-refusal",),
    limits=("a refusal is recognised by its phrases, in English",),
    dimensions=("refusal",),
    example="trimtab measure refusal pocket/chat --texts harmful.txt harmless.txt --against pocket/base",
    choose="To see at once whether a change made the model say no more often, and to whom.",
)


@dataclass(frozen=True)
class RefusalRateConfig:
    # answers drawn for each prompt
    samples: int = 1
    # at most this many prompts of each file, the first ones (0: all)
    most: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.most < 0:
            raise UsageError(f"samples must be 1 or more and most 0 or more, not {self.samples} and {self.most}")


class RefusalRate(Diagnostic):
    """Refusal and over-refusal of a policy."""

    slug = "refusal"
    Config = RefusalRateConfig
    TEXTS = "prompts that should be refused, one a line; a second file: prompts that should be answered"

    def measure(self, subject: Subject) -> Measurement:
        harmful = self._prompts(subject.file(self.TEXTS))
        harmless = self._prompts(subject.texts[1]) if len(subject.texts) > 1 else []
        if len(subject.texts) > 2:
            raise UsageError(f"refusal takes two files at most ({self.TEXTS}), not {len(subject.texts)}")
        sampling = subject.sampling.but(samples=self.config.samples)
        answers = subject.answers([*harmful, *harmless], sampling)
        refused = np.array(by_phrases(answers.texts), dtype=np.float64).reshape(-1, sampling.samples).mean(1)  # [P]
        columns = {"refusal": refused[: len(harmful)], "over-refusal": refused[len(harmful) :]}
        table = [
            Row.of(label, rate(values), "higher" if label == "refusal" else "lower")
            for label, values in columns.items()
            if len(values)
        ]
        out = Measurement(
            self.slug,
            subject.name,
            subject.measured([harmful, harmless], self.config, sampling=sampling.to_dict(), phrases=VERSION),
            "prompt",
            units=[prompt_text(prompt)[:80] for prompt in [*harmful, *harmless]],
            samples=_side_by_side(columns, len(harmful)),
            table=table,
            figures=[Dots("Answers that refuse", "share", [(r.label, r.value, r.low, r.high) for r in table])],
            cost=subject.meter,
        )
        if not harmless:
            out.warnings.append("no harmless prompts were given: a model that refuses everything looks perfect here")
        out.details["refusals"] = [
            {"prompt": prompt_text(prompt), "answer": answers.texts[row * sampling.samples], "refused": share}
            for row, (prompt, share) in enumerate(zip([*harmful, *harmless], refused.tolist(), strict=True))
        ]
        return out

    def _prompts(self, path: Path) -> list[Prompt]:
        return read_prompts(path)[: self.config.most or None]


def rate(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean of shares in [0, 1] with its interval; exact (Clopper-Pearson) where all are 0 or all are 1."""
    shares = np.asarray(values, dtype=np.float64)
    found = mean_interval(shares)
    if found.low is None and len(shares) and (shares == shares[0]).all() and shares[0] in (0, 1):
        bound = 1 - 0.025 ** (1 / len(shares))
        low, high = (0.0, bound) if shares[0] == 0 else (1 - bound, 1.0)
        return Interval(found.mean, low, high, found.rows, found.prompts)
    return found


def _side_by_side(columns: dict[str, np.ndarray], harmful: int) -> dict[str, list[float | None]]:
    """Columns over all prompts, None where a column does not speak of the prompt."""
    total = sum(len(values) for values in columns.values())
    out: dict[str, list[float | None]] = {}
    for label, values in columns.items():
        if len(values):
            first = 0 if label == "refusal" else harmful
            out[label] = [None] * first + values.tolist() + [None] * (total - first - len(values))
    return out
