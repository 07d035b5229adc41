"""The closed form: against numpy's solver, against Adam, its constraints, its optimality, and convolutions by unfolding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.merge.pleas.blocks import Units, allowed, block_start, split
from trimtab.merge.pleas.least_squares import Moments, fit, outputs, patches, unfolded

ROWS, INPUTS, OUTPUTS = 60, 7, 6


class Layer:
    """Two random linear layers on inputs that are alike but not equal, and a random split of both axes."""

    def __init__(self, seed: int, apart_in: int = 3, apart_out: int = 2, rows: int = ROWS) -> None:
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        shared = draw(rows, INPUTS)
        self.x_a, self.x_b = shared + 0.3 * draw(rows, INPUTS), shared + 0.3 * draw(rows, INPUTS)
        self.w_a, self.w_b, self.b_a, self.b_b = (
            draw(OUTPUTS, INPUTS),
            draw(OUTPUTS, INPUTS),
            draw(OUTPUTS),
            draw(OUTPUTS),
        )
        # Outputs that no linear layer gives exactly: an error of 0 would hide a wrong one.
        self.y_a = torch.tanh(self.x_a @ self.w_a.T + self.b_a)
        self.y_b = torch.tanh(self.x_b @ self.w_b.T + self.b_b)
        self.columns = split(torch.randperm(INPUTS, generator=g), draw(INPUTS), apart_in)
        self.rows = split(torch.randperm(OUTPUTS, generator=g), draw(OUTPUTS), apart_out)
        self.start = block_start(self.w_a, self.w_b, [self.rows, self.columns])
        self.bias = block_start(self.b_a, self.b_b, [self.rows])
        matched = torch.full((OUTPUTS,), -1)
        both = self.rows.merged
        matched[self.rows.a[both]] = self.rows.b[both]
        own_a, own_b = self.rows.b < 0, self.rows.a < 0
        matched[self.rows.a[own_a]] = self.rows.b[own_b]
        self.moments = Moments(INPUTS, OUTPUTS, matched)
        for part in range(0, rows, 17):  # streamed in ragged parts
            cut = slice(part, part + 17)
            self.moments.add(self.x_a[cut], self.x_b[cut], self.y_a[cut], self.y_b[cut])

    def fit(self, ridge: float, targets: str = "average"):  # type: ignore[no-untyped-def]
        return fit(self.moments, self.rows, self.columns, self.start, self.bias, ridge, targets)


def mean_side_by_side(a: Tensor, b: Tensor, units: Units) -> Tensor:
    """[ mean | A's | B's ], written out from the spec, unit by unit."""
    columns = []
    for i, j in zip(units.a.tolist(), units.b.tolist(), strict=True):
        columns.append((a[:, i] + b[:, j]) / 2 if i >= 0 and j >= 0 else a[:, i] if i >= 0 else b[:, j])
    return torch.stack(columns, 1)


def stacked(layer: Layer, row: int, targets: str) -> tuple[Tensor, Tensor]:
    """X and y of one output's regression, by the definition."""
    i, j = int(layer.rows.a[row]), int(layer.rows.b[row])
    if targets == "average":
        x = mean_side_by_side(layer.x_a, layer.x_b, layer.columns)
        return x, mean_side_by_side(layer.y_a, layer.y_b, layer.rows)[:, row]
    parts = []
    for x_own, y_own, unit, own in (
        (layer.x_a, layer.y_a, i, layer.columns.a),
        (layer.x_b, layer.y_b, j, layer.columns.b),
    ):
        if unit < 0:
            continue
        x = torch.zeros(len(x_own), len(own), dtype=torch.float64)
        for column, source in enumerate(own.tolist()):
            alone = not bool(layer.columns.merged[column])
            if source >= 0:
                x[:, column] = x_own[:, source] * (2 if alone and i >= 0 and j >= 0 else 1)
        parts.append((x, y_own[:, unit]))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


