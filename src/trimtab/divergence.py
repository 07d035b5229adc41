"""KL of a policy from the base, exact at each token given the prefix, and the answers' log-probability under the base.

For answers drawn from the policy, the mean over tokens of KL(policy(.|prefix) || base(.|prefix)) estimates the KL per
token with less variance than the log-ratio of the drawn tokens: only the prefixes are sampled, the next token is summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trimtab.control import Steered
from trimtab.errors import UsageError
from trimtab.policy import Prompt
from trimtab.sampling import Sampling

if TYPE_CHECKING:
    from trimtab.lm import LM


@dataclass
class Divergence:
    """One answer. kl [T] nats, each >= 0; base_logprobs [T] of its tokens under the base at temperature 1; entropy [T]
    of the policy's own next-token distributions, nats."""

    kl: torch.Tensor
    base_logprobs: torch.Tensor
    entropy: torch.Tensor


def kl_between(logprobs: torch.Tensor, base_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats from log-probabilities [..., V] -> [...]. Tokens of probability 0 under p contribute 0."""
    terms = logprobs.exp() * (logprobs - base_logprobs)
    return terms.masked_fill(logprobs == -torch.inf, 0).sum(-1).clamp(min=0)


def entropy_of(logprobs: torch.Tensor) -> torch.Tensor:
    """-sum_v p log p in nats from log-probabilities [..., V] -> [...]; tokens of probability 0 contribute 0."""
    return -(logprobs.exp() * logprobs).masked_fill(logprobs == -torch.inf, 0).sum(-1)


@torch.no_grad()
def divergences(
    policy: Any, base: LM, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], sampling: Sampling
) -> list[Divergence]:
    """The divergence of each given answer of `policy` from `base`, both at `sampling.temperature`.

    policy: an `LM` with the base's tokens, or `Steered`. A policy without next-token distributions of its own
    (best-of-n) is refused.
    """
    if not hasattr(policy, "token_logprobs"):
        raise UsageError(f"{policy.name} has no next-token distribution: its KL has only a bound")
    softmax = Sampling(temperature=sampling.temperature or 1.0)
    out = []
    if policy is base:
        for states, answer in zip(base.hidden_states(prompts, tokens), tokens, strict=True):
            logits = base.head(states)
            entropy = entropy_of(softmax.logprobs(logits)).cpu()
            out.append(Divergence(torch.zeros_like(entropy), _picked(logits.log_softmax(-1), answer), entropy))
        return out
    if isinstance(policy, Steered) and policy.lm is base and policy.control.final:
        for states, answer in zip(base.hidden_states(prompts, tokens), tokens, strict=True):
            edited = policy.control.edit(states, torch.arange(len(states))).to(states.dtype)
            logits = base.head(states)
            ours = softmax.logprobs(base.head(edited))
            kl = kl_between(ours, softmax.logprobs(logits))
            out.append(Divergence(kl.cpu(), _picked(logits.log_softmax(-1), answer), entropy_of(ours).cpu()))
        return out
    if not same_tokens(policy, base):
        raise UsageError(f"{policy.name} and {base.name} have different vocabularies: their KL is not defined")
    distributions = policy.token_logprobs(prompts, tokens, softmax)
    for states, logprobs, answer in zip(base.hidden_states(prompts, tokens), distributions, tokens, strict=True):
        logits = base.head(states)
        kl = kl_between(logprobs, softmax.logprobs(logits))
        out.append(Divergence(kl.cpu(), _picked(logits.log_softmax(-1), answer), entropy_of(logprobs).cpu()))
    return out


def same_tokens(policy: Any, base: LM) -> bool:
    """Whether a policy's token ids mean to `base` what they mean to it; of a policy without a known model: no.

    A policy says whose tokens it draws by `lm` (the model) or `policy` (the one it draws from). Equal numbers of tokens
    are not enough: two vocabularies of 32,000 may share none.
    """
    while not hasattr(policy, "tokenizer"):
        policy = getattr(policy, "lm", None) or getattr(policy, "policy", None)
        if policy is None:
            return False
    if policy is base:
        return True
    return policy.vocab_size == base.vocab_size and policy.tokenizer.get_vocab() == base.tokenizer.get_vocab()


def _picked(logprobs: torch.Tensor, answer: Sequence[int]) -> torch.Tensor:
    index = torch.tensor(list(answer), dtype=torch.long, device=logprobs.device)
    return logprobs.gather(-1, index[:, None])[:, 0].cpu()
