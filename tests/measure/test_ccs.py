"""The CCS probe and the polarity figures: tables, chance, planted directions, gradients, signs, leakage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.measure.ccs import Centred, Probes, ccs_loss, contradiction, polar_consistency, score, train
from trimtab.measure.ccs_layers import Controls, Layer, best_layer
from trimtab.measure.polarity import Split, correct, folded_null, read
from trimtab.measure.stats import Interval

PAIRS, WIDTH = 200, 32


def planted(seed: int, centre: str, unit: bool = False) -> tuple[torch.Tensor, ...]:
    """x = +-v (2y - 1) + u (Yes or No) + noise with |u| = 3: v, centred x1 and x0 [1, 2N, D], labels, and the split."""
    generator = torch.Generator().manual_seed(seed)
    v, u, *_ = torch.linalg.qr(torch.randn(WIDTH, 2, generator=generator)).Q.T
    labels = torch.tensor([0, 1] * PAIRS)
    signal = (2 * labels - 1)[:, None] * v
    noise = 0.1 * torch.randn(2, 2 * PAIRS, WIDTH, generator=generator)
    yes, no = (signal + 3 * u + noise[0])[None], (-signal - 3 * u + noise[1])[None]
    split = Split.of(PAIRS, 0.2, seed)
    x1, x0 = Centred.of(yes, no, split.statements(split.train), centre, unit)(yes, no)  # type: ignore[arg-type]
    return v, x1, x0


@pytest.mark.parametrize(
    "a0,a1,n0,n1,pc,ci",
    [
        (0, 1, 1, 0, 0, 0), (0.5, 0.5, 0.5, 0.5, 0, 0.5), (0, 1, 0, 1, 0, 1), (0.1, 0.9, 0.6, 0.3, 0.065, 0.33),
        (0.2, 0.9, 0.1, 0.4, -0.34, 0.38),
    ],
)  # fmt: skip
def test_pc_and_ci_of_the_table(a0: float, a1: float, n0: float, n1: float, pc: float, ci: float) -> None:
    sides = [torch.tensor(x, dtype=torch.float64) for x in (a1, a0, n1, n0)]
    assert float(polar_consistency(*sides)) == pytest.approx(pc, abs=1e-12)
    assert float(contradiction(*sides)) == pytest.approx(ci, abs=1e-12)


def test_chance_of_independent_uniform_probabilities() -> None:
    sides = torch.rand(4, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pc = polar_consistency(*sides)  # 3e-3: over six standard errors of 200,000 draws
    assert float(pc.abs().mean()) == pytest.approx(1 / 6, abs=3e-3)
    assert float(pc.mean()) == pytest.approx(-1 / 18, abs=3e-3)
    assert float(contradiction(*sides).mean()) == pytest.approx(1 / 2, abs=3e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_planted_direction_is_found(seed: int) -> None:
    v, x1, x0 = planted(seed, "median")
    split = Split.of(PAIRS, 0.2, seed)
    rows = split.statements(split.train)
    probe = train(x1[:, rows], x0[:, rows], steps=1000, seed=seed)
    found = read(probe(x1)[0], probe(x0)[0], split, 99, 0)
    assert (found.esa.mean or 0) >= 0.98 and found.columns["polar accuracy"].mean() >= 0.98
    assert abs(float(torch.cosine_similarity(probe.weight[0], v, dim=0))) > 0.85
    assert found.columns["CI"].mean() < 0.05 and found.columns["|PC|"].mean() < 0.01
    assert not found.refused


def test_without_centring_the_probe_finds_yes_and_no_at_a_lower_loss() -> None:
    """The loss cannot tell that it failed, so the guard has to: ESA 0.50, CI 0.99, |PC| 0.98."""
    split, losses = Split.of(PAIRS, 0.2, 0), {}
    rows = split.statements(split.train)
    for centre in ("median", "none"):
        _, x1, x0 = planted(0, centre)
        probe = train(x1[:, rows], x0[:, rows], steps=1000, seed=0)
        losses[centre] = float(probe.loss[0])
        found = read(probe(x1)[0], probe(x0)[0], split, 99, 0)
    assert found.esa.mean == pytest.approx(0.5, abs=0.02)
    assert found.columns["CI"].mean() > 0.95 and found.columns["|PC|"].mean() > 0.9
    assert losses["none"] < losses["median"] / 2
    assert "not above chance" in found.refused


def test_loss_of_a_perfect_and_of_a_constant_probe_and_its_gradient() -> None:
    y = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    assert float(ccs_loss(y, 1 - y)) == 0
    half = torch.full((3,), 0.5, dtype=torch.float64)
    assert float(ccs_loss(half, half)) == 0.25
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    w = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return ccs_loss((x[0] @ weight).sigmoid(), (x[1] @ weight).sigmoid())

    assert torch.autograd.gradcheck(loss, (w,), eps=1e-6, atol=1e-5)


def test_all_layers_and_tries_at_once_are_each_alone() -> None:
    """AdamW moves every weight by its own gradient: a probe in a batch is the probe alone, to float rounding."""
    generator = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, 3, 40, 8, generator=generator)
    together = train(x1, x0, tries=1, steps=30, seed=5)
    draws = torch.Generator().manual_seed(5)
    weight = (torch.rand(3, 1, 8, generator=draws) * 2 - 1) * 8**-0.5
    bias = (torch.rand(3, 1, generator=draws) * 2 - 1) * 8**-0.5
    for k in range(3):
        w, b = weight[k, 0].clone().requires_grad_(True), bias[k, 0].clone().requires_grad_(True)
        optimiser = torch.optim.AdamW([w, b], lr=0.015, weight_decay=0.01)
        for _ in range(30):
            optimiser.zero_grad()
            ccs_loss((x1[k] @ w + b).sigmoid(), (x0[k] @ w + b).sigmoid()).backward()
            optimiser.step()
        assert torch.allclose(together.weight[k], w, atol=1e-4)
        assert torch.allclose(together(x1)[k], (x1[k] @ w + b).sigmoid(), atol=1e-4)


def test_the_try_with_the_lowest_loss_is_kept() -> None:
    _, x1, x0 = planted(0, "median")
    many, one = (train(x1, x0, tries=tries, steps=40, seed=0) for tries in (8, 1))
    p1, p0 = many(x1), many(x0)
    assert torch.allclose(ccs_loss(p1, p0), many.loss, atol=1e-6) and float(many.loss[0]) <= float(one.loss[0])


def test_labels_in_the_loss_turn_the_probe_to_them() -> None:
    generator = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, 1, 200, 8, generator=generator)
    labels = (x1[0, :, 0] > x0[0, :, 0]).float()
    accuracy = []
    for supervision in (0.0, 5.0):
        probe = train(x1, x0, steps=200, labels=labels, supervision=supervision)
        accuracy.append(float(((score(probe(x1), probe(x0))[0] > 0.5) == labels.bool()).float().mean()))
    assert accuracy[1] > 0.9 and max(accuracy[0], 1 - accuracy[0]) < 0.9


def test_centres_are_those_of_training_and_of_each_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    yes, no = torch.randn(2, 2, 50, 4, generator=generator) + torch.tensor([3.0, -3.0])[:, None, None, None]
    rows = torch.arange(40)
    for how, middle in (("median", lambda x: x.median(1).values), ("mean", lambda x: x.mean(1))):
        for unit in (True, False):
            centred = Centred.of(yes, no, rows, how, unit)  # type: ignore[arg-type]
            for x in centred(yes, no):
                assert middle(x[:, rows]).abs().max() < 1e-6  # type: ignore[no-untyped-call]
                assert middle(x).abs().max() > 1e-4  # type: ignore[no-untyped-call]


def pretend(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Split]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 1] * PAIRS)
    p1 = ((labels * 2 - 1) * 0.2 + 0.5 + 0.25 * torch.randn(2 * PAIRS, generator=generator)).clamp(0.01, 0.99)
    return p1, 1 - p1 + 0.01, Split.of(PAIRS, 0.3, seed)


def exchanged(p: torch.Tensor) -> torch.Tensor:
    """The same statements with the two roles of every pair exchanged."""
    return p.reshape(-1, 2).flip(1).reshape(-1)


def test_negating_labels_and_turning_the_probe_around() -> None:
    p1, p0, split = pretend()
    plain = read(p1, p0, split, 99, 0)
    negated = read(exchanged(p1), exchanged(p0), split, 99, 0)
    for name in ("ESA", "PC", "CI", "polar accuracy"):
        assert negated.columns[name] == pytest.approx(plain.columns[name], abs=1e-12), name
    assert negated.p_value == plain.p_value and negated.esa == plain.esa
    turned = read(1 - p1, 1 - p0, split, 99, 0)
    for name in ("ESA", "PC", "polar accuracy", "decisiveness"):
        assert turned.columns[name] == pytest.approx(plain.columns[name], abs=1e-6), name
    assert turned.columns["CI"].mean() == pytest.approx(plain.columns["CI"].mean(), abs=0.02)  # p1 + p0 - 1 = 0.01


@pytest.mark.parametrize(
    "p1,p0,why",
    [(0.5, 0.5, "chance"), (1.0, 0.0, "chance"), (0.52, 0.48, "chance")],
)
def test_probes_that_say_the_same_of_everything_are_not_ranked(p1: float, p0: float, why: str) -> None:
    split = Split.of(50, 0.4, 0)
    found = read(torch.full((100,), p1), torch.full((100,), p0), split, 99, 0)
    assert found.columns["|PC|"].mean() == 0 or p1 == 1.0
    assert why in found.refused


def test_the_layer_is_chosen_on_the_training_pairs() -> None:
    """One layer parts the training pairs and guesses on the test pairs, the other the other way round."""
    split, right = Split.of(50, 0.4, 0), 0.5 + 0.4 * (torch.tensor([0, 1] * 50) * 2 - 1.0)
    guess = 0.5 + 0.4 * (torch.tensor([0, 1, 1, 0] * 25) * 2 - 1.0)
    layers = []
    for known in (split.test, split.train):
        p1 = guess.clone()
        p1[split.statements(known)] = right[split.statements(known)]
        reading = read(p1, 1 - p1, split, 99, 0)
        layers.append(Layer(reading, Controls(Interval(None, None, None), Interval(None, None, None), None), reading))
    assert layers[0].reading.esa.mean > layers[1].reading.esa.mean  # type: ignore[operator]
    assert best_layer(layers) == 1


def test_a_probe_that_hardly_decides_is_not_ranked() -> None:
    p1 = 0.5 + 0.05 * (torch.tensor([0, 1] * 50) * 2 - 1.0)
    found = read(p1, 1 - p1, Split.of(50, 0.4, 0), 99, 0)
    assert found.esa.mean == 1 and found.esa.low is not None and "decisiveness 0.10" in found.refused
    assert found.p_value == 0.01  # of 99 permutations none: never 0


def test_probes_at_chance_are_let_through_at_most_at_the_nominal_rate() -> None:
    """300 probes that answer at random, each on 20 test pairs: at most 2.5 % (one side of 95 %) + 2 standard errors."""
    split, passed = Split.of(50, 0.4, 0), 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        p1, p0 = torch.rand(2, 100, generator=generator)
        passed += not read(p1, p0, split, 99, 0).refused
    assert passed <= 300 * 0.025 + 2 * np.sqrt(300 * 0.025 * 0.975)


def test_folded_accuracy_exceeds_a_half_by_chance() -> None:
    """About 0.525 for 250 statements judged independently: E max(acc, 1 - acc) = 1/2 + sqrt(1 / (2 pi n))."""
    right = (np.random.default_rng(0).random((125, 2)) < 0.5).mean(1)
    found = folded_null(right, 4000, 0)
    spread = np.abs(right - 0.5).mean() * 2  # the share of pairs that a swap moves
    expected = 0.5 + np.sqrt(spread / 125 / (2 * np.pi))
    assert found.mean() == pytest.approx(expected, abs=2e-3) and 0.51 < found.mean() < 0.535
    assert 0.5 + np.sqrt(1 / (2 * np.pi * 250)) == pytest.approx(0.525, abs=5e-4)


def test_pairs_stay_whole() -> None:
    split = Split.of(50, 0.2, 3)
    assert len(split.test) == 10 and len(split.train) == 40 and not set(split.train) & set(split.test)
    train_rows, test_rows = (set(split.statements(part).tolist()) for part in (split.train, split.test))
    assert train_rows | test_rows == set(range(100)) and {row // 2 for row in test_rows} == set(split.test.tolist())


def test_a_split_by_pair_leaks_nothing_where_one_by_statement_does() -> None:
    """40 data sets without any signal, whose pairs hold one noise vector with opposite signs, and a probe with labels:
    by statement it knows the opposites of what it was trained on, by pair it is at chance (2 standard errors)."""
    pairs, width = 40, 200
    own = torch.randn(40, pairs, 1, width, generator=torch.Generator().manual_seed(0))
    x = torch.cat([own, -own], 2).reshape(40, -1, width)  # [data sets, statements, D]
    labels = torch.tensor([0, 1] * pairs).float()
    split, order = Split.of(pairs, 0.3, 0), torch.randperm(2 * pairs, generator=torch.Generator().manual_seed(1))
    whole = split.statements(split.train), split.statements(split.test)
    accuracy = []
    for rows, test in (whole, (order[: len(whole[0])], order[len(whole[0]) :])):
        probe = train(x[:, rows], -x[:, rows], steps=60, lr=0.05, tries=1, labels=labels[rows], supervision=5.0)
        q = score(probe(x), probe(-x))[:, test]
        accuracy.append(((q > 0.5) == labels[test].bool()).double().mean(1))
    by_pair, by_statement = accuracy
    assert abs(float(by_pair.mean()) - 0.5) < 2 * float(by_pair.std()) / 40**0.5
    assert float(by_statement.mean()) > 0.7


def test_correct_counts_both_statements_of_a_pair() -> None:
    q = np.array([0.1, 0.9, 0.9, 0.1, 0.9, 0.9, 0.5, 0.5])
    assert correct(q, np.arange(4), 1).tolist() == [1.0, 0.0, 0.5, 0.5]
    assert correct(q, np.arange(4), -1).tolist() == [0.0, 1.0, 0.5, 0.5]


def test_probes_are_plain_logistic_functions() -> None:
    probe = Probes(torch.tensor([[1.0, 0.0]]), torch.tensor([0.5]), torch.zeros(1))
    assert float(probe(torch.tensor([[[2.0, 9.0]]]))[0, 0]) == pytest.approx(1 / (1 + np.exp(-2.5)), abs=1e-6)
