"""Brackets obey their count law and their exact odds; the simulation reproduces what designs are worth."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from trimtab.errors import UsageError
from trimtab.measure.ratings import bradley_terry, elo
from trimtab.measure.tournament import (
    LEADERBOARD,
    beats,
    bracket,
    by_law,
    draw_byes,
    draw_orders,
    matches,
    pairs_of,
    simulate,
)


@pytest.mark.parametrize("n", range(2, 34))
def test_a_bracket_has_n_minus_1_matches_one_champion_and_one_loss_for_the_rest(n: int) -> None:
    rng = np.random.default_rng(n)
    rows = 30
    found, champions = bracket(
        draw_orders(rows, n, rng), draw_byes(rows, n, rng), by_law(np.full((1, n, n), 0.5), rng, rows)
    )
    wins = found.wins(rows, n)
    assert wins.sum() == (n - 1) * rows
    losses = wins.sum(1)  # [rows, n]
    assert (losses[np.arange(rows), champions] == 0).all()
    assert (np.sort(losses, axis=1)[:, 1:] == 1).all()
    byes = (1 << (n - 1).bit_length()) - n
    assert (found.round == 0).sum() == rows * (n - byes) // 2  # byes in round 1 only: afterwards a full power of two
    assert (np.bincount(found.round)[1:] == rows * 2 ** np.arange((n - 1).bit_length() - 1)[::-1]).all()


def test_byes_are_drawn_evenly() -> None:
    """n = 5: three of four pairs have a bye; each player is spared in round 1 with probability 3/5 (4 sigma of 4000)."""
    rng = np.random.default_rng(0)
    rows = 4000
    found, _ = bracket(draw_orders(rows, 5, rng), draw_byes(rows, 5, rng), by_law(np.full((1, 5, 5), 0.5), rng, rows))
    first = found.round == 0
    played = np.bincount(np.concatenate([found.a[first], found.b[first]]), minlength=5) / rows
    assert np.abs(played - 2 / 5).max() < 4 * np.sqrt(0.24 / rows)


def test_the_champion_of_four_has_the_enumerated_probability() -> None:
    """3 pairings x 8 outcomes against 100,000 brackets, within 4 standard errors."""
    law = beats([1100, 1040, 980, 900])
    exact = np.zeros(4)
    for other in (1, 2, 3):
        rest = [i for i in (1, 2, 3) if i != other]
        for x, y in ((0, other), (other, 0)):
            for u, v in (rest, rest[::-1]):
                for winner, loser in ((x, u), (u, x)):
                    exact[winner] += law[x, y] * law[u, v] * law[winner, loser] / 3
    assert exact.sum() == pytest.approx(1)
    rng = np.random.default_rng(0)
    rows = 100_000
    _, champions = bracket(draw_orders(rows, 4, rng), draw_byes(rows, 4, rng), by_law(law[None], rng, rows))
    share = np.bincount(champions, minlength=4) / rows
    assert (np.abs(share - exact) < 4 * np.sqrt(exact * (1 - exact) / rows)).all()


def test_ratings_are_consistent() -> None:
    """20,000 brackets of 8 with a true judge: every rating within 15 points of the truth (4 standard errors)."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(1000, 1300, 8)
    wins = matches("tournament", 20_000, 8, rng, by_law(beats(truth)[None], rng, 20_000)).wins(20_000, 8).sum(0)
    assert np.abs(elo(bradley_terry(wins)) - 1000 - (truth - truth.mean())).max() < 15


def test_names_do_not_matter() -> None:
    """The same draw with the players renamed gives the same ratings, renamed."""
    rng = np.random.default_rng(3)
    n, rows, new = 7, 60, np.random.default_rng(4).permutation(7)
    orders, byes, law = draw_orders(rows, n, rng), draw_byes(rows, n, rng), beats(rng.uniform(1000, 1300, n))
    renamed = np.empty_like(law)
    renamed[np.ix_(new, new)] = law
    first = bracket(orders, byes, by_law(law[None], np.random.default_rng(5), rows))[0].wins(rows, n).sum(0)
    second = bracket(new[orders], byes, by_law(renamed[None], np.random.default_rng(5), rows))[0].wins(rows, n).sum(0)
    assert (second[np.ix_(new, new)] == first).all()
    assert bradley_terry(second)[new] == pytest.approx(bradley_terry(first), abs=1e-9)


