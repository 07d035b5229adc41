"""trimtab aligns open-weight language models, preferably by moving something small.

Everything is imported on first use: `import trimtab` loads no torch, `trimtab.LM` does.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError, UsageError

if TYPE_CHECKING:
    from trimtab import catalogue, decode, measure, pocket, report, rewards, steer
    from trimtab.card import Card
    from trimtab.compare import compare
    from trimtab.control import Control, Steered
    from trimtab.lm import LM
    from trimtab.policy import Completions, Cost, Policy, Prompt
    from trimtab.sampling import Sampling
    from trimtab.session import Session

__version__ = "0.1.0"

__all__ = [
    "LM",
    "Card",
    "Completions",
    "Control",
    "Cost",
    "Policy",
    "Prompt",
    "Sampling",
    "Session",
    "Steered",
    "TrimtabError",
    "UsageError",
    "catalogue",
    "compare",
    "decode",
    "measure",
    "pocket",
    "report",
    "rewards",
    "steer",
]

# name -> the module that holds it
_NAMES = {
    "Card": "trimtab.card",
    "Completions": "trimtab.policy",
    "Control": "trimtab.control",
    "Cost": "trimtab.policy",
    "LM": "trimtab.lm",
    "Policy": "trimtab.policy",
    "Prompt": "trimtab.policy",
    "Sampling": "trimtab.sampling",
    "Session": "trimtab.session",
    "Steered": "trimtab.control",
    "compare": "trimtab.compare",
}
_MODULES = ("catalogue", "decode", "measure", "pocket", "report", "rewards", "steer")


class _Package(ModuleType):
    """`trimtab.compare` is the function: importing the module of the same name must not put itself in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _NAMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value: Any = getattr(importlib.import_module(_NAMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"trimtab.{name}")
    else:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
