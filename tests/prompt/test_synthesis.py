"""Growing trees with models: what the reward sees, what is resumed, what a failure costs, what is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from oracles.cue_world import LIBRARY
from tiny import tiny_lm
from trimtab import LM, Completions, Cost, Sampling
from trimtab.errors import UsageError
from trimtab.prompt.instruction_tree import Evaluation
from trimtab.prompt.principles import Principle, PrincipleLibrary, phrasebook, scripted
from trimtab.prompt.rewriter import STEPS, parse, rewrite_prompt
from trimtab.prompt.synthesis import (
    Evaluator,
    confirm,
    grow,
    pair_rows,
    plant,
    read_trees,
    sft_rows,
    step_rows,
    write_dataset,
)
from trimtab.rewards import as_reward

SAMPLING = Sampling(max_new_tokens=6)
WORDS = PrincipleLibrary({"helpfulness": [Principle(w, f"add {w}", "{instruction} " + w) for w in ("ba", "du", "pe")]})
PROMPTS: list[Any] = ["ma na", "Q: ta to\nA:", "fa la so"]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


def spread(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
    return [len(set(text.split())) / 6 for text in texts]


def counted(texts: Sequence[str]) -> list[Evaluation]:
    """Worth: how many different words, less a tenth of the length."""
    return [Evaluation(("",), (len(set(text.split())) - len(text) / 10,)) for text in texts]


def test_the_reward_sees_the_original_alone(lm: LM) -> None:
    """And the model is asked the rewrite, in the frame of the original."""
    seen: list[Any] = []
    asked: list[Any] = []

    def spy(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
        seen.extend(prompts)
        return spread(prompts, texts)

    class Asked:
        name = "asked"

        def generate(self, prompts: Sequence[Any], sampling: Sampling = SAMPLING) -> Completions:
            asked.extend(prompts)
            return lm.generate(prompts, sampling)

    trees = plant(PROMPTS, WORDS, seed=1)
    evaluate = Evaluator(Asked(), as_reward(spy), 2, SAMPLING)
    grow(trees, WORDS, phrasebook, evaluate, 5, guard=False)
    confirm(trees, evaluate)
    assert set(seen) == set(PROMPTS)
    assert seen.count(PROMPTS[0]) == 2 * (5 + 1 + (1 if trees[0].best == 0 else 2))
    assert {prompt for prompt in asked if prompt.startswith("Q:")} > {"Q: ta to\nA:"}
    assert all(prompt.endswith("\nA:") for prompt in asked if prompt.startswith("Q:"))


def test_what_a_tree_costs(lm: LM) -> None:
    """(T + 1) k answers and reward calls; the prompt is forwarded once for its k answers."""
    trees = plant(["ma na"], WORDS)
    evaluate = Evaluator(lm, as_reward(spread), 4, Sampling(max_new_tokens=1))
    grow(trees, WORDS, phrasebook, evaluate, 3)
    assert evaluate.meter.reward_calls == 4 * 4
    assert evaluate.meter.tokens == {"tiny": sum(len(node.text.split()) for node in trees[0].nodes)}
    assert [len(node.answers) for node in trees[0].nodes] == [4] * 4


@pytest.mark.parametrize("rounds", [1, 4, 11])
def test_interrupted_trees_go_on_as_if_they_had_not_been(lm: LM, tmp_path: Path, rounds: int) -> None:
    """With a model that samples, and a principle that fails: the rounds' seeds go on where they stopped."""

    def never_pe(text: str, principle: Principle) -> str | None:
        return None if principle.name == "pe" else f"{text} {principle.name}"

    def grown(trees: Any, progress: Any = None) -> Any:
        evaluate = Evaluator(lm, as_reward(spread), 2, SAMPLING)
        grow(trees, WORDS, scripted(never_pe), evaluate, 8, seed=3, progress=progress)
        return trees

    def stop(said: str, seen: list[str] = []) -> None:  # noqa: B006  it counts
        seen.append(said)
        if len(seen) == rounds:
            raise KeyboardInterrupt

    whole, part = grown(plant(PROMPTS, WORDS, seed=2)), plant(PROMPTS, WORDS, seed=2)
    with pytest.raises(KeyboardInterrupt):
        grown(part, stop)
    write_dataset(tmp_path, part, WORDS)
    resumed = grown(read_trees(tmp_path / "trees.jsonl"))
    assert [tree.to_dict() for tree in resumed] == [tree.to_dict() for tree in whole]
    assert {tree.iterations for tree in whole} == {8} and max(tree.draws for tree in whole) > 8


