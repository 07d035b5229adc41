"""Controllers on disk: what was saved edits alike after loading, and what is damaged or for another model is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from oracles.toy import Toy
from tiny import tiny_lm
from trimtab import Steered
from trimtab.errors import UsageError
from trimtab.steer import PrefCtrl, ReControl, StaticRE, ValueNetwork, load_controller

METHODS: list[tuple[type[Any], dict[str, Any]]] = [
    (ReControl, {"step_size": 0.2, "width": 16, "epochs": 1}),
    (ReControl, {"step_size": 0.2, "width": 12, "hidden_layers": 2, "epochs": 1, "trust": 0.5}),
    (PrefCtrl, {"step_size": 0.2, "width": 16, "epochs": 1}),
    (StaticRE, {"strength": 2.0, "states": "all"}),
]


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


def fitted(toy: Toy, cls: type[Any] = ReControl, options: dict[str, Any] = METHODS[0][1]) -> Any:
    return cls.fit(toy.lm, [toy.prompt] * 4, toy.reward, sampling=toy.sampling, drawn=toy.rollouts(128), **options)


@pytest.fixture
def saved(toy: Toy, tmp_path: Path) -> Path:
    return fitted(toy).save_pretrained(tmp_path / "controller")


@pytest.mark.parametrize(("cls", "options"), METHODS, ids=lambda value: getattr(value, "slug", ""))
def test_a_loaded_controller_edits_alike(toy: Toy, tmp_path: Path, cls: type[Any], options: dict[str, Any]) -> None:
    control = fitted(toy, cls, options)
    folder = control.save_pretrained(tmp_path / "new" / "controller")
    for loaded in (cls.from_pretrained(folder), load_controller(folder)):
        assert type(loaded) is cls and loaded.config == control.config
        assert json.dumps(asdict(loaded.origin)) == json.dumps(asdict(control.origin))
        assert torch.equal(loaded.edit(toy.states), control.edit(toy.states))
        for key, values in control.trace(toy.states[:9]).items():
            assert torch.equal(loaded.trace(toy.states[:9])[key], values)
        answers = Steered(toy.lm, loaded).generate([toy.prompt] * 3, toy.sampling)
        assert answers.tokens == Steered(toy.lm, control).generate([toy.prompt] * 3, toy.sampling).tokens
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "controller.json", "controller.safetensors"]
    assert cls.slug in (folder / "README.md").read_text()


def test_a_controller_built_by_hand_comes_back(tmp_path: Path) -> None:
    control = ReControl(ValueNetwork(6, 9, 2), step_size=0.3)
    loaded = ReControl.from_pretrained(control.save_pretrained(tmp_path / "c"))
    hidden = torch.randn(4, 6)
    assert torch.equal(loaded.edit(hidden), control.edit(hidden))
    static = StaticRE(torch.ones(6), strength=1.0)
    assert torch.equal(
        StaticRE.from_pretrained(static.save_pretrained(tmp_path / "s")).edit(hidden), static.edit(hidden)
    )


def test_only_value_networks_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only a ValueNetwork can be saved .* not Sequential"):
        ReControl(nn.Sequential(nn.Linear(6, 1)), step_size=1.0).save_pretrained(tmp_path / "c")


def test_it_can_be_saved_again_but_not_over_something_else(toy: Toy, saved: Path, tmp_path: Path) -> None:
    fitted(toy, StaticRE, METHODS[3][1]).save_pretrained(saved)
    assert type(load_controller(saved)) is StaticRE
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something that is not a controller"):
        fitted(toy).save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


# another model


def test_another_width_names_both_sides(saved: Path) -> None:
    with pytest.raises(UsageError, match="made for toy with hidden size 16; this model has 32: fit a new one"):
        Steered(tiny_lm(), ReControl.from_pretrained(saved))


def test_other_weights_of_the_same_shape_name_both_sides(toy: Toy, saved: Path) -> None:
    other, control = Toy(seed=1).lm, ReControl.from_pretrained(saved)
    ours, theirs = toy.lm.fingerprint, other.fingerprint
    assert ours != theirs
    message = rf"made for toy \(weights {ours}\); this model's weights are {theirs}: fit a new one"
    with pytest.raises(UsageError, match=message):
        Steered(other, control)
    with pytest.raises(UsageError, match=message), control.attached(other.model):
        pass


# damage


def test_missing_files_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a controller: controller.json is missing"):
        load_controller(tmp_path / "nowhere")
    (saved / "controller.safetensors").unlink()
    with pytest.raises(UsageError, match=r"is not a controller: controller.safetensors is missing"):
        load_controller(saved)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_tensors_are_refused(saved: Path, share: float) -> None:
    whole = (saved / "controller.safetensors").read_bytes()
    (saved / "controller.safetensors").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UsageError, match="the controller in .* is damaged"):
        ReControl.from_pretrained(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(saved: Path, value: float) -> None:
    tensors = load_file(saved / "controller.safetensors")
    tensors["value.out.weight"][0, 3] = value
    save_file(tensors, saved / "controller.safetensors")
    with pytest.raises(UsageError, match="values that are not finite numbers in 'value.out.weight'"):
        ReControl.from_pretrained(saved)


@pytest.mark.parametrize("change", ["drop", "reshape"])
def test_tensors_that_do_not_fit_are_named(saved: Path, change: str) -> None:
    tensors = load_file(saved / "controller.safetensors")
    for key in ("value.hidden.0.weight", "value.out.weight"):
        broken = {k: v for k, v in tensors.items() if change != "drop" or k != key}
        if change == "reshape":
            broken[key] = tensors[key].flatten()[:5].clone()
        save_file(broken, saved / "controller.safetensors")
        with pytest.raises(UsageError, match=f"the controller's tensors do not fit: .*{key.removeprefix('value.')}"):
            ReControl.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(format=99), "controller.json is not of format 1"),
        (lambda record: record.pop("origin"), "controller.json is not of format 1"),
        (lambda record: record["origin"].update(colour="red"), "damaged"),
        (lambda record: record["config"].update(steps="many"), "steps='many' is not a whole number"),
        (lambda record: record.update(method="re-contorl"), "holds a re-contorl controller, not re-control"),
    ],
    ids=["format", "missing", "origin", "config", "method"],
)
def test_a_record_that_was_tampered_with_is_refused(saved: Path, change: Any, message: str) -> None:
    record = json.loads((saved / "controller.json").read_text())
    change(record)
    (saved / "controller.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=message):
        ReControl.from_pretrained(saved)


def test_text_that_is_not_json_is_refused(saved: Path) -> None:
    (saved / "controller.json").write_text("{not json")
    with pytest.raises(UsageError, match="is damaged"):
        load_controller(saved)


def test_another_method_and_an_unknown_one_are_refused(toy: Toy, saved: Path) -> None:
    with pytest.raises(UsageError, match="holds a re-control controller, not static-re"):
        StaticRE.from_pretrained(saved)
    record = json.loads((saved / "controller.json").read_text())
    (saved / "controller.json").write_text(json.dumps({**record, "method": "re-contorl"}))
    with pytest.raises(UsageError, match="did you mean 're-control'"):
        load_controller(saved)


def test_nothing_is_unpickled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    control = load_controller(saved)
    assert control.edit(torch.randn(2, 16)).shape == (2, 16)
    (saved / "controller.safetensors").write_bytes(b"\x80\x04\x95cos\nsystem\n.")
    with pytest.raises(UsageError, match="damaged"):
        load_controller(saved)


def test_a_strength_left_open_is_kept_open(tmp_path: Path) -> None:
    loaded = ReControl.from_pretrained(ReControl(ValueNetwork(6)).save_pretrained(tmp_path / "c"))
    with pytest.raises(UsageError, match="no step_size was chosen"):
        loaded.edit(torch.randn(2, 6))
    assert torch.isfinite(loaded.but(step_size=1.0).edit(torch.randn(2, 6))).all()
