"""The study over many measurements: the sandwich against its definition, a planted effect, false alarms, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import UsageError
from trimtab.measure.measurement import Measurement, Row
from trimtab.measure.triplet_study import read_properties, read_scores, study


def models(groups: int, size: int, seed: int, effect: float) -> tuple[dict[str, float], dict[str, dict[str, str]]]:
    """Families with a level and a tendency of their own; `width` has the effect, `depth` none."""
    rng = np.random.default_rng(seed)
    scores, properties = {}, {}
    for group in range(groups):
        level = rng.normal()
        base = rng.normal(size=2)
        for one in range(size):
            width, depth = base + rng.normal(size=2)
            name = f"f{group}-{one}"
            scores[name] = float(effect * width + level + 0.5 * rng.normal())
            properties[name] = {"family": f"f{group}", "width": str(width), "depth": str(depth)}
    return scores, properties


def test_errors_are_the_clustered_sandwich() -> None:
    scores, properties = models(5, 3, 0, 1.0)
    found = study(scores, properties)
    names = sorted(scores)
    x = np.column_stack([np.ones(15), *([float(properties[n][key]) for n in names] for key in ("width", "depth"))])
    x[:, 1:] = (x[:, 1:] - x[:, 1:].mean(0)) / x[:, 1:].std(0)
    y = np.array([scores[n] for n in names])
    b = np.linalg.lstsq(x, y, rcond=None)[0]
    meat = np.zeros((3, 3))
    for group in range(5):
        rows = [i for i, n in enumerate(names) if n.startswith(f"f{group}-")]
        g = x[rows].T @ (y[rows] - x[rows] @ b)
        meat += np.outer(g, g)
    bread = np.linalg.inv(x.T @ x)
    error = np.sqrt(np.diag(5 / 4 * 14 / 12 * bread @ meat @ bread))
    for row, effect in enumerate(found, start=1):
        assert effect.estimate == pytest.approx(b[row], abs=1e-12)
        assert effect.high - effect.low == pytest.approx(2 * 2.7764451 * error[row], rel=1e-6)  # t of 4 degrees


def test_a_planted_effect_is_found_and_its_absence_is_not() -> None:
    """12 families of 4. With an effect of 1 every one of 20 studies excludes 0; without one about 8 % do (5 % meant)."""
    for seed in range(20):
        width, _ = study(*models(12, 4, seed, 1.0))
        assert width.low > 0 and width.p < 0.05
    alarms = 0
    for seed in range(400):
        width, _ = study(*models(12, 4, 1000 + seed, 0.0))
        alarms += width.low > 0 or width.high < 0
    assert 0.03 < alarms / 400 < 0.12


def test_files(tmp_path: Path) -> None:
    rows = "model,family,post,size\n"
    for number in range(9):
        out = Measurement("human-triplets", f"m{number}", {"model": str(number), "texts": "t"}, "concept")
        out.table = [Row("Procrustes R2", 0.1 * number)]
        (tmp_path / f"{number}.json").write_text(json.dumps({"measurements": [out.to_dict()]}))
        rows += f"m{number},f{number % 4},{'base' if number % 3 else 'tuned'},{number + number % 2}\n"
    (tmp_path / "models.csv").write_text(rows)
    scores, properties = read_scores(tmp_path), read_properties(tmp_path / "models.csv")
    assert len(scores) == 9 and scores["m3"] == pytest.approx(0.3)
    assert [effect.name for effect in study(scores, properties)] == ["post=tuned", "size"]
    other = Measurement(
        "human-triplets", "m9", {"model": "9", "texts": "u"}, "concept", table=[Row("Procrustes R2", 0.1)]
    )
    (tmp_path / "9.json").write_text(json.dumps({"measurements": [other.to_dict()]}))
    with pytest.raises(UsageError, match="not taken alike"):
        read_scores(tmp_path)
    with pytest.raises(UsageError, match="no measurement other"):
        read_scores(tmp_path, name="other")
    with pytest.raises(UsageError, match="header"):
        read_properties(tmp_path / "0.json")


def test_bad_studies() -> None:
    scores, properties = models(3, 3, 0, 1.0)
    with pytest.raises(UsageError, match="no properties are given for m"):
        study({**scores, "m": 1.0}, properties)
    with pytest.raises(UsageError, match="too few"):
        study({name: scores[name] for name in list(scores)[:4]}, properties)
    with pytest.raises(UsageError, match="determine one another"):
        study(scores, {name: {**row, "again": row["width"]} for name, row in properties.items()})
    with pytest.raises(UsageError, match="does not vary"):
        study(scores, {name: {"family": row["family"], "width": "1"} for name, row in properties.items()})
    with pytest.raises(UsageError, match="has no depth"):
        study(scores, {name: {**row, "depth": ""} for name, row in properties.items()})
