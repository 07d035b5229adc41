"""Triplets of concepts: drawing them, choosing in them, and fitting an embedding to the choices.

    odd one out   [R, 3] i < j < k;   choice c in {0, 1, 2}: which of the three is odd, so the other two are the kept pair
    anchor        [R, 3] a, b < c;    choice in {0, 1}: whether b or c is closer to a
    s_ij = x_i . x_j (SPoSE: x >= 0, penalty lambda |X|_1 / N)   or   -|x_i - x_j|^2 (metric)
    P(pair kept) = exp s_pair / (exp s_ij + exp s_ik + exp s_jk);   P(b | a) = exp s_ab / (exp s_ab + exp s_ac)
    loss = -mean sum_c p_c log P(c)      p: the choices, or their probabilities (soft targets)

Published code takes the odd one as the last of a row; here a row is sorted and the choice is its own column, so that the
order in which a file lists triplets, or concepts, changes nothing. A choice of -1 is none: a tie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from trimtab.errors import UsageError

Form = Literal["odd-one-out", "anchor"]
Kind = Literal["metric", "spose"]
Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
OPTIONS = {"odd-one-out": 3, "anchor": 2}
TIE = 1e-6  # probabilities, or similarities, closer than this are equal


def draw_triplets(concepts: int, count: int, form: Form = "odd-one-out", seed: int = 0) -> Ints:
    """[R, 3] different triplets, sorted: all where there are no more than `count`, else random ones.

    Concepts appear about equally often: shuffled decks of all concepts, one after the other, are cut into threes.
    """
    if concepts < 3 or count < 1:
        raise UsageError(f"triplets need 3 concepts or more and a count of 1 or more, not {concepts} and {count}")
    total = comb(concepts, 3) * (1 if form == "odd-one-out" else 3)
    generator = np.random.default_rng(seed)
    if total <= 2 * count:  # of so many no deck is needed: each is in or out
        every = np.array(list(combinations(range(concepts), 3)), dtype=np.int64)
        if form == "anchor":
            every = np.concatenate([every, every[:, [1, 0, 2]], every[:, [2, 0, 1]]])
        out = every if total <= count else every[generator.permutation(total)[:count]]
        return out[np.lexsort(out.T[::-1])]
    found: dict[tuple[int, ...], None] = {}
    deck: list[int] = []
    while len(found) < count:
        if len(deck) < 3:
            deck += generator.permutation(concepts).tolist()
        row, deck = deck[:3], deck[3:]
        if len(set(row)) == 3:  # where two decks meet a concept may come twice
            found.setdefault(tuple(sorted(row)) if form == "odd-one-out" else (row[0], *sorted(row[1:])))
    out = np.array(list(found), dtype=np.int64)
    return out[np.lexsort(out.T[::-1])]


def scores_of(similarity: Array, triplets: Ints, form: Form = "odd-one-out") -> Array:
    """[R, K] the similarity that speaks for each choice. similarity [N, N]."""
    a, b, c = triplets.T
    if form == "anchor":
        return np.stack([similarity[a, b], similarity[a, c]], 1)
    return np.stack([similarity[b, c], similarity[a, c], similarity[a, b]], 1)


def choose(scores: Array) -> Ints:
    """[R] the column with the highest score; -1 where two of the highest are equal."""
    ordered = np.sort(scores, 1)
    return np.where(ordered[:, -1] - ordered[:, -2] > TIE, scores.argmax(1), -1)


def cosine(vectors: Array) -> Array:
    """[N, N]. UsageError for a vector of zeros."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if (norms == 0).any():
        raise UsageError(f"concept {int((norms[:, 0] == 0).argmax()) + 1} has a vector of zeros: it has no direction")
    unit = vectors / norms
    return np.asarray(unit @ unit.T)


