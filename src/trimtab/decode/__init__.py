"""Decoding: policies that wrap a policy and choose among what it says. One file a method; this dict is the list of them."""

from __future__ import annotations

import importlib
from typing import Any

METHODS = {
    # among whole answers
    "best-of-n": ("best_of_n", "BestOfN"),
    "majority-vote": ("majority_vote", "MajorityVote"),
    "mbr": ("mbr", "MBR"),
    "infalign": ("infalign", "InfAlign"),
    "qalign": ("qalign", "QAlign"),
    # token by token, by a reward
    "args": ("args", "Args"),
    "cd-fudge": ("cd_fudge", "CdFudge"),
    "cd-q": ("cd_q", "CdQ"),
    "cd-blockwise": ("cd_blockwise", "CdBlockwise"),
    "transfer-q": ("transfer_q", "TransferQ"),
    "deal": ("deal", "Deal"),
    # with other models
    "nudging": ("nudging", "Nudging"),
    "proxy-tuning": ("proxy_tuning", "ProxyTuning"),
    "ensemble": ("ensemble", "Ensemble"),
    "core": ("core", "Core"),
    "byte-level": ("byte_level", "ByteLevel"),
}


def __getattr__(name: str) -> Any:
    for module, cls in METHODS.values():
        if name == cls:
            return getattr(importlib.import_module(f"trimtab.decode.{module}"), cls)
    raise AttributeError(f"module 'trimtab.decode' has no attribute {name!r}")
