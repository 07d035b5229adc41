"""Win rates under best and worst of n against closed forms, enumeration, simulation and direct optimisation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chisquare

from oracles.toy import Toy
from trimtab.errors import UsageError
from trimtab.measure.kl import best_of_n_bound
from trimtab.measure.win_rates import (
    Array,
    Rates,
    Transform,
    at_kl,
    curve,
    expected_max,
    exponential,
    gradient,
    kl,
    mid_ranks,
    of_n_law,
    rates,
    solve,
    tilt,
    uniform,
    win_rate,
)

FINE = uniform(20_000)


def masses(outcomes: int, seed: int) -> Array:
    return np.random.default_rng(seed).dirichlet(np.ones(outcomes))


# the laws of best and worst of n


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_continuous_best_of_n_has_its_textbook_kl_and_win_rate(n: int) -> None:
    """Density n u^(n-1): KL log n - (n-1)/n, win rate n / (n+1). A cell of width h errs by O(h^2): 3e-9 at h = 5e-5."""
    law = of_n_law(FINE, n)
    expected = {2: 0.19315, 4: 0.63629, 16: 1.83509}[n]
    assert kl(law, FINE) == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-5)
    assert kl(law, FINE) == pytest.approx(expected, abs=1e-5)
    assert win_rate(law, FINE, 1) == pytest.approx(n / (n + 1), abs=1e-8)
    density = n * mid_ranks(FINE) ** (n - 1)
    assert np.abs(law * len(FINE) - density).max() < 1e-6


@pytest.mark.parametrize("n", [2, 5, 16])
def test_the_log_transform_is_best_of_n(n: int) -> None:
    """exp((n-1) log u) = u^(n-1); the midpoint of a cell and its mean differ by O(h^2), relative to a density up to n."""
    tilted = Transform("log").policy(1 / (n - 1), FINE)
    assert np.abs(tilted - of_n_law(FINE, n)).max() * len(FINE) < 1e-6
    assert rates(tilted, FINE, 4).kl == pytest.approx(best_of_n_bound(n), abs=1e-6)


@pytest.mark.parametrize("procedure", ["best", "worst"])
def test_the_discrete_law_is_that_of_simulated_draws(procedure: str) -> None:
    """100,000 simulated best (worst) of 4 over 31 outcomes of which many tie: the first best of the draws is kept."""
    p = masses(31, 0)
    rewards = np.random.default_rng(1).integers(0, 12, 31).astype(float)
    draws = np.random.default_rng(2).choice(31, size=(100_000, 4), p=p)
    scores = rewards[draws] if procedure == "best" else -rewards[draws]
    kept = draws[np.arange(len(draws)), scores.argmax(1)]
    law = of_n_law(p, 4, procedure, rewards)
    assert law.sum() == pytest.approx(1, abs=1e-12)
    often = law * len(kept) >= 5
    counts = np.bincount(kept, minlength=31)
    seen = np.append(counts[often], counts[~often].sum())
    assert chisquare(seen, np.append(law[often], law[~often].sum()) * len(kept)).pvalue > 0.01


def test_the_kl_of_a_discrete_base_never_passes_the_bound() -> None:
    gaps = []
    for seed in range(200):
        p, n = masses(int(3 + seed % 30), seed), 2 + seed % 9
        gaps.append(best_of_n_bound(n) - kl(of_n_law(p, n), p))
    assert min(gaps) >= 0
    assert kl(of_n_law(FINE, 4), FINE) == pytest.approx(best_of_n_bound(4), abs=1e-6)  # tight without ties


def test_the_law_over_the_31_strings_of_a_toy_model() -> None:
    """vocab 3, horizon 4, r = 1.5 x (tokens 1) - 0.7 x length: ties keep the KL at n = 4 below the bound of 0.6363."""
    toy = Toy(lambda tokens: 1.5 * tokens.count(1) - 0.7 * len(tokens), vocab=3, horizon=4)
    p = toy.answer_probabilities().numpy()
    rewards = np.array([toy.score(tuple(token for token in answer if token)) for answer in toy.answers])
    law = of_n_law(p, 4, "best", rewards)
    assert len(law) == 31 and law.sum() == pytest.approx(1, abs=1e-6)
    assert 0.3 < kl(law, p) < best_of_n_bound(4) == pytest.approx(0.6363, abs=1e-4)


# win rates


def density_rates(f: Callable[[float], float], big_f: Callable[[float], float], n: int) -> Rates:
    """The integrals themselves, by adaptive quadrature."""
    best = 1 - n * quad(lambda u: u ** (n - 1) * big_f(u) ** n, 0, 1)[0]
    worst = n * quad(lambda u: (1 - u) ** (n - 1) * (1 - big_f(u)) ** n, 0, 1)[0]
    return Rates(
        quad(lambda u: f(u) * math.log(f(u)), 0, 1)[0], quad(lambda u: u * f(u), 0, 1)[0], best, worst
    )  # fmt: skip


def test_two_formulas_for_the_win_rates_agree() -> None:
    """int u^n d(F^n) by levels against 1 - n int u^(n-1) F^n by quadrature, on f proportional to exp(3u)."""
    z = math.expm1(3) / 3
    exact = density_rates(lambda u: math.exp(3 * u) / z, lambda u: math.expm1(3 * u) / math.expm1(3), 4)
    found = rates(tilt(FINE, mid_ranks(FINE), 1 / 3), FINE, 4)
    for name in ("kl", "single", "best", "worst"):
        assert getattr(found, name) == pytest.approx(getattr(exact, name), abs=1e-6)
    assert found.best == pytest.approx(0.74984, abs=1e-5)
    assert found.worst == pytest.approx(0.81332, abs=1e-5)
    alone = rates(tilt(FINE, mid_ranks(FINE), 1 / 3), FINE, 1)
    assert alone.best == pytest.approx(alone.single, abs=1e-12)
    assert alone.worst == pytest.approx(alone.single, abs=1e-12)


@pytest.mark.parametrize("procedure", ["best", "worst"])
def test_ties_count_half(procedure: str) -> None:
    """Enumeration of all 3^4 pairs of two draws each."""
    p, q = masses(3, 3), masses(3, 4)
    pick = max if procedure == "best" else min
    won = 0.0
    for ours in itertools.product(range(3), repeat=2):
        for theirs in itertools.product(range(3), repeat=2):
            gain = pick(ours) - pick(theirs)
            won += q[list(ours)].prod() * p[list(theirs)].prod() * (1 if gain > 0 else 0.5 if gain == 0 else 0)
    assert win_rate(q, p, 2, procedure) == pytest.approx(won, abs=1e-14)
    assert win_rate(p, p, 5, procedure) == pytest.approx(0.5, abs=1e-14)


def test_the_mean_rank_of_the_base_is_one_half() -> None:
    for seed in range(20):
        p = masses(2 + seed, seed)
        assert (p * mid_ranks(p)).sum() == pytest.approx(0.5, abs=1e-12)


# the transforms


def test_the_transform_at_the_base_is_its_closed_form() -> None:
    """F(u) = u: best Phi = n^2 v^(2n-1) / (2n-1), worst Phi = -n^2 (1-v)^(2n-1) / (2n-1), up to constants; mirrored."""
    n, v = 4, mid_ranks(FINE)
    best, worst = gradient(FINE, FINE, n, "best"), gradient(FINE, FINE, n, "worst")
    assert np.ptp(best - n**2 * v ** (2 * n - 1) / (2 * n - 1)) < 1e-6
    assert np.ptp(worst + n**2 * (1 - v) ** (2 * n - 1) / (2 * n - 1)) < 1e-6
    assert np.ptp(worst + best[::-1]) < 1e-12


@pytest.mark.parametrize("procedure", ["best", "worst"])
def test_the_gradient_is_that_of_the_win_rate(procedure: str) -> None:
    p, q, step = masses(7, 0), masses(7, 1), 1e-6
    phi = gradient(q, p, 3, procedure)
    for i, j in itertools.combinations(range(7), 2):
        move = np.zeros(7)
        move[i], move[j] = step, -step
        slope = (win_rate(q + move, p, 3, procedure) - win_rate(q - move, p, 3, procedure)) / (2 * step)
        assert slope == pytest.approx(phi[i] - phi[j], abs=1e-8)


def test_the_exponential_is_rescaled_without_overflow() -> None:
    u = np.linspace(0, 1, 11)
    for t in (10.0, -10.0, 3.0, -0.5):
        raw = np.sign(t) * np.exp(t * u)
        assert np.allclose(exponential(u, t), (raw - raw[0]) / (raw[-1] - raw[0]), atol=1e-14)
        assert np.allclose(exponential(u, t, rescale=False), raw)
    for t in (700.0, -700.0, 1e5):
        assert np.isfinite(exponential(u, t)).all() and exponential(u, t)[[0, -1]].tolist() == [0.0, 1.0]
    for t in (51.0, -51.0):
        with pytest.raises(UsageError, match="overflows"):
            exponential(u, t, rescale=False)


def test_the_fixed_point_for_a_single_draw_is_the_identity() -> None:
    phi = solve(0.4, 1)[0].phi
    assert np.ptp(phi - mid_ranks(uniform())) < 1e-12
    for procedure in ("best", "worst"):
        other = Transform("fixed-point", procedure, n=1, beta=0.4)  # type: ignore[arg-type]
        assert np.ptp(other(np.linspace(0.01, 0.99, 50)) - np.linspace(0.01, 0.99, 50)) < 1e-9


# the optimum


def direct(p: Array, n: int, beta: float, procedure: str, seed: int, steps: int = 400) -> tuple[Array, float]:
    """The best policy found by L-BFGS on the logits, from a random start; the objective written out again in torch."""
    base = torch.tensor(p)
    edges = torch.cat([torch.zeros(1), base.cumsum(0)]).double()
    edges = edges if procedure == "best" else 1 - edges
    beaten = (edges[1:] ** n + edges[:-1] ** n) / 2
    beaten = beaten if procedure == "best" else 1 - beaten
    logits = torch.randn(len(p), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()

    def objective() -> torch.Tensor:
        q = logits.softmax(0)
        ours = torch.cat([torch.zeros(1), q.cumsum(0)])
        law = (ours**n).diff() if procedure == "best" else -((1 - ours) ** n).diff()
        return (law * beaten).sum() - beta * (q * (q / base).log()).sum()

    optimiser = torch.optim.LBFGS([logits], max_iter=steps, tolerance_grad=1e-13, tolerance_change=1e-16,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = -objective()
        loss.backward()
        return loss

    optimiser.step(closure)
    return logits.softmax(0).detach().numpy(), objective().item()


@pytest.mark.parametrize(("outcomes", "n", "beta"), [(8, 4, 0.5), (6, 2, 0.1), (10, 4, 0.08)])
@pytest.mark.parametrize("procedure", ["best", "worst"])
def test_the_fixed_point_is_what_direct_optimisation_finds(procedure: str, outcomes: int, n: int, beta: float) -> None:
    """8 starts of L-BFGS on the simplex: none beats the solution (1e-9), the best one is the solution (1e-6 a mass)."""
    p = masses(outcomes, outcomes)
    top = solve(beta, n, procedure, p)[0]
    tried = [direct(p, n, beta, procedure, seed) for seed in range(8)]
    q, objective = max(tried, key=lambda one: one[1])
    assert max(value for _, value in tried) <= top.objective + 1e-9
    assert objective == pytest.approx(top.objective, abs=1e-9)
    assert np.abs(q - top.q).max() < 1e-6
    assert np.ptp(top.phi - beta * np.log(top.q / p)) < 1e-9  # stationary on the whole support


@pytest.mark.parametrize("procedure", ["best", "worst"])
def test_solutions_are_stationary_at_every_beta(procedure: str) -> None:
    """Phi - beta log(q / p) is constant to rounding, in beta's own units, also where substitution does not settle."""
    p = uniform(1024)
    for n in (2, 4, 8):
        for beta in (1.0, 0.1, 0.02):
            for one in solve(beta, n, procedure, p):
                some = one.q > 1e-250  # log of less is rounding alone
                assert np.ptp((one.phi - beta * np.log(one.q / p))[some]) < 1e-9


