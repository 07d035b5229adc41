"""The report on a finished merge: how its parents lie, and what of each one's change is in it, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.merge.advice import advise
from trimtab.merge.geometry import measure, steps
from trimtab.merge.method import Method, Part, Place
from trimtab.merge.plan import Output, Plan, make_plan
from trimtab.merge.recipe import Recipe
from trimtab.merge.source import Folder
from trimtab.report.merged import report, write_merged
from trimtab.spec import changed

FOLDER = "report"  # in the merged model's folder


def write_report(
    recipe: Recipe, out: Path, threads: int | None, progress: Callable[[str], None], command: Sequence[str]
) -> Path:
    """Reads the parents and the merged model in `out` once more; writes OUT/report/; returns the page's path."""
    plan = make_plan(recipe)
    merged = [one for one in plan.outputs if one.method is not None]
    if any("" in one.names for one in merged):
        # Slices of different models: there is no tensor that all parents have a part in.
        found = measure(plan.models, plan.base, [], None, threads, progress)
        notes = ["slices take layers from different models: there are no figures over all of them"]
    else:
        names = [(one.name, one.names, one.base_name) for one in merged]
        found = measure(plan.models, plan.base, names, Folder(out), threads, progress)
        notes = []
    of = {one.name: one for one in merged}
    found.tensors = [
        replace(one, notes=method_notes(plan, of[one.name]), settings=settings(of[one.name])) for one in found.tensors
    ]
    sources = plan.parents
    parents = {source.name: source.fingerprint for source in sources}
    told = report(found, advise(found), (), [*plan.warnings, *notes], parents, command, recipe.to_dict())
    write_merged(told, out / FOLDER)
    return out / FOLDER / "report.html"


def settings(output: Output) -> dict[str, Any]:
    """What a tensor was merged with: the weights, and the options that differ from their defaults."""
    return {} if output.method is None else {"weights": list(output.weights), **changed(output.method.config)}


def method_notes(plan: Plan, output: Output) -> dict[str, Any]:
    """What the method says of a tensor (how many steps, which branch); {} for a method that says nothing."""
    method = output.method
    if method is None or type(method).notes is Method.notes or not output.entry.numel:
        return {}
    place = Place(output.name, output.entry.shape, output.weights, plan.recipe.seed, output.embedding)
    work = plan.work_dtype(output)
    deltas = plan.base is not None and method.on_deltas(True)
    row = place.numel // place.shape[0] if place.shape else 1

    def parts() -> Iterator[Part]:
        whole = method.whole(place) or not place.shape
        for start, stop in [(0, place.shape[0] if place.shape else 1)] if whole else steps(place.shape):
            tensors = [
                model.read(name, start, stop).to(work)
                for model, name in zip(plan.models, output.names, strict=True)
                if name
            ]
            if deltas:
                assert plan.base is not None
                base = plan.base.read(output.base_name, start, stop).to(work)
                tensors = [tensor - base for tensor in tensors]
            yield Part(place, start * row, tensors)

    return dict(method.notes(method.survey(parts)))
