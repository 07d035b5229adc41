"""Indices of two classes of points: identities, closed forms, invariances, chance."""

from __future__ import annotations

from itertools import product
from math import gamma, sqrt

import numpy as np
import pytest
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score

from trimtab.measure import geometry as g


def cloud(n_0: int, n_1: int, d: int = 5, mu: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat([0, 1], [n_0, n_1])
    points = np.random.default_rng(seed).normal(size=(n_0 + n_1, d))
    points[:, 0] += mu * (labels - 0.5)
    return points, labels


def indices(x: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    gram = g.gram_of(x)
    w = g.classes(labels)
    distances = g.distances_of(gram)
    found = {name: float(value[0]) for name, value in g.separation(gram, *w).items()}
    found |= {"DBS": float(g.spread_over_gap(gram, *w)[0]), "silhouette": float(g.silhouette(distances, *w)[0])}
    return found | {"Dunn": g.dunn(distances, labels), "fuzzy": g.fuzzy_xbi(x, labels)}


@pytest.mark.parametrize("n_0,n_1,product_", [(30, 30, 14.5), (20, 50, 13.877551020408163)])
def test_chi_times_xbi_is_a_constant_and_the_rest_is_scikit_learn(n_0: int, n_1: int, product_: float) -> None:
    x, labels = cloud(n_0, n_1)
    found = indices(x, labels)
    # exact identities: what is left is rounding of sums of 70 squares
    assert found["CHI"] * found["XBI"] == pytest.approx(product_, rel=1e-9)
    assert found["eta2"] == pytest.approx(found["CHI"] / (found["CHI"] + n_0 + n_1 - 2), rel=1e-9)
    assert found["CHI"] == pytest.approx(calinski_harabasz_score(x, labels), rel=1e-9)
    assert found["DBS"] == pytest.approx(davies_bouldin_score(x, labels), rel=1e-9)
    assert found["silhouette"] == pytest.approx(silhouette_score(x, labels), rel=1e-9)


def test_two_gaussians_have_the_closed_forms() -> None:
    n, d, mu = 4000, 16, 4.0
    found = indices(*cloud(n // 2, n // 2, d, mu))
    # 5 %: the sampling error of SSW is below 1 % at n d = 64,000 and that of D2 below 2 %
    assert found["XBI"] == pytest.approx(d / mu**2, rel=0.05)
    assert found["CHI"] == pytest.approx((n - 2) / 4 / (d / mu**2), rel=0.05)
    assert found["DBS"] == pytest.approx(2 * sqrt(2) * gamma((d + 1) / 2) / gamma(d / 2) / mu, rel=0.05)


def test_rotation_translation_scale_and_swapped_labels_change_nothing() -> None:
    x, labels = cloud(25, 40)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    before = indices(x, labels)
    for points, classes in ((x @ turn, labels), (x + 3.0, labels), (7 * x, labels), (x, 1 - labels)):
        assert indices(points, classes) == pytest.approx(before, rel=1e-9)


def test_dunn_by_brute_force() -> None:
    x, labels = cloud(5, 7)
    pairs = [(labels[i], labels[j], np.linalg.norm(x[i] - x[j])) for i, j in product(range(12), repeat=2)]
    gap = min(length for a, b, length in pairs if a != b)
    assert indices(x, labels)["Dunn"] == pytest.approx(gap / max(n for a, b, n in pairs if a == b), rel=1e-9)


def test_the_mean_of_eta2_over_permutations_is_one_over_n_minus_one() -> None:
    x, labels = cloud(12, 20, mu=3.0)
    found = g.separation(g.gram_of(x), *g.classes(g.permuted(labels, ["a"] * 32, 5000, 0)))["eta2"]
    assert abs(found.mean() - 1 / 31) < 3 * found.std() / sqrt(5000)  # three standard errors of 5,000 permutations


def test_permutations_and_resamples_stay_within_their_groups() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 0])
    groups = ["a", "a", "b", "b", "a", "b", "b", "a"]
    a = np.array([group == "a" for group in groups])
    shuffled = g.permuted(labels, groups, 50, 0)
    assert (shuffled[:, a].sum(1) == 1).all() and (shuffled[:, ~a].sum(1) == 3).all() and len(np.unique(shuffled)) == 2
    drawn = g.resampled(groups, 50, 0)
    assert (drawn[:, a].sum(1) == 4).all() and (drawn[:, ~a].sum(1) == 4).all() and drawn.max() > 1


def test_resampling_by_counts_is_resampling_by_rows() -> None:
    x, labels = cloud(15, 15)
    counts = g.resampled(labels.tolist(), 1, 3)
    rows = np.repeat(np.arange(30), counts[0].astype(int))
    gram, w = g.gram_of(x), g.classes(labels, counts)
    drawn = indices(x[rows], labels[rows])
    found = {**g.separation(gram, *w), "DBS": g.spread_over_gap(gram, *w)}
    found["silhouette"] = g.silhouette(g.distances_of(gram), *w)
    for name, value in found.items():
        assert float(value[0]) == pytest.approx(drawn[name], rel=1e-9), name


def test_classes_with_one_centroid_score_nothing() -> None:
    x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    found = indices(x, np.array([0, 0, 1, 1]))
    assert found["XBI"] == float("inf") and found["eta2"] == 0 and float(g.comparable(found)) == 0
    assert g.composites(found)["comparable"] == 0


def test_points_that_differ_by_rounding_are_one_point() -> None:
    same = np.tile(np.random.default_rng(0).normal(size=7).astype(np.float32), (12, 1))
    for x in (same, same * (1 + 1e-8 * np.random.default_rng(1).normal(size=(12, 7)))):
        found = indices(x, np.tile([0, 1], 6))
        assert found["eta2"] == 0 and found["XBI"] == float("inf")


def test_composites_follow_their_formulas() -> None:
    found = {"eta2": 0.2, "XBI": 1.0, "CHI": 3.0, "DBS": 1.0, "Dunn": 0.25, "silhouette": 0.5}
    expected = {"comparable": 0.35, "chi_xbi": 0.625, "dbs_dunn": 0.35, "ss_chi": 0.75, "ss_xbi": 0.625}
    assert g.composites(found, 0.5) == pytest.approx(expected, abs=1e-12)


def test_fuzzy_xbi_of_points_on_their_centroids_is_the_hard_one() -> None:
    x = np.array([[0.0], [0.0], [4.0], [4.0]])
    assert g.fuzzy_xbi(x, [0, 0, 1, 1]) == pytest.approx(0, abs=1e-12)
    spread = np.array([[-1.0], [1.0], [3.0], [5.0]])  # by hand: u = 9/10 and 1/10 (or 25/26, 1/26), D2 = 16
    inner = 0.9**2 * 1 + 0.1**2 * 9
    outer = (25 / 26) ** 2 * 1 + (1 / 26) ** 2 * 25
    assert g.fuzzy_xbi(spread, [0, 0, 1, 1]) == pytest.approx(2 * (inner + outer) / (4 * 16), rel=1e-12)
