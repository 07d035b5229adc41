"""Two modules run beside each other: their layers, what goes into and out of each, and how wide any of them may become."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from trimtab.errors import UsageError
from trimtab.merge.align.permutation import Group, Place, Spec
from trimtab.merge.pleas.least_squares import Moments, outputs, patches

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
UNITWISE = (_BatchNorm, _InstanceNorm)  # norms that look at one unit at a time


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass. keep: bool, in the shape of the tokens, which of them are real; None: all are.

    domain: where the inputs come from; size: how many inputs (tokens) there are.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    keep: Tensor | None = None
    domain: str = ""

    @property
    def size(self) -> int:
        return len(self.args[0]) if self.keep is None else int(self.keep.sum())


def as_batches(inputs: Any, rows: int = 256) -> list[Batch]:
    """A tensor (cut into batches of `rows`), a list of tensors, or a mapping of either by domain. UsageError for none."""
    if isinstance(inputs, Mapping):
        made = [
            Batch(one.args, one.kwargs, one.keep, str(name))
            for name in inputs
            for one in as_batches(inputs[name], rows)
        ]
    elif isinstance(inputs, Tensor):
        made = [Batch((part,)) for part in inputs.split(rows)]
    else:
        made = [one if isinstance(one, Batch) else Batch((one,)) for one in inputs]
    made = [one for one in made if one.size]
    if not made:
        raise UsageError("no inputs: least squares needs some that both models read")
    return made


def shares(batches: Sequence[Batch]) -> dict[str, float]:
    """The share of inputs each domain has."""
    total = sum(one.size for one in batches)
    found: dict[str, float] = {}
    for one in batches:
        found[one.domain] = found.get(one.domain, 0.0) + one.size / total
    return found


def transposed(module: nn.Module) -> bool:
    """Whether a layer stores its weight [in, out], as transformers' Conv1D does."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, *CONVOLUTIONS)) or transposed(module)


def depthwise(module: nn.Module) -> bool:
    """A convolution with a channel a group: it works on each unit alone."""
    return isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels == module.out_channels


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """Parameter or buffer name -> the module that holds it."""
    found = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name in (*module._parameters, *module._buffers):
            found[f"{prefix}.{name}" if prefix else name] = module
    return found


def aliases(model: nn.Module) -> dict[str, str]:
    """Name of each parameter and buffer -> the first name of the same tensor (tied weights have several)."""
    first: dict[int, str] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def renamed(spec: Spec, names: Mapping[str, str]) -> Spec:
    """The spec with every tensor under its first name."""
    return Spec(
        tuple(
            Group(
                group.name,
                group.size,
                tuple(
                    dict.fromkeys(
                        Place(names.get(one.tensor, one.tensor), one.axis, one.start, one.block) for one in group.places
                    )
                ),
                group.after,
            )
            for group in spec.groups
        )
    )


def held(spec: Spec, model: nn.Module) -> dict[str, str]:
    """The groups that cannot be widened, and why."""
    module_of = owners(model)
    outer = {group.after for group in spec.groups if group.after}
    found = {}
    for group in spec.groups:
        if group.after or group.name in outer:
            found[group.name] = "its units are nested in another group's"
            continue
        for place in group.places:
            owner = module_of.get(place.tensor)
            if owner is not None and not (is_layer(owner) or isinstance(owner, UNITWISE)):
                found[group.name] = (
                    f"{place.tensor} belongs to a {type(owner).__name__}, which looks at all units at once"
                )
                break
    return found


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode (no dropout, stored batch statistics), and as they were afterwards; no gradients."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def layer_names(model: nn.Module) -> list[str]:
    """The linear and convolution layers, in order of definition. UsageError for a grouped convolution."""
    names = []
    for name, module in model.named_modules():
        if not is_layer(module) or depthwise(module):
            continue
        if isinstance(module, CONVOLUTIONS) and module.groups > 1:
            raise UsageError(
                f"{name!r} is a convolution in {module.groups} groups, whose channels cannot be matched freely: only plain "
                "and depthwise ones are known"
            )
        names.append(name)
    return names


def weight_axes(module: nn.Module) -> tuple[int, int]:
    """(output axis, input axis) of a layer's weight."""
    return (1, 0) if transposed(module) else (0, 1)


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight of a named layer."""
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


class Recorder:
    """What goes into and out of some layers during a forward pass; a layer that is called twice has two entries."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.names = model, names
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, batch: Batch) -> tuple[Any, dict[str, list[tuple[Tensor, Tensor]]]]:
        """The model's output, and (inputs, outputs) of every call of each layer."""
        self.seen = {name: [] for name in self.names}
        handles = []
        try:
            for name in self.names:
                module = self.model.get_submodule(name)
                handles.append(module.register_forward_hook(self._hook(name)))
            found = self.model(*batch.args, **batch.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return found, self.seen

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.seen[name].append((args[0], output))

        return hook


def collect(
    a: nn.Module,
    b: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    matched: Mapping[str, Tensor],
    rows: int,
    seed: int = 0,
) -> dict[str, Moments]:
    """The moments of the named layers of two models on the same inputs.

    matched: a layer's `Moments.matched`. rows: at most about so many rows of each layer's regression are used, drawn evenly.
    """
    total = sum(batch.size for batch in batches)
    found: dict[str, Moments] = {}
    with evaluating(a, b):
        run_a, run_b = Recorder(a, names), Recorder(b, names)
        for number, batch in enumerate(batches):
            (_, seen_a), (_, seen_b) = run_a(batch), run_b(batch)
            for index, name in enumerate(names):
                if len(seen_a[name]) != len(seen_b[name]):
                    raise UsageError(
                        f"the layer {name!r} is used another number of times in one model than in the other"
                    )
                limit = math.ceil(rows * batch.size / total)
                generator = torch.Generator().manual_seed((seed * 1_000_003 + number) * 10_007 + index)
                for (x_a, y_a), (x_b, y_b) in zip(seen_a[name], seen_b[name], strict=True):
                    layer = a.get_submodule(name)
                    pieces = [patches(x_a, layer), patches(x_b, layer), outputs(y_a, layer), outputs(y_b, layer)]
                    pieces = [_chosen(piece, batch, limit, generator.get_state(), name) for piece in pieces]
                    if name not in found:
                        found[name] = Moments(pieces[0].shape[1], pieces[2].shape[1], matched[name])
                    found[name].add(*pieces)
    for moments in found.values():
        moments.to("cpu")
    return found


def _chosen(rows: Tensor, batch: Batch, limit: int, state: Tensor, name: str) -> Tensor:
    if batch.keep is not None:
        if len(rows) != batch.keep.numel():
            raise UsageError(f"the layer {name!r} does not see one row a token, so its rows cannot be paired")
        rows = rows[batch.keep.flatten().to(rows.device)]
    if len(rows) <= limit:
        return rows
    generator = torch.Generator()
    generator.set_state(state)
    return rows[torch.randperm(len(rows), generator=generator)[:limit].sort().values.to(rows.device)]


def mixed(batches: Sequence[Batch]) -> list[Batch]:
    """The batches with the domains taking turns."""
    by_domain: dict[str, list[Batch]] = {}
    for batch in batches:
        by_domain.setdefault(batch.domain, []).append(batch)
    longest = max(map(len, by_domain.values()))
    return [one[i] for i in range(longest) for one in by_domain.values() if i < len(one)]
