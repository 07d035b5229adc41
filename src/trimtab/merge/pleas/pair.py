"""Two modules, matched and measured once, merged at any size: what `trimtab.merge.pleas.pleas` describes, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.merge.align.path import has_batch_norm, reestimate
from trimtab.merge.align.permutation import Permutations, Spec
from trimtab.merge.pleas.blocks import Units, axis_units, block_start, match_scores, padded, split
from trimtab.merge.pleas.layers import (
    CONVOLUTIONS,
    Batch,
    aliases,
    as_batches,
    collect,
    evaluating,
    held,
    layer_names,
    mixed,
    owners,
    renamed,
    shares,
    weight_axes,
    weight_of,
)
from trimtab.merge.pleas.least_squares import Fitted, Moments, fit, unfolded
from trimtab.merge.pleas.modules import LayerError, Merged, head_layer, layer_costs, resize
from trimtab.merge.pleas.size_budget import Budget, check_target, ratios

if TYPE_CHECKING:
    from trimtab.merge.pleas.pleas import PleasConfig


class Pair:
    """Two modules of one architecture, matched; merges of any size share one pass over the inputs.

    spec: groups of units under the names of `a.state_dict()` (`trimtab.merge.align.module_specs.module_spec` finds them).
    inputs: a tensor [N, ...], a list of batches, or a mapping of either by domain. permutations: of B's units; None: matched
    here. scores: how well each pair of units matches, [n] a group; None: by weights. widen: names of the groups that may be
    widened; None: all that can be. Both models run in evaluation mode and are left as they are.

    UsageError: other tensors or shapes, no inputs, activations that are not finite, grouped convolutions.
    """

    def __init__(
        self,
        a: nn.Module,
        b: nn.Module,
        spec: Spec,
        inputs: Any,
        config: PleasConfig,
        permutations: Permutations | None = None,
        scores: Mapping[str, Tensor] | None = None,
        widen: set[str] | None = None,
    ) -> None:
        self.a, self.b, self.config = a, b, config
        self.names = aliases(a)
        self.spec = renamed(spec, self.names)
        self.matched_on = self.spec  # without heads that are not matched
        self.batches = as_batches(inputs)
        self.shares = shares(self.batches)
        self.layers = layer_names(a)
        self.head = head_layer(a, self.batches[0], self.layers, config.heads == "separate")
        tensors_a, tensors_b = self._tensors()
        self.matched_on.check({name: tuple(tensor.shape) for name, tensor in tensors_a.items()})
        self.held = held(self.spec, a)
        self.wide = [
            group.name
            for group in self.spec.groups
            if group.name not in self.held and (widen is None or group.name in widen)
        ]
        if permutations is None:
            permutations, scores = self._matched(tensors_a, tensors_b, scores)
        self.permutations = {**self.spec.identity(), **permutations}
        self.scores = (
            dict(scores)
            if scores is not None
            else match_scores(self.matched_on, self.permutations, tensors_a, tensors_b)
        )
        self.tied = {name for name in self.layers if list(self.names.values()).count(self.names[f"{name}.weight"]) > 1}
        self.fitted = [
            name
            for name in self.layers
            if name not in self.tied and not (config.heads == "separate" and name == self.head)
        ]
        self._moments: dict[str, Moments] = {}
        self.budget = self._budget()
        self.warnings = self._warnings()

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The parents' tensors by first name, without a separate head's. UsageError where they differ."""
        out = []
        for model in (self.a, self.b):
            state = model.state_dict()
            out.append(
                {name: state[name].detach().cpu() for name in dict.fromkeys(self.names.values()) if name in state}
            )
        a, b = out
        apart = {f"{self.head}.weight", f"{self.head}.bias"}
        missing = {*self.a.state_dict()} ^ {*self.b.state_dict()}
        if missing:
            raise UsageError(f"the models are not of one architecture: only one of them has {min(missing)!r}")
        for name in a:
            if a[name].shape != b[name].shape and not (name in apart and self.config.heads == "separate"):
                more = (
                    ': they tell other classes apart: heads="separate" keeps both heads'
                    if name in apart and a[name].shape[1:] == b[name].shape[1:]
                    else ": PLeaS merges models of one architecture and size"
                )
                raise UsageError(
                    f"{name!r} has the shape {tuple(a[name].shape)} in A and {tuple(b[name].shape)} in B{more}"
                )
        if self.config.heads == "separate":
            a, b = ({name: tensor for name, tensor in one.items() if name not in apart} for one in (a, b))
            self.matched_on = Spec(
                tuple(
                    replace(group, places=tuple(place for place in group.places if place.tensor not in apart))
                    for group in self.spec.groups
                )
            )
        for name, tensors in (("A", a), ("B", b)):
            for key, tensor in tensors.items():
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    raise UsageError(f"{name} has weights that are not finite numbers, first in {key!r}")
        return a, b

    def _matched(
        self, a: dict[str, Tensor], b: dict[str, Tensor], scores: Mapping[str, Tensor] | None
    ) -> tuple[Permutations, Mapping[str, Tensor] | None]:
        from trimtab.merge.align.matching import match

        if self.config.match == "am":
            from trimtab.merge.align.activations import collect as values_of
            from trimtab.merge.align.activations import sites

            shown = sites(self.spec, self.a)
            values = [
                values_of(
                    model, shown.tensors(), self.batches, rows=min(self.config.rows, 4096), forward=_run, keep=_real
                )
                for model in (self.a, self.b)
            ]
            found = match(shown, *values, seed=self.config.seed).permutations
            by_weights = match_scores(self.matched_on, {**self.spec.identity(), **found}, a, b)
            own = {**by_weights, **match_scores(shown, found, *values)}
            return found, own if scores is None else scores
        return match(self.matched_on, a, b, seed=self.config.seed).permutations, scores

    def _budget(self) -> Budget:
        sizes = {group.name: group.size for group in self.spec.groups if group.name in self.wide}
        left_out = {f"{self.head}.weight", f"{self.head}.bias"} if self.config.heads == "separate" else set()
        return Budget(tuple(layer_costs(self.a, self.spec, self.batches[0], sizes, left_out)), sizes)

    def _warnings(self) -> list[str]:
        found = []
        if len(self.shares) == 1 and "" not in self.shares:
            found.append(
                f"all inputs are of one domain ({min(self.shares)}): if it is one parent's alone, the layers are fitted to "
                "that one; give both, each by itself"
            )
        if len(self.shares) > 1 and min(self.shares.values()) < 0.1:
            told = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
            found.append(f"the inputs are nearly all of one domain ({told}): the layers are fitted to that one")
        fewest = sum(batch.size for batch in self.batches)
        linear = [name for name in self.fitted if not isinstance(self.a.get_submodule(name), CONVOLUTIONS)]
        widest = max((weight_of(self.a, name).numel() // self._outputs(name) for name in linear), default=0)
        if fewest < widest:
            found.append(
                f"{fewest} inputs for layers that read up to {widest} values: what they leave open stays at the block average"
            )
        if has_batch_norm(self.a) and not self.config.statistics:
            found.append(
                "batch norms keep the mean of the parents' statistics, which are not the merged model's (statistics=0)"
            )
        return found

    # Sizes

    def ratios(
        self, budget: float, scheme: str | None = None, gains: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """The share of each group to keep apart. gains: w_g for the scheme "qp"; None: probed."""
        scheme = scheme or self.config.scheme
        scheme = "qp" if scheme == "auto" else scheme
        check_target(budget)
        if scheme == "qp" and gains is None and 1.0 < budget < self.budget.most:
            gains = self.gains()
        return ratios(self.budget, budget, scheme, gains, self.config.seed)

    def gains(self, evaluate: Callable[[Merged], float] | None = None) -> dict[str, float]:
        """w_g: what keeping group g alone apart adds, and what merging it alone takes, meaned.

        evaluate: how good a merged model is; None: `nearness`. It takes 2 G + 2 merges for G groups.
        """
        evaluate = evaluate or self.nearness
        sizes = self.budget.sizes
        none, every = evaluate(self.build({})), evaluate(self.build(sizes))
        found = {}
        for name, size in sizes.items():
            alone = evaluate(self.build({name: size})) - none
            without = every - evaluate(self.build({**sizes, name: 0}))
            found[name] = (alone + without) / 2
        return found

    def nearness(self, merged: Merged, batches: int = 4) -> float:
        """Minus the squared distance of the merged model's outputs to the parents' mean outputs, relative to their size.

        With separate heads: of each task's outputs to its own parent's. All domains take part, padding none.
        """
        wrong = power = 0.0
        with evaluating(self.a, self.b, merged.model):
            for batch in mixed(self.batches)[:batches]:
                said = [_logits(model(*batch.args, **batch.kwargs)) for model in (self.a, self.b)]
                if self.config.heads == "shared":
                    pairs = [(_logits(merged.model(*batch.args, **batch.kwargs)), (said[0] + said[1]) / 2)]
                else:
                    pairs = [
                        (merged.task(side)(*batch.args, **batch.kwargs), y) for side, y in zip("ab", said, strict=True)
                    ]
                for ours, theirs in pairs:
                    if batch.keep is not None:
                        ours, theirs = (one[batch.keep.to(one.device)] for one in (ours, theirs))
                    wrong += float((ours - theirs).double().square().sum())
                    power += float(theirs.double().square().sum())
        return -wrong / max(power, 1e-300)

    # Merging

    def merge(
        self, budget: float | None = None, scheme: str | None = None, gains: Mapping[str, float] | None = None
    ) -> Merged:
        """The merged model within a budget (None: the config's)."""
        budget = self.config.budget if budget is None else budget
        separate = self.budget.separate(self.ratios(budget, scheme, gains), budget)
        merged = self.build(separate)
        if budget > self.budget.most + 1e-9:
            merged.warnings.append(f"everything that can be kept apart is, at {self.budget.most:.3f} times one model")
        return merged

    def build(self, separate: Mapping[str, int], refit: bool = True, width: int = 0) -> Merged:
        """The merged model with so many units of each group kept apart.

        refit=False: the block average alone. width: narrower groups are padded with zero units to this width.
        """
        groups = {group.name: group for group in self.spec.groups}
        splits = {}
        for name, count in separate.items():
            if name not in self.wide:
                raise UsageError(f"group {name!r} cannot be widened: {self.held.get(name, 'it is not to be')}")
            if count or name in self.wide:
                splits[name] = split(self.permutations[groups[name].name], self.scores[name], count)
        for name in self.wide:
            splits.setdefault(name, split(self.permutations[name], self.scores[name], 0))
        splits = {name: padded(one, width) for name, one in splits.items()}
        tensors, axes = self._start(splits)
        fits: dict[str, LayerError] = {}
        if refit:
            for name, found in self._fits(axes, tensors):
                fits[name] = LayerError.of(found)
        model = copy.deepcopy(self.a)
        features = None
        if self.config.heads == "separate":
            features = axes[f"{self.head}.weight"][1]
        resize(model, tensors, self.names, None if features is None else self.head)
        everything = all(separate.get(name, 0) == self.budget.sizes[name] for name in self.wide) and bool(self.wide)
        again = [] if everything or not has_batch_norm(model) else mixed(self.batches)[: self.config.statistics]
        if again:
            reestimate(model, again, _run)
        dense = sum(t.numel() for t in tensors.values()) / sum(t.numel() for t in self._sizes())
        heads = (self.a.get_submodule(self.head), self.b.get_submodule(self.head)) if features is not None else None
        return Merged(
            model, {name: int(separate.get(name, 0)) for name in self.wide}, dict(self.budget.sizes),
            self.budget.count(separate) / self.budget.base, dense, fits, dict(self.shares), dict(self.held), len(again),
            list(self.warnings), features, heads,
        )  # fmt: skip

    def _sizes(self) -> list[Tensor]:
        apart = {f"{self.head}.weight", f"{self.head}.bias"} if self.config.heads == "separate" else set()
        state = self.a.state_dict()
        return [state[name] for name in dict.fromkeys(self.names.values()) if name in state and name not in apart]

    def _start(self, splits: Mapping[str, Units]) -> tuple[dict[str, Tensor], dict[str, list[Units]]]:
        """Every tensor's block average, in float32 or wider, and the units of its axes."""
        state_a, state_b = self.a.state_dict(), self.b.state_dict()
        touched = {place.tensor for group in self.spec.groups for place in group.places}
        owner = owners(self.a)
        apart = {f"{self.head}.weight", f"{self.head}.bias"} if self.config.heads == "separate" else set()
        tensors: dict[str, Tensor] = {}
        axes: dict[str, list[Units]] = {}
        for name in dict.fromkeys(self.names.values()):
            if name not in state_a:
                continue
            one, two = state_a[name].detach().cpu(), state_b[name].detach().cpu()
            axes[name] = [
                axis_units(self.spec, splits, self.permutations, name, axis, size)
                for axis, size in enumerate(one.shape)
            ]
            if name in apart:
                continue
            if not one.is_floating_point():
                tensors[name] = one.clone()
                continue
            one, two = (t if t.dtype == torch.float64 else t.to(torch.float32) for t in (one, two))
            out_axis = weight_axes(owner[name])[0] if name.endswith("weight") and one.dim() > 1 else 0
            out_axis = 1 if isinstance(owner[name], nn.Embedding) else out_axis
            tensors[name] = block_start(one, two, axes[name] if name in touched else [None] * one.dim(), out_axis)
        return tensors, axes

    def _fits(self, axes: dict[str, list[Units]], tensors: dict[str, Tensor]) -> Iterator[tuple[str, Fitted]]:
        """Fits layer after layer; puts the solved weights into `tensors`."""
        for names in self._chunks():
            found = self._collected(names)
            for name in names:
                layer = self.a.get_submodule(name)
                weight, bias = self.names[f"{name}.weight"], self.names.get(f"{name}.bias")
                out_axis, in_axis = weight_axes(layer)
                start = tensors[weight].movedim(out_axis, 0)
                start_bias = tensors[bias] if bias is not None else None
                columns = unfolded(axes[weight][in_axis], layer)
                one = fit(
                    found[name], axes[weight][out_axis], columns, start.flatten(1), start_bias, self.config.ridge,
                    self.config.targets,
                )  # fmt: skip
                tensors[weight] = one.weight.to(start.dtype).view(start.shape).movedim(0, out_axis).contiguous()
                if bias is not None and one.bias is not None:
                    tensors[bias] = one.bias.to(start.dtype)
                yield name, one

    def _outputs(self, name: str) -> int:
        """A layer's number of outputs."""
        return weight_of(self.a, name).shape[weight_axes(self.a.get_submodule(name))[0]]

    def _chunks(self) -> list[list[str]]:
        """Layers whose statistics fit in memory together."""
        chunks: list[list[str]] = [[]]
        size = 0
        for name in self.fitted:
            outputs = self._outputs(name)
            need = Moments.nbytes(weight_of(self.a, name).numel() // outputs, outputs)
            if chunks[-1] and size + need > self.config.memory:
                chunks.append([])
                size = 0
            chunks[-1].append(name)
            size += need
        return [chunk for chunk in chunks if chunk]

    def _collected(self, names: list[str]) -> dict[str, Moments]:
        if all(name in self._moments for name in names):
            return self._moments
        matched = {}
        for name in names:
            axis = weight_axes(self.a.get_submodule(name))[0]
            weight = self.names[f"{name}.weight"]
            matched[name] = axis_units(self.spec, {}, self.permutations, weight, axis, self._outputs(name)).b
        config = self.config
        found = collect(self.a, self.b, names, self.batches, matched, config.rows, config.seed)
        if len(names) == len(self.fitted):
            self._moments = found
        return found


def _run(model: nn.Module, batch: Batch) -> Any:
    return model(*batch.args, **batch.kwargs)


def _real(batch: Batch) -> Tensor | None:
    return batch.keep


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    return found if isinstance(found, Tensor) else found[0]
