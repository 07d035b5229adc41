"""Greedy coordinate gradient (GCG, 2307.15043): suffix tokens that lower a loss, on the whole model or its first blocks.

One step, on a suffix s of m tokens with embeddings e_i = E[s_i]:

    G[i, v] = (dloss / de_i) . E[v]        the gradient in the one-hot mix, [m, V]
    per position the K tokens with the smallest G; W single swaps among those m K; those kept that survive
    decode -> encode; their losses; the lowest one, or s itself where none is lower (a buffer of one)

Where W >= m K every swap is tried, so a step that changes nothing has reached a coordinate-wise minimum and the search
ends. A stop hook ends the forward after block k: the surrogate is the model's own first blocks, and nothing is copied.
Cost of a step: W + 1 forwards of k blocks and one backward, counted in `Spent` as tokens and as tokens x blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.policy import Cost
from trimtab.steer.layers import find_blocks


@dataclass
class Spent:
    """What searches cost: tokens forwarded, the same times the blocks each went through, and seconds."""

    tokens: int = 0
    block_tokens: int = 0
    seconds: float = 0.0


class Loss(Protocol):
    """A loss of one row of input embeddings [B, T, D] -> [B]; blocks: how many a forward runs; extra: tokens it adds."""

    blocks: int
    extra: int

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor: ...


class _Reached(Exception):
    """Carries the residual stream out of a forward that need not go on."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def first_blocks(lm: LM, embeddings: torch.Tensor, depth: int) -> torch.Tensor:
    """The residual stream [B, T, D] after the first `depth` blocks, before any final norm; later blocks do not run."""
    blocks = find_blocks(lm.model)

    def entering(_module: Any, args: Any, kwargs: Any) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    def leaving(_module: Any, _inputs: Any, output: Any) -> None:
        raise _Reached(output if isinstance(output, torch.Tensor) else output[0])

    handle = (
        blocks[depth].register_forward_pre_hook(entering, with_kwargs=True)
        if depth < len(blocks)
        else blocks[-1].register_forward_hook(leaving)
    )
    try:
        lm.backbone(inputs_embeds=embeddings, use_cache=False)
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise UsageError(f"{type(lm.model).__name__} did not run its blocks: its first ones cannot be read")


class SurrogateLoss:
    """softplus(g) at the last token, g = w . z_k + b: binary cross-entropy with logits towards "complies" (label 0).

    b has the threshold in it: g > 0 is a refusal.
    """

    extra = 0

    def __init__(self, lm: LM, depth: int, weight: Any, bias: float) -> None:
        self.lm, self.blocks, self.bias = lm, depth, float(bias)
        self.weight = torch.as_tensor(weight, dtype=torch.float32, device=lm.device)

    def decision(self, embeddings: torch.Tensor) -> torch.Tensor:
        """g, [B]."""
        state = first_blocks(self.lm, embeddings, self.blocks)[:, -1]
        return state.float() @ self.weight.to(torch.float32) + self.bias

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        return F.softplus(self.decision(embeddings))


class TargetLoss:
    """Mean -log p of the tokens of a wanted answer after the row: the loss of GCG on the whole model."""

    def __init__(self, lm: LM, target: Sequence[int]) -> None:
        if not target:
            raise UsageError("the wanted answer has no tokens: give target=TEXT")
        self.lm, self.blocks, self.extra = lm, len(find_blocks(lm.model)), len(target)
        self.target = torch.tensor(list(target), device=lm.device)

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        wanted = embed(self.lm, self.target[None]).expand(len(embeddings), -1, -1)
        both = torch.cat([embeddings, wanted.to(embeddings.dtype)], 1)
        states = self.lm.backbone(inputs_embeds=both, use_cache=False).last_hidden_state
        logits = self.lm.head(states[:, -self.extra - 1 : -1])  # [B, extra, V]
        return F.cross_entropy(logits.transpose(1, 2), self.target.expand(len(logits), -1), reduction="none").mean(1)


def embed(lm: LM, tokens: torch.Tensor) -> torch.Tensor:
    """Input embeddings as the first block's input takes them. UsageError where they have no gradient."""
    layer = lm.model.get_input_embeddings()
    if not layer.weight.is_floating_point():
        raise UsageError(f"the embeddings of {lm.name} are quantised and have no gradient: load it in a float type")
    return layer(tokens.to(lm.device))  # type: ignore[no-any-return]


