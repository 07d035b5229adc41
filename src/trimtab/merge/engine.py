"""Carries out a merge: tensor by tensor, by rows, in threads; into a folder that is a model only when all of it is there.

    DIR/model*.safetensors     `.partial` until everything is on disk, then renamed, then the index
    DIR/events.jsonl           which tensors are on disk, with a sum of their bytes: what a resumed merge need not do again
    DIR/config.json            last: without it nothing loads the folder as a model

A tensor is worked on by one thread, with torch's own threads off, in parts that are the same whatever else runs. So the bytes
do not depend on threads, shards, order, or how often the merge was killed. Memory: a few parts of `PART` entries a thread, or
all of one tensor for the methods that need it whole.

The same command again checks what is there, byte by byte, and makes only what is missing or damaged.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trimtab.environment import environment
from trimtab.errors import TrimtabError, UsageError
from trimtab.merge.card import write_around
from trimtab.merge.checks import refuse_inside
from trimtab.merge.method import Part, Place
from trimtab.merge.plan import Output, Plan, make_plan
from trimtab.merge.recipe import Recipe
from trimtab.merge.source import MERGEABLE, Source
from trimtab.merge.writer import Shards, checksum
from trimtab.run import RunDirectory

PART = 1 << 18  # entries of a part, about
SYNC_BYTES, SYNC_SECONDS = 1 << 28, 2.0
MAKERS = ("trimtab", "commit", "torch", "machine")  # of the environment: what may change a tensor's bytes
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# The bits of infinity, by size and type: what is not finite has these or more, the sign aside.
INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000, torch.float64: 0x7FF0 << 48}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Merged:
    """A finished merge. resumed_bytes: how much of it an earlier, interrupted run had written."""

    path: Path
    tensors: int
    nbytes: int
    seconds: float
    resumed_bytes: int
    warnings: tuple[str, ...] = ()


def run(
    recipe: Recipe, out: str | Path, threads: int | None = None, progress: Progress | None = None, command: str = ""
) -> Merged:
    """Merges into the folder `out`; the same call finishes what a killed one began.

    threads: how many tensors at a time (None: one a core). Raises `UsageError` for anything wrong with the recipe or its
    parents before a byte is written, and for weights that are not finite, in a parent or as a result, with nothing left
    behind; `TrimtabError` where the disk is full: the same call continues once there is space. Tells the C library, for the
    whole process, to keep freed memory at hand (`_keep_memory`).
    """
    start = time.monotonic()
    refuse_inside(recipe.parents, out)
    plan = make_plan(recipe)
    plan.warnings += _not_merged(plan)
    _keep_memory()
    try:
        with RunDirectory.open(out, "merge", recipe.to_dict(), plan.inputs) as folder:
            done = _Merge(plan, folder, threads or os.cpu_count() or 1, progress).run()
            if not folder.events("finished") or not all(folder.done(row["key"]) for row in folder.events("saved")):
                write_around(plan, folder, command)
                folder.event("finished", warnings=plan.warnings)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise TrimtabError(f"the disk of {out} is full: free some space, and the same command continues") from error
    return Merged(Path(out), len(plan.outputs), plan.nbytes, time.monotonic() - start, done, tuple(plan.warnings))


class _NotFinite(UsageError):
    """NaN or infinity, in a parent or in the result."""


class _Stopped(Exception):
    """Another tensor has failed, or the user has."""


class _Merge:
    def __init__(self, plan: Plan, folder: RunDirectory, threads: int, progress: Progress | None) -> None:
        self.plan, self.folder, self.threads, self.progress = plan, folder, threads, progress
        self.shards = Shards(folder.path, {one.name: one.entry for one in plan.outputs}, plan.recipe.shard_bytes)
        self.stop = threading.Event()
        here = environment()
        self.made_by = {name: here[name] for name in MAKERS}
        self.start = self.told = self.synced = time.monotonic()
        self.written = 0

    def run(self) -> int:
        """Merges what is not on disk yet; returns the bytes that were."""
        free = shutil.disk_usage(self.folder.path).free
        there = sum(path.stat().st_blocks * 512 for path in self.folder.path.glob("model*.safetensors*"))
        if self.plan.nbytes > free + there:
            raise UsageError(
                f"the merged model takes {self.plan.nbytes / 1e6:,.1f} MB and {self.folder.path} has "
                f"{(free + there) / 1e6:,.1f} MB left: free some, or give another --out"
            )
        torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self._open()
            known = self._known()
            todo = [one for one in self.plan.outputs if one.name not in known]
            resumed = self.plan.nbytes - sum(one.entry.nbytes for one in todo)
            if todo:
                self.shards.withdraw()
            self._work(todo, resumed)
            self.shards.publish()
        except UsageError as error:
            # It would end so again: nothing is kept for another attempt.
            self.shards.discard()
            raise UsageError(self._all_not_finite(error)) if isinstance(error, _NotFinite) else error from error
        finally:
            torch.set_num_threads(torch_threads)
            self.shards.close()
        return resumed

    def _open(self) -> None:
        try:
            self.shards.open()
        except OSError as error:
            if error.errno in DISK_FULL:  # while their space was claimed: there is nothing in them yet
                self.shards.discard()
            raise

    def _all_not_finite(self, error: _NotFinite) -> str:
        """Every tensor of a parent that is not finite, once one has been met; or what the error says of the result."""
        plan = self.plan
        found = [
            f"{source.name!r} in {name!r}"
            for source in dict.fromkeys(plan.parents)
            for name, entry in source.entries.items()
            if entry.dtype in MERGEABLE and not _finite_source(source, name)
        ]
        if not found:
            return str(error)
        return f"weights that are not finite numbers, in {len(found)} tensors: {', '.join(found[:20])}: repair or leave out"

    def _known(self) -> set[str]:
        """Tensors that an interrupted run has put on disk and that are still as it left them.

        Those of an unfinished merge by another version count for nothing: one model is not made in two ways.
        """
        finished, rows = self.folder.events("finished"), self.folder.events("merged")
        same = [row for row in rows if finished or row.get("made_by") == self.made_by]
        sums = {name: total for row in same for name, total in row["sums"].items()}
        sums = {name: total for name, total in sums.items() if name in self.shards.entries}
        damaged = [name for name, total in sums.items() if self.shards.checksum(name) != int(total)]
        if damaged and self.progress is not None:
            self.progress(f"{len(damaged)} tensors are not as they were written, first {damaged[0]}: made again")
        return set(sums) - set(damaged)

    def _work(self, todo: list[Output], resumed: int) -> None:
        # The largest first: the last to finish is then a small one.
        todo = sorted(todo, key=lambda one: (-one.entry.nbytes, one.name))
        total = sum(one.entry.nbytes for one in todo)
        sums: dict[str, str] = {}
        with ThreadPoolExecutor(self.threads) as pool:
            waiting: set[Future[tuple[str, int]]] = {pool.submit(self._one, one) for one in todo}
            try:
                while waiting:
                    finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                    failed = None
                    for future in finished:
                        error = future.exception()
                        if error is None:
                            name, summed = future.result()
                            sums[name] = str(summed)
                            self.written += self.shards.entries[name].nbytes
                        elif not isinstance(error, _Stopped):  # what stopped those is among them, or still to come
                            failed = error
                    if failed is not None:
                        raise failed
                    self._tell(total, resumed, last=not waiting)
                    sums = self._save(sums, last=not waiting)
            except BaseException as error:
                self.stop.set()
                for future in waiting:
                    future.cancel()
                if not isinstance(error, (UsageError, OSError)):
                    self._save(sums, last=True)  # the same command goes on from here
                raise

    def _save(self, sums: dict[str, str], last: bool) -> dict[str, str]:
        """Logs the finished tensors, after their bytes are on disk; now and then, since waiting for the disk takes time."""
        size = sum(self.shards.entries[name].nbytes for name in sums)
        if not sums or not (last or size > SYNC_BYTES or time.monotonic() - self.synced > SYNC_SECONDS):
            return sums
        self.shards.sync()
        self.folder.event("merged", made_by=self.made_by, sums=sums)
        self.synced = time.monotonic()
        return {}

    def _tell(self, total: int, resumed: int, last: bool) -> None:
        now = time.monotonic()
        if self.progress is None or (now - self.told < 1 and not last):
            return
        self.told = now
        rate = self.written / max(now - self.start, 1e-9)
        left = f", {(total - self.written) / rate:.0f} s left" if 0 < self.written < total else ""
        unit, letter = (1e9, "G") if resumed + total >= 1e9 else (1e6, "M")
        done, whole = (resumed + self.written) / unit, (resumed + total) / unit
        self.progress(f"{done:.2f} of {whole:.2f} {letter}B, {rate / 1e6:.0f} MB/s{left}")

    def _one(self, output: Output) -> tuple[str, int]:
        """Merges one tensor into its place in its file; returns its name and the sum of its bytes."""
        summed = 0
        try:
            for row, rows in merge_tensor(self.plan, output, self.stop):
                self.shards.write(output.name, row, rows)
                summed += checksum(rows)
        except BaseException:
            self.stop.set()  # at once: the others would work on in vain until the main thread looks
            raise
        return output.name, summed % (1 << 64)


def merge_tensor(plan: Plan, output: Output, stop: threading.Event | None = None) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of one merged tensor, in the output's dtype; gives up when `stop` is set.

    UsageError for values that are not finite.
    """
    method = output.method
    if method is None or not output.entry.numel:
        source, name = _holders(plan, output)[0]
        yield 0, source.read(name).to(output.entry.dtype)
        return
    place = Place(output.name, output.entry.shape, output.weights, plan.recipe.seed, output.embedding)
    work = plan.work_dtype(output)
    deltas = method.on_deltas(plan.base is not None)

    checked: set[int] = set()  # parts that were finite: not looked at again in later passes

    def pieces() -> Iterator[tuple[int, Part, Tensor | None]]:
        for start, end in _rows(place.shape, method.whole(place)):
            if stop is not None and stop.is_set():
                raise _Stopped
            check = start not in checked
            base = None
            if deltas:
                assert plan.base is not None
                base = _read(plan.base, output.base_name, start, end, work, check)
            tensors = [
                _read(model, name, start, end, work, check)
                for model, name in zip(plan.models, output.names, strict=True)
                if name  # a model that has no layer in this slice has none
            ]
            checked.add(start)
            if base is not None:
                for tensor in tensors:
                    tensor.sub_(base)
            yield (
                start,
                Part(place, start * (place.numel // max(place.shape[0], 1) if place.shape else 1), tensors),
                base,
            )

    found = method.survey(lambda: (part for _, part, _ in pieces()))
    for start, part, base in pieces():
        merged = method.merge(part, found)
        if base is not None:
            merged = merged.add_(base)
        rows = merged.to(output.entry.dtype)
        if not finite(rows):
            raise _NotFinite(
                f"the merged {output.name!r} is not finite in {_called(output.entry.dtype)}: give smaller --weights, or "
                "--dtype float32"
            )
        yield start, rows


def finite(tensor: Tensor) -> bool:
    """Whether all values are finite, from their bits: infinity and NaN come above all else, either sign by itself."""
    if not tensor.numel():
        return True
    size = tensor.dtype.itemsize
    bits = tensor.contiguous().view(-1).view((torch.int16, torch.int32, torch.int64)[size // 4]).numpy()
    infinity = INFINITY[tensor.dtype]
    return bool(bits.max() < infinity and bits.view(f"u{size}").max() < infinity | 1 << (8 * size - 1))


def _read(source: Source, name: str, start: int, end: int, work: torch.dtype, check: bool) -> Tensor:
    tensor = source.read(name, start, end)
    if check and not finite(tensor):
        raise _NotFinite(f"the model {source.name!r} has weights that are not finite numbers, first in {name!r}")
    return tensor.to(work)


def _holders(plan: Plan, output: Output) -> list[tuple[Source, str]]:
    """Who has a tensor and what they call it: the base first."""
    base = [(plan.base, output.base_name)] if plan.base is not None else []
    return [*base, *((model, name) for model, name in zip(plan.models, output.names, strict=True) if name)]


def _not_merged(plan: Plan) -> list[str]:
    """Warnings of tensors of whole numbers that differ between the parents: there is no mean of them."""
    found = []
    for output in (one for one in plan.outputs if one.method is None):
        (first, name), *others = _holders(plan, output)
        if any(not torch.equal(first.read(name), source.read(its)) for source, its in others):
            found.append(
                f"{output.name!r} ({_called(output.entry.dtype)}) differs between the models and is not merged: it is that "
                f"of {first.name!r}"
            )
    return found


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _keep_memory() -> None:
    """Has glibc reuse freed memory instead of handing it back after every part: page faults were a third of the CPU time."""
    if hasattr(os, "confstr") and "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or ""):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at the most it may be
        libc.mallopt(-1, 1 << 28)  # M_TRIM_THRESHOLD


def _finite_source(source: Source, name: str) -> bool:
    return all(finite(source.read(name, start, stop)) for start, stop in _rows(source.entries[name].shape, False))


def _rows(shape: tuple[int, ...], whole: bool) -> Iterator[tuple[int, int]]:
    if not shape or whole:
        yield 0, shape[0] if shape else 1
        return
    row = max(1, int(torch.Size(shape[1:]).numel()))
    unit = 8 // math.gcd(8, row)  # rows whose bytes are whole 64-bit words: sums of parts then add up
    step = max(1, PART // row // unit) * unit
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
