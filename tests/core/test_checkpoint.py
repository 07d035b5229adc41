"""`LM.load` of folders that transformers itself would load, with wrong answers: each is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from tiny import tiny_model, tiny_tokenizer
from trimtab import LM
from trimtab.checkpoint import INDEX
from trimtab.errors import UsageError

KEY = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path, second: str) -> None:
    """Splits a checkpoint in two files, of which the index calls the second `second`."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"one.safetensors": {k: t for k, t in tensors.items() if k != KEY}, "two.safetensors": {KEY: tensors[KEY]}}
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    where = {key: second if key == KEY else "one.safetensors" for key in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def test_a_missing_tensor_is_not_drawn_at_random(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop(KEY))
    with pytest.raises(UsageError, match=f"'{folder}' lack 1 of its tensors, among them '{KEY}'"):
        LM.load(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({KEY: tensors[KEY][:-1].contiguous()}))
    width = tiny_model().config.intermediate_size
    with pytest.raises(UsageError, match=rf"'{KEY}' has the shape \({width - 1}, 32\) in its file and \({width}, 32\)"):
        LM.load(folder)


def test_a_sharded_checkpoint_loads_and_its_index_stays_in_the_folder(folder: Path) -> None:
    whole = LM.load(folder).fingerprint
    shard(folder, "two.safetensors")
    assert LM.load(folder).fingerprint == whole
    (folder / "two.safetensors").rename(folder.parent / "two.safetensors")
    with pytest.raises(UsageError, match="lacks the file 'two.safetensors'"):
        LM.load(folder)


@pytest.mark.parametrize("name", ["../two.safetensors", "/two.safetensors"])
def test_an_index_that_leads_outside_is_refused(folder: Path, name: str) -> None:
    shard(folder, name)
    (folder / "two.safetensors").rename(folder.parent / "two.safetensors")
    with pytest.raises(UsageError, match=f"names '{name}', which is not a file of its folder"):
        LM.load(folder)
    (folder / INDEX).write_text("[]")
    with pytest.raises(UsageError, match="is damaged"):
        LM.load(folder)


def test_a_classifier_is_no_language_model(folder: Path) -> None:
    LlamaForSequenceClassification(tiny_model().config).save_pretrained(folder)
    with pytest.raises(UsageError, match="LlamaForSequenceClassification, which scores text"):
        LM.load(folder)
    with pytest.raises(UsageError, match="'pocket/reward' is a"):
        LM.load("pocket/reward")


def test_a_missing_tokenizer_is_said(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(UsageError, match="has no tokenizer that loads"):
        LM.load(folder)
