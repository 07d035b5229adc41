"""Lengths, angles and signs: against plain numpy on whole models, in any parts; and what they are taken to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from merge.stacked import read, shapes, write
from trimtab.errors import UsageError
from trimtab.measure.measurement import Heat
from trimtab.merge import geometry
from trimtab.merge.advice import Advice, advise
from trimtab.merge.engine import run
from trimtab.merge.geometry import Geometry, measure, module_of
from trimtab.merge.recipe import Recipe
from trimtab.merge.source import Folder
from trimtab.report.drawings import draw
from trimtab.report.merged import figures

LAYERS = 3


def folders(path: Path, tensors: list[dict[str, Tensor]]) -> list[Folder]:
    return [Folder(write(path / f"m{m}", one, LAYERS)) for m, one in enumerate(tensors)]


def fine_tunes(
    count: int, size: float = 0.02, kept: float = 1.0, shared: float = 0.0, seed: int = 0
) -> list[dict[str, Tensor]]:
    """A base (the last) and fine-tunes of it: random changes at a share of the entries, of which a part is common to all."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes(LAYERS).items()}
    common = {name: torch.randn(shape, generator=generator) for name, shape in shapes(LAYERS).items()}
    out = []
    for _ in range(count):
        one = {}
        for name, weight in base.items():
            own = torch.randn(weight.shape, generator=generator)
            mask = torch.rand(weight.shape, generator=generator) < kept
            one[name] = weight + size * mask * (shared * common[name] + (1 - shared) * own)
        out.append(one)
    return [*out, base]


def by_hand(models: list[dict[str, Tensor]], base: dict[str, Tensor], names: list[str]) -> dict[str, object]:
    """The figures of some tensors, in numpy, entry by entry."""
    b = np.concatenate([base[name].double().numpy().ravel() for name in names])
    d = [np.concatenate([one[name].double().numpy().ravel() for name in names]) - b for one in models]
    signs = np.sign(np.stack(d))
    shared = (signs != 0).sum(0) >= 2
    both = (signs > 0).any(0) & (signs < 0).any(0)
    moved, net = sum(np.abs(x).sum() for x in d), np.abs(sum(d)).sum()
    return {
        "entries": b.size,
        "norm": [np.linalg.norm(x) for x in d],
        "relative_norm": [np.linalg.norm(x) / np.linalg.norm(b) for x in d],
        "changed": [(x != 0).mean() for x in d],
        "cosine": {
            f"{i},{j}": d[i] @ d[j] / np.linalg.norm(d[i]) / np.linalg.norm(d[j])
            for i, j in combinations(range(len(d)), 2)
        },
        "weight_cosine": {
            f"{i},{j}": (b + d[i]) @ (b + d[j]) / np.linalg.norm(b + d[i]) / np.linalg.norm(b + d[j])
            for i, j in combinations(range(len(d)), 2)
        },
        "shared": shared.mean(),
        "sign_conflict": both.sum() / shared.sum(),
        "cancelled": 1 - net / moved,
    }


@pytest.mark.parametrize("part", [1, 7, 1 << 17])
def test_figures_are_those_of_the_definition_in_any_parts(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geometry, "PART", part)
    tensors = fine_tunes(3, kept=0.6)
    *models, base = folders(tmp_path, tensors)
    found = measure(models, base, threads=2)
    groups: dict[str, Callable[[str], bool]] = {
        "all": lambda name: True,
        "mlp.up_proj": lambda name: "up_proj" in name,
        "1": lambda name: ".1." in name,
        "after": lambda name: name in ("lm_head.weight", "model.norm.weight"),
    }
    for group, wanted in groups.items():
        total = found.total() if group == "all" else {**found.modules(), **found.layers()}[group]
        assert total is not None
        want = by_hand(tensors[:3], tensors[3], [name for name in shapes(LAYERS) if wanted(name)])
        assert set(total.to_dict()) == set(want)
        for key, value in total.to_dict().items():  # float64 sums in another order: 1e-10
            assert value == pytest.approx(want[key], rel=1e-10, abs=1e-10), (group, key)


def test_without_a_base_the_figures_are_of_the_weights(tmp_path: Path) -> None:
    tensors = fine_tunes(2)
    zero = {name: torch.zeros(shape) for name, shape in shapes(LAYERS).items()}
    found = measure(folders(tmp_path, tensors[:2])).total()
    assert found is not None
    with np.errstate(divide="ignore", invalid="ignore"):
        want = by_hand(tensors[:2], zero, list(zero))
    for key in ("norm", "cosine", "weight_cosine", "sign_conflict", "cancelled", "changed"):
        assert found.to_dict()[key] == pytest.approx(want[key], rel=1e-10)
    assert found.to_dict()["relative_norm"] == [None, None]


def test_what_a_merge_kept(tmp_path: Path) -> None:
    """TIES of one model keeps its largest entries: their share, and their share of its squared length."""
    tensors = fine_tunes(1)
    model, base = folders(tmp_path, tensors)
    run(Recipe("ties", (model.name,), base.name, options={"density": 0.25}), tmp_path / "out")
    found = measure([model], base, merged=Folder(tmp_path / "out"))
    merged = read(tmp_path / "out")
    for one in found.tensors:
        change = (tensors[0][one.name].double() - tensors[1][one.name].double()).flatten()
        kept = (merged[one.name].double() - tensors[1][one.name].double()).flatten()
        said = one.figures.to_dict()["merged"]
        assert said["kept_density"] == pytest.approx(0.25, abs=0.01)
        # the sum b + d is rounded to float32 in the merge: 1e-5 of a change of 0.02
        assert said["kept_of"][0] == pytest.approx(float(kept @ change / (change @ change)), rel=1e-9)
        largest = change.abs().sort(descending=True).values[: int(0.25 * len(change))]
        assert said["kept_of"][0] == pytest.approx(float((largest**2).sum() / (change**2).sum()), rel=1e-3)


