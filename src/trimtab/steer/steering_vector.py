"""Steering vectors: a contrastive direction added to the output of chosen blocks, at a signed strength.

Papers: "Tradeoffs Between Alignment and Helpfulness in Language Models with Representation Engineering", Wolf et al.,
arXiv 2401.16332; RepE, arXiv 2310.01405; CAA, arXiv 2312.06681.
    fit     v_l from the states of contrasting texts at block l (see `contrast`)
    decode  h_l <- h_l + a_l v_l  at every injected block l, a_l = strength x unit (below)
h_l [B, S, D] is the output of block l, so the edit enters the key-value cache of the blocks above. `trimtab fit` makes
the texts itself: within each prompt, the best of the model's own answers by reward against the worst.

Units of the strength c, with k injected blocks:
    difference  a_l = c x (distance of the two classes' means at l) / k. The default: c = 1 moves the residual stream by
                what separates the good texts from the bad ones, c = 0.5 from the middle to the good side, however many
                blocks share the work; c = 2 overshoots by as much again. It means the same on every model.
    relative    a_l = c x mean |h_l| at each block (the paper's grid: 0.01 to 0.4)
    absolute    a_l = c at each block (the paper's and repeng's coefficient)
Operators: add; piecewise h + sign(h.v) a v; project_out h - (h.v) v; clamp h + (a - h.v) v (sets the component to a; in
the unit difference not divided by k). Every edit is scaled by `share`, which is also the dial of the last two.

Departures from the paper: the mean difference instead of PCA (same direction on planted data, no sign to guess), the
middle third of the blocks instead of a list per model, states read and edited at the same hook, positions told by the
key-value cache and the attention mask instead of position ids. Cost a token: one vector addition a block.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import nn

from trimtab.card import Card
from trimtab.control import Positions
from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint
from trimtab.lm import LM
from trimtab.policy import Cost, Prompt
from trimtab.rewards.base import Reward
from trimtab.sampling import Sampling
from trimtab.spec import build
from trimtab.steer.contrast import Contrast, Directions, Method, Pair, as_pair, contrast, rank_pairs
from trimtab.steer.controller import Controller, Origin, StrongEdit, origin_of
from trimtab.steer.layers import (
    Read,
    Span,
    Where,
    block_width,
    edit_output,
    find_blocks,
    resolve_layers,
    text_config,
)
from trimtab.steer.rollouts import Progress, Rollouts, collect

CARD = Card(
    slug="steering-vector",
    name="Steering vector",
    paper="arXiv 2401.16332",
    summary="A contrastive direction added to the output of chosen blocks, from pairs of texts or from a reward.",
    goal="preference",
    stage="steer",
    mechanism="activation-vector",
    signal=("pairs", "scalar reward"),
    access="hidden states",
    produces="decoder",
    needs=("a local causal language model", "8 contrasting pairs or more, or a reward and prompts to roll out"),
    infer_multiplier="1",
    fit_cost="both texts of each pair forwarded once; from a reward also the rollouts, one reward call each",
    benefit_metrics=("reward",),
    cost_metrics=("kl_per_token", "nll_base_per_token", "diversity"),
    limits=("one constant push: it does not look at the answer", "beam search and compiled graphs are refused"),
    risks=(
        "capability falls with the square of the strength: chart it (trimtab.steer.tradeoff)",
        "from a reward it learns how good answers read, which need not be what makes the model begin one: check the reward",
    ),
    composes_with=("best-of-n", "re-control", "natural-control"),
    data_format="prompts, or (positive, negative) texts",
    status=("implemented", "verified_cpu"),
    example="trimtab fit steering-vector pocket/base --reward pocket/reward --prompts prompts.txt --out my-vector",
)


@dataclass(frozen=True)
class SteeringVectorConfig:
    # how the direction is found: mean_diff, pca_paired, pca_shuffled (RepE), logistic, random (the control)
    method: Method = "mean_diff"
    # where a text is read: the mean over the answer's tokens, or its last token (what the paper does, and from_pairs)
    read: Read = "mean"
    # answers drawn from the model where the pairs come from a reward
    rollouts: int = 2048
    # of each prompt's answers, the share that counts as best and as worst
    contrast: float = 0.25
    # seed of the fit
    seed: int = 0
    # path of the list of blocks in the model, where it is not found by itself (model.layers)
    blocks: str = ""
    # blocks to inject at, numbered from 0 (negative: from the end); none: the middle third
    layers: tuple[int, ...] = ()
    # what strength 1 means: difference of the class means (shared by the blocks), relative to |h|, or absolute
    unit: Literal["difference", "relative", "absolute"] = "difference"
    # c, the signed coefficient; not given: tuned to kl_target
    strength: float | None = None
    # nats per token that strength is tuned to where it is not given
    kl_target: float = 0.1
    # add; piecewise (along the side h is on); project_out (removes the direction); clamp (sets the component)
    operator: Literal["add", "piecewise", "project_out", "clamp"] = "add"
    # positions that are edited; response begins at the prompt's last position, from which the first token is drawn
    positions: Where = "all"
    # fraction of the edit that is made (the dial of project_out and clamp)
    share: float = 1.0
    # rescale every edited state to its norm before the edit
    renorm: bool = False

    def __post_init__(self) -> None:
        if self.strength is not None and not math.isfinite(self.strength):
            raise UsageError(f"strength must be a finite number, not {self.strength}")
        if not 0 < self.contrast <= 0.5 or self.rollouts < 1 or not self.kl_target > 0:
            raise UsageError("contrast in (0, 0.5], rollouts of 1 or more and kl_target above 0 are needed")
        if not 0 <= self.share < math.inf:
            raise UsageError(f"share must be 0 or more, not {self.share}")
        if self.operator == "clamp" and self.strength is None:
            raise UsageError("clamp sets the component to the strength: give one")


class SteeringVector(Controller):
    """One direction per block and where to add it. Vectors of one model add, subtract and scale: `2 * a - b`."""

    slug = "steering-vector"
    final = False
    Config = SteeringVectorConfig
    DECODE = ("layers", "unit", "strength", "kl_target", "operator", "positions", "share", "renorm")

    def __init__(
        self,
        directions: Directions,
        config: SteeringVectorConfig | None = None,
        origin: Origin | None = None,
        family: str = "",
        **options: Any,
    ):
        config = config or self.Config(**options)
        self.directions, self.origin, self.family = directions, origin or Origin(), family
        self.config = replace(config, layers=resolve_layers(config.layers, len(directions)))

    # fitting

    @classmethod
    def learn(
        cls,
        lm: LM,
        prompts: Sequence[Prompt],
        reward: Reward,
        sampling: Sampling,
        config: Any,
        rollouts: Rollouts | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Pairs from rollouts: the best answers to each prompt against its worst, by reward."""
        drawn = rollouts or collect(lm, prompts, reward, sampling, config.rollouts, progress=progress)
        start = time.perf_counter()
        chosen = rank_pairs(drawn.rewards, drawn.prompt_index, config.contrast)
        if not chosen:
            raise UsageError(
                f"no prompt has two answers of different reward among {len(drawn)}: draw more, or give fewer prompts"
            )
        texts = lm.encode(prompts)
        heads = [texts[int(drawn.prompt_index[best])] for best, _ in chosen]
        best, worst = ([drawn.tokens[pair[side]] for pair in chosen] for side in (0, 1))
        found = contrast(lm, heads, best, worst, config.method, config.read, config.seed, config.blocks)
        cost = drawn.cost + Cost({lm.name: found.tokens_forwarded}, 0, time.perf_counter() - start)
        return cls._of(lm, found, config, origin_of(lm, reward, prompts, drawn, sampling, cost, {}))

    @classmethod
    def from_pairs(
        cls,
        lm: LM,
        pairs: Sequence[Pair | Sequence[Any]],
        config: SteeringVectorConfig | None = None,
        **options: Any,
    ) -> Self:
        """From (positive, negative) texts, taken as they are, or (prompt, positive answer, negative answer).

        Reads the last token by default (`read="mean"`: the mean over the text or the answer). Raises `UsageError` for
        fewer than 8 usable pairs and for a block of `layers` at which the classes do not differ.
        """
        start = time.perf_counter()
        config = config or build(cls.Config, {"read": "last", **options}, f"method {cls.slug!r}")
        given = [as_pair(pair, number) for number, pair in enumerate(pairs)]
        heads = [[] if pair.prompt is None else lm.encode([pair.prompt])[0] for pair in given]
        answers = [bool(head) for head in heads]
        positive = [_text_ids(lm, pair.positive, answer) for pair, answer in zip(given, answers, strict=True)]
        negative = [_text_ids(lm, pair.negative, answer) for pair, answer in zip(given, answers, strict=True)]
        found = contrast(lm, heads, positive, negative, config.method, config.read, config.seed, config.blocks)
        origin = Origin(
            model=lm.name,
            fingerprint=lm.fingerprint,
            reward=f"{len(given)} contrast pairs",
            fit_seconds=time.perf_counter() - start,
            fit_tokens=found.tokens_forwarded,
        )
        return cls._of(lm, found, config, origin)

    @classmethod
    def _of(cls, lm: LM, found: Contrast, config: SteeringVectorConfig, origin: Origin) -> Self:
        out = cls(found.directions, config, origin, str(text_config(lm.model).model_type))
        out._refuse_zero()
        accuracy = float(found.directions.accuracy[list(out.layers)].mean())
        out.origin = replace(
            origin,
            hidden_size=block_width(lm.model),
            metrics={**found.metrics, "pair_accuracy": accuracy},
            warnings=[*origin.warnings, *found.warnings],
        )
        return out

    def ready(self, lm: LM, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None) -> Self:
        if self.config.operator == "project_out" and self.config.strength is None:
            return self.but(strength=1.0)  # it has no size to tune
        return super().ready(lm, prompts, sampling, progress)

    @classmethod
    def from_vectors(cls, vectors: dict[int, torch.Tensor], count: int, family: str = "", **options: Any) -> Self:
        """From given vectors [D] by block number, in a model of `count` blocks; strength 1 (the default) adds them."""
        layers = tuple(vectors)
        width = len(next(iter(vectors.values())))
        numbers = resolve_layers(layers, count)
        found = Directions(torch.zeros(count, width), *torch.zeros(3, count).unbind())
        for layer, vector in vectors.items():
            norm = vector.double().norm()
            found.direction[layer] = (vector.double() / norm.clamp(min=1e-300)).float()
            found.difference[layer] = norm * len(numbers)
        return cls(
            found, origin=Origin(hidden_size=width), family=family, **{"strength": 1.0, "layers": layers, **options}
        )

    # what it is

    @property
    def layers(self) -> tuple[int, ...]:
        """Injected blocks, numbered from 0."""
        return self.config.layers

    @property
    def pair_accuracy(self) -> dict[int, float]:
        """Held-out pair accuracy of every block: the cheap sign of which blocks to use."""
        return dict(enumerate(self.directions.accuracy.tolist()))

    def amount(self, layer: int) -> float:
        """a_l, the signed length of the edit at a block."""
        c = self.config
        if c.operator == "project_out":
            return 0.0
        if c.unit == "absolute":
            return self.strength
        if c.unit == "relative":
            if not float(self.directions.norm[layer]) > 0:
                raise UsageError("unit=relative needs the blocks' norms, which vectors given by hand do not have")
            return self.strength * float(self.directions.norm[layer])
        shared = 1 if c.operator == "clamp" else len(self.layers)
        return self.strength * float(self.directions.difference[layer]) / shared

    def vectors(self) -> dict[int, torch.Tensor]:
        """What is added at each injected block, [D]; raises `UsageError` where the edit is not a constant."""
        if self.config.operator != "add" or self.config.renorm:
            raise UsageError("only operator=add without renorm adds a constant vector")
        return {
            layer: self.config.share * self.amount(layer) * self.directions.direction[layer] for layer in self.layers
        }

    def __add__(self, other: SteeringVector) -> Self:
        """Both edits at once; the sum has strength 1."""
        if (self.config.positions, len(self.directions)) != (other.config.positions, len(other.directions)):
            raise UsageError("vectors add when they edit the same positions of models with equally many blocks")
        if self.origin.fingerprint and other.origin.fingerprint and self.family != other.family:
            raise UsageError(f"a {self.family} vector and a {other.family} vector do not add")
        mine, theirs = self.vectors(), other.vectors()
        total = {
            layer: sum((part[layer] for part in (mine, theirs) if layer in part), torch.zeros(()))
            for layer in sorted({*mine, *theirs})
        }
        options = {"positions": self.config.positions, "blocks": self.config.blocks}
        out = self.from_vectors(total, len(self.directions), self.family, **options)
        out.directions.norm, out.origin = self.directions.norm, replace(self.origin, metrics={})
        return out

    def __mul__(self, factor: float) -> Self:
        return self.but(strength=self.strength * factor)

    __rmul__ = __mul__

    def __neg__(self) -> Self:
        return self * -1

    def __sub__(self, other: SteeringVector) -> Self:
        return self + -other

    def scaled(self, factor: float) -> Self:
        if self.config.operator in ("project_out", "clamp"):
            return self.but(share=self.config.share * factor)
        return super().scaled(factor)

    def but(self, **changes: Any) -> Self:
        out = super().but(**changes)
        out.config = replace(out.config, layers=resolve_layers(out.config.layers, len(self.directions)))
        if "layers" in changes:
            out._refuse_zero()
        return out

    def _refuse_zero(self) -> None:
        for layer in self.layers:
            if not float(self.directions.direction[layer].norm()) > 0:
                raise UsageError(f"block {layer} shows no difference between the two classes: choose other layers")

    # editing

    def apply(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        """The edit of block `layer`'s output, [..., D] -> [..., D], in the model's dtype."""
        c = self.config
        v = self.directions.direction[layer].to(hidden.device)
        if c.operator == "add":
            edited = hidden + (c.share * self.amount(layer) * v).to(hidden.dtype)
        else:
            h = hidden.float()
            along = (h * v).sum(-1, keepdim=True)
            if c.operator == "piecewise":
                length = along.sign() * self.amount(layer)
            else:
                length = self.amount(layer) - along
            edited = (h + c.share * length * v).to(hidden.dtype)
        if c.renorm:
            before, after = hidden.float().norm(dim=-1, keepdim=True), edited.float().norm(dim=-1, keepdim=True)
            edited = (edited.float() * (before / after.clamp(min=1e-12))).to(hidden.dtype)
        return edited

    def hooks(self, model: nn.Module, positions: Positions) -> Iterator[Any]:
        """Hooks on the injected blocks. Which positions are edited is `config.positions`, not `positions`."""
        sets = self.config.operator in ("project_out", "clamp")
        if self.config.share == 0 or not sets and self.strength == 0:
            return
        blocks = find_blocks(model, self.config.blocks)
        span = Span(self.config.positions)
        if self.config.positions != "all":
            yield model.base_model.register_forward_pre_hook(span.pre_hook, with_kwargs=True)  # type: ignore[operator, union-attr]
        for layer in self.layers:

            def edit(hidden: torch.Tensor, layer: int = layer) -> torch.Tensor:
                return span.pick(self.apply(hidden, layer), hidden)

            yield edit_output(blocks[layer], edit)

    def check(self, model: nn.Module) -> None:
        """Width, blocks and model family must be those of the fit; other weights of the same shape are warned of."""
        width, count = block_width(model), len(find_blocks(model, self.config.blocks))
        family, made = str(text_config(model).model_type), self.origin
        theirs = (self.directions.direction.shape[1], len(self.directions), self.family or family)
        if theirs != (width, count, family):
            raise UsageError(
                f"this steering vector was made for {made.model or 'a model'} ({theirs[2]}, {theirs[1]} blocks of "
                f"width {theirs[0]}); this model is {family} with {count} blocks of width {width}: fit a new one"
            )
        if self._warned:
            return
        if made.fingerprint and fingerprint(model) != made.fingerprint:
            self._warned = True
            warnings.warn(
                f"this steering vector was made for {made.model} (weights {made.fingerprint}); this model has the same "
                f"shape and other weights ({fingerprint(model)}): check that it still steers",
                stacklevel=2,
            )
        for layer in self.layers if self.config.strength is not None else ():
            share = self.config.share * abs(self.amount(layer)) / max(float(self.directions.norm[layer]), 1e-12)
            if share > 1 and float(self.directions.norm[layer]) > 0:
                self._warned = True
                said = f"the edit of block {layer} is {share:.1f} times as long as its states"
                warnings.warn(f"{self.slug}: {said}: expect broken text, lower strength", StrongEdit, stacklevel=2)
                return

    def trace(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """Nothing: the edit is made inside the blocks and does not depend on the final state."""
        return {}

    # on disk

    def tensors(self) -> dict[str, torch.Tensor]:
        found = self.directions
        out = {f"direction.{layer}": vector for layer, vector in enumerate(found.direction)}
        out |= {"difference": found.difference, "norm": found.norm, "accuracy": found.accuracy}
        return out | {"family": torch.tensor(list(self.family.encode()), dtype=torch.uint8)}

    @classmethod
    def restore(cls, config: Any, tensors: dict[str, torch.Tensor], origin: Origin) -> Self:
        names = ["difference", "norm", "accuracy", "family"]
        missing = [name for name in names if name not in tensors]
        count = len(tensors.get("difference", ()))
        rows = [tensors[name] for layer in range(count) if (name := f"direction.{layer}") in tensors]
        if missing or not rows or len(rows) != count or any(row.shape != (origin.hidden_size,) for row in rows):
            raise UsageError(
                f"the steering vector's tensors do not fit: {missing or f'{len(rows)} directions for {count} blocks'}"
            )
        found = Directions(torch.stack(rows), tensors["difference"], tensors["norm"], tensors["accuracy"])
        return cls(found, config, origin, bytes(tensors["family"].tolist()).decode())


def _text_ids(lm: LM, text: str, continues: bool) -> list[int]:
    """Token ids of a text as it is, without a chat template; of an answer (`continues`) without special tokens."""
    ids = list(lm.tokenizer(text, add_special_tokens=not continues)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] in lm.eos_ids else ids
