"""The side-effect panel: what a change bought and what it cost, on one page and paired by prompt.

From the answers to one set of prompts: reward and win rate (where a reward is given), KL from the reference, entropy per
token (its exponential is the branching factor), repetition inside an answer, refusals, length, answers cut off, tokens
forwarded and seconds. From files of their own: refusal of harmful and of harmless prompts, multiple-choice questions
(accuracy and calibration), tasks whose answers can be verified.

    KL per token       mean over an answer's positions of KL(policy(.|prefix) || reference(.|prefix)), nats, on its answers
    entropy per token  sum over a prompt's answers of -sum_v p(v) log p(v) at each position / their tokens, at the temperature
    win rate           share of prompts whose mean reward is higher than the other's, ties counting half

Every column has one value a prompt (or question, or task), so a comparison is the mean paired difference with its BCa
interval. Tokens and seconds are totals an answer, without an interval. A panel tests many things at once: expect one
in twenty of its verdicts to be wrong where nothing changed (the p-values of several panels want Holm's correction).

What it means: which of these numbers moved, for these prompts, beyond the noise of sampling them.
What it does not mean: that what is not on the panel did not move; a refusal is recognised by its phrases alone.
When it misleads: with few prompts most lines are undecided, which is not "no side effect"; entropy and KL are those of
the model's own distribution and are left out for policies that have none (best-of-n), and seconds depend on the machine.
Cost: one answer a prompt and sample, one more forward of it to score it, and the files asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.measure.diagnostic import Diagnostic, Subject, said
from trimtab.measure.diversity import diversity
from trimtab.measure.measurement import Better, Change, Comparison, Dots, Measurement, Row
from trimtab.measure.rates import rate
from trimtab.measure.refusal import VERSION, by_phrases
from trimtab.measure.refusal_rate import RefusalRate, RefusalRateConfig
from trimtab.measure.stats import Interval, mean_interval, win_rate
from trimtab.policy import Completions, prompt_text

CARD = Card(
    slug="panel",
    name="Side-effect panel",
    paper="none; the lines are those of the diagnostics it names",
    summary="What a change bought and what it cost: reward, KL, entropy, repetition, refusals, capability, tokens.",
    goal="capability",
    stage="audit",
    mechanism="metric",
    signal=("none",),
    access="black-box text",
    produces="report",
    needs=("prompts", "a reward, for what was bought", "files of questions and tasks, for capability"),
    infer_multiplier="1",
    fit_cost="none",
    benefit_metrics=("reward", "win rate"),
    cost_metrics=("KL per token", "entropy per token", "refusals", "accuracy", "tokens per answer"),
    limits=("KL and entropy need a local model's own distribution",),
    dimensions=("helpfulness", "refusal", "capability", "calibration", "diversity", "cost"),
    example=(
        'trimtab measure panel "natural-control:kl_target=0.05 on pocket/base" --against pocket/base \\\n'
        "    --reward pocket/reward --fit-prompts train.txt --texts test.txt --out runs/panel"
    ),
    choose="First, after any change: it shows where to look closer.",
)
KL = "KL per token"
# label -> which direction is good
DIRECTIONS: dict[str, Better] = {
    "reward": "higher",
    "gold": "higher",
    KL: "",
    "NLL under the base": "",
    "entropy per token": "",
    "unrepeated n-grams": "higher",
    "answers that refuse": "",
    "length in tokens": "",
    "answers cut off": "lower",
}


@dataclass(frozen=True)
class PanelConfig:
    # answers drawn for each prompt
    samples: int = 1
    # prompts that should be refused, one a line
    harmful: Path | None = None
    # prompts that should be answered, one a line: are they refused too?
    harmless: Path | None = None
    # files of multiple-choice questions
    questions: tuple[Path, ...] = ()
    # files of tasks whose answers can be verified
    tasks: tuple[Path, ...] = ()
    # answers to tasks that are programs may be run, in a sandbox
    allow_code: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"samples must be 1 or more, not {self.samples}")
        if self.harmless is not None and self.harmful is None:
            raise UsageError("harmless=FILE goes with harmful=FILE")
        for path in [*filter(None, (self.harmful, self.harmless)), *self.questions, *self.tasks]:
            if not path.exists():
                raise UsageError(f"there is no file {path}")


class Panel(Diagnostic):
    """The panel of one policy; compared, what it bought and what it cost."""

    slug = "panel"
    Config = PanelConfig
    TEXTS = "prompts, one a line or JSONL"
    REFERENCE = True

    def measure(self, subject: Subject) -> Measurement:
        prompts = subject.read_prompts(self.TEXTS)
        sampling = subject.sampling.but(samples=self.config.samples)
        answers = subject.answers(prompts, sampling)
        columns = answer_columns(answers, sampling.samples)
        if subject.reward is not None:
            columns |= {"reward": per_prompt(subject.reward.score(answers.prompts, answers.texts), sampling.samples)}
        columns |= _own_distribution(subject, answers, sampling.samples)
        out = Measurement(
            self.slug,
            subject.name,
            subject.measured(
                prompts,
                self.config,
                sampling=sampling.to_dict(),
                reward="none" if subject.reward is None else subject.reward.fingerprint,
                phrases=VERSION,
            ),
            "prompt",
            [prompt_text(prompt)[:80] for prompt in prompts],
        )
        fill(out, columns)
        out.details["tokens_per_answer"] = answers.cost.tokens_forwarded / max(1, len(answers))
        out.details["seconds_per_answer"] = answers.cost.seconds / max(1, len(answers))
        for tool, files in self._parts():
            part = Subject(**{**vars(subject), "texts": files, "prompts": [], "reference": None})
            join(out, tool.measure(part), tool.slug)
        out.cost = subject.meter
        return out

    def _parts(self) -> list[tuple[Diagnostic, list[Path]]]:
        """The diagnostics whose files were given."""
        parts: list[tuple[Diagnostic, list[Path]]] = []
        if self.config.harmful is not None:
            files = [self.config.harmful, *([self.config.harmless] if self.config.harmless else [])]
            parts.append((RefusalRate(RefusalRateConfig()), files))
        if self.config.questions:
            from trimtab.measure.multiple_choice import MultipleChoice

            parts += [(MultipleChoice(), [path]) for path in self.config.questions]
        if self.config.tasks:
            from trimtab.measure.verify import Verify

            settings = Verify.Config(allow_code=self.config.allow_code)
            parts += [(Verify(settings), [path]) for path in self.config.tasks]
        return parts

    def compare(self, first: Measurement, second: Measurement) -> Comparison:
        return self.beside(first, second, bought(first, second))

    def beside(self, first: Measurement, second: Measurement, won: Sequence[Change]) -> Comparison:
        """The comparison, with `won` (the win rate, where there is one) as its first lines."""
        out = super().compare(first, second)
        out.figures.append(moved(first, second, out.changes))
        out.changes = [*won, *out.changes]
        if KL in first.samples and KL not in second.samples:
            row = first.row(KL)
            out.changes.append(Change(KL, row.value, 0.0, row.value, row.low, row.high, row.n, "", note="the price"))
        for key, label in (("tokens_per_answer", "tokens per answer"), ("seconds_per_answer", "seconds per answer")):
            a, b = first.details.get(key), second.details.get(key)
            if a is not None and b:
                out.changes.append(Change(label, a, b, a - b, None, None, 0, "", note=f"{a / b:.2f} times"))
        return out


def moved(first: Measurement, second: Measurement, changes: Sequence[Change]) -> Dots:
    """Every line on one axis: the difference and its interval over the standard deviation of the units' differences."""
    dots: list[tuple[str, float | None, float | None, float | None]] = []
    for change in changes:
        pairs = zip(first.samples[change.label], second.samples[change.label], strict=True)
        spread = (
            float(np.std([a - b for a, b in pairs if a is not None and b is not None], ddof=1)) if change.n > 1 else 0.0
        )
        if spread > 0 and None not in (change.difference, change.low, change.high):
            scaled = [value / spread for value in (change.difference, change.low, change.high) if value is not None]
            dots.append((change.label, *scaled))  # type: ignore[arg-type]
    note = "Right of the line is more, not better: whether more is good is in the table."
    return Dots("What moved", "difference, in standard deviations over units", dots, [("no change", 0.0)], note)


