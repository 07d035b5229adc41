"""A known tree of invented concepts is found in a model taught about it, grows with training, and is lost when it should be.

The world: 32 names in 4 kinds of 8, each of two sorts of 4. Sentences give a name an attribute of its kind or of its sort.
The reference is the tree itself: two names are as alike as the tags they share. Baselines: the untrained model, a model
taught the same sentences with the names shuffled, and permuted concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taught import blank, taught_text
from trimtab.measure.diagnostic import Subject
from trimtab.measure.human_triplets import HumanTriplets, HumanTripletsConfig
from trimtab.measure.measurement import Measurement

NAMES = [f"n{number:02d}" for number in range(32)]
KINDS = [number // 8 for number in range(32)]
SORTS = [number // 4 for number in range(32)]
WORDS = [f"kind{k}{a}" for k in range(4) for a in "abc"] + [f"sort{s}{a}" for s in range(8) for a in "ab"]
SEEDS = (0,)  # 0 to 4 were run by hand, with the same outcomes


def sentences(kinds: Sequence[int], sorts: Sequence[int]) -> list[str]:
    rows = [f"{name} is kind{kind}{a}" for name, kind in zip(NAMES, kinds, strict=True) for a in "abc"]
    return rows + [f"{name} is sort{sort}{a}" for name, sort in zip(NAMES, sorts, strict=True) for a in "ab"]


def measured(lm: Any, folder: Path) -> Measurement:
    path = folder / "concepts.txt"
    rows = zip(NAMES, KINDS, SORTS, strict=True)
    path.write_text("\n".join(f"{name}: kind{kind} sort{sort}" for name, kind, sort in rows))
    config = HumanTripletsConfig(
        mode="states", carrier="{concept} is", dimensions=(6,), steps=150, restarts=2, permutations=150, bootstraps=150,
        triplets=2000,
    )  # fmt: skip
    return HumanTriplets(config).measure(Subject(lm, lm.fingerprint, texts=[path]))


def world(seed: int) -> dict[str, Any]:
    new = blank([*NAMES, "is", *WORDS], seed, layers=1, width=32)

    def on(start: Any, kinds: Sequence[int], sorts: Sequence[int], steps: int) -> Any:
        return taught_text(sentences(kinds, sorts), steps, seed, start=start, lr=1e-2)

    order = np.random.default_rng(seed).permutation(32)
    late = on(new, KINDS, SORTS, 300)
    merged_kinds = [0 if kind == 1 else kind for kind in KINDS]
    merged_sorts = [sort - 2 if kind == 1 else sort for kind, sort in zip(KINDS, SORTS, strict=True)]
    return {
        "new": new,
        "early": on(new, KINDS, SORTS, 40),
        "late": late,
        "shuffled": on(new, [KINDS[i] for i in order], [SORTS[i] for i in order], 300),
        "more": on(late, KINDS, SORTS, 150),
        "merged": on(late, merged_kinds, merged_sorts, 150),
    }


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Measurement]]:
    folder = tmp_path_factory.mktemp("worlds")
    return [{name: measured(lm, folder) for name, lm in world(seed).items()} for seed in SEEDS]


def test_the_tree_is_found_and_grows_with_training(worlds: list[dict[str, Measurement]]) -> None:
    for found in worlds:
        late = found["late"]
        r2 = late.row("Procrustes R2").value
        assert r2 is not None and late.details["nulls"]["Procrustes R2"]["p"] < 0.01
        assert late.row("agreement").low is not None and (late.row("agreement").low or 0) > 1 / 3
        early, new = (found[name].row("Procrustes R2").value or 0 for name in ("early", "new"))
        assert new < early < r2


def test_shuffled_attributes_destroy_it(worlds: list[dict[str, Measurement]]) -> None:
    for found in worlds:
        shuffled = found["shuffled"]
        assert shuffled.details["nulls"]["Procrustes R2"]["p"] > 0.01
        row = shuffled.row("agreement")
        assert row.low is not None and row.high is not None and row.low < 1 / 3 + 0.05
        change = HumanTriplets(HumanTripletsConfig(bootstraps=200)).compare(shuffled, found["late"]).change("agreement")
        assert change.verdict == "worse"


def test_merging_two_kinds_lowers_the_score(worlds: list[dict[str, Measurement]]) -> None:
    """Baseline: as many more steps on the true sentences. Paired over the same resamples of concepts."""
    for found in worlds:
        comparison = HumanTriplets(HumanTripletsConfig(bootstraps=200)).compare(found["merged"], found["more"])
        change = comparison.change("Procrustes R2")
        assert change.high is not None and change.high < 0 and change.verdict == "worse"


def test_layers_are_reported(worlds: list[dict[str, Measurement]]) -> None:
    (curve,) = [figure for figure in worlds[0]["late"].figures if figure.kind == "lines"]
    assert len(curve.lines[0].points) == 2  # the embeddings and the block
