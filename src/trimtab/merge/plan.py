"""From a recipe to a plan: everything is looked at before the first byte is written, and all that is wrong is said at once.

Only headers, configs and tokenizers are read, so a plan takes seconds. The checks are in `checks.py`, what is done about
vocabularies in `vocabulary.py` and `remapped.py`. NaN and infinity are met while merging (`engine.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trimtab import catalogue
from trimtab.errors import UsageError, unknown
from trimtab.merge import METHODS, TOOLS, checks
from trimtab.merge.adapter import Adapter, is_adapter, open_source
from trimtab.merge.common_tokens import common_tokens
from trimtab.merge.heads import head_of, set_setting, tied, token_tensors
from trimtab.merge.method import Method, check_parents
from trimtab.merge.recipe import Recipe
from trimtab.merge.slices import Mapped, mapped, misfits, sliced_config, weights_misfit
from trimtab.merge.source import MERGEABLE, Entry, Source
from trimtab.spec import build

MANY = 12  # problems that one message lists
FACTOR = 1e30  # a weight times a scale beyond which float32 has no numbers left for the result


@dataclass(frozen=True)
class Output:
    """One tensor of the merged model. names: what each model calls it ("": it takes no part); base_name: the base.

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
    """What the engine carries out. config: the merged model's.

    tokenizer: the files of its tokenizer: name -> the file it is a copy of, or its bytes.
    """

    recipe: Recipe
    models: list[Source]
    base: Source | None
    outputs: list[Output]
    config: dict[str, Any]
    tokenizer: dict[str, Path | bytes] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def like(self) -> Source:
        """The source that the output is shaped after: the base, or the first model."""
        return self.base if self.base is not None else self.models[0]

    @property
    def parents(self) -> list[Source]:
        """The models and the base."""
        return [*self.models, *([self.base] if self.base is not None else [])]

    @property
    def nbytes(self) -> int:
        return sum(output.entry.nbytes for output in self.outputs)

    @property
    def inputs(self) -> dict[str, str]:
        """The parents' fingerprints, by the part they have."""
        found = {f"model {i}": model.fingerprint for i, model in enumerate(self.models)}
        return found | ({"base": self.base.fingerprint} if self.base is not None else {})

    def work_dtype(self, output: Output) -> torch.dtype:
        """What a tensor is merged in: the recipe's, but float64 where a parent or the output has it, or the method needs it.

        Otherwise float64 models would come out with half of their digits, and not even the base as itself.
        """
        if output.method is not None and output.method.WIDE:
            return torch.float64
        held = [(self.base, output.base_name)] if self.base is not None else []
        held += [(model, name) for model, name in zip(self.models, output.names, strict=True) if name]
        dtypes = {output.entry.dtype, *(source.entries[name].dtype for source, name in held)}
        return torch.float64 if torch.float64 in dtypes else getattr(torch, self.recipe.work_dtype)


def make_plan(recipe: Recipe) -> Plan:
    """Opens every parent and checks all of it. UsageError with every problem, each with what would mend it."""
    if recipe.method in TOOLS:
        raise UsageError(f"{recipe.method} is a command of its own: trimtab merge {recipe.method} A B --out DIR")
    if recipe.method not in catalogue.slugs() or not issubclass(catalogue.method(recipe.method), Method):
        raise unknown("merging method", recipe.method, METHODS)
    method: type[Method] = catalogue.method(recipe.method)
    problems: list[str] = []
    warnings: list[str] = []
    base, models = _opened(recipe, problems)
    if method.DELTAS and recipe.base is None:
        problems.append(f"{recipe.method} merges differences to a base: give --base{_named_bases(models)}")
    if recipe.slices is None:
        _try(problems, check_parents, method, len(recipe.models), len(recipe.models))
        if isinstance(recipe.weights, (list, tuple)) and len(recipe.weights) != len(recipe.models):
            problems.append(str(weights_misfit(len(recipe.weights), len(recipe.models))))
    opened = [source for source in (base, *models) if source is not None]
    # Where one cannot be opened the others are compared all the same, and then all of it is refused.
    whole = len(opened) == len(models) + (recipe.base is not None)
    sources, config, tokenizer = _alike(opened, recipe, whole, problems, warnings)
    if not whole or not sources:
        raise Refused(problems)
    like, parents = (sources[0], sources[1:]) if recipe.base is not None else (None, sources)
    outputs = _outputs(recipe, method, parents, like, problems)
    if problems:
        raise Refused(problems)
    if recipe.slices is not None:
        config = sliced_config(config, recipe.parsed_slices(), base is not None)
    deltas = any(one.method is not None and one.method.on_deltas(base is not None) for one in outputs)
    warnings += checks.unused_filters(recipe, [name for one in outputs for name in (one.name, *one.names)])
    warnings += checks.same_models(opened[recipe.base is not None :], base, deltas)
    return Plan(recipe, parents, like, outputs, config, tokenizer, warnings)