def bought(first: Measurement, second: Measurement) -> list[Change]:
    """The win rate over prompts, by gold where there is gold, else by the reward."""
    judge = next((label for label in ("gold", "reward") if label in first.samples and label in second.samples), None)
    if judge is None:
        return []
    a, b = (np.array(side.samples[judge], dtype=np.float64) for side in (first, second))
    won = win_rate(a, b)
    rate, low, high = won.rate.mean, won.rate.low, won.rate.high
    if rate is None:
        return []
    over = Interval(rate - 0.5, None if low is None else low - 0.5, None if high is None else high - 0.5)
    return [
        Change(
            "win rate", rate, 1 - rate, over.mean, over.low, over.high, won.rate.prompts, said(over, "higher", won.p_value),
            won.p_value, f"by {judge}; the difference is from one half",
        )
    ]  # fmt: skip


def answer_columns(answers: Completions, samples: int) -> dict[str, list[float | None]]:
    """What the answers show by themselves, one value a prompt."""
    refused = [float(one) for one in by_phrases(answers.texts)]
    lengths = [float(len(tokens)) for tokens in answers.tokens]
    unrepeated = [diversity(tokens).value for tokens in answers.tokens]
    cut = [float(reason == "length") for reason in answers.finish_reasons]
    found = {
        "unrepeated n-grams": unrepeated,
        "answers that refuse": refused,
        "length in tokens": lengths,
        "answers cut off": cut,
    }
    return {label: per_prompt(values, samples) for label, values in found.items()}


