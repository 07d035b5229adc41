"""From a recipe to a plan: everything is looked at before the first byte is written, and all that is wrong is said at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab import catalogue
from trimtab.errors import UsageError, unknown
from trimtab.merge.method import Method, check_parents
from trimtab.merge.recipe import Recipe
from trimtab.merge.schedule import at, depth_of, layer_of
from trimtab.merge.source import MERGEABLE, Entry, Folder, Source
from trimtab.spec import build


@dataclass(frozen=True)
class Output:
    """One tensor of the merged model. names: what it is called in each model; base_name: in the base.

    method None: a tensor that is no matter of arithmetic (whole numbers), copied from the base or the first model.
    """

    name: str
    entry: Entry
    names: tuple[str, ...]
    base_name: str
    method: Method | None
    weights: tuple[float, ...]
    embedding: bool


@dataclass
class Plan:
    """What the engine carries out. config: the merged model's; tokenizer_from: the folder whose tokenizer files it gets."""

    recipe: Recipe
    models: list[Source]
    base: Source | None
    outputs: list[Output]
    config: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    @property
    def like(self) -> Source:
        """The source that the output is shaped after: the base, or the first model."""
        return self.base if self.base is not None else self.models[0]

    @property
    def nbytes(self) -> int:
        return sum(output.entry.nbytes for output in self.outputs)


def make_plan(recipe: Recipe) -> Plan:
    """Opens every parent and checks all of it. UsageError with every problem, each with what would mend it."""
    if recipe.method not in catalogue.slugs() or catalogue.card(recipe.method).stage != "merge":
        from trimtab.merge import METHODS

        raise unknown("merging method", recipe.method, METHODS)
    method: type[Method] = catalogue.method(recipe.method)
    if method.DELTAS and recipe.base is None:
        raise UsageError(f"{recipe.method} merges differences to a base: give --base")
    weights = recipe.weights if isinstance(recipe.weights, (list, tuple)) else [recipe.weights] * len(recipe.models)
    check_parents(method, len(recipe.models), len(weights))
    models: list[Source] = [Folder(path) for path in recipe.models]
    base: Source | None = Folder(recipe.base) if recipe.base is not None else None
    like = base if base is not None else models[0]
    problems = _compare(like, models)
    if problems:
        raise UsageError(
            problems[0]
            if len(problems) == 1
            else f"{len(problems)} problems: " + "; ".join(f"({i}) {text}" for i, text in enumerate(problems, 1))
        )
    outputs = [_output(name, like, models, method, recipe, weights) for name in sorted(like.entries)]
    return Plan(recipe, models, base, outputs, dict(like.config))


def _compare(like: Source, models: list[Source]) -> list[str]:
    problems = []
    for model in models:
        for name in sorted({*like.entries, *model.entries}):
            one, two = like.entries.get(name), model.entries.get(name)
            if one is None or two is None:
                problems.append(
                    f"{(model if two is None else like).name!r} lacks the tensor {name!r} that the other has"
                )
            elif one.shape != two.shape:
                problems.append(
                    f"{name!r} has the shape {one.shape} in {like.name!r} and {two.shape} in {model.name!r}"
                )
    return problems


def _output(
    name: str, like: Source, models: list[Source], method: type[Method], recipe: Recipe, weights: Any
) -> Output:
    entry = like.entries[name]
    vocabulary, layers = like.config.get("vocab_size"), int(like.config.get("num_hidden_layers") or 1)
    embedding = layer_of(name) is None and len(entry.shape) == 2 and entry.shape[0] == vocabulary
    if entry.dtype not in MERGEABLE:
        return Output(name, entry, (name,) * len(models), name, None, (), embedding)
    depth = depth_of(name, layers)
    options = {key: at(value, name, depth, len(models), key) for key, value in recipe.options.items()}
    config = build(method.Config, {k: v for k, v in options.items() if v is not None}, f"method {recipe.method!r}")
    made = method(config)
    made.check(len(models))
    found = [1.0 if weight is None else at(weight, name, depth, 1, "weights") for weight in weights]
    dtype = entry.dtype if recipe.dtype is None else getattr(torch, recipe.dtype)
    return Output(
        name, Entry(dtype, entry.shape), (name,) * len(models), name, made, tuple(map(float, found)), embedding
    )
