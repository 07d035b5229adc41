"""Human triplets: does the model find things alike that people find alike?

After Studdiford et al. 2025 (2510.01030), with the task and the likelihood of SPoSE (Hebart et al. 2020). Of three
concepts one is the odd one out (or: is b or c closer to a). The model chooses in every triplet (`triplet_choices`: by exact
answer probabilities over all orders, by sampled words, or by the similarity of its hidden states), people's choices come
from their triplets or are predicted from their embedding, and the two are compared:

    agreement       share of triplets with the same choice; chance 1/3 (anchor 1/2); ties are no choice and not counted
    above chance    (agreement - chance) / (ceiling - chance), where people's own consistency is known
    Procrustes R2   of an embedding fitted to the model's choices (`triplets`) with that of people; null: permuted concepts
    RSA             Spearman of the two similarity matrices; Mantel's permutation p
    ridge R2        people's embedding predicted linearly from the model's, on concepts left out (secondary)

Concepts are what is resampled, with the triplets inside a resample: triplets share concepts, and resampling them would
give an interval far too narrow. Two models are compared on the same resamples. The interval of R2 leaves out one concept at
a time instead, because a bootstrap of it is too narrow (`embedding_scores`).

Departures. The paper's wording, triplet count and dimension are not published in what we read: the wording here is ours
(`wording` changes it), the defaults are 5,000 triplets and d = 10. SPoSE's files have the odd one last; here rows are
sorted, so the order of a file changes nothing. Without files the reference is a list of 32 things with tags of ours: no
person was asked, and it says only whether the model's space has our categories in it.

What it means: to what degree the model's choices, or its states, order these concepts as the reference does.

What it does not mean: that the model thinks as people do, or is aligned with what they want.

When it misleads: a small model cannot do the task in words, and its choices are noise while its states are not; a chat
model answers with a sentence (see the mass of the options); different numbers of concepts or dimensions give different R2;
a name with two meanings is two concepts.

Cost: 6 orders x triplets short forwards (`--triplets 1000` for a first look); states: one forward a concept. The fit
takes some seconds on a CPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from string import Formatter
from typing import Literal

import numpy as np

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.measure import concept_files as files
from trimtab.measure import embedding_scores as scores
from trimtab.measure.diagnostic import Diagnostic, Subject, said
from trimtab.measure.few_clusters import jackknife
from trimtab.measure.measurement import Change, Comparison, Dots, Measurement, Row, check_alike
from trimtab.measure.stats import Interval
from trimtab.measure.triplet_choices import WORDINGS, Choices, by_answers, by_samples, concept_vectors
from trimtab.measure.triplet_statistics import AGREE, ENDS, PROCRUSTES, RSA, TripletStatistics, layer_curve, likeness
from trimtab.measure.triplets import (
    OPTIONS,
    Array,
    Fit,
    Form,
    Ints,
    above_chance,
    agreement,
    ceiling,
    choose,
    draw_triplets,
    fit_embedding,
    scores_of,
)

CARD = Card(
    slug="human-triplets",
    name="Human triplets",
    paper="2510.01030",
    summary="Whether the model finds the same things alike as people do: odd one out, embeddings, similarity.",
    goal="value",
    stage="audit",
    mechanism="metric",
    signal=("none",),
    access="logits",
    produces="report",
    needs=("concepts, and an embedding or triplets of people (a small list with tags is built in)",),
    infer_multiplier="6 x triplets",
    fit_cost="an embedding of some hundred numbers, seconds on a CPU",
    benefit_metrics=("agreement", "Procrustes R2"),
    cost_metrics=("ties",),
    limits=("a small model may not manage the task in words: measure its states as well",),
    dimensions=("latent geometry", "capability"),
    status=("implemented", "verified_cpu"),
    example="trimtab measure human-triplets MODEL --texts concepts.txt embedding.txt --against BASE",
    choose="To see whether a change moved the model's concepts closer to people's, or away from them.",
)


@dataclass(frozen=True)
class HumanTripletsConfig:
    # how a choice is asked for: the odd one of three, or which of two is closer to an anchor
    form: Literal["odd-one-out", "anchor"] = "odd-one-out"
    # how the model chooses: probabilities of its answers, sampled answers, or the similarity of its hidden states
    mode: Literal["answers", "sampled", "states"] = "answers"
    # triplets asked (all of them where there are fewer)
    triplets: int = 5000
    # the question, with {a}, {b} and {c}; empty: ours
    wording: str = ""
    # take off how likely each name is as the answer to the question without names
    option_bias: bool = True
    # mean log-probability of a name's tokens instead of their sum
    per_token: bool = False
    # mode=sampled: answers drawn to each order of each triplet
    samples: int = 8
    # mode=states: the layer whose states choose (0: embeddings; -1: the last block)
    layer: int = -1
    # mode=states: the sentence around a name
    carrier: str = "This is a {concept}."
    # mode=states: how alike two states are
    similarity: Literal["cosine", "dot"] = "cosine"
    # how alike two rows of people's embedding are
    reference_similarity: Literal["dot", "cosine"] = "dot"
    # whether triplets by number count from 0 or from 1
    index_base: Literal["detect", "0", "1"] = "detect"
    # how well people agree with one another, where it is known (the noise ceiling); else from repeated triplets
    ceiling: float | None = None
    # the embedding that is fitted: distances, or dot products of non-negative coordinates
    kind: Literal["metric", "spose"] = "metric"
    # dimensions of the fitted embedding; of several the one with the best held-out accuracy
    dimensions: tuple[int, ...] = (10,)
    # weight of the sum of coordinates in the fit; not given: 0 (metric), 0.008 (spose)
    penalty: float | None = None
    # steps of the fit
    steps: int = 800
    # step size of the fit
    lr: float = 0.05
    # fits from different starts, of which the best is kept
    restarts: int = 5
    # permutations of the nulls
    permutations: int = 1000
    # resamples of the concepts
    bootstraps: int = 1000

    def __post_init__(self) -> None:
        least = {"triplets": 1, "samples": 1, "steps": 1, "restarts": 1, "permutations": 20, "bootstraps": 20}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UsageError(f"{name} must be {value} or more, not {getattr(self, name)}")
        if not self.dimensions or min(self.dimensions) < 1 or not self.lr > 0 or (self.penalty or 0) < 0:
            raise UsageError("dimensions must be 1 or more, lr above 0 and penalty 0 or more")
        if self.ceiling is not None and not 1 / OPTIONS[self.form] < self.ceiling <= 1:
            raise UsageError(f"ceiling is a share between chance (1/{OPTIONS[self.form]}) and 1, not {self.ceiling}")
        _check_slots(self.wording or WORDINGS[self.form], ["a", "b", "c"], "wording")
        _check_slots(self.carrier, ["concept"], "carrier")


class HumanTriplets(Diagnostic):
    """Agreement of a model's similarity space with people's."""

    slug = "human-triplets"
    Config = HumanTripletsConfig
    TEXTS = ""  # concepts, an embedding or triplets, and the names of the embedding's rows may be given

    def measure(self, subject: Subject) -> Measurement:
        config: HumanTripletsConfig = self.config
        names, reference = self._reference(subject)
        size, form = len(names), config.form
        if config.mode != "sampled":
            _ = subject.lm  # refused here where there is no local model
        triplets, human, z_similarity = self._people(reference, size, subject.sampling.seed)
        self._check_size(size, len(triplets))
        wording = config.wording or WORDINGS[form]
        chosen = self._choices(subject, names, triplets, wording)
        choices = choose(chosen.p)
        fit = self._fit(subject, triplets, chosen.p, size)
        z = reference.embedding
        if z is None:  # people's triplets are embedded in the same way
            subject.say("fitting people's choices")
            of_people = self._embed(triplets, human, size, fit.x.shape[1], subject)
            z, z_similarity = of_people.x, of_people.similarity
        out = Measurement(
            self.slug,
            subject.name,
            subject.measured(
                [names, triplets.tolist(), human.tolist(), None if reference.embedding is None else z.tolist()], config,
                seed=subject.sampling.seed,
                **({"sampling": subject.sampling.to_dict()} if config.mode == "sampled" else {}),
            ),
            "concept",
            units=list(names),
            cost=subject.meter,
        )  # fmt: skip
        self._tell(out, triplets, human, choices, chosen, fit, z, z_similarity)
        if chosen.layers:
            out.figures.append(
                layer_curve(chosen.layers, triplets, human, z_similarity, config.form, config.similarity)
            )
        out.warnings += self._doubts(names, triplets, chosen, choices, config, reference, not subject.texts)
        out.details |= {
            "wording": wording if config.mode != "states" else config.carrier,
            "triplets": triplets.tolist(), "p": chosen.p.tolist(), "human": human.tolist(),
            "embedding": fit.x.tolist(), "fit": {key: value for key, value in asdict(fit).items() if key != "x"},
            "reference": z.tolist(), "reference similarity": z_similarity.tolist(),
        }  # fmt: skip
        return out

    def compare(self, first: Measurement, second: Measurement) -> Comparison:
        """Differences on the same resamples of concepts (R2: on the same concepts left out)."""
        check_alike(first, second)
        out = Comparison(self.slug, first.subject, second.subject, first.unit)
        size = len(first.units)
        drawn = scores.resamples(size, self.config.bootstraps, 0)
        sides = [TripletStatistics.stored(one) for one in (first, second)]
        kept = [side.over(drawn) for side in sides]
        for label in (AGREE, PROCRUSTES, RSA):
            if label == PROCRUSTES and sides[0].x.shape != sides[1].x.shape:
                out.notes.append("the fitted embeddings differ in dimension, so their Procrustes R2 cannot be compared")
                continue
            a, b = first.row(label).value, second.row(label).value
            if a is None or b is None:
                gap = Interval(None, None, None)
            elif label == PROCRUSTES:
                gap = jackknife(lambda rows: sides[0].r2(rows) - sides[1].r2(rows), size)
            else:
                gap = scores.interval(a - b, kept[0][label] - kept[1][label], size)
            out.changes.append(
                Change(label, a, b, gap.mean, gap.low, gap.high, gap.prompts, said(gap, first.row(label).better))
            )
        return out

    # parts

    def _reference(self, subject: Subject) -> tuple[list[str], files.Reference]:
        if len(subject.texts) > 3:
            raise UsageError(
                f"{self.slug} takes three files at most (concepts, reference, names of its rows), not {len(subject.texts)}"
            )
        concepts = files.read_concepts(subject.texts[0] if subject.texts else files.OWN)
        names = sorted(concepts.names)
        if len(subject.texts) < 2:
            rows = files.tag_embedding(concepts)
            return names, files.Reference(rows[[concepts.names.index(name) for name in names]])
        known = files.read_concepts(subject.texts[2]).names if len(subject.texts) == 3 else concepts.names
        return names, files.read_reference(subject.texts[1], names, known, self.config.index_base)

    def _people(self, reference: files.Reference, size: int, seed: int) -> tuple[Ints, Array, Array]:
        """Triplets, what people chose in each, and people's similarity matrix (zeros where it must be fitted)."""
        form: Form = self.config.form
        if reference.embedding is not None:
            z = reference.embedding
            similar = likeness(z, self.config.reference_similarity)
            triplets = draw_triplets(size, self.config.triplets, form, seed)
            picked = choose(scores_of(similar, triplets, form))
            human = np.zeros((len(triplets), OPTIONS[form]))
            human[picked >= 0, picked[picked >= 0]] = 1
            return triplets, human, similar
        if form == "anchor" or reference.triplets is None or reference.human is None:
            raise UsageError("the anchor form needs an embedding as its reference: triplets say which one is odd, not "
                             "which of two is closer")  # fmt: skip
        triplets, human = reference.triplets, reference.human
        if len(triplets) > self.config.triplets:
            rows = np.random.default_rng(seed).choice(len(triplets), self.config.triplets, replace=False)
            triplets, human = triplets[np.sort(rows)], human[np.sort(rows)]
        return triplets, human, np.zeros((size, size))

    def _check_size(self, size: int, triplets: int) -> None:
        for d in self.config.dimensions:
            if d >= size:
                raise UsageError(f"{size} concepts need fewer than {size} dimensions, not {d}: give --dimensions")
            if triplets < size * d:
                raise UsageError(
                    f"{triplets} triplets cannot place {size} concepts in {d} dimensions ({size * d} numbers): give more "
                    "--triplets or fewer --dimensions"
                )

    def _choices(self, subject: Subject, names: list[str], triplets: Ints, wording: str) -> Choices:
        config: HumanTripletsConfig = self.config
        if config.mode == "answers":
            return by_answers(subject, names, triplets, config.form, wording, config.option_bias, config.per_token)
        if config.mode == "sampled":
            return by_samples(subject, names, triplets, config.form, wording, config.samples)
        layers = concept_vectors(subject, names, config.carrier)
        if not -len(layers) <= config.layer < len(layers):
            raise UsageError(f"layer {config.layer} does not exist: there are 0 (embeddings) to {len(layers) - 1}")
        picked = choose(scores_of(likeness(layers[config.layer], config.similarity), triplets, config.form))
        p = np.where(picked[:, None] == np.arange(OPTIONS[config.form]), 1.0, 0.0)  # a tie is a row of zeros
        return Choices(p, np.full(len(triplets), np.nan), layers=layers)

    def _embed(self, triplets: Ints, p: Array, size: int, d: int, subject: Subject) -> Fit:
        config: HumanTripletsConfig = self.config
        penalty = config.penalty if config.penalty is not None else (0.008 if config.kind == "spose" else 0.0)
        return fit_embedding(
            triplets, p, size, d, config.form, config.kind, penalty, config.steps, config.lr, config.restarts,
            seed=subject.sampling.seed, progress=subject.progress,
        )  # fmt: skip

    def _fit(self, subject: Subject, triplets: Ints, p: Array, size: int) -> Fit:
        subject.say(f"{subject.name}: fitting an embedding")
        fits = [self._embed(triplets, p, size, d, subject) for d in self.config.dimensions]
        return max(fits, key=lambda fit: fit.held_out_accuracy or 0.0)

    def _tell(
        self, out: Measurement, triplets: Ints, human: Array, choices: Ints, chosen: Choices, fit: Fit, z: Array,
        z_similarity: Array,
    ) -> None:  # fmt: skip
        """The table, the samples and the figure of single concepts."""
        config: HumanTripletsConfig = self.config
        size, chance = len(out.units), 1 / OPTIONS[config.form]
        stored = TripletStatistics(triplets, human, choices, fit.x, fit.similarity, z, z_similarity)
        drawn = stored.over(scores.resamples(size, config.bootstraps, 0))
        seen = stored.over(np.arange(size)[None])
        found = {label: scores.interval(float(seen[label][0]), drawn[label], size, ENDS[label]) for label in seen}
        out.table.append(Row.of(AGREE, found[AGREE], "higher", f"chance {chance:.3f}"))
        top = config.ceiling if config.ceiling is not None else ceiling(human)
        share = found[AGREE]
        if top is not None and share.mean is not None and top > chance:
            ends = [None if x is None else above_chance(x, top, chance) for x in (share.mean, share.low, share.high)]
            out.table.append(Row("above chance, of the ceiling", ends[0], ends[1], ends[2], size, "higher",
                                 f"people agree with one another {top:.3f}"))  # fmt: skip
        ranks = scores.ranks(z_similarity), scores.ranks(fit.similarity)
        found[PROCRUSTES] = jackknife(stored.r2, size, *ENDS[PROCRUSTES])
        nulls = {
            PROCRUSTES: scores.permutation_null(
                lambda order: scores.procrustes_r2(z, fit.x[order]), size, config.permutations
            ),
            RSA: scores.permutation_null(
                lambda order: scores.rsa(ranks[0], ranks[1][np.ix_(order, order)]), size, config.permutations
            ),
        }
        for label, null in nulls.items():
            note = f"permuted: mean {null.mean:.3f}, 95 % {null.high:.3f}; p {null.p:.3g}"
            out.table.append(Row.of(label, found[label], "higher", note))
        out.table.append(Row("ridge R2", scores.ridge_r2(z, fit.x), None, None, size, "higher", "concepts left out"))
        of = human.sum(1) > 0
        out.table.append(
            Row("ties", float((choices[of] < 0).mean()), None, None, size, "lower", "no choice: not counted")
        )
        if not np.isnan(chosen.mass).all():
            note = "what all the options had together as answers"
            out.table.append(Row("probability of the options", float(chosen.mass.mean()), None, None, size, "", note))
        if chosen.unparsed is not None:
            out.table.append(Row("unparsable", chosen.unparsed, None, None, size, "lower"))
        note = f"d = {fit.x.shape[1]}, {fit.kind}"
        out.table.append(Row("fit: held-out accuracy", fit.held_out_accuracy, None, None, size, "", note))
        agreed = agreement(human, choices)
        known = ~np.isnan(agreed)
        by_concept = [agreed[known & (triplets == number).any(1)] for number in range(size)]
        out.samples[AGREE] = [float(rows.mean()) if len(rows) else None for rows in by_concept]
        order = sorted(range(size), key=lambda number: -(out.samples[AGREE][number] or 0.0))
        out.figures.append(
            Dots("Agreement by concept", "share of its triplets",
                 [(out.units[number], out.samples[AGREE][number], None, None) for number in order], [("chance", chance)])
        )  # fmt: skip
        out.details["nulls"] = {label: asdict(null) for label, null in nulls.items()}
        out.details["ceiling"] = top

    def _doubts(
        self, names: list[str], triplets: Ints, chosen: Choices, choices: Ints, config: HumanTripletsConfig,
        reference: files.Reference, own: bool,
    ) -> list[str]:  # fmt: skip
        out = []
        if reference.embedding is not None and own:
            out.append("the reference is the built-in list and its tags, written by us: no person was asked")
        unclear = [name for name in names if name in files.HOMOGRAPHS]
        if unclear:
            out.append(f"names with unrelated meanings, of which the model may mean another: {', '.join(unclear)}")
        needed = 10 * len(names) * max(config.dimensions)
        if len(triplets) < needed:
            out.append(f"{len(triplets)} triplets are few for {max(config.dimensions)} dimensions of {len(names)} concepts "
                       f"({needed} as a rule): the embedding is loose")  # fmt: skip
        if config.mode == "answers" and not config.per_token and float(chosen.mass.mean()) < 0.1:
            out.append(f"the options together had a probability of {float(chosen.mass.mean()):.2g}: the model would rather "
                       "say something else, and is being made to choose")  # fmt: skip
        if chosen.unparsed is not None and chosen.unparsed > 0.1:
            out.append(f"{chosen.unparsed:.0%} of the answers named none of the options, or several (refusals are among "
                       "them)")  # fmt: skip
        if len(names) < 10:
            out.append(f"{len(names)} concepts are few: the intervals are rough")
        return out


def _check_slots(text: str, slots: list[str], what: str) -> None:
    try:
        found = sorted(name for _, name, _, _ in Formatter().parse(text) if name is not None)
    except ValueError as error:
        raise UsageError(f"{what} {text!r} cannot be filled in: {error}") from error
    if found != slots:
        raise UsageError(f"{what} must hold {' and '.join(f'{{{slot}}}' for slot in slots)}, each once, not {text!r}")
