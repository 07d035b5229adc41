"""Which layers of which models make up the merged one: layer i of the output from layer j of each source of its slice.

    slices:
    - sources: [{model: A, layers: [0, 24]}]                                  layers 0..23 of A
    - sources: [{model: A, layers: [24, 32]}, {model: B, layers: [8, 16]}]    then these eight of A and of B, merged
      base: [24, 32]                                                          against these of the base (the first source's)
      weights: [0.7, 0.3]                                                     of this slice's sources
      options: {density: 0.5}                                                 over the recipe's own

Slices stand one after another. Tensors before the layers are merged as the first slice says, those after them as the last.
Layer ranges are [first, end): the end is not in. A slice's weights and options come before the recipe's; where their filters
do not fit a tensor, the recipe's do. A gradient runs over each slice's own layers, as in mergekit.

`mapped` says this of every tensor; without slices, every tensor has the same name everywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trimtab.errors import UsageError, unknown
from trimtab.merge.schedule import LAYER, at, depth_of, layer_of, lies_before

if TYPE_CHECKING:
    from trimtab.merge.recipe import Recipe
    from trimtab.merge.source import Source

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # configs' names for it


@dataclass(frozen=True)
class Slice:
    """A run of output layers. models[k]: the place of source k among the recipe's models; layers[k]: its [first, end)."""

    models: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]
    base: tuple[int, int]
    weights: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.layers[0][1] - self.layers[0][0]


@dataclass(frozen=True)
class Mapped:
    """One tensor of the output. names: what it is called in each model ("": the model takes no part); base_name: in the base.

    weights: one a model that takes part; options: the method's, those that no setting fits left out.
    """

    name: str
    names: tuple[str, ...]
    base_name: str
    weights: tuple[float, ...]
    options: dict[str, Any]

    def first(self, models: Sequence[Source], base: Source | None) -> tuple[Source, str]:
        """What the tensor is shaped after, and its name there: the base, or the first model that takes part."""
        if base is not None:
            return base, self.base_name
        return next((model, name) for model, name in zip(models, self.names, strict=True) if name)


def parse_slices(data: Any, models: Sequence[str]) -> tuple[Slice, ...]:
    """A recipe's `slices`. UsageError for a form that is none."""
    if not isinstance(data, Sequence) or isinstance(data, str) or not data:
        raise UsageError("'slices' is a list of {sources: [{model: A, layers: [0, 8]}]}")
    return tuple(_parse(one, models, f"slice {number}") for number, one in enumerate(data, 1))


def _parse(data: Any, models: Sequence[str], what: str) -> Slice:
    keys = ("sources", "base", "weights", "options")
    if not isinstance(data, Mapping) or not isinstance(data.get("sources"), Sequence) or not data["sources"]:
        raise UsageError(f"{what} needs 'sources', a list of {{model: A, layers: [0, 8]}}")
    for key in data:
        if key not in keys:
            raise unknown(f"key of {what}", str(key), keys)
    places, ranges = [], []
    for source in data["sources"]:
        if not isinstance(source, Mapping) or set(source) != {"model", "layers"}:
            raise UsageError(f"{what}: a source is {{model: A, layers: [0, 8]}}, not {source!r}")
        if source["model"] not in models:
            raise unknown(f"model in {what}", str(source["model"]), models)
        places.append(list(models).index(source["model"]))
        ranges.append(_range(source["layers"], what))
    if len(set(places)) < len(places):
        raise UsageError(f"{what} has one model twice: give it two names among 'models' (A and ./A)")
    base = _range(data["base"], what) if data.get("base") is not None else ranges[0]
    lengths = {end - first for first, end in [*ranges, base]}
    if len(lengths) > 1:
        raise UsageError(f"{what}: all its sources need as many layers, not {', '.join(map(str, sorted(lengths)))}")
    if not isinstance(data.get("options") or {}, Mapping):
        raise UsageError(f"{what}: options holds KEY: VALUE pairs, not {data['options']!r}")
    weights = data.get("weights")
    if isinstance(weights, (list, tuple)) and len(weights) != len(places):
        raise UsageError(f"{what}: {len(weights)} weights for {len(places)} sources")
    return Slice(tuple(places), tuple(ranges), base, weights, dict(data.get("options") or {}))


def _range(value: Any, what: str) -> tuple[int, int]:
    good = isinstance(value, (list, tuple)) and len(value) == 2
    if not good or not all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        raise UsageError(f"{what}: layers are [first, end], two whole numbers, not {value!r}")
    if not 0 <= value[0] < value[1]:
        raise UsageError(f"{what}: layers {list(value)} are none: the first is 0 or more, the end above it and not in")
    return value[0], value[1]


def mapped(recipe: Recipe, models: Sequence[Source], base: Source | None) -> list[Mapped]:
    """Every tensor of the output, by name. UsageError for layers that a model lacks, and for settings that are none."""
    like = base if base is not None else models[0]
    slices = recipe.parsed_slices()
    if not slices:
        count = layers_in(like.entries)
        everyone = range(len(models))
        return [
            _settled(recipe, None, name, dict.fromkeys(everyone, name), name, depth_of(name, count, recipe.depth))
            for name in sorted(like.entries)
        ]
    _check_ranges(slices, models, base)
    out = []
    for name in sorted(like.entries):
        if layer_of(name) is None:
            one = slices[0] if lies_before(name) else slices[-1]
            depth = depth_of(name, 1, recipe.depth)
            out.append(_settled(recipe, one, name, dict.fromkeys(one.models, name), name, depth))
    first = 0
    for one in slices:
        source = models[one.models[0]] if base is None else base
        begin = one.layers[0][0] if base is None else one.base[0]
        for place in range(one.length):
            for name in sorted(entry for entry in source.entries if layer_of(entry) == begin + place):
                names = {m: rename(name, low + place) for m, (low, _) in zip(one.models, one.layers, strict=True)}
                depth = depth_of(rename(name, place), one.length, recipe.depth)
                out.append(_settled(recipe, one, rename(name, first + place), names, name, depth))
        first += one.length
    return sorted(out, key=lambda found: found.name)


