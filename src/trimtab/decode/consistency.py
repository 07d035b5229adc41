"""CoRE's weights: members that agree and are sure count for more, tokens they disagree on count for less.

q_m [..., U], m = 0 the main model, projected to one space (what an alignment loses is missing from the sum).
    p* = mean_m q_m,  d_m = |q_m - p*|
    token consistency   s_m(v) = f(d_m(v)) where q_m(v) + q_0(v) > 0, else 0;  s~_m = s_m * n_m / sum(s_m),  n_m its support
    model consistency   c_m = sum(s_m) / (H(q_m) + eps);  c_0 <- max(c_0, sum of the others');  w = c / sum(c)
    P = w_0 q_0 + sum_i w_i s~_i q_i
so w_0 >= 1/2: the assistants together never outvote a main model that is sure. The main model is not filtered.

Zeng et al., arXiv 2510.13855 (CoRE). Departures from the published code: H is floored (`FLOOR`), for one over-confident
member otherwise takes all the weight; `reciprocal` is rescaled on each support, not over padding; P is renormalised.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

EPS = 1e-12
FLOOR = 1e-3  # nats


def rbf(d: torch.Tensor, b: float = 2.0) -> torch.Tensor:
    """1 at agreement, 0 at d = 1; b -> 0 is `linear`."""
    edge = torch.exp(torch.tensor(-b, dtype=d.dtype))
    return (torch.exp(-b * d) - edge) / (1 - edge)


FILTERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rbf": rbf,
    "linear": lambda d: 1 - d,
    "power": lambda d: (1 - d) ** 5,
    "reciprocal": lambda d: 1 / (1 + d),  # rescaled to [0, 1] on its support by `token_consistency`
    "sigmoid": lambda d: 1 - torch.sigmoid(5 * (d - 0.5)),
}


def token_consistency(q: torch.Tensor, filter: str = "rbf") -> torch.Tensor:
    """s [M, ..., U] in [0, 1] from q [M, ..., U]."""
    disparity = (q - q.mean(0)).abs()
    support = q + q[0] > EPS
    s = FILTERS[filter](disparity)
    if filter == "reciprocal":
        low = s.masked_fill(~support, torch.inf).amin(-1, keepdim=True)
        high = s.masked_fill(~support, -torch.inf).amax(-1, keepdim=True)
        s = torch.where(high > low, (s - low) / (high - low), torch.ones_like(s))
    return s * support


def model_weights(q: torch.Tensor, s: torch.Tensor, floor: float = FLOOR) -> torch.Tensor:
    """w [M, ...], summing to 1 over M, from q and s [M, ..., U]; w_0 >= 1/2 where there is an assistant."""
    p = q / q.sum(-1, keepdim=True).clamp(min=EPS)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
    c = s.sum(-1) / (entropy.clamp(min=floor) + EPS)
    if len(c) > 1:
        c[0] = torch.maximum(c[0], c[1:].sum(0))
    return c / c.sum(0)


def consistent(q: torch.Tensor, filter: str = "rbf") -> tuple[torch.Tensor, torch.Tensor]:
    """P [..., U] (sums to 1) and the weights w [M, ...] of CoRE, from q [M, ..., U]."""
    s = token_consistency(q, filter)
    w = model_weights(q, s)
    count = (s != 0).sum(-1, keepdim=True)
    filtered = s * count / s.sum(-1, keepdim=True).clamp(min=EPS) * q
    fused = torch.cat([q[:1], filtered[1:]]) * w[..., None]
    return _normalised(fused.sum(0)), w


def average(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """P [..., U] and the weights of the vanilla ensemble: the mean."""
    return _normalised(q.mean(0)), torch.full(q.shape[:-1], 1 / len(q))


def _normalised(p: torch.Tensor) -> torch.Tensor:
    return p / p.sum(-1, keepdim=True).clamp(min=EPS)
