"""From contrasting texts to one direction per block: the statistics of steering vectors.

h+ and h- [N, D] are one block's states of N pairs, d = h+ - h- their differences. Unit vectors v [D]:
    mean_diff     v = mean(d) / |mean(d)|                            (CAA, cluster means)
    pca_paired    top right-singular vector of the *uncentred* d
    pca_shuffled  random order inside each pair, centred, first principal component (RepE, arXiv 2310.01405)
    logistic      weights of an L2 logistic regression of h+ against h-
    random        a Gaussian direction, the required control
PCA has no sign of its own: v is turned so that most pairs have v.h+ > v.h-. Centring d in its given order, as one
widely used implementation does, removes the mean difference, which is the signal; that form is absent on purpose (a
test shows it failing). Swapping h+ and h- negates v exactly (logistic: to the solver's tolerance); the order of the
pairs, and repeating all of them, changes nothing (except for pca_shuffled, whose flips follow the order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.policy import Prompt
from trimtab.sampling import derive_seed
from trimtab.steer.layers import Read, read_blocks

Method = Literal["mean_diff", "pca_paired", "pca_shuffled", "logistic", "random"]
FEWEST_PAIRS, FEW_PAIRS, FOLDS = 8, 50, 5
ZERO = 1e-8  # a mean difference of a smaller norm is none


@dataclass(frozen=True)
class Pair:
    """Two texts that differ in the behaviour; with `prompt`, two answers to it (then only the answers are read)."""

    positive: str
    negative: str
    prompt: Prompt | None = None


@dataclass
class Directions:
    """One direction for each of the L blocks.

    direction   [L, D] unit vectors (0 where a block shows no difference)
    difference  [L] distance between the two classes' means along it (for random: the norm of the mean difference)
    norm        [L] mean norm of the block's output
    accuracy    [L] share of held-out pairs with v.h+ > v.h-, by 5-fold cross-validation; 0.5 is chance
    """

    direction: torch.Tensor
    difference: torch.Tensor
    norm: torch.Tensor
    accuracy: torch.Tensor

    def __len__(self) -> int:
        return len(self.direction)


@dataclass
class Contrast:
    """Directions found in a model, the tokens forwarded for them, figures, and what the user should know."""

    directions: Directions
    tokens_forwarded: int
    metrics: dict[str, float]
    warnings: list[str]


def contrast(
    lm: LM,
    heads: Sequence[list[int]],
    positive: Sequence[list[int]],
    negative: Sequence[list[int]],
    method: Method = "mean_diff",
    read: Read = "mean",
    seed: int = 0,
    blocks: str = "",
) -> Contrast:
    """Directions from token ids: pair i is heads[i] + positive[i] against heads[i] + negative[i]; the head is not read.

    Pairs whose texts, or whose states at every block, are the same are dropped and counted.
    """
    pairs = [(h, a, b) for h, a, b in zip(heads, positive, negative, strict=True) if a != b and a and b]
    if not pairs:
        raise UsageError("no pair has two different texts")
    rows = [[*head, *texts[side]] for side in (0, 1) for head, *texts in pairs]
    states, norms = read_blocks(lm, rows, [len(head) for head, _, _ in pairs] * 2, read, blocks)
    good, bad = states.chunk(2)
    differ = ((good - bad).norm(dim=-1) > ZERO).any(-1)
    count = int(differ.sum())
    found = find_directions(good[differ], bad[differ], norms.mean(0), method, seed)
    say = []
    if read == "last" and len({row[-1] for row in rows}) == 1:
        say.append(
            f"the read token is constant: {lm.tokenizer.decode(rows[0][-1:])!r} (read=mean averages over the text)"
        )
    if count < len(heads):
        say.append(f"{len(heads) - count} pairs were dropped: their texts, or all their states, are the same")
    if count < FEW_PAIRS:
        say.append(f"only {count} pairs: {FEW_PAIRS} or more make a steadier direction")
    metrics = {
        "pairs": float(count),
        "pairs_dropped": float(len(heads) - count),
        "best_block": float(found.accuracy.argmax()),
        "best_block_pair_accuracy": float(found.accuracy.max()),
    }
    return Contrast(found, sum(len(row) for row in rows), metrics, say)


def find_directions(
    positive: torch.Tensor, negative: torch.Tensor, norm: torch.Tensor, method: Method = "mean_diff", seed: int = 0
) -> Directions:
    """Directions from the states of N pairs, [N, L, D] each; norm [L]. Raises `UsageError` for fewer than 8 pairs."""
    if len(positive) < FEWEST_PAIRS:
        raise UsageError(
            f"{len(positive)} usable pairs are too few: give at least {FEWEST_PAIRS}, better {FEW_PAIRS} or more"
        )
    pairs, layers, width = positive.shape
    out = Directions(torch.zeros(layers, width), torch.zeros(layers), norm, torch.zeros(layers))
    fold = torch.arange(pairs) % FOLDS
    for layer in range(layers):
        h, g = positive[:, layer].double(), negative[:, layer].double()
        mean = (h - g).mean(0)
        if not float(mean.norm()) > ZERO:
            continue
        inside = derive_seed(seed, "directions", layer)
        v = direction(h, g, method, inside)
        out.direction[layer] = v
        out.difference[layer] = mean.norm() if method == "random" else (mean @ v).abs()
        right = 0
        for k in range(FOLDS):
            held = fold == k
            found = direction(h[~held], g[~held], method, inside)
            right += int(((h[held] - g[held]) @ found > 0).sum())
        out.accuracy[layer] = right / pairs
    return out


def direction(positive: torch.Tensor, negative: torch.Tensor, method: Method, seed: int = 0) -> torch.Tensor:
    """The unit vector [D] of one block, from states [N, D] (float64)."""
    d = positive - negative
    generator = torch.Generator().manual_seed(seed)
    if method == "mean_diff":
        return unit(d.mean(0))
    if method == "random":
        return unit(torch.randn(d.shape[1], generator=generator, dtype=d.dtype))
    if method == "logistic":
        return unit(_logistic(positive, negative))
    if method == "pca_shuffled":
        flips = torch.randint(0, 2, (len(d), 1), generator=generator) * 2 - 1
        shuffled = d * flips
        v = torch.linalg.svd(shuffled - shuffled.mean(0), full_matrices=False).Vh[0]
    else:
        v = torch.linalg.svd(d, full_matrices=False).Vh[0]
    return v * _sign(d @ v)


def unit(v: torch.Tensor) -> torch.Tensor:
    """v / |v|, or 0 for 0."""
    return v / v.norm().clamp(min=torch.finfo(v.dtype).tiny)


def _sign(projections: torch.Tensor) -> float:
    """+1 where most pairs project above 0, else -1; a tie goes by the mean."""
    votes = float(projections.sign().sum()) or float(projections.mean())
    return 1.0 if votes >= 0 else -1.0


def _logistic(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Weights [D]. The penalty is relative to the number of pairs, so that repeating them changes nothing."""
    from sklearn.linear_model import LogisticRegression

    states = torch.cat([positive, negative])
    scale = (states - states.mean(0)).std()
    labels = [1] * len(positive) + [0] * len(negative)
    model = LogisticRegression(C=10 / len(states), max_iter=2000, tol=1e-8)
    model.fit(((states - states.mean(0)) / scale).numpy(), labels)
    return torch.as_tensor(model.coef_[0], dtype=states.dtype)


