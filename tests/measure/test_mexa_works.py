"""MEXA sees what it should: a tiny world in two languages, whose twin words mean the same and look different.

A sentence is subject, verb, object(subject), place(verb). Language B is A with every word replaced by its twin; for half
of the subjects B never says the object. A share r of the text is code-switched (each word in either language, never a
held-back object with its subject in B). Full size, run by hand: width 64, 300 steps, r in {0, .1, .3, 1}, 3 seeds: mean
score .001, .092, .243, .454; Pearson of the middle layer's mu with transfer accuracy .94 over the 12 models.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from taught import taught_text
from trimtab.lm import LM
from trimtab.measure.diagnostic import Subject
from trimtab.measure.measurement import Measurement
from trimtab.measure.mexa import Mexa, MexaConfig
from trimtab.measure.options import option_probabilities

SUBJECTS, OBJECTS = [f"s{i}" for i in range(16)], [f"o{i}" for i in range(16)]
VERBS, PLACES = [f"v{i}" for i in range(10)], [f"p{i}" for i in range(10)]
A = [*SUBJECTS, *VERBS, *OBJECTS, *PLACES]
SHARES = (0.0, 0.1, 0.3, 1.0)
SEED, WIDTH, STEPS = 0, 32, 200


def twin(word: str) -> str:
    return f"x{word}"


class World:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.object = dict(zip(SUBJECTS, self.rng.sample(OBJECTS, 16), strict=True))
        self.place = dict(zip(VERBS, self.rng.sample(PLACES, 10), strict=True))
        self.held = self.rng.sample(SUBJECTS, 8)  # B never says their objects

    def sentence(self, subject: str, verb: str) -> list[str]:
        return [subject, verb, self.object[subject], self.place[verb]]

    def text(self, switched: float, count: int = 3000) -> list[str]:
        out = []
        for _ in range(count):
            words = self.sentence(self.rng.choice(SUBJECTS), self.rng.choice(VERBS))
            row, held = words, words[0] in self.held
            if self.rng.random() < switched:
                row = [word if self.rng.random() < 0.5 else twin(word) for word in words]
                if held and row[0] != words[0]:
                    row[2] = words[2]
            elif self.rng.random() < 0.5:
                row = [twin(word) for word in words]
                if held:
                    del row[2]
            out.append(" ".join(row))
        return out

    def transfer(self, lm: LM) -> float:
        """Accuracy in B on the objects that B never said."""
        asked = [(subject, verb) for subject in self.held for verb in VERBS]
        prompts = [f"<s> {twin(subject)} {twin(verb)}" for subject, verb in asked]
        found = option_probabilities(lm, prompts, [[twin(word) for word in OBJECTS]] * len(asked))
        right = [OBJECTS[int(p.argmax())] == self.object[s] for p, (s, _) in zip(found, asked, strict=True)]
        return float(np.mean(right))


def train(text: list[str], start: LM | None = None) -> LM:
    return taught_text(text, STEPS, SEED, words=[*A, *map(twin, A)], layers=3, width=WIDTH, start=start)


def measure(lm: LM, folder: Path) -> Measurement:
    world = World(SEED)
    pairs = random.Random(99).sample([(s, v) for s in SUBJECTS for v in VERBS], 100)
    lines = [world.sentence(*pair) for pair in pairs]
    for name, words in (("a", lines), ("b", [list(map(twin, line)) for line in lines])):
        (folder / f"{name}.txt").write_text("\n".join(map(" ".join, words)) + "\n")
    texts = [folder / "a.txt", folder / "b.txt"]
    return Mexa(MexaConfig(draws=10)).measure(Subject(lm, lm.fingerprint, texts=texts))


@pytest.fixture(scope="module")
def models() -> dict[float, LM]:
    return {share: train(World(SEED).text(share)) for share in SHARES}


@pytest.fixture(scope="module")
def found(models: dict[float, LM], tmp_path_factory: Any) -> dict[float, Measurement]:
    folder = tmp_path_factory.mktemp("texts")
    return {share: measure(lm, folder) for share, lm in models.items()}


def test_alignment_rises_with_the_share_of_mixed_text_and_goes_with_transfer(
    models: dict[float, LM], found: dict[float, Measurement]
) -> None:
    middle = [found[share].details["languages"]["b"]["mu"][2] for share in SHARES]
    assert spearmanr(SHARES, middle).statistic == pytest.approx(1.0)
    assert middle[0] <= 0.05 and middle[-1] > 0.3  # chance is 0.005
    transfer = [World(SEED).transfer(models[share]) for share in SHARES]
    assert np.corrcoef(middle, transfer)[0, 1] > 0.8


def test_training_on_new_facts_in_one_language_costs_the_other(
    models: dict[float, LM], found: dict[float, Measurement], tmp_path: Path
) -> None:
    """New facts, in A alone. Full size, run by hand (width 64, 300 steps, seeds 0 to 2; before: .43, .54, .41):

    A alone                          .08  .16  .09   worse than before in all three
    a tenth of plain B mixed in      .04  .02  .02   holds nothing: it is the text of r = 0, which parts the languages
    a tenth of code-switched text    .26  .48  .33   better than A alone in all three, p < 1e-7
    """
    alone = [line for line in World(SEED + 50).text(0.0, 6000) if "x" not in line]
    change = Mexa().compare(measure(train(alone, models[1.0]), tmp_path), found[1.0]).change("b")
    assert change.verdict == "worse" and change.p_value is not None and change.p_value < 0.05
    assert change.difference is not None and change.difference < -0.1
