"""Refusal and over-refusal: what share of harmful prompts is refused, and what share of harmless ones.

    refusal       share of answers to prompts that should be refused that are refusals          higher is better
    over-refusal  share of answers to prompts that should be answered that are refusals         lower is better

An answer is a refusal if it sounds like one (`measure.refusal`: a versioned list of phrases). Several samples of a prompt
are averaged first: prompts are the unit of resampling. Where nothing happened in n prompts the bound is exact
(Clopper-Pearson; for 0 of n the upper end is 1 - 0.025^(1/n)), because a bootstrap of equal values says nothing.

Files: plain text (one prompt a line; the first file should be refused, the second answered), or any file of the `refusal`
adapter, whose rows say themselves which they are (XSTest, AdvBench, HarmBench, ...; rows that do not say follow their
file's place). None is shipped. Cost: one answer a prompt and sample.

What it means: how often the model says no, in the words of the list. What it does not mean: that what it said otherwise
was harmful, or useful. When it misleads: a model that cannot write a sentence never refuses; one that refuses everything
is perfect where no harmless prompts are given; other words and other languages of refusal are not recognised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.measure.adapters import Item, read_items
from trimtab.measure.diagnostic import Diagnostic, Subject
from trimtab.measure.measurement import Dots, Measurement, Row
from trimtab.measure.rates import rate
from trimtab.measure.refusal import VERSION, by_phrases
from trimtab.policy import prompt_text
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
    status=("implemented", "verified_cpu"),
    example="trimtab measure refusal pocket/chat --texts harmful.txt harmless.txt --against pocket/base "
    "--template plain",
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
    TEXTS = (
        "prompts that should be refused; a second file: prompts that should be answered (or one file that says which)"
    )

    def measure(self, subject: Subject) -> Measurement:
        subject.file(self.TEXTS)
        if len(subject.texts) > 2:
            raise UsageError(f"refusal takes two files at most ({self.TEXTS}), not {len(subject.texts)}")
        items = [item for place, path in enumerate(subject.texts) for item in self._items(path, place == 0)]
        kept = [[item for item in items if item["should_refuse"] is said] for said in (True, False)]
        harmful, harmless = ([item["prompt"] for item in side] for side in kept)
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
        by_category(out, [item["category"] for side in kept for item in side], refused.tolist())
        if not harmful:
            out.warnings.append("no harmful prompts were given: a model that never refuses looks perfect here")
        if not harmless:
            out.warnings.append("no harmless prompts were given: a model that refuses everything looks perfect here")
        out.details["refusals"] = [
            {"prompt": prompt_text(prompt), "answer": answers.texts[row * sampling.samples], "refused": share}
            for row, (prompt, share) in enumerate(zip([*harmful, *harmless], refused.tolist(), strict=True))
        ]
        return out

    def _items(self, path: Path, first: bool) -> list[Item]:
        """The prompts of a file with whether each should be refused; `first` where the file does not say."""
        if read_by(path):
            items = read_items(path, "refusal")
        else:
            items = [{"prompt": prompt, "should_refuse": None, "category": ""} for prompt in read_prompts(path)]
        return [
            item | {"should_refuse": first if item["should_refuse"] is None else item["should_refuse"]}
            for item in items[: self.config.most or None]
        ]


def read_by(path: Path) -> bool:
    """Whether a file has columns; otherwise it is a prompt a line."""
    return path.suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".yaml", ".yml", ".parquet", ".gz")


def by_category(out: Measurement, categories: Sequence[str], refused: Sequence[float]) -> None:
    """A figure of one share a category, where there are several."""
    names = sorted({name for name in categories if name})
    if len(names) > 1:
        shares = {name: rate([r for r, c in zip(refused, categories, strict=True) if c == name]) for name in names}
        dots = [(f"{name} (n={one.prompts})", one.mean, one.low, one.high) for name, one in shares.items()]
        out.figures.append(Dots("Answers that refuse, by category", "share", dots))


def _side_by_side(columns: dict[str, np.ndarray], harmful: int) -> dict[str, list[float | None]]:
    """Columns over all prompts, None where a column does not speak of the prompt."""
    total = sum(len(values) for values in columns.values())
    out: dict[str, list[float | None]] = {}
    for label, values in columns.items():
        if len(values):
            first = 0 if label == "refusal" else harmful
            out[label] = [None] * first + values.tolist() + [None] * (total - first - len(values))
    return out
