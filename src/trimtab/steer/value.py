"""`ValueNetwork` V(o): the reward to expect from a final hidden state, and how to fit it to rollouts.

V is a small ReLU network, hence piecewise linear: its gradient is W1' (mask * w2), a closed form, and gradient ascent can
update the pre-activations through the Gram matrix G = W1 W1' instead of recomputing them (`ascend`).

Targets (RE-Control, arXiv 2406.05954, and its correction). With z the standardised reward of the answer and T its last
token, G_T = z and G_t = (1 - lambda) sg[V(o_{t+1})] + lambda G_{t+1}:
    td0 (lambda 0, the paper), mc (lambda 1), td_lambda (ours, the default: lambda 0.95), and, to reproduce the published
    code only, `residual` (no stop-gradient) and `terminal="first"` (reward given to the first step).
The loss is the mean over steps, so long answers count by their steps and not twice. The best epoch is the one with the
lowest held-out squared error of V against the reward over *all* states. (The TD loss is minimised by a constant; the
error at the last state alone, which the paper's note proposes, is pure noise wherever the last token is certain: the
state before a sure end-of-sequence token need not remember what was said.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.steer.rollouts import Progress, Rollouts

WIDE = 384  # hidden units from which it pays to look for those that switched
Extra = Callable[["ValueNetwork", torch.Tensor, torch.Tensor], torch.Tensor]


class ValueNetwork(nn.Module):
    """V: [..., D] -> [...], in standardised reward units; `in_reward_units` undoes the standardisation.

    hidden_layers: 1 ("2-layer") or more. The reward's mean and standard deviation travel with the weights.
    """

    reward_mean: torch.Tensor
    reward_std: torch.Tensor

    def __init__(self, hidden_size: int, width: int | None = None, hidden_layers: int = 1):
        super().__init__()
        if hidden_size < 1 or hidden_layers < 1 or (width is not None and width < 1):
            raise UsageError("a value network needs a hidden size, a width and a number of hidden layers of at least 1")
        width = width or hidden_size
        sizes = [hidden_size, *[width] * hidden_layers]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.out = nn.Linear(width, 1)
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))
        self._kept: tuple[tuple[int, int], torch.Tensor] | None = None

    @property
    def layers(self) -> list[nn.Linear]:
        return cast("list[nn.Linear]", list(self.hidden))

    @property
    def hidden_size(self) -> int:
        return self.layers[0].in_features

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.out(x)[..., 0]

    def in_reward_units(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.reward_std + self.reward_mean

    @torch.no_grad()
    def gradient(self, hidden: torch.Tensor) -> torch.Tensor:
        """dV/do in closed form, [..., D]: the product of the layers' weights over the units that are on."""
        x, masks = hidden, []
        for layer in self.layers:
            z = layer(x)
            masks.append(z > 0)
            x = z.relu()
        g = self.out.weight[0] * masks[-1]
        for layer, mask in zip(reversed(self.layers[1:]), reversed(masks[:-1]), strict=True):
            g = (g @ layer.weight) * mask
        return g @ self.layers[0].weight

    @torch.no_grad()
    def ascend(self, hidden: torch.Tensor, step_size: float, steps: int) -> torch.Tensor:
        """u after `steps` of u <- u + step_size dV/do(o + u), [..., D]. No product with D inside the loop.

        The first layer's pre-activations z move by step_size G g, with G = W1 W1' (kept) and g the gradient in z, so
        o + u is never formed; u = step_size W1' sum of g. Equal to the plain loop up to rounding.
        """
        first = self.layers[0]
        z = first(hidden).flatten(0, -2) if hidden.dim() > 1 else first(hidden)[None]  # [n, H]
        climb = self._climb_deep if len(self.hidden) > 1 else self._climb_wide if z.shape[1] >= WIDE else self._climb
        total = climb(z, self._gram(), step_size, steps) if steps else torch.zeros_like(z)
        return (step_size * (total @ first.weight)).view(hidden.shape)

    # the sum over the steps of the gradient in z, [n, H] -> [n, H]

    def _climb(self, z: torch.Tensor, gram: torch.Tensor, step_size: float, steps: int) -> torch.Tensor:
        w, total = self.out.weight[0], torch.zeros_like(z)
        for _ in range(steps):
            g = w * (z > 0)
            total += g
            z = torch.addmm(z, g, gram, alpha=step_size)
        return total

    def _climb_wide(self, z: torch.Tensor, gram: torch.Tensor, step_size: float, steps: int) -> torch.Tensor:
        """Only units that switch on or off change g, so only their rows of the Gram matrix are read."""
        w, on = self.out.weight[0], z > 0
        g = w * on
        total, velocity = g.clone(), g @ gram
        for _ in range(steps - 1):
            z = torch.add(z, velocity, alpha=step_size)
            now = z > 0
            switched = (now != on).any(0).nonzero()[:, 0]
            if 4 * len(switched) > z.shape[1]:
                g = w * now
                velocity = g @ gram
            elif len(switched):
                new = w * now
                velocity = velocity + (new - g)[:, switched] @ gram[switched]
                g = new
            on = now
            total += g
        return total

    def _climb_deep(self, z: torch.Tensor, gram: torch.Tensor, step_size: float, steps: int) -> torch.Tensor:
        total, inner = torch.zeros_like(z), self.layers[1:]
        for _ in range(steps):
            mask = z > 0
            x, masks = z * mask, [mask]
            for layer in inner:
                x = layer(x)
                masks.append(x > 0)
                x = x.relu()
            g = self.out.weight[0] * masks[-1]
            for layer, below in zip(reversed(inner), reversed(masks[:-1]), strict=True):
                g = (g @ layer.weight) * below
            total += g
            z = torch.addmm(z, g, gram, alpha=step_size)
        return total

    def _gram(self) -> torch.Tensor:
        """G = W1 W1' [H, H], computed again only after W1 changed."""
        weight = self.layers[0].weight
        if weight.is_inference():  # such tensors do not count their changes
            return weight @ weight.T
        state = (weight.data_ptr(), weight._version)
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, (weight @ weight.T).detach())
        return self._kept[1]


