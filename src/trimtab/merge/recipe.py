"""`Recipe`: what is merged, how, into what; plain JSON values, so that a model card can hold it and be run again.

    method: ties
    models: [runs/helpful, runs/honest]
    base: pocket/base
    weights: [0.5, 0.5]
    options: {density: 0.3}

This is what a merged folder's merge.yaml holds and what `trimtab merge run` reads. Paths are relative to the working
directory, as on the command line, wherever the file itself lies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import UsageError, unknown
from trimtab.merge.slices import Slice, parse_slices

DTYPES = ("float32", "float16", "bfloat16", "float64")
DEPTHS = ("model", "mergekit")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class Recipe:
    """A merge. `weights` and the values of `options` are settings (`schedule.py`).

    weights: a list of one setting a model, or a setting for all. None: 1 each.
    tokenizer: "" (all must be the same), "base", "union", or one of the models, by its name here.
    chat_template: "" (all must be the same), "base", "none", or one of the models.
    untie: write the head of its own that some parents have, where others share it with their embeddings.
    slices: which layers of which models make up the merged one's, in order (`slices.py`). None: layer i of all makes layer i.
    depth: what a gradient gives the tensors outside of layers (`schedule.py`): "model" or "mergekit".
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
    slices: list[dict[str, Any]] | None = None
    depth: str = "model"

    def __post_init__(self) -> None:
        if isinstance(self.models, str) or not isinstance(self.models, (list, tuple)):
            raise UsageError(f"'models' is a list of models, not {self.models!r}")
        object.__setattr__(self, "models", tuple(map(str, self.models)))
        if not self.models:
            raise UsageError("a merge needs models")
        if "" in (*self.models, self.base):
            raise UsageError("the name of a model is empty: is a variable of the shell not set?")
        if not isinstance(self.method, str):
            raise UsageError(f"'method' is a name such as ties, not {self.method!r}")
        if not isinstance(self.options, Mapping):
            raise UsageError(f"'options' holds KEY: VALUE pairs, not {self.options!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown("dtype", str(self.dtype), DTYPES)
        if self.work_dtype not in ("float32", "float64"):
            raise unknown("work dtype", str(self.work_dtype), ("float32", "float64"))
        if self.depth not in DEPTHS:
            raise unknown("depth", str(self.depth), DEPTHS)
        if not isinstance(self.untie, bool):
            raise UsageError(f"'untie' is true or false, not {self.untie!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(f"'seed' is a whole number of 0 or more, not {self.seed!r}")
        self.shard_bytes  # noqa: B018 - refuses a size that is none
        self.parsed_slices()  # refuses what is no slice

    @property
    def shard_bytes(self) -> int:
        """`max_shard_size` in bytes (1 GB is 10^9)."""
        found = _SIZE.fullmatch(str(self.max_shard_size).strip())
        if not found or not float(found.group(1)):
            raise UsageError(f"--max-shard-size {self.max_shard_size!r} is no size such as 5GB or 500MB")
        return int(float(found.group(1)) * 1000 ** " KMGT".index(found.group(2).upper() or " "))

    def parsed_slices(self) -> tuple[Slice, ...]:
        """`slices` checked and in their own type; empty where there are none."""
        return () if self.slices is None else parse_slices(self.slices, self.models)

    @property
    def parents(self) -> tuple[str, ...]:
        """The models and the base, as they were named."""
        return (*self.models, *([self.base] if self.base is not None else []))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is at its default is left out."""
        plain = {field.name: getattr(Recipe, field.name, None) for field in fields(self)}
        out = {**asdict(self), "models": list(self.models)}
        return {key: value for key, value in out.items() if value != plain[key] and value != {}}

    def to_yaml(self) -> str:
        """`to_dict` as YAML, which `trimtab merge run` reads."""
        text: str = yaml.safe_dump(
            self.to_dict(), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
        )
        return text

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`. UsageError for an unknown or a missing key."""
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise unknown("key of a merge", str(key), known)
        for key in ("method", "models"):
            if data.get(key) is None:
                raise UsageError(f"a merge needs {key!r}")
        return cls(**{key: value for key, value in data.items() if value is not None})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds one mapping. UsageError for anything else, and for a key that is given twice."""
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Strict)  # noqa: S506 - derives from SafeLoader
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text: is it a YAML file?") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path} is no YAML that can be read: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UsageError(
            f"{path} holds no KEY: VALUE pairs: write 'method: ...' and 'models: [...]', or mergekit's form"
        )
    return {str(key): value for key, value in data.items()}


class _Strict(yaml.SafeLoader):
    """SafeLoader takes the last of two values of one key, and so would hide the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is a word", key.start_mark)
            if key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
