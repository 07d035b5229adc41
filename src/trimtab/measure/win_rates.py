"""Win rates of a policy under best-of-n and worst-of-n against its base, exactly; the transforms InfAlign tilts by.

A policy is seen through its reward alone: masses q [A] over the A levels of the reward in increasing order, the base's
masses p [A] > 0 beside them. A continuous reward is `uniform(points)`: many levels of equal base mass. With F the
distribution function of q, F0 that of p, S = 1 - F, C the base's mid-rank (F0 below a level plus half of it):

    KL(q || p) = sum q log(q / p)                      W_1 = sum q C          (ties count half everywhere)
    best of n:   W = sum_i (F_i^n - F_(i-1)^n) (F0_i^n + F0_(i-1)^n) / 2      -> 1 - n int u^(n-1) F(u)^n du
    worst of n:  W = sum_i (S_(i-1)^n - S_i^n) (1 - (S0_(i-1)^n + S0_i^n) / 2) -> n int (1-u)^(n-1) (1-F(u))^n du

The maximiser of W - beta KL is q proportional to p exp(Phi / beta) with Phi the gradient of W in q, which depends on q:

    best:  Phi(v) = -n^2 int_v^1 u^(n-1) F(u)^(n-1) du        worst: Phi(v) = n^2 int_0^v (1-u)^(n-1) (1-F(u))^(n-1) du

Here Phi(v) needs F below v alone, so the fixed point is a recursion upwards from the mass of the lowest level, and that
one number is found by bracketing where the masses sum to 1. All fixed points are found, not the one an iteration falls
into: repeated substitution, damped by half, ends in a cycle of two at small beta (n = 4: below about 0.15). Best of n is
concave in q (F^n is convex), so there is one solution at each beta and every KL is reached. Worst of n is convex in q:
there may be several, and the KL of the best one may jump.

Source: Balashankar et al., InfAlign, arXiv 2412.19792; the discrete forms and the recursion are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError

Array = npt.NDArray[np.float64]
Procedure = Literal["best", "worst"]
Kind = Literal["identity", "exp", "log", "fixed-point"]
POINTS = 2048  # levels that stand for a continuous reward; errors fall with their square
SCAN, REFINE, PASSES = 256, 32, 11
BETAS = (1e-6, 1e3)  # between which a KL is looked for


@dataclass(frozen=True)
class Rates:
    """KL in nats an answer; the win rate over the base of one draw, of the best of n and of the worst of n."""

    kl: float
    single: float
    best: float
    worst: float


def uniform(points: int = POINTS) -> Array:
    """The base masses of a continuous reward, cut into equal levels."""
    return np.full(points, 1 / points)


def mid_ranks(p: Array) -> Array:
    """C [A]: the base's mass below each level plus half of the level's own. Its mean under the base is 1/2."""
    edges = _edges(p)
    return (edges[1:] + edges[:-1]) / 2


def tilt(p: Array, phi: Array, beta: float) -> Array:
    """p exp(phi / beta) / Z [A]."""
    if not beta > 0:
        raise UsageError(f"beta must be above 0, not {beta}")
    raw = p * np.exp((phi - phi.max()) / beta)
    return np.asarray(raw / raw.sum())


def kl(q: Array, p: Array) -> float:
    """KL(q || p) in nats."""
    some = q > 0
    return float((q[some] * np.log(q[some] / p[some])).sum())


def rates(q: Array, p: Array, n: int) -> Rates:
    """What the policy q gains over the base p, each run alone and under the same best (worst) of n."""
    single, best, worst = (win_rate(q, p, size, how) for size, how in ((1, "best"), (n, "best"), (n, "worst")))
    return Rates(kl(q, p), single, best, worst)


def win_rate(q: Array, p: Array, n: int, procedure: Procedure | str = "best") -> float:
    """P(the best or worst of n draws of q beats that of n draws of p), ties counting half."""
    return float((of_n_law(q, n, procedure) * _beaten(p, n, procedure)).sum())


def of_n_law(p: Array, n: int, procedure: Procedure | str = "best", rewards: npt.ArrayLike | None = None) -> Array:
    """The law [A] of the best (worst) of n draws of p: F^n - F_-^n in reward order.

    rewards [A]: the outcomes' rewards, in any order and with ties; among tied draws the pick is p's own. Without them
    the outcomes are distinct levels in increasing order.
    """
    _check(n, procedure)
    if rewards is not None:
        level = np.unique(np.asarray(rewards), return_inverse=True)[1]
        mass = np.asarray(np.bincount(level, weights=p), dtype=np.float64)
        return np.asarray((of_n_law(mass, n, procedure) / np.maximum(mass, 1e-300))[level] * p)
    edges = _edges(p)
    return np.diff(edges**n) if procedure == "best" else -np.diff((1 - edges) ** n)


def expected_max(rewards: Sequence[float | None], n: int) -> float:
    """The unbiased estimate of E[max of n draws] from m >= n draws: the mean over all their subsets of n.

    sum_i C(i-1, n-1) / C(m, n) r_(i), r sorted ascending. Draws that were not judged (None) are left out.
    """
    known = np.sort([value for value in rewards if value is not None])
    m = len(known)
    if not m:
        raise UsageError("none of the draws was judged, so their best has no estimate")
    if not 1 <= n <= m:
        raise UsageError(f"the best of {n} cannot be estimated from {m} judged draws; give n from 1 to {m}")
    place = np.arange(m, 1, -1)  # from the largest down: weight n/m, then times (i - n) / (i - 1)
    weights = n / m * np.cumprod(np.concatenate([[1.0], np.maximum(place - n, 0) / (place - 1)]))
    return float((weights * known[::-1]).sum())


# transforms


@dataclass(frozen=True)
class Transform:
    """Phi on calibrated rewards u in [0, 1].

    identity     u: the optimum for one draw (and the fixed point at n = 1)
    exp          sign(t) exp(t u), rescaled to [0, 1]: (e^(tu) - 1) / (e^t - 1); t > 0 for best, < 0 for worst of n
    log          log(max(u, floor)): with beta = 1 / (m - 1) the tilted policy is exactly best-of-m
    fixed-point  the optimal Phi of `procedure` of `n` at `beta`, which must be the beta it is then divided by
    """

    kind: Kind = "exp"
    procedure: Procedure = "best"
    n: int = 4
    t: float = 10.0
    beta: float = 1.0
    floor: float = 1e-12

    def __post_init__(self) -> None:
        _check(self.n, self.procedure)
        if self.kind not in ("identity", "exp", "log", "fixed-point"):
            raise UsageError(f"transform {self.kind!r} is not one of identity, exp, log, fixed-point")
        if not 0 < self.t < math.inf:
            raise UsageError(f"t must be above 0, not {self.t} (its sign is that of the procedure)")
        if not self.beta > 0 or not 0 < self.floor < 1:
            raise UsageError(f"beta must be above 0 and floor in (0, 1), not {self.beta} and {self.floor}")

    def __call__(self, u: npt.ArrayLike) -> Array:
        values = np.asarray(u, dtype=np.float64)
        if self.kind == "identity":
            return values
        if self.kind == "log":
            return np.log(np.maximum(values, self.floor))
        if self.kind == "exp":
            return exponential(values, self.t if self.procedure == "best" else -self.t)
        grid, phi = _fixed_point_on_a_grid(self.beta, self.n, self.procedure)
        return np.interp(values, grid, phi)

    def each(self, ranks: Sequence[float | None]) -> list[float | None]:
        """Phi of each rank; None (not judged) stays None."""
        phi = self([0.5 if rank is None else rank for rank in ranks]).tolist()
        return [None if rank is None else value for rank, value in zip(ranks, phi, strict=True)]

    @property
    def span(self) -> float:
        """Phi(1) - Phi(0)."""
        low, high = self(np.array([0.0, 1.0]))
        return float(high - low)

    def policy(self, beta: float, p: Array) -> Array:
        """The tilted policy at `beta` [A]; the fixed point is that of the base p itself."""
        if self.kind == "fixed-point":
            return solve(beta, self.n, self.procedure, p)[0].q
        return tilt(p, self(mid_ranks(p)), beta)


def exponential(u: npt.ArrayLike, t: float, rescale: bool = True) -> Array:
    """sign(t) exp(t u); rescaled to 0 at u = 0 and 1 at u = 1, which changes beta's scale and nothing else."""
    values = np.asarray(u, dtype=np.float64)
    if not math.isfinite(t) or t == 0:
        raise UsageError(f"t must be a number other than 0, not {t}")
    if rescale:
        high = abs(t)  # in powers that cannot overflow
        top = np.exp(high * (values - 1)) if t > 0 else np.exp(-high * values)
        end = math.exp(-high)
        return np.asarray((top - end) / (1 - end) if t > 0 else (1 - top) / (1 - end))
    if abs(t) > 50:
        raise UsageError(f"exp({t:g} u) overflows what a trainer can use; take the rescaled form, or |t| up to 50")
    return np.asarray(math.copysign(1, t) * np.exp(t * values))


