"""Instruction synthesis: grow trees with a rewriting and an answering model, and turn them into training data.

    grow          select and expand in every tree, rewrite all at once, answer all at once, score, back up
    confirm       fresh samples of each tree's best node and root: the best of many noisy means is biased upwards
    sft_rows      (task, chosen rewrite) of each tree; the unchanged instruction where no rewrite holds up
    pair_rows     (task, chosen, rejected): for preference training
    step_rows     (task with a directive, better child): for a rewriter that takes single steps ("SinglePO")
    write_dataset all of it as JSONL

The reward only ever sees the original prompt: a rewrite that drifts from it is punished by answers that do not fit.
Cost of a tree: (T + 1) k answers and reward calls, and T rewrites; 2 k' more where it is confirmed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trimtab.errors import UsageError
from trimtab.files import write_atomic
from trimtab.policy import Cost, Policy, Prompt
from trimtab.prompt.instruction_tree import Evaluation, InstructionTree
from trimtab.prompt.intent import broken_intent
from trimtab.prompt.principles import Principle, PrincipleLibrary
from trimtab.prompt.rewriter import (
    charge,
    instruction_of,
    rewrite_completion,
    rewrite_prompt,
    steps_completion,
    with_instruction,
)
from trimtab.prompt.tuning import Progress
from trimtab.rewards.base import Reward
from trimtab.sampling import Sampling, derive_seed


class Rewrite(Protocol):
    """One rewrite step for each text under its principle; None where it came to nothing. `meter` takes what it costs."""

    def __call__(
        self, texts: Sequence[str], principles: Sequence[Principle], seed: int, meter: Cost
    ) -> list[str | None]: ...


class Evaluate(Protocol):
    """Answers to each text, scored as answers to the original prompt."""

    def __call__(self, originals: Sequence[Prompt], texts: Sequence[str], seed: int) -> list[Evaluation]: ...


@dataclass
class Evaluator:
    """v of a text: the mean reward of `samples` answers of a policy to it, as answers to the original."""

    policy: Policy
    reward: Reward
    samples: int = 3
    sampling: Sampling = Sampling()
    meter: Cost = field(default_factory=Cost)

    def __call__(self, originals: Sequence[Prompt], texts: Sequence[str], seed: int) -> list[Evaluation]:
        asked = [with_instruction(prompt, text) for prompt, text in zip(originals, texts, strict=True)]
        done = self.policy.generate(asked, self.sampling.but(samples=self.samples, seed=seed))
        owners = [prompt for prompt in originals for _ in range(self.samples)]
        scores = self.reward.score(owners, done.texts)
        charge(self.meter, done.cost + Cost(reward_calls=len(owners)))
        rows = range(0, len(owners), self.samples)
        return [Evaluation(tuple(done.texts[i : i + self.samples]), tuple(scores[i : i + self.samples])) for i in rows]


def plant(
    prompts: Sequence[Prompt],
    library: PrincipleLibrary,
    domains: Sequence[str | None] | None = None,
    w: float = 0.1,
    seed: int = 0,
    depth: int = 0,
    retries: int = 3,
) -> list[InstructionTree]:
    """One tree a prompt, with the principles of its domain (None: the universal ones)."""
    labels = [None] * len(prompts) if domains is None else domains
    return [
        InstructionTree(
            instruction_of(prompt),
            [principle.name for principle in library.actions(label)],
            w,
            derive_seed(seed, "tree", number),
            depth,
            retries,
            prompt,
        )
        for number, (prompt, label) in enumerate(zip(prompts, labels, strict=True))
    ]


def grow(
    trees: Sequence[InstructionTree],
    library: PrincipleLibrary,
    rewrite: Rewrite,
    evaluate: Evaluate,
    iterations: int = 20,
    seed: int = 0,
    meter: Cost | None = None,
    progress: Progress | None = None,
    guard: bool = True,
) -> None:
    """Grow every tree to `iterations` rewrites (or until nothing is left to try), then value its root.

    Trees that were written after a round (`progress` is called after each) and read back go on as if never interrupted.
    guard: rewrites that lose a number, a name, ... count as
    failures, so that a rewriter never learns from them.
    """
    meter = Cost() if meter is None else meter
    while True:
        proposed = [(tree, step) for tree in trees if tree.iterations < iterations and (step := tree.propose())]
        if not proposed:
            break
        part = derive_seed(seed, "round", max(tree.draws for tree, _ in proposed))
        texts = [tree.nodes[at].text for tree, (at, _) in proposed]
        said = rewrite(texts, [library.by_name[name] for _, (_, name) in proposed], part, meter)
        good = [
            row
            for row, text in enumerate(said)
            if text and text.strip() and not (guard and broken_intent(proposed[row][0].root.text, text))
        ]
        originals = [proposed[row][0].prompt for row in good]
        found = evaluate(originals, [str(said[row]) for row in good], part) if good else []
        valued = {row: e for row, e in zip(good, found, strict=True) if e.value is not None}
        for row, (tree, (at, name)) in enumerate(proposed):
            if row in valued:
                tree.add(at, name, str(said[row]), valued[row])
            else:
                tree.fail(at, name)
        nodes = sum(min(tree.iterations, iterations) for tree in trees)
        if progress is not None:
            progress(f"instruction trees: {nodes}/{iterations * len(trees)} rewrites")
    bare = [tree for tree in trees if tree.root.value is None]
    if bare:
        found = evaluate([tree.prompt for tree in bare], [tree.root.text for tree in bare], derive_seed(seed, "root"))
        for tree, evaluation in zip(bare, found, strict=True):
            tree.settle(evaluation)


def confirm(trees: Sequence[InstructionTree], evaluate: Evaluate, seed: int = 0) -> float:
    """Fresh values of each tree's best node and root. Returns the shrinkage: mean of (v - fresh v) of the best nodes."""
    asked = [(tree, number) for tree in trees if tree.ranked() for number in dict.fromkeys((tree.best, 0))]
    if not asked:
        raise UsageError("no tree has a value: the reward could judge no answer")
    texts = [tree.nodes[number].text for tree, number in asked]
    fresh = evaluate([tree.prompt for tree, _ in asked], texts, derive_seed(seed, "confirm"))
    gaps = []
    for (tree, number), evaluation in zip(asked, fresh, strict=True):
        tree.confirm(number, evaluation)
        if number == tree.best and evaluation.value is not None:
            gaps.append((tree.nodes[number].value or 0.0) - evaluation.value)
    return sum(gaps) / len(gaps) if gaps else 0.0


