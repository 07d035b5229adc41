"""Checkpoint folders as parents: read by rows, and refused by name where they are not whole."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge_folders import refused, save, tensors
from tiny import tiny_model
from trimtab.errors import UsageError
from trimtab.merge.source import DTYPES, Folder, View

INDEX = "model.safetensors.index.json"


def sharded(folder: Path) -> Path:
    """A checkpoint of several files."""
    save(folder)
    (folder / "model.safetensors").unlink()
    tiny_model(vocab_size=59).save_pretrained(folder, max_shard_size="20KB")
    assert len([*folder.glob("model-*.safetensors")]) > 2
    return folder


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if dtype.itemsize <= 8])
def test_rows_are_the_rows_that_were_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    (tmp_path / "config.json").write_text("{}")
    saved = {
        "a": torch.randint(0, 2, (13, 3, 2)).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "odd": torch.randint(0, 2, (7,)).to(dtype),
    }
    save_file(saved, tmp_path / "model.safetensors")
    source = Folder(tmp_path)
    for name, tensor in saved.items():
        assert source.entries[name].dtype == tensor.dtype and source.entries[name].shape == tuple(tensor.shape)
        raw = tensor.reshape(-1).view(torch.uint8)
        assert torch.equal(source.read(name).reshape(-1).view(torch.uint8), raw)
    rows = source.read("a", 4, 9)
    assert rows.shape == (5, 3, 2) and torch.equal(rows.float(), saved["a"][4:9].float())
    assert source.read("a", 10, 99).shape == (3, 3, 2) and source.read("a", 5, 5).shape == (0, 3, 2)
    runs = source.read_runs("a", [(7, 9), (0, 1), (3, 3), (12, 13)])
    assert torch.equal(runs.float(), saved["a"][[7, 8, 0, 12]].float())
    rows.zero_()  # memory of the caller's own: the next read is not touched
    assert torch.equal(source.read("a", 4, 9).float(), saved["a"][4:9].float())


def test_shards_are_one_model(tmp_path: Path) -> None:
    whole, parts = Folder(save(tmp_path / "whole")), Folder(sharded(tmp_path / "parts"))
    assert whole.entries == parts.entries and whole.fingerprint == parts.fingerprint
    assert all(torch.equal(whole.read(name), parts.read(name)) for name in whole.entries)


def test_a_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    one, two = Folder(save(tmp_path / "one")), Folder(save(tmp_path / "two", seed=1))
    assert one.fingerprint == Folder(tmp_path / "one").fingerprint != two.fingerprint


def test_a_view_renames_and_leaves_out(tmp_path: Path) -> None:
    source = Folder(save(tmp_path / "a"))
    view = View(source, {"x": "model.norm.weight", "y": "model.norm.weight"})
    assert [*view.entries] == ["x", "y"] and torch.equal(view.read("x"), source.read("model.norm.weight"))
    assert view.fingerprint == source.fingerprint


# What is done to a checkpoint of several files, and what must be said of it
def cut(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])


def cut_header(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:20])


def long_header(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[0]
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def empty(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[0].write_bytes(b"")


def remove(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()


def outside(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[0]
    path.rename(folder.parent / "x.safetensors")
    _map(folder, lambda file: "../x.safetensors" if file == path.name else file)


def unnamed(folder: Path) -> None:
    data = json.loads((folder / INDEX).read_text())
    data["weight_map"].pop("model.norm.weight")
    (folder / INDEX).write_text(json.dumps(data))


def misplaced(folder: Path) -> None:
    files = sorted(path.name for path in folder.glob("model-*.safetensors"))
    data = json.loads((folder / INDEX).read_text())
    data["weight_map"]["model.norm.weight"] = next(
        file for file in files if file != data["weight_map"]["model.norm.weight"]
    )
    (folder / INDEX).write_text(json.dumps(data))


def twice(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[0]
    (folder / "model-again.safetensors").write_bytes(path.read_bytes())
    data = json.loads((folder / INDEX).read_text())
    data["weight_map"]["more"] = "model-again.safetensors"
    (folder / INDEX).write_text(json.dumps(data))


def no_map(folder: Path) -> None:
    (folder / INDEX).write_text('{"metadata": {}}')


def no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def _map(folder: Path, change: Callable[[str], str]) -> None:
    data = json.loads((folder / INDEX).read_text())
    data["weight_map"] = {name: change(file) for name, file in data["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(data))


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (cut, "damaged or cut short"),
    (cut_header, "damaged or cut short"),
    (long_header, "damaged or cut short"),
    (empty, "damaged or cut short"),
    (remove, "lacks the file"),
    (outside, "'../x.safetensors', which is not a file of its folder"),
    (unnamed, "holds 'model.norm.weight', which"),
    (misplaced, "'model.norm.weight', but it does not"),
    (twice, "both hold the tensor"),
    (no_map, "is damaged"),
    (no_index, "has no model.safetensors and no"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_damage_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], said: str
) -> None:
    folder = sharded(tmp_path / "a")
    damage(folder)
    line = refused(capsys, tmp_path / "out", "linear", "--models", folder)
    assert said in line and f"the model '{folder}'" in line


def test_all_damaged_files_are_named_at_once(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "a")
    cut(folder)
    empty(folder)
    with pytest.raises(UsageError) as error:
        Folder(folder)
    first, second = sorted(path.name for path in folder.glob("model-*.safetensors"))[:2]
    assert first in str(error.value) and second in str(error.value)


def bomb(path: Path) -> bytes:
    """What a pickle can hold: code that runs when it is read, here one that makes the file `path`."""
    return f"cos\nsystem\n(S'touch {path}'\ntR.".encode()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_never_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    folder = save(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(bomb(tmp_path / "boom"))
    line = refused(capsys, tmp_path / "out", "linear", "--models", folder)
    assert file in line and "convert it to safetensors" in line and not (tmp_path / "boom").exists()
    if file == "model.pt":  # the bomb is one
        load = [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"]
        subprocess.run(load, input=(folder / file).read_bytes(), check=True)
        assert (tmp_path / "boom").exists()


def test_a_pickle_beside_safetensors_is_not_read(tmp_path: Path) -> None:
    folder = save(tmp_path / "a")
    (folder / "pytorch_model.bin").write_bytes(bomb(tmp_path / "boom"))
    assert Folder(folder).entries and not (tmp_path / "boom").exists()


def test_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "there is no model folder" in refused(capsys, out, "linear", "--models", "some/model")
    assert "there is no model folder" in refused(capsys, out, "linear", "--models", tmp_path / "gone")
    (tmp_path / "bare").mkdir()
    assert "without config.json" in refused(capsys, out, "linear", "--models", tmp_path / "bare")
    folder = save(tmp_path / "a")
    (folder / "config.json").write_text("[1]")
    assert "config.json cannot be read" in refused(capsys, out, "linear", "--models", folder)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path / "a")
    source = Folder(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(UsageError, match="became shorter"):
        for name in source.entries:
            source.read(name)


def test_paths_with_spaces_and_other_letters(tmp_path: Path) -> None:
    folder = save(tmp_path / "ein Modell ü 模型")
    assert torch.equal(Folder(folder).read("model.norm.weight"), tensors(folder)["model.norm.weight"])
