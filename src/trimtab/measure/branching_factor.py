"""Branching factor: how many next tokens a model effectively considers (2506.17871, TMLR 2026).

    BF(x) = exp(H(Y|x) / E[N])      H: entropy of the whole answer, N: its tokens, end token included
    H     = E[sum_t h_t]            h_t: entropy of the distribution that token t is drawn from

estimated from M answers to each prompt as exp(sum of entropies / sum of lengths), and by surprises -log P(y_t) in place of
entropies (both must agree). P is the truncated distribution that the answers were drawn from; it is computed again from
the whole vocabulary, and a token that falls outside of it is counted. Over prompts both means are given: the exponential
of the mean logarithm (the headline, which intervals and comparisons use) and the mean of the exponentials (the published
code), which is larger.

From the paper it differs in the estimator. Averaging each answer's own mean, as the paper does, has different limits for
entropies and surprises where lengths vary; only the ratio of sums equals the definition (tests enumerate a chain). The
others can be chosen: per_sequence, position_mean, paper. The published code works from the 50 best log-probabilities,
which biases open-ended models low, and cuts all answers to the length of the first; neither happens here.

The nudging experiment (`--nudge MODEL`: the model to be nudged, usually the base) draws prefixes that this model's answers
often begin with, forces them on the other, and measures what follows. See `forced_prefix`.

What it means: 1 is a model that always continues alike, V one that picks any of V tokens; the ratio of two models with the
same tokens says how much of the choice a change has removed or added.
What it does not mean: that answers differ in meaning (many words for one thought branch too), or that they are good.
When it misleads: tokens of two tokenizers are not the same unit (compare nats per character); answers cut at the token
limit have only begun; late positions are averaged over the answers that got there, so the curve is also drawn for long
answers alone.

Cost: M answers a prompt, and one more forward of each to score it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trimtab.card import Card
from trimtab.errors import TrimtabError, UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.measure.diagnostic import Diagnostic, Subject, paired_change, said
from trimtab.measure.entropy_rate import ALIVE, Array, Estimator, curve, exponential, nats_per_token, ratio
from trimtab.measure.forced_prefix import Nudged, nudge_table
from trimtab.measure.measurement import Change, Comparison, Line, Lines, Measurement, Row, check_alike
from trimtab.measure.stats import mean_interval, paired_difference, swap_test
from trimtab.measure.truncated import Scored, score_answers
from trimtab.policy import Completions, prompt_text
from trimtab.sampling import Sampling
from trimtab.stepping import Steppable

__all__ = ["BranchingFactor", "BranchingFactorConfig", "ratio"]

CARD = Card(
    slug="branching-factor",
    name="Branching factor",
    paper="2506.17871",
    summary="How many next tokens a model effectively considers, overall and along an answer.",
    goal="capability",
    stage="audit",
    mechanism="metric",
    signal=("none",),
    access="logits",
    produces="report",
    needs=("a model that draws token by token", "a file of prompts"),
    infer_multiplier="1",
    fit_cost="none",
    benefit_metrics=("branching factor",),
    cost_metrics=("tokens forwarded",),
    limits=("a token is the unit: two tokenizers compare by nats per character only",),
    status=("implemented", "verified_cpu"),
    dimensions=("diversity",),
    example="trimtab measure branching-factor pocket/chat --texts prompts.txt --against pocket/base --template plain",
    choose="To put the diversity that tuning has cost into one number.",
)

HEADLINE, NLL, FIRST = "branching factor", "branching factor by surprise", "branching factor at the first token"
CHARACTER, LENGTH = "nats per character", "tokens per answer"
OUTSIDE = 0.001  # share of tokens outside of the recomputed cut above which something is wrong


@dataclass(frozen=True)
class BranchingFactorConfig:
    # answers drawn for each prompt
    samples: int = 16
    # at most this many prompts, the first ones (0: all)
    most: int = 0
    # answers are drawn from the smallest set of tokens with this much mass
    top_p: float = 0.9
    # and from at most this many tokens (0: all)
    top_k: int = 0
    # how answers become one number a prompt; only "ratio" has the definition as its limit
    estimator: Estimator = "ratio"
    # what is summed: the entropy of each step, or the surprise of the token drawn there
    quantity: Literal["entropy", "surprise"] = "entropy"
    # the second curve is that of answers with at least so many tokens (0: the median length)
    survivors: int = 0
    # the model to be nudged with the first tokens of this one's answers (pocket/NAME, a folder or a Hub id)
    nudge: str | None = None
    # a forced prefix has at most so many tokens
    prefix_tokens: int = 5
    # and begins at least this share of this model's answers
    prefix_share: float = 0.05

    def __post_init__(self) -> None:
        if self.samples < 4:
            raise UsageError(f"the entropy of answers needs samples of 4 or more a prompt, not {self.samples}")
        if self.most < 0 or self.survivors < 0 or self.prefix_tokens < 1 or not 0 < self.prefix_share <= 1:
            raise UsageError(
                "most and survivors must be 0 or more, prefix_tokens 1 or more and prefix_share in (0, 1], not "
                f"{self.most}, {self.survivors}, {self.prefix_tokens} and {self.prefix_share}"
            )
        Sampling(top_p=self.top_p, top_k=self.top_k)


class BranchingFactor(Diagnostic):
    """Branching factor of a policy that draws token by token."""

    slug = "branching-factor"
    Config = BranchingFactorConfig
    TEXTS = "prompts to answer, one a line"

    def measure(self, subject: Subject) -> Measurement:
        config, policy = self.config, subject.policy
        if not isinstance(policy, Steppable):
            raise UsageError(f"{subject.name} gives whole answers only: a branching factor needs its next-token odds")
        prompts = subject.read_prompts(self.TEXTS)[: config.most or None]
        sampling = self.sampling(subject)
        nudged = Nudged.load(subject, config.nudge, config.prefix_tokens, config.prefix_share) if config.nudge else None
        answers = subject.answers(prompts, sampling)
        scored = scored_answers(subject, answers, sampling)
        columns = self._columns(answers, scored, len(prompts))
        nats = {label: np.log(columns[label]) for label in (HEADLINE, NLL, FIRST)}
        table = [
            Row.of(HEADLINE, exponential(mean_interval(nats[HEADLINE])), note="exp of the mean log over prompts"),
            Row.of(
                f"{HEADLINE}, mean over prompts", mean_interval(columns[HEADLINE]), note="the published code's mean"
            ),
            Row.of(NLL, exponential(mean_interval(nats[NLL])), note="must agree with the entropies"),
            Row.of(FIRST, exponential(mean_interval(nats[FIRST]))),
            Row.of(CHARACTER, mean_interval(columns[CHARACTER]), note="comparable across tokenizers"),
            Row.of(LENGTH, mean_interval(columns[LENGTH])),
        ]
        extra = {"nudged": nudged.base.fingerprint} if nudged else {}
        out = Measurement(
            self.slug,
            subject.name,
            subject.measured(prompts, config, sampling=sampling.to_dict(), **extra),
            "prompt",
            units=[prompt_text(prompt)[:80] for prompt in prompts],
            samples={label: [None if math.isnan(x) else float(x) for x in column] for label, column in columns.items()},
            table=table,
            figures=curves(scored, config.survivors),
            cost=subject.meter,
        )
        cut = float(np.mean([reason == "length" for reason in answers.finish_reasons]))
        if cut > 0.2:
            out.warnings.append(
                f"{cut:.0%} of the answers were cut at {sampling.max_new_tokens} tokens: this is the branching factor of "
                "cut answers; give --max-new-tokens more"
            )
        out.details |= {
            "vocabulary": fingerprint_of(sorted(policy.lm.tokenizer.get_vocab().items())),
            "outside": int(sum(one.outside.sum() for one in scored)),
            "cut": cut,
            "answers": [
                {"prompt": prompt_text(p), "answer": t} for p, t in zip(answers.prompts, answers.texts, strict=True)
            ],
        }
        if nudged is not None:
            rows, figures, details = nudge_table(nudged, subject, prompts, answers, scored, sampling)
            out.table += rows
            out.figures += figures
            out.details["nudging"] = details
        return out

    def sampling(self, subject: Subject) -> Sampling:
        """How answers are drawn; UsageError where an entropy of that would say nothing."""
        if subject.sampling.temperature == 0:
            raise UsageError("greedy answers have a branching factor of 1 by construction: give --temperature 1")
        if subject.sampling.repetition_penalty != 1:
            raise UsageError("a repetition penalty changes the distribution with every token: leave it at 1")
        if subject.sampling.max_new_tokens < 1:
            raise UsageError("answers of 0 tokens have no branching factor: give --max-new-tokens 1 or more")
        config = self.config
        return subject.sampling.but(samples=config.samples, top_p=config.top_p, top_k=config.top_k)

    def _columns(self, answers: Completions, scored: Sequence[Scored], prompts: int) -> dict[str, Array]:
        """One value a prompt. NaN: it has no answer with a token (or, per character, with a character)."""
        each = self.config.samples
        columns = {label: np.full(prompts, np.nan) for label in (HEADLINE, NLL, FIRST, CHARACTER, LENGTH)}
        for row in range(prompts):
            part, texts = scored[row * each : (row + 1) * each], answers.texts[row * each : (row + 1) * each]
            entropies, surprises = [one.entropy for one in part], [one.surprise for one in part]
            main = entropies if self.config.quantity == "entropy" else surprises
            estimated = nats_per_token(main, self.config.estimator, surprises)
            columns[HEADLINE][row] = math.exp(estimated)
            columns[NLL][row] = math.exp(nats_per_token(surprises))
            begun = [one[0] for one in entropies if len(one)]
            columns[FIRST][row] = math.exp(np.mean(begun)) if begun else math.nan
            letters = sum(map(len, texts))
            columns[CHARACTER][row] = sum(one.sum() for one in main) / letters if letters else math.nan
            columns[LENGTH][row] = np.mean([len(one) for one in entropies])
        return columns

    def compare(self, first: Measurement, second: Measurement) -> Comparison:
        """Branching factors as ratios first / second (a paired interval of the difference of logs over prompts)."""
        check_alike(first, second)
        out = Comparison(self.slug, first.subject, second.subject, first.unit)
        if first.details["vocabulary"] == second.details["vocabulary"]:
            out.changes += [ratio_change(first, second, label) for label in (HEADLINE, NLL, FIRST)]
            out.notes.append("a branching factor is compared as a ratio, first / second: 1 is no change")
        else:
            out.notes.append("the models have different tokens: only nats per character can be compared")
        out.changes.append(paired_change(first, second, CHARACTER))
        if first.details["vocabulary"] == second.details["vocabulary"]:
            out.changes.append(paired_change(first, second, LENGTH))
        return out


def ratio_change(first: Measurement, second: Measurement, label: str) -> Change:
    """first / second of geometric means over prompts; "changed" where the paired interval excludes 1 (and `swap_test`)."""
    a, b = (np.log([math.nan if x is None else x for x in side.samples[label]]) for side in (first, second))
    logs = paired_difference(a, b)
    found = exponential(logs)
    return Change(
        f"{label}, ratio", first.row(label).value, second.row(label).value, found.mean, found.low, found.high,
        found.prompts, said(logs, "", swap_test(a - b)), note="first / second; 1 is no change",
    )  # fmt: skip


def scored_answers(subject: Subject, answers: Completions, sampling: Sampling) -> list[Scored]:
    """Every answer scored under the distribution it was drawn from, its cost on the subject's meter."""
    if not any(answers.tokens):
        raise UsageError(f"{subject.name} answered nothing: every answer is empty")
    start = time.perf_counter()
    subject.say(f"{subject.name}: scoring {len(answers)} answers")
    scored = score_answers(subject.policy, answers.prompts, answers.tokens, sampling, subject.meter)
    subject.meter.seconds += time.perf_counter() - start
    check_outside(scored, subject.name)
    return scored


