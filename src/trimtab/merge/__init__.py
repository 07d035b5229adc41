"""Merging: several checkpoints of one architecture into one, tensor by tensor, without training.

    trimtab.merge.ties(deltas, weights, density=0.3)         a method on tensors, for every slug below ("-" is "_")
    trimtab.merge.run(recipe, "out")                         on folders: see `trimtab.merge.engine`

One file a method in `trimtab.merge.methods`; this dict is the list of them.
"""

from __future__ import annotations

import importlib
from typing import Any

METHODS = {
    # straight lines and arcs
    "linear": ("methods.linear", "Linear"),
    "slerp": ("methods.slerp", "Slerp"),
    "nuslerp": ("methods.nuslerp", "NuSlerp"),
    "karcher": ("methods.karcher", "Karcher"),
    "model-stock": ("methods.model_stock", "ModelStock"),
    # differences to a base
    "task-arithmetic": ("methods.task_arithmetic", "TaskArithmetic"),
    "ties": ("methods.ties", "Ties"),
    "dare": ("methods.dare", "Dare"),
    "dare-ties": ("methods.dare_ties", "DareTies"),
    "della": ("methods.della", "Della"),
    "della-linear": ("methods.della_linear", "DellaLinear"),
    "breadcrumbs": ("methods.breadcrumbs", "Breadcrumbs"),
    "breadcrumbs-ties": ("methods.breadcrumbs_ties", "BreadcrumbsTies"),
    "sce": ("methods.sce", "Sce"),
    # their singular vectors
    "tsvm": ("methods.tsvm", "Tsvm"),
    "r-tsvm": ("methods.r_tsvm", "RTsvm"),
}

# for models that share no base; each a verb of `trimtab merge` with files of its own
TOOLS = {
    "align": ("align.align", "Align"),
    "pleas": ("pleas.pleas", "Pleas"),
}


def __getattr__(name: str) -> Any:
    if name == "run":
        return importlib.import_module("trimtab.merge.engine").run
    if name == "Recipe":
        return importlib.import_module("trimtab.merge.recipe").Recipe
    for slug, (module, cls) in METHODS.items():
        if name in (cls, slug.replace("-", "_")):
            method = getattr(importlib.import_module(f"trimtab.merge.{module}"), cls)
            return method if name == cls else method.function()
    for module, cls in TOOLS.values():
        if name == cls:
            return getattr(importlib.import_module(f"trimtab.merge.{module}"), cls)
    raise AttributeError(f"module 'trimtab.merge' has no attribute {name!r}")
