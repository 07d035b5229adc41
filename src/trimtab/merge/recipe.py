"""`Recipe`: what is merged, how, into what; plain JSON values, so that a model card can hold it and be run again.

method: ties
models: [runs/helpful, runs/honest]
base: pocket/base
weights: [0.5, 0.5]
options: {density: 0.3}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from trimtab.errors import UsageError, unknown

DTYPES = ("float32", "float16", "bfloat16", "float64")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class Recipe:
    """A merge. `weights` and the values of `options` are settings (`schedule.py`).

    weights: a list of one setting a model, or a setting for all. None: 1 each.
    tokenizer: "" (all must be the same), "base", "union", or one of the models, by its name here.
    chat_template: "" (all must be the same), "base", "none", or one of the models.
    untie: write the head of its own that some parents have, where others share it with their embeddings.
    """

    method: str
    models: tuple[str, ...]
    base: str | None = None
    weights: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    work_dtype: str = "float32"
    max_shard_size: str = "5GB"
    tokenizer: str = ""
    chat_template: str = ""
    untie: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", tuple(map(str, self.models)))
        if not self.models:
            raise UsageError("a merge needs models")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.work_dtype not in ("float32", "float64"):
            raise unknown("work dtype", self.work_dtype, ("float32", "float64"))
        self.shard_bytes  # noqa: B018 - refuses a size that is none

    @property
    def shard_bytes(self) -> int:
        """`max_shard_size` in bytes (1 GB is 10^9)."""
        found = _SIZE.fullmatch(self.max_shard_size.strip())
        if not found or not float(found.group(1)):
            raise UsageError(f"--max-shard-size {self.max_shard_size!r} is no size such as 5GB or 500MB")
        return int(float(found.group(1)) * 1000 ** " KMGT".index(found.group(2).upper() or " "))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is at its default is left out."""
        plain = {field.name: getattr(Recipe, field.name, None) for field in fields(self)}
        out = {**asdict(self), "models": list(self.models)}
        return {key: value for key, value in out.items() if value != plain[key] and value != {}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`. UsageError for an unknown or a missing key."""
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise unknown("key of a merge", str(key), known)
        for key in ("method", "models"):
            if key not in data:
                raise UsageError(f"a merge needs {key!r}")
        return cls(**data)
