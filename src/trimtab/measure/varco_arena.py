"""Varco Arena (arXiv 2411.01281, later "Arena-Lite"): rank n models by tournaments, without reference answers.

    every prompt: all models answer; a fresh random knockout bracket; a judge decides each match       n - 1 calls a prompt
    ratings:      Bradley-Terry on all matches, P(i beats j) = 1 / (1 + 10^((R_j - R_i) / 400)), mean 1000
    intervals:    resampling prompts, each with its whole tournament

`design` also offers random pairs (as many calls), everyone against an anchor (as many calls, the usual practice) and the
full round robin. Beside the ranking stands what the design is worth: rho between estimated and true order in a simulation
with as many models and prompts, ratings from U(1000, 1300) and a judge that is right with probability `judge_accuracy`.

Departures from the paper. Ratings have a prior of 0.01 games against an average player, so that an undefeated model stays
finite. Whole tournaments are resampled, not matches, because the matches of a bracket depend on one another. A claim that
models differ needs a Holm-adjusted test, because with many equal models some two rank intervals are disjoint by luck (19 %
of runs with 12 equal models). Our own finding: random pairs tie with the bracket at equal cost; what helps is comparing
models with one another and not with an anchor.

What it means: which model this judge prefers, on prompts like these, and how surely.

What it does not mean: that the better one is right. A rating is no grade; those of two runs have no common zero.

When it misleads: the judge likes its own answers, long ones, or those shown first; models beat each other in a circle,
which one number a model hides; the simulation beside the ranking assumes ratings and a precision, and measures nothing.

Cost: one answer a prompt and model; n - 1 calls of the judge a prompt (twice that with order both).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.measure.arena import Result, arena, check_names, judge_of, rounds_of
from trimtab.measure.diagnostic import Diagnostic, Subject
from trimtab.measure.judged import self_judged, truncated
from trimtab.measure.measurement import Bracket, Comparison, Dots, Measurement, Row
from trimtab.measure.ratings import LEAST, RESAMPLES, RIDGE, Ratings
from trimtab.measure.referee import WARN
from trimtab.measure.stats import mean_interval
from trimtab.measure.tournament import Arm, simulate
from trimtab.policy import Cost, Prompt, prompt_text

FEW = 20  # prompts below which a ranking is warned about
COARSE = 6  # models up to which tau-b is shown beside rho
FIRST = "first shown wins"

CARD = Card(
    slug="varco-arena",
    name="Varco Arena",
    paper="2411.01281",
    summary="Ranks several models by knockout tournaments on every prompt and a Bradley-Terry fit.",
    goal="preference",
    stage="audit",
    mechanism="metric",
    signal=("pairs",),
    access="black-box text",
    produces="report",
    needs=("two models or more", "prompts", "a judge of pairs, or a reward"),
    infer_multiplier="n",
    fit_cost="(n - 1) x prompts judge calls",
    benefit_metrics=("rating",),
    cost_metrics=("judge calls",),
    limits=("one number a model: circles are hidden", "ratings of two runs have no common zero"),
    risks=("a judge among the contestants prefers itself",),
    dimensions=("helpfulness",),
    status=("implemented", "verified_cpu"),
    example="trimtab measure varco-arena pocket/chat --against pocket/base --against pocket/nano --judge pocket/reward "
    "--texts prompts.txt",
    choose="To rank checkpoints, merges or strengths that are close to one another; for two models use judge.",
)


@dataclass(frozen=True)
class VarcoArenaConfig:
    # who meets whom: a bracket a prompt, as many random pairs, everyone against an anchor, or every pair
    design: Literal["tournament", "random-pairs", "anchored", "round-robin"] = "tournament"
    # the anchor of design anchored; not given: the first model
    anchor: str | None = None
    # the model whose rating is set to 1000; not given: the mean rating is
    base: str | None = None
    # show each pair once in random order, or in both orders (twice the calls; disagreement is half a win each)
    order: Literal["random", "both"] = "random"
    # what a tie counts that stays one when asked again: a coin's win, or half a win for each
    ties: Literal["coin", "half"] = "coin"
    # at most this many prompts, the first ones (0: all)
    most: int = 0
    # prior games of every model against an average player, half of them won
    ridge: float = RIDGE
    # bootstrap resamples of the prompts
    resamples: int = RESAMPLES
    # trials of the simulation of what this design is worth (0: none)
    simulate: int = 50
    # how often the simulated judge is right
    judge_accuracy: float = 0.7

    def __post_init__(self) -> None:
        if self.most < 0 or self.resamples < 1 or self.simulate < 0:
            raise UsageError(
                f"most and simulate must be 0 or more and resamples 1 or more, not {self.most}, {self.simulate} and "
                f"{self.resamples}"
            )
        if not 0 < self.ridge < float("inf"):
            raise UsageError(
                f"ridge must be above 0, not {self.ridge}: an undefeated model has no finite rating without"
            )
        if not 0 <= self.judge_accuracy <= 1:
            raise UsageError(f"judge_accuracy is a probability in [0, 1], not {self.judge_accuracy}")


class VarcoArena(Diagnostic):
    """Ratings of several policies from matches on the same prompts."""

    slug = "varco-arena"
    Config = VarcoArenaConfig
    TEXTS = "prompts that every model answers, one a line"
    TOGETHER = True

    def measure(self, subject: Subject) -> Measurement:
        raise UsageError(f"varco-arena ranks two models or more, and {subject.name} is one: --against names the others")

    def compare(self, first: Measurement, second: Measurement) -> Comparison:
        raise UsageError("ratings of two runs have no common zero: rank all models in one run")

    def measure_together(self, subjects: Sequence[Subject]) -> Measurement:
        names = [subject.name for subject in subjects]
        if len(subjects) < 2:
            raise UsageError(f"varco-arena ranks two models or more, not {len(subjects)}: --against names the others")
        prompts = subjects[0].read_prompts(self.TEXTS)[: self.config.most or None]
        if any(subject.read_prompts(self.TEXTS)[: self.config.most or None] != prompts for subject in subjects[1:]):
            raise UsageError("varco-arena needs the same prompts for every model")
        check_names(names, self.config.anchor, self.config.base)
        judge = judge_of(subjects[0].judge, subjects[0].reward, subjects[0].cache)
        sampling = [subject.sampling.but(samples=1) for subject in subjects]
        answers = [subject.answers(prompts, how) for subject, how in zip(subjects, sampling, strict=True)]
        subjects[0].say(f"{len(prompts)} prompts, {len(names)} models: {judge.name} judges")
        c = self.config
        result = arena(
            names, prompts, [one.texts for one in answers], judge, design=c.design, anchor=c.anchor, base=c.base,
            order=c.order, ties=c.ties, ridge=c.ridge, resamples=c.resamples, seed=sampling[0].seed,
            meter=subjects[0].meter,
        )  # fmt: skip
        out = self._measurement(result, prompts)
        about = subjects[0].measured(prompts, c, judge=judge.fingerprint, sampling=[how.to_dict() for how in sampling])
        out.measured = about | {"model": fingerprint_of([subject.identity for subject in subjects])}
        out.cost = sum({id(subject.meter): subject.meter for subject in subjects}.values(), Cost())
        out.warnings += [*self_judged(judge, subjects, names), *truncated(names, answers)]
        return out

    def _measurement(self, result: Result, prompts: Sequence[Prompt]) -> Measurement:
        ratings, referee, names = result.ratings, result.referee, result.names
        ranks = list(zip(ratings.rank, ratings.rank_low, ratings.rank_high, strict=True))
        ranked = [Row.of(names[i], ratings.interval(i), "higher", _place(*ranks[i])) for i in ratings.order]
        arms = self._simulated(len(names), len(prompts))
        dots = [(row.label, row.value, row.low, row.high) for row in ranked]
        out = Measurement(
            self.slug,
            ", ".join(names),
            {},
            "prompt",
            units=[prompt_text(prompt)[:80] for prompt in prompts],
            samples=_shares(result),
            table=[
                *ranked,
                Row("judge calls", float(referee.calls), n=len(result.matches), better="lower", note="n: matches"),
                *_how(result),
                *_worth(arms),
            ],
            figures=[Dots("Ranking", "rating in Elo points", dots, note="bars: 95 % intervals over prompts")],
            notes=[_verdict(ratings)],
        )
        if self.config.design == "tournament":
            title = f"The bracket of the first prompt: {prompt_text(prompts[0])[:60]}"
            out.figures.append(Bracket(title, rounds_of(result.matches, names)))
        _warn(out, result, self.config.resamples)
        pair = ("better", "worse", "gap", "p", "p_holm")
        out.details = {
            "models": names,
            "wins": result.wins.sum(0).tolist(),
            "pairs": [dict(zip(pair, values, strict=True)) for values in ratings.pairs],
            "decided": dict(Counter(referee.how)),
            "matches": {
                "prompt": result.matches.row.tolist(),
                "a": result.matches.a.tolist(),
                "b": result.matches.b.tolist(),
                "a_won": result.matches.score.tolist(),
                "how": referee.how,
            },
            "simulated": {
                name: {"rho": arm.rho.tolist(), "tau": arm.tau.tolist(), "calls": arm.calls}
                for name, arm in arms.items()
            },
        }
        return out

    def _simulated(self, n: int, prompts: int) -> dict[str, Arm]:
        c = self.config
        if not c.simulate:
            return {}
        return simulate(n, prompts, c.judge_accuracy, c.simulate, round_robin=c.design == "round-robin")


def _place(rank: int, low: int, high: int) -> str:
    return f"rank {rank}" if low == high == rank else f"rank {rank} ({low} to {high})"


def _shares(result: Result) -> dict[str, list[float | None]]:
    """Each model's share of its matches won, prompt by prompt; None where it played none."""
    won, lost = result.wins.sum(2), result.wins.sum(1)  # [P, n]
    return {
        f"{name}: matches won": [
            float(w / (w + x)) if w + x else None for w, x in zip(won[:, i], lost[:, i], strict=True)
        ]
        for i, name in enumerate(result.names)
    }


