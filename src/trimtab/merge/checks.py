"""What could be wrong with parents, each check a function: problems that stop a merge, and warnings that do not.

Every check compares one model with `like`, the source that the output is shaped after, and reads headers and configs only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.checkpoint import local_folder
from trimtab.errors import UsageError
from trimtab.merge.adapter import is_adapter
from trimtab.merge.heads import embedding_of, head_of, same_ends, setting, tied
from trimtab.merge.recipe import Recipe
from trimtab.merge.source import MERGEABLE, Source, View

# Tensors that older checkpoints hold and that no model needs: masks and frequencies that it makes itself.
_BUFFER = re.compile(r"rotary_emb\.inv_freq$|\.(?:attn|attention)\.(?:bias|masked_bias)$|(?:^|\.)position_ids$")
_PACKED = re.compile(r"\.(?:weight|qweight|qzeros|weight_packed|scales?|g_idx)$")
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Values without which weights of one shape mean something else.
STRUCTURE = (
    "model_type", "hidden_size", "n_embd", "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "num_experts",
    "num_local_experts", "num_experts_per_tok",
)  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
# Values that change nothing about what the weights compute, or that have a check of their own.
HARMLESS = re.compile(
    r"_name_or_path|name_or_path|transformers_version|torch_dtype|dtype|use_cache|architectures|vocab_size|\w*_token_ids?|"
    r"tie_word_embeddings|\w*drop\w*|initializer_\w+|auto_map|pretraining_tp|task_specific_params|id2label|label2id|"
    r"max_position_embeddings|n_positions|n_ctx|quantization_config|rope_theta|rope_parameters|rope_scaling|text_config|"
    r"output_attentions|output_hidden_states|return_dict|gradient_checkpointing|problem_type|summary_\w+|_\w+|\w*_pdrop"
)


def _folder(name: str) -> Path | None:
    """Where a parent lies; None for one that is not there, which the plan says with all else that is wrong."""
    try:
        return Path(name) if is_adapter(name) else local_folder(name)
    except UsageError:
        return None


def refuse_inside(names: Iterable[str], out: str | Path) -> None:
    """UsageError for an output folder that is a parent's, or lies in one: a merge must not change its parents."""
    place = Path(out).resolve()
    for name in names:
        for part in dict.fromkeys((name, *name.split("+"))):
            folder = _folder(part)
            if folder is not None and place.is_relative_to(folder.resolve()):
                where = "is" if place == folder.resolve() else "lies in"
                raise UsageError(f"--out {out} {where} the folder of the model {name!r}: give another --out")


def quantised(source: Source) -> list[str]:
    """Weights that are stored as codes: their sums mean nothing."""
    config = setting(source.config, "quantization_config")
    advice = "merge the weights that it was quantised from"
    if config:
        kind = config.get("quant_method", "some method") if isinstance(config, Mapping) else config
        return [f"the model {source.name!r} is quantised ({kind}): {advice}"]
    packed = [
        name
        for name, entry in sorted(source.entries.items())
        if entry.dtype in _FP8
        or (entry.dtype in (torch.int8, torch.uint8, torch.int32) and len(entry.shape) > 1 and _PACKED.search(name))
    ]
    if packed:
        kind = word(source.entries[packed[0]].dtype)
        return [f"the model {source.name!r} is quantised ({packed[0]!r} is stored as {kind}): {advice}"]
    return []


def structure(like: Source, model: Source, sliced: bool) -> list[str]:
    """Another architecture, another number of layers or heads."""
    problems = []
    for key in (*STRUCTURE, *(() if sliced else LAYERS), "architectures"):
        one, two = setting(like.config, key), setting(model.config, key)
        if one is not None and two is not None and one != two:
            problems.append(f"{key} {_plain(one)} in {like.name!r} and {_plain(two)} in {model.name!r}")
    if not problems:
        return []
    mend = "merge models of one architecture and size"
    if all(problem.startswith(LAYERS) for problem in problems):
        mend = "say with 'slices' in a recipe which layers to take (trimtab merge run)"
    return [f"{', '.join(problems)}: {mend}"]


def stranger(like: Source, model: Source) -> bool:
    """Whether a model is of another architecture."""
    one, two = setting(like.config, "model_type"), setting(model.config, "model_type")
    return one is not None and two is not None and one != two


