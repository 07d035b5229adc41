"""Reads mergekit's YAML configurations into a `Recipe`: theirs are what people have.

    merge_method, base_model, parameters, dtype, out_dtype, tokenizer_source | tokenizer, chat_template
    models: [{model, parameters}]   or   slices: [{sources: [{model, layer_range, parameters}], parameters}]

The format is mergekit's (its docs and code were read for it, its code is not used); what its settings mean is kept: what a
gradient gives the tensors outside of layers, the base that is skipped where it is listed among the models of a method on
differences, and added where it is not listed for a method on weights; rescaling by the L1 norm (`compat: mergekit`). What has
no counterpart is refused by name, what changes nothing or works otherwise here is said in a note; no key is passed over.
mergekit itself passes over unknown keys and parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab import catalogue
from trimtab.errors import UsageError, unknown
from trimtab.merge.mergekit_form import (
    DELTAS,
    EACH,
    METHODS,
    OURS,
    SHARED,
    TOP,
    Slice,
    Source,
    chain,
    check_keys,
    for_all,
    list_of,
    method_of,
    model_of,
    parameters_of,
    slice_of,
    source_of,
)
from trimtab.merge.recipe import DTYPES, Recipe


@dataclass
class Reading:
    """A recipe, and what its reader should know: what mergekit does otherwise, what was left out and why it may be."""

    recipe: Recipe
    notes: list[str] = field(default_factory=list)


def is_mergekit(data: Mapping[str, Any]) -> bool:
    """Whether a YAML file's contents are in mergekit's form."""
    return "merge_method" in data or "base_model" in data


def read_mergekit(data: Mapping[str, Any]) -> Reading:
    """The recipe of a mergekit configuration. UsageError for what cannot be had here, by name."""
    check_keys(data, TOP, "key of a mergekit configuration")
    if "modules" in data:
        raise UsageError("modules: (models of several parts) is not supported: merge the parts' folders one by one")
    theirs = method_of(data)
    if ("models" in data) == ("slices" in data):
        raise UsageError("a mergekit configuration has either 'models' or 'slices'")
    base = model_of(data["base_model"], "base_model") if data.get("base_model") is not None else None
    shared = parameters_of(data, "parameters", theirs)
    if "models" in data:
        sources = [source_of(one, f"model {n}", theirs, False) for n, one in enumerate(list_of(data, "models"), 1)]
        parts = [Slice(sources, {})]
    else:
        parts = [slice_of(one, f"slice {n}", theirs, base) for n, one in enumerate(list_of(data, "slices"), 1)]
    return _Reader(theirs, base, shared, parts, "slices" in data).read(data)


class _Reader:
    def __init__(
        self, theirs: str, base: str | None, shared: Mapping[str, Any], parts: list[Slice], sliced: bool
    ) -> None:
        self.theirs, self.base, self.shared, self.parts, self.sliced = theirs, base, shared, parts, sliced
        self.method = METHODS[theirs]
        self.config = catalogue.method(self.method).Config
        self.known = {one.name for one in dataclasses.fields(self.config)}
        self.notes: list[str] = []

    def read(self, data: Mapping[str, Any]) -> Reading:
        if self.base is None and (self.theirs in DELTAS or self.theirs in ("slerp", "sce", "model_stock")):
            raise UsageError(f"merge_method {self.theirs} needs base_model")
        parts = [self._with_base(one) for one in self.parts]
        models = list(dict.fromkeys(source.model for one in parts for source in self._parents(one)))
        if not models:
            raise UsageError(f"merge_method {self.theirs}: no model besides the base")
        dtype = self._dtype(data)
        options, weights, slices = {}, None, None
        if self.sliced:
            slices = [self._one_slice(one, number) for number, one in enumerate(parts, 1)]
        else:
            options, weights = self._settings(parts[0]), self._weights(parts[0], f"{self.theirs}")
        options |= self._always()
        recipe = Recipe(
            self.method, tuple(models), self._recipe_base(), weights, options, dtype,
            tokenizer=self._tokenizer(data), chat_template=self._chat_template(data), slices=slices, depth="mergekit",
        )  # fmt: skip
        return Reading(recipe, self.notes)

    # Which models take part

    def _with_base(self, one: Slice) -> Slice:
        """mergekit adds the base to `models` that do not list it; in slices, it must be listed where it is needed."""
        listed = any(source.model == self.base for source in one.sources)
        names = [source.model for source in one.sources]
        if len(set(names)) < len(names):
            raise UsageError(f"a model is listed twice ({', '.join(names)}): of these, mergekit would take the last")
        if self.base is None or listed:
            return one
        if self.sliced and self.theirs in ("linear", "karcher", "passthrough"):
            return one
        if self.sliced:
            raise UsageError(
                f"a slice lacks base_model {self.base!r} among its sources: which of its layers are meant?"
            )
        if self.theirs == "linear" and "weight" not in self.shared:
            raise UsageError(
                "merge_method linear with a base_model that is not listed among models: mergekit adds it as one more "
                "model and fails for want of a weight: list it with a weight, or leave base_model out"
            )
        if self.theirs == "passthrough":
            raise UsageError("merge_method passthrough takes one model: leave base_model out")
        if self.theirs in ("linear", "karcher"):
            self.notes.append(f"base_model {self.base} is merged as one more model, as in mergekit")
        return Slice([*one.sources, Source(self.base, {}, None)], one.parameters)

    def _parents(self, one: Slice) -> list[Source]:
        """The sources that are our models: for a method on differences, those that are not the base."""
        others = [source for source in one.sources if source.model != self.base]
        bases = [source for source in one.sources if source.model == self.base]
        if self.theirs == "slerp":
            if len(one.sources) != 2 or not bases:
                raise UsageError("merge_method slerp merges base_model with one other model")
            return [*bases, *others]
        if self.theirs == "nuslerp" and len(others) != 2:
            raise UsageError("merge_method nuslerp merges two models, neither of them base_model")
        if self.theirs == "passthrough" and len(one.sources) != 1:
            raise UsageError(f"merge_method passthrough takes one model a slice, not {len(one.sources)}")
        if self._recipe_base() is None:
            return one.sources
        for source in bases:
            if source.parameters:
                self._say(
                    f"parameters of the base among the models ({', '.join(source.parameters)}) do nothing, as in mergekit"
                )
        return others

    def _recipe_base(self) -> str | None:
        """Methods on weights have no use for a base, which is then one of the models or not at all."""
        return self.base if self.theirs in (*DELTAS, "sce", "model_stock", "nuslerp") else None

    # Their settings

    def _one_slice(self, one: Slice, number: int) -> dict[str, Any]:
        parents = self._parents(one)
        found: dict[str, Any] = {"sources": [{"model": source.model, "layers": source.layers} for source in parents]}
        if self._recipe_base() is not None:
            found["base"] = next(source.layers for source in one.sources if source.model == self.base)
        found |= {"weights": self._weights(one, f"slice {number}"), "options": self._settings(one)}
        return {key: value for key, value in found.items() if value not in (None, {})}

    def _settings(self, one: Slice) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for key in SHARED[self.theirs]:
            setting = chain(one.parameters.get(key), self.shared.get(key))
            if setting is not None:
                self._take(options, key, setting)
        for key in EACH[self.theirs]:
            if key in ("weight", "scale"):
                continue
            each = [
                chain(s.parameters.get(key), one.parameters.get(key), self.shared.get(key)) for s in self._parents(one)
            ]
            if all(setting is None for setting in each):
                continue
            # A model without a value has mergekit's default, which is ours.
            plain = getattr(self.config(), key)
            each = [chain(setting, plain) for setting in each]
            options[key] = each[0] if all(setting == each[0] for setting in each) else {"each": each}
        if options.get("row_wise") is True and options.get("flatten") in (None, True):
            self._say("nuslerp_row_wise does nothing without nuslerp_flatten: false, as in mergekit")
            del options["row_wise"]
        if self.theirs == "slerp" and "t" not in options:
            raise UsageError("merge_method slerp needs the parameter t")
        if self.theirs == "slerp" and not for_all(options["t"]):
            raise UsageError(
                "slerp: t has filters alone: add a last {value: ...} for the tensors that none of them fits"
            )
        return options

    def _take(self, options: dict[str, Any], key: str, setting: Any) -> None:
        if key == "int8_mask":
            self._say("int8_mask is left out: it saves memory in mergekit and changes no result")
            return
        ours = OURS.get(key, key)
        if ours in self.known:
            options[ours] = setting
        elif key == "rescale" and setting in (False, 0):
            return
        else:
            raise UsageError(f"{self.theirs}: the parameter {key} ({setting!r}) has no counterpart in {self.method}")

    def _always(self) -> dict[str, Any]:
        if self.theirs == "passthrough":
            return {"normalize": False}
        if "compat" in self.known:
            self.notes.append(f"{self.method}: compat=mergekit (its rescaling and its edge cases, where ours differ)")
            if self.theirs.startswith(("dare", "della")):
                self.notes.append(
                    "random masks are drawn otherwise than mergekit's: the same for a seed, however stored"
                )
            return {"compat": "mergekit"}
        return {}

    def _weights(self, one: Slice, what: str) -> list[Any] | None:
        key = "scale" if self.theirs == "passthrough" else "weight"
        if key not in EACH[self.theirs]:
            return None
        parents = self._parents(one)
        found = [chain(s.parameters.get(key), one.parameters.get(key), self.shared.get(key)) for s in parents]
        if key == "scale":
            return None if found == [None] else [chain(found[0], 1.0)]
        missing = [source.model for source, weight in zip(parents, found, strict=True) if weight is None]
        if missing:
            self._say(f"{what}: no weight for {', '.join(missing)}: taken as 1 (mergekit stops there)")
        if not all(for_all(weight) for weight in found):
            self._say(f"{what}: a weight of 1 for the tensors that none of its filters fits (mergekit stops there)")
        return [1.0 if weight is None else weight for weight in found]

    # Around the weights

    def _dtype(self, data: Mapping[str, Any]) -> str | None:
        names = {}
        for key in ("dtype", "out_dtype"):
            if data.get(key) is not None:
                names[key] = str(data[key]).removeprefix("torch.")
                if names[key] not in DTYPES:
                    raise unknown(key, str(data[key]), DTYPES)
        if names.get("dtype", "float32") not in ("float32", "float64"):
            self.notes.append(
                f"dtype {names['dtype']}: mergekit also computes in it; here it is what is written, from float32"
            )
        return names.get("out_dtype", names.get("dtype"))

    def _tokenizer(self, data: Mapping[str, Any]) -> str:
        source, given = data.get("tokenizer_source"), data.get("tokenizer")
        if source is not None and given is not None:
            raise UsageError("a mergekit configuration has either tokenizer_source or tokenizer")
        if given is not None:
            if not isinstance(given, Mapping):
                raise UsageError(f"tokenizer: holds 'source', not {given!r}")
            check_keys(given, ("source", "tokens", "pad_to_multiple_of"), "key of tokenizer")
            for key, instead in (
                ("tokens", "a token missing in a model takes the base's row"),
                ("pad_to_multiple_of", ""),
            ):
                if given.get(key) is not None:
                    raise UsageError(
                        f"tokenizer: {key} is not supported{f' ({instead})' if instead else ''}: leave it out"
                    )
            source = given.get("source") or "union"
        if source is None:
            return ""
        if source in ("union", "base"):
            if source == "base" and self._recipe_base() is None:
                return self.base or ""
            return str(source)
        model = model_of(source, "tokenizer source")
        models = [one.model for part in self.parts for one in part.sources] + ([self.base] if self.base else [])
        if model not in models:
            raise unknown("model as tokenizer source", model, {"union", "base", *models})
        return "base" if model == self.base and self._recipe_base() is not None else model

    def _chat_template(self, data: Mapping[str, Any]) -> str:
        wanted = data.get("chat_template")
        if wanted is None:
            return ""
        if wanted == "auto":
            self.notes.append(
                "chat_template auto: the models' own if all have the same; else choose with --chat-template"
            )
            return ""
        raise UsageError(
            f"chat_template {str(wanted)[:40]!r} is not supported: leave it out and choose with --chat-template base, "
            "none or a model, or put chat_template.jinja into the merged folder"
        )

    def _say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
