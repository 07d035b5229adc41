"""The search: exhaustive and hand-computed oracles, invariants, what is resumed, what is refused."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from scipy.stats import ttest_rel

from trimtab.errors import UsageError
from trimtab.prompt.instruction_tree import Evaluation, InstructionTree

Table = dict[str, float]


def of(*scores: float | None) -> Evaluation:
    return Evaluation(tuple("" for _ in scores), scores)


class World:
    """An instruction is a set of flags, written "x" and the flags in order; principle i sets flag i.

    Its worth is a sum of the flags' own worths and of every pair's (some pairs conflict), scaled to [0, 1].
    """

    def __init__(self, seed: int, flags: str):
        rng = random.Random(seed)
        self.flags = flags
        own = {flag: rng.gauss(0, 1) for flag in flags}
        pairs = {pair: rng.gauss(0, 0.7) for pair in combinations(flags, 2)}
        raw = {
            state: sum(own[f] for f in state) + sum(worth for pair, worth in pairs.items() if set(pair) <= set(state))
            for size in range(len(flags) + 1)
            for state in combinations(flags, size)
        }
        low, high = min(raw.values()), max(raw.values())
        self.worth = {"x" + "".join(state): (value - low) / (high - low) for state, value in raw.items()}

    def rewrite(self, text: str, flag: str) -> str:
        return "x" + "".join(sorted({*text[1:], flag}))

    def settle(self, tree: InstructionTree) -> InstructionTree:
        tree.settle(of(self.worth[tree.root.text]))
        return tree


def search(world: World, iterations: int, pick: Callable[[InstructionTree], Any] | None = None, **options: Any) -> Any:
    """A settled tree of the world. pick: how (node, principle) is proposed, in place of the tree's own way."""
    tree = InstructionTree("x", list(world.flags), **options)
    while tree.iterations < iterations and (step := pick(tree) if pick else tree.propose()) is not None:
        parent, flag = step
        text = world.rewrite(tree.nodes[parent].text, flag)
        tree.add(parent, flag, text, of(world.worth[text]))
    return world.settle(tree)


# against brute force


def test_a_search_as_long_as_the_tree_finds_the_best_of_all() -> None:
    """3 + 9 + 27 nodes of depth 3 hold every set of three flags, so the best node is the best of all sets: exactly."""
    for seed in range(100):
        world = World(seed, "abc")
        table = {state: random.Random(1000 + seed).random() * value for state, value in world.worth.items()}
        world.worth = table
        tree = search(world, 39, depth=3, seed=seed)
        assert len(tree.nodes) == 40 and tree.select() is None
        assert tree.nodes[tree.best].value == max(table.values()) == tree.root.best


def test_twenty_rewrites_regret_less_than_random_ones() -> None:
    """200 worlds of 5 flags, as many as the largest action set of the paper; paired one-sided t-test, p < 0.01.

    Random: any node, any principle it has not used. (With 8 flags 20 rewrites are too few for w = 0.1 to tell: p = 0.1.)
    """
    guided, blind = [], []
    for seed in range(200):
        world, rng = World(seed, "abcde"), random.Random(seed)

        def anywhere(tree: InstructionTree, rng: random.Random = rng) -> tuple[int, str]:
            number = rng.choice([i for i in range(len(tree.nodes)) if tree.untried(i)])
            return number, rng.choice(tree.untried(number))

        found = [search(world, 20, pick, seed=seed).root.best for pick in (None, anywhere)]
        guided.append(1 - found[0])
        blind.append(1 - found[1])
    assert ttest_rel(guided, blind, alternative="less").pvalue < 0.01


# by hand


