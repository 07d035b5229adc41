"""PLeaS on language models: what it writes loads, has the widths it says, and computes what it should."""

from __future__ import annotations

import copy
import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny import WORDS, tiny_model, tiny_tokenizer
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.merge.align.permutation import apply
from trimtab.merge.align.specs import model_spec
from trimtab.merge.pleas.layers import Batch
from trimtab.merge.pleas.models import Asked, merge_folders, read_texts
from trimtab.merge.pleas.pair import Pair
from trimtab.merge.pleas.pleas import PleasConfig

IDS = torch.randint(4, 59, (40, 12), generator=torch.Generator().manual_seed(5))


def save(folder: Path, arch: str = "llama", seed: int = 0, **config: object) -> str:
    model, tokenizer = tiny_model(arch, seed=seed, **config), tiny_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def texts(path: Path, rows: int = 60, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(rows):
        chosen = torch.randint(len(WORDS), (int(torch.randint(4, 12, (1,), generator=generator)),), generator=generator)
        lines.append(" ".join(WORDS[i] for i in chosen.tolist()))
    path.write_text("\n".join(lines) + "\n")
    return path


def logits(folder: Path | str) -> Tensor:
    with torch.no_grad():
        return LM.load(str(folder)).model(IDS).logits


def batch() -> Batch:
    return Batch((), {"input_ids": IDS, "use_cache": False}, torch.ones_like(IDS, dtype=torch.bool))


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "phi3", "opt"])
def test_the_merged_folder_loads_and_is_as_wide_as_it_says(tmp_path: Path, arch: str) -> None:
    a, b = save(tmp_path / "a", arch, 0), save(tmp_path / "b", arch, 1)
    data = texts(tmp_path / "texts.txt")
    found = merge_folders(Asked(a, b, (data,)), tmp_path / "out", PleasConfig(budget=1.2))
    model = LM.load(tmp_path / "out").model
    key = next(
        key for key in ("intermediate_size", "ffn_dim", "n_inner") if getattr(model.config, key, None) is not None
    )
    before = 128 if arch == "gpt2" else 48
    assert before < found["width"] == getattr(model.config, key) < 2 * before
    assert 1.1 < found["ratio"] <= 1.2 and not any("zero units" in text for text in found["warnings"])
    assert any("--residual matches their residual streams" in text for text in found["warnings"])
    assert bool(logits(tmp_path / "out").isfinite().all())
    assert found["losses"][str(data)].keys() == {"a", "b", "merged"}
    one = max(found["layers"].values(), key=lambda layer: layer["start"])
    assert one["fitted"] < one["start"]


def test_two_copies_of_one_model_merge_into_it_at_any_size(tmp_path: Path) -> None:
    a = save(tmp_path / "a")
    for budget in (1.0, 1.3, 2.0):
        out = tmp_path / f"out-{budget}"
        found = merge_folders(Asked(a, a, (texts(tmp_path / "t.txt"),)), out, PleasConfig(budget=budget))
        torch.testing.assert_close(logits(out), logits(a), rtol=1e-4, atol=1e-4)
        assert found["width"] == {1.0: 48, 2.0: 96}.get(budget, found["width"])
        assert not any("--residual" in text for text in found["warnings"])
    assert any("all feed-forward nets side by side" in text for text in found["warnings"])  # 2.0 is more than there is


