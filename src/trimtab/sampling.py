"""`Sampling`: how tokens are drawn. Every default is written out; nothing comes from a model's generation config.

Ordinary rules (top-k, top-p, min-p, repetition penalty) are transformers' own logits processors. Draws are by inverse
CDF from one uniform number per row and step, all drawn up front from (seed), so an answer does not depend on which rows
share its batch or finish before it, and two policies with the same seed use common random numbers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from trimtab.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampling:
    """How to draw. `temperature=0` is greedy. `top_k=0`, `top_p=1`, `min_p=0`, `repetition_penalty=1` are off."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UsageError(f"max_new_tokens must be 0 or more, not {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.samples < 1:
            raise UsageError(f"samples must be 1 or more, not {self.samples}")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1 or self.repetition_penalty <= 0:
            raise UsageError("top_k >= 0, 0 < top_p <= 1, 0 <= min_p < 1 and repetition_penalty > 0 are needed")

    def but(self, **changes: Any) -> Sampling:
        """A copy with some fields changed."""
        return replace(self, **changes)

    @property
    def is_softmax(self) -> bool:
        """Whether tokens are drawn from softmax(logits / temperature) itself, uncut and unpenalised."""
        return self.temperature > 0 and not (self.top_k or self.top_p < 1 or self.min_p or self.repetition_penalty != 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def logprobs(self, logits: torch.Tensor, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Log of the distribution tokens are drawn from: [B, V] in float32, -inf where cut away.

        input_ids [B, T] (the whole sequence so far) is needed only for a repetition penalty. Greedy puts all mass on
        the highest logit.
        """
        import torch

        scores = logits.float()
        if self.temperature == 0:
            out = torch.full_like(scores, -torch.inf)
            if self.repetition_penalty != 1:
                scores = self._processors()(input_ids, scores)
            top, at = scores.max(-1, keepdim=True)
            return out.scatter_(-1, at, top - top)  # 0; NaN where the logits are not finite, so that it is seen
        if not self.is_softmax:
            scores = self._processors()(input_ids, scores)
        if self.temperature != 1 and self.is_softmax:
            scores = scores / self.temperature
        return scores.log_softmax(-1)

    def _processors(self) -> Any:
        import transformers as tf

        steps: list[Any] = []
        if self.repetition_penalty != 1:
            steps.append(tf.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature not in (0, 1):
            steps.append(tf.TemperatureLogitsWarper(self.temperature))
        if self.temperature > 0 and self.top_k:
            steps.append(tf.TopKLogitsWarper(self.top_k))
        if self.temperature > 0 and self.top_p < 1:
            steps.append(tf.TopPLogitsWarper(self.top_p))
        if self.temperature > 0 and self.min_p:
            steps.append(tf.MinPLogitsWarper(self.min_p))
        return tf.LogitsProcessorList(steps)


def uniforms(rows: int, steps: int, seed: int) -> torch.Tensor:
    """The uniform numbers of a call, [rows, steps] float64 on the CPU. Row r does not depend on the rows after it."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, steps, generator=generator, dtype=torch.float64)


def draw(logprobs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse CDF: the first token whose cumulative probability exceeds `uniform`. [B, V], [B] -> [B]."""
    import torch

    cdf = logprobs.exp().double().cumsum(-1)
    total = cdf[:, -1]
    below = torch.nextafter(total, torch.zeros_like(total))  # a product rounded up to `total` would draw no token
    at = torch.searchsorted(cdf, (uniform.to(cdf.device) * total).minimum(below)[:, None], right=True)[:, 0]
    return at.clamp_(max=logprobs.shape[-1] - 1)


def derive_seed(seed: int, *path: int | str) -> int:
    """A seed for a named part of a run: the same (seed, path) gives the same number on every machine."""
    import hashlib

    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
