"""Weight matching: permutations of B's units that bring its weights closest to A's, by coordinate descent.

    maximise   sum over tensors <A_t, pi(B)_t>                       the same as minimising ||A - pi(B)||
    a step     one group p, the others fixed:  C = sum over its places  unfold(A_t) unfold(pi(B)_t)^T    [n, n]
               perm[p] = the assignment that maximises sum_i C[i, perm(i)]
    a sweep    every group once, in random order; stop after a sweep without gain

Ainsworth et al., Git Re-Basin, arXiv 2209.04836; code samuela/git-re-basin. Each step is exactly optimal, so the objective
never falls. Departures from the published code:

- heads within groups: where other groups move units within a group's blocks (query heads and value dimensions within
  key/value heads), each pair of blocks (i, j) is first matched inside, by the same procedure, and its optimum is the cost of
  that pair;
- a group that lies on two axes of one tensor has a quadratic step: it is linearised at the current permutation, and kept only
  if the true objective rises;
- a group is looked at again only if one that shares a tensor with it has changed: the others' steps would gain nothing;
- running statistics of batch norms have no part in the cost: they are estimated again after merging;
- the gain that counts is 1e-12 of the objective's scale, not 1e-12; costs are float64 whatever the weights are.

Cost of a step: n^2 x (entries a unit) multiply-adds a place, and the assignment, about n^3 at worst (0.05 s for n = 1,000).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.merge.align.permutation import Group, Place, Spec, apply, permute, units

SILENT = ("running_mean", "running_var")  # of batch norms
Progress = Callable[[str], None]


@dataclass
class Matching:
    """permutations: of B's units, one a group; steps: the objective at the start and after every step of the best start."""

    permutations: dict[str, Tensor]
    objective: float
    sweeps: int
    steps: list[float] = field(default_factory=list)

    @property
    def gain(self) -> float:
        """How much the objective rose over B as it was given to the best start."""
        return self.objective - self.steps[0]


def match(
    spec: Spec,
    target: Mapping[str, Tensor],
    moving: Mapping[str, Tensor],
    *,
    start: Mapping[str, Tensor] | None = None,
    sweeps: int = 100,
    restarts: int = 0,
    seed: int = 0,
    tolerance: float = 1e-12,
    progress: Progress | None = None,
) -> Matching:
    """Permutations for `moving` (B) that bring it closest to `target` (A); tensors of one name have one shape.

    start: permutations to begin with (the identity). restarts: further tries from random permutations; the best counts.
    """
    check_alike(spec, target, moving)
    generator = torch.Generator().manual_seed(seed)
    best: Matching | None = None
    for attempt in range(restarts + 1):
        first = (dict(start) if start is not None else spec.identity()) if attempt == 0 else spec.random(generator)
        said = f"start {attempt + 1} of {restarts + 1}, " if restarts else ""
        state = _Descent(spec, target, moving, {**spec.identity(), **first}, tolerance)
        found = state.run(sweeps, generator, said, progress)
        if best is None or found.objective > best.objective + tolerance * abs(best.objective):
            best = found
    assert best is not None
    return best


def check_alike(spec: Spec, *models: Mapping[str, Tensor]) -> None:
    """UsageError where a tensor of the spec is missing or differs in shape between models."""
    first = models[0]
    for name in spec.tensors():
        for model in models:
            if name not in model:
                raise UsageError(f"matching: a model lacks the tensor {name!r} that the permutation spec names")
            if model[name].shape != first[name].shape:
                raise UsageError(
                    f"matching: {name!r} has the shape {tuple(first[name].shape)} in one model and "
                    f"{tuple(model[name].shape)} in another: models of one architecture and size can be matched"
                )
    spec.check({name: tuple(tensor.shape) for name, tensor in first.items()})


def match_several(
    spec: Spec,
    models: Sequence[Mapping[str, Tensor]],
    *,
    anchor: int | None = 0,
    sweeps: int = 100,
    seed: int = 0,
    rounds: int = 100,
) -> list[dict[str, Tensor]]:
    """One set of permutations a model. anchor: the model that all are matched to; None: each to the mean of the others, in
    random order, until a round changes nothing (Git Re-Basin's MergeMany)."""
    if len(models) < 2:
        raise UsageError(f"matching needs at least two models, not {len(models)}")
    if anchor is not None:
        if not 0 <= anchor < len(models):
            raise UsageError(f"matching: anchor {anchor} is not one of the {len(models)} models")
        return [
            spec.identity()
            if i == anchor
            else match(spec, models[anchor], model, sweeps=sweeps, seed=seed).permutations
            for i, model in enumerate(models)
        ]
    names = spec.tensors()
    found = [spec.identity() for _ in models]
    moved = [{name: model[name].to(torch.float64) for name in names} for model in models]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        changed = False
        for i in torch.randperm(len(models), generator=generator).tolist():
            others = [one for j, one in enumerate(moved) if j != i]
            mean = {name: sum(one[name] for one in others) / len(others) for name in names}
            better = match(spec, mean, models[i], start=found[i], sweeps=sweeps, seed=seed)  # type: ignore[arg-type]
            if better.gain > 1e-12 * max(1.0, abs(better.objective)):
                found[i] = better.permutations
                moved[i] = apply(spec, found[i], {name: models[i][name].to(torch.float64) for name in names})
                changed = True
        if not changed:
            break
    return found


