"""How the changes of several fine-tunes lie: lengths, angles, signs; tensor by tensor, then by module and by layer.

With a base, of the changes d_t = m_t - b; without one, of the weights m_t themselves. Per tensor, all of it, in float64:

    norm        |d_t|, and relative to |b|
    cosine      <d_i, d_j> / |d_i| |d_j| of each pair
    changed     share of entries with d_t != 0 (density)
    conflict    of the entries that two or more models change, the share where they disagree in sign
    cancelled   1 - sum |sum_t d_t| / sum sum_t |d_t|: how much of the change a plain sum loses to itself
    kept        of the merged model M: share of entries with M != b; <M - b, d_t> / |d_t|^2, how much of each change is in it

Figures add up: those of a module or a layer are of all its tensors' entries taken as one vector, not means of figures.

Cost: every model is read once, in parts of `PART` entries a thread; T^2 operations an entry.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from trimtab.merge.schedule import layer_of, lies_before
from trimtab.merge.source import MERGEABLE, Source

PART = 1 << 17
Progress = Callable[[str], None]


@dataclass
class Figures:
    """Sums over entries, of which every figure is made. models: how many; based: whether there is a base.

    gram: [n, n] float64, inner products of the models' vectors, then the base's, then the merged model's, where there are.
    """

    models: int
    based: bool
    merged: bool
    entries: int
    gram: Tensor
    changed: Tensor  # [models] int64
    shared: int = 0
    conflicts: int = 0
    moved: float = 0.0
    net: float = 0.0
    kept: int = 0

    def __add__(self, other: Figures) -> Figures:
        return Figures(
            self.models, self.based, self.merged, self.entries + other.entries, self.gram + other.gram,
            self.changed + other.changed, self.shared + other.shared, self.conflicts + other.conflicts,
            self.moved + other.moved, self.net + other.net, self.kept + other.kept,
        )  # fmt: skip

    def norm(self, model: int) -> float:
        return float(self.gram[model, model].clamp_min(0).sqrt())

    def relative(self, model: int) -> float | None:
        """|d_t| / |b|. None without a base, or where it is zero."""
        return _ratio(self.norm(model), self.norm(self.models)) if self.based else None

    def cosine(self, a: int, b: int) -> float | None:
        """Of two models' changes (weights, without a base). None where one is zero."""
        return _ratio(float(self.gram[a, b]), self.norm(a) * self.norm(b))

    def weight_cosine(self, a: int, b: int) -> float | None:
        """Of two models' weights, whether or not there is a base; its own index is that of the base."""
        g, base = self.gram, self.models
        if not self.based:
            return self.cosine(a, b)

        def dot(i: int, j: int) -> float:
            return float(sum(g[p, q] for p in {i, base} for q in {j, base}))  # m = d + b; the base itself is i = base

        return _ratio(dot(a, b), (max(dot(a, a), 0.0) * max(dot(b, b), 0.0)) ** 0.5)

    def mean_cosine(self) -> float | None:
        found = [c for a, b in combinations(range(self.models), 2) if (c := self.cosine(a, b)) is not None]
        return sum(found) / len(found) if found else None

    @property
    def conflict(self) -> float | None:
        return _ratio(self.conflicts, self.shared)

    @property
    def cancelled(self) -> float | None:
        left = _ratio(self.net, self.moved)
        return None if left is None else max(0.0, 1.0 - left)

    def kept_of(self, model: int) -> float | None:
        """How much of a model's change is in the merged one: 1 all of it, 0 nothing, below 0 its reverse."""
        return _ratio(float(self.gram[-1, model]), float(self.gram[model, model])) if self.merged else None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; None where a figure is not defined."""
        everyone = range(self.models)
        out: dict[str, Any] = {
            "entries": self.entries,
            "norm": [self.norm(t) for t in everyone],
            "relative_norm": [self.relative(t) for t in everyone],
            "changed": [_ratio(int(self.changed[t]), self.entries) for t in everyone],
            "cosine": {f"{a},{b}": self.cosine(a, b) for a, b in combinations(everyone, 2)},
            "weight_cosine": {f"{a},{b}": self.weight_cosine(a, b) for a, b in combinations(everyone, 2)},
            "shared": _ratio(self.shared, self.entries),
            "sign_conflict": self.conflict,
            "cancelled": self.cancelled,
        }
        if self.merged:
            out["merged"] = {
                "norm": self.norm(-1),
                "kept_density": _ratio(self.kept, self.entries),
                "kept_of": [self.kept_of(t) for t in everyone],
            }
        return out


@dataclass(frozen=True)
class TensorFigures:
    """One tensor's figures. layer: None outside of layers. matrix: it has two axes or more.

    Of a merge: notes, what the method said of it; settings, the weights and options it was merged with.
    """

    name: str
    module: str
    layer: int | None
    matrix: bool
    figures: Figures
    notes: dict[str, float | str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Geometry:
    """All tensors of a comparison. models: names; not_finite: tensors left out because some model's is NaN or infinite."""

    models: list[str]
    base: str | None
    tensors: list[TensorFigures]
    not_finite: list[str] = field(default_factory=list)

    def total(self, wanted: Callable[[TensorFigures], bool] = lambda one: True) -> Figures | None:
        """The figures of some tensors taken as one vector. None where there are none."""
        found = [one.figures for one in self.tensors if wanted(one)]
        return sum(found[1:], found[0]) if found else None

    def modules(self) -> dict[str, Figures]:
        """Kind of module -> figures, in the order in which a model has them."""
        return self._grouped(lambda one: one.module)

    def layers(self) -> dict[str, Figures]:
        """ "before", "0", "1", ..., "after" -> figures."""
        return self._grouped(place)

    def cells(self) -> dict[tuple[str, str], Figures]:
        """(layer, module) -> figures."""
        return self._grouped(lambda one: (place(one), one.module))

    def _grouped(self, key: Callable[[TensorFigures], Any]) -> dict[Any, Figures]:
        out: dict[Any, Figures] = {}
        for one in sorted(self.tensors, key=_order):
            out[key(one)] = out[key(one)] + one.figures if key(one) in out else one.figures
        return out