def misfits(found: Sequence[Mapped], models: Sequence[Source], base: Source | None) -> list[str]:
    """What is wrong with the sources of sliced tensors: one that is missing, or of another shape."""
    problems = []
    for one in found:
        like, its_name = one.first(models, base)
        wanted = like.entries.get(its_name)
        for source, name in [
            *zip(models, one.names, strict=True),
            *([(base, one.base_name)] if base is not None else []),
        ]:
            entry = source.entries.get(name) if name else wanted
            if entry is None:
                problems.append(f"{source.name!r} lacks the tensor {name!r}, which {one.name!r} is made of")
            elif wanted is not None and entry.shape != wanted.shape:
                problems.append(
                    f"{name!r} of {source.name!r} has the shape {entry.shape}, {its_name!r} of {like.name!r} {wanted.shape}"
                )
    return problems


def layers_in(names: Mapping[str, Any] | Sequence[str]) -> int:
    """How many layers the names of a model's tensors tell of, at least 1."""
    return 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=0)


def rename(name: str, layer: int) -> str:
    """The same tensor of another layer."""
    found = LAYER.search(name)
    return name if found is None else f"{name[: found.start(1)]}{layer}{name[found.end(1) :]}"


def sliced_config(config: Mapping[str, Any], slices: Sequence[Slice], based: bool) -> dict[str, Any]:
    """A model's config for as many layers as the slices have, its lists of one value a layer included.

    based: whether the config is the base's, whose layer ranges then say which of those values are taken.
    """
    out = dict(config)
    inner = out.get("text_config") if not any(key in out for key in LAYER_COUNTS) else None
    if isinstance(inner, Mapping):
        return {**out, "text_config": sliced_config(inner, slices, based)}
    taken = [layer for one in slices for layer in range(*(one.base if based else one.layers[0]))]
    before = next((out[key] for key in LAYER_COUNTS if key in out), None)
    for key in LAYER_COUNTS:
        if key in out:
            out[key] = len(taken)
    for key, value in out.items():
        if isinstance(value, list) and re.search("layer", key) and len(value) == before and max(taken) < len(value):
            out[key] = [value[layer] for layer in taken]
    return out


def _check_ranges(slices: Sequence[Slice], models: Sequence[Source], base: Source | None) -> None:
    for number, one in enumerate(slices, 1):
        ranges = [(models[m], layers) for m, layers in zip(one.models, one.layers, strict=True)]
        for source, (first, end) in [*ranges, *([(base, one.base)] if base is not None else [])]:
            count = layers_in(source.entries)
            if end > count:
                raise UsageError(f"slice {number}: layers [{first}, {end}] of {source.name!r}, which has {count}")


def weights_misfit(weights: int, models: int) -> UsageError:
    """The error of another number of weights than of models."""
    return UsageError(f"{weights} weights for {models} models: give one a model, or one for all of them")


def _settled(
    recipe: Recipe, one: Slice | None, name: str, names: Mapping[int, str], base_name: str, depth: float
) -> Mapped:
    """One tensor with its settings looked up. names: model -> the tensor's name there, in the slice's order."""
    everyone = range(len(recipe.models))
    all_names = [names.get(m, "") or name for m in everyone]
    shares = recipe.weights if isinstance(recipe.weights, (list, tuple)) else [recipe.weights] * len(everyone)
    if len(shares) != len(everyone):
        raise weights_misfit(len(shares), len(everyone))
    weights: list[float] = []
    for place, m in enumerate(names):
        own = None
        if one is not None and one.weights is not None:
            own = one.weights[place] if isinstance(one.weights, (list, tuple)) else one.weights
        found = at(own, names[m], depth, 1, "weights")
        found = at(shares[m], names[m], depth, 1, "weights") if found is None else found
        weights.append(1.0 if found is None else _number(found))
    options = {}
    for key, setting in recipe.options.items():
        value = at(setting, name, depth, len(everyone), key, all_names)
        options[key] = tuple(value[m] for m in names) if isinstance(value, tuple) else value
    for key, setting in (one.options if one is not None else {}).items():
        value = at(setting, name, depth, len(names), key, list(names.values()))
        options[key] = _first(value, options.get(key), len(names))
    return Mapped(
        name, tuple(names.get(m, "") for m in everyone), base_name, tuple(weights),
        {key: value for key, value in options.items() if _known(key, value)},
    )  # fmt: skip


def _first(value: Any, other: Any, parents: int) -> Any:
    """A slice's value, and where it has none for a parent, the recipe's."""
    if not isinstance(value, tuple):
        return other if value is None else value
    others = other if isinstance(other, tuple) else (other,) * parents
    return tuple(b if a is None else a for a, b in zip(value, others, strict=True))


def _known(key: str, value: Any) -> bool:
    if isinstance(value, tuple) and any(one is None for one in value):
        if all(one is None for one in value):
            return False
        raise UsageError(f"{key}: no filter fits a tensor for some of the models: give each a value without a filter")
    return value is not None


def _number(value: Any) -> float:
    try:
        if isinstance(value, (bool, tuple)) or not math.isfinite(float(value)):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"weights: {value!r} is no number") from None
