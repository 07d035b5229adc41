"""Whose answers are better? One model against others on the same prompts, by a judge that sees both answers in both orders.

    outcome   1 where the judge prefers the first model's answer in both orders, 0 the other's, 1/2 for a tie
    win rate  w = (wins + ties / 2) / n, BCa interval over prompts (exact where few are decided: `win_interval`);
              exact two-sided sign test on prompts that are no tie, and the share of these that is won (Wilson)
    length    P(wins) = sigmoid(theta + gamma tanh(dlen / sd(dlen))), dlen in characters; reported: sigmoid(theta)
    flips     share of pairs whose preferred answer changed with the order

After MT-Bench (2306.05685: both orders), AlpacaEval (2404.04475: length) and RE-Control (2406.05954), whose published
script asks in one random, unseeded order and counts replies it cannot read as ties. Here a reply that is no verdict
(garbage, a refusal, a time-out) is unjudged: it is counted by its kind, and is no tie and no loss. Equal answers are a tie
without a call. Several samples of a prompt stay together in every interval and test; several opponents: Holm.

The judge is `--judge SPEC` (see `trimtab.rewards.pair_judge`), or the `--reward`: a reward scores each answer by itself and
has no order. A judge that is right with probability a shows a w + (1 - a) (1 - w) for a true win rate w: less contrast than
there is.

What it means: this judge prefers these answers to those, on prompts like these, by more (or no more) than chance.
What it does not mean: that they are better. It is the judge's taste: a judge that likes its own kind, long answers, or
praise will say so with a narrow interval. A win rate has no zero: it says nothing about how good either model is.
When it misleads: the judge is one of the contestants or the reward one was tuned on; most verdicts flip with the order;
answers are cut at --max-new-tokens; one model's answers go unjudged more often.
Cost: an answer a prompt, sample and model; two questions to the judge a pair (a reward: one score an answer).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.card import Card
from trimtab.errors import TrimtabError, UsageError
from trimtab.measure.diagnostic import Diagnostic, Subject
from trimtab.measure.duel import FEW, Duel, counted, decided_of, or_nan, share, win_interval, wins
from trimtab.measure.length_control import length_controlled
from trimtab.measure.measurement import Dots, Measurement, Row
from trimtab.measure.rates import wilson
from trimtab.measure.stats import Interval, holm, mean_interval, prompts_needed
from trimtab.policy import Completions, Cost, Prompt, prompt_text
from trimtab.rewards.endpoint import FAILED
from trimtab.rewards.pair_judge import PairJudge, Verdict, as_judge

CARD = Card(
    slug="judge",
    name="Win rate by a judge",
    paper="2306.05685, 2404.04475, 2406.05954",
    summary="One model against others on the same prompts, judged pair by pair in both orders.",
    goal="preference",
    stage="audit",
    mechanism="metric",
    signal=("scalar reward",),
    access="black-box text",
    produces="report",
    needs=("prompts", "a judge: a chat endpoint, a local model, or a reward"),
    infer_multiplier="1",
    fit_cost="none",
    benefit_metrics=("win rate",),
    cost_metrics=("position flips", "unjudged"),
    limits=("a judge's taste is what is measured", "a tiny local judge mostly follows the position"),
    risks=("a judge that is one of the contestants, or the reward that one was tuned on",),
    dimensions=("helpfulness",),
    status=("implemented", "verified_cpu"),
    example="trimtab measure judge pocket/chat --against pocket/base --judge pocket/judge --texts prompts.txt",
    choose="When no rule can score an answer: it says which of two models is preferred, by whom, and how sure that is.",
)
CHUNK = 32  # pairs judged together


@dataclass(frozen=True)
class JudgedConfig:
    # answers drawn for each prompt, from each model; the k-th answers meet
    samples: int = 1
    # at most this many prompts, the first ones (0: all)
    most: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.most < 0:
            raise UsageError(f"samples must be 1 or more and most 0 or more, not {self.samples} and {self.most}")


class Judged(Diagnostic):
    """Win rates of the first model against each of the others."""

    slug = "judge"
    Config = JudgedConfig
    TEXTS = "prompts, one a line (or JSONL with a prompt on every line)"
    TOGETHER = True
    DUELS = True

    def measure(self, subject: Subject) -> Measurement:
        raise UsageError("judge sets models against one another: give --against MODEL, once or several times")

    def measure_together(self, subjects: Sequence[Subject]) -> Measurement:
        first, others = subjects[0], subjects[1:]
        if not others:
            raise UsageError("judge sets models against one another: give --against MODEL, once or several times")
        judge = self._judge(first)
        prompts = self._prompts(subjects)
        sampling = first.sampling.but(samples=self.config.samples)
        answers = [subject.answers(prompts, sampling) for subject in subjects]
        names = distinct([subject.name for subject in subjects])
        clusters = [row // sampling.samples for row in range(len(answers[0]))]
        duels = []
        for name, theirs in zip(names[1:], answers[1:], strict=True):
            verdicts = self._compare(judge, first, name, answers[0], theirs)
            lengths = tuple([len(text) for text in side.texts] for side in (answers[0], theirs))
            duels.append(Duel(name, verdicts, clusters, (lengths[0], lengths[1])))
        out = Measurement(
            self.slug,
            names[0],
            first.measured(
                prompts,
                self.config,
                sampling=sampling.to_dict(),
                judge=judge.fingerprint,
                against=[other.identity for other in others],
            ),
            "prompt",
            units=[prompt_text(prompt)[:80] for prompt in prompts],
            cost=sum({id(subject): subject.meter for subject in subjects}.values(), Cost()),
        )
        fill_in(out, duels, judge, len(prompts))
        out.warnings += [*self_judged(judge, subjects, names), *truncated(names, answers)]
        failed = sum(verdict.kind in FAILED for duel in duels for verdict in duel.verdicts)
        if failed == sum(len(duel.verdicts) for duel in duels):
            error = next(verdict.error for duel in duels for verdict in duel.verdicts if verdict.kind in FAILED)
            raise TrimtabError(f"the judge {judge.name} gave no verdict at all: {error}")
        if failed:
            out.warnings.append(
                f"{failed} pairs failed on the way to the judge: the same command asks for these alone again"
            )
        out.details |= {"judge": judge.name, "failed": failed, "pairs": _pairs(duels, prompts, answers)}
        return out

    def _judge(self, subject: Subject) -> PairJudge:
        given = subject.judge if subject.judge is not None else subject.reward
        if given is None:
            raise UsageError(
                "judge needs somebody who judges: --judge judge:url=ADDRESS,model=NAME, --judge pocket/chat (any local "
                "model), or a reward such as --judge pocket/judge"
            )
        judge = as_judge(given)
        judge.keep_in(subject.cache)
        return judge

    def _prompts(self, subjects: Sequence[Subject]) -> list[Prompt]:
        first = subjects[0]
        for other in subjects[1:]:
            if (other.texts, other.prompts) != (first.texts, first.prompts) or other.sampling != first.sampling:
                raise UsageError(f"{first.name} and {other.name} must answer the same prompts with the same sampling")
        return first.read_prompts(self.TEXTS)[: self.config.most or None]

    def _compare(
        self, judge: PairJudge, subject: Subject, name: str, ours: Completions, theirs: Completions
    ) -> list[Verdict]:
        out: list[Verdict] = []
        for at in range(0, len(ours), CHUNK):
            end = min(at + CHUNK, len(ours))
            subject.say(f"{judge.name}: {subject.name} against {name}, pairs {at + 1} to {end} of {len(ours)}")
            out += judge.compare(ours.prompts[at:end], ours.texts[at:end], theirs.texts[at:end], subject.meter)
        return out


def fill_in(out: Measurement, duels: Sequence[Duel], judge: PairJudge, prompts: int) -> None:
    """The table, the samples, the figure and the warnings of a measurement, from the verdicts."""
    out.notes.append(
        f"judged by {judge.name}" + (" (each answer scored by itself: no order)" if judge.reward else ", both orders")
    )
    won = [wins(duel) for duel in duels]
    adjusted = holm([result.p_value for result in won])
    rates = []
    for duel, result, p_holm in zip(duels, won, adjusted, strict=True):
        label = f"win rate against {duel.against}"
        means = duel.by_prompt(prompts)
        out.samples[label] = means
        interval = win_interval(result.rate, means)
        p_value = "" if result.p_value is None else f"; sign test p = {result.p_value:.3g}"
        p_value += f" (Holm: {p_holm:.3g})" if p_holm is not None and len(duels) > 1 else ""
        said = f"{result.wins} won, {result.ties} tied, {result.losses} lost{p_value}"
        rates.append(Row.of(label, interval, "higher", said))
        won_prompts, decided = decided_of(means)
        out.table += [rates[-1], *_beside(duel, judge, decided)]
        if decided:
            alone = wilson(won_prompts, decided)
            out.table.append(Row.of(f"won of the decided prompts against {duel.against}", alone, "higher"))
        counts = {"wins": result.wins, "ties": result.ties, "losses": result.losses, **counted(duel.verdicts)}
        tests = {"sign_test_p": result.p_value, "holm_p": p_holm}
        out.details.setdefault("against", {})[duel.against] = counts | tests
        out.notes += _power(label, interval, means)
        out.warnings += _doubts(duel, judge, decided)
    dots = [(row.label.removeprefix("win rate "), row.value, row.low, row.high) for row in rates]
    out.figures.append(Dots(f"Win rate of {out.subject} (judge: {judge.name})", "win rate", dots, [("even", 0.5)]))


def _beside(duel: Duel, judge: PairJudge, decided: int) -> list[Row]:
    """The rows under a win rate."""
    suffix = f"against {duel.against}"
    controlled = length_controlled(or_nan(duel.outcomes), *duel.lengths, duel.prompts)
    note = ""
    if decided < FEW:
        controlled = Interval(controlled.mean, None, None, controlled.rows, controlled.prompts)
        note = "too few decided prompts for an interval"
    rows = [Row.of(f"length-controlled win rate {suffix}", controlled, "higher", note)]
    if judge.chance:
        chances = mean_interval(or_nan([verdict.p_a for verdict in duel.verdicts]), duel.prompts)
        rows.append(Row.of(f"mean win probability {suffix}", chances, "higher"))
    shares: list[tuple[str, list[bool | None]]] = [
        ("position flips", [verdict.flipped for verdict in duel.verdicts]),
        ("unjudged", [verdict.p_a is None for verdict in duel.verdicts]),
        ("equal answers", [verdict.identical for verdict in duel.verdicts]),
    ]
    for label, values in shares:
        found = share(values, duel.prompts)
        if found.mean is not None:
            kinds = Counter(verdict.kind for verdict in duel.verdicts if verdict.kind)
            note = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()) if label == "unjudged" else ""
            rows.append(Row.of(f"{label} {suffix}", found, "" if label == "equal answers" else "lower", note))
    return rows


def _doubts(duel: Duel, judge: PairJudge, decided: int) -> list[str]:
    """What a reader of a win rate has to know, in sentences."""
    said = []
    if decided < FEW:
        said.append(
            f"against {duel.against} only {decided} prompts were decided: fewer than {FEW} show only landslides"
        )
    shown = [verdict.flipped for verdict in duel.verdicts if verdict.flipped is not None]
    if shown and sum(shown) >= len(shown) / 2:
        said.append(
            f"{judge.name} changed its mind with the order in {sum(shown)} of {len(shown)} pairs against {duel.against}: "
            "it follows the position at least as much as the answers"
        )
    masses = [verdict.mass for verdict in duel.verdicts if verdict.mass is not None]
    if masses and np.mean(masses) < 0.25:
        said.append(
            f"{judge.name} gives a probability of {np.mean(masses):.2g} to saying A or B at all: it was forced to choose, "
            "and does not understand the question"
        )
    unjudged = sum(verdict.p_a is None for verdict in duel.verdicts)
    if unjudged:
        errors = Counter(verdict.error for verdict in duel.verdicts if verdict.p_a is None).most_common(1)[0][0]
        said.append(f"{unjudged} of {len(duel.verdicts)} pairs against {duel.against} are unjudged, mostly: {errors}")
    return said


def _power(label: str, interval: Interval, means: Sequence[float | None]) -> list[str]:
    """For an undecided rate: how many prompts would decide it if it is what it seems."""
    known = [x for x in means if x is not None]
    if interval.low is None or interval.high is None or not interval.low <= 0.5 <= interval.high or len(known) < 2:
        return []
    needed = prompts_needed(0.05, float(np.std(known, ddof=1)))
    return [f"{label}: undecided; about {needed} prompts would show a true rate of 0.55"] if needed else []


def self_judged(judge: PairJudge, subjects: Sequence[Subject], names: Sequence[str]) -> list[str]:
    """A sentence for each contestant that answers with the judge's model, or was chosen by the judge's reward."""
    said = []
    for subject, name in zip(subjects, names, strict=True):
        parts = [subject.policy]
        while (inner := getattr(parts[-1], "policy", None)) is not None:
            parts.append(inner)
        models = [getattr(part, "lm", None) for part in parts]
        known = {subject.name, subject.identity, *(getattr(lm, "name", None) for lm in models)}
        if judge.identity is not None and judge.identity in known | {getattr(lm, "fingerprint", None) for lm in models}:
            said.append(f"{name} answers with the judge's own model: models prefer their own answers")
        rewards = [getattr(part, "reward", None) for part in parts]
        rewards += [subject.reward] if subject.control is not None else []  # a steered model was probably fitted on it
        if judge.reward is not None and judge.reward.fingerprint in {getattr(r, "fingerprint", None) for r in rewards}:
            said.append(f"{name} was chosen by the very reward that judges it: its win rate is optimistic")
    return said


def truncated(names: Sequence[str], answers: Sequence[Completions]) -> list[str]:
    """A sentence for each model whose answers ran into the token limit."""
    counts = [sum(reason == "length" for reason in one.finish_reasons) for one in answers]
    return [
        f"{count} of {len(one)} answers of {name} were cut at the token limit: raise --max-new-tokens"
        for name, count, one in zip(names, counts, answers, strict=True)
        if count
    ]


def distinct(names: Sequence[str]) -> list[str]:
    """Names of which no two are equal: the second `x` becomes `x #2`."""
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return out


def _pairs(duels: Sequence[Duel], prompts: Sequence[Prompt], answers: Sequence[Completions]) -> list[dict[str, Any]]:
    """Every verdict with the answers it was on."""
    return [
        {"against": duel.against, "prompt": prompt_text(prompts[duel.prompts[row]]), "a": ours, "b": theirs}
        | verdict.to_dict()
        for duel, other in zip(duels, answers[1:], strict=True)
        for row, (verdict, ours, theirs) in enumerate(zip(duel.verdicts, answers[0].texts, other.texts, strict=True))
    ]
