"""What an alignment found, as a `Measurement`: its table, its pictures and every tensor's figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from trimtab.environment import environment
from trimtab.measure.measurement import Figure, Line, Lines, Measurement, Row
from trimtab.measure.stats import mean_interval, paired_difference
from trimtab.merge.align.analysis import Directions, Reduction, alignment, l2_reduction, matrices, weighted_alignment
from trimtab.merge.align.path import Path
from trimtab.merge.align.permutation import Spec, is_identity
from trimtab.policy import Cost

SHARED = "identity: every unit is in its place already, so they share a base and can be merged without alignment"
MOST_DIRECTIONS = 1 << 23  # entries of the largest matrix whose singular vectors are compared


@dataclass
class Found:
    """Everything that was computed. paths, middle (excess loss at the midpoint, a text each), taylor: "before", "after"."""

    spec: Spec
    permutations: dict[str, Tensor]
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    permuted: dict[str, Tensor]
    paths: dict[str, Path] = field(default_factory=dict)
    middle: dict[str, list[float]] = field(default_factory=dict)
    taylor: dict[str, list[float] | None] = field(default_factory=dict)
    texts: int = 0
    forwarded: int = 0
    warnings: list[str] = field(default_factory=list)


def measured(found: Found, asked: Any, config: Any, inputs: Mapping[str, str]) -> dict[str, Any]:
    """align.json: the form of `measure.json`, so that the same page and table show it."""
    details, rows, figures = _weights(found, config.gamma)
    notes = []
    if is_identity(found.permutations):
        notes.append(SHARED if details["l2"]["total"]["before"] else "identity: the two models are equal")
    elif not config.residual and not asked.spec:
        notes.append(
            "the residual stream was left in place: for models trained from different seeds try --residual true"
        )
    if found.paths:
        more, pictures = _paths(found, details)
        rows, figures = more + rows, pictures + figures
    else:
        notes.append("without --texts there is no loss on the path: whether the two can be averaged is not known")
    moved = sum(int((one != torch.arange(len(one))).sum()) for one in found.permutations.values())
    total = sum(len(one) for one in found.permutations.values())
    rows.append(Row("units that moved", moved / max(total, 1), n=total, note="share"))
    made = Measurement(
        "align",
        f"{_short(asked.b)} onto {_short(asked.a)}",
        {"model": dict(inputs), "texts": inputs.get("texts", "none"), **asdict(config)},
        "text" if found.texts else "tensor",
        table=rows,
        figures=figures,
        notes=notes,
        warnings=found.warnings,
        details={**details, "identity": is_identity(found.permutations)},
        cost=Cost({"path": found.forwarded} if found.forwarded else {}),
    )
    return {
        "schema": 1,
        "name": "align",
        "measurements": [made.to_dict()],
        "comparisons": [],
        "environment": environment(),
    }


def _paths(found: Found, details: dict[str, Any]) -> tuple[list[Row], list[Figure]]:
    before, after = found.paths["before"], found.paths["after"]
    rows = [
        Row.of(f"excess loss of the mean, {key} matching", mean_interval(found.middle[key]), "lower", "nats a token")
        for key in ("before", "after")
    ]
    barriers = {key: path.barrier() for key, path in found.paths.items()}
    change = paired_difference(found.middle["after"], found.middle["before"])
    rows.append(Row.of("excess loss of the mean, after minus before", change, "lower", "nats a token"))
    if change.low is not None and change.low > 0:
        found.warnings.append(
            "matching made the path worse: the mean of A and the permuted B is worse than that of A and B; --method ste "
            "follows the loss itself, --method am what the units do"
        )
    lowered = 1 - barriers["after"] / barriers["before"] if barriers["before"] > 0 else None
    rows.append(Row("barrier lowered by", lowered, n=found.texts, better="higher", note="share"))
    rows += [
        Row(f"loss barrier, {key} matching", barriers[key], n=found.texts, better="lower", note="nats a token")
        for key in ("before", "after")
    ]
    rows += [
        Row(f"error barrier, {key} matching", found.paths[key].barrier("error"), n=found.texts, better="lower")
        for key in ("before", "after")
    ]
    rows += [
        Row("loss of A", before.values["loss"][0], n=found.texts, note="nats a token"),
        Row("loss of B", before.values["loss"][-1], n=found.texts, note="nats a token"),
    ]
    lines = [
        Line(label, [(at, value) for at, value in zip(path.lambdas, path.values["loss"], strict=True)])
        for label, path in (("B as it was", before), ("B permuted", after))
    ]
    figures: list[Figure] = [
        Lines("Loss on the straight path", "share of B", "nats a token", lines, note="0 is A, 1 is B."),
    ]
    predicted = [(key, excess) for key, excess in found.taylor.items() if excess is not None]
    for key, excess in predicted:
        rows.append(Row(f"barrier that curvature predicts, {key} matching", max(excess), note="nats a token, Taylor"))
    details["paths"] = {
        key: {
            "lambdas": path.lambdas,
            **path.values,
            "excess": path.excess(),
            "taylor_excess": found.taylor.get(key),
            "excess_of_the_mean_by_text": found.middle[key],
        }
        for key, path in found.paths.items()
    }
    return rows, figures


def _weights(found: Found, gamma: float) -> tuple[dict[str, Any], list[Row], list[Figure]]:
    l2 = l2_reduction(found.a, found.b, found.permuted)
    total = l2["total"]
    rows = [
        Row(
            "L2 reduction", total.value, n=len(l2) - 1, better="higher", note=f"{total.before:.4g} to {total.after:.4g}"
        )
    ]
    names = matrices(found.a, MOST_DIRECTIONS)
    left_out = len(matrices(found.a)) + _larger(found.a) - len(names)
    if left_out:
        found.warnings.append(f"{left_out} large matrices (embeddings, say) are left out of the singular directions")
    ours = {name: Directions.of(found.a[name]) for name in names}
    theirs = {name: Directions.of(found.b[name]) for name in names}
    after = {name: theirs[name].permuted(name, found.spec, found.permutations) for name in names}
    details: dict[str, Any] = {"l2": {name: {**asdict(one), "reduction": one.value} for name, one in l2.items()}}
    shown: dict[str, dict[str, float]] = {}
    for share in dict.fromkeys((gamma, 0.0)):
        sides = {"before": alignment(ours, theirs, share), "after": alignment(ours, after, share)}
        details[f"R_{share:g}"] = sides
        for key, side in sides.items():
            rows.append(Row(f"R_{share:g}, {key} matching", side["total"], n=len(names), better="higher"))
        if share == gamma:
            shown = sides
    weighted = {"before": weighted_alignment(ours, theirs), "after": weighted_alignment(ours, after)}
    details["weighted_R"] = weighted
    rows += [
        Row(f"weighted R, {key} matching", one["total"], n=len(names), better="higher") for key, one in weighted.items()
    ]
    figures: list[Figure] = []
    layers = _by_layer(l2)
    if len(layers) > 1:
        line = Line("after matching", [(layer, one.value) for layer, one in layers.items()])
        figures.append(Lines("L2 reduction by layer", "layer", "share of the distance", [line], (("none", 0.0),)))
    curves = [Line(f"{key} matching", _mean_by_layer(side)) for key, side in shown.items()]
    if all(len(line.points) > 1 for line in curves):
        note = f"Singular directions of at least {gamma:g} of the largest singular value; 1 is aligned, 0 unrelated."
        figures.append(Lines(f"R_{gamma:g} by layer", "layer", "R", curves, note=note))
    return details, rows, figures


def _short(name: str) -> str:
    """A folder's own name; pocket/NAME as it is."""
    return name if name.startswith("pocket/") else PurePath(name).name or name


def _larger(tensors: Mapping[str, Tensor]) -> int:
    return sum(one.is_floating_point() and one.ndim >= 2 for one in tensors.values()) - len(matrices(tensors))


def _layer(name: str) -> int | None:
    found = re.search(r"\b(?:layers|h)\.(\d+)\.", name)
    return int(found[1]) if found else None


def _by_layer(l2: Mapping[str, Reduction]) -> dict[int, Reduction]:
    """One reduction a layer, of all its tensors together."""
    sums: dict[int, list[float]] = {}
    for name, one in l2.items():
        layer = _layer(name)
        if layer is not None:
            pair = sums.setdefault(layer, [0.0, 0.0])
            pair[0] += one.before**2
            pair[1] += one.after**2
    return {layer: Reduction(before**0.5, after**0.5) for layer, (before, after) in sorted(sums.items())}


def _mean_by_layer(values: Mapping[str, float]) -> list[tuple[float, float]]:
    found: dict[int, list[float]] = {}
    for name, value in values.items():
        layer = _layer(name)
        if layer is not None:
            found.setdefault(layer, []).append(value)
    return [(float(layer), sum(each) / len(each)) for layer, each in sorted(found.items())]