def check_outside(scored: Sequence[Scored], name: str) -> None:
    """A token outside of its own recomputed cut is rounding at the edge; many of them are an error."""
    outside, tokens = (int(sum(x)) for x in ((s.outside.sum() for s in scored), (len(s.outside) for s in scored)))
    if outside > max(1.0, OUTSIDE * tokens):
        raise TrimtabError(
            f"{outside} of {tokens} tokens of {name} lie outside of the distribution they are said to be drawn from: "
            "the answers are another model's, or scoring differs from sampling"
        )


def curves(scored: Sequence[Scored], survivors: int = 0) -> list[Any]:
    """Branching factor along answers (all, and the long ones alone), and how many answers are still going."""
    rows = [one.entropy for one in scored]
    least = survivors or int(np.median([len(row) for row in rows]))
    lines, alive = [], []
    for label, part in (
        ("all answers", rows),
        (f"answers of {least} tokens or more", [r for r in rows if len(r) >= least]),
    ):
        if len(part) < ALIVE:
            continue
        found = curve(part)
        places = range(1, len(found.nats) + 1)
        lines.append(Line(f"{label}, at this token", list(zip(places, np.exp(found.nats).tolist(), strict=True))))
        lines.append(Line(f"{label}, up to it", list(zip(places, np.exp(found.cumulative).tolist(), strict=True))))
        alive.append(Line(label, list(zip(places, found.alive.astype(float).tolist(), strict=True))))
    note = f"Where fewer than {ALIVE} answers are still going nothing is drawn. Those that end early leave the average."
    return [
        Lines(
            "Branching factor along the answer",
            "token",
            "branching factor",
            lines,
            reference=[("one way", 1.0)],
            note=note,
        ),
        Lines("Answers still going", "token", "answers", alive),
    ]
