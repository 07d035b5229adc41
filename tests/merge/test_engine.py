"""Merging folders: the same bytes however the work is cut, nothing half-made, and what a user is told."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimtab.merge
from kill_harness import tree
from merge_folders import save
from trimtab import cli
from trimtab.errors import TrimtabError, UsageError
from trimtab.merge import engine, writer
from trimtab.merge.engine import finite, merge_tensor, run
from trimtab.merge.plan import make_plan
from trimtab.merge.recipe import Recipe

METHODS = {
    "linear": {},
    "ties": {"density": 0.4},
    "dare-ties": {"density": 0.5},
    "slerp": {"t": 0.3},
    "model-stock": {},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
}


def odd_tensors(seed: int, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Every kind of shape and dtype; with ties, so that their order matters; small changes of `like`."""
    chance = torch.Generator().manual_seed(seed)
    shapes = {
        "matrix": (67, 45), "wide": (3, 2000), "cube": (12, 9, 7), "vector": (301,), "number": (), "one": (1, 1),
        "row": (1, 50), "column": (50, 1), "no rows": (0, 5), "no columns": (5, 0), "half": (33, 11), "brain": (40, 21),
    }  # fmt: skip
    dtypes = {"half": torch.float16, "brain": torch.bfloat16}
    made = {}
    for name, shape in shapes.items():
        drawn = torch.randint(-8, 9, shape, generator=chance) / 16 + 0.01 * torch.randn(shape, generator=chance).round()
        found = drawn if like is None else like[name].float() + 0.1 * drawn
        made[name] = found.to(dtypes.get(name, torch.float32))
    return made | {"ids": torch.arange(6), "flags": torch.tensor([True, False])}