def per_prompt(values: Sequence[float | None], samples: int) -> list[float | None]:
    """The mean over the samples of each prompt; None (could not be judged) where none of them has a value."""
    rows = np.array(values, dtype=np.float64).reshape(-1, samples)
    known = ~np.isnan(rows)
    sums, counts = np.where(known, rows, 0.0).sum(1), known.sum(1)
    return [None if not n else float(total / n) for total, n in zip(sums, counts, strict=True)]


def _own_distribution(subject: Subject, answers: Completions, samples: int) -> dict[str, list[float | None]]:
    """KL and entropy a token, where the policy has a distribution of its own and answers have tokens."""
    from trimtab.divergence import divergences, same_tokens

    own = getattr(subject.policy, "lm", None)
    if own is None or not hasattr(subject.policy, "token_logprobs") or subject.sampling.temperature == 0:
        return {}
    other = None if subject.reference is None else getattr(subject.reference.policy, "lm", None)
    base = other if other is not None and same_tokens(subject.policy, other) else own
    moved = base is not own or subject.control is not None
    found = divergences(subject.policy, base, answers.prompts, answers.tokens, subject.sampling)
    return {
        **({KL: token_means([one.kl for one in found], samples)} if moved and other is not None else {}),
        "entropy per token": token_means([one.entropy for one in found], samples),
    }


def token_means(values: Sequence[Any], samples: int) -> list[float | None]:
    """The mean over all tokens of each prompt's answers; None where they have no token."""
    sums = np.array([float(one.sum()) for one in values]).reshape(-1, samples).sum(1)
    counts = np.array([len(one) for one in values]).reshape(-1, samples).sum(1)
    return [None if not n else float(total / n) for total, n in zip(sums, counts, strict=True)]


def fill(out: Measurement, columns: dict[str, list[float | None]]) -> None:
    """Adds columns of one value a prompt to a measurement, with a row each, in the panel's order."""
    for label in sorted(columns, key=list(DIRECTIONS).index):
        values = columns[label]
        known = np.array(values, dtype=np.float64)
        shares = label.startswith("answers")
        found = rate([value for value in known if not math.isnan(value)]) if shares else mean_interval(known)
        note = f"branching factor {math.exp(found.mean):.2f}" if label.startswith("entropy") and found.mean else ""
        out.table.append(Row.of(label, found, DIRECTIONS[label], note))
        out.samples[label] = values


def join(out: Measurement, part: Measurement, name: str) -> None:
    """Adds another diagnostic's rows and units: columns speak of their own units and are None at the others."""
    before, more = len(out.units), len(part.units)
    out.units += [f"{name}: {unit}" for unit in part.units]
    for label in out.samples:
        out.samples[label] = [*out.samples[label], *[None] * more]
    labels = {row.label for row in out.table}
    for row in part.table:
        label = row.label if row.label not in labels else f"{name}: {row.label}"
        out.table.append(Row(label, row.value, row.low, row.high, row.n, row.better, row.note))
        if row.label in part.samples:
            out.samples[label] = [*[None] * before, *part.samples[row.label]]
    out.measured[name] = {key: value for key, value in part.measured.items() if key != "model"}
    out.warnings += part.warnings