def _how(result: Result) -> list[Row]:
    """How the matches came to be decided, as shares with intervals over prompts."""
    rows, how = result.matches.row, np.array(result.referee.how)
    asked = how != "same"
    out = [Row.of("identical answers", mean_interval(~asked, list(rows)), "", "not shown to the judge")]
    if asked.any():
        for label, kind in (("ties", "tie"), ("no verdict", "none")):
            share = mean_interval(how[asked] == kind, list(rows[asked]))
            out.append(Row.of(label, share, "lower", "of the matches judged"))
    if result.referee.first:
        prompt, won = zip(*result.referee.first, strict=True)
        out.append(Row.of(FIRST, mean_interval(won, list(prompt)), "", "0.5: no pull of position"))
    return out


def _worth(arms: dict[str, Arm]) -> list[Row]:
    """Simulated rho of each design (and tau-b for few models, where rho is coarse), and its calls above the best anchor."""
    anchors = [arm for name, arm in arms.items() if name.startswith("anchor")]
    if not anchors:
        return []
    best = max(anchors, key=lambda arm: float(arm.rho.mean()))
    out = []
    for arm in [*(arm for arm in arms.values() if arm not in anchors), best]:
        calls = arm.calls_per_hundredth(best)
        note = f"{arm.calls} calls" + (f", {calls:.0f} for each 0.01 above {best.name}" if calls is not None else "")
        out.append(Row.of(f"simulated rho, {arm.name}", mean_interval(arm.rho), "higher", note))
        if arm.models <= COARSE:
            out.append(Row.of(f"simulated tau-b, {arm.name}", mean_interval(arm.tau), "higher"))
    return out


