"""MEXA (arXiv 2410.05873): how well an English-centric model carries a language, from parallel sentences alone.

n sentences in a pivot language p and their translations in q; h_l,t the state of token t after block l, t = 1..T.

    e_l   = sum_t w_t h_l,t,  w_t = t / sum_s s             one embedding a sentence and layer ("weighted")
    C_l   = cos(e_l^p(i), e_l^q(j))                         [n, n]
    mu_l  = share of i with C_l[i,i] > C_l[i,j] and > C_l[j,i] for every j != i      (strict, both directions)
    score = mean of mu_l over the layers, or the largest;   estimated task score of q = score * the pivot's task score

Layers are 0 (embeddings) to L. As in the published code layer 0 counts, and layer L is read after the final norm
(final_norm=false: before it). mu depends on n: a diagonal must beat 2n - 2 others, so chance is 1 / (2n - 1), and scores
are compared at equal n only. Intervals: Wilson for a layer and BCa over sentences for the score, both for this fixed set
of candidates; the row "at n=80" draws smaller sets (delete-d jackknife), which lets the candidates vary too.

Departures from the published code: texts go through in batches (pads are never seen); one matrix product in float64
instead of n^2 cosines in the model's type, so massive activations do not overflow; duplicates, which tie and so can never
win, are dropped and said; the mean-centred variant (each language's mean embedding subtracted first) stands beside every
score; differences below 1e-12 count as ties. skip_bos leaves out the first token and ranks the others from 1, computed
from the stored poolings. Chat templates are never applied. Not in the paper: centring, skip_bos, the comparison of two
checkpoints (exact McNemar and sign tests, Holm).
Cost: one forward of every sentence, once for all layers, poolings and options; then (L + 1) n^2 D multiplications.

What it means: how often the model represents a sentence nearest to its own translation, layer by layer.
What it does not mean: that it writes the language, or knows in it what it knows in the pivot; in the paper the score goes
along with task scores over languages, and an estimate for one language is an extrapolation from that.
When it misleads: few or easy sentences (names and numbers give the pairs away), files in different orders, a first token
whose norm swamps the others, models with different tokenizers or depths, and any two values of n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.measure.alignment import (
    Array,
    aligned,
    centred,
    chance_level,
    cosines,
    pooled_difference,
    subsampled,
    without_first,
)
from trimtab.measure.correlation import pearson, spearman
from trimtab.measure.diagnostic import Diagnostic, Subject, files_digest, said
from trimtab.measure.measurement import Change, Comparison, Dots, Heat, Line, Lines, Measurement, Row, check_alike
from trimtab.measure.parallel_texts import distinct_lines, pivot_of, read_parallel, read_scores
from trimtab.measure.rates import rate, wilson
from trimtab.measure.states import States, read_states, text_rows
from trimtab.measure.stats import holm, mean_interval, sign_test

CARD = Card(
    slug="mexa",
    name="MEXA",
    paper="2410.05873",
    summary="How well the model aligns another language with English inside, from parallel sentences.",
    goal="capability",
    stage="audit",
    mechanism="probe",
    signal=("none",),
    access="hidden states",
    produces="report",
    needs=("a local causal language model", "parallel files: line i means the same in each"),
    infer_multiplier="1",
    fit_cost="none",
    benefit_metrics=("alignment",),
    cost_metrics=("tokens forwarded",),
    limits=("scores depend on the number of sentences", "says nothing about writing in the language"),
    dimensions=("multilingual",),
    status=("implemented", "verified_cpu"),
    example="trimtab measure mexa pocket/base --texts eng.txt mivo.txt --against pocket/chat",
    choose="To see what a change made on English data cost in other languages, without a benchmark in them.",
)
SCARCE = 50  # sentences; below that it warns
SINK = 0.5  # share of all token norms that lies on the first token; above that it warns
CURVES = 8  # languages that fit one figure of lines


@dataclass(frozen=True)
class MexaConfig:
    # the pivot's language, as its file is named (none: English where there is one, else the first)
    pivot: str | None = None
    # at most this many sentences, the first ones (0: all); scores of different numbers cannot be compared
    sentences: int = 100
    # a sentence's embedding: tokens weighted by position, the last token, or their plain mean
    embedding: Literal["weighted", "last", "mean"] = "weighted"
    # the score: the mean over layers, or the best layer
    pooling: Literal["mean", "max"] = "mean"
    # read the last layer after the final norm, as the published code does
    final_norm: bool = True
    # leave layer 0 (the embeddings) out of the score
    skip_embeddings: bool = False
    # leave the first token out of every sentence's embedding
    skip_bos: bool = False
    # sentences in each subsample (the row "at n=80")
    subsample: int = 80
    # subsamples drawn
    draws: int = 100
    # the pivot's score on a task: estimates the task score in every language
    pivot_score: float | None = None
    # the task's score by chance, subtracted before the estimate is scaled and added again
    chance: float = 0.0
    # measured task scores to validate against: a file of language, task and score, separated by tabs
    scores: Path | None = None
    # seed of the subsamples
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sentences < 0 or self.sentences == 1:
            raise UsageError(f"sentences must be 2 or more (0: all), not {self.sentences}")
        if self.subsample < 2 or self.draws < 2:
            raise UsageError(f"subsample and draws must be 2 or more, not {self.subsample} and {self.draws}")
        if not 0 <= self.chance < 1:
            raise UsageError(f"chance is a score in [0, 1), not {self.chance}")
        if self.pivot_score is not None and not self.chance <= self.pivot_score <= 1:
            raise UsageError(f"pivot_score must lie between chance ({self.chance}) and 1, not {self.pivot_score}")
        if self.skip_bos and self.embedding == "last":
            raise UsageError("skip_bos changes nothing where embedding is the last token: drop one of the two")


@dataclass(frozen=True)
class Language:
    """One language against the pivot. indicators, centred: [layers, n]; similarity: [layers, n, n]."""

    name: str
    indicators: npt.NDArray[np.bool_]
    centred: npt.NDArray[np.bool_]
    similarity: Array
    fertility: Array  # [n] tokens over the pivot's
    sink: Array  # [L + 1, n] share of the first token in the sum of token norms

    @property
    def mu(self) -> Array:
        return np.asarray(self.indicators.mean(1), dtype=np.float64)


class Mexa(Diagnostic):
    """Cross-lingual alignment with a pivot language, layer by layer."""

    slug = "mexa"
    Config = MexaConfig
    TEMPLATED = False
    TEXTS = "parallel files (eng.txt fra.txt ...: line i means the same in each), a folder of them, or one table"

    config: MexaConfig

    def measure(self, subject: Subject) -> Measurement:
        config, lm = self.config, subject.lm
        subject.file(self.TEXTS)
        texts = read_parallel(subject.texts)
        pivot = pivot_of(texts, config.pivot)
        observed = read_scores(config.scores) if config.scores else {}
        texts, kept, dropped = distinct_lines(texts, config.sentences)
        n = len(kept)
        states: dict[str, States] = {}
        tokens: dict[str, list[list[int]]] = {}
        for language, lines in texts.items():
            subject.say(f"{subject.name}: reading {language}")
            try:
                tokens[language] = text_rows(lm, lines)
                states[language] = read_states(
                    lm, tokens[language], cache=subject.cache, meter=subject.meter, progress=subject.progress,
                    control=subject.control,
                )  # fmt: skip
            except UsageError as error:
                raise UsageError(f"{language}: {error}") from error
            if config.skip_bos and int(states[language].counts.min()) < 2:
                line = kept[int(states[language].counts.argmin())]
                raise UsageError(f"{language}: line {line} is a single token, and skip_bos leaves nothing of it")
        layers = list(range(1 if config.skip_embeddings else 0, states[pivot].layers))
        own = self._language(pivot, states[pivot], states[pivot], layers)
        found = [self._language(name, states[pivot], states[name], layers) for name in texts if name != pivot]
        settings = asdict(config) | {"scores": files_digest([config.scores])[0] if config.scores else None}
        out = Measurement(
            self.slug,
            subject.name,
            subject.measured(texts, config, n=n, pivot=pivot) | {"settings": settings, "template": "never applied"},
            "sentence",
            units=[f"line {line}" for line in kept],
            cost=subject.meter,
        )
        for one in found:
            self._rows(out, one, n, layers)
        sink = self._sink([own, *found], out)
        out.details |= {
            "n": n,
            "chance": chance_level(n),
            "pivot": pivot,
            "layers": layers,
            "tokens": fingerprint_of(tokens),
            "first_token_share": sink,
            "languages": {language.name: _record(language, layers) for language in found},
        }
        out.figures = _figures(found, layers, n, out)
        self._validate(out, found, observed, pivot)
        out.warnings += _warnings(own, found, layers, n, dropped)
        out.notes.append(f"n = {n} sentences, chance {chance_level(n):.4f}: scores at another n are other scores")
        return out

    def _language(self, name: str, pivot: States, other: States, layers: Sequence[int]) -> Language:
        raw, centre, similarity = [], [], []
        for layer in layers:
            a, b = (self._embeddings(side, layer) for side in (pivot, other))
            similarity.append(cosines(a, b))
            raw.append(aligned(similarity[-1]))
            centre.append(aligned(cosines(centred(a), centred(b))))
        first = np.stack([np.linalg.norm(other.pooled("first", layer), axis=1) for layer in range(other.layers)])
        sink = first / np.maximum(other.norms().T * other.counts, 1e-30)
        return Language(
            name, np.stack(raw), np.stack(centre), np.stack(similarity), other.counts / pivot.counts, sink
        )  # fmt: skip

    def _embeddings(self, states: States, layer: int) -> Array:
        """[n, D] float64: the sentence embeddings of one layer."""
        kind = self.config.embedding

        def read(pooling: Any) -> Array:
            last = self.config.final_norm and layer == states.layers - 1
            return (states.final(pooling) if last else states.pooled(pooling, layer)).astype(np.float64)

        if not self.config.skip_bos:
            return read(kind)
        mean = read("mean")
        return without_first(mean, read("weighted") if kind == "weighted" else None, read("first"), states.counts)

    def _rows(self, out: Measurement, language: Language, n: int, layers: Sequence[int]) -> None:
        config, name = self.config, language.name
        best = int(language.mu.argmax())
        for label, flags in ((name, language.indicators), (f"{name}, centred", language.centred)):
            values = _per_sentence(flags, config.pooling)
            note = f"peak {flags.mean(1).max():.2f} at layer {layers[int(flags.mean(1).argmax())]}"
            out.samples[label] = values.tolist()
            out.table.append(Row.of(label, rate(values), "higher", note))
        m = config.subsample
        if m < n:
            generator = np.random.default_rng(config.seed)
            mean, low, high = subsampled(language.similarity, m, config.draws, config.pooling, generator)
            out.table.append(Row(f"{name}, at n={m}", mean, low, high, n, "higher", f"chance {chance_level(m):.4f}"))
        if config.pivot_score is not None:
            row, gain = out.row(name), config.pivot_score - config.chance
            value, low, high = (None if x is None else config.chance + gain * x for x in (row.value, row.low, row.high))
            note = "the pivot's score taken as exact"
            out.table.append(Row(f"{name}, estimated task score", value, low, high, n, "higher", note))
        out.samples[f"{name}, tokens over the pivot's"] = language.fertility.tolist()
        out.table.append(Row.of(f"{name}, tokens over the pivot's", mean_interval(language.fertility), "lower"))
        if config.pooling == "max":
            out.notes.append(f"{name}: the interval is that of layer {layers[best]}, as if it had not been chosen")

    def _sink(self, languages: Sequence[Language], out: Measurement) -> list[float]:
        """Mean share of the first token at each layer; a row of the worst layer and a warning where it is large."""
        share = np.mean([language.sink for language in languages], axis=0)  # [L + 1, n]
        worst = int(share.mean(1).argmax())
        label = "share of norm on the first token"
        out.samples[label] = share[worst].tolist()
        out.table.append(Row.of(label, mean_interval(share[worst]), note=f"layer {worst}, the worst one"))
        if share[worst].mean() > SINK and not self.config.skip_bos and self.config.embedding != "last":
            out.warnings.append(
                f"the first token carries {share[worst].mean():.0%} of the norm at layer {worst}: the cosines there "
                "are mostly its own; measure again with skip_bos=true"
            )
        return share.mean(1).tolist()

    def _validate(
        self, out: Measurement, found: Sequence[Language], observed: Mapping[str, Mapping[str, float]], pivot: str
    ) -> None:
        """Correlations over languages of the estimate with measured task scores."""
        for task, scores in observed.items():
            names = [language.name for language in found if language.name in scores]
            if len(names) < 3:
                raise UsageError(
                    f"{self.config.scores}: task {task!r} has scores of {len(names)} measured languages besides the "
                    "pivot; 3 are needed for a correlation"
                )
            estimate = [out.row(name).value or 0.0 for name in names]
            for what, correlate in (("Pearson", pearson), ("Spearman", spearman)):
                value, low, high = correlate(estimate, [scores[name] for name in names])
                out.table.append(Row(f"{task}, {what}", value, low, high, len(names), "higher", "over languages"))
            if pivot in scores:
                pairs = {
                    name: [score * scores[pivot], scores[name]] for name, score in zip(names, estimate, strict=True)
                }
                out.details.setdefault("estimated and observed", {})[task] = pairs

    def compare(self, first: Measurement, second: Measurement) -> Comparison:
        """Score by score (interval over sentences, sign test, Holm over languages), then layer by layer (McNemar, Holm
        over all layers and languages)."""
        check_alike(first, second)
        out = Comparison(self.slug, first.subject, second.subject, first.unit)
        sides = [{name: _flags(record) for name, record in m.details["languages"].items()} for m in (first, second)]
        pooled, layered = [], []
        for name, flags in sides[0].items():
            other = sides[1][name]
            difference = pooled_difference(flags, other, self.config.pooling, self.config.seed)
            rows = first.row(name), second.row(name)
            net = np.sign(flags.mean(0) - other.mean(0))
            p = sign_test(int((net > 0).sum()), int((net < 0).sum()))
            pooled.append((name, rows[0].value, rows[1].value, difference, p))
            moved = [m.details["languages"][name]["peak_layer"] for m in (first, second)]
            seen = min(float(wilson(side.sum(1).max(), side.shape[1]).low or 0.0) for side in (flags, other))
            if moved[0] != moved[1] and seen > first.details["chance"]:
                out.notes.append(f"{name}: the layer of best alignment is {moved[0]} against {moved[1]}")
            if len(flags) == len(other):
                for layer, a, b in zip(first.details["layers"], flags, other, strict=True):
                    difference = pooled_difference(a[None], b[None], "mean", self.config.seed)
                    p = sign_test(int((a & ~b).sum()), int((b & ~a).sum()))
                    layered.append((f"{name}, layer {layer}", float(a.mean()), float(b.mean()), difference, p))
        for family in (pooled, layered):
            adjusted = holm([row[-1] for row in family])
            for (label, a, b, difference, _), p in zip(family, adjusted, strict=True):
                decided = said(difference, "higher", 1.0 if p is None else p)
                out.changes.append(
                    Change(
                        label, a, b, difference.mean, difference.low, difference.high, difference.prompts, decided, p
                    )  # fmt: skip
                )
        out.notes.append("p-values are exact and adjusted (Holm); a verdict needs both one below 0.05 and the interval")
        if len({tuple(m.details["layers"]) for m in (first, second)}) > 1:
            out.notes.append("the models differ in depth: layers are not compared, and scores only loosely")
        if first.details["tokens"] != second.details["tokens"]:
            out.notes.append("the models split the sentences into different tokens: scores compare only loosely")
        return out


def _per_sentence(flags: npt.NDArray[np.bool_], pooling: str) -> Array:
    """[n]: what the score is the mean of. For "max" the best layer's indicators."""
    return (flags.mean(0) if pooling == "mean" else flags[int(flags.mean(1).argmax())]).astype(np.float64)


