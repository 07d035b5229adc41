"""How wide each group of units becomes under a size budget: 1.0 is one parent, 2.0 both side by side.

r_g in [0, 1] is the share of group g that is kept apart. A layer of `base` multiply-adds whose input and output axes belong
to groups i and o has

    cost = base ((1 + r_i)(1 + r_o) - 2 r_i r_o)

multiply-adds, because the two blocks between A's own and B's own units are zeros; r = 0 for an axis that nothing widens; a
bias has base (1 + r). With s = 1 - r a layer costs base (2 - s_i s_o).

    qp        max sum_g w_g r_g  subject to  sum of costs <= budget * sum of bases,  0 <= r <= 1
    uniform   one r for all
    zip       whole groups from the head side down until the budget is used (the last one in part)

The problem is not convex. SLSQP is started from several points (equal shares, a greedy rule, one group filled before the
others, random ones) and the best feasible end is filled up to the budget. The paper solves it with Gurobi; the published code
returns random ratios where that is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError, unknown

SCHEMES = ("qp", "uniform", "zip")
STARTS = 12  # random starting points, and at most so many that fill one group first
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerCost:
    """One tensor's multiply-adds for one input; inp and out name the groups of its axes, "" where nothing widens an axis.

    vector: a tensor of one axis (out).
    """

    base: int
    inp: str = ""
    out: str = ""
    vector: bool = False


@dataclass(frozen=True)
class Budget:
    """The costs of a network's layers by its groups, in the order from input to output. sizes: units a group."""

    layers: tuple[LayerCost, ...]
    sizes: Mapping[str, int]

    @property
    def base(self) -> int:
        return sum(layer.base for layer in self.layers)

    @property
    def groups(self) -> list[str]:
        return list(self.sizes)

    def cost(self, ratios: Mapping[str, float]) -> float:
        """Multiply-adds at these ratios; a group without one is at 0."""
        return float(_Costs(self)(np.array([ratios.get(name, 0.0) for name in self.groups])))

    def count(self, separate: Mapping[str, int]) -> int:
        """Multiply-adds, exactly, with so many units of each group kept apart."""
        total = 0
        for layer in self.layers:
            n_i, n_o = self.sizes.get(layer.inp, 1), self.sizes.get(layer.out, 1)
            m_i, m_o = separate.get(layer.inp, 0), separate.get(layer.out, 0)
            one, rest = divmod(layer.base, n_o if layer.vector else n_i * n_o)
            if rest:
                raise UsageError(f"a layer of {layer.base} multiply-adds does not divide into its {n_i} x {n_o} units")
            total += one * (n_o + m_o) if layer.vector else one * ((n_i + m_i) * (n_o + m_o) - 2 * m_i * m_o)
        return total

    @property
    def most(self) -> float:
        """The budget at which everything that can be kept apart is."""
        return self.cost(dict.fromkeys(self.groups, 1.0)) / self.base

    def separate(self, ratios: Mapping[str, float], budget: float) -> dict[str, int]:
        """Whole units a group, within the budget: ratios rounded down, then one more each where most is missing."""
        wanted = {name: min(max(ratios.get(name, 0.0), 0.0), 1.0) * size for name, size in self.sizes.items()}
        found = {name: int(value + 1e-9) for name, value in wanted.items()}
        limit = budget * self.base * (1 + 1e-12)
        for name in sorted(wanted, key=lambda name: found[name] - wanted[name]):
            more = {**found, name: min(found[name] + 1, self.sizes[name])}
            if wanted[name] - found[name] > 1e-6 and self.count(more) <= limit:
                found = more
        while self.count(found) > limit and any(found.values()):  # budget 1.0 with ratios that rounding left above 0
            name = max(found, key=lambda name: found[name])
            found[name] -= 1
        return found


class _Costs:
    """The cost as a function of s = 1 - r, as arrays."""

    def __init__(self, budget: Budget) -> None:
        number = {name: i for i, name in enumerate(budget.groups)}
        last = len(number)  # s = 1 for what is not widened
        pairs = [
            (layer.base, last if layer.vector else number.get(layer.inp, last), number.get(layer.out, last))
            for layer in budget.layers
        ]
        self.base, self.first, self.second = (np.array(column) for column in zip(*pairs, strict=True))
        self.groups = last

    def __call__(self, ratios: Array) -> float:
        s = np.append(1.0 - ratios, 1.0)
        return float((self.base * (2.0 - s[self.first] * s[self.second])).sum())

    def slope(self, ratios: Array) -> Array:
        """d cost / d r, never negative."""
        s = np.append(1.0 - ratios, 1.0)
        out = np.zeros(self.groups + 1)
        np.add.at(out, self.first, self.base * s[self.second])
        np.add.at(out, self.second, self.base * s[self.first])
        return out[:-1]


