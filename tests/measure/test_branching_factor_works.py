"""Tuning a tiny model on one of eight templates narrows it, and its first words narrow the untuned one too.

Baseline: the model before tuning (the measure must find no change where it is compared with itself under another seed).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from taught import sft, taught
from trimtab.lm import LM
from trimtab.measure.branching_factor import BranchingFactor, BranchingFactorConfig
from trimtab.measure.diagnostic import Subject
from trimtab.prompt.tuning import save
from trimtab.sampling import Sampling

TOPICS = [f"{name}{number}" for name in ("cat", "sea", "tree", "book") for number in range(3)]
SLOTS = {"how": ["so", "very", "quite", "rather", "truly", "most"], "what": ["red", "old", "big", "sad", "new", "odd"]}
OPEN = [
    "well the {t} is {how} {what} and {how} {what} here",
    "some say {how} {what} is the {t} with {what} sides",
    "maybe {what} or {what} or {what} or {how} {what}",
    "look at {t} it was {how} {what} then {what} now",
    "once {t} had {what} and {what} and {how} {what} things",
    "they find {t} {how} {what} yet {how} {what} too",
    "there are {what} and {what} ones of {how} {what} kind",
]
SURE = "sure here is what {t} means to all of us"


def said(template: str, topic: str, rng: random.Random) -> str:
    words = (rng.choice(SLOTS[word[1:-1]]) if word in ("{how}", "{what}") else word for word in template.split())
    return " ".join(words).format(t=topic)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The model of all eight templates, and the same tuned on the last of them; both on disk."""
    rng = random.Random(0)
    rows = [(f"ask {t}", said(template, t, rng)) for t in TOPICS for template in [*OPEN, SURE] for _ in range(12)]
    base = taught(rows, epochs=5, name="base", width=48)
    tuned = sft(
        base, [(f"ask {t}", said(SURE, t, rng)) for t in TOPICS for _ in range(4)], 5, 1e-3, 16, 0, name="tuned"
    )
    folder = tmp_path_factory.mktemp("models")
    out: dict[str, Any] = {}
    for lm in (base, tuned):
        save(lm, folder / lm.name)
        out[lm.name] = LM.load(folder / lm.name)
    return out | {"folder": folder}


def measure(lm: LM, seed: int = 0, **options: Any) -> Any:
    prompts = [f"ask {topic}" for topic in TOPICS]
    subject = Subject(lm, lm.fingerprint, prompts=list(prompts), sampling=Sampling(max_new_tokens=16, seed=seed))
    return BranchingFactor(BranchingFactorConfig(samples=12, top_p=0.9, **options)).measure(subject)


def test_tuning_on_one_template_narrows(models: dict[str, Any]) -> None:
    change = BranchingFactor().compare(measure(models["tuned"]), measure(models["base"])).changes[0]
    assert change.verdict == "changed" and change.high is not None and change.high < 0.9, change


def test_the_same_model_has_not_changed(models: dict[str, Any]) -> None:
    first, second = measure(models["base"], seed=1), measure(models["base"], seed=2)
    second.measured = first.measured  # the seed is part of it
    change = BranchingFactor().compare(first, second).changes[0]
    assert change.verdict == "undecided" and change.low is not None and change.low < 1 < (change.high or 0), change


def test_the_tuned_models_first_words_narrow_the_base_and_random_words_do_not(
    models: dict[str, Any], tmp_path: Path
) -> None:
    found = measure(models["tuned"], nudge=str(models["folder"] / "base"), prefix_tokens=2)
    modal, chance = found.row("moved by tuned's first tokens"), found.row("moved by random first tokens")
    assert modal.value is not None and modal.low is not None and modal.low > 0.5, modal
    assert chance.value is not None and chance.high is not None and chance.high < 0.5, chance
    assert found.details["nudging"]["prefixes"][0]["text"].startswith("sure")
    base = found.row("base after its own first tokens").value
    assert base > 1.3 * found.row("base after tuned's first tokens").value
