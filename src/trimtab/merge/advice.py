"""What the geometry of a few checkpoints says about how to merge them: sentences, each with its figure and its threshold.

Rules of thumb, not findings: they say which method's assumption holds, not which merge is best. `trimtab merge search`
measures that.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from trimtab.merge.geometry import Figures, Geometry

SAME_BASE = 0.5  # cosine of matrices: fine-tunes of one base have 0.9 and more, strangers 0
STRAIGHT = 0.9995  # where SLERP, as published, is a straight line
ORTHOGONAL = 0.1  # |cosine| of changes below which they add up with little loss
ALIKE = 0.8  # cosine of changes above which one is much like the other
CONFLICT = 0.2  # share of shared entries with both signs
CHANCE = 0.02  # above the share that unrelated changes have: more than chance
FAR = 0.3  # |change| / |base| beyond which a model is hardly a fine-tune
SPARSE = 0.1  # share of changed entries below which most of a change is zeros already


@dataclass(frozen=True)
class Advice:
    """One sentence. value: the figure; threshold: what it was held against; kind: which rule spoke."""

    kind: str
    text: str
    value: float
    threshold: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def advise(found: Geometry) -> list[Advice]:
    """The rules that have something to say, the most important first."""
    matrices = found.total(lambda one: one.layer is not None and one.matrix) or found.total()
    total = found.total()
    if total is None or matrices is None:
        return []
    if found.base is None:
        return _without_base(found, matrices)
    return [*_strange(found, matrices), *_changes(found, total), *_straight(found)]


def _without_base(found: Geometry, matrices: Figures) -> list[Advice]:
    out = _same(found)
    cosines = [c for a, b in combinations(range(matrices.models), 2) if (c := matrices.cosine(a, b)) is not None]
    if cosines and min(cosines) < SAME_BASE:
        text = (
            f"no common base: the layers' matrices have a cosine of {min(cosines):.3f} (below {SAME_BASE}): their units mean "
            "different things; trimtab merge align first, or trimtab merge pleas"
        )
        return [*out, Advice("strangers", text, min(cosines), SAME_BASE)]
    if cosines:
        text = (
            f"they share a base or more: the layers' matrices have a cosine of {min(cosines):.4f} (above {SAME_BASE}); give "
            "it as --base to see their changes"
        )
        out.append(Advice("relatives", text, min(cosines), SAME_BASE))
    return out + _straight(found)


def _same(found: Geometry) -> list[Advice]:
    """Models that are equal to the base or to each other."""
    out = []
    total = found.total()
    assert total is not None
    for t, name in enumerate(found.models):
        if found.base is not None and not int(total.changed[t]):
            out.append(Advice("unchanged", f"{name} is the same as the base: it adds nothing to a merge", 0.0, 0.0))
    for a, b in combinations(range(len(found.models)), 2):
        cosine = total.cosine(a, b)
        if cosine is not None and cosine > 1 - 1e-12 and abs(total.norm(a) - total.norm(b)) <= 1e-12 * total.norm(a):
            what = "alike in all that is finite" if found.not_finite else "the same model: its weight counts twice"
            text = f"{found.models[a]} and {found.models[b]} are {what}"
            out.append(Advice("same", text, cosine, 1.0))
    return out


def _strange(found: Geometry, matrices: Figures) -> list[Advice]:
    out = _same(found)
    for t, name in enumerate(found.models):
        relative = matrices.relative(t)
        cosine = matrices.weight_cosine(t, matrices.models)
        if cosine is not None and cosine < SAME_BASE:
            text = (
                f"{name} is no fine-tune of this base: the layers' matrices have a cosine of {cosine:.3f} with it (below "
                f"{SAME_BASE}); trimtab merge align first, or give the right --base"
            )
            out.append(Advice("strangers", text, cosine, SAME_BASE))
        elif relative is not None and relative > FAR:
            text = (
                f"{name} has moved far: its change is {relative:.0%} of the base's length (above {FAR:.0%}); merges this far "
                "out are less sure: take smaller weights, and evaluate the merge"
            )
            out.append(Advice("far", text, relative, FAR))
    return out


def _changes(found: Geometry, total: Figures) -> list[Advice]:
    out = []
    for t, name in enumerate(found.models):
        share = int(total.changed[t]) / total.entries
        if 0 < share < SPARSE:
            text = (
                f"{name} changes {share:.1%} of the entries (below {SPARSE:.0%}): a ties density above that drops only "
                "zeros, and random dropping (dare) costs more here than elsewhere"
            )
            out.append(Advice("sparse", text, share, SPARSE))
    cosines = {(a, b): c for a, b in combinations(range(total.models), 2) if (c := total.cosine(a, b)) is not None}
    if not cosines:
        return out
    largest = max(cosines.values(), key=abs)
    if abs(largest) < ORTHOGONAL:
        text = (
            f"changes are nearly orthogonal (largest cosine {largest:+.3f}, below {ORTHOGONAL} either way): task-arithmetic "
            "adds them with little loss to either"
        )
        out.append(Advice("orthogonal", text, largest, ORTHOGONAL))
    for (a, b), cosine in cosines.items():
        names = f"{found.models[a]} and {found.models[b]}"
        if ALIKE < cosine <= 1 - 1e-12:
            text = (
                f"{names} change alike (cosine {cosine:.3f}, above {ALIKE}): linear or model-stock; adding both in full "
                "counts the same change twice"
            )
            out.append(Advice("alike", text, cosine, ALIKE))
        elif cosine < -ORTHOGONAL:
            text = (
                f"{names} work against each other (cosine {cosine:.3f}, below {-ORTHOGONAL}): a sum undoes some of each"
            )
            out.append(Advice("opposed", text, cosine, -ORTHOGONAL))
    if total.conflict is not None and total.conflict > CONFLICT:
        chance = 1 - 2.0 ** (1 - total.models)
        lost = f"; a plain sum cancels {total.cancelled:.0%} of the change" if total.cancelled is not None else ""
        why = (
            "more than unrelated changes have: an election of signs (ties) may help"
            if total.conflict > chance + CHANCE
            else "no more than unrelated changes have, and by itself no reason for an election of signs (ties)"
        )
        text = (
            f"signs conflict in {total.conflict:.0%} of the entries that two or more change (above {CONFLICT:.0%}; unrelated "
            f"changes: {chance:.0%}){lost}: {why}"
        )
        out.append(Advice("conflict", text, total.conflict, CONFLICT))
    return out


def _straight(found: Geometry) -> list[Advice]:
    """Where SLERP of weights is a line: of the first two models, the only ones that it takes."""
    if len(found.models) < 2:
        return []
    cosines = [c for one in found.tensors if one.matrix and (c := one.figures.weight_cosine(0, 1)) is not None]
    line = sum(abs(c) > STRAIGHT for c in cosines)
    if not line or 2 * line < len(cosines):
        return []
    text = (
        f"slerp of the weights is a straight line in {line} of {len(cosines)} matrices (cosine of {found.models[0]} and "
        f"{found.models[1]} above {STRAIGHT}): it is linear there; turn the changes with --on deltas"
    )
    return [Advice("straight", text, line / len(cosines), STRAIGHT)]
