"""`--budget`: policies compared at equal cost, or at equal distance from the base.

    tokens=N   every policy's own knob (n, k, steps, block) is the largest whose answers take at most N tokens forwarded,
               those of every model counted, the reward's too
    kl=X       every policy's dial (weight, strength) is the largest whose KL from the base is at most X nats a token;
               a steering controller is tuned to X; best-of-n is sized by its bound

Sizing asks a few pilot prompts; what that takes is charged to the policy's fit. A knob that a spec sets stays as it is.
Where a policy cannot meet the budget, or has nothing to size, its row says so: `met` is judged by what the measured
answers took, 10 % over being allowed for the difference between pilot and measured prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from trimtab import catalogue
from trimtab.divergence import divergences
from trimtab.errors import UsageError
from trimtab.policies import OTHERS, Built, Workshop, layers
from trimtab.policy import Prompt
from trimtab.sampling import Sampling, derive_seed
from trimtab.spec import parse_spec
from trimtab.steer.controller import Controller

PILOT = 16  # prompts that a knob is sized on
LARGEST = 1024  # no knob is raised further
TRIES = 7  # of sizing one knob
SLACK = 1.1  # of the budget that measured answers may take


@dataclass(frozen=True)
class Budget:
    """kind and how much of it: tokens forwarded an answer, or nats a token."""

    kind: Literal["tokens", "kl"]
    amount: float

    @staticmethod
    def parse(text: str) -> Budget:
        """`tokens=N` or `kl=X`."""
        kind, _, value = text.partition("=")
        try:
            amount = float(value)
        except ValueError:
            amount = math.nan
        if kind not in ("tokens", "kl") or not 0 < amount < math.inf:
            raise UsageError(
                f"--budget is tokens=N (an answer) or kl=X (nats a token) with a number above 0, not {text!r}"
            )
        return Budget("tokens" if kind == "tokens" else "kl", amount)

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:g}"


@dataclass
class Sized:
    """How a policy was brought to the budget. changes: the option that was sized and its value, empty where none was."""

    budget: Budget
    changes: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def record(self, spent: float | None) -> dict[str, Any]:
        """For compare.json: what the measured answers spent, and whether that is within the budget."""
        met = None if spent is None else spent <= SLACK * self.budget.amount
        note = self.note
        if met is False and not note:
            note = "over the budget"
        if spent is None and not note:
            note = "its KL from the base is not known"
        return {
            "kind": self.budget.kind,
            "amount": self.budget.amount,
            "changes": self.changes,
            "spent": spent,
            "met": met,
            "note": note,
        }


def build_sized(shop: Workshop, spec: str, budget: Budget, prompts: Sequence[Prompt]) -> tuple[Built, Sized]:
    """The policy of a spec with its knob sized on some of `prompts`."""
    slug, options = parse_spec(layers(spec)[0])
    if slug in OTHERS:
        return shop.build(spec), Sized(budget, note="nothing to size")
    cls = catalogue.method(slug)
    if issubclass(cls, Controller):
        return _controller(shop, spec, options, budget)
    knob = getattr(cls, "KNOB" if budget.kind == "tokens" else "DIAL", None)
    if budget.kind == "kl" and knob is None and getattr(shop.build(spec), "kl_bound", None) is not None:
        knob = cls.KNOB
    if knob is None:
        built = shop.build(spec)
        default = f"has no option that sizes its {'cost' if budget.kind == 'tokens' else 'KL'}"
        return built, Sized(budget, note=default)
    if knob in options:
        return shop.build(spec), Sized(budget, note=f"{knob} is given")
    pilot = _Pilot(shop, spec, budget, prompts)
    search = _largest_whole if knob == getattr(cls, "KNOB", None) else _largest
    value, note = search(lambda value: pilot.spent({knob: value}), budget.amount)
    changes = {} if value is None else {knob: value}
    built = shop.build(spec, changes)
    built.fit_tokens += pilot.tokens
    built.fit_seconds += pilot.seconds
    return built, Sized(budget, changes, note)


def _controller(shop: Workshop, spec: str, options: dict[str, str], budget: Budget) -> tuple[Built, Sized]:
    """A controller costs what the model costs; its KL is tuned by itself."""
    if budget.kind == "tokens":
        return shop.build(spec), Sized(budget, note="nothing to size: one answer costs what the model's does")
    given = sorted({"strength", "step_size", "kl_target", "controller"} & set(options))
    if given:
        return shop.build(spec), Sized(budget, note=f"{given[0]} is given")
    return shop.build(spec, {"kl_target": budget.amount}), Sized(budget, {"kl_target": budget.amount})


class _Pilot:
    """What a policy spends with some options, measured on pilot prompts and remembered."""

    def __init__(self, shop: Workshop, spec: str, budget: Budget, prompts: Sequence[Prompt]):
        self.shop, self.spec, self.budget = shop, spec, budget
        stride = max(1, len(prompts) // PILOT)
        self.prompts = list(prompts[::stride][:PILOT])
        self.sampling: Sampling = shop.sampling.but(samples=1, seed=derive_seed(shop.sampling.seed, "budget"))
        self.tokens, self.seconds = 0, 0.0
        self._known: dict[tuple[tuple[str, float], ...], float] = {}

    def spent(self, changes: dict[str, float]) -> float:
        """Tokens an answer, or nats a token (infinite where it is not known)."""
        key = tuple(sorted(changes.items()))
        if key not in self._known:
            if self.shop.progress is not None:
                self.shop.progress(f"{self.spec}: sizing {', '.join(f'{name}={value:.4g}' for name, value in key)}")
            built = self.shop.build(self.spec, changes)
            answers = built.policy.generate(self.prompts, self.sampling)
            self.tokens += answers.cost.tokens_forwarded
            self.seconds += answers.cost.seconds
            if self.budget.kind == "tokens":
                self._known[key] = answers.cost.tokens_forwarded / len(answers)
            else:
                self._known[key] = kl_per_token(built, self.shop, answers, self.sampling)
        return self._known[key]


def kl_per_token(built: Built, shop: Workshop, answers: Any, sampling: Sampling) -> float:
    """Mean KL from the base in nats a token: what the policy reports, else its bound; infinite where there is neither."""
    length = sum(map(len, answers.tokens))
    if answers.kl is not None:
        return sum(map(sum, answers.kl)) / max(1, length)
    if hasattr(built.policy, "token_logprobs"):
        found = divergences(built.policy, shop.lm, answers.prompts, answers.tokens, sampling)
        return sum(float(one.kl.sum()) for one in found) / max(1, length)
    return math.inf if built.kl_bound is None else built.kl_bound * len(answers) / max(1, length)


def _largest_whole(spent: Callable[[int], float], amount: float) -> tuple[int | None, str]:
    """The largest whole number of 1 or more whose spending is within the amount, by secants; and a note.

    Spending is taken to rise with the number, roughly in proportion (n answers cost n times one, less the prompt). None
    where it does not rise: then the budget has no say in it.
    """
    one = spent(1)
    if one > amount:
        return 1, "takes more than the budget even at its least"
    low, low_cost = 1, one
    high, high_cost = 2, spent(2)
    if high_cost <= 1.02 * one and spent(16) <= 1.1 * one:
        return None, "its cost does not rise with its knob, which stays as it is"
    for _ in range(TRIES):
        if high_cost <= amount:
            slope = (high_cost - low_cost) / (high - low)
            low, low_cost = high, high_cost
            if low >= LARGEST or slope <= 0:
                return low, "at the largest that is tried"
            high = min(LARGEST, max(low + 1, low + math.floor((amount - low_cost) / slope)))
            if high == low:
                break
            high_cost = spent(high)
        else:
            if high - low <= 1:
                break
            share = (amount - low_cost) / (high_cost - low_cost)
            middle = min(high - 1, max(low + 1, low + math.floor(share * (high - low))))
            cost = spent(middle)
            if cost <= amount:
                low, low_cost = middle, cost
            else:
                high, high_cost = middle, cost
    return low, ""


def _largest(spent: Callable[[float], float], amount: float) -> tuple[float | None, str]:
    """The largest dial of 0 or more whose spending is within the amount, to 2 %; and a note."""
    low, high = 0.0, 1.0
    while spent(high) <= amount:
        low, high = high, 4 * high
        if high > 1e4:
            return low, "at the largest that is tried"
    if not math.isfinite(spent(high)):
        return high, "its KL from the base is not known"
    for _ in range(12):
        if low and high / low < 1.02:
            break
        middle = math.sqrt(low * high) if low else high / 4
        if middle < 1e-4:
            break
        low, high = (middle, high) if spent(middle) <= amount else (low, middle)
    return low, "" if low else "takes more than the budget at any strength above 0"
