"""Natural control without samples: the exact natural gradient at every prefix of `oracles.toy.Toy`.

At a prefix with next-token distribution p, psi_a = W_a - E_p[W], F = E_p[psi psi'] [D, D], g = E_p[psi_a A_a] [D], and the
natural gradient is u* = F^+ g. All in float64.
"""

from __future__ import annotations

import torch

from oracles.toy import Toy


def centred_rows(toy: Toy, logprobs: torch.Tensor) -> torch.Tensor:
    """psi [N, V, D]: the rows of the unembedding minus their mean under a policy."""
    return toy.unembedding[None] - (logprobs.exp() @ toy.unembedding)[:, None]


def fisher(toy: Toy, logprobs: torch.Tensor) -> torch.Tensor:
    """F [N, D, D]."""
    psi = centred_rows(toy, logprobs)
    return torch.einsum("nv,nvd,nve->nde", logprobs.exp(), psi, psi)


def gradient(toy: Toy, logprobs: torch.Tensor, q: torch.Tensor | None = None) -> torch.Tensor:
    """g [N, D] with the advantages of that policy's own Q, or of the given q [N, V]."""
    q = toy.values(logprobs)[0] if q is None else q
    p = logprobs.exp()
    advantage = q - (p * q).sum(-1, keepdim=True)
    return torch.einsum("nv,nvd,nv->nd", p, centred_rows(toy, logprobs), advantage)


def natural_gradient(toy: Toy, logprobs: torch.Tensor | None = None, q: torch.Tensor | None = None) -> torch.Tensor:
    """u* [N, D], of minimal norm."""
    logprobs = toy.base if logprobs is None else logprobs
    inverse = torch.linalg.pinv(fisher(toy, logprobs), rtol=1e-10, hermitian=True)
    return torch.einsum("nde,ne->nd", inverse, gradient(toy, logprobs, q))


def in_rounds(toy: Toy, strength: float, rounds: int) -> torch.Tensor:
    """Edited states [N, D] after equal steps, each along the exact natural gradient of the policy so far."""
    states = toy.states.double()
    for _ in range(rounds):
        states = states + strength / rounds * natural_gradient(toy, toy.logprobs(states))
    return states
