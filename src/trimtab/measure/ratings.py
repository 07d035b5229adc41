"""Bradley-Terry ratings from who beat whom: strengths, intervals, ranks, and what can be told apart at all.

    P(i beats j) = sigmoid(b_i - b_j),   rating = 400 / ln 10 * b + const   (the Elo scale: 400 points are odds of 10 to 1)

`wins[i, j]` counts how often i beat j, a tie half a win for each. The likelihood is maximised with a prior of `ridge`
games of every player against one virtual player of average strength, half of each won: a player who never lost, or never
won, keeps a finite rating. The mean rating is 1000 (or that of a base player is).

Newton's method, batched, with steps cut so that every one of them raises the (self-concordant) likelihood. The usual
minorise-maximise iteration has the same fixed point, but needs thousands of steps where a player is undefeated. An online
Elo (a K factor) depends on the order of the games and is not used.

Intervals resample prompts, with all games of a prompt: the games of one bracket depend on one another. Levels are widened
for few prompts as in `measure.stats`. Resamples in which not everyone is connected by games are left out and counted.

Where A beats B, B beats C and C beats A, ratings hide it. Those of two runs have no common zero unless players overlap, and
a judge that errs shrinks all gaps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from trimtab.errors import UsageError
from trimtab.measure.stats import LEVEL, Array, Interval, holm, sign_test

SCALE, MEAN = 400 / math.log(10), 1000.0  # rating points a nat; the mean rating
RIDGE, RESAMPLES = 0.01, 1000
STEPS, LONGEST_STEP, TOLERANCE = 100, 1.7, 1e-10
LEAST = 10  # prompts from which players are told apart: with equal players, fewer claim too much (up to 55 % at 3)
CHUNK = 2_000_000  # numbers held at once while resampling


@dataclass(frozen=True)
class Ratings:
    """Ratings of n players, in the given order.

    rating       Elo points; low, high: the interval (None: one prompt, or the base, whose rating is fixed)
    rank         1 is best; rank_low, rank_high: its interval over the resamples
    pairs        (better, worse, gap in Elo points, p-value, Holm-adjusted p-value) of every pair, None where undefined
    separable    whether some two can be told apart: two rank intervals are disjoint and some adjusted p <= 1 - level
    resamples    that were connected and used
    """

    names: list[str]
    rating: list[float]
    low: list[float | None]
    high: list[float | None]
    rank: list[int]
    rank_low: list[int]
    rank_high: list[int]
    pairs: list[tuple[str, str, float, float | None, float | None]]
    separable: bool
    prompts: int
    resamples: int

    def interval(self, player: int) -> Interval:
        return Interval(self.rating[player], self.low[player], self.high[player], self.prompts, self.prompts)

    @property
    def order(self) -> list[int]:
        """Players, best first."""
        return sorted(range(len(self.names)), key=lambda i: -self.rating[i])


def bradley_terry(wins: npt.ArrayLike, ridge: float = RIDGE) -> Array:
    """Log-strengths [..., n], mean 0, from wins [..., n, n]. ridge 0: the plain maximum likelihood estimate.

    UsageError where that is infinite (ridge 0 and players who never lost to, or never beat, the rest). With a ridge,
    unconnected players are held together by it alone: see `components`.
    """
    w = np.asarray(wins, dtype=np.float64)
    if w.ndim < 2 or w.shape[-1] != w.shape[-2] or w.shape[-1] < 2:
        raise UsageError(f"wins of n >= 2 players against one another are needed, [n, n]; got {w.shape}")
    if not np.isfinite(w).all() or (w < 0).any() or np.einsum("...ii->...i", w).any():
        raise UsageError("wins are counts of 0 or more, and nobody plays against itself")
    if not 0 <= ridge < math.inf:
        raise UsageError(f"ridge must be 0 or more, not {ridge}")
    n = w.shape[-1]
    if ridge == 0 and not _reachable(w.reshape(-1, n, n) > 0).all():
        raise UsageError(
            "without a ridge the ratings are infinite: some players never lost to the others, or never won; "
            "give a ridge above 0"
        )
    flat = _newton(w.reshape(-1, n, n), ridge).reshape(w.shape[:-1])
    return np.asarray(flat - flat.mean(-1, keepdims=True))


def elo(strengths: Array, base: int | None = None) -> Array:
    """Ratings [..., n]: mean 1000, or 1000 for the player `base`."""
    zero = strengths.mean(-1, keepdims=True) if base is None else strengths[..., base : base + 1]
    return np.asarray(MEAN + SCALE * (strengths - zero))


def tally(
    prompt: npt.ArrayLike, a: npt.ArrayLike, b: npt.ArrayLike, score: npt.ArrayLike, prompts: int, n: int
) -> Array:
    """Wins [prompts, n, n] from games [M]: on `prompt`, a against b; score 1: a won, 0: b won, 1/2: a tie."""
    p, first, second = (np.asarray(column, dtype=np.int64) for column in (prompt, a, b))
    share = np.asarray(score, dtype=np.float64)
    size = prompts * n * n
    out = np.bincount((p * n + first) * n + second, share, size) + np.bincount(
        (p * n + second) * n + first, 1 - share, size
    )
    return np.asarray(out.reshape(prompts, n, n), dtype=np.float64)


def components(games: npt.ArrayLike) -> list[list[int]]:
    """The groups of players that are connected by games, games [n, n] > 0; largest first."""
    met = np.asarray(games) > 0
    linked = _reachable((met | met.T)[None])[0]
    groups = {tuple(np.flatnonzero(row).tolist()) for row in linked}
    return sorted((list(group) for group in groups), key=lambda group: (-len(group), group))


def rate(
    wins: Array,
    names: Sequence[str],
    *,
    ridge: float = RIDGE,
    base: int | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Ratings:
    """Ratings with intervals from wins [prompts, n, n]. UsageError where games do not connect all players."""
    units, n = wins.shape[0], len(names)
    if wins.shape != (units, n, n) or n < 2:
        raise UsageError(f"wins [prompts, n, n] of {n} named players (2 or more) are needed; got {wins.shape}")
    total = wins.sum(0)
    if len(groups := components(total)) > 1:
        said = "; ".join(", ".join(names[i] for i in group) for group in groups)
        raise UsageError(
            f"these groups of models never met, so their ratings have no common scale: {said}: more prompts"
        )
    ratings = elo(bradley_terry(total, ridge), base)
    draws = _resampled(wins, ridge, resamples, seed) if units > 1 else np.empty((0, n))
    drawn = elo(draws, base) if len(draws) else draws
    low: list[float | None] = [None] * n
    high: list[float | None] = [None] * n
    rank = _ranks(ratings[None])[0]
    rank_low, rank_high = np.ones(n, dtype=np.int64), np.full(n, n)
    if len(draws) > 1:
        tail = widened_tail(units, level)
        ends = np.quantile(drawn, [tail, 1 - tail], axis=0)
        moved = [i for i in range(n) if i != base and ends[1, i] - ends[0, i] > 1e-6]
        for i in moved:
            low[i], high[i] = float(ends[0, i]), float(ends[1, i])
        rank_low, rank_high = np.quantile(_ranks(drawn), [tail, 1 - tail], axis=0, method="nearest").astype(np.int64)
    pairs = _pairs(ratings, drawn, names, wins)
    told = any(adjusted is not None and adjusted <= 1 - level for *_, adjusted in pairs)
    return Ratings(
        list(names), ratings.tolist(), low, high, rank.tolist(), rank_low.tolist(), rank_high.tolist(), pairs,
        bool(told and rank_low.max() > rank_high.min()), units, len(draws),
    )  # fmt: skip


def widened_tail(units: int, level: float = LEVEL) -> float:
    """The lower quantile to read off a bootstrap of `units` units: below (1 - level) / 2 where they are few.

    The normal quantile z becomes sqrt(C / (C - 1)) t with C - 1 degrees of freedom (Hesterberg 2015).
    """
    from scipy.stats import norm, t

    return float(norm.cdf(-math.sqrt(units / (units - 1)) * t.ppf(0.5 + level / 2, units - 1)))


def _newton(w: Array, ridge: float) -> Array:
    """The maximum of the (penalised) likelihood, [B, n]."""
    games = w + w.transpose(0, 2, 1)  # [B, n, n]
    won = w.sum(2)
    n = w.shape[1]
    at = np.zeros(won.shape)
    diagonal = np.arange(n)
    for _ in range(STEPS):
        p = expit(at[:, :, None] - at[:, None, :])
        own = expit(at)
        slope = won - (games * p).sum(2) + ridge * (0.5 - own)  # [B, n]
        curve = -games * p * (1 - p)
        curve[:, diagonal, diagonal] = -curve.sum(2) + ridge * own * (1 - own)
        if ridge == 0:  # a common shift is free: fix it at 0
            curve += curve[:, diagonal, diagonal].mean(1)[:, None, None] / n
        step = np.linalg.solve(curve, slope[..., None])[..., 0]
        reach = np.maximum(step.max(1), 0) - np.minimum(step.min(1), 0)  # the most that any difference changes
        at = at + step * np.minimum(1.0, LONGEST_STEP / np.maximum(reach, 1e-300))[:, None]
        if reach.max() < TOLERANCE:
            break
    return at


def _resampled(wins: Array, ridge: float, resamples: int, seed: int) -> Array:
    """Log-strengths of connected resamples of the prompts, [R, n]."""
    units, n = wins.shape[:2]
    generator = np.random.default_rng(seed)
    flat = wins.reshape(units, n * n)
    out = []
    chunk = max(1, CHUNK // max(units, n * n))
    for start in range(0, resamples, chunk):
        times = generator.multinomial(units, np.full(units, 1 / units), min(chunk, resamples - start))  # [r, units]
        w = (times.astype(np.float64) @ flat).reshape(-1, n, n)
        w = w[_reachable((w + w.transpose(0, 2, 1)) > 0).all((1, 2))]
        if len(w):
            out.append(bradley_terry(w, ridge or RIDGE))  # a resample may hold a player who never lost
    return np.concatenate(out) if out else np.empty((0, n))


def _pairs(
    ratings: Array, drawn: Array, names: Sequence[str], wins: Array
) -> list[tuple[str, str, float, float | None, float | None]]:
    """Every pair, better player first: the gap, a two-sided t-test of it with the bootstrap's deviation, and Holm's p.

    No test where there are fewer than `LEAST` prompts. Where all resamples agree (somebody won everywhere) it is the sign
    test of who won more on each prompt.
    """
    from scipy.stats import t

    units, won = len(wins), wins.sum(2)  # [P, n]
    order = np.argsort(-ratings, kind="stable")
    found = []
    for place, i in enumerate(order):
        for j in order[place + 1 :]:
            gap, p = float(ratings[i] - ratings[j]), None
            if units >= LEAST and len(drawn) > 1:
                spread = float((drawn[:, i] - drawn[:, j]).std()) * math.sqrt(units / (units - 1))
                net = np.sign(won[:, i] - won[:, j])
                p = float(2 * t.sf(gap / spread, units - 1)) if spread > 1e-6 else _signs(net)
            found.append((names[i], names[j], gap, p))
    adjusted = holm([p for *_, p in found])
    return [(*pair, corrected) for pair, corrected in zip(found, adjusted, strict=True)]


def _signs(net: Array) -> float | None:
    return sign_test(int((net > 0).sum()), int((net < 0).sum()))


def _ranks(ratings: Array) -> npt.NDArray[np.int64]:
    """1 + how many are rated higher, [..., n]."""
    return np.asarray(1 + (ratings[..., None, :] > ratings[..., :, None] + 1e-9).sum(-1))


def _reachable(edges: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Whether j can be reached from i, [B, n, n]."""
    n = edges.shape[-1]
    out = (edges | np.eye(n, dtype=bool)).astype(np.float32)
    for _ in range(max(1, math.ceil(math.log2(n)))):
        out = ((out @ out) > 0).astype(np.float32)
    return out > 0
