"""Texts labelled safe or unsafe: chosen, split in two halves within axiom and label, and turned into tokens to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.measure.states import Span, char_spans, text_rows

Numbers = npt.NDArray[np.int64]
NAMES = {0: "unsafe", 1: "safe"}
LEAST = 5  # texts of a class that are reported
NO_AXIOM = "(none)"


@dataclass(frozen=True)
class Sample:
    """n texts. train and rows number those that layer weights are found on, and those that are reported.

    cells: "overall" and the axioms, each the places in `rows` that belong to it.
    """

    texts: list[str]
    labels: Numbers  # [n], 1 is safe
    axioms: list[str]
    train: Numbers
    rows: Numbers
    cells: dict[str, Numbers] = field(default_factory=dict)

    @property
    def shown(self) -> Numbers:
        """The labels of the reported texts."""
        return self.labels[self.rows]

    @property
    def strata(self) -> list[tuple[str, int]]:
        """(axiom, label) of the reported texts: what resampling keeps."""
        return [(self.axioms[i], int(self.labels[i])) for i in self.rows]


def choose(items: Sequence[dict[str, Any]], halved: bool, most: int, seed: int) -> Sample:
    """At most `most` texts of each axiom and label; halved: half of each is for training, else all are reported.

    UsageError for labels that are neither safe nor unsafe, and for too few texts of a class, naming the axiom.
    """
    unknown = Counter(str(item["label"]) for item in items if item["safe"] is None)
    if unknown:
        seen = ", ".join(f"{label!r} ({count})" for label, count in unknown.most_common(8))
        raise UsageError(f"the labels must be safe or unsafe; the file also has {seen}: rename them, or leave them out")
    generator = np.random.default_rng(seed)
    strata: dict[tuple[str, int], list[int]] = {}
    for number, item in enumerate(items):
        strata.setdefault((item["axiom"] or NO_AXIOM, int(item["safe"])), []).append(number)
    axioms = sorted({axiom for axiom, _ in strata})
    least = 2 * LEAST if halved else LEAST
    train: list[int] = []
    report: list[int] = []
    for axiom in axioms:
        for label, name in NAMES.items():
            drawn = generator.permutation(strata.get((axiom, label), []))[:most].astype(int).tolist()
            if len(drawn) < least:
                where = "the file" if axioms == [NO_AXIOM] else f"the axiom {axiom!r}"
                half = (
                    f" (half of them find the layer weights; {LEAST} are enough with --layers last)" if halved else ""
                )
                raise UsageError(f"{where} has {len(drawn)} {name} texts: {least} or more are needed{half}")
            middle = len(drawn) // 2 if halved else 0
            train, report = train + drawn[:middle], report + drawn[middle:]
    chosen = sorted(train + report)
    place = {number: at for at, number in enumerate(chosen)}
    rows = np.array(sorted(place[i] for i in report), dtype=np.int64)
    own = [items[i]["axiom"] or NO_AXIOM for i in chosen]
    cells = {"overall": np.arange(len(rows))}
    if len(axioms) > 1:
        cells |= {axiom: np.flatnonzero([own[i] == axiom for i in rows]) for axiom in axioms}
    labels = np.array([int(items[i]["safe"]) for i in chosen])
    texts = [items[i]["text"] for i in chosen]
    return Sample(texts, labels, own, np.array(sorted(place[i] for i in train), dtype=np.int64), rows, cells)


def both_labels(items: Sequence[dict[str, Any]]) -> list[str]:
    """A warning where texts occur with both labels."""
    labels: dict[str, set[Any]] = {}
    for item in items:
        labels.setdefault(item["text"].strip(), set()).add(item["safe"])
    count = sum(len(found) > 1 for found in labels.values())
    return [f"{count} texts occur with both labels"] if count else []


def tokens_of(
    lm: LM, texts: Sequence[str], chat: bool, after: str | None, max_length: int | None
) -> tuple[list[list[int]], list[Span], list[str]]:
    """Token ids of texts, the span of each that is pooled, and warnings.

    A token that only begins a text (<s>) is not pooled: its state is the same for all texts and often huge, so that the
    mean would tell their length. after: pool what follows its last occurrence. max_length: cut to so many tokens.
    """
    if after is not None and (chat or max_length is not None):
        raise UsageError("after needs whole texts as they are: --template plain, and no max_length")
    rows = text_rows(lm, texts, chat)
    if after is not None:
        absent = [number for number, text in enumerate(texts, 1) if after not in text]
        if absent:
            raise UsageError(f"{len(absent)} texts do not hold {after!r}, the first: {texts[absent[0] - 1][:60]!r}")
        ends = [(text.rindex(after) + len(after), len(text)) for text in texts]
        return rows, char_spans(lm, texts, ends), []
    limit = max_length or max(map(len, rows))
    cut = sum(len(row) > limit for row in rows)
    rows = [row[:limit] for row in rows]
    begin = getattr(lm.tokenizer, "bos_token_id", None)
    spans = [(int(len(row) > 1 and row[0] == begin), len(row)) for row in rows]
    share = cut / len(rows)
    return rows, spans, [f"{cut} of {len(rows)} texts were cut to {limit} tokens"] if share > 0.1 else []
