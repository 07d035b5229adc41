"""Wider modules from narrower ones: new tensors in a copy of A, what a layer costs, and heads that read merged features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.merge.align.permutation import Spec
from trimtab.merge.pleas.blocks import Units
from trimtab.merge.pleas.layers import (
    CONVOLUTIONS,
    UNITWISE,
    Batch,
    aliases,
    depthwise,
    evaluating,
    is_layer,
    owners,
    transposed,
    weight_axes,
    weight_of,
)
from trimtab.merge.pleas.least_squares import Fitted
from trimtab.merge.pleas.size_budget import LayerCost


@dataclass(frozen=True)
class LayerError:
    """A layer's squared error relative to its targets' squares: of the block average, and after the fit."""

    start: float
    fitted: float

    @classmethod
    def of(cls, found: Fitted) -> LayerError:
        power = max(found.power, 1e-300)
        return cls(found.start_error / power, found.error / power)


@dataclass
class Merged:
    """A merged module and how it came about.

    separate: units of each group that are kept apart, of `sizes`. ratio: multiply-adds relative to one parent, without the
    zero blocks; dense_ratio: parameters relative to one parent, with them. layers: errors of the fits. shares: of the inputs,
    by domain. held: groups that cannot be widened, and why. estimated: batches that batch statistics were estimated on.
    """

    model: nn.Module
    separate: dict[str, int]
    sizes: dict[str, int]
    ratio: float
    dense_ratio: float
    layers: dict[str, LayerError]
    shares: dict[str, float]
    held: dict[str, str]
    estimated: int = 0
    warnings: list[str] = field(default_factory=list)
    features: Units | None = None
    heads: tuple[nn.Module, nn.Module] | None = None

    @property
    def widths(self) -> dict[str, int]:
        return {name: size + self.separate[name] for name, size in self.sizes.items()}

    def task(self, side: str) -> nn.Module:
        """The merged trunk under the head of parent "a" or "b" (with separate heads), or the merged model itself."""
        if side not in ("a", "b"):
            raise UsageError(f"a task's head is that of parent 'a' or 'b', not {side!r}")
        if self.features is None or self.heads is None:
            return self.model
        return TaskModel(self.model, self.features.restore(side), self.heads[side == "b"])


class TaskModel(nn.Module):
    """Merged features in one parent's order, under that parent's own head."""

    index: Tensor

    def __init__(self, trunk: nn.Module, index: Tensor, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head
        self.register_buffer("index", index)
        self.train(trunk.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        features: Tensor = self.trunk(*args, **kwargs)
        out: Tensor = self.head(features.index_select(-1, self.index.to(features.device)))
        return out


def head_layer(model: nn.Module, batch: Batch, layers: list[str], alone: bool) -> str:
    """The layer that runs last. alone: it must be the model's last step, for another head to take its place (UsageError)."""
    order: list[tuple[str, Any]] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: order.append((name, out)))
        for name in layers
    ]
    try:
        with evaluating(model):
            found = model(*batch.args, **batch.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise UsageError("the model runs no linear or convolution layer: there is nothing to merge by least squares")
    name, last = order[-1]
    if alone and not (isinstance(model.get_submodule(name), nn.Linear) and found is last):
        raise UsageError(
            f"separate heads: the model does not end with a Linear layer (the last one to run is {name!r})"
        )
    return name


def layer_costs(
    model: nn.Module, spec: Spec, batch: Batch, sizes: Mapping[str, int], left_out: set[str]
) -> Iterator[LayerCost]:
    """Multiply-adds of every linear and convolution layer for one input, by the widened groups of its axes.

    Norms and embeddings are not counted: the former fold into their neighbours, the latter are looked up.
    """
    calls: dict[str, int] = {}

    def count(name: str, module: nn.Module, out: Tensor) -> None:
        positions = out[0, 0].numel() if isinstance(module, CONVOLUTIONS) else out.numel() // out.shape[-1]
        if not isinstance(module, CONVOLUTIONS):
            positions //= len(batch.args[0]) if batch.keep is None else batch.keep.numel()
        calls[name] = calls.get(name, 0) + positions

    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: count(name, module, out))
        for name, module in model.named_modules()
        if is_layer(module)
    ]
    try:
        with evaluating(model):
            model(*batch.args, **batch.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    names = aliases(model)
    for name, positions in calls.items():
        module = model.get_submodule(name)
        weight, bias = names[f"{name}.weight"], names.get(f"{name}.bias")
        if weight in left_out:
            continue
        out_axis, in_axis = weight_axes(module)
        shape = weight_of(model, name).shape
        inside = int(torch.Size(shape[2:]).numel())  # of a convolution's kernel
        for out, length in _segments(spec, sizes, weight, out_axis, shape[out_axis]):
            if depthwise(module):
                yield LayerCost(length * inside * positions, out=out, vector=True)
                continue
            for inp, reads in _segments(spec, sizes, weight, in_axis, shape[in_axis]):
                yield LayerCost(length * reads * inside * positions, inp, out)
        if bias is not None:
            for out, length in _segments(spec, sizes, bias, 0, shape[out_axis]):
                yield LayerCost(length * positions, out=out, vector=True)


def _segments(spec: Spec, sizes: Mapping[str, int], tensor: str, axis: int, size: int) -> list[tuple[str, int]]:
    """An axis as runs of entries: (the widened group that they belong to or "", how many)."""
    found = [
        (group.name, group.size * place.block)
        for group in spec.groups
        if group.name in sizes
        for place in group.places
        if (place.tensor, place.axis) == (tensor, axis)
    ]
    rest = size - sum(length for _, length in found)
    return [*found, *([("", rest)] if rest else [])]


def resize(model: nn.Module, tensors: Mapping[str, Tensor], names: Mapping[str, str], head: str | None) -> None:
    """Gives a module new tensors, of other widths where they are so, in their own dtypes; `head` becomes an identity.

    names: name of every tensor -> the one it has in `tensors` (tied weights stay tied).
    """
    if head is not None:
        parent, _, last = head.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Identity())
    made: dict[str, nn.Parameter] = {}
    module_of = owners(model)
    for name, owner in module_of.items():
        first = names.get(name, name)
        if first not in tensors:
            continue
        last = name.rpartition(".")[2]
        old = owner._parameters.get(last)
        if old is not None:
            if first not in made:
                made[first] = nn.Parameter(tensors[first].to(old.device, old.dtype), requires_grad=old.requires_grad)
            owner._parameters[last] = made[first]
        else:
            buffer = owner._buffers[last]
            assert buffer is not None
            owner._buffers[last] = tensors[first].to(buffer.device, buffer.dtype)
    for module in set(module_of.values()):
        _restate(module)


def _restate(module: Any) -> None:
    """A module's own account of its widths."""
    if transposed(module):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, CONVOLUTIONS):
        if module.groups > 1:
            module.groups = module.in_channels = module.weight.shape[0]
        else:
            module.in_channels = module.weight.shape[1]
        module.out_channels = module.weight.shape[0]
    elif isinstance(module, UNITWISE) and (module.weight is not None or module.running_mean is not None):
        module.num_features = len(module.weight if module.weight is not None else module.running_mean)
