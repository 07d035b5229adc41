"""The pieces of mergekit's configuration form: methods and their parameters, sources, settings, models. See `mergekit.py`."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import UsageError, unknown

METHODS = {
    "linear": "linear",
    "slerp": "slerp",
    "nuslerp": "nuslerp",
    "karcher": "karcher",
    "model_stock": "model-stock",
    "task_arithmetic": "task-arithmetic",
    "ties": "ties",
    "dare_linear": "dare",
    "dare_ties": "dare-ties",
    "della": "della",
    "della_linear": "della-linear",
    "breadcrumbs": "breadcrumbs",
    "breadcrumbs_ties": "breadcrumbs-ties",
    "sce": "sce",
    "passthrough": "linear",
}
OTHERS = ("arcee_fusion", "multislerp", "nearswap", "ram", "ramplus_tl")

SPARSE = ("dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties")
DELTAS = ("task_arithmetic", "ties", *SPARSE)
# What each method reads, for all models together and for each model.
SHARED: dict[str, tuple[str, ...]] = {
    "linear": ("normalize",),
    "slerp": ("t",),
    "nuslerp": ("nuslerp_flatten", "nuslerp_row_wise"),
    "karcher": ("max_iter", "tol"),
    "model_stock": ("filter_wise",),
    "sce": ("select_topk", "int8_mask"),
    "passthrough": (),
    **dict.fromkeys(DELTAS, ("normalize", "lambda", "rescale", "int8_mask")),
}
EACH: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(METHODS, ()),
    **dict.fromkeys(("linear", "nuslerp"), ("weight",)),
    **dict.fromkeys(DELTAS, ("weight", "density")),
    **dict.fromkeys(("breadcrumbs", "breadcrumbs_ties"), ("weight", "density", "gamma")),
    **dict.fromkeys(("della", "della_linear"), ("weight", "density", "epsilon")),
    "passthrough": ("scale",),
}
OURS = {"lambda": "scale", "nuslerp_flatten": "flatten", "nuslerp_row_wise": "row_wise"}
TOP = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One entry of `models`, or one source of a slice. layers: its layer_range; None among models."""

    model: str
    parameters: Mapping[str, Any]
    layers: list[int] | None


@dataclass(frozen=True)
class Slice:
    """Sources that are merged with one another; all of `models` are one slice."""

    sources: list[Source]
    parameters: Mapping[str, Any]


def method_of(data: Mapping[str, Any]) -> str:
    """merge_method, of those that there are here."""
    theirs = data.get("merge_method")
    if not isinstance(theirs, str):
        raise UsageError("a mergekit configuration needs merge_method")
    if theirs in OTHERS:
        raise UsageError(f"merge_method {theirs} is not supported (supported: {', '.join(METHODS)})")
    if theirs not in METHODS:
        raise unknown("merge_method", str(theirs), METHODS)
    return theirs


def slice_of(data: Any, what: str, theirs: str, base: str | None) -> Slice:
    """An entry of `slices`. what: how messages call it; theirs: the method, by mergekit's name."""
    if not isinstance(data, Mapping):
        raise UsageError(f"{what} is {{sources: [...]}}, not {data!r}")
    check_keys(data, ("sources", "base_model", "residual_weight", "parameters"), f"key of {what}")
    if data.get("base_model") is not None and model_of(data["base_model"], what) != base:
        raise UsageError(f"{what}: a base_model of its own is not supported: one for all slices")
    if data.get("residual_weight") is not None:
        raise UsageError(f"{what}: residual_weight is not supported (mergekit does nothing with it): leave it out")
    sources = [
        source_of(one, f"{what}, source {n}", theirs, True) for n, one in enumerate(list_of(data, "sources", what), 1)
    ]
    return Slice(sources, parameters_of(data, what, theirs))


def source_of(data: Any, what: str, theirs: str, sliced: bool) -> Source:
    """An entry of `models`, or of a slice's `sources`."""
    if not isinstance(data, Mapping) or data.get("model") is None:
        raise UsageError(f"{what} is {{model: FOLDER}}, with parameters if need be, not {data!r}")
    check_keys(data, ("model", "parameters", *(("layer_range",) if sliced else ())), f"key of {what}")
    layers = data.get("layer_range")
    if sliced and not (isinstance(layers, list) and len(layers) == 2):
        raise UsageError(f"{what} needs layer_range: [first, end], not {layers!r}")
    parameters = parameters_of(data, what, theirs)
    for key in parameters:
        if key not in EACH[theirs]:
            raise UsageError(
                f"{what}: {key} is not a parameter of one model for {theirs} (mergekit passes over it): give it under the "
                "parameters of the whole or of a slice"
            )
    return Source(model_of(data["model"], what), parameters, layers)


