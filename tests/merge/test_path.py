"""The path between two models: barriers of nothing, of a permutation, of a parabola; batch norms and REPAIR."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.merge.align.matching import match
from trimtab.merge.align.module_specs import module_spec
from trimtab.merge.align.path import Path, has_batch_norm, interpolate, reestimate, repair, walk
from trimtab.merge.align.permutation import apply


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small classifier that has learned its data."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
        inputs = torch.randn(256, 6)
        targets = (inputs @ torch.randn(6, 3)).argmax(1)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(150):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model, inputs, targets


def test_a_model_has_no_barrier_with_itself_a_shuffled_one_has_and_matching_removes_it() -> None:
    model, inputs, targets = trained()
    a = {name: value.detach().double() for name, value in model.named_parameters()}
    wide = copy.deepcopy(model).double()

    def evaluate(tensors: dict[str, Tensor]) -> dict[str, float]:
        with torch.no_grad():
            logits = torch.func.functional_call(wide, tensors, (inputs.double(),))
        return {
            "loss": float(nn.functional.cross_entropy(logits, targets)),
            "error": float((logits.argmax(1) != targets).double().mean()),
        }

    assert walk(a, a, evaluate).barrier() == pytest.approx(0.0, abs=1e-12)
    spec = module_spec(model, inputs[:4])
    shuffled = apply(spec, spec.random(torch.Generator().manual_seed(1)), a)
    before = walk(a, shuffled, evaluate)
    assert before.barrier() > 0.1 and before.barrier("error") > 0.05
    assert before.values["loss"][-1] == pytest.approx(before.values["loss"][0], abs=1e-12)
    after = walk(a, apply(spec, match(spec, a, shuffled).permutations, shuffled), evaluate)
    assert after.barrier() == pytest.approx(0.0, abs=1e-12)
    assert len(after.lambdas) == 25 and after.middle() == after.values["loss"][12]


def test_the_barrier_of_a_parabola_is_its_height() -> None:
    """L(t) = 1 - t^2 from -1 to 1 and 2 l more: the line between the ends is taken away."""
    a, b = {"t": torch.tensor([-1.0])}, {"t": torch.tensor([1.0])}

    def tilted(tensors: dict[str, Tensor]) -> dict[str, float]:
        t = float(tensors["t"])
        return {"loss": 1 - t * t + (t + 1)}

    assert walk(a, b, tilted, 5).barrier() == pytest.approx(1.0)
    assert walk(a, b, lambda tensors: {"loss": float(tensors["t"]) ** 2}, 5).barrier() == 0.0  # a valley is no barrier
    with pytest.raises(UsageError, match="at least 3 points, not 2"):
        walk(a, b, tilted, 2)
    assert Path([0.0, 0.5, 1.0], {"loss": [1.0, 4.0, 3.0]}).excess() == [0.0, 2.0, 0.0]


def test_interpolation_keeps_types_and_whole_numbers() -> None:
    a = {"w": torch.zeros(2, dtype=torch.bfloat16), "n": torch.tensor([3])}
    b = {"w": torch.full((2,), 4.0, dtype=torch.bfloat16), "n": torch.tensor([9])}
    found = interpolate(a, b, 0.25)
    assert found["w"].dtype == torch.bfloat16 and found["w"].tolist() == [1.0, 1.0] and found["n"].tolist() == [3]


def normed() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def test_batch_norms_are_estimated_again_and_dropout_stays_off() -> None:
    model, inputs = normed().eval(), torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    assert has_batch_norm(model) and not has_batch_norm(nn.Linear(2, 2))
    model[1].running_mean += 100.0
    reestimate(model, inputs.split(32))
    hidden = model[0](inputs)
    assert torch.allclose(model[1].running_mean, hidden.mean(0), atol=1e-6)
    assert torch.allclose(model[1].running_var, (hidden[:32].var(0) + hidden[32:].var(0)) / 2, atol=1e-6)
    assert model[1].momentum == 0.1 and not model[1].training
    assert torch.equal(model(inputs), model(inputs))
    with pytest.raises(UsageError, match="no batch was given"):
        reestimate(model, [])


def test_without_new_statistics_the_middle_of_two_equal_functions_is_wrong() -> None:
    """The mandatory step: B is A with units shuffled, its mean with A after matching is A; statistics left over are not."""
    model, inputs = normed().eval(), torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    reestimate(model, [inputs])
    wanted = model(inputs)
    middle = copy.deepcopy(model)
    for name in ("weight", "bias"):  # the same function, another scale before the norm
        getattr(middle[0], name).data *= 0.5
    assert not torch.allclose(middle(inputs), wanted, atol=0.05)
    reestimate(middle, [inputs])
    assert torch.allclose(middle(inputs), wanted, atol=1e-3)  # the norm's epsilon against a smaller variance


def test_repair_gives_every_unit_the_interpolated_mean_and_deviation() -> None:
    (a, inputs, _), generator = trained(), torch.Generator().manual_seed(2)
    spec = module_spec(a, inputs[:4])
    b = copy.deepcopy(a)
    b.load_state_dict(apply(spec, spec.random(generator), dict(a.state_dict())))
    middle = copy.deepcopy(a)
    middle.load_state_dict(interpolate(dict(a.state_dict()), dict(b.state_dict()), 0.25))

    def moments(model: nn.Module, upto: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            out = model[:upto](inputs)
        return out.mean(0), out.std(0, correction=0)

    collapsed = moments(middle, 1)[1] / (0.75 * moments(a, 1)[1] + 0.25 * moments(b, 1)[1])
    assert float(collapsed.mean()) < 0.9  # averaging unlike units loses variance: what REPAIR is for
    repair(middle, [a, b], 0.25, ["0", "2"], inputs)
    for upto in (1, 3):
        for found, one, two in zip(moments(middle, upto), moments(a, upto), moments(b, upto), strict=True):
            assert torch.allclose(found, 0.75 * one + 0.25 * two, atol=1e-4)
    assert not middle[0]._forward_hooks
    with pytest.raises(UsageError, match="'1' is no layer with a bias"):
        repair(middle, [a, b], 0.5, ["1"], inputs)


def test_repair_of_a_model_with_itself_changes_nothing() -> None:
    a, inputs, _ = trained()
    same = copy.deepcopy(a)
    repair(same, [a, a], 0.5, ["0", "2"], inputs)
    assert torch.allclose(same(inputs), a(inputs), atol=1e-4)


def test_a_loss_that_is_not_finite_is_no_flat_path() -> None:
    """`max` passes over NaN: the barrier would be that of the other points."""

    def loss(tensors: dict[str, Tensor]) -> dict[str, float]:
        at = float(tensors["w"])
        return {"loss": float("nan") if 0.4 < at < 0.6 else 1.0}

    with pytest.raises(UsageError, match=r"the loss at 0\.5 of the path is nan"):
        walk({"w": torch.zeros(())}, {"w": torch.ones(())}, loss, 5)