def log_probabilities(x: torch.Tensor, triplets: torch.Tensor, form: Form, kind: Kind) -> torch.Tensor:
    """x [..., N, d], triplets [R, 3] -> log P of each choice, [..., R, K]."""
    a, b, c = (x[..., triplets[:, column], :] for column in range(3))

    def close(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (u * v).sum(-1) if kind == "spose" else -((u - v) ** 2).sum(-1)

    pairs = [close(a, b), close(a, c)] if form == "anchor" else [close(b, c), close(a, c), close(a, b)]
    return torch.stack(pairs, -1).log_softmax(-1)


@dataclass(frozen=True)
class Fit:
    """x [N, d]; losses in nats a triplet, accuracies among choices that are no tie; held_out figures None without any."""

    x: Array
    kind: Kind
    loss: float
    accuracy: float
    held_out_loss: float | None = None
    held_out_accuracy: float | None = None

    @property
    def similarity(self) -> Array:
        if self.kind == "spose":
            return np.asarray(self.x @ self.x.T)
        return -np.asarray(((self.x[:, None] - self.x[None]) ** 2).sum(-1))


def fit_embedding(
    triplets: Ints,
    targets: Array,
    concepts: int,
    d: int,
    form: Form = "odd-one-out",
    kind: Kind = "metric",
    penalty: float = 0.0,
    steps: int = 800,
    lr: float = 0.05,
    restarts: int = 5,
    held_out: float = 0.1,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Fit:
    """An embedding of choices. targets [R, K]: probabilities of the choices, or one-hot; rows of zeros are left out.

    The restart with the lowest held-out loss is kept (training loss where nothing is held out). Adam at a
    constant step size.
    """
    asked = targets.sum(1) > 0
    triplets, targets = triplets[asked], targets[asked] / targets[asked].sum(1, keepdims=True)
    if d >= concepts:
        raise UsageError(f"an embedding of {concepts} concepts needs fewer than {concepts} dimensions, not {d}")
    if len(triplets) < concepts * d:
        raise UsageError(
            f"{len(triplets)} triplets with a choice cannot place {concepts} concepts in {d} dimensions ({concepts * d} "
            "numbers): give more triplets or fewer dimensions"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(triplets), generator=generator)
    cut = int(held_out * len(triplets))
    apart, used = order[:cut], order[cut:]
    rows, aims = torch.from_numpy(triplets), torch.from_numpy(targets).float()
    x = 0.1 * torch.randn(restarts, concepts, d, generator=generator)
    x = (x.abs() if kind == "spose" else x).requires_grad_(True)
    optimiser = torch.optim.Adam([x], lr=lr)

    def losses(which: torch.Tensor) -> torch.Tensor:
        return -(aims[which] * log_probabilities(x, rows[which], form, kind)).sum(-1).mean(-1)  # [restarts]

    for step in range(steps):
        loss = losses(used) + penalty * x.abs().sum((-1, -2)) / concepts
        optimiser.zero_grad()
        loss.sum().backward()  # the restarts do not touch one another
        optimiser.step()
        if kind == "spose":
            with torch.no_grad():
                x.clamp_(min=0)
        if progress is not None and step and step % 200 == 0:
            progress(f"fitting {d} dimensions: step {step} of {steps}")
    with torch.no_grad():
        judged = losses(apart if cut else used)
        best = int(judged.argmin())
        training = float(losses(used)[best])
        found = x[best].double().numpy()
        picks = log_probabilities(x[best], rows, form, kind).argmax(-1).numpy()
    chosen = choose(targets)
    right = (picks == chosen)[chosen >= 0]
    apart_rows = np.isin(np.arange(len(triplets)), apart.numpy())[chosen >= 0]
    if not right.size:
        raise UsageError("no triplet has a choice: every one is a tie")
    return Fit(
        found, kind, training, float(right[~apart_rows].mean()),
        float(judged[best]) if cut else None, float(right[apart_rows].mean()) if apart_rows.any() else None,
    )  # fmt: skip


def agreement(human: Array, choices: Ints) -> Array:
    """[R] share of a triplet's human answers that the choice agrees with; NaN without an answer or a choice.

    human [R, K]: how often people chose each.
    """
    total = human.sum(1)
    picked = np.take_along_axis(human, np.maximum(choices, 0)[:, None], 1)[:, 0]
    known = (total > 0) & (choices >= 0)
    return np.divide(picked, total, out=np.full(len(choices), np.nan), where=known)


def ceiling(human: Array) -> float | None:
    """How well one person is predicted by the others: each answer against the most frequent of the others', ties shared.

    None where no triplet was answered twice.
    """
    again = human[human.sum(1) >= 2]
    if not len(again):
        return None
    total = 0.0
    for column in range(human.shape[1]):
        others = again.copy()
        others[:, column] -= 1
        best = others == others.max(1, keepdims=True)
        total += float((again[:, column] * best[:, column] / best.sum(1)).sum())
    return total / float(again.sum())


def above_chance(share: float, top: float, chance: float) -> float | None:
    """(share - chance) / (top - chance); None where the ceiling is no better than chance."""
    return (share - chance) / (top - chance) if top > chance else None