class Refused(UsageError):
    """Everything that is wrong with a merge. problems: all of it; the message has the first `MANY`."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = [*dict.fromkeys(problems)]
        listed = "; ".join(f"({number}) {text}" for number, text in enumerate(self.problems[:MANY], 1))
        more = "; ..." if len(self.problems) > MANY else ""
        super().__init__(
            self.problems[0] if len(self.problems) == 1 else f"{len(self.problems)} problems: {listed}{more}"
        )


def _opened(recipe: Recipe, problems: list[str]) -> tuple[Source | None, list[Source | None]]:
    """The parents; None for one that cannot be opened."""
    base = _try(problems, open_source, recipe.base) if recipe.base is not None else None
    models = []
    for path in recipe.models:
        hangs = recipe.base is not None and base is None and is_adapter(path)  # on a base that is refused already
        models.append(None if hangs else _try(problems, open_source, path, base))
    return base, models


def _named_bases(models: Sequence[Source | None]) -> str:
    named = {model.base.name for model in models if isinstance(model, Adapter)}
    return f" ({', '.join(sorted(named))} is what the adapters were trained on)" if named else ""


def _alike(
    opened: list[Source], recipe: Recipe, whole: bool, problems: list[str], warnings: list[str]
) -> tuple[list[Source], dict[str, Any], dict[str, Path | bytes]]:
    """The parents with the same tensors, heads and vocabularies, the output's config and its tokenizer's files."""
    if not opened:
        return [], {}, {}
    sliced = recipe.slices is not None
    for source in opened:
        problems += checks.quantised(source)
        warnings += [source.note] if isinstance(source, Adapter) and source.note else []
    for model in opened[1:]:
        problems += checks.structure(opened[0], model, sliced)
        warnings += [text for text in checks.function(opened[0], model) if text not in warnings]
    # Another architecture has other tensors and another head: that is no problem of its own.
    strangers = [model.name for model in opened[1:] if checks.stranger(opened[0], model)]
    heads = [] if strangers else problems
    sources = checks.settle_heads(checks.aligned_names(opened), recipe.untie, heads, warnings)
    config = dict(opened[0].config)
    config.pop("_name_or_path", None)
    if head_of(sources[0].entries) is not None or tied(opened[0]):
        set_setting(config, "tie_word_embeddings", head_of(sources[0].entries) is None)
    if recipe.dtype is not None:
        for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
            config[key] = recipe.dtype
    sources, tokenizer, refused = common_tokens(sources, recipe, whole, config, problems, warnings)
    akin = [model for model in sources[1:] if model.name not in strangers]
    for model in akin:
        rows = token_tensors(model) if refused else ()
        problems += checks.tensors(sources[0], model, sliced, rows)
    problems += checks.dtypes(sources[0], akin, recipe.dtype)
    if config.get("auto_map"):
        warnings.append("the config's auto_map names code, which is not copied: copy the model's .py files yourself")
    return sources, config, tokenizer


def _outputs(
    recipe: Recipe, method: type[Method], models: list[Source], base: Source | None, problems: list[str]
) -> list[Output]:
    """Every tensor of the merged model, with its method and settings; adds what is wrong to the problems."""
    found = _try(problems, mapped, recipe, models, base) or []
    if recipe.slices is not None:
        problems += misfits(found, models, base)
    tables = set(token_tensors(base if base is not None else models[0]))
    outputs = [_try(problems, _output, one, models, base, method, recipe, one.name in tables) for one in found]
    return [one for one in outputs if one is not None]


def _output(
    one: Mapped, models: list[Source], base: Source | None, method: type[Method], recipe: Recipe, table: bool
) -> Output | None:
    source, its_name = one.first(models, base)
    entry = source.entries.get(its_name)
    if entry is None:
        return None  # named among the misfits
    embedding = table and len(entry.shape) == 2
    if entry.dtype not in MERGEABLE:
        return Output(one.name, entry, one.names, one.base_name, None, (), embedding)
    made = method(build(method.Config, one.options, f"method {recipe.method!r}"))
    check_parents(method, len(one.weights), len(one.weights))
    made.check(len(one.weights))
    if base is None and not method.DELTAS and made.on_deltas(False):
        raise UsageError(f"{recipe.method} with these options merges differences to a base: give --base")
    made.check_weights(one.weights)
    _check_size(made, one.weights)
    dtype = entry.dtype if recipe.dtype is None else getattr(torch, recipe.dtype)
    return Output(one.name, Entry(dtype, entry.shape), one.names, one.base_name, made, one.weights, embedding)


def _check_size(made: Method, weights: Sequence[float]) -> None:
    """UsageError for factors that float32 cannot hold: arithmetic on tensors would refuse them in its own words."""
    scale = getattr(made.config, "scale", 1.0)
    largest = max(map(abs, weights), default=0.0)
    if isinstance(scale, (int, float)) and not max(1.0, abs(scale)) * max(1.0, largest) < FACTOR:
        raise UsageError(
            f"{made.slug}: a weight of {largest:g} and a scale of {scale:g} are larger than any model needs: give "
            "smaller --weights or --scale"
        )


def _try(problems: list[str], what: Any, *arguments: Any) -> Any:
    """The result of a call; None where it raises a UsageError, which becomes a problem."""
    try:
        return what(*arguments)
    except UsageError as error:
        problems.append(str(error))
        return None
