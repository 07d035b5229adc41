"""How far a policy is from its base: Kullback-Leibler divergence from logits, and the bound for best-of-n. In nats."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from trimtab.errors import UsageError

if TYPE_CHECKING:
    import torch


def best_of_n_bound(n: int) -> float:
    """log n - (n - 1) / n nats *per answer*: an upper bound on KL(best-of-n || base), tight where answers rarely tie.

    Per token, divide by the mean number of tokens of an answer. Beirami et al. 2024 (arXiv 2401.01879) prove the bound.
    """
    if n < 1:
        raise UsageError(f"best-of-n needs n >= 1, not {n}")
    return math.log(n) - (n - 1) / n


def kl_from_logits(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(softmax(p) || softmax(q)) over the last axis: [..., V], [..., V] -> [...], float32, >= 0.

    A token that p excludes (-inf) adds nothing; one that q alone excludes makes the result infinite.
    """
    import torch

    if p.shape != q.shape:
        raise UsageError(f"logits of shapes {tuple(p.shape)} and {tuple(q.shape)} cannot be compared")
    log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -torch.inf, 0.0, terms).sum(-1).clamp_min(0.0)