def test_damped_substitution_falls_into_a_cycle_where_the_recursion_does_not() -> None:
    """Why `solve` shoots: at n = 4, beta = 0.1 half steps end in a cycle of two that is worse and no fixed point."""
    p, beta, q = uniform(512), 0.1, uniform(512)
    for _ in range(2000):
        q = (q + tilt(p, gradient(q, p, 4), beta)) / 2
    stuck = np.abs(tilt(p, gradient(q, p, 4), beta) - q).max() * 512
    (top,) = solve(beta, 4, "best", p)
    assert stuck > 1
    assert np.abs(tilt(p, gradient(top.q, p, 4), beta) - top.q).max() * 512 < 1e-6
    assert top.objective > win_rate(q, p, 4) - beta * kl(q, p) + 0.005


def test_best_of_n_has_one_solution_and_reaches_every_kl() -> None:
    """W is concave in q (F^n is convex), so the KL moves with beta without a jump: 1.0 nats too."""
    kls = []
    for beta in np.geomspace(0.01, 1, 9):
        (only,) = solve(float(beta), 4, "best", uniform(512))
        kls.append(only.rates.kl)
    assert (np.diff(kls) < 0).all()
    found = at_kl(Transform("fixed-point"), 1.0, uniform(512))
    assert found is not None and found[1].kl == pytest.approx(1.0, abs=1e-6)
    assert found[1].best == pytest.approx(0.9411, abs=1e-3)


