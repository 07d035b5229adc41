"""Steering: methods that edit the hidden states of a frozen model. One file a method; this dict is the list of them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import unknown

if TYPE_CHECKING:
    from trimtab.steer.controller import Controller

METHODS = {
    "natural-control": ("natural_control", "NaturalControl"),
    "re-control": ("re_control", "ReControl"),
    "pref-ctrl": ("pref_ctrl", "PrefCtrl"),
    "static-re": ("static_re", "StaticRE"),
    "steering-vector": ("steering_vector", "SteeringVector"),
}
_OTHERS = {
    "ValueNetwork": "value",
    "Rollouts": "rollouts",
    "collect": "rollouts",
    "tune": "tuner",
    "WeightedControls": "weighted_controls",
    "learn_many": "weighted_controls",
    "Controller": "controller",
}
_WHERE = {**{cls: module for module, cls in METHODS.values()}, **_OTHERS}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'trimtab.steer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trimtab.steer.{_WHERE[name]}"), name)


def method(slug: str) -> type[Controller]:
    """The class of a steering method. Unknown names raise `UsageError` with the nearest match."""
    if slug not in METHODS:
        raise unknown("steering method", slug, METHODS)
    module, cls = METHODS[slug]
    return getattr(importlib.import_module(f"trimtab.steer.{module}"), cls)


def load_controller(folder: str | Path) -> Controller:
    """A saved controller of any method."""
    from trimtab.steer.controller import read_record

    return method(read_record(folder)["method"]).from_pretrained(folder)
