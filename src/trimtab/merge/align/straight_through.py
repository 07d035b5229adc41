"""Permutations learned by the loss itself, through a straight-through estimator.

    B~, a copy of the weights in A's coordinates, is what learns; each step, on a minibatch:
    pi    = weight matching of B to B~, from where the last one ended
    proj  = B~ + stopgrad(pi(B) - B~)                    the value of pi(B), the gradient to B~
    loss  = L( stopgrad(A) / 2 + proj / 2 );  Adam on B~

Git Re-Basin, arXiv 2209.04836, section 3.3. Returned is the pi whose midpoint has the lowest loss on all data, the start
(weight matching of B to A) among the candidates: so it is never worse there than weight matching. A and B do not change.

B~ begins as A, so that the first pi is weight matching's and small moves of B~ change it. Begun as pi(B) or as B, it is B's
own copy, whose best match stays what it was until B~ has gone half the way to another unit: on small classifiers the midpoint
then hardly changed in 100 steps, where it fell by 10 to 80 % from A (`begin`: "target", "matched", "moving").

Cost a step: a forward and a backward at the midpoint and one weight matching, mostly of a sweep or two; whenever pi changes,
one evaluation on all data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.merge.align.matching import match
from trimtab.merge.align.path import interpolate
from trimtab.merge.align.permutation import Spec, apply

Loss = Callable[[dict[str, Tensor], Any], Tensor]


@dataclass
class StraightThrough:
    """permutations of the lowest midpoint loss on all data, that loss, and it for weight matching alone.

    tried: (step, midpoint loss on all data) of every different pi that the steps met.
    """

    permutations: dict[str, Tensor]
    midpoint_loss: float
    start_loss: float
    tried: list[tuple[int, float]] = field(default_factory=list)


def straight_through(
    spec: Spec,
    target: Mapping[str, Tensor],
    moving: Mapping[str, Tensor],
    loss: Loss,
    batches: Sequence[Any],
    *,
    steps: int = 200,
    lr: float = 1e-2,
    begin: Literal["target", "matched", "moving"] = "target",
    seed: int = 0,
    full_loss: Callable[[dict[str, Tensor]], float] | None = None,
    progress: Callable[[str], None] | None = None,
) -> StraightThrough:
    """loss(tensors, batch) -> a scalar with a gradient; batches: drawn from at random, one a step.

    full_loss: on all data (the mean over batches where not given; give it where they differ in size).
    """
    if not batches:
        raise UsageError("the straight-through estimator needs data: no batch was given")
    generator = torch.Generator().manual_seed(seed)
    a = {name: tensor.detach() for name, tensor in target.items()}
    b = {name: tensor.detach() for name, tensor in moving.items()}
    names = [name for name in spec.tensors() if a[name].is_floating_point()]

    def full(tensors: dict[str, Tensor]) -> float:
        with torch.no_grad():
            if full_loss is not None:
                return full_loss(tensors)
            return sum(float(loss(tensors, batch)) for batch in batches) / len(batches)

    def midpoint(permutations: Mapping[str, Tensor]) -> float:
        return full(interpolate(a, apply(spec, permutations, b), 0.5))

    current = match(
        spec, a, b, seed=seed
    ).permutations  # the best that is known, and where the latent's matching starts
    best, best_loss = current, midpoint(current)
    found = StraightThrough(best, best_loss, best_loss, [(0, best_loss)])
    known = {_key(current)}
    first = {"matched": apply(spec, current, b), "target": a, "moving": b}[begin]
    latent = {name: first[name].to(torch.float32).clone().requires_grad_() for name in names}
    optimiser = torch.optim.Adam(latent.values(), lr=lr)
    for step in range(1, steps + 1):
        current = match(
            spec, {**b, **{k: v.detach() for k, v in latent.items()}}, b, start=current, seed=step
        ).permutations
        if _key(current) not in known:
            known.add(_key(current))
            value = midpoint(current)
            found.tried.append((step, value))
            if value < best_loss:
                best, best_loss = current, value
        moved = apply(spec, current, b)
        middle = interpolate(a, moved, 0.5)
        for name in names:
            middle[name] = middle[name] + 0.5 * (latent[name] - latent[name].detach()).to(middle[name].dtype)
        batch = batches[int(torch.randint(len(batches), (), generator=generator))]
        value_now = loss(middle, batch)
        optimiser.zero_grad()
        value_now.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if progress is not None:
            progress(f"straight-through: step {step} of {steps}, midpoint loss {best_loss:.4g} at best")
    found.permutations, found.midpoint_loss = best, best_loss
    return found


def _key(permutations: Mapping[str, Tensor]) -> bytes:
    return b"".join(permutations[name].numpy().tobytes() for name in sorted(permutations))
