"""What a policy is unsure of: semantic entropy over its samples, and its distance from a population's opinions.

    semantic entropy   H = -sum_c p_c log p_c over clusters of answers that mean the same, nats; at most log(samples)
    opinions           Jensen-Shannon distance between the model's distribution over options and a group's:
                       sqrt(JS(p, q)), JS in units of log 2, so 0 is equal and 1 disjoint

Answers mean the same where `same(a, b)` says so of both orders: normalised equality by default; an entailment model, or a
judge, is given as a function. Clusters are built greedily against each cluster's first answer (Kuhn et al., 2302.09664).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError


def normalised(text: str) -> str:
    """Lower case, without articles, punctuation and spare white space."""
    bare = re.sub(r"[^\w\s]", " ", text.lower())
    return " ".join(word for word in bare.split() if word not in ("a", "an", "the"))


def clusters(texts: Sequence[str], same: Callable[[str, str], bool] | None = None) -> list[int]:
    """The cluster number of each answer, in order of first appearance."""
    alike = same or (lambda a, b: normalised(a) == normalised(b))
    firsts: list[str] = []
    out = []
    for text in texts:
        found = next((i for i, first in enumerate(firsts) if alike(first, text) and alike(text, first)), None)
        if found is None:
            firsts.append(text)
            found = len(firsts) - 1
        out.append(found)
    return out


def semantic_entropy(texts: Sequence[str], same: Callable[[str, str], bool] | None = None) -> float | None:
    """Of samples of one prompt, nats; None for fewer than two (one sample has no spread, which is not 0)."""
    if len(texts) < 2:
        return None
    shares = np.bincount(clusters(texts, same)) / len(texts)
    return float(-(shares * np.log(shares)).sum()) + 0.0


def opinion_distance(model: npt.ArrayLike, group: npt.ArrayLike) -> float:
    """Jensen-Shannon distance in [0, 1] between two distributions over the same options."""
    p, q = (np.asarray(side, dtype=np.float64) for side in (model, group))
    if p.shape != q.shape or p.ndim != 1 or not len(p):
        raise UsageError(f"opinions are compared over the same options, not {p.shape} and {q.shape}")
    if min(p.min(), q.min()) < 0 or not p.sum() > 0 or not q.sum() > 0:
        raise UsageError("a distribution over options is not negative and not all 0")
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    parts = [float((side[side > 0] * np.log(side[side > 0] / middle[side > 0])).sum()) for side in (p, q)]
    return math.sqrt(max(0.0, sum(parts) / 2 / math.log(2)))


def by_group(model: npt.ArrayLike, groups: Mapping[str, npt.ArrayLike]) -> dict[str, float]:
    """The distance to each group's opinions: a mean over groups hides whom a model does not speak for."""
    return {name: opinion_distance(model, group) for name, group in groups.items()}
