"""Static representation editing: one constant vector in the final hidden state, the same at every token.

The baseline of "Aligning Large Language Models with Representation Editing", Kong et al., arXiv 2406.05954:
    fit     w = argmin_w  mean (w.(o - mean o) - z)^2 + ridge * s * |w|^2      z the standardised reward of the answer
    decode  o <- o + strength * w / |w|;  draw from softmax(W o)
o [B, D] is the final hidden state, s the mean variance of its coordinates (so `ridge` has no unit). A constant edit of
the last state is a constant logit bias, strength * W w / |w| (`logit_bias`): this is RE-Control with a linear value
function, and what RE-Control has to beat.

The states are the paper's, the one at the end of the prompt: o_1 of every answer. With `states="all"` every state of the
answer is regressed on instead, each token once; needed where all prompts are the same. Neither is better everywhere: at
equal KL the paper's gained more on pocket/base and as much on a small story model.

Cost a token: one addition.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.policy import Cost, Prompt
from trimtab.sampling import Sampling, derive_seed
from trimtab.spec import build
from trimtab.steer.controller import Controller, Origin, origin_of
from trimtab.steer.rollouts import Progress, Rollouts, collect

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.rewards.base import Reward

CHUNK = 1 << 16  # states in float64 at a time

CARD = Card(
    slug="static-re",
    name="Static RE",
    paper="arXiv 2406.05954",
    summary="One constant vector, found by ridge regression, added to the final hidden state at every token.",
    goal="preference",
    stage="steer",
    mechanism="activation-vector",
    signal=("scalar reward",),
    access="hidden states",
    produces="decoder",
    needs=("a local causal language model", "a reward on finished text", "prompts to roll out"),
    infer_multiplier="1",
    fit_cost="rollouts x answer tokens forwarded, one reward call a rollout, one linear solve",
    benefit_metrics=("reward",),
    cost_metrics=("kl_per_token", "nll_base_per_token", "diversity"),
    limits=("one push for every state: it cannot know what the context needs", "beam search is refused"),
    risks=("over-optimisation: large strengths repeat a few favoured tokens",),
    composes_with=("best-of-n",),
    status=("implemented", "verified_cpu"),
    example="trimtab fit static-re pocket/base --reward pocket/reward --prompts prompts.txt --out my-controller",
)


@dataclass(frozen=True)
class StaticREConfig:
    # answers drawn from the model to fit the direction on
    rollouts: int = 4096
    # which states the reward is regressed on: prompt (its last position, as the paper), all (before every answer token)
    states: Literal["prompt", "all"] = "prompt"
    # penalty of the regression, as a share of the states' mean variance
    ridge: float = 0.01
    # seed of the split that measures the regression
    seed: int = 0
    # length of the vector added; not given: tuned to kl_target
    strength: float | None = None
    # nats per token that strength is tuned to where it is not given
    kl_target: float = 0.1

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 <= self.strength < math.inf:
            raise UsageError(f"strength must be 0 or more, not {self.strength}")
        if not 0 <= self.ridge < math.inf or not 0 < self.kl_target < math.inf or self.rollouts < 1:
            raise UsageError("ridge must be 0 or more, kl_target above 0 and rollouts at least 1")


class StaticRE(Controller):
    """`StaticRE(direction, strength=2.0)`: direction [D] is scaled to length 1; strength is the norm of the edit."""

    slug = "static-re"
    Config = StaticREConfig
    DIAL, START = "strength", 1.0
    DECODE = ("strength", "kl_target")

    def __init__(
        self,
        direction: torch.Tensor,
        config: StaticREConfig | None = None,
        origin: Origin | None = None,
        **options: Any,
    ):
        norm = float(direction.float().norm())
        if direction.dim() != 1 or not 0 < norm < math.inf:
            raise UsageError("static-re needs a direction [D] of finite numbers that are not all 0")
        self.direction = direction.float() / norm
        self.config = config or build(self.Config, options, f"method {self.slug!r}")
        self.origin = origin or Origin()

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
        drawn = rollouts or collect(lm, prompts, reward, sampling, config.rollouts, progress=progress)
        start = time.perf_counter()
        direction, metrics = fit_direction(drawn, config)
        cost = drawn.cost + Cost(seconds=time.perf_counter() - start)
        return cls(direction, config, origin_of(lm, reward, prompts, drawn, sampling, cost, metrics))

    def edit(self, hidden: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        if self.strength == 0:
            return hidden
        return (hidden.float() + self.vector.to(hidden.device)).to(hidden.dtype)

    @property
    def vector(self) -> torch.Tensor:
        """What is added to every state, [D] float32."""
        return self.strength * self.direction

    def logit_bias(self, lm: LM) -> torch.Tensor:
        """The same edit as a constant added to the logits, [V] float32: fold it into the output layer's bias.

        Raises `UsageError` for a model that caps its logits: there the change depends on the logit.
        """
        self.check(lm.model)
        if lm.head.cap is not None:
            raise UsageError(
                f"{lm.name} caps its logits: a constant edit of the state is not a constant logit bias there"
            )
        vector = self.vector.to(lm.unembedding.device)
        return lm.head.scale * (lm.unembedding.float() @ vector)

    def check(self, model: Any) -> None:
        super().check(model)
        width = model.get_output_embeddings().weight.shape[1]
        if width != len(self.direction):
            raise UsageError(f"the direction has {len(self.direction)} numbers; this model's hidden size is {width}")

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"direction": self.direction}

    @classmethod
    def restore(cls, config: Any, tensors: dict[str, torch.Tensor], origin: Origin) -> Self:
        direction = tensors.get("direction")
        if direction is None or direction.dim() != 1:
            raise UsageError("the controller's tensors do not fit: direction [D] is missing")
        control = cls(direction, config, origin)
        control.direction = direction  # as saved: scaling it again could move the last bit
        return control


def fit_direction(rollouts: Rollouts, config: StaticREConfig) -> tuple[torch.Tensor, dict[str, float]]:
    """w [D] float32 and how well w.o predicts the reward of answers that were held out (correlation).

    Raises `UsageError` where the states do not vary (one prompt with states="prompt").
    """
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "static-re"))
    train, held = rollouts.split(0.1, generator)
    w = ridge_regression(rollouts.states, *regression_rows(rollouts, train, config.states), config.ridge)
    index, target = regression_rows(rollouts, held, config.states)
    pair = torch.stack([rollouts.states[index] @ w.float(), target.float()])
    varies = pair.shape[1] > 2 and bool((pair.std(1) > 1e-8).all())
    return w.float(), {"correlation_held_out": float(torch.corrcoef(pair)[0, 1]) if varies else 0.0}


def regression_rows(
    rollouts: Rollouts, answers: torch.Tensor, states: Literal["all", "prompt"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the states [m] that some answers [n] are regressed on, and their targets [m] float64."""
    z = rollouts.standardised.double()[answers]
    if states == "prompt":
        return rollouts.offsets[answers], z
    index, mask = rollouts.padded(answers)
    return index[mask], z.repeat_interleave(rollouts.lengths[answers])


def ridge_regression(states: torch.Tensor, index: torch.Tensor, target: torch.Tensor, ridge: float) -> torch.Tensor:
    """w [D] float64 of the centred regression of target [m] on states[index] [m, D]; sums are in float64, by chunks."""
    width = states.shape[1]
    mean = sum((states[part].double().sum(0) for part in index.split(CHUNK)), torch.zeros(width).double()) / len(index)
    gram, moment = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for part, goal in zip(index.split(CHUNK), (target - target.mean()).split(CHUNK), strict=True):
        x = states[part].double() - mean
        gram += x.T @ x / len(index)
        moment += x.T @ goal / len(index)
    variance = float(gram.diagonal().mean())
    if not variance > 1e-12:
        raise UsageError(
            "the hidden states do not vary, so there is no direction to learn: give more prompts, or states=all"
        )
    gram.diagonal().add_(max(ridge, 1e-9) * variance)
    return torch.linalg.solve(gram, moment)
