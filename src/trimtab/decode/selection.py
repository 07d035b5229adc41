"""Choosing one answer of several by consensus: (weighted) vote and minimum Bayes risk. Pure functions, no model.

    vote   argmax over keys k of sum_i w_i [key_i = k], answered by the earliest draw that has the key
    mbr    argmax over i of sum_j w_j u(y_i, y_j), u = ROUGE-1 F1 on token ids
    w      softmax(r / beta) over the draws, or uniform

With i.i.d. draws of a policy p and w = softmax(r / beta) both are self-normalised importance sampling toward
p exp(r / beta) / Z; with the states of a chain (a repeated state is given as often as it was held) and uniform w both
are plain averages under the chain's target. Published code multiplies by raw rewards, which may be negative; weights here
are a distribution. Sums are exactly rounded (`math.fsum`), so a tie is a tie whatever the order; ties go to the draw that
came first.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError

Array = npt.NDArray[np.float64]
# A sign counts where no word or bracket ends before it ("= -3", not "7-3"); thousands are grouped by commas.
NUMBER = re.compile(r"(?:(?<![\w)])[-\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)")


def weights(rewards: Sequence[float | None], beta: float | None) -> Array:
    """softmax(r / beta) over the draws, [N], summing to 1. A draw that was not judged (None) weighs 0.

    Uniform where beta is None, and where no draw was judged.
    """
    if beta is not None and not beta > 0:
        raise UsageError(f"beta must be above 0, not {beta}")
    if beta is None or all(reward is None for reward in rewards):
        return np.full(len(rewards), 1 / max(1, len(rewards)))
    scores = np.array([-np.inf if reward is None else reward for reward in rewards])
    raw = np.exp((scores - scores.max()) / beta)
    return np.asarray(raw / raw.sum(), dtype=np.float64)


def vote(keys: Sequence[str | None], weights: npt.ArrayLike) -> int:
    """The number of the earliest draw whose key has the most weight; equal keys go to the one that was drawn first.

    A draw without a key (None: no answer was found in it) is never chosen unless no draw has one; then draw 0 is.
    """
    share: dict[str, list[float]] = {}
    for key, weight in zip(keys, _checked(weights, len(keys)), strict=True):
        if key is not None:
            share.setdefault(key, []).append(weight)
    if not share:
        return 0
    totals = {key: math.fsum(parts) for key, parts in share.items()}  # in the order of first appearance
    return list(keys).index(max(totals, key=totals.__getitem__))


def rouge1_f1(a: Sequence[int], b: Sequence[int]) -> float:
    """2 |a and b| / (|a| + |b|), the overlap of two token lists counted with repeats. Two empty lists agree: 1."""
    if not a and not b:
        return 1.0
    return 2 * sum((Counter(a) & Counter(b)).values()) / (len(a) + len(b))


def mbr(tokens: Sequence[Sequence[int]], weights: npt.ArrayLike) -> int:
    """The number of the draw with the highest weighted mean ROUGE-1 F1 to all draws, itself included; ties: the first.

    Equal draws are compared once: U different draws cost U^2 comparisons whatever N.
    """
    share: dict[tuple[int, ...], list[float]] = {}
    for row, weight in zip(tokens, _checked(weights, len(tokens)), strict=True):
        share.setdefault(tuple(row), []).append(weight)
    different = list(share)
    mass = [math.fsum(parts) for parts in share.values()]
    utility = _rouge1_table(different)  # [U, U]
    means = [math.fsum(u * w for u, w in zip(row, mass, strict=True)) for row in utility.tolist()]
    return [tuple(row) for row in tokens].index(different[means.index(max(means))])


def check_extract(extract: str) -> None:
    """Raises `UsageError` unless `extract` is "text", "number" or a regular expression with one group."""
    if extract in ("text", "number"):
        return
    try:
        groups = re.compile(extract).groups
    except re.error as error:
        raise UsageError(
            f"extract={extract!r} is not a regular expression ({error}); give text, number or one with one group"
        ) from None
    if groups != 1:
        raise UsageError(
            f"extract={extract!r} has {groups} groups; give text, number or a regular expression with one group, "
            "such as 'answer: (.*)'"
        )


def answer_key(text: str, extract: str = "text") -> str | None:
    """What is voted on. None: the text has no answer of that form.

    "text": the text itself, lower-cased, white space single, closing punctuation off. "number": the last number, written
    plainly (1,000.0 is 1000). Else a regular expression with one group: the group of its last match, treated as text.
    """
    if extract == "number":
        found = NUMBER.findall(text)
        return _plain_number(found[-1]) if found else None
    if extract != "text":
        check_extract(extract)
        matches = [match[1] for match in re.finditer(extract, text) if match[1] is not None]
        if not matches:
            return None
        text = matches[-1]
    return " ".join(text.casefold().split()).rstrip(".!?,;: ") or None


def _plain_number(text: str) -> str:
    value = Decimal(text.replace(",", "").replace("\u2212", "-"))
    return f"{value.normalize():f}" if value else "0"


def _rouge1_table(rows: Sequence[tuple[int, ...]]) -> Array:
    """`rouge1_f1` of every pair, [U, U]."""
    vocabulary = {token: number for number, token in enumerate(sorted({token for row in rows for token in row}))}
    counts = np.zeros((len(rows), len(vocabulary)), dtype=np.int64)  # [U, distinct tokens]
    for number, row in enumerate(rows):
        np.add.at(counts[number], [vocabulary[token] for token in row], 1)
    lengths = counts.sum(1)
    overlap = np.stack([np.minimum(counts, one).sum(1) for one in counts])
    total = lengths[:, None] + lengths
    return np.where(total > 0, 2 * overlap / np.maximum(total, 1), 1.0)


def _checked(weights: npt.ArrayLike, count: int) -> list[float]:
    out = np.asarray(weights, dtype=np.float64)
    if not count:
        raise UsageError("there is no draw to choose from")
    if out.shape != (count,) or not (np.isfinite(out) & (out >= 0)).all():
        raise UsageError(f"{count} draws need {count} finite weights of 0 or more, not {out.tolist()}")
    return [float(weight) for weight in out]
