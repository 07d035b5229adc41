"""`InstructionTree`: Monte Carlo tree search over rewrites of one instruction (P-Aligner, arXiv 2508.04626).

A node is a text, an edge one rewrite step under a named principle, a node's own value v the mean reward of a few answers
to its text, scored as answers to the instruction at the root.

    select   while every principle of node s is used: go to argmax over children c of Q(c) + w sqrt(ln n_s / n_c)
             Q(c) = mean of {v_c} and {Q(g): g child of c}: each subtree is one vote, not the running mean of rollouts
    expand   an unused principle, uniformly
    backup   n += 1 and b = max(v, b of the children), from the new node to the root (b is a record, Q selects)

The tree only keeps the books; `trimtab.prompt.synthesis.grow` rewrites and answers for many trees at once. The root is
valued last (`settle`), so that "no change" competes. Differences from the published code: a principle that could not be
carried out `retries` times at a node is closed there (the code tries for ever); equal values are ranked root first, then
the shorter text (there, by insertion, so the root loses to an equal rewrite); and `confirm` takes fresh samples of the
best node and the root, because the best of T noisy means is too good to be true.
Everything is plain data: `from_dict(to_dict())` goes on as if never interrupted. A random draw depends on (seed, how many
were made) alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trimtab.errors import UsageError
from trimtab.policy import Prompt
from trimtab.sampling import derive_seed


@dataclass(frozen=True)
class Evaluation:
    """Answers to a text, and what each is worth as an answer to the root's instruction (None: could not be judged)."""

    answers: tuple[str, ...]
    scores: tuple[float | None, ...]

    @property
    def value(self) -> float | None:
        """Mean of the judged scores; None without one."""
        known = [score for score in self.scores if score is not None]
        return sum(known) / len(known) if known else None


@dataclass
class Node:
    """text, the principle and the parent that made it (None: the root), children by principle, failures by principle."""

    text: str
    principle: str | None = None
    parent: int | None = None
    children: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    visits: int = 0
    value: float | None = None
    best: float | None = None
    answers: list[str] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)