@pytest.mark.parametrize("arch", ["llama", "qwen3", "phi3", "gpt2"])
def test_a_permuted_copy_merges_into_the_original(tmp_path: Path, arch: str) -> None:
    """Acceptance (2), with feed-forward units, heads, value dimensions and the residual stream permuted."""
    a = tiny_model(arch)
    names = {name: tuple(tensor.shape) for name, tensor in a.named_parameters()}
    spec = model_spec(a.config.to_dict(), names, residual=True)
    moved = apply(spec, spec.random(torch.Generator().manual_seed(1)), dict(a.named_parameters()))
    b = copy.deepcopy(a)
    b.load_state_dict({name: tensor.detach() for name, tensor in moved.items()}, strict=False)
    b.tie_weights()
    wide = {group.name for group in spec.groups if group.name.endswith(".ffn")}
    pair = Pair(a, b, spec, [batch()], PleasConfig(), widen=wide)
    assert "residual" in pair.held
    merged = pair.build({})
    torch.testing.assert_close(merged.model(IDS).logits, a(IDS).logits, rtol=1e-4, atol=1e-4)
    # Relative to outputs: the fit's own rounding is 1e-16, the copy's is that of float32, squared.
    assert max(layer.fitted for layer in merged.layers.values()) < 1e-8
    wrong = Pair(a, b, spec, [batch()], PleasConfig(), permutations={}, widen=wide).build({})
    assert float((wrong.model(IDS).logits - a(IDS).logits).detach().abs().max()) > 0.1


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3"])
def test_feed_forward_nets_side_by_side_are_both(arch: str) -> None:
    """Acceptance (1) for models that differ in their last feed-forward net alone: the merged one's output is both's mean."""
    a = tiny_model(arch)
    b, other = copy.deepcopy(a), tiny_model(arch, seed=7)
    spec = model_spec(a.config.to_dict(), {name: tuple(one.shape) for name, one in a.named_parameters()})
    (last,) = (group for group in spec.groups if group.name == "layers.1.ffn")
    own = dict(other.named_parameters())
    state = {place.tensor: own[place.tensor].detach() for place in last.places}
    b.load_state_dict(state, strict=False)
    outputs = {}
    module = next(m for n, m in a.named_modules() if n.endswith(("layers.1.mlp", "h.1.mlp")))
    pair = Pair(a, b, spec, [batch()], PleasConfig(), widen={last.name})
    for name, model in (("a", a), ("b", b), ("merged", pair.build({last.name: last.size}).model)):
        place = next(n for n, m in a.named_modules() if m is module)
        handle = model.get_submodule(place).register_forward_hook(
            lambda m, args, out, name=name: outputs.__setitem__(name, out)
        )
        with torch.no_grad():
            model(IDS)
        handle.remove()
    torch.testing.assert_close(outputs["merged"], (outputs["a"] + outputs["b"]) / 2, rtol=1e-5, atol=1e-5)
    assert float((outputs["a"] - outputs["b"]).abs().max()) > 0.1


def test_unequal_widths_are_padded_with_units_that_do_nothing(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1)
    data = texts(tmp_path / "t.txt")
    found = merge_folders(Asked(a, b, (data,)), tmp_path / "out", PleasConfig(budget=1.2, scheme="zip"))
    first, last = found["separate"]["layers.0.ffn"], found["separate"]["layers.1.ffn"]
    assert first < last and found["width"] == 48 + last
    assert found["dense_ratio"] > found["ratio"] and found["ratio"] <= 1.2
    assert any(f"{last - first} zero units pad the layers" in text for text in found["warnings"])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        tensor = weights[f"model.layers.0.mlp.{name}.weight"].movedim(axis, 0)
        assert bool((tensor[48 + first :] == 0).all()) and bool((tensor[: 48 + first] != 0).any(1).all())
    # Cutting them off leaves the same function: that layer alone, in a module of its own width.
    wide = LM.load(tmp_path / "out").model
    narrow = copy.deepcopy(wide)
    mlp = narrow.model.layers[0].mlp
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        layer = getattr(mlp, name)
        layer.weight = torch.nn.Parameter(layer.weight.narrow(axis, 0, 48 + first))
    with torch.no_grad():
        torch.testing.assert_close(narrow(IDS).logits, wide(IDS).logits, rtol=1e-5, atol=1e-5)


def test_padding_in_a_batch_has_no_part_in_the_fit(tmp_path: Path) -> None:
    a, b = tiny_model(), tiny_model(seed=1)
    spec = model_spec(a.config.to_dict(), {name: tuple(one.shape) for name, one in a.named_parameters()})
    mask = torch.ones_like(IDS)
    mask[::2, 7:] = 0
    merged = []
    for filler in (0, 33):
        ids = torch.where(mask.bool(), IDS, filler)
        padded = Batch((), {"input_ids": ids, "attention_mask": mask, "use_cache": False}, mask.bool())
        merged.append(Pair(a, b, spec, [padded], PleasConfig(rows=10**6)).build({}).model.state_dict())
    for name, tensor in merged[0].items():
        torch.testing.assert_close(merged[1][name], tensor, rtol=1e-4, atol=1e-5)