def write(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """base, one, two: folders of `odd_tensors`."""
    root = tmp_path_factory.mktemp("odd")
    base = odd_tensors(0)
    changed = {"one": odd_tensors(1, base), "two": odd_tensors(2, base)}
    return {name: write(root / name, tensors) for name, tensors in {"base": base, **changed}.items()}


def recipe_of(odd: Mapping[str, Path], method: str, **more: Any) -> Recipe:
    base = str(odd["base"]) if method not in ("linear",) else None
    weights = None if method in ("slerp", "model-stock") else [0.7, 0.4]
    return Recipe(method, (str(odd["one"]), str(odd["two"])), base, weights, METHODS[method], **more)


def result(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    """Bit for bit: -0.0 is not 0.0 here."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and tensor.shape == two[name].shape, name
        data = [each.contiguous().view(-1).view(torch.uint8) for each in (tensor, two[name])]
        assert torch.equal(*data), name


# The same bytes


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_folder_is_the_merge_in_memory_however_it_is_cut(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, odd: dict[str, Path], method: str
) -> None:
    """Bit for bit, for shards, threads, parts and order: that is what is promised, so nothing is allowed for rounding."""
    plan = make_plan(recipe_of(odd, method))
    parents = [load_file(odd[name] / "model.safetensors") for name in ("one", "two")]
    base = load_file(odd["base"] / "model.safetensors")
    wanted = {}
    for output in plan.outputs:
        name, like = output.name, base[output.name]
        if output.method is None or not like.numel():
            wanted[name] = like
            continue
        deltas = output.method.on_deltas(plan.base is not None)
        tensors = [parent[name].float() - like.float() if deltas else parent[name].float() for parent in parents]
        merged = output.method.merged(tensors, output.weights, name=name, embedding=output.embedding)
        wanted[name] = (like.float() + merged if deltas else merged).to(like.dtype)
    trees = []
    for number, (part, threads, size) in enumerate(
        [(1 << 18, 1, "5GB"), (1 << 18, 3, "4KB"), (1, 1, "5GB"), (7, 3, "5GB"), (500, 2, "10KB")]
    ):
        monkeypatch.setattr(engine, "PART", part)
        if number == 3:  # the other way round
            monkeypatch.setattr(engine, "sorted", lambda found, key: sorted(found, key=key)[::-1], raising=False)
        out = tmp_path / str(number)
        run(recipe_of(odd, method, max_shard_size=size), out, threads=threads)
        assert_same(result(out), wanted)
        trees.append({name: data for name, data in tree(out).items() if name not in ("run.json",)})
    weights = "model.safetensors"
    assert trees[0][weights] == trees[2][weights] == trees[3][weights]
    assert len(trees[1]) > len(trees[0]), "a small size of shards makes several"


def test_the_output_dtype_is_rounded_to_once(tmp_path: Path, odd: dict[str, Path]) -> None:
    run(recipe_of(odd, "linear"), tmp_path / "wide")
    run(recipe_of(odd, "linear", dtype="bfloat16"), tmp_path / "narrow")
    wide, narrow = result(tmp_path / "wide"), result(tmp_path / "narrow")
    for name in ("matrix", "cube", "number", "no rows"):
        assert narrow[name].dtype == torch.bfloat16 and torch.equal(narrow[name], wide[name].bfloat16())
    assert narrow["ids"].dtype == torch.int64


def test_float64_models_keep_all_of_their_digits(tmp_path: Path) -> None:
    chance = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(9, 7, generator=chance, dtype=torch.float64)}
    one, two = ({"w": base["w"] + 0.01 * torch.randn(9, 7, generator=chance, dtype=torch.float64)} for _ in range(2))
    folders = [write(tmp_path / str(i), tensors) for i, tensors in enumerate((base, one, two))]
    models = tuple(map(str, folders[1:]))
    run(Recipe("linear", models), tmp_path / "mean")
    # The same two operations as here, in float64: no more than the last digit may differ.
    assert float((result(tmp_path / "mean")["w"] - (one["w"] + two["w"]) / 2).abs().max()) < 1e-15
    run(Recipe("task-arithmetic", models, str(folders[0]), options={"scale": 0.0}), tmp_path / "base")
    assert torch.equal(result(tmp_path / "base")["w"], base["w"])


def test_what_is_written_loads_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    models = [str(save(tmp_path / name, seed)) for seed, name in enumerate(("a", "b"))]
    run(Recipe("linear", tuple(models), max_shard_size="50KB"), tmp_path / "out")
    assert len([*(tmp_path / "out").glob("*.safetensors")]) > 1
    loaded = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (*models, tmp_path / "out")]
    for name, tensor in loaded[2].items():
        torch.testing.assert_close(tensor, (loaded[0][name] + loaded[1][name]) / 2, rtol=0, atol=1e-7)


def test_paths_with_spaces_and_unicode(tmp_path: Path, odd: dict[str, Path]) -> None:
    root = tmp_path / "ein Ordner mit ü and 模型 'quotes'"
    moved = {name: write(root / f"{name} ·", load_file(path / "model.safetensors")) for name, path in odd.items()}
    run(recipe_of(odd, "ties"), tmp_path / "plain")
    run(recipe_of(moved, "ties"), root / "aus gabe")
    assert_same(result(root / "aus gabe"), result(tmp_path / "plain"))


# What was there before


class Crash(Exception):
    """Stands for a kill."""


def crash_before_publishing(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, out: Path) -> None:
    def crash(self: Any) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(writer.Shards, "publish", crash)
        with pytest.raises(Crash):
            run(recipe, out)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.99, "short", "empty", "header"])
def test_damaged_partial_files_are_noticed_and_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, odd: dict[str, Path], place: float | str
) -> None:
    recipe, out, told = recipe_of(odd, "ties", max_shard_size="8KB"), tmp_path / "out", []
    run(recipe, tmp_path / "whole")
    crash_before_publishing(monkeypatch, recipe, out)
    partial = max(out.glob("*.partial"), key=lambda path: path.stat().st_size)
    data = bytearray(partial.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    if isinstance(place, float):
        data[begin + int(place * (len(data) - begin))] ^= 4
    elif place == "header":
        data[20] ^= 4
    else:
        data = data[: len(data) - 9] if place == "short" else bytearray()
    partial.write_bytes(data)
    done = run(recipe, out, progress=told.append)
    assert tree(out) == tree(tmp_path / "whole")
    assert 0 < done.resumed_bytes < done.nbytes, "what is whole is not made again, what is damaged is"
    assert sum("not as they were written" in line for line in told) == 1


def test_a_finished_merge_is_left_alone_and_a_damaged_one_mended(tmp_path: Path, odd: dict[str, Path]) -> None:
    recipe, out = recipe_of(odd, "dare-ties", max_shard_size="8KB"), tmp_path / "out"
    run(recipe, out)
    whole = tree(out)
    shards = sorted(out.glob("*.safetensors"))
    stamps = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in [*shards, out / "config.json"]}
    done = run(recipe, out)
    assert done.resumed_bytes == done.nbytes and tree(out) == whole
    assert stamps == {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in stamps}
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-3])
    (out / "config.json").unlink()
    (out / "model.safetensors.index.json").write_text("{}")
    run(recipe, out)
    assert tree(out) == whole


def test_what_another_version_made_of_an_unfinished_merge_is_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, odd: dict[str, Path]
) -> None:
    recipe, out = recipe_of(odd, "linear"), tmp_path / "out"
    crash_before_publishing(monkeypatch, recipe, out)
    here = engine.environment()
    monkeypatch.setattr(engine, "environment", lambda: {**here, "trimtab": "another"})
    assert run(recipe, out).resumed_bytes == 0, "a model is not made half by one version and half by the next"
    monkeypatch.setattr(engine, "environment", lambda: here)
    done = run(recipe, out)
    assert done.resumed_bytes == done.nbytes, "what is finished is left alone"


def test_a_resumed_merge_with_renamed_shards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, odd: dict[str, Path]
) -> None:
    """Killed between two renames; and then one of the renamed is damaged too. None keeps its name while one is written."""
    recipe, out = recipe_of(odd, "linear", max_shard_size="8KB"), tmp_path / "out"
    run(recipe, tmp_path / "whole")
    crash_before_publishing(monkeypatch, recipe, out)
    partial = sorted(out.glob("*.partial"))
    for path in partial[:2]:
        path.rename(path.with_suffix(""))
    first = partial[0].with_suffix("")
    first.write_bytes(first.read_bytes()[:-1] + b"\xff")
    real, named = writer.Shards.write, []

    def write_(self: Any, *arguments: Any) -> None:
        named.append([*out.glob("*.safetensors")])
        real(self, *arguments)

    monkeypatch.setattr(writer.Shards, "write", write_)
    run(recipe, out)
    assert named and not any(named)
    assert tree(out) == tree(tmp_path / "whole")


def test_a_tensor_is_logged_only_once_its_bytes_are_on_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, odd: dict[str, Path]
) -> None:
    """No kill shows this, only a machine that loses power: so the order of the calls is looked at."""
    monkeypatch.setattr(engine, "SYNC_SECONDS", 0.0)
    monkeypatch.setattr(engine, "PART", 100)
    left, flushed, logged = set[str](), set[str](), list[str]()
    real_write, real_sync, real_event = writer.Shards.write, writer.Shards.sync, engine.RunDirectory.event

    def write_(self: Any, name: str, start: int, rows: Tensor) -> None:
        real_write(self, name, start, rows)
        flushed.discard(name)
        left.add(name)

    def sync(self: Any) -> None:
        before = {*left}
        real_sync(self)
        flushed.update(before)

    def event(self: Any, name: str, **more: Any) -> None:
        assert name != "merged" or more["sums"].keys() <= flushed
        logged.extend(more.get("sums", ()))
        real_event(self, name, **more)

    monkeypatch.setattr(writer.Shards, "write", write_)
    monkeypatch.setattr(writer.Shards, "sync", sync)
    monkeypatch.setattr(engine.RunDirectory, "event", event)
    run(recipe_of(odd, "linear"), tmp_path / "out")
    assert sorted(logged) == sorted(odd_tensors(0))


def test_another_recipe_in_the_same_folder_is_refused_and_nothing_changes(tmp_path: Path, odd: dict[str, Path]) -> None:
    run(recipe_of(odd, "linear"), tmp_path / "out")
    before = tree(tmp_path / "out", ignore=())
    with pytest.raises(UsageError, match="other arguments.*--out"):
        run(recipe_of(odd, "ties"), tmp_path / "out")
    assert tree(tmp_path / "out", ignore=()) == before


# What is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_weights_that_are_not_finite_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, odd: dict[str, Path], method: str, value: float
) -> None:
    monkeypatch.setattr(engine, "PART", 100)
    found = load_file(odd["two"] / "model.safetensors")
    for name, place in (("matrix", (-1, -1)), ("brain", (0, 0)), ("number", ())):
        changed = {**found, name: found[name].clone()}
        changed[name][place] = value
        bad = {**odd, "two": write(tmp_path / f"bad {name}", changed)}
        with pytest.raises(UsageError, match=f"(?s)not finite.*in 1 tensors.*bad {name}.*{name!r}"):
            run(recipe_of(bad, method), tmp_path / "out" / name)
        assert not (tmp_path / "out").exists(), "a refused merge must leave nothing, not even the folder above"


def test_every_tensor_that_is_not_finite_is_named(tmp_path: Path, odd: dict[str, Path]) -> None:
    found = load_file(odd["base"] / "model.safetensors")
    bad = {name: tensor * float("nan") if name in ("cube", "half") else tensor for name, tensor in found.items()}
    with pytest.raises(UsageError, match="(?s)in 2 tensors.*'cube'.*'half'"):
        run(recipe_of({**odd, "base": write(tmp_path / "bad", bad)}, "ties"), tmp_path / "out")


def test_what_float16_cannot_hold_is_named(tmp_path: Path, odd: dict[str, Path]) -> None:
    found = load_file(odd["one"] / "model.safetensors")
    large = {**odd, "one": write(tmp_path / "large", {**found, "wide": found["wide"] + 2e5})}
    with pytest.raises(UsageError, match="'wide' is not finite in float16: .*--dtype float32"):
        run(recipe_of(large, "linear", dtype="float16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(recipe_of(large, "linear", dtype="bfloat16"), tmp_path / "out")


@pytest.mark.parametrize("dtype", engine.INFINITY)
def test_finite_tells_every_value(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    good = torch.tensor([0.0, -0.0, 1.0, largest, -largest, torch.finfo(dtype).tiny], dtype=torch.float64).to(dtype)
    assert finite(good) and finite(good[:0]) and finite(good.view(2, 3).T) and finite(good[0])
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        assert not finite(torch.cat([good, torch.tensor([value], dtype=dtype)]))
        assert not finite(torch.tensor(value, dtype=dtype))


# What else goes wrong


def full_disk(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_is_one_sentence_and_leaves_no_model(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    odd: dict[str, Path],
    call: str,
) -> None:
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    run(recipe_of(odd, "linear"), earlier)
    run(recipe_of(odd, "linear"), tmp_path / "whole")
    before = tree(earlier, ignore=())
    words = [
        "merge",
        "linear",
        "--models",
        str(odd["one"]),
        str(odd["two"]),
        "--weights",
        "0.7",
        "0.4",
        "--out",
        str(out),
    ]
    real, left = getattr(os, call), {"posix_fallocate": 0, "pwrite": 5, "fsync": 3}[call]

    def filling(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        return full_disk() if left < 0 else real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, filling)
        assert cli.main(words) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"trimtab: the disk of {out} is full: free some space, and the same command continues"
    assert not [*out.glob("*.safetensors")] and not (out / "config.json").exists()
    assert bool([*out.glob("*.partial")]) == (call != "posix_fallocate"), "space that was claimed in vain is given back"
    with pytest.raises(UsageError):
        make_plan(Recipe("linear", (str(out),)))
    assert tree(earlier, ignore=()) == before
    assert cli.main(words) == 0
    assert_same(result(out), result(tmp_path / "whole"))


def test_too_little_space_is_told_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, odd: dict[str, Path]
) -> None:
    usage = engine.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(engine.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UsageError, match="the merged model takes .* MB left: free some, or give another --out"):
        run(recipe_of(odd, "linear"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_small_file_system_that_fills_up(tmp_path: Path, odd: dict[str, Path]) -> None:
    """A real one, where the test may mount it."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a small file system")
    try:
        with pytest.raises(UsageError, match="MB left"):
            run(recipe_of(odd, "linear"), small / "out")
        assert not [*small.iterdir()]
        (small / "filler").write_bytes(b"\1" * 20000)
        usage = engine.shutil.disk_usage(small)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(engine.shutil, "disk_usage", lambda path: usage._replace(free=1 << 40))
            with pytest.raises(TrimtabError, match="is full"):
                run(recipe_of(odd, "linear"), small / "out")
        assert (small / "filler").read_bytes() == b"\1" * 20000
        assert not [*(small / "out").glob("model*")]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_an_output_that_cannot_be_written_to(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, odd: dict[str, Path]
) -> None:
    words = ["merge", "linear", "--models", str(odd["one"]), str(odd["two"]), "--out"]
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/merged")):
        assert cli.main([*words, str(out)]) == 2
        said = capsys.readouterr().err
        assert str(out) in said and len(said.splitlines()) == 1, said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_method_that_fails_stops_the_others_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, odd: dict[str, Path]
) -> None:
    """The largest tensor comes first and fails; the rest must not be merged in vain, however late anyone looks."""
    monkeypatch.setattr(engine, "wait", lambda futures, **_: wait(futures))
    merged: list[str] = []
    real = trimtab.merge.Linear.merge

    def failing(self: Any, part: Any, found: Any) -> Tensor:
        merged.append(part.place.name)
        if part.place.name == "wide":
            raise UsageError("linear: not today")
        return real(self, part, found)

    monkeypatch.setattr(trimtab.merge.Linear, "merge", failing)
    with pytest.raises(UsageError, match="not today"):
        run(recipe_of(odd, "linear"), tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    assert len(merged) < 5, merged


def test_a_tensor_in_the_making_is_given_up_when_asked_to(odd: dict[str, Path]) -> None:
    plan = make_plan(recipe_of(odd, "ties"))
    stop = threading.Event()
    stop.set()
    with pytest.raises(engine._Stopped):
        next(merge_tensor(plan, next(one for one in plan.outputs if one.name == "matrix"), stop))


def test_whole_numbers_that_differ_are_told(tmp_path: Path, odd: dict[str, Path]) -> None:
    found = load_file(odd["two"] / "model.safetensors")
    other = {**odd, "two": write(tmp_path / "other", {**found, "ids": found["ids"] + 1})}
    done = run(recipe_of(other, "linear"), tmp_path / "out")
    assert [text for text in done.warnings if "'ids' (int64) differs between the models and is not merged" in text]
    assert torch.equal(result(tmp_path / "out")["ids"], torch.arange(6))
    assert not [text for text in run(recipe_of(odd, "linear"), tmp_path / "same").warnings if "ids" in text]


# What a user sees


def test_progress_is_told_once_a_second_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, odd: dict[str, Path]
) -> None:
    told: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(engine.time, "monotonic", lambda: 0.0)  # in no time, however busy the machine
        run(recipe_of(odd, "linear"), tmp_path / "quick", progress=told.append)
    assert len(told) == 1 and re.fullmatch(r"0\.0\d of 0\.0\d MB, \d+ MB/s", told[0]), told
    clock = iter(range(10_000))
    monkeypatch.setattr(engine.time, "monotonic", lambda: next(clock) / 4)

    def one_by_one(waiting: set[Any], timeout: float, return_when: str) -> tuple[set[Any], set[Any]]:
        # However many tensors the thread has finished by now: a busy machine hands over several at once.
        first = set(list(wait(waiting, return_when=return_when).done)[:1])
        return first, waiting - first

    monkeypatch.setattr(engine, "wait", one_by_one)
    told.clear()
    run(recipe_of(odd, "linear"), tmp_path / "slow", threads=1, progress=told.append)
    # Tensors without entries may come last, when nothing is left.
    assert all(re.fullmatch(r".* of .* MB, \d+ MB/s(, \d+ s left)?", line) for line in told[:-1]), told
    assert sum(" left" in line for line in told) >= 2, told
    assert " left" not in told[-1]


