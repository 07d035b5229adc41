"""Weights of layers: sparsemax, and finding the layer that parts the classes."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.measure import geometry as g
from trimtab.measure.layer_pooling import LayerWeights, best_mixture, learn, scatter, sparsemax


def score(x: np.ndarray, labels: np.ndarray) -> float:
    return float(g.comparable(g.separation(g.gram_of(x), *g.classes(labels)))[0])


def test_sparsemax_is_the_projection_onto_the_simplex() -> None:
    assert sparsemax([0.2, 0.3, 0.5]) == pytest.approx([0.2, 0.3, 0.5])
    assert sparsemax([3.0, 0.0, 0.0]) == pytest.approx([1.0, 0.0, 0.0])
    scores = np.random.default_rng(0).normal(size=(20, 6))
    found = sparsemax(scores)
    assert found.sum(1) == pytest.approx(np.ones(20)) and (found >= 0).all()
    for other in np.random.default_rng(1).dirichlet(np.ones(6), 200):  # no point of the simplex is nearer
        assert (((scores - found) ** 2).sum(1) <= ((scores - other) ** 2).sum(1) + 1e-12).all()


@pytest.mark.parametrize("layers,d,mu", [(6, 16, 4.0), (9, 64, 4.0), (25, 64, 3.0)])
def test_the_one_layer_that_parts_the_classes_is_found(layers: int, d: int, mu: float) -> None:
    for seed in range(3):
        generator = np.random.default_rng(seed)
        labels = generator.permutation(np.repeat([0, 1], 100))
        z = generator.normal(size=(200, layers, d)) * generator.uniform(0.1, 10, layers)[:, None]
        size = np.sqrt((z[:, layers // 2] ** 2).mean())
        z[:, layers // 2, 0] += mu * size * labels
        train, rest = np.arange(100), np.arange(100, 200)
        weights = learn(z, labels, train)
        assert weights.alpha[layers // 2] > 0.9
        assert weights.alpha.sum() == pytest.approx(1, abs=1e-12)
        best = max(score(z[rest, layer], labels[rest]) for layer in range(layers))
        assert score(weights.pool(z, rest), labels[rest]) >= best - 0.01


def test_layers_that_help_one_another_are_mixed() -> None:
    generator = np.random.default_rng(0)
    labels = np.tile([0, 1], 100)
    z = generator.normal(size=(200, 3, 16))
    z[:, :2, 0] += 2.0 * labels[:, None]  # two layers with the same gap and noises of their own
    weights = learn(z, labels, np.arange(100))
    assert weights.alpha[0] == pytest.approx(0.5, abs=0.2) and weights.alpha[2] < 0.2
    rest = np.arange(100, 200)
    assert score(weights.pool(z, rest), labels[rest]) > max(score(z[rest, k], labels[rest]) for k in (0, 1)) + 0.02


def test_scatter_gives_eta2_of_every_mixture() -> None:
    generator = np.random.default_rng(0)
    labels, z = np.tile([0, 1], 35), generator.normal(size=(70, 4, 5)) + generator.normal(size=(4, 1))
    between, within, scale = scatter(z, labels, np.arange(70))
    for alpha in generator.dirichlet(np.ones(4), 5):
        x = LayerWeights(alpha, scale).pool(z, np.arange(70))
        eta2 = float(g.separation(g.gram_of(x), *g.classes(labels))["eta2"][0])
        assert alpha @ between @ alpha / (alpha @ (between + within) @ alpha) == pytest.approx(eta2, rel=1e-9)


def test_the_best_mixture_is_that_of_a_grid() -> None:
    generator = np.random.default_rng(3)
    for _ in range(5):
        a, b = generator.normal(size=(2, 3, 3))
        between, total = a @ a.T, b @ b.T + a @ a.T
        grid = [np.array([i, j, 200 - i - j]) / 200 for i in range(201) for j in range(201 - i)]
        best = max(x @ between @ x / (x @ total @ x) for x in grid)
        found = best_mixture(between, total)
        assert found @ between @ found / (found @ total @ found) >= best - 1e-3  # the grid's own step


def test_a_layer_that_is_the_same_for_all_texts_gets_no_part() -> None:
    generator = np.random.default_rng(0)
    z, labels = generator.normal(size=(40, 3, 4)), np.tile([0, 1], 20)
    z[:, 0] = 5.0
    weights = learn(z, labels, np.arange(40))
    assert np.isinf(weights.scale[0]) and np.isfinite(weights.pool(z, np.arange(40))).all()