def one_hot_gradient(lm: LM, loss: Loss, row: Sequence[int], span: tuple[int, int]) -> tuple[float, torch.Tensor]:
    """(loss, G [m, V]) of a row of token ids whose suffix is tokens span[0] to span[1]."""
    states = embed(lm, torch.tensor([list(row)])).detach().requires_grad_(True)
    with torch.enable_grad():
        value = loss(states).sum()
        (gradient,) = torch.autograd.grad(value, states)
    if not bool(gradient.isfinite().all()):
        raise UsageError(f"the gradient of {lm.name} is not finite: load it in float32 or bfloat16")
    with torch.no_grad():
        table = embed(lm, torch.arange(lm.model.get_input_embeddings().weight.shape[0]))
    return float(value.detach()), gradient[0, span[0] : span[1]] @ table.T


@dataclass
class Search:
    """suffix: the best one; losses: after each step, losses[0] that of the start; minimum: no single swap improves."""

    suffix: list[int]
    losses: list[float]
    minimum: bool = False


def search(
    lm: LM,
    loss: Loss,
    before: Sequence[int],
    start: Sequence[int],
    after: Sequence[int],
    *,
    allowed: torch.Tensor,
    steps: int,
    width: int,
    top_k: int,
    generator: torch.Generator,
    survives: Callable[[list[int]], bool] | None = None,
    budget: int | None = None,
    spent: Spent | None = None,
    meter: Cost | None = None,
) -> Search:
    """Lower `loss` on before + suffix + after, from a start.

    allowed: ids that a suffix may hold. survives: whether a suffix is the same after decode -> encode (None: not asked).
    budget: tokens that may be forwarded, and no step begins that would go over. spent, meter: charged.
    """
    spent = spent if spent is not None else Spent()
    began, suffix = time.perf_counter(), list(start)
    losses: list[float] = []
    span, length = (len(before), len(before) + len(start)), len(before) + len(start) + len(after) + loss.extra
    room = budget
    minimum = False
    for _ in range(steps):
        if room is not None and room < length * (width + 1):
            break
        value, gradient = one_hot_gradient(lm, loss, [*before, *suffix, *after], span)
        losses = losses or [value]
        swaps = _swaps(gradient.cpu(), suffix, allowed, width, top_k, generator)
        tried = [one for one in swaps if survives is None or survives(one)]
        if not tried:
            raise UsageError(
                f"no suffix of {lm.name} survives decode and encode: its tokenizer does not round-trip; "
                "set retokenise=false"
            )
        values = losses_of(lm, loss, [[*before, *one, *after] for one in tried])
        used = length * (len(tried) + 1)
        room = None if room is None else room - used
        spent.tokens, spent.block_tokens = spent.tokens + used, spent.block_tokens + used * loss.blocks
        if meter is not None:
            meter.tokens[lm.name] = meter.tokens.get(lm.name, 0) + used
        best = int(values.argmin())
        if float(values[best]) < losses[-1]:
            suffix = tried[best]
            losses.append(float(values[best]))
            continue
        losses.append(losses[-1])
        if width >= len(start) * min(top_k, len(allowed)):
            minimum = top_k >= len(allowed) and len(tried) == len(swaps)
            break  # the next step would try the same swaps
    spent.seconds += time.perf_counter() - began
    return Search(suffix, losses, minimum)


@torch.no_grad()
def losses_of(lm: LM, loss: Loss, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """[N] losses of rows of one length, in batches."""
    step = max(1, lm.batch_rows)
    parts = [loss(embed(lm, torch.tensor(list(map(list, rows[at : at + step]))))) for at in range(0, len(rows), step)]
    return torch.cat(parts).float().cpu()


def _swaps(
    gradient: torch.Tensor, suffix: list[int], allowed: torch.Tensor, width: int, top_k: int, generator: torch.Generator
) -> list[list[int]]:
    """Up to `width` different single swaps out of the top_k tokens of every position."""
    top = allowed[(-gradient[:, allowed]).topk(min(top_k, len(allowed)), dim=1).indices]  # [m, K]
    places = torch.randperm(top.numel(), generator=generator)[:width].tolist()
    out = []
    for place in places:
        position, token = place // top.shape[1], int(top.flatten()[place])
        if token != suffix[position]:
            out.append([*suffix[:position], token, *suffix[position + 1 :]])
    return out
