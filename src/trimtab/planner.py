"""Which methods fit? From the cards alone: a hard filter with a reason for every exclusion, then a rank. No model is called.

    filter   signal    any one of the card's signals is at hand (all of `requires`, where a card has them)
             access    text < logits < hidden states < weights < gradients < training: what is at hand reaches the card's
             modality  text
             memory    weights + optimiser + activations fit (below)
             stage     where one was asked for
    rank     goal matched, then verified before implemented, then the cheaper to answer with, then the cheaper to fit,
             then the catalogue's order

    memory   models x size x bytes a parameter  +  trained parameters x OPTIMISER_BYTES  +  activations
             trained: all of them, an adapter (1 %), a block (1 / 32), a head or nothing (0; small networks are not counted)
             activations: 10 % of the weights and half a GB, a rule of thumb for short contexts and small batches

The estimate is for one device, without offloading. It is meant to rule out what cannot work, not to promise what does.
Source: the planner of the alignment taxonomy (surveys 2308.12014, 2309.15025), deterministic and explainable by design.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.card import VOCABULARY, Card
from trimtab.errors import UsageError, unknown

ACCESS = ("black-box text", "logits", "hidden states", "weights", "gradients", "training")
# what users write -> the card's word
SIGNALS = {
    "demonstrations": "demonstrations",
    "pairs": "pairs",
    "reward": "scalar reward",
    "principles": "principle text",
    "verifier": "verifier",
    "weak-model": "weak model",
    "checkpoints": "checkpoints",
    "gradients": "gradients",
}
ALWAYS = ("own likelihood", "none")
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}
OPTIMISER_BYTES = 12.0  # Adam's two moments and the gradient in float32
TRAINED = {"none": 0.0, "head": 0.0, "block": 1 / 32, "adapter": 0.01, "all": 1.0}
GB = 1e9
# how dear an answer is: "1" first, then formulas that begin with 1, then the rest
_PLAIN, _NEAR = re.compile(r"1$"), re.compile(r"1\b")


@dataclass(frozen=True)
class Situation:
    """What the user has. size: parameters; memory: bytes (None: not asked); signals: the cards' words; access: the most."""

    size: float | None = None
    memory: float | None = None
    signals: tuple[str, ...] = ()
    access: str = "training"
    goal: str | None = None
    stage: str | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.memory is not None and self.size is None:
            raise UsageError("--memory needs --model-size: how much a method takes depends on both")
        for value, name in ((self.size, "model size"), (self.memory, "memory")):
            if value is not None and not value > 0:
                raise UsageError(f"the {name} must be above 0, not {value:g}")


@dataclass(frozen=True)
class Choice:
    """A method that fits, and why it stands where it does."""

    slug: str
    stage: str
    reasons: tuple[str, ...]
    memory_bytes: float | None


@dataclass
class Plan:
    """chosen, best first; excluded: slug -> every reason; pipelines: specs of methods that go together; measure with."""

    chosen: list[Choice] = field(default_factory=list)
    excluded: dict[str, list[str]] = field(default_factory=dict)
    pipelines: list[str] = field(default_factory=list)
    measure_with: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        chosen = [{**vars(one), "reasons": list(one.reasons)} for one in self.chosen]
        return {"schema": 1, **vars(self), "chosen": chosen}


def plan(situation: Situation, cards: Iterable[Card]) -> Plan:
    """What the catalogue offers in a situation. Deterministic in (situation, cards)."""
    listed = list(cards)
    methods = [card for card in listed if card.stage != "audit" or situation.stage == "audit"]
    out = Plan()
    fitting: list[Card] = []
    for card in methods:
        if reasons := exclusions(card, situation):
            out.excluded[card.slug] = reasons
        else:
            fitting.append(card)
    order = {card.slug: number for number, card in enumerate(listed)}
    fitting.sort(key=lambda card: (*_rank(card, situation), order[card.slug]))
    out.chosen = [
        Choice(card.slug, card.stage, tuple(_reasons(card, situation)), memory_needed(card, situation))
        for card in fitting
    ]
    out.pipelines = pipelines(fitting)
    wanted = {card.slug for card in fitting}
    out.measure_with = [
        card.slug for card in listed if card.stage == "audit" and card.slug not in wanted and _tells(card)
    ]
    return out


