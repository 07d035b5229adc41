"""Options that vary with depth and with module, in the form that merging configurations have always had.

    0.5                                          one value
    [0.2, 0.5, 0.8]                              a gradient over depth: linear between equally spaced layers
    [{filter: mlp, value: 0.3}, {value: 0.5}]    the first whose filter is part of the tensor's name; none: any tensor
    {each: [0.5, [0.2, 0.8]]}                    one of these a parent

On the command line: `--density 0.5`, `--density 0.2..0.5..0.8`, `--density mlp=0.3 0.5`, and one a parent `--density 0.5 0.4`
(several words without a filter) or `--density mlp=0.3,0.4 0.5`.

Depth runs from 0 at the first layer (and what lies before it) to 1 at the last (and what follows). mergekit gives the first
value to what follows the last layer too (the final norm and the head), and the last value to a layer that is alone: a recipe
read from its form says `depth: mergekit` and gets that.

A filter is looked for in the tensor's name in the output; that of a setting of one model, in its name in that model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import UsageError

Scalar = float | int | bool | str
LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_BEFORE = re.compile(r"embed_tokens|embed_in|word_embeddings|embed_positions|embed_dim|\bwte\b|\bwpe\b")


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to: the first number among the parts of its name; None outside layers."""
    found = LAYER.search(name)
    return int(found.group(1)) if found else None


def lies_before(name: str) -> bool:
    """Whether a tensor outside of layers comes before them: embeddings."""
    return _BEFORE.search(name) is not None


def depth_of(name: str, layers: int, how: str = "model") -> float:
    """How deep a tensor lies: 0 in the first layer and before it, 1 in the last and after it; or as mergekit has it."""
    layer = layer_of(name)
    if layer is None:
        return 0.0 if how == "mergekit" or lies_before(name) else 1.0
    return layer / (layers - 1) if layers > 1 else float(how == "mergekit")


def at(setting: Any, name: str, depth: float, parents: int, what: str, names: Sequence[str] = ()) -> Any:
    """The value of a setting for one tensor: a scalar, or a tuple of one a parent. None: no filter fits.

    names: what the tensor is called in each parent, where that is not `name` everywhere.
    """
    if isinstance(setting, Mapping) and set(setting) == {"each"}:
        if len(setting["each"]) != parents:
            raise UsageError(f"{what} has {len(setting['each'])} values for {parents} models")
        called = names or [name] * parents
        return tuple(_one(one, its, depth, what) for one, its in zip(setting["each"], called, strict=True))
    value = _one(setting, name, depth, what)
    if isinstance(value, (list, tuple)):
        if len(value) != parents:
            raise UsageError(f"{what} has {len(value)} values for {parents} models")
        return tuple(value)
    return value


def _one(setting: Any, name: str, depth: float, what: str) -> Any:
    if isinstance(setting, (bool, int, float, str)) or setting is None:
        return setting
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, Sequence) or not setting:
        raise UsageError(f"{what}: {setting!r} is no value, no gradient and no list of filters")
    if all(isinstance(one, Mapping) for one in setting):
        for rule in setting:
            if not {"value"} <= set(rule) <= {"filter", "value"}:
                raise UsageError(f"{what}: a filter has the keys 'filter' and 'value', not {sorted(map(str, rule))}")
            wanted = rule.get("filter")
            if wanted is None or wanted == "*" or str(wanted) in name:
                value = rule["value"]
                if isinstance(value, Mapping) and set(value) == {"each"}:
                    return [_one(one, name, depth, what) for one in value["each"]]
                return _one(value, name, depth, what)
        return None
    if all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in setting):
        place = depth * (len(setting) - 1)
        low = min(int(place), len(setting) - 1)
        high = min(low + 1, len(setting) - 1)
        return (1 - (place - low)) * setting[low] + (place - low) * setting[high]
    if all(isinstance(one, (bool, int, float, str)) for one in setting):
        return setting[int(depth * (len(setting) - 1))]
    raise UsageError(f"{what}: {setting!r} mixes filters and values")


def parse_words(words: Sequence[str], what: str) -> Any:
    """The setting that command-line words mean."""
    rules: list[dict[str, Any]] = []
    plain: list[Any] = []
    for word in words:
        name, equals, text = word.rpartition("=")
        if equals and not name:
            raise UsageError(f"{what}: {word!r} has no filter before its '='")
        pieces = [_value(piece, what) for piece in text.split(",")]
        value = pieces[0] if len(pieces) == 1 else {"each": pieces}
        if equals:
            rules.append({"filter": name, "value": value})
        else:
            plain.append(value)
    if len(plain) > 1 and any(isinstance(value, dict) for value in plain):
        raise UsageError(f"{what}: one value a model is given twice over ({' '.join(words)})")
    rest = plain[0] if len(plain) == 1 else {"each": plain} if plain else None
    if not rules:
        return rest
    return [*rules, *([{"value": rest}] if rest is not None else [])]


def _value(text: str, what: str) -> Any:
    pieces = text.split("..")
    if len(pieces) > 1:
        try:
            return [_number(piece) for piece in pieces]
        except ValueError:
            raise UsageError(f"{what}: {text!r} is no gradient; write 0.2..0.8 or 0.2..0.5..0.8") from None
    try:
        return _number(text)
    except ValueError:
        return text


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return int(value) if re.fullmatch(r"[+-]?\d+", text.strip()) else value