def gradient(q: Array, p: Array, n: int, procedure: Procedure | str = "best") -> Array:
    """Phi [A]: the gradient of the win rate in q, up to a constant (0 at the lowest level)."""
    edges = _edges(q)[1:-1]
    inner = edges if procedure == "best" else 1 - edges
    return np.concatenate([[0.0], np.cumsum(n * inner ** (n - 1) * np.diff(_beaten(p, n, procedure)))])


# the fixed point


@dataclass(frozen=True)
class Solution:
    """A fixed point at `beta`: masses q [A], its Phi [A], its rates and its objective W - beta KL."""

    beta: float
    q: Array
    phi: Array
    rates: Rates
    objective: float


def solve(beta: float, n: int, procedure: Procedure | str = "best", p: Array | None = None) -> list[Solution]:
    """All fixed points q proportional to p exp(Phi(q) / beta), the one with the largest objective first."""
    _check(n, procedure)
    if not 0 < beta < math.inf:
        raise UsageError(f"beta must be above 0 and finite, not {beta}")
    p = uniform() if p is None else p
    if not (p > 0).all():
        raise UsageError("every level needs base mass above 0: leave out levels that the base never gives")
    shoot = _Shooting(beta, n, procedure == "best", p)
    found = []
    for q in shoot.roots():
        phi, rate = gradient(q, p, n, procedure), rates(q, p, n)
        won = rate.best if procedure == "best" else rate.worst
        found.append(Solution(beta, q, phi, rate, won - beta * rate.kl))
    return sorted(found, key=lambda one: -one.objective)