def test_six_iterations_by_hand() -> None:
    """Two principles, w = 0.5. The draws of seed 1 are b, a, a, a, b, a; all else is worked out here.

    3: Q(b) = 0.4, Q(a) = 0.6, n = 1 each: a. Then Q(a) = (0.6 + 0.2) / 2 = 0.4 and n_a = 2.
    4: b 0.4 + 0.5 sqrt(ln 3 / 1) = 0.924, a 0.4 + 0.5 sqrt(ln 3 / 2) = 0.771: b. Q(b) = (0.4 + 0.3) / 2.
    5: b 0.35 + 0.5 sqrt(ln 4 / 2), a 0.4 + the same: a. Q(a) = (0.6 + 0.2 + 0.9) / 3.
    6: a 0.5667 + 0.5 sqrt(ln 5 / 3) = 0.933, b 0.35 + 0.5 sqrt(ln 5 / 2) = 0.799: a, which is full;
       aa 0.2 + 0.5 sqrt(ln 3 / 1) < ab 0.9 + the same: ab. Q(ab) = (0.9 + 0.5) / 2, Q(a) = (0.6 + 0.2 + 0.7) / 3.
    """
    worth = {"xb": 0.4, "xa": 0.6, "xaa": 0.2, "xba": 0.3, "xab": 0.9, "xaba": 0.5}
    tree = InstructionTree("x", ["a", "b"], w=0.5, seed=1)
    steps = [
        # parent, new text, n of all nodes, Q of all nodes, b of all nodes
        (0, "xb", [1, 1], [0.4, 0.4], [0.4, 0.4]),
        (0, "xa", [2, 1, 1], [0.5, 0.4, 0.6], [0.6, 0.4, 0.6]),
        (2, "xaa", [3, 1, 2, 1], [0.4, 0.4, 0.4, 0.2], [0.6, 0.4, 0.6, 0.2]),
        (1, "xba", [4, 2, 2, 1, 1], [0.375, 0.35, 0.4, 0.2, 0.3], [0.6, 0.4, 0.6, 0.2, 0.3]),
        (2, "xab", [5, 2, 3, 1, 1, 1], [(0.35 + 1.7 / 3) / 2, 0.35, 1.7 / 3, 0.2, 0.3, 0.9], [0.9, 0.4, 0.9, 0.2, 0.3, 0.9]),
        (
            5, "xaba", [6, 2, 4, 1, 1, 2, 1], [0.425, 0.35, 0.5, 0.2, 0.3, 0.7, 0.5],
            [0.9, 0.4, 0.9, 0.2, 0.3, 0.9, 0.5],
        ),
    ]  # fmt: skip
    for parent, text, visits, quality, best in steps:
        proposed = tree.propose()
        assert proposed == (parent, text[-1])
        tree.add(parent, text[-1], text, of(worth[text]))
        assert [node.visits for node in tree.nodes] == visits
        assert tree.qualities() == pytest.approx(quality, abs=1e-12)
        assert [node.best for node in tree.nodes] == best
    tree.settle(of(0.95))
    assert tree.root.best == 0.95 and tree.chosen() == 0 and tree.path(6) == ["a", "b", "a"]
    assert tree.qualities()[0] == pytest.approx((0.95 + 0.35 + 0.5) / 3)


def test_every_subtree_is_one_vote() -> None:
    """Q(a) = mean(0.6, 0.9, 0) = 0.5 < 0.6 = Q(b). The running mean of its six values, 0.7, would have chosen a."""
    tree = InstructionTree("x", ["a", "b"], w=0)
    for parent, name, value in [
        (0, "a", 0.6),
        (0, "b", 0.6),
        (1, "a", 0.9),
        (1, "b", 0.0),
        (3, "a", 0.9),
        (3, "b", 0.9),
    ]:
        tree.add(parent, name, "x" + name, of(value))
    assert tree.qualities()[1:4] == pytest.approx([0.5, 0.6, 0.9])
    assert tree.select() == 2


# limits of w


def test_without_exploration_the_best_child_is_taken() -> None:
    tree = InstructionTree("x", list("abc"), w=0, seed=3)
    rng = random.Random(0)
    for _ in range(60):
        at, quality = 0, tree.qualities()
        while len(tree.nodes[at].children) == 3:
            at = max(tree.nodes[at].children.values(), key=quality.__getitem__)
        assert tree.select() == at
        parent, name = tree.propose() or (0, "")
        tree.add(parent, name, "x", of(rng.random()))


def test_with_nothing_but_exploration_children_take_turns() -> None:
    tree = InstructionTree("x", list("abc"), w=1e6, seed=3)
    rng = random.Random(0)
    for _ in range(120):
        parent, name = tree.propose() or (0, "")
        tree.add(parent, name, "x", of(rng.random()))
        for node in tree.nodes:
            visits = [tree.nodes[child].visits for child in node.children.values()]
            assert not visits or max(visits) - min(visits) <= 1


# whatever happens


@pytest.mark.parametrize("seed", range(40))
def test_invariants(seed: int) -> None:
    rng = random.Random(seed)
    world = World(seed, "abcd"[: rng.randint(1, 4)])
    iterations = rng.randint(1, 40)
    tree = search(world, iterations, w=rng.choice([0, 0.1, 1, 10]), seed=seed)
    values = [node.value for node in tree.nodes]
    assert tree.root.visits == iterations == len(tree.nodes) - 1
    assert tree.root.best == max(values) == values[tree.best]
    assert values[tree.chosen()] >= values[0]
    for number, node in enumerate(tree.nodes[1:], start=1):
        assert (
            tree.nodes[node.parent].children[node.principle] == number
        )  # one child a principle, and it knows its parent
        assert node.visits == 1 + sum(tree.nodes[child].visits for child in node.children.values())
        assert tree.path(number) == [*tree.path(node.parent), node.principle]
    assert sum(len(node.children) for node in tree.nodes) == iterations
    steps = tree.steps()
    assert all(values[child] > values[parent] for parent, child in steps)
    assert len(steps) == sum(values[n.parent] < values[i] for i, n in enumerate(tree.nodes) if n.parent is not None)
    pair = tree.pair()
    assert pair is None or values[pair[0]] > values[pair[1]] == min(values)


