"""`trimtab merge align`: the permuted folder computes what B did, planted units come back, wrong input writes nothing."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import tiny_lm
from trimtab import LM, Sampling
from trimtab.cli import main
from trimtab.merge.align import run as align_run
from trimtab.merge.align.permutation import Group, Place, Spec, apply
from trimtab.merge.align.specs import model_spec
from trimtab.prompt.tuning import save


def permuted(source: Path, to: Path, residual: bool) -> None:
    """A copy of a folder with all its units in another order."""
    shutil.copytree(source, to)
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    spec = model_spec(config, {name: tuple(value.shape) for name, value in tensors.items()}, residual)
    moved = apply(spec, spec.random(torch.Generator().manual_seed(7)), tensors)
    save_file({name: value.contiguous() for name, value in moved.items()}, to / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("align")
    save(tiny_lm(), path / "a")
    permuted(path / "a", path / "shuffled", True)
    permuted(path / "a", path / "shuffled within", False)
    save(tiny_lm(seed=1), path / "other")
    own = LM.load(path / "a").generate(
        ["ba", "de", "fi", "go", "lu", "ma"], Sampling(max_new_tokens=30, samples=2, seed=0)
    )
    (path / "texts.txt").write_text("".join(f"{text}\n" for text in own.texts))  # which a, and so its copies, know best
    return path


def words(folder: Path, out: Path, *more: str, b: str = "shuffled") -> list[str]:
    return ["merge", "align", str(folder / "a"), str(folder / b), "--out", str(out), *more]


def logits(path: Path) -> torch.Tensor:
    model = LM.load(path).model
    with torch.no_grad():
        return model(torch.arange(4, 24)[None]).logits


@pytest.mark.parametrize(("b", "more"), [("shuffled", ["--residual"]), ("shuffled within", [])])
def test_a_shuffled_copy_comes_back_and_computes_what_it_did(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], b: str, more: list[str]
) -> None:
    out = tmp_path / "out put"
    assert main(words(folder, out, *more, b=b)) == 0
    said = capsys.readouterr()
    assert "L2 reduction" in said.out and f"--models {shlex.join([str(folder / 'a'), str(out)])} " in said.out
    a, found = load_file(folder / "a" / "model.safetensors"), load_file(out / "model.safetensors")
    assert a.keys() == found.keys() and all(torch.equal(value, found[name]) for name, value in a.items())
    assert torch.allclose(logits(out), logits(folder / b), atol=1e-4)  # sums in another order, float32
    orders = load_file(out / "permutations.safetensors")
    spec = Spec.from_dict(json.loads((out / "spec.json").read_text()))
    again = apply(spec, orders, load_file(folder / b / "model.safetensors"))
    assert all(torch.equal(value, found[name]) for name, value in again.items())
    assert not list(out.glob("*.partial"))


def test_the_loss_on_the_path_is_measured_and_drawn(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = ["--texts", str(folder / "texts.txt"), "--residual", "--points", "5", "--json", "-"]
    assert main(words(folder, out, *more)) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    (one,) = found["measurements"]
    rows = {row["label"]: row for row in one["table"]}
    assert found == json.loads((out / "align.json").read_text()) and one["name"] == "align"
    assert rows["loss barrier, before matching"]["value"] > 0.1  # a random model's units in another order
    assert rows["loss barrier, after matching"]["value"] == pytest.approx(0, abs=1e-5)
    assert rows["barrier lowered by"]["value"] == pytest.approx(1, abs=1e-3)
    assert rows["excess loss of the mean, after minus before"]["high"] < 0
    assert rows["L2 reduction"]["value"] == pytest.approx(1.0) and rows["R_0.3, after matching"][
        "value"
    ] == pytest.approx(1)
    assert rows["weighted R, after matching"]["value"] == pytest.approx(1.0) and one["unit"] == "text"
    assert rows["R_0.3, before matching"]["value"] < 0.5
    assert [len(one["details"]["paths"][key]["loss"]) for key in ("before", "after")] == [5, 5]
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 3 and "Loss on the straight path" in page and "What it does not mean" in page
    assert "shuffled onto a" in page and "the permuted B" in page


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "qwen3"])
def test_other_families_compute_what_they_did(tmp_path: Path, arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate("ab"):
        save(tiny_lm(arch, seed=seed), tmp_path / name)
    out = tmp_path / "out"
    assert main(["merge", "align", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out), "--residual"]) == 0
    assert torch.allclose(logits(out), logits(tmp_path / "b"), atol=1e-3)
    assert json.loads((out / "align.json").read_text())["measurements"][0]["details"]["identity"] is False


@pytest.mark.parametrize("method", ["am", "ste"])
def test_matching_by_texts(folder: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    more = ["--method", method, "--texts", str(folder / "texts.txt"), "--points", "3", "--steps", "3", "--json", "-"]
    assert main(words(folder, out, *more, b="shuffled within")) == 0
    rows = {row["label"]: row["value"] for row in json.loads(capsys.readouterr().out)["measurements"][0]["table"]}
    # Activations of a handful of texts: the same units, and so the same function; the weights are the shuffled ones.
    assert rows["L2 reduction"] > 0.99 and rows["loss barrier, after matching"] < 1e-3
    assert torch.allclose(logits(out), logits(folder / "shuffled within"), atol=1e-4)


def test_fine_tunes_of_one_base_are_told_so(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    near = tmp_path / "near"
    shutil.copytree(folder / "a", near)
    tensors = load_file(folder / "a" / "model.safetensors")
    save_file({name: value * 1.01 for name, value in tensors.items()}, near / "model.safetensors", {"format": "pt"})
    assert main(["merge", "align", str(folder / "a"), str(near), "--out", str(tmp_path / "out"), "--residual"]) == 0
    assert "identity: every unit is in its place already, so they share a base" in " ".join(
        capsys.readouterr().out.split()
    )
    assert json.loads((tmp_path / "out" / "align.json").read_text())["measurements"][0]["details"]["identity"] is True
    assert main(["merge", "align", str(folder / "a"), str(folder / "a"), "--out", str(tmp_path / "same")]) == 0
    assert "identity: the two models are equal" in capsys.readouterr().out


def test_a_path_that_gets_worse_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A spec of the user's own with which nothing helps: the warning comes from the paired interval alone."""
    found = align_run.Found(Spec(()), {}, {}, {}, {})
    from trimtab.merge.align.path import Path as LossPath
    from trimtab.merge.align.report import _paths

    for key, middle in (("before", 1.0), ("after", 2.0)):
        found.paths[key] = LossPath([0.0, 0.5, 1.0], {"loss": [0.0, middle, 0.0], "error": [0.0, 0.0, 0.0]})
        found.middle[key], found.taylor[key] = [middle + 0.01 * i for i in range(8)], None
        found.middle[key][0] += 0.1 * middle
    _paths(found, {})
    assert "matching made the path worse" in found.warnings[0]


