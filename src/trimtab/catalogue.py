"""Every method there is, in one dict. The command line and the docs read methods from here.

A method is a class in one file. Its module defines `CARD` (a `Card`) and the class names its options' dataclass
`Config`; the comment at each field of it is the option's help. Other packages add methods under the entry point
group "trimtab.methods" (name = slug, value = module:Class). See CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import inspect
import io
import textwrap
import tokenize
import typing
from typing import Any, NamedTuple

from trimtab import decode, measure, merge, prompt, spec, steer
from trimtab.card import Card
from trimtab.errors import TrimtabError, unknown

# slug -> module:Class. Each stage lists its own in one dict (importing a stage imports no method).
METHODS: dict[str, str] = {
    **{slug: f"trimtab.steer.{module}:{name}" for slug, (module, name) in steer.METHODS.items()},
    **{slug: f"trimtab.decode.{module}:{name}" for slug, (module, name) in decode.METHODS.items()},
    **{slug: f"trimtab.prompt.{module}:{name}" for slug, (module, name) in prompt.METHODS.items()},
    **{slug: f"trimtab.merge.{module}:{name}" for slug, (module, name) in {**merge.METHODS, **merge.TOOLS}.items()},
    **{slug: f"trimtab.measure.{module}:{name}" for slug, (module, name) in measure.METHODS.items()},
}
PLUGINS = "trimtab.methods"


class FieldHelp(NamedTuple):
    """One option: its type in words, its default as text (None where it must be given) and its help."""

    type: str
    default: str | None
    help: str


def slugs() -> dict[str, str]:
    """Slug -> module:Class of all methods, our own and plugins'; imports none of them. Our own names win."""
    plugins = {point.name: point.value for point in importlib.metadata.entry_points(group=PLUGINS)}
    return {**METHODS, **{slug: target for slug, target in plugins.items() if slug not in METHODS}}


def method(slug: str) -> type[Any]:
    """The class of a method. UsageError with the nearest match where there is none of that name."""
    module, _, name = _target(slug).partition(":")
    found = getattr(_import(slug, module), name, None)
    if not isinstance(found, type):
        raise TrimtabError(f"method {slug!r}: {module} has no class {name!r}")
    return found


def card(slug: str) -> Card:
    """The card of a method."""
    module = _target(slug).partition(":")[0]
    found = getattr(_import(slug, module), "CARD", None)
    if not isinstance(found, Card) or found.slug != slug:
        raise TrimtabError(f"method {slug!r}: {module}.CARD must be a Card with that slug")
    return found


def cards() -> list[Card]:
    """All cards, in the catalogue's order."""
    return [card(slug) for slug in slugs()]


def options(slug: str) -> dict[str, FieldHelp]:
    """The options of a method, from its `Config`."""
    return field_help(method(slug).Config)


def field_help(cls: type[Any]) -> dict[str, FieldHelp]:
    """Type, default and help of each field of a dataclass; the help is the comment at the field in the source.

    A comment is on the field's own line, or on lines of its own: above their field in a class whose fields begin with a
    comment, under it in others.
    """
    hints = typing.get_type_hints(cls)
    comments: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        comments |= _field_comments(base)
    return {
        field.name: FieldHelp(spec.describe(hints[field.name]), _default(field), comments.get(field.name, ""))
        for field in dataclasses.fields(cls)
        if field.init
    }


def _target(slug: str) -> str:
    known = slugs()
    if slug not in known:
        raise unknown("method", slug, known)
    return known[slug]


def _import(slug: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrimtabError(f"method {slug!r} cannot be loaded: {error}") from error


def _field_comments(cls: type[Any]) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comment_at = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    own_line = {number for number, line in enumerate(source.splitlines(), start=1) if line.lstrip().startswith("#")}
    (tree,) = ast.parse(source).body
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    fields = [node for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    step = -1 if fields and fields[0].lineno - 1 in own_line else 1
    found: dict[str, str] = {}
    for node in fields:
        last = node.end_lineno or node.lineno
        at = (node.lineno if step < 0 else last) + step
        block: list[str] = []
        while at in own_line:
            block.append(comment_at[at])
            at += step
        found[ast.unparse(node.target)] = " ".join(
            [*block[::step], *([comment_at[last]] if last in comment_at else [])]
        )
    return found


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return None
    return spec.format_spec("", {"": value}).removeprefix(":=")
