"""Permutations of units: the conventions, and the verifier that a spec must pass."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.merge.align.permutation import (
    Group,
    Place,
    Spec,
    apply,
    check_function,
    inverse,
    is_identity,
    permute,
    units,
    verify,
)

HIDDEN = Spec((Group("hidden", 3, (Place("0.weight", 0), Place("0.bias", 0), Place("2.weight", 1))),))


def net() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        return model, {name: value.detach() for name, value in model.named_parameters()}, torch.randn(5, 2).double()


def test_unit_perm_i_of_the_old_tensor_stands_at_place_i() -> None:
    tensor = torch.arange(12).view(6, 2)
    order = torch.tensor([2, 0, 1])
    assert permute(tensor, Place("t", 0, 0, 2), order).tolist() == tensor[[4, 5, 0, 1, 2, 3]].tolist()
    assert permute(tensor, Place("t", 0, 2, 1), order).tolist() == tensor[[0, 1, 4, 2, 3, 5]].tolist()
    assert permute(tensor, Place("t", 1), torch.tensor([1, 0])).tolist() == tensor[:, [1, 0]].tolist()
    back = permute(permute(tensor, Place("t", 0, 0, 2), order), Place("t", 0, 0, 2), inverse(order))
    assert torch.equal(back, tensor)


def test_units_are_rows_of_what_belongs_to_them() -> None:
    tensor = torch.arange(24).view(2, 6, 2)
    found = units(tensor, Place("t", 1, 2, 2), 2)
    assert found.dtype == torch.float64
    assert found.tolist() == [
        tensor[:, 2:4].transpose(0, 1).flatten().tolist(),
        tensor[:, 4:6].transpose(0, 1).flatten().tolist(),
    ]


def test_a_group_after_another_moves_units_within_its_blocks() -> None:
    outer = Group("heads", 2, (Place("t", 0, 0, 3),))
    inner = Group("heads.0", 3, (Place("t", 0, 0, 1),), "heads")
    moved = apply(
        Spec((outer, inner)),
        {"heads": torch.tensor([1, 0]), "heads.0": torch.tensor([2, 1, 0])},
        {"t": torch.arange(6), "other": torch.ones(1)},
    )
    assert moved["t"].tolist() == [5, 4, 3, 0, 1, 2] and moved["other"].tolist() == [1.0]
    with pytest.raises(UsageError, match="comes before 'heads'"):
        Spec((inner, outer)).check({"t": (6,)})


def test_a_right_spec_passes_and_a_wrong_one_is_named() -> None:
    model, tensors, inputs = net()

    def outputs(moved: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, moved, (inputs,))

    assert verify(HIDDEN, tensors, outputs) < 1e-14  # float64 sums in another order
    check_function(HIDDEN, tensors, outputs)
    forgetful = Group("forgets the bias", 3, (Place("0.weight", 0), Place("2.weight", 1)))
    with pytest.raises(UsageError, match="permuting 'forgets the bias' changes what the network computes"):
        check_function(Spec((forgetful,)), tensors, outputs)


def test_verify_does_not_draw_the_identity() -> None:
    assert not is_identity(HIDDEN.random(torch.Generator().manual_seed(0)))
    assert is_identity(HIDDEN.identity())


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (Place("missing", 0), "'missing', which the model lacks"),
        (Place("0.weight", 2), "axis 2 of '0.weight'"),
        (Place("0.weight", 0, 1), "3 units of 1 from 1"),
        (Place("0.weight", 0, 0, 2), "3 units of 2 from 0"),
        (Place("0.weight", 0, -1), "from -1"),
    ],
)
def test_places_outside_their_tensor_are_refused(place: Place, said: str) -> None:
    shapes = {name: tuple(value.shape) for name, value in net()[1].items()}
    with pytest.raises(UsageError, match=said):
        Spec((Group("g", 3, (place,)),)).check(shapes)


def test_a_doubled_name_is_refused() -> None:
    with pytest.raises(UsageError, match="two groups 'hidden'"):
        Spec(HIDDEN.groups * 2).check({name: tuple(value.shape) for name, value in net()[1].items()})


def test_specs_are_json() -> None:
    spec = Spec((*HIDDEN.groups, Group("inner", 2, (Place("0.weight", 0, 1, 1),), "hidden")))
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    short = {"groups": [{"name": "g", "size": 3, "places": [["0.weight", 0]]}]}
    assert Spec.from_dict(short) == Spec((Group("g", 3, (Place("0.weight", 0),)),))


@pytest.mark.parametrize(
    "broken", [[], {}, {"groups": [{"name": "g"}]}, {"groups": [{"name": "g", "size": 1, "places": [[]]}]}]
)
def test_a_broken_spec_says_what_one_looks_like(broken: object) -> None:
    with pytest.raises(UsageError, match='a permutation spec is {"groups"'):
        Spec.from_dict(broken)
