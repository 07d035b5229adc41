"""NuSLERP: one angle a tensor, a row or a column, against numpy; opposite and empty vectors; with a base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge.parents import SHAPES, changes, in_parts
from trimtab import merge
from trimtab.errors import UsageError
from trimtab.merge.methods.nuslerp import NuSlerp, NuSlerpConfig

MODES = [{"flatten": True}, {"flatten": False}, {"flatten": False, "row_wise": True}]


def one(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Of two vectors, float64."""
    theta = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def by_hand(tensors: list[Tensor], t: float, flatten: bool = True, row_wise: bool = False) -> Tensor:
    a, b = (tensor.double().numpy() for tensor in tensors)
    if flatten or a.ndim < 2:
        return torch.from_numpy(one(a.ravel(), b.ravel(), t).reshape(a.shape))
    axis = 0 if row_wise else -1
    rows = [np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]) for x in (a, b)]
    merged = np.stack([one(x, y, t) for x, y in zip(*rows, strict=True)])
    return torch.from_numpy(np.moveaxis(merged.reshape(np.moveaxis(a, axis, -1).shape), -1, axis).copy())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(7,), (5, 3), (64, 33), (4, 3, 5)])
def test_every_mode_is_the_formula_of_its_vectors(shape: tuple[int, ...], mode: dict[str, bool]) -> None:
    tensors = changes(shape, 2, size=1.0)
    merged = merge.nuslerp(tensors, [0.2, 0.6], **mode)
    # float32 in and out: a few units in the last place of numbers up to 4, times coefficients up to 2 or so
    torch.testing.assert_close(merged.double(), by_hand(tensors, 0.75, **mode), atol=3e-6, rtol=0)


def test_columns_are_the_rows_of_the_transpose() -> None:
    tensors = changes((9, 14), 2)
    columns = merge.nuslerp(tensors, flatten=False, row_wise=True)
    rows = merge.nuslerp([tensor.T.contiguous() for tensor in tensors], flatten=False)
    torch.testing.assert_close(columns, rows.T, atol=1e-7, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_parts_change_nothing(shape: tuple[int, ...], rows: int, mode: dict[str, bool]) -> None:
    tensors = changes(shape, 2)
    method = NuSlerp(NuSlerpConfig(**mode))
    torch.testing.assert_close(in_parts(method, tensors, rows), method.merged(tensors), atol=1e-7, rtol=0)


def test_a_smaller_angle_than_slerp_turns_is_still_an_arc() -> None:
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([1.0, 1e-3], dtype=torch.float64)
    merged = merge.nuslerp([a, b / b.norm()])
    assert float(merged.norm()) == pytest.approx(1.0, abs=1e-15)  # a line would be short by 1e-3^2 / 8
    assert float(merge.slerp([a, b / b.norm()]).norm()) == pytest.approx(1 - 1.25e-7, abs=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_opposite_and_empty_vectors_are_mixed_on_a_line(mode: dict[str, bool]) -> None:
    (a,) = changes((6, 4), 1)
    off = 0.01 * torch.eye(6, 4) * a
    for other in (-a, -3 * a, -3 * a + off, a, torch.zeros_like(a)):
        merged = merge.nuslerp([a, other], [0.7, 0.3], **mode)
        torch.testing.assert_close(merged, 0.7 * a + 0.3 * other, atol=1e-7, rtol=0)


def test_one_frozen_row_leaves_the_others_alone() -> None:
    a, b = changes((6, 4), 2)
    b[2] = 0
    merged = merge.nuslerp([a, b], flatten=False)
    torch.testing.assert_close(merged[2], 0.5 * a[2], atol=1e-8, rtol=0)
    kept = [0, 1, 3, 4, 5]
    torch.testing.assert_close(merged[kept].double(), by_hand([a[kept], b[kept]], 0.5, False), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([1, 1], {"row_wise": True}, "--flatten false"),
        ([1, -1], {}, "no shares"),
        ([1, 1, 1], {}, "karcher"),
    ],
)
def test_what_it_refuses(weights: list[float], options: dict[str, bool], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge.nuslerp(changes((3, 2), len(weights)), weights, **options)


def test_with_a_base_it_turns_the_differences_and_without_one_the_weights(tmp_path: Path) -> None:
    base, *deltas = changes((8, 4))
    paths = []
    for name, tensor in (("base", base), ("a", base + deltas[0]), ("b", base + deltas[1])):
        (tmp_path / name).mkdir()
        save_file({"w": tensor}, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "none"}))
        paths.append(str(tmp_path / name))
    for out, given in (("with", paths[0]), ("without", None)):
        merge.run(merge.Recipe("nuslerp", tuple(paths[1:]), given, [0.3, 0.7]), tmp_path / out)
    merged = load_file(tmp_path / "with" / "model.safetensors")["w"]
    torch.testing.assert_close(merged, base + merge.nuslerp(deltas, [0.3, 0.7]), atol=1e-7, rtol=0)
    merged = load_file(tmp_path / "without" / "model.safetensors")["w"]
    torch.testing.assert_close(merged, merge.nuslerp([base + d for d in deltas], [0.3, 0.7]), atol=1e-7, rtol=0)
