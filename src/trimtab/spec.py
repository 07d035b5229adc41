r"""The one-line form of a choice and its options, `NAME[:key=value,...]`: rewards, policies and whatever comes next.

    length:target=30,unit=words        ->  ("length", {"target": "30", "unit": "words"})
    best-of-n:n=8,reward=pocket/judge  ->  ("best-of-n", {"n": "8", "reward": "pocket/judge"})

The keys are the fields of a dataclass and the values take the types of its annotations, so the dataclass is the only
list of options. A value runs to the next comma and may hold ':' and '='; a comma inside a value is written `\,` (in a
shell: in single quotes). A backslash before anything else stays as it is: regular expressions need no second escape.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from trimtab.errors import UsageError, unknown

T = TypeVar("T")
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse_spec(text: str) -> tuple[str, dict[str, str]]:
    """`NAME[:key=value,...]` as (name, {key: value}); values are still text. Raises `UsageError` for a broken one."""
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not name:
        raise UsageError(f"{text!r} has no name; write NAME or NAME:key=value,key=value")
    options: dict[str, str] = {}
    for piece in _split_commas(rest) if colon else []:
        key, equals, value = piece.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(
                f"{piece!r} in {text!r} is not key=value; write NAME:key=value,key=value "
                "(a comma inside a value is written '\\,')"
            )
        if key in options:
            raise UsageError(f"{text!r} gives {key!r} twice")
        options[key] = value.strip()
    return name, options


def format_spec(name: str, options: Mapping[str, Any]) -> str:
    """The inverse of `parse_spec` for plain values: the same choice as one line, keys in the given order."""
    if not options:
        return name
    return f"{name}:" + ",".join(f"{key}={_text(value)}" for key, value in options.items())


def build(cls: type[T], options: Mapping[str, Any], what: str) -> T:
    """A `cls` (a dataclass) from options whose values are text (converted by annotation) or of the right type already.

    `what` names the thing in messages ("reward 'length'"). Raises `UsageError` for an unknown key (nearest match), a
    value that does not fit its type (key, value and expected type), and a missing required key.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is not a dataclass")
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    values: dict[str, Any] = {}
    for key, value in options.items():
        name = key.replace("-", "_")
        if name not in known:
            raise unknown(f"key of {what}", key, known)
        try:
            values[name] = coerce(value, hints[name])
        except ValueError:
            raise UsageError(f"{what}: {key}={_text(value)!r} is not {describe(hints[name])}") from None
    missing = [name for name, field in known.items() if name not in values and _required(field)]
    if missing:
        needed = ", ".join(f"{name} ({describe(hints[name])})" for name in missing)
        raise UsageError(f"{what} needs {needed}; write NAME:{missing[0]}=...")
    return cls(**values)


def changed(instance: Any) -> dict[str, Any]:
    """The options of a dataclass instance that differ from their defaults, in field order (required ones always)."""
    out = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if field.init and (_required(field) or value != _default(field)):
            out[field.name] = value
    return out


def coerce(value: Any, annotation: Any) -> Any:
    """`value` (text or not) as the annotated type; `ValueError` where it does not fit.

    Types: int, float (never NaN), bool, str, Path, tuple[X, ...] (text split on '|'), Literal, unions, None ("none").
    """
    origin = get_origin(annotation)
    if annotation is Any:
        return value
    if origin is Literal:
        for choice in get_args(annotation):
            if isinstance(value, (str, type(choice))) and str(value) == str(choice):
                return choice
        raise ValueError(value)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, get_args(annotation))
    if origin is tuple:
        return _coerce_tuple(value, get_args(annotation))
    convert = _PLAIN.get(annotation)
    if convert is None:
        raise TypeError(f"options of type {annotation!r} cannot be given as text")
    return convert(value)


def describe(annotation: Any) -> str:
    """The type in words, for messages: "a whole number", "one of words, characters", "a number or none"."""
    origin = get_origin(annotation)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arm) for arm in get_args(annotation))
    if origin is tuple:
        return f"a list separated by '|' of which each is {describe(get_args(annotation)[0])}"
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
        type(None): "none",
    }
    return words.get(annotation, str(annotation))


def _coerce_union(value: Any, arms: tuple[Any, ...]) -> Any:
    if type(None) in arms and (value is None or str(value).lower() == "none"):
        return None
    for arm in arms:
        if arm is not type(None):
            try:
                return coerce(value, arm)
            except ValueError:
                continue
    raise ValueError(value)


def _coerce_tuple(value: Any, arms: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = value.split("|") if value else []
    if not isinstance(value, (list, tuple)):
        raise ValueError(value)
    if len(arms) == 2 and arms[1] is Ellipsis:
        return tuple(coerce(item, arms[0]) for item in value)
    if len(arms) != len(value):
        raise ValueError(value)
    return tuple(coerce(item, arm) for item, arm in zip(value, arms, strict=True))


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(value)
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or math.isnan(float(value)):
        raise ValueError(value)
    return float(value)


def _bool(value: Any) -> bool:
    word = str(value).lower()
    if not isinstance(value, (bool, str)) or word not in TRUE + FALSE:
        raise ValueError(value)
    return word in TRUE


def _str(value: Any) -> str:
    if not isinstance(value, (str, Path)):
        raise ValueError(value)
    return str(value)


def _path(value: Any) -> Path:
    return Path(_str(value))


_PLAIN: dict[Any, Any] = {int: _int, float: _float, bool: _bool, str: _str, Path: _path}


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _split_commas(text: str) -> list[str]:
    pieces, start, i = [""], 0, 0
    while i < len(text):
        if text[i] == ",":
            pieces[-1] += text[start:i]
            pieces.append("")
            start = i + 1
        elif text.startswith("\\,", i):
            pieces[-1] += text[start:i] + ","
            i += 1
            start = i + 1
        i += 1
    pieces[-1] += text[start:]
    return pieces


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "|".join(_text(item) for item in value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value).replace(",", "\\,")