def ratios(
    budget: Budget, target: float, scheme: str = "qp", gains: Mapping[str, float] | None = None, seed: int = 0
) -> dict[str, float]:
    """The share of each group to keep apart within `target` (1 to 2 times one parent).

    gains: w_g, what keeping all of group g apart is worth; not given: as many as it has units. Gains below 0 count as 0.
    UsageError for a target outside [1, 2] or an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise unknown("scheme", scheme, SCHEMES)
    check_target(target)
    names = budget.groups
    if not names:
        return {}
    costs = _Costs(budget)
    limit = target * budget.base
    if target >= budget.most - 1e-12:
        return dict.fromkeys(names, 1.0)
    if scheme == "uniform":
        found = _scaled(costs, np.ones(len(names)), limit)
    elif scheme == "zip":
        found = _filled(costs, np.zeros(len(names)), limit, list(range(len(names)))[::-1])
    else:
        weights = np.array([max((gains or budget.sizes).get(name, 0.0), 0.0) for name in names], dtype=np.float64)
        found = _solve(costs, weights / max(weights.max(), 1e-300), limit, seed)
    return dict(zip(names, map(float, found), strict=True))


def check_target(target: float) -> None:
    """UsageError for a budget outside [1, 2]."""
    if not 1.0 <= target <= 2.0:
        raise UsageError(f"the budget must be between 1 (one model) and 2 (both side by side), not {target:g}")


def _solve(costs: _Costs, weights: Array, limit: float, seed: int) -> Array:
    from scipy.optimize import minimize

    size, base = len(weights), float(costs.base.sum())
    rng = np.random.default_rng(seed)
    by_price = list(np.argsort(-weights / np.maximum(costs.slope(np.zeros(size)), 1e-300), kind="stable"))
    starts = [_scaled(costs, np.ones(size), limit), _greedy(costs, weights, limit)]
    starts += [
        _filled(costs, np.zeros(size), limit, [g, *(other for other in by_price if other != g)])
        for g in by_price[:STARTS]
    ]
    starts += [_scaled(costs, rng.random(size), limit) for _ in range(STARTS)]
    best, value = starts[0], -np.inf
    for start in starts:
        solved = minimize(
            lambda r: -float(weights @ r),
            start,
            jac=lambda r: -weights,
            method="SLSQP",
            bounds=[(0.0, 1.0)] * size,
            constraints={
                "type": "ineq",
                "fun": lambda r: (limit - costs(r)) / base,
                "jac": lambda r: -costs.slope(r) / base,
            },
            options={"maxiter": 200, "ftol": 1e-10},
        )
        for end in (start, solved.x):
            end = np.clip(end, 0.0, 1.0)
            end = _scaled(costs, end, limit) if costs(end) > limit else end
            end = _filled(costs, end, limit, by_price)
            if weights @ end > value + 1e-12:
                best, value = end, float(weights @ end)
    return best


def _scaled(costs: _Costs, direction: Array, limit: float) -> Array:
    """The largest multiple of a direction within the budget, entries cut at 1."""
    low, high = 0.0, 1.0 / max(float(direction[direction > 0].min(initial=1.0)), 1e-9)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if costs(np.minimum(middle * direction, 1.0)) <= limit else (low, middle)
    return np.minimum(low * direction, 1.0)


def _filled(costs: _Costs, start: Array, limit: float, order: Sequence[int]) -> Array:
    """Groups raised to 1 one after the other; the first that does not fit whole is raised as far as it fits."""
    found = start.copy()
    for group in order:
        left, slope = limit - costs(found), costs.slope(found)[group]
        # The cost is linear in one group's ratio.
        found[group] = min(1.0, found[group] + max(left, 0.0) / slope) if slope > 0 else 1.0
    return found


def _greedy(costs: _Costs, weights: Array, limit: float) -> Array:
    """Small steps, each in the group whose gain per multiply-add is largest at that point."""
    found = np.zeros(len(weights))
    step = 0.02
    while True:
        slope = costs.slope(found)
        price = np.where(found < 1.0, weights / np.maximum(slope, 1e-300), -1.0)
        group = int(price.argmax())
        if price[group] < 0:
            return found
        raised = found.copy()
        raised[group] = min(1.0, found[group] + step)
        if costs(raised) > limit:
            return _filled(costs, found, limit, list(np.argsort(-price, kind="stable")))
        found = raised