def function(like: Source, model: Source) -> list[str]:
    """Settings that make the same weights compute something else."""
    one, two = _settings(like.config), _settings(model.config)
    found = [
        f"{key} is {_plain(one[key])} in {like.name!r} and {_plain(two[key])} in {model.name!r}"
        for key in sorted(one.keys() & two.keys())
        if one[key] != two[key]
    ]
    return [f"{'; '.join(found)}: the merged model has what {like.name!r} has"] if found else []


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings to compare; what older and newer configs say of rotary embeddings in one form."""
    flat = {**config, **config["text_config"]} if isinstance(config.get("text_config"), Mapping) else dict(config)
    rope = flat.get("rope_parameters") or flat.get("rope_scaling") or {}
    rope = dict(rope) if isinstance(rope, Mapping) else {}
    theta = rope.pop("rope_theta", None) or flat.get("rope_theta")
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    out = {
        key: value
        for key, value in flat.items()
        if not HARMLESS.fullmatch(key) and key not in (*STRUCTURE, *LAYERS) and value is not None
    }
    if theta is not None:
        out["rope"] = {"rope_theta": float(theta), "rope_type": kind, **rope}
    return out


def tensors(like: Source, model: Source, sliced: bool, skip_rows: Iterable[str] = ()) -> list[str]:
    """Missing and extra tensors, other shapes. skip_rows: tensors whose rows are another problem's matter."""
    one, two, problems = like.entries, model.entries, []
    for mine, other, who, whose in ((one, two, model, like), (two, one, like, model)):
        lacks = sorted(mine.keys() - other.keys())
        if lacks and not sliced:
            problems.append(
                f"{who.name!r} lacks {_count(lacks, 'the tensor')} that {whose.name!r} has: get a complete copy, or one of "
                "the same architecture"
            )
    both, skip = sorted(one.keys() & two.keys()), set(skip_rows)
    misshapen = [name for name in both if one[name].shape[name in skip :] != two[name].shape[name in skip :]]
    if misshapen and not sliced:
        name = misshapen[0]
        more = f" (and {len(misshapen) - 1} more tensors differ so)" if len(misshapen) > 1 else ""
        problems.append(
            f"{name!r} has the shape {one[name].shape} in {like.name!r} and {two[name].shape} in {model.name!r}{more}: merge "
            "models of one size"
        )
    return problems


def dtypes(like: Source, models: Sequence[Source], dtype: str | None) -> list[str]:
    """Other dtypes: one problem for all models that have them, since one option mends it."""
    odd: dict[tuple[bool, str], list[tuple[Source, int]]] = {}
    for model in models:
        one, two = like.entries, model.entries
        for floats in (True, False):
            names = [
                name
                for name in sorted(one.keys() & two.keys())
                if one[name].dtype != two[name].dtype
                and floats == (one[name].dtype in MERGEABLE and two[name].dtype in MERGEABLE)
            ]
            if names and not (floats and dtype is not None):
                odd.setdefault((floats, names[0]), []).append((model, len(names)))
    problems = []
    for (floats, name), found in odd.items():
        mine, count = word(like.entries[name].dtype), max(number for _, number in found)
        theirs = [(word(model.entries[name].dtype), model.name) for model, _ in found]
        choices = " or ".join(dict.fromkeys((mine, *(kind for kind, _ in theirs))))
        others = ", ".join(f"{kind} in {called!r}" for kind, called in theirs)
        more = f" (and {count - 1} more tensors differ so)" if count > 1 else ""
        mend = f"give --dtype {choices}" if floats else "merge models of one kind"
        problems.append(f"{name!r} is {mine} in {like.name!r} and {others}{more}: {mend}")
    return problems


def aligned_names(sources: Sequence[Source]) -> list[Source]:
    """The sources under the first one's names, where theirs differ by the outermost module, and without needless buffers."""
    if not sources:
        return []
    first = sources[0].entries
    outer = sorted({name.partition(".")[0] for name in first})
    views: list[dict[str, str]] = []
    for source in sources:
        names = {}
        for own in source.entries:
            guesses = (own, own.partition(".")[2], *(f"{one}.{own}" for one in outer))
            names[next((guess for guess in guesses if guess in first), own)] = own
        views.append(names if len(names) == len(source.entries) else {own: own for own in source.entries})
    everywhere = set.intersection(*(set(names) for names in views))
    return [
        _view(source, {name: own for name, own in names.items() if name in everywhere or not _BUFFER.search(name)})
        for source, names in zip(sources, views, strict=True)
    ]