def _record(language: Language, layers: Sequence[int]) -> dict[str, Any]:
    return {
        "mu": language.mu.tolist(),
        "centred": language.centred.mean(1).tolist(),
        "peak_layer": layers[int(language.mu.argmax())],
        "indicators": ["".join("01"[int(flag)] for flag in row) for row in language.indicators],
    }


def _flags(record: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
    return np.array([[bit == "1" for bit in row] for row in record["indicators"]])


def _bounds(share: float, n: int) -> tuple[float | None, float | None]:
    interval = wilson(share * n, n)
    return interval.low, interval.high


def _figures(found: Sequence[Language], layers: Sequence[int], n: int, out: Measurement) -> list[Any]:
    chance = [("chance", chance_level(n))]
    if len(found) <= CURVES:
        lines = [
            Line(x.name, [(at, float(mu), *_bounds(float(mu), n)) for at, mu in zip(layers, x.mu, strict=True)])
            for x in found
        ]
        first: Any = Lines("Alignment with the pivot by layer", "layer", "mu", lines, chance, "bands: Wilson, 95 %")
    else:
        names = [language.name for language in found]
        first = Heat("Alignment with the pivot by layer", names, list(map(str, layers)), [x.mu.tolist() for x in found])
    rows = sorted((out.row(language.name) for language in found), key=lambda row: -(row.value or 0.0))
    return [first, Dots("Score by language", "score", [(r.label, r.value, r.low, r.high) for r in rows], chance)]


def _warnings(
    own: Language, found: Sequence[Language], layers: Sequence[int], n: int, dropped: Sequence[int]
) -> list[str]:
    out = []
    if dropped:
        shown = ", ".join(map(str, dropped[:6])) + (", ..." if len(dropped) > 6 else "")
        out.append(f"{len(dropped)} lines repeat an earlier one in some language and were left out (line {shown})")
    if n < SCARCE:
        out.append(f"{n} sentences are few (below {SCARCE}): retrieval is easy and the score high")
    poor = [layer for layer, mu in zip(layers, own.mu, strict=True) if layer and mu < 1]
    if poor:
        out.append(f"at layer {', '.join(map(str, poor))} even the pivot's own sentences are not told apart")
    for language in found:
        if (language.mu == 0).all():
            out.append(f"{language.name}: no sentence finds its translation at any layer: are the lines in one order?")
    return out
