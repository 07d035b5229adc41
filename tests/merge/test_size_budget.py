"""Costs against counted entries; the solver against a grid; budgets kept, and used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.merge.pleas.blocks import Units, allowed, split
from trimtab.merge.pleas.size_budget import Budget, LayerCost, ratios

CHAIN = Budget(
    (
        LayerCost(64 * 40, out="h1"),
        LayerCost(40, out="h1", vector=True),
        LayerCost(40 * 24, "h1", "h2"),
        LayerCost(24, out="h2", vector=True),
        LayerCost(24 * 12, "h2", "h3"),
        LayerCost(12 * 10, "h3"),
        LayerCost(10),
    ),
    {"h1": 40, "h2": 24, "h3": 12},
)


def test_the_formula_is_the_count_of_entries() -> None:
    """Exactly, for every split of a layer between two groups, and with blocks of entries a unit."""
    n_i, n_o, block = 5, 4, 3
    for m_i in range(n_i + 1):
        for m_o in range(n_o + 1):
            inp = split(torch.randperm(n_i), torch.rand(n_i), m_i)
            out = split(torch.randperm(n_o), torch.rand(n_o), m_o)
            budget = Budget(
                (LayerCost(n_i * n_o * block, "i", "o"), LayerCost(n_o, out="o", vector=True)), {"i": n_i, "o": n_o}
            )
            counted = block * int(allowed(out, inp).sum()) + len(out)
            assert budget.count({"i": m_i, "o": m_o}) == counted
            r_i, r_o = m_i / n_i, m_o / n_o
            formula = n_i * n_o * block * ((1 + r_i) * (1 + r_o) - 2 * r_i * r_o) + n_o * (1 + r_o)
            assert counted == pytest.approx(formula, abs=1e-9)
            assert budget.cost({"i": r_i, "o": r_o}) == pytest.approx(formula, abs=1e-9)


def test_fixed_axes_are_merged_ones() -> None:
    inp, out = Units.fixed(6), split(torch.arange(4), torch.rand(4), 3)
    budget = Budget((LayerCost(24, out="o"),), {"o": 4})
    assert budget.count({"o": 3}) == int(allowed(out, inp).sum()) == 6 * 7
    assert CHAIN.most == pytest.approx((2 * CHAIN.base - 10) / CHAIN.base)  # the head's bias is shared


@pytest.mark.parametrize("scheme", ["qp", "uniform", "zip"])
def test_the_budget_is_kept_used_and_monotone(scheme: str) -> None:
    gains = {"h1": 0.2, "h2": 1.0, "h3": 0.7}
    spent, worth, whole = [], [], []
    targets = np.linspace(1.0, 2.0, 41)
    for target in targets:
        found = ratios(CHAIN, float(target), scheme, gains)
        assert all(0 <= r <= 1 for r in found.values())
        spent.append(CHAIN.cost(found) / CHAIN.base)
        worth.append(sum(gains[name] * r for name, r in found.items()))
        units = CHAIN.separate(found, float(target))
        whole.append(CHAIN.count(units) / CHAIN.base)
        assert whole[-1] <= target + 1e-12
    np.testing.assert_allclose(spent, np.minimum(targets, CHAIN.most), atol=1e-6)
    assert np.all(np.diff(spent) >= -1e-9) and np.all(np.diff(worth) >= -1e-6)
    assert np.all(np.diff(whole) >= -64 / CHAIN.base)  # one unit of h1 may give way to smaller ones
    assert whole[0] == 1.0 and whole[-1] == CHAIN.most


@pytest.mark.parametrize("seed", range(6))
def test_two_groups_against_a_grid(seed: int) -> None:
    rng = np.random.default_rng(seed)
    b1, b2, b3 = (int(b) for b in rng.integers(10, 1000, 3))
    budget = Budget((LayerCost(b1, out="p"), LayerCost(b2, "p", "q"), LayerCost(b3, "q")), {"p": 1, "q": 1})
    weights = rng.random(2)
    target = float(rng.uniform(1.1, 1.9))
    found = ratios(budget, target, "qp", {"p": weights[0], "q": weights[1]}, seed)
    r = np.linspace(0, 1, 1001)
    p, q = np.meshgrid(r, r, indexing="ij")
    cost = b1 * (1 + p) + b2 * ((1 + p) * (1 + q) - 2 * p * q) + b3 * (1 + q)
    worth = np.where(cost <= target * budget.base, weights[0] * p + weights[1] * q, -1.0).max()
    assert weights @ [found["p"], found["q"]] >= worth - 1e-3 * weights.max()
    assert budget.cost(found) <= target * budget.base * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_chains_of_groups_against_random_search(seed: int) -> None:
    """Six groups, 20,000 random feasible points and their best single moves: none is better."""
    rng = np.random.default_rng(seed)
    names = [f"g{i}" for i in range(6)]
    bases = rng.integers(10, 1000, 7)
    pairs = zip(["", *names], [*names, ""], bases, strict=True)
    budget = Budget(tuple(LayerCost(int(b), i, o) for i, o, b in pairs), dict.fromkeys(names, 1))
    weights, target = rng.random(6), 1.4
    found = ratios(budget, target, "qp", dict(zip(names, weights, strict=True)), seed)
    ours = weights @ [found[name] for name in names]
    points = np.where(rng.random((20_000, 6)) < 0.5, np.round(rng.random((20_000, 6))), rng.random((20_000, 6)))
    s = np.concatenate([np.ones((20_000, 1)), 1 - points, np.ones((20_000, 1))], 1)
    cost = (bases * (2 - s[:, :-1] * s[:, 1:])).sum(1)
    assert ours >= (points @ weights)[cost <= target * budget.base].max() - 1e-6


def test_zip_fills_from_the_head_and_uniform_is_equal() -> None:
    head_first = ratios(CHAIN, 1.2, "zip")
    assert head_first["h3"] == 1.0 and 0 < head_first["h2"] < 1 and head_first["h1"] == 0.0
    assert len({round(r, 9) for r in ratios(CHAIN, 1.4, "uniform").values()}) == 1
    assert ratios(CHAIN, 1.0, "qp") == pytest.approx({"h1": 0, "h2": 0, "h3": 0}, abs=1e-9)


def test_bad_budgets() -> None:
    for target in (0.9, 2.1, float("nan")):
        with pytest.raises(UsageError, match="between 1 .* and 2"):
            ratios(CHAIN, target)
    with pytest.raises(UsageError, match="unknown scheme 'qo'; did you mean 'qp'"):
        ratios(CHAIN, 1.2, "qo")