def assign(cost: Tensor) -> Tensor:
    """The permutation that maximises sum_i cost[i, perm[i]]. cost [n, n]; int64 [n]."""
    matrix = cost.to(torch.float64).contiguous().numpy()
    return torch.from_numpy(linear_sum_assignment(matrix, maximize=True)[1]).to(torch.int64)


def _size(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))  # a norm in float16 may be infinite


class _Descent:
    def __init__(
        self,
        spec: Spec,
        target: Mapping[str, Tensor],
        moving: Mapping[str, Tensor],
        permutations: dict[str, Tensor],
        tolerance: float,
    ) -> None:
        self.spec, self.tolerance = spec, tolerance
        self.names = [name for name in spec.tensors() if not name.endswith(SILENT)]
        self.target = {name: target[name] for name in self.names}
        silent = set(spec.tensors()) - set(self.names)
        self.groups = {
            group.name: Group(
                group.name, group.size, tuple(one for one in group.places if one.tensor not in silent), group.after
            )
            for group in spec.groups
        }
        self.permutations = permutations
        seen = Spec(tuple(self.groups.values()))
        self.moved = apply(seen, permutations, {name: moving[name] for name in self.names})
        self.inner = {name: _Inner.of(seen, self.groups[name]) for name in self.groups}
        scale = sum(_size(self.target[name]) * _size(self.moved[name]) for name in self.names)
        self.least = tolerance * max(scale, 1e-300)

    def objective(self, names: Sequence[str] | None = None) -> float:
        return sum(
            float((self.target[name].to(torch.float64) * self.moved[name].to(torch.float64)).sum())
            for name in (self.names if names is None else names)
        )

    def run(
        self, sweeps: int, generator: torch.Generator | None, said: str = "", progress: Progress | None = None
    ) -> Matching:
        """Sweeps until nothing is gained. Without a generator: groups in their own order."""
        outer = [name for name, group in self.groups.items() if not group.after or group.after not in self.groups]
        touches = {
            name: {place.tensor for one in (self.groups[name], *self._within(name)) for place in one.places}
            for name in outer
        }
        at = self.objective()
        steps, waiting, swept = [at], set(outer), 0
        while waiting and swept < sweeps:
            swept += 1
            order = range(len(outer)) if generator is None else torch.randperm(len(outer), generator=generator).tolist()
            for number, i in enumerate(order):
                name = outer[i]
                if name not in waiting:
                    continue
                waiting.discard(name)
                gain = self._step(self.groups[name])
                if gain > self.least:
                    at += gain
                    waiting |= {other for other in outer if other != name and touches[other] & touches[name]}
                    if self.inner[name] or self._twice(self.groups[name]):
                        waiting.add(name)  # such a step need not be the best that the group can do
                steps.append(at)
                if progress is not None:
                    progress(f"{said}sweep {swept}: {number + 1} of {len(outer)} groups, {name}")
        return Matching(self.permutations, self.objective(), swept, steps)

    def _within(self, name: str) -> list[Group]:
        return [group for group in self.groups.values() if group.after == name]

    @staticmethod
    def _twice(group: Group) -> bool:
        """Whether the group lies on two axes of one tensor."""
        axes: dict[str, set[int]] = {}
        for place in group.places:
            axes.setdefault(place.tensor, set()).add(place.axis)
        return any(len(one) > 1 for one in axes.values())

    def _step(self, group: Group) -> float:
        """Improves one group (and those within it); returns the gain, 0 where nothing changed."""
        inner = self.inner[group.name]
        if inner:
            return inner.step(self)
        if not group.places:
            return 0.0
        cost = self.cost(group)
        order = assign(cost)
        gain = float(cost.diagonal().neg().add(cost[torch.arange(group.size), order]).sum())
        if gain <= self.least:
            return 0.0
        if not self._twice(group):
            self.move(group, order)
            return gain
        names = list(dict.fromkeys(place.tensor for place in group.places))
        before, kept = self.objective(names), {name: self.moved[name] for name in names}
        earlier = self.permutations[group.name]
        self.move(group, order)
        gain = self.objective(names) - before
        if gain <= self.least:
            self.moved.update(kept)
            self.permutations[group.name] = earlier
            return 0.0
        return gain

    def cost(self, group: Group, places: Sequence[Place] | None = None) -> Tensor:
        """C [n, n]: what unit j of the moved B is worth in the place of unit i."""
        total = torch.zeros(group.size, group.size, dtype=torch.float64)
        for place in group.places if places is None else places:
            a, b = (units(side[place.tensor], place, group.size) for side in (self.target, self.moved))
            total.addmm_(a, b.T)
        return total

    def move(self, group: Group, order: Tensor) -> None:
        """Permutes the moved B once more."""
        for place in group.places:
            self.moved[place.tensor] = permute(self.moved[place.tensor], place, order)
        self.permutations[group.name] = self.permutations[group.name][order]


