from __future__ import annotations

import dataclasses
import sys
import types
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Literal

import pytest

from trimtab import catalogue
from trimtab.card import Card
from trimtab.catalogue import FieldHelp, field_help
from trimtab.errors import TrimtabError, UsageError


@dataclass
class Base:
    steps: int = 10
    # How many steps,
    # at most.
    kind: Literal["a", "b"] = "a"  # Which kind; '#' is no comment in a string.
    mark: str = "#"


@dataclass
class Derived(Base):
    path: str | None = None
    steps: int = 3
    # Fewer steps.
    needed: float = dataclasses.field(kw_only=True)
    # It must be given.


@dataclass
class Above:
    """Comments above, as some classes have it."""

    # How many
    # there are.
    count: int = 1
    # Of which kind.
    kind: str = "x"  # (Any.)
    bare: int = 0


def test_comments_above_the_fields() -> None:
    assert {name: help.help for name, help in field_help(Above).items()} == {
        "count": "How many there are.",
        "kind": "Of which kind. (Any.)",
        "bare": "",
    }


def test_the_comment_under_a_field_is_its_help() -> None:
    assert field_help(Derived) == {
        "steps": FieldHelp("a whole number", "3", "Fewer steps."),
        "kind": FieldHelp("one of a, b", "a", "Which kind; '#' is no comment in a string."),
        "mark": FieldHelp("text", "#", ""),
        "path": FieldHelp("text or none", "none", ""),
        "needed": FieldHelp("a number", None, "It must be given."),
    }


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown method 're-contrl'; did you mean 're-control'?"):
        catalogue.method("re-contrl")


def test_a_plugin_is_found_and_cannot_replace_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("somebodys_plugin")
    module.Mine = type("Mine", (), {"Config": Base})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys_plugin", module)
    points = [EntryPoint(slug, "somebodys_plugin:Mine", catalogue.PLUGINS) for slug in ("mine", "re-control")]
    monkeypatch.setattr(catalogue.importlib.metadata, "entry_points", lambda group: points)  # type: ignore[attr-defined]
    assert catalogue.slugs()["re-control"].startswith("trimtab.")
    assert catalogue.method("mine") is module.Mine  # type: ignore[attr-defined]
    assert catalogue.options("mine")["steps"].default == "10"
    with pytest.raises(TrimtabError, match="CARD must be a Card with that slug"):
        catalogue.card("mine")


@pytest.mark.parametrize("slug", catalogue.METHODS)
def test_every_method_has_a_card_and_a_help_for_every_option(slug: str) -> None:
    card = catalogue.card(slug)
    assert isinstance(card, Card) and card.slug == slug and card.summary and card.paper and card.example
    for name, help in catalogue.options(slug).items():
        assert help.help, f"{slug}: the option {name} has no comment under it"
