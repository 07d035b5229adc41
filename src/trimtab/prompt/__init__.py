"""Prompt-side methods: policies that change what is asked, not the model that answers. This dict is the list of them."""

from __future__ import annotations

import importlib
from typing import Any

METHODS = {
    "p-aligner": ("p_aligner", "PAligner"),
    "guide-align": ("guide_align", "GuideAlign"),
    "prompt-complement": ("prompt_complement", "PromptComplement"),
}


def __getattr__(name: str) -> Any:
    for module, cls in METHODS.values():
        if name == cls:
            return getattr(importlib.import_module(f"trimtab.prompt.{module}"), cls)
    raise AttributeError(f"module 'trimtab.prompt' has no attribute {name!r}")