def exclusions(card: Card, situation: Situation) -> list[str]:
    """Every reason why a method cannot be used; empty where it can."""
    reasons = []
    if situation.stage is not None and card.stage != situation.stage:
        reasons.append(f"it belongs to the stage {card.stage}, not {situation.stage}")
    have = {*situation.signals, *ALWAYS}
    if card.requires:
        missing = [signal for signal in card.requires if signal not in have]
        if missing:
            reasons.append(f"it needs {_listed(missing, 'and')}")
    elif not have & {*card.signal}:
        reasons.append(f"it needs {_listed(card.signal, 'or')}")
    if ACCESS.index(card.access) > ACCESS.index(situation.access):
        reasons.append(f"it needs access to {card.access}; at hand is {situation.access}")
    if "text" not in card.modality:
        reasons.append(f"it is for {', '.join(card.modality)}; only text is implemented")
    needed = memory_needed(card, situation)
    if needed is not None and situation.memory is not None and needed > situation.memory:
        reasons.append(
            f"it needs about {needed / GB:.1f} GB ({_sum(card, situation)}); at hand are {situation.memory / GB:.1f}"
        )
    return reasons


def memory_needed(card: Card, situation: Situation) -> float | None:
    """Bytes on one device by the rule above; None where the model's size is unknown, or for a merge: it streams."""
    if situation.size is None or card.stage == "merge":
        return None
    weights, optimiser, activations = _parts(card, situation)
    return weights + optimiser + activations


def pipelines(cards: Sequence[Card]) -> list[str]:
    """Policies of two methods that say they go together, the later stage outside: `best-of-n over natural-control`."""
    names = {card.slug: card for card in cards}
    found = []
    for outer in cards:
        for inner in outer.composes_with:
            under = names.get(inner)
            if under is None or outer.stage not in ("decode", "prompt") or inner in outer.conflicts:
                continue
            if under.stage == "steer" or outer.slug in under.composes_with:
                found.append(f"{outer.slug} over {inner}")
    return found


def size_of(text: str) -> float:
    """A number of parameters: 7B, 260K, 1.5e9."""
    return _scaled(text, {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}, "a model size such as 7B or 260K")


def memory_of(text: str) -> float:
    """A number of bytes: 24GB, 512MB, 80G."""
    return _scaled(text.upper().removesuffix("B").removesuffix("I"), {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}, "24GB")


def signals_of(text: str) -> tuple[str, ...]:
    """`pairs,reward` as the cards' words."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in SIGNALS:
            raise unknown("signal", word, SIGNALS)
    return tuple(SIGNALS[word] for word in words)


def access_of(text: str) -> str:
    """`hidden-states` as the cards' word."""
    word = {"text": "black-box text"}.get(
        text, text.replace("-", " ") if text != "black-box-text" else "black-box text"
    )
    if word not in VOCABULARY["access"]:
        raise unknown("access", text, [name.replace(" ", "-") for name in ACCESS])
    return word


def _rank(card: Card, situation: Situation) -> tuple[int, ...]:
    cost = 0 if _PLAIN.match(card.infer_multiplier) else 1 if _NEAR.match(card.infer_multiplier) else 2
    return (
        int(situation.goal is not None and card.goal != situation.goal),
        int(not any(status.startswith("verified") for status in card.status)),
        cost,
        int(not card.fit_cost.startswith("none")),
    )


def _reasons(card: Card, situation: Situation) -> list[str]:
    out = []
    if situation.goal is not None:
        out.append(f"goal {card.goal}" + ("" if card.goal == situation.goal else f", not {situation.goal}"))
    out += [", ".join(card.status), f"an answer costs {card.infer_multiplier}", f"fitting: {card.fit_cost}"]
    needed = memory_needed(card, situation)
    return out + ([f"about {needed / GB:.1f} GB"] if needed is not None else [])


def _parts(card: Card, situation: Situation) -> tuple[float, float, float]:
    assert situation.size is not None
    models = 1 + card.extra_models
    weights = models * situation.size * BYTES[situation.dtype]
    return weights, TRAINED[card.trainable] * situation.size * OPTIMISER_BYTES, 0.1 * weights + 0.5 * GB


def _sum(card: Card, situation: Situation) -> str:
    weights, optimiser, activations = _parts(card, situation)
    trained = f", optimiser {optimiser / GB:.1f}" if optimiser else ""
    return f"weights {weights / GB:.1f}{trained}, activations {activations / GB:.1f}"


def _tells(card: Card) -> bool:
    """Whether a diagnostic needs nothing but the model and its answers."""
    return card.slug in ("panel", "branching-factor", "refusal")


def _listed(words: Sequence[str], last: str) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _scaled(text: str, units: dict[str, float], example: str) -> float:
    word = text.strip().upper()
    factor = units.get(word[-1:], 1.0)
    try:
        value = float(word.removesuffix(word[-1:]) if word[-1:] in units else word) * factor
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UsageError(f"{text!r} is not {example}")
    return value
