"""The straight path between two models, and the loss barrier on it.

    theta(l) = (1 - l) A + l B,  l in [0, 1]
    barrier  = max_l [ L(theta(l)) - ((1 - l) L(A) + l L(B)) ]

Frankle et al., arXiv 1912.05671; Git Re-Basin, arXiv 2209.04836. A network with batch norms must have its running statistics
estimated again at every l (`reestimate`), or the barrier is the statistics' and not the weights'. `repair` (REPAIR, Jordan et
al., arXiv 2211.08403) gives each unit of an interpolated network the mean and deviation that interpolate its endpoints'.

Cost: one evaluation of the loss a point. Losses are nats, means over whatever the caller's function averages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import UsageError

Evaluate = Callable[[dict[str, Tensor]], Mapping[str, float]]
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Path:
    """values: of each quantity ("loss", "error", ...) at every l of `lambdas`, which begins with 0 and ends with 1."""

    lambdas: list[float]
    values: dict[str, list[float]]

    def barrier(self, key: str = "loss") -> float:
        """The largest excess over the line between the ends; 0 where nothing lies above it."""
        return max(self.excess(key))

    def excess(self, key: str = "loss") -> list[float]:
        """By how much each point lies above the line between the ends; 0 at both."""
        values = self.values[key]
        line = [(1 - l) * values[0] + l * values[-1] for l in self.lambdas]  # noqa: E741
        return [0.0, *(value - at for value, at in zip(values[1:-1], line[1:-1], strict=True)), 0.0]

    def middle(self, key: str = "loss") -> float:
        """The value at the point nearest to l = 0.5."""
        return min(zip(self.lambdas, self.values[key], strict=True), key=lambda one: abs(one[0] - 0.5))[1]


def interpolate(a: Mapping[str, Tensor], b: Mapping[str, Tensor], at: float) -> dict[str, Tensor]:
    """(1 - at) A + at B, in float32 at least, in A's dtype; A's whole numbers."""
    out = {}
    for name, one in a.items():
        if not one.is_floating_point():
            out[name] = one
            continue
        work = torch.float64 if one.dtype == torch.float64 else torch.float32
        out[name] = torch.lerp(one.to(work), b[name].to(work), at).to(one.dtype)
    return out


def walk(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    evaluate: Evaluate,
    points: int = 25,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Evaluates `points` models from A to B, the ends included. evaluate: tensors -> {"loss": ..., ...}.

    UsageError for a value that is not finite: no barrier could be told.
    """
    if points < 3:
        raise UsageError(f"a path needs at least 3 points, not {points}")
    lambdas = [i / (points - 1) for i in range(points)]
    values: dict[str, list[float]] = {}
    for number, at in enumerate(lambdas):
        for key, value in evaluate(interpolate(a, b, at)).items():
            if not math.isfinite(value):
                raise UsageError(f"the {key} at {at:g} of the path is {float(value)}: a model there overflows")
            values.setdefault(key, []).append(float(value))
        if progress is not None:
            progress(f"path: {number + 1} of {points} points")
    return Path(lambdas, values)


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BATCH_NORMS) and module.track_running_stats for module in model.modules())


def reestimate(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> None:
    """Estimates the running statistics of all batch norms again, as plain means over these batches.

    Only the batch norms are in training mode meanwhile, so dropout stays off.
    """
    norms = [module for module in model.modules() if isinstance(module, _BATCH_NORMS) and module.track_running_stats]
    kept = [(module.momentum, module.training) for module in norms]
    model.eval()
    seen = 0
    try:
        for module in norms:
            module.reset_running_stats()
            module.momentum = None  # a cumulative mean
            module.train()
        with torch.no_grad():
            for batch in batches if norms else ():
                model(batch) if forward is None else forward(model, batch)
                seen += 1
    finally:
        for module, (momentum, training) in zip(norms, kept, strict=True):
            module.momentum = momentum
            module.train(training)
    if norms and not seen:
        raise UsageError("batch norms need data to estimate their statistics again: no batch was given")


def repair(merged: nn.Module, ends: Sequence[nn.Module], at: float, layers: Sequence[str], batch: Any) -> None:
    """REPAIR, in place: at these layers, in the order in which they run, every unit's output gets the mean and the deviation
    (1 - at) A's + at B's on `batch`, and the correction goes into weight and bias.

    layers: Linear or convolution with a bias. One forward of each model; later layers are corrected on what corrected earlier
    ones hand them. Do not use it where a norm follows the layer: the norm undoes it.
    """
    modules = dict(merged.named_modules())
    for name in layers:
        if getattr(modules.get(name), "bias", None) is None:
            raise UsageError(f"repair: {name!r} is no layer with a bias, and a mean cannot be moved without one")
    goals = [_moments(model, layers, batch) for model in ends]
    handles = []

    def corrected(name: str) -> Callable[..., Tensor]:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            mean, deviation = _moments_of(output, _axis(module))
            want_mean, want_deviation = (
                (1 - at) * one + at * two for one, two in zip(goals[0][name], goals[1][name], strict=True)
            )
            scale = want_deviation / deviation.clamp_min(1e-12)
            scale = torch.where(deviation < 1e-12, torch.ones_like(scale), scale)  # a dead unit has nothing to scale
            shape = [-1 if axis == _axis(module) % output.ndim else 1 for axis in range(output.ndim)]
            out = (output - mean.view(shape)) * scale.view(shape) + want_mean.view(shape)
            module.weight.data.mul_(scale.view(-1, *[1] * (module.weight.ndim - 1)))
            module.bias.data.sub_(mean).mul_(scale).add_(want_mean)
            return out

        return hook

    merged.eval()
    try:
        handles = [modules[name].register_forward_hook(corrected(name)) for name in layers]
        with torch.no_grad():
            merged(batch)
    finally:
        for handle in handles:
            handle.remove()


def _moments(model: nn.Module, layers: Sequence[str], batch: Any) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, tuple[Tensor, Tensor]] = {}
    modules, handles = dict(model.named_modules()), []

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.update({name: _moments_of(output, _axis(module))})

    training = model.training
    model.eval()
    try:
        handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
        with torch.no_grad():
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return found


def _axis(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def _moments_of(output: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    flat = output.movedim(axis, -1).flatten(0, -2)
    return flat.mean(0), flat.std(0, correction=0)