class _Shooting:
    """The recursion log q_(i+1) = log q_i + log(p_(i+1) / p_i) + (Phi_(i+1) - Phi_i) / beta from the lowest level up."""

    def __init__(self, beta: float, n: int, best: bool, p: Array):
        self.n, self.best = n, best
        self.log_p = np.log(p)
        self.pull = n * np.diff(_beaten(p, n, "best" if best else "worst")) / beta
        self.lowest = float(self.log_p[0] - self.pull.sum() - 1)  # Phi rises by at most that

    def masses(self, log_first: Array) -> tuple[Array, Array]:
        """log q [A, S] from each of S lowest masses, and their sums [S] (2 where they pass 2)."""
        log_q, total = log_first, np.exp(log_first)
        rows = [log_q]
        for step, pull in zip(np.diff(self.log_p), self.pull, strict=True):
            share = total if self.best else np.maximum(1 - total, 0)
            log_q = log_q + step + pull * share ** (self.n - 1)
            total = np.minimum(total + np.exp(np.minimum(log_q, 1)), 2)
            rows.append(log_q)
        return np.stack(rows), total

    def roots(self) -> list[Array]:
        """Every q [A] that sums to 1: sign changes on a scan of the lowest mass, each then narrowed to rounding."""
        scan = np.linspace(self.lowest, 0.0, SCAN)
        over = self.masses(scan)[1] >= 1
        out = []
        for i in np.flatnonzero(over[1:] != over[:-1]):
            low, high, rising = scan[i], scan[i + 1], bool(over[i + 1])
            for _ in range(PASSES):
                fine = np.linspace(low, high, REFINE)
                past = (self.masses(fine)[1] >= 1) == rising
                at = int(np.argmax(past[1:])) + 1  # the first point beyond the root
                low, high = fine[at - 1], fine[at]
            q = np.exp(self.masses(np.array([low]))[0][:, 0])
            out.append(q / q.sum())
        return out


def at_kl(transform: Transform, target: float, p: Array | None = None) -> tuple[float, Rates] | None:
    """The beta at which the tilted policy is `target` nats from the base, and its rates. None: no beta gives that KL."""
    from scipy.optimize import brentq

    p = uniform() if p is None else p
    if not target > 0:
        raise UsageError(f"a KL above 0 is needed, not {target}")

    def excess(log_beta: float) -> float:
        return kl(transform.policy(math.exp(log_beta), p), p) - target

    low, high = (math.log(beta) for beta in BETAS)
    if excess(low) < 0 or excess(high) > 0:
        return None
    beta = math.exp(brentq(excess, low, high, xtol=1e-10))
    found = rates(transform.policy(beta, p), p, transform.n)
    return (beta, found) if abs(found.kl - target) < 1e-6 else None  # else the KL jumps over the target there


def curve(transform: Transform, betas: Sequence[float], p: Array | None = None) -> list[tuple[float, Rates]]:
    """(beta, rates) of the tilted policy for each beta."""
    p = uniform() if p is None else p
    return [(beta, rates(transform.policy(beta, p), p, transform.n)) for beta in betas]


@lru_cache(maxsize=32)
def _fixed_point_on_a_grid(beta: float, n: int, procedure: Procedure) -> tuple[Array, Array]:
    p = uniform()
    return mid_ranks(p), solve(beta, n, procedure, p)[0].phi


def _edges(masses: Array) -> Array:
    """The distribution function at the A + 1 edges of the levels, from exactly 0 to exactly 1."""
    edges = np.concatenate([[0.0], np.cumsum(masses)])
    return np.asarray(edges / edges[-1])


def _beaten(p: Array, n: int, procedure: Procedure | str) -> Array:
    """P(a level beats the best, or worst, of n draws of the base) [A], ties counting half."""
    edges = _edges(p)
    if procedure == "best":
        return np.asarray((edges[1:] ** n + edges[:-1] ** n) / 2)
    above = (1 - edges) ** n
    return np.asarray(1 - (above[1:] + above[:-1]) / 2)


def _check(n: int, procedure: Procedure | str) -> None:
    if n < 1:
        raise UsageError(f"n must be 1 or more, not {n}")
    if procedure not in ("best", "worst"):
        raise UsageError(f"procedure {procedure!r} is neither best nor worst")
