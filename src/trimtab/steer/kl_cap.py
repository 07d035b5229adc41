"""How far along an edit of the final hidden state a token may go before it costs more than a given KL."""

from __future__ import annotations

import torch

from trimtab.divergence import kl_between
from trimtab.head import Head


@torch.no_grad()
def largest_share(
    head: Head, hidden: torch.Tensor, u: torch.Tensor, cap: float, temperature: float = 1.0
) -> torch.Tensor:
    """The largest s in [0, 1] with KL(softmax(logits(o + s u)) || softmax(logits(o))) <= cap nats, for each row.

    hidden o [..., D], u [..., D] -> [...]. With q = W u / temperature the logits along s are a line, and
    KL(s) = s K'(s) - K(s) with the cumulant K(s) = log E_p exp(s q), which rises with s: bisection, keeping the side
    that respects the cap. A soft-capped head is evaluated at each s.
    """
    base = head(hidden) / temperature
    logp = base.log_softmax(-1)
    line = None if head.cap is not None else head.jvp(hidden, u) / temperature

    def kl(s: torch.Tensor) -> torch.Tensor:
        logits = head(hidden + s[..., None] * u) / temperature if line is None else base + s[..., None] * line
        return kl_between(logits.log_softmax(-1), logp)

    low, high = torch.zeros(u.shape[:-1], device=u.device), torch.ones(u.shape[:-1], device=u.device)
    whole = kl(high) <= cap
    for _ in range(30):
        middle = (low + high) / 2
        fits = kl(middle) <= cap
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return torch.where(whole, torch.ones_like(low), low)