def test_nothing_is_undefined_silently(tmp_path: Path) -> None:
    """No change: no cosine, no conflict; NaN: the tensor is named and left out of the sums."""
    tensors = fine_tunes(2)
    tensors[0] = tensors[2]
    tensors[1]["lm_head.weight"] = tensors[1]["lm_head.weight"].clone()
    tensors[1]["lm_head.weight"][0, 0] = float("nan")
    *models, base = folders(tmp_path, tensors)
    found = measure(models, base)
    assert found.not_finite == ["lm_head.weight"] and len(found.tensors) == len(shapes(LAYERS)) - 1
    total = found.total()
    assert total is not None
    said = total.to_dict()
    assert said["norm"][0] == 0 and said["cosine"] == {"0,1": None} and said["sign_conflict"] is None


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "self_attn.q_proj"),
        ("model.layers.3.self_attn.q_proj.bias", "self_attn.q_proj"),
        ("model.layers.3.input_layernorm.weight", "input_layernorm"),
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", "experts.w1"),
        ("transformer.h.0.attn.c_proj.weight", "attn.c_proj"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("scale", "scale"),
    ],
)
def test_kinds_of_module(name: str, module: str) -> None:
    assert module_of(name) == module


# What the figures say


def said(tensors: list[dict[str, Tensor]], path: Path, based: bool = True) -> dict[str, Advice]:
    *models, base = folders(path, tensors)
    found = measure(models, base) if based else measure([*models, base])
    return {one.kind: one for one in advise(found)}


def test_unrelated_changes(tmp_path: Path) -> None:
    found = said(fine_tunes(2), tmp_path)
    assert set(found) == {"orthogonal", "conflict", "straight"}
    assert found["conflict"].value == pytest.approx(0.5, abs=0.1) and "unrelated changes: 50%" in found["conflict"].text
    assert abs(found["orthogonal"].value) < 0.1 and "task-arithmetic" in found["orthogonal"].text
    assert found["straight"].value > 0.5 and "--on deltas" in found["straight"].text


def test_changes_that_are_alike(tmp_path: Path) -> None:
    found = said(fine_tunes(2, shared=0.9), tmp_path)
    assert "alike" in found and found["alike"].value > 0.8 and not {"orthogonal", "conflict"} & set(found)


def test_changes_that_undo_one_another(tmp_path: Path) -> None:
    tensors = fine_tunes(1)
    tensors.insert(1, {name: 2 * tensors[1][name] - tensors[0][name] for name in tensors[0]})
    found = said(tensors, tmp_path)
    assert found["opposed"].value == pytest.approx(-1, abs=1e-4) and found["conflict"].value > 0.99


def test_sparse_far_and_unchanged(tmp_path: Path) -> None:
    sparse, far = fine_tunes(2, kept=0.02), fine_tunes(1, size=0.5)
    found = said([sparse[0], far[0], sparse[2], sparse[2]], tmp_path)
    assert {"sparse", "far", "unchanged"} <= set(found)
    assert found["sparse"].value == pytest.approx(0.02, abs=0.02) and found["far"].value == pytest.approx(0.5, abs=0.05)
    assert "m2 is the same as the base" in found["unchanged"].text


def test_the_same_model_twice(tmp_path: Path) -> None:
    tensors = fine_tunes(1)
    assert "counts twice" in said([tensors[0], tensors[0], tensors[1]], tmp_path)["same"].text


def test_strangers(tmp_path: Path) -> None:
    one, two = fine_tunes(1, seed=0), fine_tunes(1, seed=1)
    without = said([one[0], two[0]], tmp_path / "without", based=False)
    assert set(without) == {"strangers"} and "align" in without["strangers"].text
    with_base = said([one[0], two[0], one[1]], tmp_path / "with")
    assert "m1 is no fine-tune of this base" in with_base["strangers"].text
    related = said(one, tmp_path / "related", based=False)
    assert set(related) == {"relatives", "straight"}


def test_an_empty_comparison_says_nothing() -> None:
    assert advise(Geometry(["a"], None, [])) == []


def test_a_tensor_that_is_too_short_is_an_error_of_the_user(tmp_path: Path) -> None:
    model, base = folders(tmp_path, fine_tunes(1))
    path = Path(model.name) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(UsageError, match="shorter|cut short|damaged"):
        measure([model], base)


def test_heat_maps_of_deep_models_join_layers(tmp_path: Path) -> None:
    """80 layers in at most 40 rows: a row's figure is of all its layers' entries, not a mean of figures."""
    generator = torch.Generator().manual_seed(0)
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(80))]
    tensors = [{name: torch.randn(2 + i % 7, 4, generator=generator) for i, name in enumerate(names)} for _ in range(3)]
    *models, base = [Folder(write(tmp_path / f"m{m}", one, 80)) for m, one in enumerate(tensors)]
    found = measure(models, base)
    heat = next(figure for figure in figures(found) if figure.title == "Sign conflict")
    assert isinstance(heat, Heat) and len(heat.rows) <= 40 and heat.rows[:2] == ["before", "0 to 2"]
    wanted = found.total(lambda one: one.layer in (3, 4, 5))
    assert wanted is not None and heat.values[2] == [None, wanted.conflict]
    assert draw(asdict(heat)).count("<rect") == 2 * len(heat.rows)