def rank_pairs(rewards: torch.Tensor, prompt_index: torch.Tensor, share: float) -> list[tuple[int, int]]:
    """(better, worse) row numbers: within each prompt the k-th best answer with the k-th worst, for the best `share`.

    rewards, prompt_index [N]. At least one pair a prompt; pairs of equal reward are left out.
    """
    pairs = []
    for prompt in prompt_index.unique().tolist():
        rows = (prompt_index == prompt).nonzero()[:, 0]
        order = rows[rewards[rows].argsort(descending=True, stable=True)].tolist()
        for k in range(min(max(1, int(share * len(order))), len(order) // 2)):
            best, worst = order[k], order[-1 - k]
            if rewards[best] > rewards[worst]:
                pairs.append((best, worst))
    return pairs


def as_pair(given: Pair | Sequence[object], number: int) -> Pair:
    """A `Pair` from (positive, negative) or (prompt, positive, negative)."""
    if isinstance(given, Pair):
        pair = given
    else:
        if isinstance(given, str) or len(given) not in (2, 3):
            raise UsageError(f"pair {number} is not (positive, negative) or (prompt, positive, negative)")
        texts = given[-2:]
        pair = Pair(texts[0], texts[1], given[0] if len(given) == 3 else None)  # type: ignore[arg-type]
    if not all(isinstance(text, str) and text.strip() for text in (pair.positive, pair.negative)):
        raise UsageError(f"pair {number} has an empty text")
    return pair