def sft_rows(trees: Sequence[InstructionTree], margin: float = 0.0, actions: bool = False) -> list[tuple[str, str]]:
    """(prompt, completion) of every valued tree. actions: the completion names the principles, not the text."""
    return [
        (rewrite_prompt(tree.root.text), _completion(tree, tree.chosen(margin), actions))
        for tree in trees
        if tree.ranked() and _writable(tree)
    ]


def pair_rows(
    trees: Sequence[InstructionTree], margin: float = 0.0, actions: bool = False
) -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) of every tree that has a pair."""
    rows = []
    for tree in trees:
        pair = tree.pair(margin)
        if pair is not None and _writable(tree):
            chosen, rejected = (_completion(tree, number, actions) for number in pair)
            rows.append((rewrite_prompt(tree.root.text), chosen, rejected))
    return rows


def step_rows(trees: Sequence[InstructionTree], library: PrincipleLibrary) -> list[tuple[str, str]]:
    """(prompt with the directive, completion) of every edge whose child is worth more than its parent."""
    return [
        (
            rewrite_prompt(tree.nodes[parent].text, library.by_name[str(tree.nodes[child].principle)].directive),
            rewrite_completion(tree.nodes[child].text),
        )
        for tree in trees
        if _writable(tree)
        for parent, child in tree.steps()
    ]


def write_dataset(
    folder: str | Path, trees: Sequence[InstructionTree], library: PrincipleLibrary, margin: float = 0.0
) -> None:
    """trees.jsonl, sft.jsonl (prompt, completion), pairs.jsonl (prompt, chosen, rejected), steps.jsonl, one row a line."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[dict[str, Any]]] = {
        "trees": [{"id": number, **tree.to_dict()} for number, tree in enumerate(trees)],
        "sft": [{"prompt": p, "completion": c} for p, c in sft_rows(trees, margin)],
        "pairs": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pair_rows(trees, margin)],
        "steps": [{"prompt": p, "completion": c} for p, c in step_rows(trees, library)],
    }
    for name, rows in tables.items():
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        write_atomic(folder / f"{name}.jsonl", "".join(lines))


def read_trees(path: str | Path) -> list[InstructionTree]:
    """The trees of a trees.jsonl, ready to go on. UsageError naming the line of a broken one."""
    trees = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            trees.append(InstructionTree.from_dict(json.loads(line)))
        except (ValueError, UsageError) as error:
            raise UsageError(f"{path}:{number}: {error}") from error
    return trees


def _completion(tree: InstructionTree, number: int, actions: bool) -> str:
    return steps_completion(tree.path(number)) if actions else rewrite_completion(tree.nodes[number].text)


def _writable(tree: InstructionTree) -> bool:
    """Whether a rewriter can be asked about the instruction and all its rewrites at all (none holds a marker)."""
    try:
        return all(bool(rewrite_prompt(node.text)) for node in tree.nodes)
    except ValueError:
        return False
