"""Activation matching: identical nets, whitened inputs, planted permutations, heads, and what it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import tiny_model
from trimtab.errors import UsageError
from trimtab.merge.align.activations import activation_cost, activation_match, collect, sites, standardised
from trimtab.merge.align.module_specs import module_spec
from trimtab.merge.align.permutation import Spec, apply, is_identity, units
from trimtab.merge.align.specs import model_spec


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)
        )


def data(rows: int = 200) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(9))


def loaded(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict(tensors)
    return model


def test_identical_networks_stay_as_they_are() -> None:
    model, inputs = net(0), data()
    spec = module_spec(model, inputs[:4])
    for correlation in (False, True):
        assert is_identity(activation_match(spec, model, net(0), [inputs], correlation=correlation).permutations)


@pytest.mark.parametrize("where", ["input", "output"])
def test_a_planted_permutation_comes_back(where: Any) -> None:
    model, inputs = net(0), data()
    spec = module_spec(model, inputs[:4])
    tensors = dict(model.state_dict())
    moved = apply(spec, spec.random(torch.Generator().manual_seed(1)), tensors)
    found = activation_match(spec, model, loaded(net(0), moved), inputs.split(64), where=where, correlation=True)
    back = apply(spec, found.permutations, moved)
    assert all(torch.equal(back[name], value) for name, value in tensors.items())


def test_on_whitened_inputs_the_cost_is_the_weights_own() -> None:
    """X^T X = N I: a first layer's values before the activation give N times the incoming half of weight matching's cost."""
    a, b = net(0).double(), net(1).double()
    for model in (a, b):
        model[0].bias.data.zero_()
    q, _ = torch.linalg.qr(data(64).double())
    white = q * 64**0.5
    assert torch.allclose(white.T @ white, 64 * torch.eye(8, dtype=torch.float64), atol=1e-12)
    shown = sites(module_spec(a, white[:4]), a, "output")
    group = shown.groups[0]
    with torch.no_grad():  # in float64: `collect` keeps float32, whose rounding is all that would be seen
        values = [{"0": model[0](white), "3": model[3](torch.relu(model[0](white)))} for model in (a, b)]
    found = activation_cost(shown, group.name, *values)
    place = next(one for one in module_spec(a, white[:4]).groups[0].places if one.tensor == "0.weight")
    wanted = 64 * units(a[0].weight, place, 16) @ units(b[0].weight, place, 16).T
    assert torch.allclose(found, wanted, atol=1e-8 * float(wanted.abs().max()), rtol=0)
    in_float32 = [collect(model, ["0"], [white], where="output") for model in (a, b)]
    assert torch.allclose(activation_cost(Spec((group,)), group.name, *in_float32), wanted, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_heads_of_language_models_come_back(arch: str) -> None:
    model = tiny_model(arch)
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    spec = model_spec(model.config.to_dict(), {name: tuple(v.shape) for name, v in tensors.items()}, query_key=False)
    moved = apply(spec, spec.random(torch.Generator().manual_seed(3)), tensors)
    other = tiny_model(arch)
    other.load_state_dict(moved, strict=False)
    ids = torch.randint(4, 59, (8, 32), generator=torch.Generator().manual_seed(0))
    found = activation_match(spec, model, other, [ids])
    back = apply(spec, found.permutations, moved)
    assert all(torch.equal(back[name], value) for name, value in tensors.items())
    residual = sites(
        model_spec(model.config.to_dict(), {name: tuple(v.shape) for name, v in tensors.items()}, True), model
    )
    assert len(residual.groups[-1].places) >= 4  # it sums over all readers


def test_values_are_read_in_evaluation_mode_by_position() -> None:
    model = net(0).train()
    found = collect(model, ["3"], [data(10), data(10)], rows=12)
    assert found["3"].shape == (12, 16) and found["3"].dtype == torch.float32
    assert torch.equal(found["3"][:6], found["3"][6:])  # dropout is off: twice the same
    assert model.training and not model[3]._forward_hooks
    conv = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3))
    assert collect(conv, ["2"], [torch.ones(2, 2, 8, 8)])["2"].shape == (2 * 6 * 6, 3)


def test_hooks_are_gone_after_an_error() -> None:
    model = net(0)
    with pytest.raises(RuntimeError):
        collect(model, ["3"], [torch.ones(2, 5)])
    assert not model[3]._forward_hooks
    with pytest.raises(UsageError, match="no batch was given"):
        collect(model, ["3"], [])


def test_correlation_is_blind_to_scale_and_shift() -> None:
    values = data().double()
    same = standardised(values * 3 + 7)
    assert torch.allclose(same, standardised(values)) and torch.allclose(same.square().sum(0), torch.ones(8).double())
    assert standardised(torch.ones(5, 2)).abs().max() == 0  # a dead unit


def test_padding_is_not_compared() -> None:
    model, inputs = net(0), data(40)
    keep = torch.arange(40) % 4 != 3
    padded = torch.where(keep[:, None], inputs, 100.0)
    found = collect(model, ["0", "3"], [padded], keep=lambda batch: keep)
    wanted = collect(model, ["0", "3"], [inputs[keep]])
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)  # products in another order
    assert len(collect(model, ["0"], [padded])["0"]) == 40
