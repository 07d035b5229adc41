"""An arena: outputs of several models on the same prompts, a design, a judge; out come ratings and the matches behind them.

    arena(names, prompts, outputs[model][prompt], judge, design="tournament") -> Result

Models without an output on some prompt (None) are refused, or left out of that prompt alone (allow_missing).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from trimtab.errors import UsageError
from trimtab.measure.cache import Cache
from trimtab.measure.ratings import RESAMPLES, RIDGE, Ratings, rate
from trimtab.measure.referee import Referee
from trimtab.measure.stats import Array
from trimtab.measure.tournament import Design, Ints, Matches, joined, matches
from trimtab.policy import Cost, Prompt, prompt_text
from trimtab.rewards.judge import Judgement
from trimtab.rewards.pair_judge import PairJudge, RewardJudge, Verdict, parse_judge


@dataclass
class Result:
    """A ranking of `names`, the matches behind it and how they were decided.

    wins [prompts, n, n]; left_out: (model, prompt) without an output
    """

    names: list[str]
    ratings: Ratings
    matches: Matches
    referee: Referee
    wins: Array
    left_out: list[tuple[int, int]] = field(default_factory=list)


def arena(
    names: Sequence[str],
    prompts: Sequence[Prompt],
    outputs: Sequence[Sequence[str | None]],
    judge: PairJudge,
    *,
    design: Design = "tournament",
    anchor: str | None = None,
    base: str | None = None,
    order: Literal["random", "both"] = "random",
    ties: Literal["coin", "half"] = "coin",
    allow_missing: bool = False,
    ridge: float = RIDGE,
    resamples: int = RESAMPLES,
    seed: int = 0,
    meter: Cost | None = None,
) -> Result:
    """Rank models by their outputs[model][prompt]; most options are those of `varco-arena`.

    allow_missing: outputs that are None have a bye (`Result.left_out`); without it they are refused.
    """
    _check(names, prompts, outputs, allow_missing)
    check_names(names, anchor, base)
    n, hub = len(names), names.index(anchor) if anchor is not None else 0
    present = np.array([[text is not None for text in row] for row in outputs]).T  # [P, n]
    rng = np.random.default_rng(seed)
    referee = Referee(judge, prompts, outputs, rng, order, ties, meter=meter if meter is not None else Cost())
    referee.positions = not isinstance(judge, ScoredOnce)
    played = [
        _play_alike(design, np.flatnonzero((present == who).all(1)), np.flatnonzero(who), referee, hub)
        for who in np.unique(present, axis=0)[::-1]
        if who.sum() > 1 and (design != "anchored" or who[hub])
    ]
    if not played:
        raise UsageError("no prompt has outputs of two models that could meet")
    found = joined(played)
    referee.check()
    wins = found.wins(len(prompts), n)
    ratings = rate(
        wins[wins.any((1, 2))],  # a prompt without a match is no unit
        names, ridge=ridge, base=names.index(base) if base is not None else None, resamples=resamples, seed=seed,
    )  # fmt: skip
    return Result(list(names), ratings, found, referee, wins, [(int(i), int(k)) for k, i in np.argwhere(~present)])


class ScoredOnce(RewardJudge):
    """A reward as a judge that scores each answer once, however often it plays."""

    def __init__(self, judge: RewardJudge) -> None:
        super().__init__(judge.scorer, judge.temperature)
        self.known: dict[tuple[str, str], float | None] = {}

    def _compare(
        self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str], meter: Cost | None
    ) -> list[Verdict]:
        rows = [
            ((prompt_text(prompt), text), prompt) for side in (a, b) for prompt, text in zip(prompts, side, strict=True)
        ]
        new = {key: prompt for key, prompt in rows if key not in self.known}
        scores = self.scorer.score(list(new.values()), [text for _, text in new], meter)
        self.known |= dict(zip(new, scores, strict=True))
        said = [Judgement(self.known[key]) for key, _ in rows]
        return [self._verdict(x, y) for x, y in zip(said[: len(a)], said[len(a) :], strict=True)]


def judge_of(spec: str | None, reward: Any | None, cache: Cache) -> PairJudge:
    """The judge of --judge, else the reward of --reward as one."""
    if spec is None and reward is None:
        raise UsageError("varco-arena needs someone to judge: --judge SPEC, or --reward NAME")
    judge = parse_judge(spec) if spec is not None else RewardJudge(reward)
    judge.keep_in(cache)
    return ScoredOnce(judge) if isinstance(judge, RewardJudge) else judge


def rounds_of(matches: Matches, names: Sequence[str]) -> list[list[tuple[str, str | None, str]]]:
    """The bracket of the first prompt that was played: (a, b, winner) a match, b None for a bye."""
    mine = np.flatnonzero(matches.row == matches.row.min())
    number, place = matches.round[mine], matches.place[mine]
    out: list[list[tuple[str, str | None, str]]] = []
    for r in range(int(number.max()) + 1):
        played = {int(place[k]): mine[k] for k in np.flatnonzero(number == r)}
        row: list[tuple[str, str | None, str]] = []
        for at in range(2 ** (int(number.max()) - r)):
            if at in played:
                k = played[at]
                a, b = names[matches.a[k]], names[matches.b[k]]
                row.append((a, b, a if matches.won[k] else b))
            else:  # a bye in round 1: who it was stands in round 2
                k = mine[(number == 1) & (place == at // 2)][0]
                who = names[(matches.b if at % 2 else matches.a)[k]]
                row.append((who, None, who))
        out.append(row)
    return out


def _play_alike(design: Design, rows: Ints, players: Ints, referee: Referee, anchor: int) -> Matches:
    """The matches of the prompts `rows`, which have outputs of the same `players`."""
    at = int(np.flatnonzero(players == anchor)[0]) if anchor in players else 0
    found = matches(
        design, len(rows), len(players), referee.rng, lambda k, a, b: referee.play(rows[k], players[a], players[b]), at
    )
    return found.renamed(rows, players)


def check_names(names: Sequence[str], anchor: str | None = None, base: str | None = None) -> None:
    """Refuse fewer than two models, two of one name, an anchor or base that is none of them."""
    if len(names) < 2:
        raise UsageError(f"a ranking needs two models or more, not {len(names)}")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise UsageError(f"two models are called {', '.join(twice)}: a ranking needs different names")
    for what, name in (("anchor", anchor), ("base", base)):
        if name is not None and name not in names:
            raise UsageError(f"the {what} {name!r} is none of the models ({', '.join(names)})")


def _check(
    names: Sequence[str], prompts: Sequence[Prompt], outputs: Sequence[Sequence[str | None]], allow_missing: bool
) -> None:
    if not prompts:
        raise UsageError("a ranking needs prompts: there are none")
    if len(outputs) != len(names) or any(len(row) != len(prompts) for row in outputs):
        raise UsageError(
            f"outputs of {len(names)} models on {len(prompts)} prompts are needed, not {[len(row) for row in outputs]}"
        )
    missing = [(i, k) for i, row in enumerate(outputs) for k, text in enumerate(row) if text is None]
    if missing and not allow_missing:
        i, k = missing[0]
        raise UsageError(
            f"{len(missing)} outputs are missing, the first of {names[i]} on prompt {k}: give them, or "
            "allow_missing=True to leave a model out of the prompts it did not answer"
        )