def test_the_same_command_again_does_nothing_and_other_options_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(words(folder, out)) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in ("events.jsonl", ".lock")}
    with monkeypatch.context() as patched:
        patched.setattr(align_run, "_Work", lambda *args: pytest.fail("the work was done again"))
        assert main(words(folder, out)) == 0
    assert {name: (out / name).read_bytes() for name in before} == before
    assert main(words(folder, out, "--seed", "3")) == 2
    assert "was begun with other arguments (seed was 0, is now 3)" in capsys.readouterr().err


def test_a_killed_run_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(words(folder, one, "--residual")) == 0

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(align_run, "save", killed)  # after the weights, before everything else
        assert main(words(folder, two, "--residual")) == 130
    assert not (two / "config.json").exists()  # nothing loads it as a model
    assert main(words(folder, two, "--residual")) == 0
    for name in ("model.safetensors", "permutations.safetensors", "config.json", "spec.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def no_texts(folder: Path) -> list[str]:
    return ["--method", "am"]


def rotated(folder: Path) -> list[str]:
    return ["--query-key"]


def wrong_spec(folder: Path) -> list[str]:
    """Rows of q and k in another order, under rotary positions."""
    at = "model.layers.0.self_attn"
    places = [Place(f"{at}.q_proj.weight", 0), Place(f"{at}.q_proj.weight", 0, 8), Place(f"{at}.k_proj.weight", 0)]
    (folder / "wrong.json").write_text(json.dumps(Spec((Group("rotated", 8, tuple(places)),)).to_dict()))
    return ["--spec", str(folder / "wrong.json")]


def broken_spec(folder: Path) -> list[str]:
    (folder / "broken.json").write_text('{"groups": [{"name": "x"')
    return ["--spec", str(folder / "broken.json")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (no_texts, "--method am looks at what the models do: give --texts FILE"),
        (rotated, "they cannot be permuted; leave query_key out"),
        (wrong_spec, "the permutation spec is wrong: permuting 'rotated' changes what the network computes"),
        (broken_spec, "cannot be read as JSON"),
        (lambda folder: ["--residuals"], "did you mean '--residual'"),
        (lambda folder: ["--texts", "nowhere.txt"], "there is no file nowhere.txt"),
        (lambda folder: ["--points", "2"], "points must be 3 or more, not 2"),
        (lambda folder: ["--method", "best"], "method='best' is not one of wm, am, ste"),
        (lambda folder: ["--gamma", "2"], "gamma must be between 0 and 1"),
        (lambda folder: ["--max-shard-size", "big"], "is no size such as 5GB"),
    ],
)
def test_wrong_options_end_with_one_sentence_and_write_nothing(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: Callable[[Path], list[str]],
    said: str,
) -> None:
    out = tmp_path / "out"
    assert main(words(folder, out, *options(folder))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error and not out.exists()


def changed(folder: Path, to: Path, config: dict[str, Any], change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    shutil.copytree(folder / "a", to)
    found = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(found | config))
    tensors = load_file(folder / "a" / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})