def test_the_same_command_gives_the_same_bytes_and_finishes_what_was_begun(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1)
    asked = Asked(a, b, (texts(tmp_path / "t.txt"),), dtype="bfloat16", max_shard_size="20KB")
    for name in ("one", "two"):
        merge_folders(asked, tmp_path / name, PleasConfig(budget=1.2))
    again = merge_folders(asked, tmp_path / "one", PleasConfig(budget=1.2))  # finished: nothing is done
    assert again == json.loads((tmp_path / "two" / "pleas.json").read_text())
    for path in sorted((tmp_path / "one").iterdir()):
        if path.name not in ("events.jsonl", ".lock", "run.json"):
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    shards = sorted((tmp_path / "one").glob("*.safetensors"))
    assert len(shards) > 1
    with safe_open(shards[0], "pt") as file:
        assert file.get_tensor(next(iter(file.keys()))).dtype == torch.bfloat16
    with pytest.raises(UsageError, match="begun with other arguments"):
        merge_folders(asked, tmp_path / "one", PleasConfig(budget=1.3))


def test_a_killed_merge_is_no_model_and_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.merge.pleas import models as pleas_models

    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1)
    asked = Asked(a, b, (texts(tmp_path / "t.txt"),))
    merge_folders(asked, tmp_path / "whole", PleasConfig())

    class Killed(BaseException):
        pass

    def killed(*_: object) -> str:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pleas_models, "_readme", killed)
        with pytest.raises(Killed):
            merge_folders(asked, tmp_path / "out", PleasConfig())
    assert not (tmp_path / "out" / "config.json").exists()
    merge_folders(asked, tmp_path / "out", PleasConfig())
    for name in ("model.safetensors", "config.json", "README.md", "pleas.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_full_disk_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.merge import writer

    def full(handle: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    a = save(tmp_path / "a")
    asked = Asked(a, a, (texts(tmp_path / "t.txt"),))
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_claim", full)
        with pytest.raises(OSError, match="No space left"):
            merge_folders(asked, tmp_path / "out", PleasConfig())
    assert not list((tmp_path / "out").glob("*.safetensors*")) and not (tmp_path / "out" / "config.json").exists()
    merge_folders(asked, tmp_path / "out", PleasConfig())  # with space again, the same call goes on
    assert (tmp_path / "out" / "config.json").exists()


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    a = save(tmp_path / "a")
    data = texts(tmp_path / "t.txt")
    wide = save(tmp_path / "wide", intermediate_size=64)
    with pytest.raises(UsageError, match="has the shape"):
        merge_folders(Asked(a, wide, (data,)), tmp_path / "out", PleasConfig())
    with pytest.raises(UsageError, match="gpt2|model_type"):
        merge_folders(Asked(a, save(tmp_path / "g", "gpt2"), (data,)), tmp_path / "out", PleasConfig())
    with pytest.raises(UsageError, match="leave heads out"):
        merge_folders(Asked(a, a, (data,)), tmp_path / "out", PleasConfig(heads="separate"))
    broken = save(tmp_path / "broken", seed=1)
    path = Path(broken) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.inf
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UsageError, match="not finite numbers, first in 'model.norm.weight'"):
        merge_folders(Asked(a, broken, (data,)), tmp_path / "out", PleasConfig())
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError, match="empty"):
        merge_folders(Asked(a, a, (tmp_path / "empty.txt",)), tmp_path / "out", PleasConfig())
    assert not (tmp_path / "out").exists()


def test_texts_are_read_in_three_forms(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "c.jsonl").write_text('{"prompt": "one"}\n{"prompt": [{"role": "user", "content": "two"}]}\n')
    assert read_texts(tmp_path / "a.txt") == read_texts(tmp_path / "b.jsonl") == ["one", "two"]
    assert read_texts(tmp_path / "c.jsonl")[1][0]["content"] == "two"
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(UsageError, match="d.jsonl:1"):
        read_texts(tmp_path / "d.jsonl")