def test_worst_of_n_may_have_several_solutions_and_jump() -> None:
    """Two levels, the good one rare: below beta 0.35 there are three fixed points, and the best one is far away."""
    p = np.array([0.9, 0.1])
    assert [len(solve(beta, 4, "worst", p)) for beta in (0.2, 0.3, 0.4)] == [3, 3, 1]
    for one in solve(0.2, 4, "worst", p):
        assert np.ptp(one.phi - 0.2 * np.log(one.q / p)) < 1e-12
    good = [solve(beta, 4, "worst", p)[0] for beta in (0.2, 0.3)]
    assert good[0].q[1] > 0.999 and good[1].q[1] < 0.101
    x = np.linspace(1e-6, 1 - 1e-6, 20_001)  # every policy there is, on a grid
    by_hand = [win_rate(np.array([1 - a, a]), p, 4, "worst") - 0.2 * kl(np.array([1 - a, a]), p) for a in x[::20]]
    assert max(by_hand) <= good[0].objective + 1e-12
    assert at_kl(Transform("fixed-point", "worst"), 1.0, p) is None


# ordering at equal KL


ORDER = {
    ("best", "identity", 10.0): (0.7476, 0.7168),
    ("best", "exp", 5.0): (0.8043, None),
    ("best", "exp", 10.0): (0.8164, None),
    ("best", "fixed-point", 10.0): (0.8169, 0.6599),
    ("worst", "identity", 10.0): (0.8101, 0.7168),
    ("worst", "exp", 5.0): (0.8796, None),
    ("worst", "exp", 10.0): (0.8827, None),
    ("worst", "fixed-point", 10.0): (0.8840, None),
}