def wider(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        if "embed" in name or "lm_head" in name:
            tensors[name] = torch.cat([tensors[name], tensors[name][:3]])


def a_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][0] = float("nan")


def one_less(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def test_adapters_and_parents_folders_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    for b, out, said in (
        (tmp_path / "lora", tmp_path / "out", "fold it first, trimtab merge linear --models"),
        (folder / "a", folder / "a" / "out", "lies in the folder of the model"),
    ):
        assert main(["merge", "align", str(folder / "a"), str(b), "--out", str(out)]) == 2
        assert said in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        ({}, wider, "'model.embed_tokens.weight' has the shape (59, 32)"),
        ({}, a_nan, "has weights that are not finite numbers, first in 'model.norm.weight'"),
        ({}, one_less, "lacks the tensor 'model.norm.weight' that the other has"),
        ({"num_attention_heads": 2}, lambda tensors: None, "num_attention_heads is 4"),
        ({"model_type": "mamba"}, lambda tensors: None, "model_type is llama in"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, Any],
    change: Callable[[dict[str, torch.Tensor]], None],
    said: str,
) -> None:
    changed(folder, tmp_path / "b", config, change)
    assert main(["merge", "align", str(folder / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_left_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert main(words(folder, tmp_path / "out")) == 2
    assert "holds something else (mine.txt)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_other_tokenizers_are_warned_of(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(folder, tmp_path / "b", {}, lambda tensors: None)
    path = tmp_path / "b" / "tokenizer.json"
    path.write_text(path.read_text().replace('"ba"', '"swapped"').replace('"bo"', '"ba"'))
    assert main(["merge", "align", str(folder / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 0
    assert "the two tokenizers differ" in " ".join(capsys.readouterr().out.split())
