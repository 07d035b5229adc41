"""`Candidates`: the session of every method that weighs a few next tokens by what each would bring.

    score(z) = log p(z) + weight * bonus(z)     over the k likeliest tokens z; the others are cut away

A method overrides `bonus`. Drawing from softmax(score) or taking its argmax, the cap on the KL, the exact KL of every
step, forks and drops are the same for all of them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from trimtab.divergence import kl_between
from trimtab.errors import UsageError
from trimtab.guided import Companion, Guided
from trimtab.policy import Prompt

HALVINGS = 30  # of the interval in which the capped weight is searched: 1e-9 of the weight
ROUNDING = 1e-5  # nats that float32 may be wrong by when the KL is measured again


class Candidates(Guided):
    """See the module.

    k       tokens weighed; 0: all of them. A k over the vocabulary is the vocabulary
    weight  of the bonus against the log-probability; 0 is the inner session itself
    greedy  the best candidate takes all the probability
    kl_cap  nats a token that KL(guided || inner), both at `temperature`, never exceeds; 0 is the inner session too
    """

    def __init__(
        self,
        inner: Any,
        asked: Sequence[Prompt],
        k: int,
        weight: float,
        greedy: bool = False,
        kl_cap: float | None = None,
        temperature: float = 1.0,
        **companions: Companion,
    ):
        super().__init__(inner, asked, **companions)
        if kl_cap is not None and not temperature:
            raise UsageError("kl_cap needs a temperature above 0: the KL of a certain choice is what its token costs")
        self.k, self.weight, self.greedy, self.kl_cap = k, weight, greedy, kl_cap
        self.temperature = temperature or 1.0

    @abstractmethod
    def bonus(self, tokens: torch.Tensor) -> torch.Tensor:
        """What each candidate [B, k] would bring, [B, k] float; NaN where nothing could be said."""

    def guide(self, logits: torch.Tensor) -> torch.Tensor:
        if self.weight == 0 or self.kl_cap == 0:
            return _best(logits) if self.greedy else logits
        logprobs = logits.log_softmax(-1)  # [B, V]
        base, tokens = _likeliest(logprobs, self.k)  # [B, k]
        bonus = unjudged_last(self.bonus(tokens).to(base))
        cut = torch.full_like(logprobs, -torch.inf)
        if self.kl_cap is None:
            out = cut.scatter(-1, tokens, base + self.weight * bonus)
        else:
            out = capped(logprobs, tokens, self.weight * bonus, self.kl_cap, self.temperature)
        return _best(out) if self.greedy else out


def check_candidates(k: int, weight: float, kl_cap: float | None = None) -> None:
    """Refuse options that `Candidates` cannot take."""
    if k < 0:
        raise UsageError(f"k must be 1 or more tokens (0: the whole vocabulary), not {k}")
    if not math.isfinite(weight) or weight < 0:
        raise UsageError(f"weight must be a finite number of 0 or more, not {weight}")
    if kl_cap is not None and not kl_cap >= 0:
        raise UsageError(f"kl_cap must be 0 nats a token or more, not {kl_cap}")


def unjudged_last(bonus: torch.Tensor) -> torch.Tensor:
    """NaN becomes the lowest bonus of its row (0 in a row without any): what cannot be judged is never preferred."""
    missing = bonus.isnan()
    if not bool(missing.any()):
        return bonus
    lowest = bonus.masked_fill(missing, torch.inf).min(-1, keepdim=True).values
    return torch.where(missing, torch.where(lowest.isinf(), 0, lowest), bonus)


def capped(
    logprobs: torch.Tensor, tokens: torch.Tensor, push: torch.Tensor, cap: float, temperature: float = 1.0
) -> torch.Tensor:
    """log p + s * push on the candidates, with the largest s in [0, 1] at which KL(result || p) <= cap, [B, V].

    logprobs [B, V]; tokens, push [B, k]; the KL is that of softmax(. / temperature). Where the cut to the candidates
    alone costs more than the cap, nothing is cut and nothing pushed. The KL rises with s: s is found by bisection.
    """
    cut, base = torch.full_like(logprobs, -torch.inf), logprobs.gather(-1, tokens)
    plain = (logprobs / temperature).log_softmax(-1)

    def guided(scale: torch.Tensor) -> torch.Tensor:
        return cut.scatter(-1, tokens, base + scale[:, None] * push)

    def allowed(scale: torch.Tensor) -> torch.Tensor:
        return kl_between((guided(scale) / temperature).log_softmax(-1), plain) <= cap - ROUNDING

    low = torch.zeros(len(push)).to(base)
    high = torch.ones_like(low)
    whole = allowed(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        under = allowed(middle)
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    scale = torch.where(whole, torch.ones_like(low), low)
    return torch.where(allowed(scale)[:, None], guided(scale), logprobs)


def _likeliest(logprobs: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and numbers of the k likeliest tokens, [B, k] each; all of them in their own order for k = 0."""
    size = logprobs.shape[-1]
    if not 0 < k < size:
        return logprobs, torch.arange(size, device=logprobs.device).expand(logprobs.shape)
    base, tokens = logprobs.topk(k, -1)
    return base, tokens


def _best(logits: torch.Tensor) -> torch.Tensor:
    """All the probability on the highest logit; ties go to the lower token number."""
    at = logits.argmax(-1, keepdim=True)
    return torch.full_like(logits, -torch.inf).scatter(-1, at, 0.0)
