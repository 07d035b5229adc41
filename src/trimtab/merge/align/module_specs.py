"""Permutation specs of torch modules, found by following the data: `module_spec(model, example)`.

The model is traced (torch.fx). Every value has a *width*: its channels or features, of which each Linear or convolution
makes one. What works on each channel alone (activations, pooling, dropout, batch statistics, a convolution with a channel a
group) keeps the width; adding two values makes their widths one; flattening turns a channel into a run of neighbouring
features. Residual nets, with or without a convolution on the shortcut, and multi-layer perceptrons come out of these rules.

Whatever is not known (a concatenation, a softmax, an attention) pins its inputs and its output: their order stays. So does
that of the network's own inputs and outputs. The spec is then tested: random permutations must not change the output on
`example`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from trimtab.errors import UsageError
from trimtab.merge.align.permutation import Group, Place, Spec, check_function

_EACH = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.Softplus, nn.Hardtanh, nn.Mish,
    nn.Hardswish, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Flatten,
)  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.LayerNorm)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EACH_FUNCTIONS = (
    F.relu, F.gelu, F.silu, F.leaky_relu, F.elu, F.softplus, F.dropout, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d, torch.relu, torch.tanh, torch.sigmoid, torch.flatten,
)  # fmt: skip
_EACH_METHODS = ("relu", "tanh", "sigmoid", "flatten", "contiguous", "float", "double")
_TOGETHER: tuple[Callable[..., Any], ...] = (
    operator.add,
    operator.iadd,
    operator.mul,
    operator.imul,
    operator.sub,
    torch.add,
)


@dataclass(eq=False)
class _Width:
    """One group in the making; `same` points to the one it was made one with."""

    size: int
    name: str
    pinned: bool = False
    places: list[Place] = field(default_factory=list)
    same: _Width | None = None

    def root(self) -> _Width:
        return self if self.same is None else self.same.root()


def module_spec(model: nn.Module, example: Tensor, tolerance: float = 1e-4, seed: int = 0) -> Spec:
    """The groups of a torch module. example: a small batch of its inputs.

    The model is tested in evaluation mode on a copy. UsageError where it cannot be traced, or where the test fails.
    """
    try:
        graph = fx.symbolic_trace(model)
    except Exception as error:
        raise UsageError(
            f"the {type(model).__name__} cannot be traced ({str(error).splitlines()[0]}): write its permutation spec by "
            "hand, trimtab.merge.align.permutation.Spec"
        ) from error
    spec = _Walk(model, graph.graph).spec()
    tested = copy.deepcopy(model).eval()
    with torch.no_grad():
        check_function(
            spec,
            {**dict(tested.named_parameters()), **dict(tested.named_buffers())},
            lambda tensors: torch.func.functional_call(tested, tensors, (example,)),
            seed,
            tolerance,
        )
    return spec


class _Walk:
    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.modules = dict(model.named_modules())
        self.graph = graph
        self.widths: list[_Width] = []
        self.of: dict[fx.Node, _Width] = {}
        self.calls: dict[str, tuple[_Width | None, _Width | None]] = {}  # module -> what it read, what it made

    def spec(self) -> Spec:
        for node in self.graph.nodes:
            if node.op == "output":
                self._pin(node)
            elif node.op != "placeholder":
                made = self._made(node)
                if made is not None:
                    self.of[node] = made
        groups = []
        for width in self.widths:
            if width.same is None and not width.pinned and width.places and width.size > 1:
                groups.append(Group(width.name, width.size, tuple(dict.fromkeys(width.places))))
        return Spec(tuple(groups))

    def _made(self, node: fx.Node) -> _Width | None:
        """The width of a node's value; None: it has none that may change (an input of the network, say)."""
        inputs = [self.of[one].root() for one in node.all_input_nodes if one in self.of]
        every = len(inputs) == len(node.all_input_nodes)
        if node.op == "call_module":
            return self._module(str(node.target), inputs[0] if inputs else None)
        alone = len(inputs) == 1 and len(node.all_input_nodes) == 1
        if (node.op == "call_function" and node.target in _EACH_FUNCTIONS and alone) or (
            node.op == "call_method" and node.target in _EACH_METHODS and alone
        ):
            return inputs[0]
        if node.op == "call_function" and node.target in _TOGETHER and every and inputs:
            return self._join(inputs)
        self._pin(node)
        return None

    def _module(self, name: str, read: _Width | None) -> _Width | None:
        module = self.modules[name]
        if isinstance(module, _EACH):
            return read
        if name in self.calls:  # a layer that is used twice
            return self._again(*self.calls[name], read)
        if isinstance(module, (nn.Linear, *_CONVS)):
            made = self._layer(name, module, read)
            self.calls[name] = (read, made)
            return made
        if isinstance(module, _NORMS) and read is not None:
            shapes = {key: tuple(value.shape) for key, value in module.state_dict().items() if value.ndim}
            normalised = tuple(getattr(module, "normalized_shape", (read.size,)))
            if normalised == (read.size,) and all(shape == (read.size,) for shape in shapes.values()):
                read.places += [Place(f"{name}.{key}", 0) for key in shapes]
                self.calls[name] = (read, read)
                return read
        if read is not None:
            read.pinned = True
        return None

    def _again(self, earlier: _Width | None, made: _Width | None, read: _Width | None) -> _Width | None:
        if earlier is not None and read is not None:
            self._join([earlier.root(), read])
        elif earlier is not None or read is not None:
            (earlier or read).root().pinned = True  # type: ignore[union-attr]
        return None if made is None else made.root()

    def _layer(self, name: str, module: Any, read: _Width | None) -> _Width | None:
        weight = module.weight
        groups = getattr(module, "groups", 1)
        bias = [Place(f"{name}.bias", 0)] if module.bias is not None else []
        if groups > 1:
            if read is not None and groups == read.size == weight.shape[0]:
                read.places += [Place(f"{name}.weight", 0), *bias]
                return read
            if read is not None:
                read.pinned = True
        elif read is not None:
            block, rest = divmod(weight.shape[1], read.size)
            if rest:
                read.pinned = True
            else:
                read.places.append(Place(f"{name}.weight", 1, 0, block))
        made = _Width(weight.shape[0], name, places=[Place(f"{name}.weight", 0), *bias])
        self.widths.append(made)
        return made

    def _join(self, inputs: list[_Width]) -> _Width | None:
        first, *others = dict.fromkeys(inputs)
        for other in others:
            if other.size != first.size:  # broadcast
                first.pinned = other.pinned = True
                return None
            first.places += other.places
            first.pinned |= other.pinned
            other.same = first
        return first

    def _pin(self, node: fx.Node) -> None:
        for one in node.all_input_nodes:
            if one in self.of:
                self.of[one].root().pinned = True
