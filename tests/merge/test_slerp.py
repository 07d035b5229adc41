"""SLERP: the arc in closed form, where it is a line, on weights and on differences."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge.parents import SHAPES, changes, in_parts
from trimtab import merge
from trimtab.errors import UsageError
from trimtab.merge.method import Part, Place
from trimtab.merge.methods.slerp import Slerp, SlerpConfig


def pair(angle: float, first: float = 1.0, second: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two float64 [6, 5] tensors of these norms, with this angle between them."""
    basis = torch.linalg.qr(torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    a, b = basis.T.view(2, 6, 5)
    return first * a, second * (math.cos(angle) * a + math.sin(angle) * b)


def angle(a: Tensor, b: Tensor) -> float:
    return 2 * math.atan2(float((a / a.norm() - b / b.norm()).norm()), float((a / a.norm() + b / b.norm()).norm()))


def notes(a: Tensor, b: Tensor, **options: object) -> dict[str, float | str]:
    method = Slerp(SlerpConfig(**options))  # type: ignore[arg-type]
    part = Part(Place("tensor", tuple(a.shape), (1.0, 1.0)), 0, [a, b])
    return method.notes(method.survey(lambda: iter([part])))


@pytest.mark.parametrize("theta", [0.05, 0.7, math.pi / 2, 3.0])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.75])
def test_the_arc_keeps_the_norm_and_splits_the_angle(theta: float, t: float) -> None:
    a, b = pair(theta)
    merged = merge.slerp([a, b], t=t)
    # float64 throughout; at 0.05 the division by sin(theta) costs a factor of 20
    assert float(merged.norm()) == pytest.approx(1.0, abs=1e-12)
    assert angle(a, merged) == pytest.approx(t * theta, abs=1e-12)
    assert angle(merged, b) == pytest.approx((1 - t) * theta, abs=1e-12)


def test_unequal_norms_follow_the_formula() -> None:
    a, b = pair(1.1, 2.0, 5.0)
    expected = (math.sin(0.7 * 1.1) * a + math.sin(0.3 * 1.1) * b) / math.sin(1.1)
    torch.testing.assert_close(merge.slerp([a, b], t=0.3), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ends_are_the_models_bit_for_bit(shape: tuple[int, ...]) -> None:
    a, b = changes(shape, 2)
    assert torch.equal(merge.slerp([a, b], t=0.0), a)
    assert torch.equal(merge.slerp([a, b], t=1.0), b)


def test_it_is_a_line_above_the_threshold_on_both_sides() -> None:
    edge = math.acos(0.9995)
    for theta in (edge * 0.99, math.pi - edge * 0.99, 0.0):
        a, b = pair(theta, 1.0, 3.0)
        assert notes(a, b, t=0.25)["branch"] == "line"
        torch.testing.assert_close(merge.slerp([a, b], t=0.25), 0.75 * a + 0.25 * b, atol=1e-15, rtol=0)
    for theta in (edge * 1.01, math.pi - edge * 1.01):
        a, b = pair(theta)
        found = notes(a, b)
        assert found["branch"] == "arc" and found["cosine"] == pytest.approx(math.cos(theta), abs=1e-14)


def test_fine_tunes_of_one_base_are_mixed_on_a_line_and_their_changes_on_an_arc() -> None:
    base = changes((64, 64), 1, seed=9, size=1.0)[0]
    deltas = changes((64, 64), 2, size=0.02)
    assert notes(base + deltas[0], base + deltas[1])["branch"] == "line"
    assert notes(*deltas)["branch"] == "arc"
    # right angles and equal norms: 1 / sqrt(2) of each. The angle of 4096 random numbers is off by some 1/64.
    merged = merge.slerp(deltas)
    assert float(merged.norm() / deltas[0].norm()) == pytest.approx(1.0, abs=0.03)


def test_a_model_that_is_zero_has_no_angle() -> None:
    (delta,) = changes((5, 3), 1)
    torch.testing.assert_close(merge.slerp([torch.zeros(5, 3), delta], t=0.5), 0.5 * delta, atol=1e-8, rtol=0)
    assert torch.equal(merge.slerp([torch.zeros(5, 3)] * 2), torch.zeros(5, 3))


def test_the_weights_say_how_far_where_t_is_not_given() -> None:
    a, b = pair(1.0)
    assert torch.equal(merge.slerp([a, b], [3.0, 1.0]), merge.slerp([a, b], t=0.25))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_parts_change_nothing(shape: tuple[int, ...], rows: int) -> None:
    tensors = changes(shape, 2)
    whole = merge.slerp(tensors, t=0.3)
    # the float64 sums are added in another order: the coefficients move by 1e-16, an entry by its last float32 bit
    torch.testing.assert_close(in_parts(Slerp(SlerpConfig(t=0.3)), tensors, rows), whole, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("weights", "options", "models", "message"),
    [
        ([1, 1], {"t": 1.5}, 2, "t must be between 0 and 1"),
        ([1, 2], {"t": 0.5}, 2, "leave one of them out"),
        ([-1, 2], {}, 2, "no shares"),
        ([1, -1], {}, 2, "no shares"),
        ([1, 1, 1], {}, 3, "karcher"),
        ([1], {}, 1, "at least 2 models"),
    ],
)
def test_what_it_refuses(weights: list[float], options: dict[str, float], models: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge.slerp(changes((3, 2), models), weights, **options)


def folder(path: Path, tensors: dict[str, Tensor]) -> str:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "none", "num_hidden_layers": 1}))
    return str(path)


def test_on_deltas_it_needs_a_base_and_adds_it(tmp_path: Path) -> None:
    base, *deltas = changes((8, 4))
    paths = [folder(tmp_path / f"{i}", {"w": base + delta}) for i, delta in enumerate(deltas)]
    recipe = merge.Recipe("slerp", tuple(paths), options={"on": "deltas"})
    with pytest.raises(UsageError, match="give --base"):
        merge.run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    recipe = merge.Recipe("slerp", tuple(paths), folder(tmp_path / "b", {"w": base}), options={"on": "deltas"})
    merge.run(recipe, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["w"]
    torch.testing.assert_close(merged, base + merge.slerp(deltas), atol=1e-7, rtol=0)
    merge.run(merge.Recipe("slerp", tuple(paths), str(tmp_path / "b")), tmp_path / "weights")  # a base is of no matter
    merged = load_file(tmp_path / "weights" / "model.safetensors")["w"]
    torch.testing.assert_close(merged, merge.slerp([base + delta for delta in deltas]), atol=1e-7, rtol=0)