@dataclass(frozen=True)
class ValueFit:
    """How V is fitted. Defaults suit models of up to some ten million parameters; for d >= 1024 use lr 1e-4."""

    target: Literal["td_lambda", "td0", "mc", "residual"] = "td_lambda"
    td_lambda: float = 0.95
    terminal: Literal["last", "first"] = "last"
    width: int = 0  # 0: as wide as the hidden state, at least 128
    hidden_layers: int = 1
    lr: float = 1e-3
    batch: int = 128  # answers
    epochs: int = 8
    seed: int = 0


def targets(values: torch.Tensor, lengths: torch.Tensor, z: torch.Tensor, lam: float) -> torch.Tensor:
    """lambda-returns [n, T] from values [n, T] of the same states: the last real step gets z, pads are meaningless."""
    n, width = values.shape
    out = torch.empty_like(values)
    follow = torch.zeros(n, dtype=values.dtype)
    for t in range(width - 1, -1, -1):
        last = lengths - 1 == t
        ahead = values[:, t + 1] if t + 1 < width else follow
        follow = torch.where(last, z, (1 - lam) * ahead + lam * follow)
        out[:, t] = follow
    return out


def value_loss(
    value: nn.Module, rollouts: Rollouts, rows: torch.Tensor, z: torch.Tensor, fit: ValueFit
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of some answers (mean over their steps) and V at their last states [n]."""
    index, mask = rollouts.padded(rows)
    lengths = rollouts.lengths[rows]
    values = value(rollouts.states[index])
    fixed = values if fit.target == "residual" else values.detach()
    lam = {"td0": 0.0, "residual": 0.0, "mc": 1.0, "td_lambda": fit.td_lambda}[fit.target]
    if fit.terminal == "first":  # the published code: the reward is regressed at step 1, V(o_T) has no target
        ahead = torch.cat([fixed[:, 1:], fixed[:, -1:]], 1)
        errors = (values - ahead) ** 2 * (torch.arange(values.shape[1]) < lengths[:, None] - 1)
        loss = (errors.sum() + ((values[:, 0] - z) ** 2).sum()) / mask.sum()
    else:
        loss = ((values - targets(fixed, lengths, z, lam)) ** 2)[mask].mean()
    return loss, values.gather(1, lengths[:, None] - 1)[:, 0]


def fit_value(
    rollouts: Rollouts, fit: ValueFit, extra: Extra | None = None, progress: Progress | None = None
) -> tuple[ValueNetwork, dict[str, float]]:
    """Fit V to rollouts; returns it in evaluation mode with its held-out metrics.

    extra(value, rows, last_values) is added to the loss (Pref-CTRL's terms). Metrics: `held_out_error` in
    standardised units (1 = as good as the mean), correlation of V with the reward at the first, middle and last state.
    """
    generator = torch.Generator().manual_seed(fit.seed)
    hidden_size = rollouts.states.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        value = ValueNetwork(hidden_size, fit.width or max(128, hidden_size), fit.hidden_layers)
    value.reward_mean.fill_(float(rollouts.rewards.mean()))
    value.reward_std.fill_(float(rollouts.rewards.std()))
    z = rollouts.standardised
    train, held = rollouts.split(0.1, generator)
    optimiser = torch.optim.Adam(value.parameters(), lr=fit.lr)
    best, best_error = copy.deepcopy(value.state_dict()), float("inf")
    for epoch in range(fit.epochs):
        for rows in train[torch.randperm(len(train), generator=generator)].split(fit.batch):
            loss, last = value_loss(value, rollouts, rows, z[rows], fit)
            if extra is not None:
                loss = loss + extra(value, rows, last)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        error = held_out_error(value, rollouts, held)
        if error < best_error:
            best, best_error = copy.deepcopy(value.state_dict()), error
        if progress is not None:
            progress(f"value network, epoch {epoch + 1}/{fit.epochs}: held-out error {error:.4f}")
    value.load_state_dict(best)
    value.eval().requires_grad_(False)
    return value, {"held_out_error": best_error, **_correlations(value, rollouts, held)}


@torch.no_grad()
def held_out_error(value: nn.Module, rollouts: Rollouts, rows: torch.Tensor) -> float:
    """Mean over the steps of some answers of (V(o_t) - z)^2; its minimiser is the expected reward given the state."""
    index, mask = rollouts.padded(rows)
    z = rollouts.standardised[rows][:, None].expand(index.shape)
    return float(((value(rollouts.states[index[mask]]) - z[mask]) ** 2).mean())


def _correlations(value: nn.Module, rollouts: Rollouts, rows: torch.Tensor) -> dict[str, float]:
    """Correlation of V(o_t) with the reward at t = 1, T/2 and T; 0 where one of them does not vary."""
    starts, lengths = rollouts.offsets[rows], rollouts.lengths[rows]
    reward = rollouts.rewards[rows]
    out = {}
    for name, at in (("first", starts), ("middle", starts + lengths // 2), ("last", starts + lengths - 1)):
        values = value(rollouts.states[at])
        pair = torch.stack([values, reward])
        varies = len(rows) > 2 and bool((pair.std(1) > 1e-8).all())
        out[f"correlation_{name}"] = float(torch.corrcoef(pair)[0, 1]) if varies else 0.0
    return out
