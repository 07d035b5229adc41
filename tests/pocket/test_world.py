"""The world is a function of its seed, its splits are apart, and a prompt says what it asks."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from trimtab import pocket
from trimtab.errors import UsageError
from trimtab.pocket import world
from trimtab.pocket.facts import RELATIONS, value_of
from trimtab.pocket.families import FAMILIES
from trimtab.pocket.task import SPLITS, split_of, undress


def test_the_same_seed_draws_the_same_tasks_and_answers() -> None:
    assert pocket.tasks("fit", 64, seed=3) == pocket.tasks("fit", 64, seed=3)
    assert pocket.tasks("fit", 64, seed=3) != pocket.tasks("fit", 64, seed=4)
    first, again = world.dialogues(0), world.dialogues(0)
    assert [next(first) for _ in range(50)] == [next(again) for _ in range(50)]


def test_the_world_is_pinned() -> None:
    """The models were trained on this world: a change here asks for `make pocket`."""
    assert pocket.prompts("test", 3, seed=0) == PINNED


def test_a_longer_draw_starts_with_the_shorter_one() -> None:
    assert pocket.prompts("test", 100, seed=0)[:48] == pocket.prompts("test", 48, seed=0)


def test_splits_share_no_question_whatever_its_lead_in_and_tail() -> None:
    cores = {split: {t.core for seed in range(3) for t in pocket.tasks(split, 800, seed)} for split in SPLITS}
    assert not cores["fit"] & cores["test"]
    assert not cores["train"] & cores["fit"]
    assert not cores["train"] & cores["test"]


@pytest.mark.parametrize("family", ["sum", "translate"])
def test_what_is_worked_out_is_held_out_too(family: str) -> None:
    truths = {split: {t.truth for t in pocket.tasks(split, 400, 0, (family,))} for split in SPLITS}
    assert not truths["fit"] & truths["test"]
    assert not truths["train"] & (truths["fit"] | truths["test"])


def test_prompts_are_different_and_families_balanced() -> None:
    drawn = pocket.tasks("test", 160, seed=0)
    assert len({t.prompt for t in drawn}) == 160
    assert all(sum(t.family == name for t in drawn) == 20 for name in FAMILIES)


@pytest.mark.parametrize("split", ["fit", "test"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_split_holds_hundreds_of_questions_of_every_family(split: str, family: str) -> None:
    assert len(pocket.tasks(split, 300, 0, (family,))) == 300


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_prompt_says_which_task_it_is(family: str) -> None:
    rng = random.Random(0)
    for _ in range(200):
        task = world.draw(family, rng)
        for text in (task.prompt, task.question, task.core):
            read = pocket.task_of(text)
            assert read is not None and (read.family, read.truth, read.form) == (family, task.truth, task.form)
        assert undress(task.prompt) == task.core
        assert split_of(family, task.core, task.form, task.truth) in SPLITS


def test_every_fact_is_one_of_its_values_and_values_are_spread() -> None:
    for relation, (values, subjects, _, _) in RELATIONS.items():
        true = [value_of(relation, s) for s in subjects]
        assert set(true) <= set(values) and len(set(true)) >= 6


def test_bad_requests_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'test'"):
        pocket.tasks("tests", 4, seed=0)
    with pytest.raises(UsageError, match="did you mean 'review'"):
        pocket.tasks("test", 4, 0, ("reviews",))
    with pytest.raises(UsageError, match="fewer than 50000"):
        pocket.tasks("test", 50_000, 0, ("comfort",))
    with pytest.raises(UsageError, match="negative"):
        pocket.tasks("test", -1, seed=0)
    with pytest.raises(UsageError, match="known: evasive, good, mixed, rude, wrong"):
        pocket.answer(pocket.tasks("test", 1, 0, ("fact",))[0], "sloppy", random.Random(0))
    with pytest.raises(UsageError, match="did you mean 'base'"):
        pocket.path("bas")


def test_importing_the_world_imports_no_torch() -> None:
    code = "import sys, trimtab.pocket; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PINNED = [
    "Q: A friend asks: Tell me about the play.\nA:",
    "Q: Quick question. Tell me three drinks for a poem.\nA:",
    "Q: Please tell me. Which pet lives with Jack?\nA:",
]
