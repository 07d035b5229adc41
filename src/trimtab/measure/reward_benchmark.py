"""Reward benchmark: does a reward prefer what people preferred, and can it be gamed? RewardBench, arXiv 2403.13787.

A pair is a prompt, the chosen answer and the rejected one. Accuracy is the mean of 1[r_c > r_r] + 1/2 1[r_c = r_r]; of a
section the mean over its subsets weighted by pairs, in all the mean over sections. Prompts are the unit of resampling.

Measured is the reward of --reward, or the subject itself where it is one; the model named is used only with `gold`. Beside
accuracy: ties and answers that could not be judged (never 0); accuracy where the chosen answer is the longer, the shorter,
and at equal length (`length_control`); Spearman's correlation of score and words; the temperature that makes a difference of
scores a probability, judged out of fold (`reward_calibration`); canaries and duplicates (`reward_guards`); and with `gold`,
a held-out reward, whether best-of-n by this one raises the gold too.

Departures: ties count one half (the published code counts them as wrong), mathematics has the weight of its pairs (it is
counted 2.2 times there), and every figure has an interval. The calibration is kept in `details`: the measure.json of this
diagnostic is what `calibrated:file=...` reads. Sections are RewardBench's where the subsets have its names; "A/b" is subset b
of section A.

What it means: how often the reward orders two given answers as the labels do.

What it does not mean: that answers found by optimising the reward are good. That is what `gold` and the canaries ask, and
they ask it of one policy and of seven tricks.

When it misleads: people who disagree bound any accuracy from above; a file in which the better answer is the longer one
rewards counting words (see the accuracy at equal length); a refusal is the right answer to some prompts, and then the
refusal canary rightly wins; a calibration holds for answers like these.

Cost: two reward calls a pair, seven a prompt for canaries; with `gold`, `best_of` answers a prompt, scored twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.measure import reward_calibration as calibration
from trimtab.measure.adapters import read_items
from trimtab.measure.diagnostic import Diagnostic, Subject, said
from trimtab.measure.length_control import length_controlled
from trimtab.measure.measurement import (
    Change,
    Comparison,
    Dots,
    Line,
    Lines,
    Measurement,
    Row,
    check_alike,
)
from trimtab.measure.rates import rate
from trimtab.measure.reward_guards import Gap, check_canaries, duplicates, gap_curve, out_of_range
from trimtab.measure.reward_pairs import (
    Pairs,
    by_prompt,
    by_section,
    length_bias,
    length_correlations,
    mean_of_sections,
    section,
    several,
)
from trimtab.measure.reward_scores import gold_of, paired, reward_of, scored, scored_with_parts, stored_pairs
from trimtab.measure.stats import Array, Interval, mean_interval, paired_difference, swap_test
from trimtab.policy import Prompt, prompt_text
from trimtab.rewards import Reward

CARD = Card(
    slug="reward-benchmark",
    name="Reward benchmark",
    paper="RewardBench, arXiv 2403.13787; over-optimisation, arXiv 2210.10760; length control, arXiv 2404.04475",
    summary="How often a reward prefers the preferred answer, what its numbers mean, and whether it can be gamed.",
    goal="preference",
    stage="audit",
    mechanism="metric",
    signal=("pairs",),
    access="black-box text",
    produces="report",
    needs=("a reward", "a file of prompts with a chosen and a rejected answer"),
    infer_multiplier="none",
    fit_cost="none",
    benefit_metrics=("accuracy",),
    cost_metrics=("reward_calls",),
    limits=("agreement with the labels of one file is no proof that the reward can be optimised",),
    data_format="pairs",
    dimensions=("reward-model quality", "calibration"),
    status=("implemented", "verified_cpu"),
    example="trimtab measure reward-benchmark pocket/base --reward pocket/reward --texts pairs.jsonl --gold pocket/judge",
    choose="Before a reward steers, ranks or trains anything: it shows in minutes whether the reward points the right way.",
)
FEWEST = 20  # pairs that are no ties, below which no verdict is to be had
BARS = 24
WHAT = "pairs of a prompt, a chosen and a rejected answer (JSONL: prompt, chosen, rejected, subset; or transcripts)"


@dataclass(frozen=True)
class RewardBenchmarkConfig:
    # at most this many pairs of each file, the first ones (0: all)
    most: int = 0
    # what to fit on the pairs: temperature (a difference becomes a probability), affine (a scale), platt or isotonic
    calibrate: Literal["temperature", "affine", "platt", "isotonic", "none"] = "temperature"
    # prompts on which canaries are scored, the first ones (0: none)
    canaries: int = 200
    # the lowest score that the reward is meant to give
    lowest: float | None = None
    # the highest score that the reward is meant to give
    highest: float | None = None
    # a held-out reward: the model answers the prompts, and the best of n by the reward is scored by this one
    gold: str | None = None
    # answers drawn to each prompt for that
    best_of: int = 16
    # prompts answered for that, the first ones
    gold_prompts: int = 64
    # decides which prompts are fitted on and which are held out
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.most, self.canaries) < 0 or self.best_of < 2 or self.gold_prompts < 1:
            raise UsageError("most and canaries must be 0 or more, best_of 2 or more, gold_prompts 1 or more")
        if self.lowest is not None and self.highest is not None and not self.lowest < self.highest:
            raise UsageError(f"lowest must be below highest, not {self.lowest} and {self.highest}")


class RewardBenchmark(Diagnostic):
    """Accuracy, calibration and guards of a reward on labelled pairs."""

    slug = "reward-benchmark"
    Config = RewardBenchmarkConfig
    TEMPLATED = False
    TEXTS = WHAT

    def measure(self, subject: Subject) -> Measurement:
        config: RewardBenchmarkConfig = self.config
        reward = reward_of(subject)
        gold = None if config.gold is None else gold_of(config.gold, reward, subject)
        if gold is not None and subject.sampling.temperature == 0:
            raise UsageError("the best of n greedy answers is any of them: with --gold give --temperature above 0")
        items = self._items(subject)
        prompts, answers = [item["prompt"] for item in items], [item["chosen"] for item in items]
        answers += [item["rejected"] for item in items]
        scores, parts = scored_with_parts(reward, [*prompts, *prompts], answers, subject)
        pairs = paired(items, scores)
        out = Measurement(
            self.slug,
            reward.name,
            {**subject.measured(items, config), "model": reward.fingerprint, "template": "none"},
            "prompt",
            units=[prompt_text(prompts[pairs.prompt.index(i)])[:80] for i in range(max(pairs.prompt) + 1)],
            cost=subject.meter,
        )
        self._accuracy(out, pairs, reward)
        self._length(out, pairs)
        self._calibration(out, pairs, reward)
        self._guards(out, pairs, items, scores)
        if config.canaries:
            self._canaries(out, pairs, reward, prompts, scores, subject)
        if gold is not None:
            out.measured |= {
                "policy": subject.identity,
                "gold": gold.fingerprint,
                "sampling": subject.sampling.to_dict(),
            }
            self._gap(out, reward, gold, [prompts[pairs.prompt.index(i)] for i in range(len(out.units))], subject)
        out.details["pairs"] = {
            "prompt": pairs.prompt,
            "subset": pairs.subset,
            "chosen": scores[: len(items)],
            "rejected": scores[len(items) :],
        }
        if parts:
            out.details["parts"] = parts
        return out

    def compare(self, first: Measurement, second: Measurement) -> Comparison:
        """Paired by pair, prompts as the unit. A verdict for accuracy alone: subsets are many and get none."""
        check_alike(first, second)
        out = Comparison(self.slug, first.subject, second.subject, first.unit)
        one, two = stored_pairs(first), stored_pairs(second)
        difference = np.array(one.right - two.right)
        sections = [section(name) for name in one.subset]
        found = mean_of_sections(difference, sections, one.prompt)
        p_value = swap_test(by_section(difference, sections), one.prompt)
        out.changes.append(_change("accuracy", first, second, found, said(found, "higher", p_value)))
        names = np.array(one.subset)
        for name in several(one.subset):
            rows = np.flatnonzero(names == name)
            change = paired_difference(one.right[rows], two.right[rows], [one.prompt[i] for i in rows])
            out.changes.append(_change(f"subset: {name}", first, second, change, ""))
        both = int((~np.isnan(difference)).sum())
        out.notes.append(f"{both} of {len(difference)} pairs were judged by both")
        return out

    def _items(self, subject: Subject) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        subject.file(WHAT)
        for path in subject.texts:
            found = read_items(path, "pair")[: self.config.most or None]
            stem = path.name.partition(".")[0] if len(subject.texts) > 1 else "all"
            items += [{**item, "subset": item["subset"] or stem} for item in found]
        if not items:
            raise UsageError(f"there are no pairs in {', '.join(map(str, subject.texts))}: {WHAT}")
        return items

    # ------------------------------------------------------------------ the sections of the table

    def _accuracy(self, out: Measurement, pairs: Pairs, reward: Reward) -> None:
        sections = [section(name) for name in pairs.subset]
        right, margins = pairs.right, pairs.margins
        accuracy = mean_of_sections(right, sections, pairs.prompt)
        note = "the mean over sections" if several(sections) else ""
        out.table.append(Row.of("accuracy", accuracy, "higher", note))
        for label, names in (("section", sections), ("subset", pairs.subset)):
            if label == "subset" or names != pairs.subset:
                for name in several(names):
                    found = rate(*pairs.where(np.array(names) == name))
                    out.table.append(Row.of(f"{label}: {name}", found, "higher"))
        judged = pairs.judged
        unknown = np.isnan(margins)
        ties = rate(np.where(unknown, np.nan, margins == 0), pairs.prompt)
        out.table.append(Row.of("ties", ties, "lower", "of judged pairs"))
        out.table.append(Row.of("not judged", rate(unknown.astype(np.float64), pairs.prompt), "lower"))
        out.table.append(Row.of("margin", mean_interval(margins, pairs.prompt), "", "chosen minus rejected, as scored"))
        out.samples = {
            name: by_prompt(values, pairs.prompt) for name, values in (("accuracy", right), ("margin", margins))
        }
        dots = [(row.label, row.value, row.low, row.high) for row in out.table if row.label.startswith("s")]
        first = out.table[0]
        out.figures.append(
            Dots("Accuracy", "share", [("all", first.value, first.low, first.high), *dots], [("chance", 0.5)])
        )
        if judged:
            out.figures.append(_histogram(margins[judged]))
        self._warn_accuracy(out, accuracy, margins[judged], reward)

    def _warn_accuracy(self, out: Measurement, accuracy: Interval, margins: Array, reward: Reward) -> None:
        decided = int((margins != 0).sum())
        if not len(margins):
            out.warnings.append("no pair could be judged: there is no accuracy")
        elif not decided:
            out.warnings.append("the reward gives both answers of every pair the same score: it tells nothing apart")
        elif decided < FEWEST:
            out.warnings.append(f"{decided} pairs are no ties: fewer than {FEWEST} decide nothing")
        if accuracy.high is not None and accuracy.high < 0.5:
            out.warnings.append(
                f"the reward prefers the rejected answer: turn its sign round (--reward '-1*{reward.name}')"
            )

    def _length(self, out: Measurement, pairs: Pairs) -> None:
        out.table += [Row.of(label, found, "higher") for label, found in length_bias(pairs).items()]
        level = length_controlled(pairs.right, pairs.chosen_length, pairs.rejected_length, pairs.prompt)
        out.table.append(Row.of("accuracy at equal length", level, "higher"))
        out.table += [
            Row.of(label, found, "", "Spearman, in words") for label, found in length_correlations(pairs).items()
        ]

    def _calibration(self, out: Measurement, pairs: Pairs, reward: Reward) -> None:
        kind = self.config.calibrate
        rows = pairs.judged
        if kind == "none" or not rows:
            return
        try:
            found, p, right, clusters = calibration.fitted(
                kind,
                reward,
                pairs.chosen[rows],
                pairs.rejected[rows],
                [pairs.prompt[i] for i in rows],
                self.config.seed,
            )
        except UsageError as error:
            out.warnings.append(f"not calibrated: {error}")
            return
        if kind == "temperature":
            t = found.values["temperature"]
            low, high = calibration.temperature_interval(pairs.margins[rows], clusters, t)
            note = "p(preferred) = sigmoid(difference / temperature)"
            out.table.append(Row("temperature", t, low, high, len(set(clusters)), "", note))
        if len(p):
            good = calibration.quality(p, right)
            found = dataclasses.replace(found, report=good.to_dict())
            out.table.append(Row.of("NLL", mean_interval(calibration.row_nll(p, right), clusters), "lower", "held out"))
            out.table.append(Row.of("Brier", mean_interval((p - right) ** 2, clusters), "lower", "held out"))
            out.table.append(Row("ECE", good.ece, n=len(set(clusters)), better="lower", note="held out"))
            curve = [(mean, share) for mean, share, _ in good.bins]
            line = [Line("what happened", curve), Line("perfect", [(x, x) for x, _ in curve])]
            out.figures.append(Lines("Calibration, held out", "probability said", "share right", line))
        out.details["calibration"] = dataclasses.asdict(found)

    def _guards(
        self, out: Measurement, pairs: Pairs, items: Sequence[dict[str, Any]], scores: Sequence[float | None]
    ) -> None:
        config: RewardBenchmarkConfig = self.config
        answers = [item["chosen"] for item in items] + [item["rejected"] for item in items]
        asked = [item["prompt"] for item in items] * 2
        twice = [*pairs.prompt, *pairs.prompt]
        copies = rate(duplicates(asked, answers), twice)
        out.table.append(Row.of("duplicate answers", copies, "lower", "also given to another prompt"))
        if config.lowest is not None or config.highest is not None:
            outside = out_of_range(scores, config.lowest, config.highest)
            out.table.append(Row.of("out of range", rate(outside, twice), "lower"))
            if count := int(np.nansum(outside)):
                out.warnings.append(f"{count} scores lie outside [{config.lowest}, {config.highest}]")

    def _canaries(
        self,
        out: Measurement,
        pairs: Pairs,
        reward: Reward,
        prompts: Sequence[Prompt],
        scores: Sequence[float | None],
        subject: Subject,
    ) -> None:
        wanted = range(min(self.config.canaries, len(out.units)))
        subject.say(f"canaries on {len(wanted)} prompts")
        real: list[list[float | None]] = [[] for _ in wanted]
        for number, score in zip([*pairs.prompt, *pairs.prompt], scores, strict=True):
            if number < len(wanted):
                real[number].append(score)
        firsts = [prompts[pairs.prompt.index(i)] for i in wanted]
        usual = int(np.median([*pairs.chosen_length, *pairs.rejected_length]))
        found = check_canaries(reward, firsts, real, usual, subject.meter)
        for one in found:
            note = "beats the median real answer"
            note += "" if one.judged == len(wanted) else f"; not judged on {len(wanted) - one.judged}"
            out.table.append(Row.of(f"canary: {one.kind}", one.fails, "lower", note))
            if not one.quiet:
                above = "half" if one.fails.mean == 0.5 else f"{one.fails.mean:.0%}"
                out.warnings.append(f"canary: {one.kind} is not shown to score below real answers (above on {above})")
        dots = [(one.kind, one.fails.mean, one.fails.low, one.fails.high) for one in found]
        out.figures.append(Dots("Canaries that beat the median real answer", "share of prompts", dots, [("half", 0.5)]))

    def _gap(self, out: Measurement, reward: Reward, gold: Reward, prompts: list[Prompt], subject: Subject) -> None:
        asked = prompts[: self.config.gold_prompts]
        drawn = subject.answers(asked, subject.sampling.but(samples=self.config.best_of))
        grid = [np.array(scored(one, drawn.prompts, drawn.texts, subject), dtype=np.float64) for one in (reward, gold)]
        try:
            gap = gap_curve(grid[0].reshape(len(asked), -1), grid[1].reshape(len(asked), -1))
        except UsageError as error:
            out.warnings.append(f"no gap curve: {error}")
            return
        last = gap.points[-1]
        for label, start, end in (("proxy", gap.points[0].proxy, last.proxy), ("gold", gap.points[0].gold, last.gold)):
            out.table.append(Row.of(f"{label} of one answer", start, "higher"))
            out.table.append(Row.of(f"{label} at best of {last.n}", end, "higher", f"at most {last.kl_bound:.2f} nats"))
        lengths = np.array([reason == "length" for reason in drawn.finish_reasons], dtype=np.float64)
        cut = rate(lengths, [row // self.config.best_of for row in range(len(lengths))])
        out.table.append(Row.of("answers cut at the limit", cut, "lower", "not seen whole"))
        out.figures.append(_gap_figure(gap, reward, gold))
        if gap.fires and gap.lost is not None:
            out.warnings.append(
                f"over-optimised: from best of {gap.peak} to best of {last.n} the reward rises and {gold.name} falls "
                f"by {-(gap.lost.mean or 0):.3g}"
            )


def _change(label: str, first: Measurement, second: Measurement, found: Interval, verdict: Any) -> Change:
    values = (first.row(label).value, second.row(label).value)
    return Change(label, *values, found.mean, found.low, found.high, found.prompts, verdict)


def _histogram(margins: Array) -> Lines:
    counts, edges = np.histogram(margins, bins=BARS)
    points = [(float(x), float(c) / len(margins)) for x, c in zip((edges[1:] + edges[:-1]) / 2, counts, strict=True)]
    return Lines("Margins", "score of chosen minus rejected", "share of pairs", [Line("pairs", points)])


def _gap_figure(gap: Gap, reward: Reward, gold: Reward) -> Lines:
    lines = [
        Line(
            name,
            [(point.kl_bound, side.mean, side.low, side.high) for point, side in zip(gap.points, sides, strict=True)],
        )
        for name, sides in (
            (reward.name, [point.proxy for point in gap.points]),
            (f"{gold.name} (gold)", [point.gold for point in gap.points]),
        )
    ]
    return Lines("Best of n by the reward", "KL bound, nats an answer", "score of the best", lines)