def _warn(out: Measurement, result: Result, resamples: int) -> None:
    referee, ratings = result.referee, result.ratings
    how = Counter(referee.how)
    if referee.undecided > WARN:
        out.warnings.append(
            f"a coin decided {referee.undecided:.1%} of the matches that {referee.judge.name} was asked about "
            f"({how['tie']} ties, {how['none']} without a verdict)"
        )
    if how["same"] > WARN * len(referee.how):
        out.warnings.append(
            f"{how['same']} of {len(referee.how)} matches were between identical answers: these say nothing"
        )
    position = next((row for row in out.table if row.label == FIRST), None)
    if position is not None and position.low is not None and position.high is not None:
        if not position.low <= 0.5 <= position.high:
            out.warnings.append(
                f"the answer shown first wins {position.value:.0%} of matches: --order both evens that out"
            )
    if ratings.prompts < FEW:
        out.warnings.append(
            f"{ratings.prompts} prompts are few: with fewer than {FEW} intervals cover less than they say"
        )
    lost = resamples - ratings.resamples
    if ratings.prompts > 1 and lost > WARN * resamples:
        out.warnings.append(
            f"{lost} of {resamples} resamples left some models unconnected and were not used: intervals are too narrow; "
            "give more prompts"
        )


def _verdict(ratings: Ratings) -> str:
    told = [(better, worse) for better, worse, *_, p in ratings.pairs if p is not None and p <= 0.05]
    if not ratings.separable:
        least = f" ({LEAST} are the fewest that could)" if ratings.prompts < LEAST else ""
        return f"not separable: {ratings.prompts} prompts do not tell these models apart{least}"
    said = "; ".join(f"{better} above {worse}" for better, worse in told[:10])
    return f"told apart (Holm over {len(ratings.pairs)} pairs): {said}" + ("; ..." if len(told) > 10 else "")
