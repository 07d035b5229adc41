"""Safetensors files written out of order, and what is noticed of files that an earlier run left."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.merge.source import Entry
from trimtab.merge.writer import Shards, checksum


def odd_tensors() -> dict[str, Tensor]:
    """Every kind of shape and several dtypes."""
    chance = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(7, 5, generator=chance),
        "half": torch.randn(3, 3, generator=chance).bfloat16(),
        "cube": torch.randn(4, 3, 5, generator=chance).to(torch.float16),
        "double": torch.randn(2, generator=chance, dtype=torch.float64),
        "number": torch.tensor(3.5),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "no rows": torch.zeros(0, 5),
        "no columns": torch.zeros(5, 0),
    }


def shards_of(folder: Path, tensors: dict[str, Tensor], max_bytes: int = 1 << 30) -> Shards:
    entries = {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return Shards(folder, entries, max_bytes)


def fill(shards: Shards, tensors: dict[str, Tensor], rows: int = 2) -> None:
    """Backwards, by rows."""
    for name, tensor in reversed(tensors.items()):
        for start in reversed(range(0, len(tensor), rows)) if tensor.dim() else (0,):
            shards.write(name, start, tensor[start : start + rows] if tensor.dim() else tensor)


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("max_bytes", [1 << 30, 200, 1])
def test_the_library_reads_what_was_written(tmp_path: Path, max_bytes: int) -> None:
    tensors = odd_tensors()
    shards = shards_of(tmp_path, tensors, max_bytes)
    shards.open()
    fill(shards, tensors)
    assert not read(tmp_path), "nothing has its name before it is whole"
    shards.publish()
    shards.close()
    found = read(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert not [*tmp_path.glob("*.partial")]
    if max_bytes < 1 << 30:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / file, framework="pt") as opened:
                assert name in opened.keys() and opened.metadata() == {"format": "pt"}  # noqa: SIM118


def test_one_file_has_the_librarys_own_bytes(tmp_path: Path) -> None:
    """Same header, same order, same padding, where no two dtypes are of one size."""
    tensors = {name: tensor for name, tensor in odd_tensors().items() if name not in ("cube", "count", "flags")}
    shards = shards_of(tmp_path, tensors)
    shards.open()
    fill(shards, tensors)
    shards.publish()
    shards.close()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_checksums_add_up_and_tell_a_single_bit() -> None:
    data = torch.randint(0, 256, (1003,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = checksum(data)
    assert (checksum(data[:64]) + checksum(data[64:])) % (1 << 64) == whole
    for place in (0, 500, 1000, 1002):
        for bit in range(8):
            changed = data.clone()
            changed[place] ^= 1 << bit
            assert checksum(changed) != whole


def test_checksums_of_what_is_on_disk(tmp_path: Path) -> None:
    tensors = odd_tensors()
    shards = shards_of(tmp_path, tensors)
    shards.open()
    fill(shards, tensors)
    assert all(shards.checksum(name) == checksum(tensor) for name, tensor in tensors.items())
    os.truncate(tmp_path / "model.safetensors.partial", shards.shards[0].offsets["matrix"] + 8)
    assert shards.checksum("matrix") == -1
    shards.close()


def test_a_left_file_of_another_length_or_header_is_begun_anew(tmp_path: Path) -> None:
    tensors = odd_tensors()
    name = tmp_path / "model.safetensors"

    shards = shards_of(tmp_path, tensors)
    shards.open()
    shards.close()
    empty = (tmp_path / "model.safetensors.partial").read_bytes()
    shards = shards_of(tmp_path, tensors)
    shards.open()
    fill(shards, tensors)
    shards.publish()
    shards.close()
    whole = name.read_bytes()
    shards = shards_of(tmp_path, tensors)
    shards.open()
    shards.close()
    assert name.read_bytes() == whole, "what is whole stays, under its name"
    for damaged in (whole[:-1], whole[:50], b"", whole + b"x", whole[:20] + b"\0" + whole[21:], bytes(len(whole))):
        name.write_bytes(damaged)
        shards.open()
        assert not name.exists(), "what is begun anew loses its name"
        shards.close()
        assert (tmp_path / "model.safetensors.partial").read_bytes() == empty
        (tmp_path / "model.safetensors.partial").unlink()


def test_withdrawn_files_are_partial_again(tmp_path: Path) -> None:
    tensors = odd_tensors()
    shards = shards_of(tmp_path, tensors, 200)
    shards.open()
    fill(shards, tensors)
    shards.publish()
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shards.withdraw()
    assert not [*tmp_path.glob("*.safetensors")]
    shards.withdraw()
    shards.publish()
    shards.close()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    shards.open()
    shards.withdraw()
    shards.discard()
    assert not [*tmp_path.iterdir()]