def test_designs_have_their_number_of_matches() -> None:
    rng = np.random.default_rng(0)
    for design, a_prompt in (("random-pairs", 5), ("anchored", 5), ("round-robin", 15)):
        row, a, b = pairs_of(design, 9, 6, rng, anchor=2)  # type: ignore[arg-type]
        assert (np.bincount(row) == a_prompt).all() and (a != b).all()
        for prompt in range(9):
            met = {frozenset(pair) for pair in zip(a[row == prompt].tolist(), b[row == prompt].tolist(), strict=True)}
            assert len(met) == a_prompt
            if design == "anchored":
                assert all(2 in pair for pair in met)
            if design == "round-robin":
                assert met == {frozenset(pair) for pair in combinations(range(6), 2)}


def test_a_judge_that_guesses_gives_no_order() -> None:
    """p_J = 1/2: the mean rho of every arm is 0 within 3 standard errors."""
    for arm in simulate(8, 50, 0.5, trials=100, seed=1, round_robin=True).values():
        assert abs(arm.rho.mean()) < 3 * arm.rho.std(ddof=1) / 10, arm.name


def test_a_judge_that_errs_shrinks_gaps_and_keeps_the_order() -> None:
    """p_J = 0.7 on 20,000 prompts: no Bradley-Terry law, yet brackets and round robin rank 8 models 40 points apart."""
    truth = np.arange(1300, 980, -40.0)
    rng = np.random.default_rng(0)
    law = beats(truth, 0.7)[None]
    for design in ("tournament", "round-robin"):
        wins = matches(design, 20_000, 8, rng, by_law(law, rng, 20_000)).wins(20_000, 8).sum(0)  # type: ignore[arg-type]
        found = elo(bradley_terry(wins))
        assert (np.argsort(-found) == np.arange(8)).all(), design
        assert np.ptp(found) < 0.6 * np.ptp(truth), design


def test_direct_comparison_beats_the_best_anchor_and_ties_with_random_pairs() -> None:
    """The acceptance test at its full size: n = 20, p_J = 0.7, 500 prompts, 100 trials, equal calls.

    The bracket's rho lies above the best anchored arm's by more than 2 standard errors (paired over trials). Random pairs
    at the same budget are as good: the gain is from direct comparison and Bradley-Terry, not from the bracket.
    """
    arms = simulate(20, 500, 0.7, trials=100, seed=0)
    rho = arms["tournament"].rho
    best = max((arm for name, arm in arms.items() if name.startswith("anchor")), key=lambda arm: float(arm.rho.mean()))
    gain = rho - best.rho
    assert gain.mean() > 2 * gain.std(ddof=1) / 10
    assert abs(rho.mean() - arms["random pairs"].rho.mean()) < 0.03
    assert {arm.calls for arm in arms.values()} == {19 * 500}
    calls = arms["tournament"].calls_per_hundredth(best)
    assert calls == pytest.approx(9500 / (100 * gain.mean()))
    assert best.calls_per_hundredth(arms["tournament"]) is None


def test_a_simulation_is_reproducible_and_takes_given_ratings() -> None:
    first, again = (simulate(20, 20, 0.9, trials=5, seed=7, ratings=LEADERBOARD) for _ in range(2))
    assert all((first[name].rho == again[name].rho).all() for name in first)
    assert (
        first["tournament"].tau <= first["tournament"].rho
    ).all()  # tau-b is the smaller of the two when both are high


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="2 models"):
        simulate(1, 10, 0.7)
    with pytest.raises(UsageError, match="3 ratings are needed"):
        simulate(3, 10, 0.7, ratings=[1000.0])
    with pytest.raises(UsageError, match=r"\[0, 1\]"):
        simulate(3, 10, 1.7)