class InstructionTree:
    """The tree of one instruction. Nodes are numbered in the order they were made; 0 is the root.

    prompt      what was asked, whole (the instruction may stand inside a conversation or a frame)
    principles  names; every node may be rewritten by each of them once
    w           weight of exploration
    depth       most rewrite steps on a path; 0: no limit
    """

    def __init__(
        self,
        instruction: str,
        principles: Sequence[str],
        w: float = 0.1,
        seed: int = 0,
        depth: int = 0,
        retries: int = 3,
        prompt: Prompt | None = None,
    ):
        if not instruction.strip():
            raise UsageError("an empty instruction cannot be rewritten: give its text")
        if not principles or len(set(principles)) < len(principles):
            raise UsageError(f"a tree needs principles, each once, not {list(principles)}: give the search a library")
        if w < 0 or depth < 0 or retries < 1:
            raise UsageError(
                f"w and depth must be 0 or more and retries 1 or more, not w={w}, depth={depth}, retries={retries}"
            )
        self.prompt: Prompt = instruction if prompt is None else prompt
        self.principles = tuple(principles)
        self.w, self.seed, self.depth, self.retries = w, seed, depth, retries
        self.nodes = [Node(instruction)]
        self.draws = 0
        self.confirmed: dict[int, list[float]] = {}

    @property
    def root(self) -> Node:
        return self.nodes[0]

    @property
    def iterations(self) -> int:
        """Finished ones: the visits of the root."""
        return self.root.visits

    # the search

    def select(self) -> int | None:
        """The node to expand; None where there is nothing left to try."""
        expandable = self._expandable()
        if not expandable[0]:
            return None
        quality, at = self.qualities(), 0
        while not self.untried(at):
            children = [child for child in self.nodes[at].children.values() if expandable[child]]
            at = max(children, key=lambda child: self._bound(at, child, quality[child]))
        return at

    def propose(self) -> tuple[int, str] | None:
        """What to try next: (node, principle). One random draw. None where there is nothing left to try."""
        at = self.select()
        if at is None:
            return None
        untried = self.untried(at)
        self.draws += 1
        return at, untried[derive_seed(self.seed, self.draws) % len(untried)]

    def add(self, parent: int, principle: str, text: str, evaluation: Evaluation) -> int:
        """A new node with its value, backed up to the root; its number. The evaluation must have a value."""
        if principle not in self.untried(parent):
            raise UsageError(f"{principle!r} is no principle that node {parent} could still be rewritten by")
        if evaluation.value is None:
            raise UsageError(f"the rewrite of node {parent} by {principle!r} has no score: call fail() instead")
        number = len(self.nodes)
        self.nodes.append(Node(text, principle, parent))
        self.nodes[parent].children[principle] = number
        self._value(number, evaluation)
        at: int | None = number
        while at is not None:
            self.nodes[at].visits += 1
            at = self.nodes[at].parent
        return number

    def fail(self, parent: int, principle: str) -> None:
        """The rewrite came to nothing: nothing is added; after `retries` times the principle is closed at this node."""
        self.nodes[parent].failed[principle] = self.nodes[parent].failed.get(principle, 0) + 1

    def settle(self, evaluation: Evaluation) -> None:
        """The value of the root itself, once the search is over."""
        self._value(0, evaluation)

    def untried(self, number: int) -> list[str]:
        """The principles by which a node can still be rewritten."""
        node = self.nodes[number]
        if self.depth and len(self.path(number)) >= self.depth:
            return []
        return [p for p in self.principles if p not in node.children and node.failed.get(p, 0) < self.retries]

    def qualities(self) -> list[float]:
        """Q of every node, by number (NaN: a root that has neither a value nor children)."""
        out = [math.nan] * len(self.nodes)
        for number in range(len(self.nodes) - 1, -1, -1):  # a child's number is greater than its parent's
            node = self.nodes[number]
            votes = [out[child] for child in node.children.values()]
            votes += [node.value] if node.value is not None else []
            out[number] = sum(votes) / len(votes) if votes else math.nan
        return out

    # what it found

    def path(self, number: int) -> list[str]:
        """The principles that led from the root to a node."""
        steps: list[str] = []
        node = self.nodes[number]
        while node.parent is not None and node.principle is not None:
            steps.append(node.principle)
            node = self.nodes[node.parent]
        return steps[::-1]

    def ranked(self) -> list[int]:
        """All valued nodes, best first; equal ones: the root, then the shorter text, then the earlier."""
        valued = [(number, node) for number, node in enumerate(self.nodes) if node.value is not None]
        return [i for i, node in sorted(valued, key=lambda v: (-(v[1].value or 0.0), v[0] != 0, len(v[1].text), v[0]))]

    @property
    def best(self) -> int:
        """The node of the highest value. The tree must have been settled or grown."""
        ranked = self.ranked()
        if not ranked:
            raise UsageError("the tree has no value yet: grow it, or settle its root")
        return ranked[0]

    @property
    def worst(self) -> int:
        return self.ranked()[-1]

    def confirm(self, number: int, fresh: Evaluation) -> None:
        """Fresh samples of a node; those of the best node and the root decide what is `chosen`."""
        self.confirmed[number] = [score for score in fresh.scores if score is not None]

    def chosen(self, margin: float = 0.0) -> int:
        """The best node; the root where fresh samples of both do not put it more than `margin` standard errors above."""
        best = self.best
        ours, roots = self.confirmed.get(best), self.confirmed.get(0)
        if best == 0 or not ours or not roots:
            return best
        error = math.sqrt(_variance_of_mean(ours) + _variance_of_mean(roots))
        return best if sum(ours) / len(ours) - sum(roots) / len(roots) > margin * error else 0

    def pair(self, margin: float = 0.0) -> tuple[int, int] | None:
        """(chosen, rejected); None where the chosen text is no better than the worst or the same, or nothing has a value."""
        if not self.ranked():
            return None
        chosen, worst = self.chosen(margin), self.worst
        above = self._value_of(chosen) > self._value_of(worst)
        return (chosen, worst) if above and self.nodes[chosen].text != self.nodes[worst].text else None

    def steps(self) -> list[tuple[int, int]]:
        """Edges (parent, child) whose child is worth more than its parent."""
        return [
            (node.parent, number)
            for number, node in enumerate(self.nodes)
            if node.parent is not None
            and self.nodes[node.parent].value is not None
            and self._value_of(number) > self._value_of(node.parent)
        ]

    # files

    def to_dict(self) -> dict[str, Any]:
        """Plain data. What is not finished is in it too: a tree read back goes on growing."""
        return {
            "prompt": self.prompt,
            "principles": list(self.principles),
            "w": self.w,
            "seed": self.seed,
            "depth": self.depth,
            "retries": self.retries,
            "draws": self.draws,
            "confirmed": {str(number): scores for number, scores in self.confirmed.items()},
            "nodes": [asdict(node) for node in self.nodes],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> InstructionTree:
        """The inverse of `to_dict`. UsageError for data that is no tree."""
        try:
            nodes = [Node(**node) for node in data["nodes"]]
            tree = cls(
                nodes[0].text, data["principles"], data["w"], data["seed"], data["depth"], data["retries"],
                data["prompt"],
            )  # fmt: skip
            tree.nodes, tree.draws = nodes, int(data["draws"])
            tree.confirmed = {int(number): list(scores) for number, scores in data["confirmed"].items()}
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UsageError(
                f"this is no instruction tree ({type(error).__name__}: {error}): write it again"
            ) from error
        return tree

    # inside

    def _bound(self, parent: int, child: int, quality: float) -> float:
        seen = self.nodes[child].visits
        return quality + self.w * math.sqrt(math.log(self.nodes[parent].visits) / seen)

    def _expandable(self) -> list[bool]:
        """Whether something can still be tried at or below each node."""
        out = [False] * len(self.nodes)
        for number in range(len(self.nodes) - 1, -1, -1):
            below = any(out[child] for child in self.nodes[number].children.values())
            out[number] = below or bool(self.untried(number))
        return out

    def _value(self, number: int, evaluation: Evaluation) -> None:
        node = self.nodes[number]
        node.value, node.answers, node.scores = evaluation.value, list(evaluation.answers), list(evaluation.scores)
        at: int | None = number
        while at is not None:
            node = self.nodes[at]
            known = [self.nodes[child].best for child in node.children.values()] + [node.value]
            node.best = max((value for value in known if value is not None), default=None)
            at = node.parent

    def _value_of(self, number: int) -> float:
        value = self.nodes[number].value
        return -math.inf if value is None else value


def _variance_of_mean(scores: Sequence[float]) -> float:
    """Of independent samples; one sample tells nothing and counts as certain."""
    mean = sum(scores) / len(scores)
    return sum((score - mean) ** 2 for score in scores) / (max(1, len(scores) - 1) * len(scores))