def test_failures_end(lm: LM) -> None:
    """A rewriter that always fails, a reward that never judges and a guard that always rejects leave bare roots."""
    numbers = ["add 3 and 4"]
    for rewrite, reward, guard, answers in (
        (scripted(lambda text, principle: " " if principle.name == "ba" else None), spread, True, 1),
        (phrasebook, lambda prompts, texts: [None] * len(texts), True, 1 + 3 * 2),
        (scripted(lambda text, principle: "add some"), spread, True, 1),
    ):
        trees = plant(numbers, WORDS, retries=2)
        evaluate = Evaluator(lm, as_reward(reward), 1, SAMPLING)
        grow(trees, WORDS, rewrite, evaluate, 5, guard=guard)
        assert len(trees[0].nodes) == 1 and trees[0].root.failed == {"ba": 2, "du": 2, "pe": 2}
        assert evaluate.meter.reward_calls == answers
        assert pair_rows(trees) == [] == step_rows(trees, WORDS)
    trees = plant(numbers, WORDS)
    grow(trees, WORDS, scripted(lambda text, principle: "add some"), evaluate, 2, guard=False)
    assert len(trees[0].nodes) == 3


def test_nothing_judged_cannot_be_confirmed(lm: LM) -> None:
    evaluate = Evaluator(lm, as_reward(lambda prompts, texts: [None] * len(texts)), 1, SAMPLING)
    trees = plant(["ma"], WORDS)
    grow(trees, WORDS, phrasebook, evaluate, 1)
    with pytest.raises(UsageError, match="could judge no answer"):
        confirm(trees, evaluate)
    assert sft_rows(trees) == []


def test_shrinkage_is_what_luck_added() -> None:
    """First values 1, 2 and 3 with a best of 3 and 3, fresh ones 2 and 1: shrinkage (1 + 2) / 2."""

    def told(values: Sequence[float]) -> Any:
        given = iter(values)
        return lambda originals, texts, seed: [Evaluation(("",), (next(given),)) for _ in texts]

    trees = plant(["ma", "na"], WORDS)
    grow(trees, WORDS, phrasebook, told([3, 2, 1, 3, 0, 0]), 2)  # two rounds of two trees, then both roots
    assert [[node.value for node in tree.nodes] for tree in trees] == [[0, 3, 1], [0, 2, 3]]
    assert confirm(trees, told([2, 0.5, 1, 1.5])) == pytest.approx(1.5)
    assert [tree.chosen() for tree in trees] == [1, 0]


def test_the_dataset(tmp_path: Path) -> None:
    trees = plant(["ma na", "ta", "du du <<<"], WORDS, seed=4)
    grow(trees, WORDS, phrasebook, lambda originals, texts, seed: counted(texts), 9)
    write_dataset(tmp_path, trees, WORDS)
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.iterdir()}
    assert sorted(rows) == ["pairs", "sft", "steps", "trees"]
    assert [tree.to_dict() for tree in read_trees(tmp_path / "trees.jsonl")] == [tree.to_dict() for tree in trees]
    assert [row["id"] for row in rows["trees"]] == [0, 1, 2]
    assert len(rows["pairs"]) == len(rows["sft"]) == 2  # a rewriter cannot be asked about the third
    for tree, pair, demonstration in zip(trees, rows["pairs"], rows["sft"], strict=False):
        value = {node.text: node.value for node in tree.nodes}
        assert pair["prompt"] == demonstration["prompt"] == rewrite_prompt(tree.root.text)
        assert pair["chosen"] == demonstration["completion"]
        assert value[str(parse(pair["chosen"]))] == max(value.values()) > value[str(parse(pair["rejected"]))]
        assert value[str(parse(pair["rejected"]))] == min(value.values())
    assert [(row["prompt"], row["completion"]) for row in rows["steps"]] == step_rows(trees, WORDS)
    assert len(rows["steps"]) == sum(len(tree.steps()) for tree in trees[:2])
    assert all("add " in row["prompt"] for row in rows["steps"])
    named = sft_rows(trees, actions=True)
    assert [parse(said, STEPS) for _, said in named] == ["; ".join(tree.path(tree.best)) for tree in trees[:2]]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl"
    tree = plant(["ma"], WORDS)[0].to_dict()
    path.write_text(json.dumps({"id": 0, **tree}) + "\n{\n")
    with pytest.raises(UsageError, match=r"trees\.jsonl:2"):
        read_trees(path)
    path.write_text("{}\n")
    with pytest.raises(UsageError, match=r"trees\.jsonl:1: this is no instruction tree"):
        read_trees(path)


def test_domains_choose_the_principles() -> None:
    library = PrincipleLibrary({**LIBRARY.domains, "math": [Principle("hint", "add a hint")]})
    trees = plant(["a", "b"], library, ["math", None])
    assert trees[0].principles == ("hint", *trees[1].principles)
    with pytest.raises(UsageError, match="unknown domain 'maths'"):
        plant(["a"], library, ["maths"])
    assert Cost() == Evaluator(tiny_lm(), as_reward(spread)).meter