def parameters_of(data: Mapping[str, Any], what: str, theirs: str) -> Mapping[str, Any]:
    """`parameters`, whose keys the method has, each in our form."""
    found = data.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise UsageError(f"{what}: parameters holds KEY: VALUE pairs, not {found!r}")
    own = {*SHARED[theirs], *EACH[theirs]}
    for key in found:
        if key in own:
            continue
        elsewhere = any(key in group[name] for group in (SHARED, EACH) for name in METHODS)
        if elsewhere:
            raise UsageError(f"{what}: {theirs} has no parameter {key} (mergekit passes over it): leave it out")
        raise unknown(f"parameter of {theirs}", str(key), own)
    return {str(key): setting_of(value, f"{what}: {key}") for key, value in found.items() if value is not None}


def setting_of(value: Any, what: str) -> Any:
    """A parameter's value in our form, which is the same but for a filter outside of a list."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list):
        if not value:
            raise UsageError(f"{what} is an empty list")
        rules = [isinstance(one, Mapping) for one in value]
        if any(rules) and not all(rules):
            raise UsageError(
                f"{what}: {value!r} mixes filters and values: a last {{value: ...}} is for all other tensors"
            )
        for one in value if all(rules) else ():
            check_keys(one, ("filter", "value"), f"key of a filter in {what}")
            if one.get("value") is None:
                raise UsageError(f"{what}: the filter {one!r} has no value")
        return [dict(one) for one in value] if all(rules) else [_scalar(one, what) for one in value]
    return _scalar(value, what)


def _scalar(value: Any, what: str) -> Any:
    if isinstance(value, str):  # YAML reads 1e-5 as text
        try:
            return float(value)
        except ValueError:
            return value
    if not isinstance(value, (bool, int, float)):
        raise UsageError(f"{what}: {value!r} is no value, no gradient and no list of filters")
    return value


def chain(*settings: Any) -> Any:
    """The first of these settings that has a value for a tensor: their rules in order, down to one for all tensors."""
    rules: list[dict[str, Any]] = []
    for setting in settings:
        if setting is None:
            continue
        if isinstance(setting, list) and all(isinstance(one, Mapping) for one in setting):
            rules += setting
        else:
            rules.append({"value": setting})
        if rules[-1].get("filter") in (None, "*"):
            break
    if not rules:
        return None
    return rules[0]["value"] if rules[0].get("filter") in (None, "*") else rules


def for_all(setting: Any) -> bool:
    """Whether a setting has a value for every tensor."""
    by_filter = isinstance(setting, list) and isinstance(setting[-1], Mapping)
    return not by_filter or setting[-1].get("filter") in (None, "*")


def model_of(value: Any, what: str) -> str:
    """FOLDER, or FOLDER+ADAPTER; {model: ..., lora: ...} is the same."""
    if isinstance(value, Mapping):
        if "path" in value:
            check_keys(value, ("path", "revision"), f"key of {what}")
            if value.get("revision") is not None:
                raise UsageError(
                    f"{what}: a revision ({value['revision']}) is not supported: download it and give the folder"
                )
            return str(value["path"])
        check_keys(value, ("model", "lora", "override_architecture"), f"key of {what}")
        if value.get("override_architecture") is not None:
            raise UsageError(
                f"{what}: override_architecture is not supported: tensors are merged by name, whatever the model"
            )
        model = model_of(value.get("model"), what)
        return model if value.get("lora") is None else f"{model}+{model_of(value['lora'], what)}"
    if not isinstance(value, str) or not value:
        raise UsageError(f"{what}: {value!r} is no model: give a folder")
    if "@" in value and not Path(value).exists():
        raise UsageError(f"{what}: the revision of {value!r} is not supported: download it and give the folder")
    return value


def list_of(data: Mapping[str, Any], key: str, what: str = "") -> Sequence[Any]:
    """A key's value, which has to be a list with something in it."""
    value = data.get(key)
    if not isinstance(value, list) or not value:
        raise UsageError(f"{f'{what}: ' if what else ''}{key} is a list, not {value!r}")
    return typing.cast("Sequence[Any]", value)


def check_keys(data: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """UsageError, with the nearest match, for a key that is not known."""
    for key in data:
        if key not in known:
            raise unknown(what, str(key), known)
