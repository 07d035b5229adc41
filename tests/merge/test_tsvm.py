"""TSVM: tasks on orthogonal subspaces add up, null directions bring nothing, what gets the mean, and that it works."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge.parents import SHAPES, changes, in_parts, lower_bound, write_model
from trimtab import merge
from trimtab.merge import Recipe, run
from trimtab.merge.method import Place
from trimtab.merge.methods.tsvm import Tsvm, TsvmConfig, polar


def normal(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal((rows, columns), seed)).Q


def disjoint(rank: int, shape: tuple[int, int] = (40, 30)) -> list[Tensor]:
    """Two changes of this rank whose columns and rows span orthogonal spaces."""
    u, v = orthonormal(shape[0], 2 * rank, 1), orthonormal(shape[1], 2 * rank, 2)
    s = torch.linspace(3, 1, rank, dtype=torch.float64)
    return [(u[:, task::2] * s) @ v[:, task::2].T for task in range(2)]


def published(deltas: list[np.ndarray], trim: float = 0.0) -> np.ndarray:
    """The merge as the paper's code has it (without its zero-padding); trim: what is below it, of the largest, is dropped."""
    kept = min(deltas[0].shape) // len(deltas)
    parts = []
    for delta in deltas:
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        k = min(kept, int((s > trim * s[0]).sum()))
        parts.append((u[:, :k], s[:k], vt[:k]))
    u, s, vt = (
        np.concatenate([p[0] for p in parts], 1),
        np.concatenate([p[1] for p in parts]),
        np.concatenate([p[2] for p in parts]),
    )
    pu, _, qu = np.linalg.svd(u, full_matrices=False)
    pv, _, qv = np.linalg.svd(vt, full_matrices=False)
    return pu @ qu @ np.diag(s) @ pv @ qv


def best(delta: Tensor, rank: int) -> Tensor:
    """The nearest matrix of this rank."""
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("parents", [2, 3, 4])
@pytest.mark.parametrize("shape", [(40, 30), (30, 41), (33, 33)])
def test_of_changes_in_general_position_it_is_the_published_merge(shape: tuple[int, int], parents: int) -> None:
    deltas = [normal(shape, seed) for seed in range(parents)]
    merged = torch.from_numpy(published([delta.numpy() for delta in deltas]))
    # float64; the smallest singular value of the stacked vectors is some 1e-2, so that 1e-15 becomes 1e-12 at most
    torch.testing.assert_close(merge.tsvm(deltas), merged, atol=1e-10, rtol=0)


def test_one_change_is_itself() -> None:
    for shape in ((12, 7), (7, 12), (6, 1)):
        delta = normal(shape, 0)
        torch.testing.assert_close(merge.tsvm([delta]), delta, atol=1e-12, rtol=0)
        torch.testing.assert_close(merge.tsvm([delta.float()]), delta.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rank", [15, 7, 3])
def test_changes_on_orthogonal_subspaces_add_up(rank: int) -> None:
    """Rank 3 is the case of null singular vectors: 15 of each are kept, 12 of which are whatever the library returns."""
    one, two = disjoint(rank)
    torch.testing.assert_close(merge.tsvm([one, two]), one + two, atol=1e-10, rtol=0)
    error = np.linalg.norm(published([one.numpy(), two.numpy()]) - (one + two).numpy()) / float((one + two).norm())
    assert error < 1e-12 if rank == 15 else error > 0.1
    trimmed = published([one.numpy(), two.numpy()], trim=1e-6)
    torch.testing.assert_close(torch.from_numpy(trimmed), one + two, atol=1e-10, rtol=0)


def test_small_adapters_on_orthogonal_subspaces_add_up_on_a_large_base(tmp_path: Path) -> None:
    """In float32 their differences to the base would have full rank: its rounding is above 1e-6 of such small changes."""
    name = "model.layers.0.self_attn.q_proj.weight"
    base, deltas = normal((40, 30), 5).float(), [0.003 * delta for delta in disjoint(3)]
    write_model(tmp_path / "base", {name: base})
    for number, delta in enumerate(deltas):
        u, s, vt = torch.linalg.svd(delta)
        factors = {"A": vt[:3].float().contiguous(), "B": (u[:, :3] * s[:3]).float().contiguous()}
        (tmp_path / str(number)).mkdir()
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "base_model_name_or_path": str(tmp_path / "base")}
        (tmp_path / str(number) / "adapter_config.json").write_text(json.dumps(config))
        module = "base_model.model.model.layers.0.self_attn.q_proj.lora"
        stored = {f"{module}_{which}.weight": factor for which, factor in factors.items()}
        save_file(stored, tmp_path / str(number) / "adapter_model.safetensors")
    recipe = Recipe("tsvm", (str(tmp_path / "0"), str(tmp_path / "1")), str(tmp_path / "base"))
    run(recipe, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")[name]
    # The sum is stored in float32: half a unit in the last place of numbers up to 4.
    torch.testing.assert_close(merged.double(), base.double() + sum(deltas), atol=2.5e-7, rtol=0)


def test_two_changes_of_rank_three_in_a_matrix_of_rank_eight() -> None:
    """The case of the notes on the published code: k = 4, so that a single arbitrary vector a task does the damage."""
    errors = []
    for seed in range(20):
        u, v = orthonormal(8, 6, 2 * seed), orthonormal(8, 6, 2 * seed + 1)
        one, two = ((u[:, at] * torch.tensor([3.0, 2.0, 1.0])) @ v[:, at].T for at in (slice(0, 3), slice(3, 6)))
        torch.testing.assert_close(merge.tsvm([one, two]), one + two, atol=1e-10, rtol=0)
        off = published([one.numpy(), two.numpy()]) - (one + two).numpy()
        errors.append(float(np.linalg.norm(off)) / float((one + two).norm()))
    assert 0.2 < np.median(errors) < 0.8


def test_the_factors_are_orthonormal() -> None:
    x = torch.cat([orthonormal(30, 7, 1), orthonormal(30, 8, 2)], 1)
    found = polar(x)
    torch.testing.assert_close(found.T @ found, torch.eye(15, dtype=torch.float64), atol=1e-12, rtol=0)
    # the nearest of all: what is left, X_o^T x, is symmetric and positive
    left = found.T @ x
    torch.testing.assert_close(left, left.T, atol=1e-12, rtol=0)
    assert float(torch.linalg.eigvalsh(left).min()) > 0
    torch.testing.assert_close(polar(torch.cat([x[:, :7]] * 2, 1))[:, :7], x[:, :7] / 2**0.5, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(64, 64), (64, 48), (48, 64)])
