"""What a model chooses in triplets of concepts: by the probability of its answers, by sampled words, by hidden states.

    answers   p(c) = mean over all orders of softmax_c(log p(name_c | question) - log p(name_c | question without names))
    sampled   the share of samples that name c and none of the others; what names none or several is unparsable
    states    the similarity of the concepts' hidden states in a carrier sentence; no question is asked

log p(name) sums over the name's tokens, both as it is and after a space where the tokens differ. Averaging over orders
takes away a liking for a place, the question without names a liking for a word. Cost: triplets x 6 orders (anchor: 2)
short forwards; of states one forward a concept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
import torch

from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.measure.diagnostic import Subject
from trimtab.measure.options import option_ids, option_logprobs
from trimtab.measure.states import char_spans, read_states, text_rows
from trimtab.measure.triplets import OPTIONS, Array, Form, Ints
from trimtab.policy import Prompt

WORDINGS = {
    "odd-one-out": "Which of these three is least like the other two: {a}, {b} or {c}? Answer with one of them.\nAnswer:",
    "anchor": "Which is more similar to {a}: {b} or {c}? Answer with one of the two.\nAnswer:",
}
NOTHING = "N/A"  # what stands for a name in a question without names
CHUNK = 64  # triplets asked and cached together


@dataclass
class Choices:
    """p [R, K]: rows of zeros where nothing was chosen. mass [R]: what all the options had together; NaN where unknown."""

    p: Array
    mass: Array
    unparsed: float | None = None
    layers: list[Array] = field(default_factory=list)  # the concepts' vectors of each layer, [N, D]


def questions(form: Form, wording: str, names: Sequence[str], triplet: Sequence[int]) -> list[str]:
    """The question in every order of what is asked about."""
    a, b, c = (names[number] for number in triplet)
    if form == "anchor":
        return [wording.format(a=a, b=first, c=second) for first, second in permutations((b, c))]
    return [wording.format(a=first, b=second, c=third) for first, second, third in permutations((a, b, c))]


def options_of(form: Form, triplet: Sequence[int]) -> list[int]:
    """The concepts that may be chosen, in the order of the columns of p."""
    return list(triplet[1:] if form == "anchor" else triplet)


def by_answers(
    subject: Subject, names: Sequence[str], triplets: Ints, form: Form, wording: str, bias: bool, per_token: bool
) -> Choices:
    """Exact probabilities of the names as answers."""
    lm = subject.lm
    spelt, clashes = spellings(lm, names)
    columns = [options_of(form, triplet) for triplet in triplets.tolist()]
    ended = [any(pair <= set(row) for pair in clashes) for row in columns]  # [R] the end token belongs to the options
    empty = np.zeros((len(columns), OPTIONS[form]))
    if bias:
        blank: Prompt = wording.format(a=NOTHING, b=NOTHING, c=NOTHING)
        flat = [text for texts in spelt for text in texts]
        for end in sorted(set(ended)):
            (scored,) = option_logprobs(subject.policy, [blank], [flat], end=end, meter=subject.meter)
            here = np.array(ended) == end
            empty[here] = _by_name(scored, spelt, per_token)[np.array(columns)[here]]
    out: list[list[float]] = []
    for at in range(0, len(triplets), CHUNK):
        part = triplets[at : at + CHUNK].tolist()
        key = fingerprint_of("triplets", subject.identity, form, wording, list(names), part, per_token)
        known = subject.cache.load("triplets", key)
        if known is None:
            if at % (8 * CHUNK) == 0:
                subject.say(
                    f"{subject.name}: triplets {at + 1} to {min(at + 8 * CHUNK, len(triplets))} of {len(triplets)}"
                )
            known = [[] for _ in part]
            for end in sorted(set(ended[at : at + CHUNK])):
                rows = [row for row in range(len(part)) if ended[at + row] == end]
                asked = [(row, text) for row in rows for text in questions(form, wording, names, part[row])]
                options = [[text for number in columns[at + row] for text in spelt[number]] for row, _ in asked]
                prompts: list[Prompt] = [text for _, text in asked]
                logs = option_logprobs(subject.policy, prompts, options, end=end, meter=subject.meter)
                for (row, _), one in zip(asked, logs, strict=True):
                    known[row] += _by_name(one, [spelt[number] for number in columns[at + row]], per_token).tolist()
            subject.cache.save("triplets", key, known)
        out += known
    logp = np.array(out).reshape(len(triplets), -1, OPTIONS[form])  # [R, orders, K]
    mass = np.exp(logp).sum(-1).mean(-1) if not per_token else np.full(len(triplets), np.nan)
    logp = logp - empty[:, None]
    logp -= logp.max(-1, keepdims=True)
    p = np.exp(logp)
    return Choices((p / p.sum(-1, keepdims=True)).mean(1), mass)


def by_samples(
    subject: Subject, names: Sequence[str], triplets: Ints, form: Form, wording: str, samples: int
) -> Choices:
    """Sampled answers that name exactly one of the options."""
    rows = triplets.tolist()
    prompts: list[Prompt] = [text for triplet in rows for text in questions(form, wording, names, triplet)]
    orders = len(prompts) // len(rows)
    texts = subject.answers(prompts, subject.sampling.but(samples=samples)).texts
    counts = np.zeros((len(rows), OPTIONS[form]))
    parsed = 0
    for number, text in enumerate(texts):
        triplet = rows[number // (orders * samples)]
        named = named_in(text, [names[one] for one in options_of(form, triplet)])
        if named is not None:
            counts[number // (orders * samples), named] += 1
            parsed += 1
    total = counts.sum(1, keepdims=True)
    p = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
    return Choices(p, np.full(len(rows), np.nan), 1 - parsed / len(texts))


def named_in(text: str, options: Sequence[str]) -> int | None:
    """Which of the options an answer names, by whole words; None for none or several."""
    found = [
        number
        for number, option in enumerate(options)
        if re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text, re.IGNORECASE)
    ]
    return found[0] if len(found) == 1 else None


def concept_vectors(subject: Subject, names: Sequence[str], carrier: str) -> list[Array]:
    """For every layer (embeddings first) the mean state over a name's tokens in the carrier sentence, [N, D]."""
    texts = [carrier.format(concept=name) for name in names]
    start = carrier.index("{concept}")
    spans = char_spans(subject.lm, texts, [(start, start + len(name)) for name in names])
    states = read_states(
        subject.lm, text_rows(subject.lm, texts), spans, control=subject.control, cache=subject.cache,
        meter=subject.meter, progress=subject.progress,
    )  # fmt: skip
    return [states.pooled("mean", layer).astype(np.float64) for layer in range(states.layers)]