@pytest.mark.parametrize("targets", ["average", "separate"])
@pytest.mark.parametrize("seed", range(3))
def test_the_solution_is_numpys_on_the_stacked_data(seed: int, targets: str) -> None:
    layer = Layer(seed)
    found = layer.fit(0.0, targets)
    mask = allowed(layer.rows, layer.columns)
    total = 0.0
    for row in range(len(layer.rows)):
        x, y = stacked(layer, row, targets)
        design = torch.cat([x[:, mask[row]], torch.ones(len(x), 1, dtype=torch.float64)], 1)
        best, *_ = np.linalg.lstsq(design.numpy(), y.numpy(), rcond=None)
        # 60 rows, 11 columns: normal equations lose half of float64's digits at worst.
        torch.testing.assert_close(found.weight[row][mask[row]], torch.from_numpy(best[:-1]), rtol=1e-8, atol=1e-8)
        assert float(found.bias[row]) == pytest.approx(best[-1], abs=1e-8)
        total += float(((design.numpy() @ best - y.numpy()) ** 2).sum())
    assert found.error == pytest.approx(total, rel=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("targets", ["average", "separate"])
def test_zero_blocks_optimality_and_no_worse_than_the_start(ridge: float, targets: str) -> None:
    for seed in range(5):
        layer = Layer(seed)
        found = layer.fit(ridge, targets)
        mask = allowed(layer.rows, layer.columns)
        assert int((~mask).sum()) == 2 * 3 * 2
        assert bool((found.weight[~mask] == 0).all()) and bool((layer.start[~mask] == 0).all())
        assert found.error <= found.start_error * (1 + 1e-12)
        assert found.error < 0.9 * found.start_error  # the start is far from optimal here
        for row in range(len(layer.rows)):
            x, y = stacked(layer, row, targets)
            design = torch.cat([x[:, mask[row]], torch.ones(len(x), 1, dtype=torch.float64)], 1)
            gram = design.T @ design
            lam = ridge * float(gram.trace()) / len(gram)
            w = torch.cat([found.weight[row][mask[row]], found.bias[row][None]])
            w_0 = torch.cat([layer.start[row][mask[row]], layer.bias[row][None]])
            slope = gram @ w - design.T @ y + lam * (w - w_0)
            assert float(slope.norm() / (design.T @ y).norm()) < 1e-6


def test_a_wrong_sign_of_the_ridge_would_be_seen() -> None:
    """A huge ridge keeps the start, none gives the unconstrained optimum: the error lies between, and grows with it."""
    layer = Layer(0)
    errors = [layer.fit(ridge).error for ridge in (0.0, 1e-2, 1.0, 1e6)]
    assert errors == sorted(errors) and errors[-1] == pytest.approx(layer.fit(0.0).start_error, rel=1e-4)


@pytest.mark.parametrize("targets", ["average", "separate"])
def test_everything_apart_leaves_both_layers_as_they_are(targets: str) -> None:
    """Own rows regress A's outputs on A's inputs: where those are linear, the fit is A's layer again."""
    layer = Layer(1, INPUTS, OUTPUTS)
    layer.moments = Moments(INPUTS, OUTPUTS, torch.arange(OUTPUTS))
    layer.moments.add(layer.x_a, layer.x_b, layer.x_a @ layer.w_a.T + layer.b_a, layer.x_b @ layer.w_b.T + layer.b_b)
    found = layer.fit(1e-4, targets)
    torch.testing.assert_close(found.weight, layer.start, rtol=1e-10, atol=1e-10)
    assert found.error / found.power < 1e-12


def test_as_good_as_twenty_thousand_steps_of_adam() -> None:
    layer = Layer(2)
    found = layer.fit(0.0)
    x = mean_side_by_side(layer.x_a, layer.x_b, layer.columns)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1).numpy()
    y = mean_side_by_side(layer.y_a, layer.y_b, layer.rows).numpy()
    mask = np.pad(allowed(layer.rows, layer.columns).numpy(), ((0, 0), (0, 1)), constant_values=True)
    weight = torch.cat([layer.start, layer.bias[:, None]], 1).numpy()
    gram, cross = x.T @ x, y.T @ x  # the gradient of the loss on all rows is 2 (W G - K)
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(1, 20_001):
        slope = 2 * (weight @ gram - cross) * mask
        first += 0.1 * (slope - first)
        second += 0.001 * (slope * slope - second)
        rate = 3e-3 * (1 + np.cos(np.pi * step / 20_000)) / 2  # cosine to 0
        weight -= rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    loss = float(((x @ weight.T - y) ** 2).sum())
    assert found.error <= loss * (1 + 1e-9)
    assert loss == pytest.approx(found.error, rel=0.01)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(3, 4, (2, 3), dilation=2, padding="same", bias=False),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv1d(3, 4, 3, padding=1),
    ],
    ids=["strided", "same", "circular", "1d"],
)
def test_a_convolution_is_a_linear_layer_on_patches(conv: nn.Conv1d | nn.Conv2d) -> None:
    """Unfolded inputs times the flat weight are the convolution's own outputs; and so its fit is the linear one."""
    torch.manual_seed(0)
    conv = conv.double()
    size = (9, 8) if isinstance(conv, nn.Conv2d) else (9,)
    x_a, x_b = torch.randn(5, 3, *size).double(), torch.randn(5, 3, *size).double()
    with torch.no_grad():
        y_a = conv(x_a)
        y_b = (conv(x_b) + 0.1 * x_b.mean()).tanh()
    rows_a, rows_b = patches(x_a, conv), patches(x_b, conv)
    flat = conv.weight.detach().flatten(1)
    bias = torch.zeros(4).double() if conv.bias is None else conv.bias.detach()
    torch.testing.assert_close(rows_a @ flat.T + bias, outputs(y_a, conv), rtol=1e-12, atol=1e-12)
    channels = split(torch.tensor([2, 0, 1]), torch.tensor([3.0, 1.0, 2.0]), 1)
    out = split(torch.tensor([1, 0, 3, 2]), torch.arange(4.0), 2)
    found = Moments(rows_a.shape[1], 4, torch.tensor([1, 0, 3, 2]))
    found.add(rows_a, rows_b, outputs(y_a, conv), outputs(y_b, conv))
    start = block_start(conv.weight.detach(), conv.weight.detach(), [out, channels, None, None])
    solved = fit(found, out, unfolded(channels, conv), start.flatten(1), None, 0.0)
    # By hand: every channel's patch columns are named one by one.
    inside = conv.weight[0, 0].numel()
    named = [
        torch.tensor([i * inside + k if i >= 0 else -1 for i in own.tolist() for k in range(inside)])
        for own in (channels.a, channels.b)
    ]
    wide = Units(*named)
    x = mean_side_by_side(rows_a, rows_b, wide)
    y = mean_side_by_side(outputs(y_a, conv), outputs(y_b, conv), out)
    mask = allowed(out, wide)
    for row in range(len(out)):
        best, *_ = np.linalg.lstsq(x[:, mask[row]].numpy(), y[:, row].numpy(), rcond=None)
        torch.testing.assert_close(solved.weight[row][mask[row]], torch.from_numpy(best), rtol=1e-6, atol=1e-6)


def test_bad_input() -> None:
    with pytest.raises(UsageError, match="8 rows cannot determine the 11 weights.*ridge above 0"):
        Layer(0, rows=8).fit(0.0)
    Layer(0, rows=8).fit(1e-4)
    layer = Layer(0)
    silent = layer.x_a.clone()
    silent[:, 0] = 0.0
    layer.moments = Moments(INPUTS, OUTPUTS, torch.arange(OUTPUTS))
    layer.moments.add(silent, layer.x_b, layer.y_a, layer.y_b)
    layer.columns = split(torch.arange(INPUTS), torch.arange(INPUTS).double(), 3)  # unit 0 stays apart, and is silent
    with pytest.raises(UsageError, match="singular"):
        layer.fit(0.0)
    assert bool(layer.fit(1e-4).weight.isfinite().all())
    silent[0, 0] = torch.nan
    with pytest.raises(UsageError, match="not finite"):
        layer.moments.add(silent, layer.x_b, layer.y_a, layer.y_b)
    with pytest.raises(UsageError, match="grouped or depthwise"):
        patches(torch.randn(1, 4, 5, 5), nn.Conv2d(4, 4, 3, groups=2))
