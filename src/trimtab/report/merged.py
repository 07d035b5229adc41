"""The page of `trimtab merge inspect --out` and of `trimtab merge ... --report`: how the parents' changes lie, and where."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

from markupsafe import Markup

from trimtab.files import write_atomic, write_json
from trimtab.measure.measurement import Figure, Heat, Line, Lines
from trimtab.merge.geometry import Figures, Geometry
from trimtab.report.drawings import MOST_ROWS, drawn
from trimtab.report.page import STYLES, clean, environment, resource

JSON, PAGE = "merge-report.json", "report.html"


def write_merged(found: Mapping[str, Any], out: Path) -> None:
    """Writes merge-report.json and report.html into `out`, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / JSON, found)
    write_atomic(out / PAGE, render(found))


def render(found: Mapping[str, Any]) -> str:
    """The page as HTML. The same input gives the same bytes."""
    found = clean(dict(found))
    return environment().get_template("merged.html.j2").render(
        found=found,
        names=brief(found["models"]),
        command=shlex.join(found["command"]) if found["command"] else "",
        css=Markup("".join(resource(name) for name in STYLES)),
        drawn=drawn,
        Markup=Markup,
    )  # fmt: skip


def brief(models: Sequence[str]) -> list[str]:
    """The last parts of the models' paths, for heads of columns; the models as they are where those are not unique."""
    names = [PurePath(model).name for model in models]
    return names if len({*names}) == len(names) else [*models]


def figures(found: Geometry) -> list[Figure]:
    """The pictures: heat maps of layers by modules, and lines over depth."""
    cells = found.cells()
    layers, modules = list(found.layers()), list(found.modules())
    what = "changes" if found.base is not None else "weights"
    names = brief(found.models)
    out: list[Figure] = []

    def heat(title: str, value: Callable[[Figures], float | None], note: str, low: float = 0.0) -> None:
        rows = _binned(layers)
        values = [[_of(cells, group, module, value) for module in modules] for _, group in rows]
        if any(one is not None for row in values for one in row):
            out.append(Heat(title, [name for name, _ in rows], modules, values, low=low, note=note))

    if len(found.models) > 1:
        heat(
            "Sign conflict",
            lambda one: one.conflict,
            "Of the entries that two or more models change, the share in which they disagree in sign. Unrelated changes: "
            f"{1 - 2.0 ** (1 - len(found.models)):.2f}.",
        )
        heat(
            f"Cosine of {what}",
            Figures.mean_cosine,
            "Mean over pairs of models. 1: they point the same way; 0: at right angles; below 0 is drawn as 0.",
        )
    if found.base is not None:
        inner = {int(name): one for name, one in found.layers().items() if name.isdigit()}
        lines = [Line(name, [(layer, one.relative(t)) for layer, one in inner.items()]) for t, name in enumerate(names)]
        out.append(
            Lines(
                "How far each model moved",
                "layer",
                "|change| / |base|",
                lines,
            )
        )
    if found.tensors and found.tensors[0].figures.merged:
        for t, name in enumerate(names):
            heat(
                f"What the merge kept of {name}",
                lambda one, t=t: one.kept_of(t),  # type: ignore[misc]
                "The merged change measured along this model's own: 1 is all of it, 0 nothing.",
            )
    return out


def _binned(layers: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Rows of a heat map: a layer each, or runs of layers where there are more than can be told apart."""
    inner = [layer for layer in layers if layer.isdigit()]
    size = -(-len(inner) // (MOST_ROWS - 2)) if inner else 1
    runs = [inner[at : at + size] for at in range(0, len(inner), size)]
    named = [(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}", run) for run in runs]
    return [
        *([("before", ["before"])] if "before" in layers else []),
        *named,
        *([("after", ["after"])] if "after" in layers else []),
    ]


def _of(
    cells: Mapping[tuple[str, str], Figures],
    layers: Sequence[str],
    module: str,
    value: Callable[[Figures], float | None],
) -> float | None:
    there = [cells[layer, module] for layer in layers if (layer, module) in cells]
    return value(sum(there[1:], there[0])) if there else None


def said_by_method(found: Geometry) -> list[str]:
    """What a merging method noted of its tensors: how many took which branch, and the range of each figure."""
    keys = dict.fromkeys(key for one in found.tensors for key in one.notes)
    out = []
    for key in keys:
        values = [one.notes[key] for one in found.tensors if key in one.notes]
        words = Counter(value for value in values if isinstance(value, str))
        numbers = [float(value) for value in values if not isinstance(value, str)]
        if words:
            out.append(f"{key}: " + ", ".join(f"{word} in {count} tensors" for word, count in words.most_common()))
        if numbers:
            out.append(f"{key}: {min(numbers):.4g} to {max(numbers):.4g} (mean {sum(numbers) / len(numbers):.4g})")
    return out


def report(
    found: Geometry,
    advice: Sequence[Any],
    problems: Sequence[str],
    warnings: Sequence[str],
    parents: Mapping[str, str],
    command: Sequence[str],
    recipe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the JSON, the page and the terminal show. parents: name -> fingerprint."""
    from trimtab import __version__

    total = found.total()
    return {
        "schema": 1,
        "trimtab": __version__,
        "models": found.models,
        "base": found.base,
        "parents": dict(parents),
        "recipe": None if recipe is None else dict(recipe),
        "mergeable": not problems,
        "problems": list(problems),
        "warnings": list(warnings),
        "not_finite": found.not_finite,
        "advice": [one.to_dict() for one in advice],
        "method": said_by_method(found),
        "total": None if total is None else total.to_dict(),
        "modules": {name: one.to_dict() for name, one in found.modules().items()},
        "layers": {name: one.to_dict() for name, one in found.layers().items()},
        "tensors": [
            {
                "name": one.name, "module": one.module, "layer": one.layer, **one.figures.to_dict(),
                **({"method": one.notes} if one.notes else {}),
                **({"settings": one.settings} if one.settings else {}),
            }
            for one in sorted(found.tensors, key=lambda one: one.name)
        ],
        "figures": [asdict(figure) for figure in figures(found)],
        "command": list(command),
    }  # fmt: skip
