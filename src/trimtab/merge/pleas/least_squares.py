"""A merged layer fitted to its two parents: least squares in closed form from streamed moments.

A layer of A maps x_A to y_A, the same layer of B maps x_B to y_B, on the same inputs. With the units of the layer's input and
output axes (`blocks.Units`) let

    X = [ (x_A[a] + x_B[b]) / 2 | x_A[a'] | x_B[b'] ],   Y = [ (y_A[a] + y_B[b]) / 2 | y_A[a'] | y_B[b'] ]
    min_W  |X W^T + 1 bias^T - Y|^2 + lam |W - W_0|^2    with the blocks (A, B) and (B, A) of W held at 0

Every row of W is a regression of its own, so each block of rows is solved over the columns J it may use:

    W_J = (G_JJ + lam I)^-1 (K_J + lam W_0,J^T),   G = X~^T X~, K = X~^T Y, X~ = [X, 1],   lam = ridge * trace(G_JJ) / |J|

`Moments` holds z^T z and z^T [y_A, y_B] of z = [x_A, x_B, 1] in float64. G and K of every split are sums of its rows and
columns, so one pass over the data serves every size.

targets="separate" keeps two rows an input instead of their mean, so that merged units must do for each parent by itself:
[x_A[a] | 2 x_A[a'] | 0] -> y_A[a] and [x_B[b] | 0 | 2 x_B[b']] -> y_B[b] for merged outputs; the mean of both is the row
above. A's own outputs have the one row [x_A[a] | x_A[a'] | 0] -> y_A[a'], and B's theirs. The published variant gives A's own
outputs the target 0 on B's rows, which halves every layer that reads an input both share, and lacks the factor 2, without
which a merged output is twice as large as it should be once both networks' own units are active.

Memory: 8 (2 i + 1)(2 i + 2 o + 1) bytes for i inputs and o outputs. Time: N (2 i + 1)(2 i + 2 o) multiply-adds for N rows,
then d^3 / 3 a block of rows for d columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.errors import UsageError
from trimtab.merge.pleas.blocks import Units


class Moments:
    """Sums of products of one layer's inputs and outputs in two networks.

    matched int64 [outputs]: which output of B each output of A is compared with (errors alone depend on it).
    """

    def __init__(self, inputs: int, outputs: int, matched: Tensor) -> None:
        self.inputs, self.outputs, self.matched, self.rows = inputs, outputs, matched, 0
        self.gram = torch.zeros(2 * inputs + 1, 2 * inputs + 1, dtype=torch.float64)  # of z
        self.cross = torch.zeros(2 * inputs + 1, 2 * outputs, dtype=torch.float64)  # of z with [y_A, y_B]
        self.power = torch.zeros(3, outputs, dtype=torch.float64)  # y_A^2, y_B^2, and y_A times its match

    def add(self, x_a: Tensor, x_b: Tensor, y_a: Tensor, y_b: Tensor) -> None:
        """x [N, inputs], y [N, outputs] of both networks on the same inputs. UsageError where one is not finite."""
        self.to(x_a.device)
        x_a, x_b, y_a, y_b = (one.detach().to(torch.float64) for one in (x_a, x_b, y_a, y_b))
        z = torch.cat([x_a, x_b, torch.ones_like(x_a[:, :1])], dim=1)
        y = torch.cat([y_a, y_b], dim=1)
        if not (bool(z.isfinite().all()) and bool(y.isfinite().all())):
            raise UsageError("a parent's activations are not finite numbers: check its weights and the inputs")
        self.gram.addmm_(z.T, z)
        self.cross.addmm_(z.T, y)
        self.power += torch.stack([(y_a * y_a).sum(0), (y_b * y_b).sum(0), (y_a * y_b[:, self.matched]).sum(0)])
        self.rows += len(z)

    def to(self, device: torch.device | str) -> None:
        """Moves the sums."""
        self.gram, self.cross, self.power = (one.to(device) for one in (self.gram, self.cross, self.power))

    @staticmethod
    def nbytes(inputs: int, outputs: int) -> int:
        return 8 * (2 * inputs + 1) * (2 * inputs + 2 * outputs + 1)


@dataclass(frozen=True)
class Fitted:
    """A layer's weights, float64, and its squared errors (sums over rows and outputs) with W_0, after the fit, and |Y|^2."""

    weight: Tensor  # [rows, columns]
    bias: Tensor | None  # [rows]
    start_error: float
    error: float
    power: float


def fit(
    moments: Moments,
    rows: Units,
    columns: Units,
    weight: Tensor,
    bias: Tensor | None,
    ridge: float,
    targets: str = "average",
) -> Fitted:
    """Solves a layer (see the module). weight [rows, columns] and bias [rows] are W_0.

    UsageError where ridge is 0 and the rows do not determine the weights.
    """
    weight = weight.to(torch.float64).clone()
    bias = None if bias is None else bias.to(torch.float64).clone()
    start_error = error = power = 0.0
    for block, own in _blocks(rows):
        here = (columns.a >= 0) | (columns.b >= 0) if own == "both" else getattr(columns, own) >= 0
        use = torch.nonzero(here).flatten()
        part = Units(columns.a[use], columns.b[use])
        gram, cross, total = _normal(moments, part, Units(rows.a[block], rows.b[block]), own, targets, bias is not None)
        start = weight[block][:, use].T
        if bias is not None:
            start = torch.cat([start, bias[block][None]])
        solved = start + _correction(gram, cross - gram @ start, ridge, moments.rows)
        start_error += _error(start, gram, cross, total)
        error += _error(solved, gram, cross, total)
        power += total
        if bias is not None:
            bias[block] = solved[-1]
        weight[block[:, None], use[None]] = solved[: len(use)].T
    return Fitted(weight, bias, max(start_error, 0.0), max(error, 0.0), power)