def settle_heads(sources: Sequence[Source], untie: bool, problems: list[str], warnings: list[str]) -> list[Source]:
    """The sources with or without a head of their own, all alike; adds what is wrong to the lists."""
    ties, out = [tied(source) for source in sources], []
    owner = next(
        (source for source, one in zip(sources, ties, strict=True) if not one and head_of(source.entries)), None
    )
    sharer = next((source for source, one in zip(sources, ties, strict=True) if one), None)
    if owner is not None and sharer is not None and not untie:
        problems.append(
            f"{sharer.name!r} shares its head with its embeddings and {owner.name!r} has its own {head_of(owner.entries)!r}: "
            "give --untie, which writes a head of its own"
        )
    for source, shares in zip(sources, ties, strict=True):
        embedding, head = embedding_of(source.entries), head_of(source.entries)
        names = {name: name for name in source.entries}
        if shares and embedding is not None:
            if head is not None and not same_ends(source, embedding, head):
                warnings.append(
                    f"{source.name!r} holds {head!r} though its config says that the embeddings are the head: it is left out"
                )
            if head is not None:
                del names[head]
            if owner is not None:
                names[str(head_of(owner.entries))] = embedding
        elif embedding is not None and head is None and _writes(source):
            problems.append(
                f"{source.name!r} lacks a head (lm_head.weight), and its config does not share the embeddings: get a "
                "complete copy"
            )
        out.append(_view(source, names))
    return out


def _writes(source: Source) -> bool:
    """Whether a model that its own config calls untied needs a head that any of the known names could be."""
    kinds = source.config.get("architectures") or [""]
    return setting(source.config, "tie_word_embeddings") is False and str(kinds[0]).endswith(
        ("ForCausalLM", "LMHeadModel")
    )


def _view(source: Source, names: dict[str, str]) -> Source:
    same = len(names) == len(source.entries) and all(name == own for name, own in names.items())
    return source if same else View(source, names)


def same_models(models: Sequence[Source], base: Source | None, deltas: bool) -> list[str]:
    """Warnings for one model given twice, and for models that are the base."""
    warnings: list[str] = []
    prints = [model.fingerprint for model in models]
    for i, model in enumerate(models):
        for j in range(i):
            if models[j].folder.resolve() == model.folder.resolve() and prints[i] == prints[j]:
                warnings.append(f"the model {model.name!r} is given twice: it counts twice")
                break
            if prints[i] == prints[j]:
                warnings.append(f"the models {models[j].name!r} and {model.name!r} seem to be one and the same")
                break
        if deltas and base is not None and prints[i] == base.fingerprint:
            warnings.append(
                f"the model {model.name!r} seems to be the base {base.name!r}: its differences are all zero"
            )
    return [*dict.fromkeys(warnings)]


def unused_filters(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """Warnings for filters that no tensor's name contains."""
    places = [("weights", recipe.weights), *recipe.options.items()]
    return [
        f"{key}: no tensor's name contains {wanted!r}, so that filter is not used"
        for key, found in places
        for wanted in dict.fromkeys(_filters(found))
        if not any(wanted in name for name in names)
    ]


def _filters(found: Any) -> list[str]:
    if isinstance(found, Mapping):
        own = [str(found["filter"])] if found.get("filter") not in (None, "*") else []
        return own + [wanted for value in found.values() for wanted in _filters(value)]
    return [wanted for one in found for wanted in _filters(one)] if isinstance(found, (list, tuple)) else []


def word(dtype: torch.dtype) -> str:
    """A dtype's name as --dtype takes it."""
    return str(dtype).removeprefix("torch.")


def _count(names: Sequence[str], what: str) -> str:
    return f"{what} {names[0]!r}" if len(names) == 1 else f"{len(names)} tensors, first {names[0]!r},"


def _plain(value: Any) -> str:
    return str(value[0]) if isinstance(value, list) and len(value) == 1 else str(value)
