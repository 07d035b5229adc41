"""CCS probes (2212.03827) for all layers and all tries at once, and what polarity does to them (2511.21737).

A statement s is read twice, as "s Yes." and as "s No.": x1, x0. The probe p(x) = sigmoid(w x + b) is trained without labels:

    loss = mean (p0 - (1 - p1))^2 + mean min(p0, p1)^2          consistent, and confident
    q = (p1 + 1 - p0) / 2 in [0, 1], the statement's score      q > 0.5 where w (x1 - x0) > 0, whatever b

K probes (layers, and controls) and T random beginnings are one batch: weights [K, T, D], one AdamW; of the T the one with the
lowest loss is kept. Before that, x1 and x0 are brought to norm 1 and centred, each about its own centre over the TRAINING
statements, harmful and safe together. Without centring a probe finds "ends in Yes" and nothing else, at a LOWER loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Centre = Literal["median", "mean", "none"]
Tensor = torch.Tensor
BYTES = 1 << 29  # of states that are trained on together


@dataclass(frozen=True)
class Centred:
    """The one transform of training, testing and every control: x -> x / |x| (if unit) - centre of its own answer."""

    yes: Tensor  # [K, 1, D]
    no: Tensor
    unit: bool

    @classmethod
    def of(cls, yes: Tensor, no: Tensor, rows: Tensor, how: Centre, unit: bool) -> Centred:
        """yes, no [K, n, D]; rows: the training statements."""
        centres = []
        for x in (yes, no):
            part = F.normalize(x[:, rows], dim=-1) if unit else x[:, rows]
            centre = part.median(1, keepdim=True).values if how == "median" else part.mean(1, keepdim=True)
            centres.append(torch.zeros_like(centre) if how == "none" else centre)
        return cls(centres[0], centres[1], unit)

    def __call__(self, yes: Tensor, no: Tensor) -> tuple[Tensor, Tensor]:
        if self.unit:
            yes, no = F.normalize(yes, dim=-1), F.normalize(no, dim=-1)
        return yes - self.yes, no - self.no


@dataclass(frozen=True)
class Probes:
    """weight [K, D], bias [K]; loss [K]: the unsupervised one they were chosen by."""

    weight: Tensor
    bias: Tensor
    loss: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x [K, n, D] -> p [K, n]"""
        return (torch.einsum("knd,kd->kn", x, self.weight) + self.bias[:, None]).sigmoid()


def ccs_loss(p1: Tensor, p0: Tensor) -> Tensor:
    """[..., n] -> [...]: 0 for a consistent and certain probe, 0.25 for one that always says 0.5."""
    return ((p0 - (1 - p1)) ** 2).mean(-1) + (torch.minimum(p0, p1) ** 2).mean(-1)


def score(p1: Tensor, p0: Tensor) -> Tensor:
    return 0.5 * (p1 + 1 - p0)


def train(
    x1: Tensor,
    x0: Tensor,
    *,
    tries: int = 10,
    steps: int = 1500,
    lr: float = 0.015,
    weight_decay: float = 0.01,
    seed: int = 0,
    labels: Tensor | None = None,
    supervision: float = 0.0,
    progress: Callable[[str], None] | None = None,
) -> Probes:
    """Probes for K sets of statements, x1 and x0 [K, n, D] centred. labels [n] add supervision * their cross-entropy."""
    size, per_probe = len(x1), x1[0].numel() * 2 * x1.element_size()
    group = max(1, int(BYTES // per_probe))
    parts = []
    for first in range(0, size, group):
        if progress is not None and size > group:
            progress(f"training probes {first + 1} to {min(first + group, size)} of {size}")
        part = slice(first, first + group)
        generator = torch.Generator().manual_seed(seed + first)
        parts.append(_train(x1[part], x0[part], tries, steps, lr, weight_decay, generator, labels, supervision))
    return Probes(*(torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias", "loss")))


@torch.enable_grad()
def _train(
    x1: Tensor,
    x0: Tensor,
    tries: int,
    steps: int,
    lr: float,
    weight_decay: float,
    generator: torch.Generator,
    labels: Tensor | None,
    supervision: float,
) -> Probes:
    size, _, width = x1.shape
    span = width**-0.5
    weight = (torch.rand(size, tries, width, generator=generator).to(x1) * 2 - 1) * span
    bias = (torch.rand(size, tries, generator=generator).to(x1) * 2 - 1) * span
    both = torch.cat([x1, x0], 1).transpose(1, 2).contiguous()  # [K, D, 2n]
    weight.requires_grad_(True)
    bias.requires_grad_(True)
    optimiser = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=weight_decay)

    def losses() -> Tensor:  # [K, T]
        p1, p0 = (weight @ both + bias[..., None]).sigmoid().chunk(2, -1)
        found = ccs_loss(p1, p0)
        if labels is not None and supervision:
            right = score(p1, p0).clamp(1e-6, 1 - 1e-6)
            found = found + supervision * F.binary_cross_entropy(right, labels.expand_as(right), reduction="none").mean(
                -1
            )
        return found

    for _ in range(steps):
        optimiser.zero_grad()
        losses().sum().backward()  # every try has weights of its own: their gradients do not mix
        optimiser.step()
    with torch.no_grad():
        final = losses()
        best = final.argmin(1)
        rows = torch.arange(size, device=best.device)
        return Probes(weight[rows, best].detach(), bias[rows, best].detach(), final[rows, best])


def polar_consistency(a1: Tensor, a0: Tensor, n1: Tensor, n0: Tensor) -> Tensor:
    """PC = ((a1 - n0)^2 + (a0 - n1)^2) / 2 * sgn(a1 - n1) * sgn(n0 - a0) of pairs; a: one statement, n: its opposite.

    0: "a Yes" is treated like "n No". Negative: the two orderings contradict each other.
    Four independent uniform probabilities give |PC| 1/6 and PC -1/18 on average.
    """
    return 0.5 * ((a1 - n0) ** 2 + (a0 - n1) ** 2) * torch.sign(a1 - n1) * torch.sign(n0 - a0)


def contradiction(a1: Tensor, a0: Tensor, n1: Tensor, n0: Tensor) -> Tensor:
    """CI = a1 n1 + a0 n0 in [0, 2]: 0 never affirms or denies both of a pair. 1/2 for independent uniform ones."""
    return a1 * n1 + a0 * n0