def test_two_equal_changes_give_the_better_half_where_the_published_code_adds_as_much_noise(
    shape: tuple[int, int],
) -> None:
    delta = normal(shape, 0)
    half = best(delta, min(shape) // 2)
    torch.testing.assert_close(merge.tsvm([delta, delta]), half, atol=1e-12, rtol=0)
    theirs = torch.from_numpy(published([delta.numpy()] * 2))
    norm = float(delta.norm())
    assert 1.2 < float(theirs.norm()) / norm < 1.4 and 0.85 < float((theirs - half).norm()) / norm < 1.0
    # which noise depends on the last bit of the input; ours does not
    nudged = [delta, delta * (1 + 1e-15)]
    again = torch.from_numpy(published([one.numpy() for one in nudged]))
    assert float((again - theirs).norm()) / norm > 0.5
    torch.testing.assert_close(merge.tsvm(nudged), half, atol=1e-11, rtol=0)


def test_weights_and_scale_multiply_and_a_weight_of_zero_leaves_the_task_out() -> None:
    one, two = disjoint(7)
    torch.testing.assert_close(merge.tsvm([one, two], [2.0, -0.5]), 2 * one - 0.5 * two, atol=1e-10, rtol=0)
    torch.testing.assert_close(merge.tsvm([one, two], scale=0.3), 0.3 * (one + two), atol=1e-10, rtol=0)
    a, b = normal((9, 12), 0), normal((9, 12), 1)
    torch.testing.assert_close(merge.tsvm([a, b], [1.0, 0.0]), best(a, 4), atol=1e-12, rtol=0)
    assert torch.equal(merge.tsvm([a, b], [0.0, 0.0]), torch.zeros_like(a))
    assert torch.equal(merge.tsvm([a, b], scale=0.0), torch.zeros_like(a))


@pytest.mark.parametrize("shape", [(7,), (), (4, 3, 5), (6, 1), (2, 9)])
def test_what_is_no_matrix_or_too_small_gets_the_mean(shape: tuple[int, ...]) -> None:
    deltas = changes(shape)
    expected = 0.5 * (deltas[0] + 2 * deltas[1] - deltas[2]) / 3
    torch.testing.assert_close(merge.tsvm(deltas, [1, 2, -1], scale=0.5), expected, atol=1e-7, rtol=0)
    method = Tsvm()
    place = Place("tensor", shape, (1.0,) * 3)
    assert not method.whole(place) and str(method.notes(place)["branch"]).startswith("mean: ")


def test_embeddings_get_the_mean_unless_asked_for() -> None:
    deltas = changes((40, 12), 2)
    mean = merge.tsvm(deltas, embedding=True)
    torch.testing.assert_close(mean, (deltas[0] + deltas[1]) / 2, atol=1e-7, rtol=0)
    assert torch.equal(merge.tsvm(deltas, embedding=True, embeddings="svd"), merge.tsvm(deltas))
    place = Place("tensor", (40, 12), (1.0, 1.0), embedding=True)
    assert Tsvm().notes(place) == {"branch": "mean: embeddings"} and not Tsvm().whole(place)
    asked = Tsvm(TsvmConfig(embeddings="svd"))
    assert asked.notes(place) == {"branch": "singular vectors"} and asked.whole(place)


def test_the_dtype_stays_and_the_inputs_too() -> None:
    for dtype in (torch.float32, torch.float64):
        deltas = [delta.to(dtype) for delta in changes((8, 6), 2)]
        before = [delta.clone() for delta in deltas]
        assert merge.tsvm(deltas).dtype == dtype
        assert all(torch.equal(delta, old) for delta, old in zip(deltas, before, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_parts_change_nothing(shape: tuple[int, ...], rows: int) -> None:
    tensors, method = changes(shape), Tsvm()
    assert torch.equal(in_parts(method, tensors, rows), method.merged(tensors))


@pytest.mark.parametrize("baseline", ["sum", "mean"])
def test_tasks_of_low_rank_that_overlap_keep_more_of_what_they_learned(baseline: str) -> None:
    """Each task learned a change of rank 6 in a matrix of 32 x 32 and sees inputs from its own row space alone. Random
    subspaces overlap by a fifth, so that the sum of changes writes over every task; the mean has a third of each."""
    differences = []
    for seed in range(20):
        bases = [orthonormal(32, 6, 10 * seed + task) for task in range(3)]
        deltas = [orthonormal(32, 6, 1000 + 10 * seed + task) @ basis.T for task, basis in enumerate(bases)]
        shares = [1.0 if baseline == "sum" else 1 / 3] * 3
        losses = [
            sum(float(((merged - own) @ basis).square().sum()) / 6 for own, basis in zip(deltas, bases, strict=True))
            / 3
            for merged in (merge.tsvm(deltas), merge.task_arithmetic(deltas, shares))
        ]
        differences.append(losses[1] - losses[0])
    assert lower_bound(differences) > 0
