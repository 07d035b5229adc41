"""Decoding: policies that wrap a policy and choose among what it says. One file a method; this dict is the list of them."""

from __future__ import annotations

import importlib
from typing import Any

METHODS = {
    "best-of-n": ("best_of_n", "BestOfN"),
    "args": ("args", "Args"),
    "nudging": ("nudging", "Nudging"),
    "proxy-tuning": ("proxy_tuning", "ProxyTuning"),
    "ensemble": ("ensemble", "Ensemble"),
    "core": ("core", "Core"),
}


def __getattr__(name: str) -> Any:
    for module, cls in METHODS.values():
        if name == cls:
            return getattr(importlib.import_module(f"trimtab.decode.{module}"), cls)
    raise AttributeError(f"module 'trimtab.decode' has no attribute {name!r}")