MEASURED = """
import sys
from trimtab import cli
code = cli.main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(code, int(peak.split()[1]) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_the_peak_is_far_below_the_model(tmp_path: Path, method: str) -> None:
    """200 MB, of which 64 MB are one tensor. The goal: twice the largest tensor and 300 MB (torch itself is 220)."""
    chance = torch.Generator().manual_seed(0)
    tensors = {"embed": torch.randn(16384, 1024, generator=chance)}
    tensors |= {f"layers.{i}.w": tensors["embed"][i * 512 : i * 512 + 2048].clone() for i in range(17)}
    one = write(tmp_path / "one", tensors)
    two = write(tmp_path / "two", {name: tensor.flip(0) for name, tensor in tensors.items()})
    words = ["merge", method, "--models", str(one), str(two), "--threads", "3", "--out", str(tmp_path / "out")]
    words += ["--base", str(one), "--density", "0.3"] if method == "ties" else []
    done = subprocess.run([sys.executable, "-c", MEASURED, *words], capture_output=True, text=True, timeout=200)
    code, peak = map(int, done.stdout.splitlines()[-1].split())
    largest = tensors["embed"].nbytes
    assert code == 0, done.stderr
    assert peak < 2 * largest + 300e6 and peak < 3 * largest * (3 + 1), f"{peak / 1e6:.0f} MB"
    assert peak < 400e6, f"{peak / 1e6:.0f} MB: parts, not tensors, are held"


def test_no_merge_is_written_into_a_parent(odd: dict[str, Path]) -> None:
    before = tree(odd["one"])
    for out in (odd["one"], odd["one"] / "merged"):
        with pytest.raises(UsageError, match="the folder of the model"):
            run(recipe_of(odd, "linear"), out)
    assert tree(odd["one"]) == before