def place(one: TensorFigures) -> str:
    """The layer's number as text, or where a tensor outside of layers lies."""
    return str(one.layer) if one.layer is not None else "before" if lies_before(one.name) else "after"


def module_of(name: str) -> str:
    """The kind of module that a tensor belongs to: its name without layer, numbers of experts, and weight or bias."""
    layer = layer_of(name)
    rest = re.split(rf"(?:^|\.){layer}\.", name, maxsplit=1)[1] if layer is not None else name
    parts = [part for part in rest.split(".") if not part.isdigit()]
    parts = parts[:-1] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts
    return ".".join(parts[-2:] if layer is not None else parts[-1:])


def measure(
    models: Sequence[Source],
    base: Source | None = None,
    names: Iterable[tuple[str, Sequence[str], str]] | None = None,
    merged: Source | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Geometry:
    """The geometry of models, and of the model merged from them if given.

    names: (name in the merged model, names in the models, name in the base); None: tensors that all have, in one shape.
    """
    todo = list(common(models, base) if names is None else names)
    out = Geometry([model.name for model in models], None if base is None else base.name, [])
    everything = [*models, *([base] if base is not None else [])]
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            jobs = [
                pool.submit(
                    _figures,
                    [*zip(everything, [*its, *([its_base] if base is not None else [])], strict=True)],
                    None if merged is None else (merged, name),
                    base is not None,
                )
                for name, its, its_base in todo
            ]
            try:
                for number, ((name, its, _), job) in enumerate(zip(todo, jobs, strict=True), 1):
                    found = job.result()
                    if found is None:
                        out.not_finite.append(name)
                    else:
                        out.tensors.append(
                            TensorFigures(
                                name,
                                module_of(name),
                                layer_of(name),
                                len(everything[0].entries[its[0]].shape) > 1,
                                found,
                            )
                        )
                    if progress is not None and (number % 50 == 0 or number == len(todo)):
                        progress(f"{number} of {len(todo)} tensors looked at")
            except BaseException:
                for job in jobs:
                    job.cancel()
                raise
    finally:
        torch.set_num_threads(torch_threads)
    return out


def common(models: Sequence[Source], base: Source | None) -> Iterator[tuple[str, list[str], str]]:
    """The tensors of numbers that all have in one shape, as `measure` takes them."""
    first, *others = [*models, *([base] if base is not None else [])]
    for name in sorted(first.entries):
        entry = first.entries[name]
        if entry.dtype in MERGEABLE and all(
            name in one.entries and one.entries[name].shape == entry.shape and one.entries[name].dtype in MERGEABLE
            for one in others
        ):
            yield name, [name] * len(models), name


def _figures(sources: list[tuple[Source, str]], merged: tuple[Source, str] | None, based: bool) -> Figures | None:
    """One tensor's sums; the base comes last among the sources. None where a value is not finite."""
    total: Figures | None = None
    first, name = sources[0]
    for start, stop in steps(first.entries[name].shape):
        rows = [source.read(its, start, stop).double().flatten() for source, its in sources]
        base = rows.pop() if based else None
        changes = rows if base is None else [row.sub_(base) for row in rows]
        extra = [] if base is None else [base]
        if merged is not None:
            result = merged[0].read(merged[1], start, stop).double().flatten()
            extra.append(result if base is None else result.sub_(base))
        found = _sums(torch.stack(changes), torch.stack(extra) if extra else None, based, merged is not None)
        total = found if total is None else total + found
    assert total is not None  # a tensor has a part
    return total if bool(torch.isfinite(total.gram).all()) else None


def _sums(changes: Tensor, extra: Tensor | None, based: bool, merged: bool) -> Figures:
    """changes: [models, entries]; extra: the base and the merged model's change, as far as there are."""
    every = changes if extra is None else torch.cat([changes, extra])
    up, down = (changes > 0), (changes < 0)
    ups, downs = up.sum(0), down.sum(0)
    shared = ups + downs >= 2
    return Figures(
        len(changes),
        based,
        merged,
        changes.shape[1],
        every @ every.T,
        up.sum(1) + down.sum(1),
        int(shared.sum()),
        int(((ups > 0) & (downs > 0)).sum()),
        float(changes.abs().sum()),
        float(changes.sum(0).abs().sum()),
        int((every[-1] != 0).sum()) if merged else 0,
    )


def steps(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Runs of rows of some `PART` entries each: (first, end)."""
    if not shape:
        yield 0, 1
        return
    step = max(1, PART // max(1, int(torch.Size(shape[1:]).numel())))
    for start in range(0, max(shape[0], 1), step):
        yield start, min(start + step, shape[0])


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def _order(one: TensorFigures) -> tuple[int, int, str]:
    where = place(one)
    return ({"before": 0, "after": 2}.get(where, 1), one.layer or 0, one.name)