def spellings(lm: Any, names: Sequence[str]) -> tuple[list[list[str]], list[set[int]]]:
    """Every way to write each name, and the pairs of names of which one begins the other.

    Where such a pair is among the options of a triplet, the end token is part of its options.
    """
    written: dict[tuple[int, ...], int] = {}
    out: list[list[str]] = []
    for number, name in enumerate(names):
        texts: list[str] = []
        for text in (f" {name}", name):
            ids = tuple(option_ids(lm, [text])[0])
            if written.get(ids, number) != number:
                raise UsageError(
                    f"{lm.name} reads {name!r} and {names[written[ids]]!r} as the same tokens: leave one out"
                )
            if ids not in written:
                written[ids] = number
                texts.append(text)
        out.append(texts)
    clashes = {
        frozenset((owner, written[ids[:cut]]))
        for ids, owner in written.items()
        for cut in range(1, len(ids))
        if written.get(ids[:cut], owner) != owner
    }
    return out, [set(pair) for pair in sorted(clashes, key=sorted)]


def _by_name(scored: Sequence[torch.Tensor], spelt: Sequence[Sequence[str]], per_token: bool) -> Array:
    """[names] log p of each name, summed over its spellings."""
    sums = iter([one.double().mean() if per_token else one.double().sum() for one in scored])
    return np.array([float(torch.stack([next(sums) for _ in texts]).logsumexp(0)) for texts in spelt])
