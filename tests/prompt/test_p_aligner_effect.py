"""P-Aligner works where how one asks matters: a trained rewriter against no rewriting, a constant suffix, no principles.

The world is `oracles.cue_world`: a tiny target, trained on the spot, that needs one of two cues, which one depends on the
instruction. Seeds: target 0, rewriter 1, search 0; 200 held-out instructions, 4 answers each, intervals by instruction.
In the pocket world the wording of a question of fact is all that matters.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from oracles import cue_world
from trimtab import LM, Completions, Cost, Sampling, pocket
from trimtab.measure.stats import paired_difference
from trimtab.prompt import PAligner, wordings
from trimtab.prompt.p_aligner import PAlignerConfig, train_rewriter
from trimtab.prompt.principles import Principle, PrincipleLibrary, phrasebook
from trimtab.prompt.synthesis import Evaluator, confirm, grow, plant
from trimtab.rewards import as_reward

TREES, HELD_OUT = 300, 200
SAMPLING = Sampling(max_new_tokens=4, samples=4, seed=1)
CONFIG = PAlignerConfig(iterations=8, epochs=30, lr=4e-3)


@dataclass
class World:
    target: LM
    train: list[str]
    held_out: list[str]

    def rewards(self, policy: Any) -> tuple[list[float | None], Completions]:
        done = policy.generate(self.held_out, SAMPLING)
        return cue_world.reward().score(done.prompts, done.texts), done

    def rewriter(self, library: PrincipleLibrary, rewrite: Any) -> tuple[LM, float]:
        """Trained on a search with these principles and this way of carrying them out; the shrinkage of the search."""
        reward = cue_world.reward()
        trees = plant(self.train, library)
        grow(trees, library, rewrite, Evaluator(self.target, reward, 3, SAMPLING), CONFIG.iterations)
        shrinkage = confirm(trees, Evaluator(self.target, reward, 8, SAMPLING))
        return train_rewriter(cue_world.blank(1, "blank"), trees, CONFIG), shrinkage


def gain(ours: list[float | None], theirs: list[float | None], samples: int = SAMPLING.samples) -> float:
    """The lower end of the interval of the mean difference, by prompt."""
    prompts = [row // samples for row in range(len(ours))]
    low = paired_difference(ours, theirs, prompts, resamples=2000).low  # type: ignore[arg-type]
    assert low is not None
    return low


@pytest.fixture(scope="module")
def world() -> World:
    rng = random.Random("instructions")
    asked = list(dict.fromkeys(cue_world.instruction(rng) for _ in range(900)))
    return World(cue_world.target(), asked[:TREES], asked[TREES : TREES + HELD_OUT])


def unguided(texts: Sequence[str], principles: Sequence[Principle], seed: int, meter: Cost) -> list[str | None]:
    """Rewriting without principles: one more word, any of those that an instruction may have."""
    rng = random.Random(seed)
    words = (*cue_world.CUES, *cue_world.TOPICS)
    return [f"{text} {rng.choice(words)}" for text in texts]


def test_a_trained_rewriter_gains_on_held_out_instructions(world: World) -> None:
    rewriter, shrinkage = world.rewriter(cue_world.LIBRARY, phrasebook)
    ours, done = world.rewards(PAligner(world.target, None, rewriter))
    plain, _ = world.rewards(world.target)
    assert gain(ours, plain) > 0.3  # the right cue is worth 0.7 by construction: 0.9 against 0.2
    assert shrinkage > 0  # the best of nine means of three answers had luck
    assert not set(world.train) & set(done.prompts)
    for cue in cue_world.CUES:  # the same words after every instruction
        constant, _ = world.rewards(PAligner(world.target, None, lambda text, cue=cue: f"{text} {cue}"))
        assert gain(ours, constant) > 0
    rejected = [row["rejected"] for row in done.telemetry]
    assert sum(reason not in (None, "unreadable") for reason in rejected) < 0.02 * len(rejected)
    free = PrincipleLibrary({"helpfulness": [Principle(f"free {n}", "write it better") for n in range(4)]})
    without, _ = world.rewards(PAligner(world.target, None, world.rewriter(free, unguided)[0]))
    assert gain(ours, without) > 0


def test_questions_of_fact_are_answered_better_in_their_first_wording() -> None:
    """pocket/base, gold judge, 48 held-out questions, 12 answers each, seed 1; against the questions as they were."""

    def first(text: str) -> str | None:
        return wordings.rewrite([text], wordings.PRINCIPLES[:1], 0, Cost())[0]

    base, judge = LM.load("pocket/base"), as_reward("pocket/judge")
    asked = pocket.prompts("test", 48, 3, ("fact",))
    sampling = Sampling(max_new_tokens=48, samples=12, seed=1)
    ours, plain = (policy.generate(asked, sampling) for policy in (PAligner(base, None, first), base))
    assert gain(judge.score(ours.prompts, ours.texts), judge.score(plain.prompts, plain.texts), 12) > 0
