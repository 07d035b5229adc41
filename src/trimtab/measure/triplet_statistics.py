"""The statistics of one model's choices over resamples of concepts, and their curve over its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.measure import embedding_scores as scores
from trimtab.measure.measurement import Line, Lines, Measurement
from trimtab.measure.triplets import OPTIONS, Array, Fit, Form, Ints, agreement, choose, cosine, scores_of

AGREE, PROCRUSTES, RSA = "agreement", "Procrustes R2", "RSA"
ENDS = {AGREE: (0.0, 1.0), PROCRUSTES: (0.0, 1.0), RSA: (-1.0, 1.0)}  # what each lies between
CURVE = 200  # resamples at each layer


@dataclass
class TripletStatistics:
    """What the statistics of one model are computed from.

    triplets [R, 3], human [R, K], choices [R]; the model's embedding x [N, d] and similarity [N, N], and the reference's.
    """

    triplets: Ints
    human: Array
    choices: Ints
    x: Array
    similarity: Array
    z: Array
    z_similarity: Array

    @classmethod
    def stored(cls, found: Measurement) -> TripletStatistics:
        """From the details of a measurement."""
        data = found.details
        fit = Fit(np.array(data["embedding"]), data["fit"]["kind"], 0.0, 0.0)
        return cls(
            np.array(data["triplets"]), np.array(data["human"]), choose(np.array(data["p"])), fit.x, fit.similarity,
            np.array(data["reference"]), np.array(data["reference similarity"]),
        )  # fmt: skip

    def r2(self, rows: npt.NDArray[np.intp]) -> float:
        """Procrustes R2 of these concepts alone."""
        return scores.procrustes_r2(self.z[rows], self.x[rows])

    def over(self, drawn: Ints) -> dict[str, Array]:
        """[B] agreement and RSA of each resample of concepts, [B, N]."""
        agreed = agreement(self.human, self.choices)
        out = {AGREE: scores.weighted_agreement(agreed, self.triplets, drawn, self.human.sum(1))}
        ranks = scores.ranks(self.z_similarity), scores.ranks(self.similarity)
        times = [np.bincount(rows, minlength=len(ranks[0])).astype(np.float64) for rows in drawn]
        return out | {RSA: np.array([scores.rsa(*ranks, one) for one in times])}


def likeness(vectors: Array, how: str) -> Array:
    """[N, D] -> [N, N]. how: "cosine" or "dot"."""
    return cosine(vectors) if how == "cosine" else np.asarray(vectors @ vectors.T)


def layer_curve(
    layers: Sequence[Array], triplets: Ints, human: Array, z_similarity: Array, form: Form, how: str
) -> Lines:
    """Agreement and RSA of every layer's own similarity."""
    size = len(z_similarity)
    drawn = scores.resamples(size, CURVE, 0)
    points: dict[str, list[Any]] = {AGREE: [], RSA: []}
    for number, vectors in enumerate(layers):
        similar = likeness(vectors, how)
        choices = choose(scores_of(similar, triplets, form))
        one = TripletStatistics(triplets, human, choices, vectors, similar, vectors, z_similarity)
        seen, resampled = one.over(np.arange(size)[None]), one.over(drawn)
        for label, rows in points.items():
            found = scores.interval(float(seen[label][0]), resampled[label], size, ENDS[label])
            rows.append((float(number), found.mean, found.low, found.high))
    lines = [Line(label, rows) for label, rows in points.items()]
    chance = 1 / OPTIONS[form]
    return Lines("Agreement and RSA by layer", "layer", "share, correlation", lines, [("chance of agreement", chance)])
