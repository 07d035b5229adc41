"""The trade-off curve of a steering vector: what each strength buys, what it costs, and which strength to take.

    curve = trade_off(lm, vector, strengths=(-2, -1, 0, 1, 2), behaviour=balance(prompts, " yes", " no"),
                      capability=multiple_choice(items), texts=neutral)
    curve.fit_behaviour(); curve.fit_capability(); curve.recommend(tolerance=0.02)

A measurement is a function of (lm, control) that gives one number a prompt, so every figure has an interval over
prompts. The ready-made ones are exact (next-token probabilities), not sampled. Perplexity is kept as nats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trimtab.control import Control
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.measure.stats import Interval, mean_interval, paired_difference
from trimtab.policy import Prompt
from trimtab.steer.laws import Array, QuadraticFit, TanhFit, fit_behaviour, fit_quadratic
from trimtab.steer.layers import find_blocks, watching
from trimtab.steer.steering_vector import SteeringVector

Measure = Callable[[LM, Control | None], npt.ArrayLike]
FEW_ITEMS = 100  # below this an interval is usually wider than 2 points
MOST_NORM, MOST_NATS = 2.0, float(np.log(10))


@dataclass(frozen=True)
class Choice:
    """A question, its options as text (told apart by their first token) and the number of the right one."""

    prompt: Prompt
    options: Sequence[str]
    right: int


@dataclass(frozen=True)
class Recommendation:
    """A strength, the gain of behaviour and the drop of capability there against strength 0, and what to know."""

    strength: float
    gain: Interval
    drop: Interval
    notes: tuple[str, ...]


@dataclass
class Curve:
    """Measurements at S strengths, one column a prompt, question or text.

    strengths [S]; behaviour [S, P] in [-1, 1]; capability [S, Q] in [0, 1]; nll [S, T] nats per token of the neutral
    texts; change [S] mean norm of the change of the final hidden state (near linear in |c| while small); noise [S] mean
    over positions of the standard deviation over tokens of the change of their logits (the law's |c| sigma);
    norm_ratio [S] of the last block's output's mean norm to the unsteered one. The last four are empty without texts.
    """

    strengths: Array
    behaviour: Array
    capability: Array
    nll: Array
    change: Array
    noise: Array
    norm_ratio: Array
    warnings: list[str] = field(default_factory=list)

    def fit_behaviour(self, seed: int = 0) -> TanhFit:
        """The tanh law of the behaviour."""
        return fit_behaviour(self.strengths, self.behaviour, seed)

    def fit_capability(self, c_max: float | None = None, symmetric: bool = True, seed: int = 0) -> QuadraticFit:
        """The quadratic law of the capability."""
        return fit_quadratic(self.strengths, self.capability, c_max, symmetric, seed)

    def fit_nll(self, c_max: float | None = None, symmetric: bool = True, seed: int = 0) -> QuadraticFit:
        """The quadratic law of the neutral texts' NLL, nats per token."""
        return fit_quadratic(self.strengths, self.nll, c_max, symmetric, seed)

    def recommend(self, tolerance: float = 0.02, weight: float | None = None, sign: int = 1) -> Recommendation:
        """The largest strength whose capability drop stays within `tolerance`, by the upper end of its interval.

        Every smaller strength of the grid must stay within it too. weight: take the strength with the largest
        gain - weight x drop instead. sign: -1 looks among the negative strengths. Strength 0 where none is good.
        """
        zero = _at_zero(self.strengths)
        order = sorted((i for i in range(len(self.strengths)) if self.strengths[i] * sign > 0), key=self._size)
        chosen = zero
        if weight is not None:
            means = self.behaviour.mean(1) * sign - weight * (self.capability[zero].mean() - self.capability.mean(1))
            chosen = max([zero, *order], key=lambda i: float(means[i]))
        else:
            for i in order:
                drop = _difference(self.capability[zero], self.capability[i])
                if drop.mean is None or (drop.mean if drop.high is None else drop.high) > tolerance:
                    break
                chosen = i
        notes = list(self.warnings)
        items = self.capability.shape[1]
        drop = _difference(self.capability[zero], self.capability[chosen])
        if items < FEW_ITEMS:
            interval = "undefined" if drop.low is None else f"{drop.low:.3g} to {drop.high:.3g}"
            notes.append(f"{items} capability items cannot resolve a 2-point drop (interval of the drop: {interval})")
        if chosen == zero:
            notes.append("no strength of the grid stays within the tolerance: try smaller ones")
        gain = _difference(self.behaviour[chosen], self.behaviour[zero])
        return Recommendation(float(self.strengths[chosen]), gain, drop, tuple(notes))

    def table(self) -> list[dict[str, Any]]:
        """One row a strength: behaviour, capability and NLL with their intervals."""
        columns = {"behaviour": self.behaviour, "capability": self.capability, "nll": self.nll}
        return [
            {"strength": float(c)}
            | {key: mean_interval(values[i]).to_dict() for key, values in columns.items() if values.size}
            for i, c in enumerate(self.strengths)
        ]

    def _size(self, i: int) -> float:
        return abs(float(self.strengths[i]))


def trade_off(
    lm: LM,
    vector: SteeringVector,
    strengths: Sequence[float],
    behaviour: Measure,
    capability: Measure,
    texts: Sequence[str] = (),
) -> Curve:
    """Measure a vector at each strength of the grid (0 is added; give both signs to see the quadratic part)."""
    grid = sorted({0.0, *(float(c) for c in strengths)})
    controls = [vector.but(strength=c) if c else None for c in grid]
    rows = [np.asarray(behaviour(lm, control), dtype=np.float64) for control in controls]
    skill = [np.asarray(capability(lm, control), dtype=np.float64) for control in controls]
    empty = np.zeros(0)
    curve = Curve(np.array(grid), np.stack(rows), np.stack(skill), empty, empty, empty, empty)
    if texts:
        found = _neutral(lm, controls, grid.index(0.0), texts, vector.config.blocks)
        curve.nll, curve.change, curve.noise, curve.norm_ratio = found
        base = curve.nll.mean(1)[grid.index(0.0)]
        for c, ratio, nll in zip(grid, curve.norm_ratio, curve.nll.mean(1), strict=True):
            if not 1 / MOST_NORM <= ratio <= MOST_NORM:
                curve.warnings.append(
                    f"strength {c:g} changes the norm of the final state {ratio:.2g}-fold: too strong"
                )
            if nll - base > MOST_NATS:
                curve.warnings.append(f"strength {c:g} makes neutral text {np.exp(nll - base):.0f} times as perplexing")
    return curve


def balance(prompts: Sequence[Prompt], positive: str | Sequence[int], negative: str | Sequence[int]) -> Measure:
    """Exact behaviour per prompt: (P(+) - P(-)) / (P(+) + P(-)) over the next token, in [-1, 1].

    positive, negative: token ids, or a text whose first token counts.
    """

    def measure(lm: LM, control: Control | None) -> Array:
        logprobs = _next_logprobs(lm, prompts, control)
        good, bad = (logprobs[:, _first_tokens(lm, side)].logsumexp(-1) for side in (positive, negative))
        return np.asarray(((good - bad) / 2).tanh())

    return measure


def multiple_choice(items: Sequence[Choice], accuracy: bool = False) -> Measure:
    """Per item the right option's probability renormalised over the options (accuracy: 1 where it is the largest)."""

    def measure(lm: LM, control: Control | None) -> Array:
        logprobs = _next_logprobs(lm, [item.prompt for item in items], control)
        out = np.zeros(len(items))
        for number, (item, row) in enumerate(zip(items, logprobs, strict=True)):
            tokens = [_first_tokens(lm, option)[0] for option in item.options]
            if len(set(tokens)) != len(tokens):
                raise UsageError(f"item {number}: two options begin with the same token of {lm.name}: use letters")
            shares = row[tokens].softmax(-1)
            out[number] = float(shares.argmax() == item.right) if accuracy else float(shares[item.right])
        return out

    return measure


def _first_tokens(lm: LM, text: str | Sequence[int]) -> list[int]:
    """Token ids as given, or the first token of a text."""
    if not isinstance(text, str):
        return [int(token) for token in text]
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UsageError(f"{text!r} has no tokens")
    return [int(ids[0])]


def _next_logprobs(lm: LM, prompts: Sequence[Prompt], control: Control | None) -> torch.Tensor:
    """[P, V] float64 nats on the CPU: the distribution of the first token after each prompt."""
    rows = lm.token_logprobs(prompts, [[0]] * len(prompts), control=control)
    return torch.stack([row[0].cpu().double() for row in rows])


@torch.no_grad()
def _neutral(
    lm: LM, controls: Sequence[SteeringVector | None], zero: int, texts: Sequence[str], blocks: str
) -> tuple[Array, Array, Array, Array]:
    """nll [S, T], change [S], noise [S], norm_ratio [S] on neutral texts, by teacher forcing from the first token on."""
    rows = [list(lm.tokenizer(text)["input_ids"]) for text in texts]
    short = [number for number, row in enumerate(rows) if len(row) < 2]
    if short:
        raise UsageError(f"neutral text {short[0]} has fewer than 2 tokens")
    base, norms = _states(lm, rows, None, blocks)
    logits = [lm.head(state) for state in base]
    nll, change, noise, ratio = (np.zeros((len(controls), len(rows))) for _ in range(4))
    for s, control in enumerate(controls):
        steered, larger = (base, norms) if s == zero else _states(lm, rows, control, blocks)
        ratio[s] = np.array(larger) / np.array(norms)
        for t, (row, before, after) in enumerate(zip(rows, base, steered, strict=True)):
            targets = torch.tensor(row[1:], device=lm.device)[:, None]
            moved = lm.head(after)
            nll[s, t] = -float(moved.log_softmax(-1).gather(-1, targets).mean())
            change[s, t] = float((after - before).float().norm(dim=-1).mean())
            noise[s, t] = float((moved - logits[t]).std(-1).mean())
    return nll, change.mean(1), noise.mean(1), ratio.mean(1)


def _states(
    lm: LM, rows: Sequence[Sequence[int]], control: SteeringVector | None, blocks: str
) -> tuple[list[torch.Tensor], list[float]]:
    """Final hidden states [T - 1, D] before each token of each row but its first, and the mean norm of the last block's
    output (before the final norm, which hides its size)."""
    states: list[torch.Tensor] = []
    norms: list[float] = []
    last = find_blocks(lm.model, blocks)[-1]
    for first in range(0, len(rows), lm.batch_rows):
        part = [row[:-1] for row in rows[first : first + lm.batch_rows]]
        seen: list[torch.Tensor] = []
        with nullcontext() if control is None else control.attached(lm.model, positions="all"):
            with watching([last], seen):  # inside, so that it sees the edit of this very block
                session = lm.session(part)
        for i, row in enumerate(part):
            states.append(session.states(i).clone())
            norms.append(float(seen[0][i, : len(row)].float().norm(dim=-1).mean()))
    return states, norms


def _difference(a: Array, b: Array) -> Interval:
    """mean(a - b) with its interval; both [P], paired."""
    return paired_difference(a, b)


def _at_zero(strengths: Array) -> int:
    found = np.nonzero(strengths == 0)[0]
    if not len(found):
        raise UsageError("the curve has no strength 0 to compare with")
    return int(found[0])
