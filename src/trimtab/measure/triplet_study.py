"""Which properties of models go with a score: a regression over many measurements, with families of models as clusters.

    score = b0 + sum_k b_k x_k;   Var(b) = c (X'X)^-1 (sum_g X_g' u_g u_g' X_g) (X'X)^-1,   c = G/(G-1) (N-1)/(N-K)

Numbers are standardised (b is the change of the score for one standard deviation), words become one column for each value
but the first. Models of a family share data and recipes, so errors are clustered by family, with t quantiles of G - 1
degrees of freedom. With few families such intervals are still too narrow (simulated in the tests: 12 families of 4 exclude a
true 0 in about 8 % where 5 % is meant), so no verdict is given.

What it means: across these models the score goes with the property. What it does not mean: that changing the property changes
the score; and with as many properties as a survey has, some will look good by chance (p is adjusted by Holm's rule).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab.errors import UsageError
from trimtab.measure.measurement import Measurement
from trimtab.measure.stats import holm

FAMILY = "family"


@dataclass(frozen=True)
class Effect:
    """One column of the regression. p: Holm-adjusted. correlation: Spearman of the column and the score by itself."""

    name: str
    estimate: float
    low: float
    high: float
    p: float
    correlation: float


def read_scores(folder: Path, row: str = "Procrustes R2", name: str = "human-triplets") -> dict[str, float]:
    """The row of every measurement of this name in the JSON files of a folder (as `trimtab measure --json` writes them)."""
    out: dict[str, float] = {}
    settings: set[str] = set()
    for path in sorted(folder.rglob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {path}: {error}") from error
        for found in data.get("measurements", []) if isinstance(data, dict) else []:
            if found.get("name") != name:
                continue
            one = Measurement.from_dict(found)
            value = one.row(row).value
            if value is not None:
                out[one.subject] = value
                settings.add(
                    json.dumps({key: one.measured[key] for key in one.measured if key != "model"}, sort_keys=True)
                )
    if not out:
        raise UsageError(f"{folder} has no measurement {name} with a row {row!r}")
    if len(settings) > 1:
        raise UsageError(f"the measurements in {folder} were not taken alike: other texts, options or templates")
    return out


def read_properties(path: Path) -> dict[str, dict[str, str]]:
    """A CSV file with a header: `model`, `family`, and a column for each property."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if not rows or not {"model", FAMILY} <= rows[0].keys():
        raise UsageError(f"{path} needs a header with model, family and the properties")
    return {row["model"]: {key: value for key, value in row.items() if key != "model"} for row in rows}


def study(scores: Mapping[str, float], properties: Mapping[str, Mapping[str, str]]) -> list[Effect]:
    """The effects of all properties but the family. UsageError where models or families are too few."""
    from scipy.stats import spearmanr, t

    if missing := sorted(set(scores) - set(properties)):
        raise UsageError(f"no properties are given for {', '.join(missing[:5])}")
    models = sorted(scores)
    y = np.array([scores[model] for model in models])
    families = [properties[model][FAMILY] for model in models]
    names, columns = _columns(models, properties)
    size, width, groups = len(models), len(names) + 1, len(set(families))
    if size <= width + 1 or groups < 3:
        raise UsageError(f"{size} models of {groups} families are too few for {len(names)} properties")
    x = np.column_stack([np.ones(size), *columns])
    if np.linalg.matrix_rank(x) < width:
        raise UsageError(f"the properties {', '.join(names)} determine one another: leave one out")
    bread = np.linalg.inv(x.T @ x)
    estimate = bread @ x.T @ y
    scored = x * (y - x @ estimate)[:, None]  # [N, K]
    sums = np.array([scored[[family == one for family in families]].sum(0) for one in sorted(set(families))])  # [G, K]
    factor = groups / (groups - 1) * (size - 1) / (size - width)
    errors = np.sqrt(np.diag(factor * bread @ sums.T @ sums @ bread))
    half = float(t.ppf(0.975, groups - 1))
    raw = [
        float(2 * t.sf(abs(b) / e, groups - 1)) if e > 0 else 1.0 for b, e in zip(estimate[1:], errors[1:], strict=True)
    ]
    return [
        Effect(
            name, float(b), float(b - half * e), float(b + half * e), p if p is not None else math.nan,
            float(spearmanr(column, y).statistic),
        )
        for name, b, e, p, column in zip(names, estimate[1:], errors[1:], holm(raw), columns, strict=True)
    ]  # fmt: skip


def _columns(models: Sequence[str], properties: Mapping[str, Mapping[str, str]]) -> tuple[list[str], list[np.ndarray]]:
    names: list[str] = []
    columns: list[np.ndarray] = []
    for key in [key for key in properties[models[0]] if key != FAMILY]:
        texts = [properties[model].get(key, "") for model in models]
        if "" in texts:
            raise UsageError(f"{models[texts.index('')]} has no {key}")
        try:
            values = np.array([float(text) for text in texts])
        except ValueError:
            for one in sorted(set(texts))[1:]:
                names.append(f"{key}={one}")
                columns.append(np.array([float(text == one) for text in texts]))
            continue
        if not np.isfinite(values).all() or np.ptp(values) == 0:
            raise UsageError(f"the property {key} does not vary, or is not finite")
        names.append(key)
        columns.append((values - values.mean()) / values.std())
    if not names:
        raise UsageError("there is no property besides the family")
    return names, columns