def _blocks(rows: Units) -> Iterator[tuple[Tensor, str]]:
    for mask, own in ((rows.merged, "both"), ((rows.a >= 0) & (rows.b < 0), "a"), ((rows.b >= 0) & (rows.a < 0), "b")):
        if bool(mask.any()):
            yield torch.nonzero(mask).flatten(), own


def _designs(columns: Units, own: str, targets: str) -> list[tuple[Tensor, Tensor, float, float]]:
    """What each row of a regression is made of: the factors of x_A and of x_B (a column each), and of y_A and y_B."""
    in_a, in_b = (columns.a >= 0).to(torch.float64), (columns.b >= 0).to(torch.float64)
    if targets == "average":
        y = {"both": (0.5, 0.5), "a": (1.0, 0.0), "b": (0.0, 1.0)}[own]
        return [(in_a * columns.scale, in_b * columns.scale, *y)]
    nothing = torch.zeros_like(in_a)
    twice = 2.0 * columns.scale if own == "both" else torch.ones_like(in_a)
    from_a, from_b = (in_a * twice, nothing, 1.0, 0.0), (nothing, in_b * twice, 0.0, 1.0)
    return {"both": [from_a, from_b], "a": [from_a], "b": [from_b]}[own]


def _normal(
    moments: Moments, columns: Units, rows: Units, own: str, targets: str, bias: bool
) -> tuple[Tensor, Tensor, float]:
    """G [d, d], K [d, rows] and |Y|^2 of one block of rows; d = the columns, and one for the bias."""
    size = len(columns) + bias
    gram = torch.zeros(size, size, dtype=torch.float64)
    cross = torch.zeros(size, len(rows), dtype=torch.float64)
    total = 0.0
    a, b = rows.a.clamp_min(0), rows.b.clamp_min(0)
    for of_a, of_b, y_a, y_b in _designs(columns, own, targets):
        gram += _mix(_mix(moments.gram, moments, columns, of_a, of_b, bias).T, moments, columns, of_a, of_b, bias)
        target = moments.cross[:, a] * y_a + moments.cross[:, moments.outputs + b] * y_b
        cross += _mix(target, moments, columns, of_a, of_b, bias)
        power = y_a * y_a * moments.power[0, a] + y_b * y_b * moments.power[1, b]
        total += float((power + 2 * y_a * y_b * moments.power[2, a]).sum())
    return gram, cross, total


def _mix(of_z: Tensor, moments: Moments, columns: Units, of_a: Tensor, of_b: Tensor, bias: bool) -> Tensor:
    """From a row an entry of z to a row a column of X~."""
    mixed = of_z[columns.a.clamp_min(0)] * of_a[:, None]
    mixed += of_z[moments.inputs + columns.b.clamp_min(0)] * of_b[:, None]
    return torch.cat([mixed, of_z[-1:]]) if bias else mixed


def _correction(gram: Tensor, left: Tensor, ridge: float, rows: int) -> Tensor:
    """(G + lam I)^-1 (K - G W_0^T): what the fit adds to W_0."""
    size = len(gram)
    trace = float(gram.trace())
    if trace == 0.0:
        return torch.zeros_like(left)
    if ridge == 0.0 and rows < size:
        raise UsageError(
            f"{rows} rows cannot determine the {size} weights of each output: give more inputs, or ridge above 0 (1e-4)"
        )
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * trace / size * torch.eye(size, dtype=torch.float64))
    if int(failed) or float(factor.diagonal().min()) ** 2 < 1e-14 * trace / size:
        raise UsageError(
            f"the least squares of a layer are singular (ridge {ridge:g}): units are silent or equal on these inputs; "
            "give ridge above 0 (1e-4)"
        )
    return torch.cholesky_solve(left, factor)


def _error(solved: Tensor, gram: Tensor, cross: Tensor, total: float) -> float:
    """|X W^T - Y|^2."""
    return float(((gram @ solved - 2 * cross) * solved).sum()) + total


def patches(x: Tensor, layer: nn.Module) -> Tensor:
    """What a layer multiplies its weights with, one row an output position: [N, inputs], inputs in the weight's order.

    A linear layer's inputs [..., i] lose their leading axes; a convolution's [B, c, h, w] are unfolded. UsageError for a
    grouped convolution: its channels are tied to each other in a way that this fit does not know.
    """
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return x.reshape(-1, x.shape[-1])
    if layer.groups != 1:
        raise UsageError("a grouped or depthwise convolution cannot be merged by least squares: leave its groups out")
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    if isinstance(layer, nn.Conv1d):
        x, kernel, dilation, stride = x[:, :, None], (1, *kernel), (1, *dilation), (1, *stride)
    rows = functional.unfold(x, kernel, dilation=dilation, stride=stride)  # [B, c * kh * kw, positions]
    return rows.transpose(1, 2).reshape(-1, rows.shape[1])


def outputs(y: Tensor, layer: nn.Module) -> Tensor:
    """A layer's outputs, one row a position: [N, outputs], in the order of `patches`."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1])
    return y.reshape(-1, y.shape[-1])


def unfolded(units: Units, layer: nn.Module) -> Units:
    """A convolution's input channels as columns of `patches`: each channel is as many columns as the kernel has places."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return units
    inside = torch.arange(int(torch.Size(layer.kernel_size).numel()))
    a, b = (
        torch.where(index[:, None] >= 0, index[:, None] * len(inside) + inside, -1).flatten()
        for index in (units.a, units.b)
    )
    return Units(a, b)
