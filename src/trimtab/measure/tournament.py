"""Who meets whom: a knockout bracket a prompt, random pairs, a full round robin, an anchor; and a simulation of them.

    tournament    single elimination, a fresh random draw for every prompt: n - 1 matches a prompt
    random-pairs  n - 1 different pairs a prompt, at random
    anchored      everyone against one anchor: n - 1 matches a prompt
    round-robin   every pair: n (n - 1) / 2 matches a prompt

If n is no power of two, 2^ceil(log2 n) - n players have a bye in round 1 (never two of one pair, never later).

The simulation has two kinds of noise. The truth of a match is drawn from ratings R, P(i beats j) =
1 / (1 + 10^((R_j - R_i) / 400)); the judge then reports it with probability p_J and the opposite otherwise:

    P_eff = p_J P + (1 - p_J) (1 - P)

All arms are rated alike, by Bradley-Terry (an anchored arm so has the order of its win rates). Reported are Spearman's
rho and Kendall's tau-b between estimated and true ratings. For p_J < 1, P_eff is not a Bradley-Terry law: gaps shrink.

All trials and prompts are played at once, round by round. Everything depends on the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError
from trimtab.measure.ratings import RIDGE, bradley_terry, tally
from trimtab.measure.stats import Array

Ints = npt.NDArray[np.int64]
Design = Literal["tournament", "random-pairs", "anchored", "round-robin"]
# (row, a, b) [M] each -> the share of the match that a won [M]: 1, 0, or 1/2 for a tie; and who goes on, bool [M]
Play = Callable[[Ints, Ints, Ints], tuple[Array, npt.NDArray[np.bool_]]]

# Twenty ratings shaped like the head of a public leaderboard: a leader, then a crowd. Not copied from one.
LEADERBOARD = (
    1340, 1325, 1309, 1298, 1288, 1277, 1268, 1263, 1257, 1251, 1246, 1240, 1231, 1222, 1212, 1200, 1187, 1172, 1149, 1116,
)  # fmt: skip
RANGE = (1000.0, 1300.0)  # ratings are drawn uniformly between these where none are given


@dataclass(frozen=True)
class Matches:
    """Played matches, in order: on row `row` (a prompt), a against b; score: the share a won; won: a went on.

    round, place: where in the bracket, from 0 (round 0 throughout for designs without rounds).
    """

    row: Ints
    a: Ints
    b: Ints
    score: Array
    won: npt.NDArray[np.bool_]
    round: Ints
    place: Ints

    def __len__(self) -> int:
        return len(self.row)

    def wins(self, rows: int, n: int) -> Array:
        """How often each beat each on every row, [rows, n, n]; ties are halves."""
        return tally(self.row, self.a, self.b, self.score, rows, n)

    def renamed(self, rows: Ints, players: Ints) -> Matches:
        """The same matches with row k called rows[k] and player i called players[i]."""
        return replace(self, row=rows[self.row], a=players[self.a], b=players[self.b])


@dataclass(frozen=True)
class Arm:
    """One design over all trials: rho, tau [T] against the truth; top [T]: was the best one first; calls a trial."""

    name: str
    models: int
    rho: Array
    tau: Array
    top: Array
    calls: int

    def calls_per_hundredth(self, other: Arm) -> float | None:
        """Judge calls for each 0.01 of mean rho above another arm; None where it is not above it by two standard errors."""
        gain = self.rho - other.rho
        surely = len(gain) > 1 and gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(len(gain))
        return float(self.calls / (100 * gain.mean())) if surely else None


def draw_orders(rows: int, n: int, rng: np.random.Generator) -> Ints:
    """A random order of the players for each row, [rows, n]."""
    return np.argsort(rng.random((rows, n)), axis=1)


def draw_byes(rows: int, n: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which pairs of round 1 are a bye, [rows, m / 2] with m the power of two from n up."""
    m = 1 << (n - 1).bit_length()
    return np.argsort(np.argsort(rng.random((rows, m // 2)), axis=1), axis=1) < m - n


def bracket(orders: Ints, byes: npt.NDArray[np.bool_], play: Play) -> tuple[Matches, Ints]:
    """Knockout tournaments of all rows, a round at a time; and the champions [rows]."""
    rows, n = orders.shape
    if n < 2:
        raise UsageError(f"a tournament needs 2 players or more, not {n}")
    filled = np.ones((rows, 2 * byes.shape[1]), dtype=bool)
    filled[:, 1::2] = ~byes
    players: Ints = np.full(filled.shape, -1)
    players[filled] = orders.ravel()  # row by row: every row has n places
    played: list[tuple[Ints, Ints, Ints, Array, npt.NDArray[np.bool_], Ints, Ints]] = []
    while players.shape[1] > 1:
        first, second = players[:, 0::2], players[:, 1::2]
        row, place = np.nonzero(second >= 0)
        a, b = first[row, place], second[row, place]
        score, won = play(row, a, b)
        played.append((row, a, b, score, won, np.full(len(row), len(played)), place))
        players = first.copy()
        players[row, place] = np.where(won, a, b)
    return Matches(*map(np.concatenate, zip(*played, strict=True))), players[:, 0]


def pairs_of(design: Design, rows: int, n: int, rng: np.random.Generator, anchor: int = 0) -> tuple[Ints, Ints, Ints]:
    """(row, a, b) of every match of a design that does not depend on results (all but the tournament)."""
    if design == "anchored":
        a = np.array([i for i in range(n) if i != anchor])
        a, b = np.tile(a, (rows, 1)), np.full((rows, n - 1), anchor)
    else:
        first, second = np.triu_indices(n, 1)
        picks = np.tile(np.arange(len(first)), (rows, 1))
        if design == "random-pairs":
            picks = np.argsort(rng.random(picks.shape), axis=1)[:, : n - 1]
        a, b = first[picks], second[picks]
    return np.repeat(np.arange(rows), a.shape[1]), a.ravel(), b.ravel()


def matches(design: Design, rows: int, n: int, rng: np.random.Generator, play: Play, anchor: int = 0) -> Matches:
    """Draw and play a design on every row."""
    if n < 2:
        raise UsageError(f"a ranking needs 2 models or more, not {n}")
    if design == "tournament":
        return bracket(draw_orders(rows, n, rng), draw_byes(rows, n, rng), play)[0]
    row, a, b = pairs_of(design, rows, n, rng, anchor)
    score, won = play(row, a, b)
    return Matches(row, a, b, score, won, np.zeros(len(row), dtype=np.int64), np.arange(len(row)) % (len(row) // rows))


def joined(parts: Sequence[Matches]) -> Matches:
    """All matches of all parts, in order."""
    return Matches(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Matches)))


def beats(ratings: npt.ArrayLike, p_judge: float = 1.0) -> Array:
    """P_eff [..., n, n]: that a judge of this precision says i beats j, ratings [..., n] in Elo points."""
    if not 0 <= p_judge <= 1:
        raise UsageError(f"the judge's precision is a probability in [0, 1], not {p_judge}")
    r = np.asarray(ratings, dtype=np.float64)
    p = 1 / (1 + 10 ** ((r[..., None, :] - r[..., :, None]) / 400))
    return np.asarray(p_judge * p + (1 - p_judge) * (1 - p))


def by_law(law: Array, rng: np.random.Generator, rows_each: int = 1) -> Play:
    """Play by probabilities law [T, n, n]; rows t * rows_each onwards belong to trial t."""

    def play(row: Ints, a: Ints, b: Ints) -> tuple[Array, npt.NDArray[np.bool_]]:
        won = rng.random(len(row)) < law[row // rows_each, a, b]
        return won.astype(np.float64), won

    return play


def simulate(
    n: int,
    prompts: int,
    p_judge: float,
    trials: int = 50,
    seed: int = 0,
    ratings: Sequence[float] | None = None,
    round_robin: bool = False,
    ridge: float = RIDGE,
) -> dict[str, Arm]:
    """rho and tau-b of every arm over trials. ratings [n]: the truth; None: U(1000, 1300), new in every trial.

    Arms: tournament, random pairs, anchored at the top, the middle and the bottom (by true rating), round robin if asked.
    """
    if n < 2 or prompts < 1 or trials < 1:
        raise UsageError(f"2 models, 1 prompt and 1 trial or more are needed, not {n}, {prompts} and {trials}")
    if ratings is not None and len(ratings) != n:
        raise UsageError(f"{n} ratings are needed, not {len(ratings)}")
    rng = np.random.default_rng(seed)
    truth = (
        rng.uniform(*RANGE, (trials, n)) if ratings is None else np.tile(np.asarray(ratings, dtype=float), (trials, 1))
    )
    names = np.argsort(rng.random((trials, n)), axis=1)  # who sits at which index must not matter
    truth = -np.sort(-truth, axis=1)[np.arange(trials)[:, None], names]
    law = beats(truth, p_judge)
    out = {}
    direct: list[tuple[str, Design]] = [("tournament", "tournament"), ("random pairs", "random-pairs")]
    for name, design in direct:
        found = matches(design, trials * prompts, n, rng, by_law(law, rng, prompts))
        won = tally(found.row // prompts, found.a, found.b, found.score, trials, n)
        out[name] = _arm(name, won, ridge, truth, (n - 1) * prompts)
    for word, place in (("top", 0), ("mid", n // 2), ("bottom", n - 1)):
        met = np.repeat((names == place)[:, None, :].astype(np.int64), n, 1)  # [T, n, n]: everyone against the anchor
        met[:, np.arange(n), np.arange(n)] = 0
        out[f"anchor {word}"] = _arm(
            f"anchor {word}", _scheduled(met, law, prompts, rng), ridge, truth, (n - 1) * prompts
        )
    if round_robin:
        met = np.tile(np.triu(np.ones((n, n), dtype=np.int64), 1), (trials, 1, 1))
        won = _scheduled(met, law, prompts, rng)
        out["round robin"] = _arm("round robin", won, ridge, truth, n * (n - 1) // 2 * prompts)
    return out


def _scheduled(met: Ints, law: Array, prompts: int, rng: np.random.Generator) -> Array:
    """Wins [T, n, n] where i meets j on every prompt if met [T, n, n] says so: one binomial draw a pair."""
    won = rng.binomial(prompts, law) * met
    return np.asarray(won + (prompts * met - won).transpose(0, 2, 1), dtype=np.float64)


def _arm(name: str, wins: Array, ridge: float, truth: Array, budget: int) -> Arm:
    from scipy.stats import kendalltau, spearmanr

    strengths = bradley_terry(wins, ridge)
    rho, tau = [], []
    for estimated, true in zip(np.round(strengths, 9), truth, strict=True):
        none = np.ptp(estimated) == 0  # no order was found
        rho.append(0.0 if none else float(spearmanr(estimated, true).statistic))
        tau.append(0.0 if none else float(kendalltau(estimated, true).statistic))
    top = (strengths.argmax(1) == truth.argmax(1)).astype(np.float64)
    return Arm(name, truth.shape[1], np.array(rho), np.array(tau), top, budget)
