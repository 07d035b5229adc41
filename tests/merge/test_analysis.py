"""The analysis of a matching: singular values stay, the distance identity, R, and curvature against explicit Hessians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trimtab.merge.align.analysis import (
    Directions,
    alignment,
    distance_by_directions,
    expand,
    input_alignment,
    l2_reduction,
    matrices,
    overlaps,
    taylor,
    weighted_alignment,
)
from trimtab.merge.align.permutation import Group, Place, Spec, apply

SPEC = Spec((Group("rows", 5, (Place("w", 0),)), Group("columns", 3, (Place("w", 1, 1, 2),))))


def matrix(seed: int, rows: int = 5, columns: int = 7) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_permutations_change_directions_and_no_singular_value() -> None:
    b = matrix(1)
    order = SPEC.random(torch.Generator().manual_seed(0))
    moved = apply(SPEC, order, {"w": b})["w"]
    assert not torch.equal(moved, b)
    direct, carried = Directions.of(moved), Directions.of(b).permuted("w", SPEC, order)
    assert torch.allclose(direct.s, Directions.of(b).s, atol=1e-10, rtol=0)
    rebuilt = carried.u @ torch.diag(carried.s) @ carried.v.T
    assert torch.allclose(rebuilt, moved, atol=1e-12)  # the vectors moved as the matrix did


def test_the_distance_is_that_of_the_directions() -> None:
    for seed, shape in enumerate([(5, 7), (7, 5), (6, 6)]):
        a, b = matrix(2 * seed, *shape), matrix(2 * seed + 1, *shape)
        found = distance_by_directions(Directions.of(a), Directions.of(b))
        assert found == pytest.approx(float((a - b).square().sum()), rel=1e-12)


def test_r_is_one_for_the_same_directions_and_never_more() -> None:
    a = matrix(0)
    same = {"w": Directions.of(a)}
    for gamma in (0.0, 0.3):
        assert alignment(same, {"w": Directions.of(3 * a)}, gamma)["total"] == pytest.approx(1.0)
        assert alignment(same, {"w": Directions.of(-a)}, gamma)["total"] == pytest.approx(-1.0)
    assert weighted_alignment(same, same)["total"] == pytest.approx(1.0)
    for seed in range(20):  # of unequal counts, too
        other = {"w": Directions.of(matrix(seed) * torch.tensor([9.0, 1, 1, 1, 1, 1, 1]).double())}
        for gamma in (0.0, 0.3, 0.9):
            assert abs(alignment(same, other, gamma)["w"]) <= 1 + 1e-12
        assert abs(weighted_alignment(same, other)["w"]) <= 1 + 1e-12


def test_r_of_unrelated_matrices_is_about_nothing() -> None:
    found = [
        alignment({"w": Directions.of(matrix(i, 40, 40))}, {"w": Directions.of(matrix(i + 99, 40, 40))})["w"]
        for i in range(20)
    ]
    assert abs(sum(found) / 20) < 0.02  # its deviation is about 1 / 40 a draw


def test_gamma_chooses_the_leading_directions_by_hand() -> None:
    u, v = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[:, [1, 0, 2]]
    a = Directions(u, torch.tensor([10.0, 5.0, 1.0]).double(), u)
    b = Directions(u, torch.tensor([10.0, 2.0, 1.0]).double(), v)
    assert (a.top(0.3), b.top(0.3), a.top(0.0)) == (2, 1, 3)
    assert overlaps(a, b, 0.3) == (0.0, 1)  # u^A_0 = u^B_0, but v^A_0 . v^B_0 = 0; and 0 for (1, 0)
    assert overlaps(a, a, 0.3) == (2.0, 2)
    # all nine: (0,0): 0, (1,1): 0, (2,2): 1; the sum is 1
    assert overlaps(a, b, 0.0) == (1.0, 3)


def test_a_layer_without_rank_has_no_directions() -> None:
    assert Directions.of(torch.outer(torch.ones(4), torch.ones(3))).top(0.0) == 1


def test_l2_reduction_by_tensor_and_in_total() -> None:
    a = {"w": torch.zeros(2, 2), "b": torch.zeros(1), "n": torch.tensor(1)}
    b = {"w": torch.full((2, 2), 3.0), "b": torch.tensor([8.0]), "n": torch.tensor(1)}
    after = {"w": torch.full((2, 2), 1.5), "b": torch.tensor([8.0]), "n": torch.tensor(1)}
    found = l2_reduction(a, b, after)
    assert found["w"].value == 0.5 and found["b"].value == 0.0
    assert (found["total"].before, found["total"].after) == (10.0, (9 + 64) ** 0.5)
    assert l2_reduction(a, a, a)["w"].value is None  # equal already: nothing to reduce
    assert set(found) == {"w", "b", "total"}


def test_input_energy_in_the_leading_directions() -> None:
    weight = Directions.of(torch.diag(torch.tensor([10.0, 5.0, 1.0])))
    assert input_alignment(torch.tensor([[3.0, 0.0, 4.0]]), weight, 0.3) == pytest.approx(9 / 25)
    assert input_alignment(torch.tensor([[3.0, 0.0, 4.0]]), weight, 0.0) == pytest.approx(1.0)


def test_matrices_leave_out_vectors_and_what_is_too_large() -> None:
    tensors = {"w": torch.ones(3, 4), "b": torch.ones(3), "conv": torch.ones(2, 2, 3, 3), "i": torch.ones(2, 2).long()}
    assert matrices(tensors) == ["w", "conv"] and matrices(tensors, 12) == ["w"]


# Curvature


def small() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        return model, torch.randn(20, 4).double(), torch.randn(20, 1).double()


def test_curvature_along_a_direction_equals_the_explicit_hessian() -> None:
    model, inputs, targets = small()
    named = {name: value.detach() for name, value in model.named_parameters()}
    sizes = [value.numel() for value in named.values()]
    assert sum(sizes) == 63

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return (torch.func.functional_call(model, tensors, (inputs,)) - targets).square().mean()

    def flat_loss(flat: Tensor) -> Tensor:
        pieces = flat.split(sizes)
        return loss({k: piece.view(v.shape) for (k, v), piece in zip(named.items(), pieces, strict=True)})

    flat = torch.cat([value.flatten() for value in named.values()])
    direction = torch.randn(63, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(flat_loss, flat)
    pieces = {k: piece.view(v.shape) for (k, v), piece in zip(named.items(), direction.split(sizes), strict=True)}
    found = expand(loss, named, pieces)
    assert found.curvature == pytest.approx(float(direction @ hessian @ direction), rel=1e-6)
    gradient = torch.autograd.functional.jacobian(flat_loss, flat)
    assert found.slope == pytest.approx(float(gradient @ direction), rel=1e-9)
    assert found.value == pytest.approx(float(loss(named)))


def test_the_prediction_is_exact_for_a_parabola_and_at_both_ends() -> None:
    a, b = {"t": torch.tensor([-1.0]).double()}, {"t": torch.tensor([2.0]).double()}

    def parabola(tensors: dict[str, Tensor]) -> Tensor:
        return (1 - tensors["t"].square()).sum()

    lambdas = [0.0, 0.25, 0.5, 1.0]
    excess, first, last = taylor(parabola, a, b, lambdas)
    wanted = [1 - (3 * at - 1) ** 2 - (1 - at) * 0 - at * (1 - 4) for at in lambdas]
    assert excess == pytest.approx(wanted, abs=1e-12)
    assert first.curvature == last.curvature == -18.0

    def quartic(tensors: dict[str, Tensor]) -> Tensor:
        return tensors["t"].square().square().sum()

    excess = taylor(quartic, a, b, lambdas)[0]
    assert (excess[0], excess[-1]) == (0.0, 0.0)
    true = [(3 * at - 1) ** 4 - (1 - at) - at * 16 for at in lambdas]
    assert abs(excess[2] - true[2]) > 1.0  # a mismatch is what tells that the ends are not near


def test_a_loss_without_curvature_has_none() -> None:
    found = expand(lambda tensors: (2 * tensors["t"]).sum(), {"t": torch.ones(2)}, {"t": torch.ones(2)})
    assert (found.slope, found.curvature) == (4.0, 0.0)
    assert [found.at(t) for t in (0.0, 1.0)] == [4.0, 8.0]