def test_the_order_of_the_transforms_at_equal_kl() -> None:
    """KL 0.3, n = 4: identity < exp 5 < exp 10 < fixed point under the procedure, the other way round for one draw."""
    for procedure in ("best", "worst"):
        won, single = [], []
        for (how, kind, t), (expected, alone) in ORDER.items():
            if how == procedure:
                found = at_kl(Transform(kind, how, t=t), 0.3, uniform(1024))  # type: ignore[arg-type]
                assert found is not None and found[1].kl == pytest.approx(0.3, abs=1e-6)
                won.append(getattr(found[1], procedure))
                single.append(found[1].single)
                assert won[-1] == pytest.approx(expected, abs=2e-3)
                assert alone is None or single[-1] == pytest.approx(alone, abs=2e-3)
        assert won == sorted(won) and single[0] == max(single)
        assert single[:3] == sorted(single[:3], reverse=True)
        assert won[-1] - won[0] > 0.06


def test_no_transform_beats_the_fixed_point_at_its_kl() -> None:
    p = uniform(512)
    for procedure in ("best", "worst"):
        for beta in (0.5, 0.15):
            top = solve(beta, 4, procedure, p)[0]
            reached = getattr(top.rates, procedure)
            for kind, t in (("identity", 1.0), ("exp", 5.0), ("exp", 10.0), ("exp", 20.0), ("log", 1.0)):
                other = at_kl(Transform(kind, procedure, t=t), top.rates.kl, p)  # type: ignore[arg-type]
                assert other is not None and getattr(other[1], procedure) < reached


def test_a_curve_is_its_points() -> None:
    points = curve(Transform("identity"), [0.5, 0.1], uniform(256))
    assert [beta for beta, _ in points] == [0.5, 0.1]
    assert points[0][1] == rates(tilt(uniform(256), mid_ranks(uniform(256)), 0.5), uniform(256), 4)


# the estimate of a best of n from a pool


def test_the_estimate_of_a_best_of_n_is_the_mean_over_all_subsets() -> None:
    rewards = np.random.default_rng(0).normal(size=7).round(1).tolist()
    brute = np.mean([max(subset) for subset in itertools.combinations(rewards, 3)])
    assert expected_max(rewards, 3) == pytest.approx(brute, abs=1e-12)
    assert expected_max([*rewards, None], 3) == pytest.approx(brute, abs=1e-12)
    assert expected_max(rewards, 1) == pytest.approx(np.mean(rewards), abs=1e-12)
    assert expected_max(rewards, 7) == max(rewards)
    assert expected_max(np.arange(1, 100_001).tolist(), 1000) == pytest.approx(1000 / 1001 * 100_001, rel=1e-12)


# bad input


def test_what_cannot_be_computed_is_refused() -> None:
    for call, said in (
        (lambda: expected_max([1.0, 2.0], 3), "best of 3 cannot be estimated from 2"),
        (lambda: expected_max([None, None], 1), "none of the draws was judged"),
        (lambda: solve(0.0, 4), "beta must be above 0"),
        (lambda: solve(0.5, 0), "n must be 1 or more"),
        (lambda: solve(0.5, 4, "middle"), "neither best nor worst"),
        (lambda: solve(0.5, 4, "best", np.array([0.5, 0.0, 0.5])), "base mass above 0"),
        (lambda: tilt(FINE, FINE, -1.0), "beta must be above 0"),
        (lambda: at_kl(Transform(), 0.0), "KL above 0"),
        (lambda: Transform("square"), "not one of identity"),  # type: ignore[arg-type]
        (lambda: Transform(t=-10.0), "t must be above 0"),
    ):
        with pytest.raises(UsageError, match=said):
            call()
    assert at_kl(Transform("identity"), 50.0, uniform(64)) is None  # more than log(64) nats there is not
