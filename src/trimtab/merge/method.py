"""What a merging method is: algebra on one tensor of every parent, given in parts so that no model need fit in memory.

    found = method.survey(parts)             figures of the whole tensor (thresholds, norms), in passes over its parts
    for part in parts:
        merged = method.merge(part, found)   of one part

A part is a run of rows (the first axis) of the same tensor of every parent, in float32 (or float64): the parents' weights, or
their differences to the base where `DELTAS`. What `merge` returns is of the same kind: weights, or a difference that the
engine adds to the base. A method that cannot work on parts says so in `whole`, and gets one.

The result must not depend on how a tensor is cut. So chance is addressed by place: `part.uniform(model)` depends on the seed,
the tensor's name, the parent and the entry's index alone. (Sums over a tensor in float64, such as inner products, depend on
the cut in their last digit, and so may, rarely, an entry's; the engine's cuts follow from the shape alone.)
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.spec import build

# The card of a merging method: what all of them have in common.
merge_card = functools.partial(
    Card,
    goal="capability",
    stage="merge",
    mechanism="weight-arithmetic",
    signal=("checkpoints",),
    access="weights",
    produces="weights",
    infer_multiplier="1",
    benefit_metrics=("reward",),
    cost_metrics=("nll_base_per_token",),
    data_format="none",
    dimensions=("capability",),
)

BLOCK = 65536  # how many random numbers one generator makes


@dataclass(frozen=True)
class Place:
    """Which tensor: its name, the shape of the whole, one weight a parent, the seed, whether its rows are tokens'."""

    name: str
    shape: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int = 0
    embedding: bool = False

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one tensor of every parent; `tensors` are the method's own, to change as it likes.

    start: the flat index, in the whole tensor, of the part's first entry.
    """

    place: Place
    start: int
    tensors: list[Tensor]

    @property
    def weights(self) -> tuple[float, ...]:
        return self.place.weights

    def indices(self) -> Tensor:
        """The entries' flat indices in the whole tensor, int64, in the part's shape."""
        like = self.tensors[0]
        return torch.arange(self.start, self.start + like.numel()).view(like.shape)

    def uniform(self, model: int) -> Tensor:
        """float32 in [0, 1), one an entry, the same for an entry wherever the tensor is cut."""
        like = self.tensors[model]
        first, last = self.start // BLOCK, (self.start + max(like.numel(), 1) - 1) // BLOCK
        blocks = [_uniform(self.place.seed, self.place.name, model, block) for block in range(first, last + 1)]
        flat = np.concatenate(blocks)[self.start - first * BLOCK :][: like.numel()]
        return torch.from_numpy(flat).view(like.shape)


# A tensor's parts, as often as they are asked for; each pass reads them anew.
Parts = Callable[[], Iterator[Part]]


class Method(ABC):
    """One way of merging. `Config` is the only list of its options."""

    slug: ClassVar[str]
    Config: ClassVar[type[Any]]
    DELTAS: ClassVar[bool] = True  # works on differences to a base, and so needs one
    WIDE: ClassVar[bool] = False  # needs them in float64: what float32 rounds away decides something
    LEAST: ClassVar[int] = 1  # parents
    MOST: ClassVar[int | None] = None

    def __init__(self, config: Any = None) -> None:
        self.config = config if config is not None else self.Config()

    def check(self, parents: int) -> None:
        """UsageError for options that cannot work with this many parents. Overriders call this one too."""
        for field in fields(self.config):
            value = getattr(self.config, field.name)
            if isinstance(value, tuple) and len(value) != parents:
                raise UsageError(f"{self.slug}: {field.name} has {len(value)} values for {parents} models")

    def check_weights(self, weights: Sequence[float]) -> None:  # noqa: B027 - most have nothing to check
        """UsageError for weights that cannot work. They may vary with depth: this is asked for every tensor."""

    def each(self, key: str, parents: int) -> list[float]:
        """An option that may be one number for all parents or one each (`float | tuple[float, ...]`), one each."""
        value = getattr(self.config, key)
        return list(value) if isinstance(value, tuple) else [value] * parents

    def on_deltas(self, base: bool) -> bool:
        """Whether it works on differences to the base: `DELTAS`, unless an option, or a base being given, decides it."""
        return self.DELTAS

    def notes(self, found: Any) -> dict[str, float | str]:
        """What `survey` found of a tensor, for a report: figures and words."""
        return {}

    def whole(self, place: Place) -> bool:
        """Whether the method needs all of this tensor at once."""
        return False

    def survey(self, parts: Parts) -> Any:
        """What `merge` must know of the whole tensor."""
        return None

    @abstractmethod
    def merge(self, part: Part, found: Any) -> Tensor:
        """The merged part, in its shape."""

    # On tensors

    def merged(
        self,
        tensors: Sequence[Tensor],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        name: str = "tensor",
        embedding: bool = False,
    ) -> Tensor:
        """The merge of whole tensors of one shape, in their dtype (float32 where that is less); they are left as they are.

        Differences to a base in, the merged difference out, if `DELTAS`; weights in, weights out otherwise.
        """
        if isinstance(tensors, Tensor):
            raise UsageError(f"{self.slug}: give a list of tensors, one a model")
        tensors = [*tensors]
        weights = [1.0] * len(tensors) if weights is None else [float(weight) for weight in weights]
        check_parents(type(self), len(tensors), len(weights))
        self.check(len(tensors))
        self.check_weights(weights)
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise UsageError(f"{self.slug}: tensors of different shapes: {sorted(shapes)}")
        place = Place(name, tuple(tensors[0].shape), tuple(weights), seed, embedding)
        dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32

        def parts() -> Iterator[Part]:
            yield Part(place, 0, [tensor.detach().to(dtype, copy=True) for tensor in tensors])

        return self.merge(next(parts()), self.survey(parts))

    @classmethod
    def function(cls) -> Callable[..., Tensor]:
        """The method as a function of tensors, its options as keywords: what `trimtab.merge.SLUG` is."""

        def merge(
            tensors: Sequence[Tensor],
            weights: Sequence[float] | None = None,
            *,
            seed: int = 0,
            name: str = "tensor",
            embedding: bool = False,
            **options: Any,
        ) -> Tensor:
            config = build(cls.Config, options, f"method {cls.slug!r}")
            return cls(config).merged(tensors, weights, seed=seed, name=name, embedding=embedding)

        own = list(inspect.signature(merge).parameters.values())[:-1]
        more = [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in fields(cls.Config)
        ]
        merge.__signature__ = inspect.Signature([*own, *more], return_annotation=Tensor)  # type: ignore[attr-defined]
        merge.__name__ = merge.__qualname__ = cls.slug.replace("-", "_")
        merge.__doc__ = inspect.getdoc(inspect.getmodule(cls))
        return merge


def check_parents(method: type[Method], parents: int, weights: int) -> None:
    """UsageError for too few or too many parents, or another number of weights."""
    if parents < method.LEAST:
        raise UsageError(f"{method.slug} needs at least {method.LEAST} model{'s' * (method.LEAST > 1)}, not {parents}")
    if method.MOST is not None and parents > method.MOST:
        raise UsageError(f"{method.slug} takes at most {method.MOST} models, not {parents}")
    if weights != parents:
        raise UsageError(f"{method.slug}: {weights} weights for {parents} models")


def in_range(slug: str, key: str, values: Sequence[float], low: float, high: float) -> None:
    """UsageError unless every value is in [low, high]."""
    for value in values:
        if not low <= value <= high:
            raise UsageError(f"{slug}: {key} must be between {low:g} and {high:g}, not {value:g}")


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_t w_t x_t, in place in the first tensor."""
    total = tensors[0].mul_(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def _uniform(seed: int, name: str, model: int, block: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """One block of random numbers: counter-based, so that any block can be made without those before it."""
    words = hashlib.sha256(f"{seed}\0{name}\0{model}\0{block}".encode()).digest()[:16]
    key = np.frombuffer(words, dtype="<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(BLOCK, dtype=np.float32)