@pytest.mark.parametrize("stopped", [0, 1, 7, 19])
def test_a_tree_read_back_goes_on_as_if_never_interrupted(stopped: int) -> None:
    world = World(5, "abcd")
    whole = search(world, 20, seed=9)
    tree = InstructionTree("x", list("abcd"), seed=9)
    for part in (stopped, 20):
        while tree.iterations < part:
            parent, flag = tree.propose() or (0, "")
            text = world.rewrite(tree.nodes[parent].text, flag)
            tree.add(parent, flag, text, of(world.worth[text]))
        tree = InstructionTree.from_dict(json.loads(json.dumps(tree.to_dict())))
    world.settle(tree).confirm(tree.best, of(0.5, 0.25))
    whole.confirm(whole.best, of(0.5, 0.25))
    assert tree.to_dict() == whole.to_dict()


# failures


def test_a_failure_adds_nothing_and_is_bounded() -> None:
    """b never works: it is tried `retries` times at each node that comes to be expanded, and a goes on without it."""
    tree = InstructionTree("x", ["a", "b"], retries=2, depth=3)
    tried = 0
    while (step := tree.propose()) is not None:
        tried += 1
        parent, name = step
        before = [node.visits for node in tree.nodes]
        if name == "b":
            tree.fail(parent, name)
            assert [node.visits for node in tree.nodes] == before
        else:
            tree.add(parent, name, tree.nodes[parent].text + name, of(0.5))
    assert [node.text for node in tree.nodes] == ["x", "xa", "xaa", "xaaa"]
    assert tried == 3 + 3 * 2 and tree.root.visits == 3
    with pytest.raises(UsageError, match="'b' is no principle that node 0 could still be rewritten by"):
        tree.add(0, "b", "xb", of(1.0))


def test_what_cannot_be_judged_has_no_value() -> None:
    tree = InstructionTree("x", ["a"])
    assert of(None, 2.0, None, 4.0).value == 3.0 and of(None).value is None
    with pytest.raises(UsageError, match="no score: call fail"):
        tree.add(0, "a", "xa", of(None))
    with pytest.raises(UsageError, match="no value yet"):
        tree.chosen()
    tree.settle(of(None))
    tree.add(0, "a", "xa", of(1.0))
    assert tree.ranked() == [1] and tree.chosen() == 1 and tree.pair() is None and tree.steps() == []


# which one is taken


def test_equal_values_go_to_the_root_and_then_to_the_shorter_text() -> None:
    tree = InstructionTree("x", ["a", "b", "c"])
    for name, text in (("a", "longer"), ("b", "short"), ("c", "worse")):
        tree.add(0, name, text, of(0.2 if text == "worse" else 0.7))
    tree.settle(of(0.7))
    assert [tree.nodes[i].text for i in tree.ranked()] == ["x", "short", "longer", "worse"]
    assert tree.chosen() == 0 and tree.pair() == (0, 3)


def test_the_best_must_hold_up_with_fresh_samples() -> None:
    """Fresh means 0.6 and 0.5, each of two samples 0.2 apart: a standard error of sqrt(0.01 + 0.01) = 0.141."""
    tree = InstructionTree("x", ["a", "b"])
    tree.add(0, "a", "lucky", of(0.9))
    tree.add(0, "b", "worse", of(0.1))
    tree.settle(of(0.4))
    assert tree.chosen() == 1 and tree.pair() == (1, 2)
    tree.confirm(1, of(0.5, 0.7, None))
    assert tree.chosen() == 1  # nothing is known of the root yet
    tree.confirm(0, of(0.4, 0.6))
    assert tree.chosen(0.7) == 1 and tree.chosen(0.71) == 0
    assert tree.pair(0.71) == (0, 2)
    tree.confirm(1, of(0.5, 0.5))
    assert tree.chosen(0.0) == 0  # no better is not enough


def test_equal_texts_are_no_pair() -> None:
    tree = InstructionTree("x", ["a"])
    tree.add(0, "a", "x", of(0.9))
    tree.settle(of(0.1))
    assert tree.pair() is None
    flat = InstructionTree("x", ["a"])
    flat.add(0, "a", "y", of(0.5))
    flat.settle(of(0.5))
    assert flat.pair() is None and math.isclose(flat.qualities()[0], 0.5)


# bad input


@pytest.mark.parametrize(
    ("instruction", "principles", "options", "message"),
    [
        ("x", [], {}, "a tree needs principles"),
        ("x", ["a", "a"], {}, "a tree needs principles, each once"),
        (" \n", ["a"], {}, "an empty instruction"),
        ("x", ["a"], {"w": -1.0}, "w and depth must be 0 or more"),
        ("x", ["a"], {"retries": 0}, "retries 1 or more"),
    ],
)
def test_a_tree_that_cannot_grow_is_refused(instruction: str, principles: Any, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        InstructionTree(instruction, principles, **options)


@pytest.mark.parametrize("data", [{}, {"nodes": []}, {"nodes": [{"text": 3}]}, {"nodes": [{"colour": "red"}]}, []])
def test_data_that_is_no_tree_is_refused(data: Any) -> None:
    with pytest.raises(UsageError, match="no instruction tree"):
        InstructionTree.from_dict(data)
