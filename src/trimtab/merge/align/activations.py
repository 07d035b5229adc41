"""Activation matching: units that answer alike on the same data are the same unit.

    Z_A, Z_B [N, n]: the units' values at N positions of the same data
    C = Z_A^T Z_B;  perm = the assignment that maximises sum_i C[i, perm(i)]

Li et al., arXiv 1511.07543; Git Re-Basin, arXiv 2209.04836, section 3.1. C is raw, as in the paper; `correlation` centres
each unit and divides by its deviation first. A group's values are read where it enters the layers that read it (after the
activation function; `where="input"`) or where it leaves the layers that make it (before; "output"); a group with several
sites, such as a residual stream, sums over them. One assignment a group and no iteration, except where groups lie within
another (heads): those are matched inside each pair of blocks, as in weight matching.

Written as weight matching of pseudo-tensors [N, features], one a site, so that heads, fused tensors and flattened channels
need no code of their own. Cost: one forward of each model over the data, n^2 N a site, one assignment a group. Memory: the
values of all sites, `rows` x features x 4 bytes a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.merge.align.matching import Matching, match
from trimtab.merge.align.permutation import Group, Place, Spec, units

Where = Literal["input", "output"]
Forward = Callable[[nn.Module, Any], Any]
Keep = Callable[[Any], Tensor | None]  # of a batch: which of its positions are real, bool in their shape; None: all
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def sites(spec: Spec, model: nn.Module, where: Where = "input") -> Spec:
    """The spec over pseudo-tensors: each group's places are features (axis 1) at the modules where its values show.

    Groups that show nowhere are left out: their units stay where they are.
    """
    axes = {name: _axes(module) for name, module in model.named_modules()}
    groups: list[Group] = []
    for group in spec.groups:
        places = []
        for place in group.places:
            module, _, kind = place.tensor.rpartition(".")
            wanted = axes.get(module)
            if kind == "weight" and wanted is not None and place.axis == wanted[0 if where == "input" else 1]:
                places.append(Place(module, 1, place.start, place.block))
        groups.append(Group(group.name, group.size, tuple(dict.fromkeys(places)), group.after))
    shown = {group.name for group in groups if group.places}
    shown |= {group.after for group in groups if group.name in shown}
    return Spec(tuple(group for group in groups if group.name in shown and (not group.after or group.after in shown)))


def collect(
    model: nn.Module,
    modules: Iterable[str],
    batches: Iterable[Any],
    *,
    where: Where = "input",
    rows: int = 4096,
    forward: Forward | None = None,
    keep: Keep | None = None,
) -> dict[str, Tensor]:
    """Values at these modules, float32 [N, features]: a row a position (token, pixel) of the data, at most `rows`.

    forward(model, batch) runs one batch; without it model(batch). Where there are more positions than rows, each batch gives
    its share, evenly spaced. keep leaves padding out. The model runs in evaluation mode: dropout would make both sides noisy.
    """
    batches = list(batches)
    if not batches:
        raise UsageError("activation matching needs data: no batch was given")
    share = max(1, rows // len(batches))
    kept: dict[str, list[Tensor]] = {name: [] for name in modules}
    found = dict(model.named_modules())
    handles = []
    real: Tensor | None = None

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            value = (inputs[0] if where == "input" else output).detach()
            if isinstance(module, _CONVS):
                value = value.movedim(1, -1)
            flat = value.reshape(-1, value.shape[-1])
            if real is not None and len(flat) == real.numel():
                flat = flat[real.flatten().to(flat.device)]
            if len(flat) > share:
                flat = flat[torch.linspace(0, len(flat) - 1, share).long()]
            kept[name].append(flat.to(torch.float32).cpu())

        return hook

    training = model.training
    model.eval()
    try:
        handles = [found[name].register_forward_hook(record(name)) for name in kept]
        with torch.no_grad():
            for batch in batches:
                real = None if keep is None else keep(batch)
                model(batch) if forward is None else forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return {name: torch.cat(parts) for name, parts in kept.items()}


def activation_match(
    spec: Spec,
    target: nn.Module,
    moving: nn.Module,
    batches: Iterable[Any],
    *,
    where: Where = "input",
    correlation: bool = False,
    rows: int = 4096,
    forward: Forward | None = None,
    keep: Keep | None = None,
    seed: int = 0,
) -> Matching:
    """Permutations for `moving`'s units by their values on `batches`; groups whose values do not show keep their order."""
    batches = list(batches)
    shown = sites(spec, target, where)
    names = shown.tensors()
    values = [
        collect(model, names, batches, where=where, rows=rows, forward=forward, keep=keep) for model in (target, moving)
    ]
    if correlation:
        values = [{name: standardised(value) for name, value in side.items()} for side in values]
    for name in names:
        if not all(bool(side[name].isfinite().all()) for side in values):
            raise UsageError(f"activation matching: the values at {name!r} are not finite numbers")
    found = match(shown, *values, seed=seed)
    found.permutations = {**spec.identity(), **found.permutations}
    return found


def standardised(values: Tensor) -> Tensor:
    """Each column centred, and divided by its deviation times sqrt(N); a constant column is 0. [N, n]."""
    centred = values.to(torch.float64) - values.to(torch.float64).mean(0)
    size = centred.norm(dim=0)
    return centred / size.masked_fill(size < 1e-12 * (1 + values.abs().max()), float("inf"))


def activation_cost(spec: Spec, name: str, values_a: Mapping[str, Tensor], values_b: Mapping[str, Tensor]) -> Tensor:
    """C [n, n] of one group, from values that `collect` gave and a spec that `sites` gave."""
    group = next(one for one in spec.groups if one.name == name)
    total = torch.zeros(group.size, group.size, dtype=torch.float64)
    for place in group.places:
        total += units(values_a[place.tensor], place, group.size) @ units(values_b[place.tensor], place, group.size).T
    return total


def _axes(module: nn.Module) -> tuple[int, int] | None:
    """(input axis, output axis) of a layer's weight."""
    if isinstance(module, (nn.Linear, *_CONVS)):
        return 1, 0
    if type(module).__name__ == "Conv1D":  # of transformers: a linear layer stored the other way round
        return 0, 1
    return None