@dataclass
class _Inner:
    """The groups within the blocks of a group, as a spec of one block: matched for every pair of blocks.

    own[b]: names of the groups of block b, in the order of `spec.groups`; pieces: places of the outer group that they touch,
    by the name that `spec` gives them; rest: the outer group's other places.
    """

    group: Group
    spec: Spec
    own: list[list[str]]
    pieces: dict[str, Place]
    rest: list[Place]

    @classmethod
    def of(cls, spec: Spec, group: Group) -> _Inner | None:
        within = spec.within(group)
        if not within:
            return None
        own: list[list[str]] = [[] for _ in range(group.size)]
        local: list[list[Group]] = [[] for _ in range(group.size)]
        for one in within:
            found = [cls._locate(group, place) for place in one.places]
            blocks = {block for _, block, _ in found}
            if len(blocks) != 1:
                raise UsageError(
                    f"the permutation spec: group {one.name!r} must lie within one block of {group.name!r}"
                )
            block = blocks.pop()
            places = tuple(
                Place(str(outer), place.axis, start, place.block)
                for place, (outer, _, start) in zip(one.places, found, strict=True)
            )
            own[block].append(one.name)
            local[block].append(Group(str(len(local[block])), one.size, places))
        if any(one != local[0] for one in local):
            raise UsageError(f"the permutation spec: the blocks of {group.name!r} have unlike groups within them")
        inner = Spec(tuple(local[0]))
        touched = set(inner.tensors())
        pieces = {str(i): place for i, place in enumerate(group.places) if str(i) in touched}
        rest = [place for i, place in enumerate(group.places) if str(i) not in touched]
        return cls(group, inner, own, pieces, rest)

    @staticmethod
    def _locate(group: Group, place: Place) -> tuple[int, int, int]:
        """(which place of the group, which block of it, where in the block) a place within it lies."""
        for number, outer in enumerate(group.places):
            block, start = divmod(place.start - outer.start, outer.block)
            if (place.tensor, place.axis) == (outer.tensor, outer.axis) and 0 <= block < group.size:
                return number, block, start
        raise UsageError(
            f"the permutation spec: a group after {group.name!r} has a place outside it, in {place.tensor!r}"
        )

    def step(self, state: _Descent) -> float:
        """Matches every pair of blocks inside, then the blocks; moves what that says and returns the gain."""
        size = self.group.size
        targets, moved = ([self._block(side, block) for block in range(size)] for side in (state.target, state.moved))
        cost = state.cost(self.group, self.rest)
        now = float(cost.diagonal().sum())
        found: dict[tuple[int, int], dict[str, Tensor]] = {}
        for i in range(size):
            for j in range(size):
                pair = _Descent(self.spec, targets[i], moved[j], self.spec.identity(), state.tolerance)
                if i == j:
                    now += pair.objective()
                done = pair.run(100, None)
                cost[i, j] += done.objective
                found[i, j] = done.permutations
        order = assign(cost)
        gain = float(cost[torch.arange(size), order].sum()) - now
        if gain <= state.least:
            return 0.0
        state.move(self.group, order)
        earlier = dict(state.permutations)
        for i, j in enumerate(order.tolist()):
            for mine, theirs, local in zip(self.own[i], self.own[j], self.spec.groups, strict=True):
                # The groups within block j have come to block i with what they were permuted by.
                state.permutations[mine] = earlier[theirs]
                inner = state.groups[mine]
                state.move(inner, found[i, j][local.name])
        return gain

    def _block(self, side: Mapping[str, Tensor], block: int) -> dict[str, Tensor]:
        return {
            name: side[place.tensor]
            .narrow(place.axis, place.start + block * place.block, place.block)
            .to(torch.float64)
            for name, place in self.pieces.items()
        }
