"""A reward on a scale that means something: `calibrated:file=FILE[,reward=SPEC]`.

    temperature  r / T. The sigmoid of a difference is the probability that the first answer is better: `preference`
    platt        sigmoid(slope * r + intercept), in [0, 1]: the probability that the answer is good
    isotonic     the same from a rising line through the fitted points, flat outside them
    affine       (r - mean) / sd over answers of a reference policy, of all prompts or of each by itself; no probability

FILE is what `Calibration.save` wrote, or the measure.json of `trimtab measure reward-benchmark ... --calibrate KIND`. The
reward must be the very one that was calibrated (same weights and options). `preference` and `probability` refuse a reward
that has no fitting calibration: a raw score is no probability. The fits are in `trimtab.measure.reward_calibration`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from trimtab.errors import UsageError
from trimtab.files import write_json
from trimtab.fingerprint import fingerprint_of
from trimtab.policy import Prompt, prompt_text
from trimtab.rewards.base import Reward

Kind = Literal["temperature", "platt", "isotonic", "affine"]
NUMBERS: dict[str, tuple[str, ...]] = {
    "temperature": ("temperature",),
    "platt": ("slope", "intercept"),
    "isotonic": ("x", "y"),
    "affine": ("mean", "sd"),
}


@dataclass(frozen=True)
class Calibration:
    """What was fitted, on which reward (its spec and its fingerprint).

    values   of the kind's names in NUMBERS: numbers, or lists x (rising) and y for isotonic
    prompts  affine: the (mean, sd) of each prompt that has its own, by `prompt_key`
    report   accuracy, NLL, Brier and ECE on held-out rows, where there were some
    """

    kind: Kind
    reward: str
    fingerprint: str
    values: dict[str, Any]
    prompts: dict[str, tuple[float, float]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or any(name not in self.values for name in NUMBERS[self.kind]):
            raise UsageError(f"a calibration is one of {', '.join(NUMBERS)} with its numbers, not {self.kind!r}")
        numbers = np.concatenate([np.ravel(self.values[name]) for name in NUMBERS[self.kind]])
        wide = self.values.get("temperature", self.values.get("sd", 1.0))
        if not np.isfinite(numbers).all() or not wide > 0 or any(not sd > 0 for _, sd in self.prompts.values()):
            raise UsageError(f"a {self.kind} calibration needs finite numbers, its temperature or sd above 0")

    def apply(self, scores: Sequence[float | None], prompts: Sequence[Prompt]) -> list[float | None]:
        """Calibrated scores; None stays None."""
        return [None if r is None else self._one(r, prompt) for r, prompt in zip(scores, prompts, strict=True)]

    def _one(self, r: float, prompt: Prompt) -> float:
        numbers = self.values
        if self.kind == "temperature":
            return float(r / numbers["temperature"])
        if self.kind == "platt":
            return sigmoid(numbers["slope"] * r + numbers["intercept"])
        if self.kind == "isotonic":
            return float(np.interp(r, numbers["x"], numbers["y"]))
        everywhere = (numbers["mean"], numbers["sd"])
        mean, sd = self.prompts.get(prompt_key(prompt), everywhere) if self.prompts else everywhere
        return float((r - mean) / sd)

    def save(self, path: str | Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """From a calibration file, or from the measure.json of a reward benchmark. UsageError where there is none."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the calibration {path}: {error}") from error
        if isinstance(found, dict) and found.get("measurements"):
            found = found["measurements"][0]
        if isinstance(found, dict) and "details" in found:
            found = found["details"].get("calibration")
        if not isinstance(found, dict) or set(found) != {
            "kind",
            "reward",
            "fingerprint",
            "values",
            "prompts",
            "report",
        }:
            raise UsageError(
                f"{path} holds no calibration; make one with "
                "trimtab measure reward-benchmark MODEL --reward SPEC --texts pairs.jsonl --out DIR"
            )
        return cls(**{**found, "prompts": {key: (pair[0], pair[1]) for key, pair in found["prompts"].items()}})


@dataclass(eq=False)
class Calibrated(Reward):
    """A reward whose scores go through a calibration."""

    slug = "calibrated"

    file: Path | Calibration  # the calibration, or the file that holds one
    reward: Any = None  # the reward that was calibrated; none: the one that the file names

    def __post_init__(self) -> None:
        from trimtab.rewards import as_reward

        self.calibration = self.file if isinstance(self.file, Calibration) else Calibration.load(self.file)
        self.inner = as_reward(self.calibration.reward if self.reward is None else self.reward)
        if self.inner.fingerprint != self.calibration.fingerprint:
            raise UsageError(
                f"reward 'calibrated': the calibration was fitted on {self.calibration.reward!r}, and "
                f"{self.inner.name!r} differs from it in weights or options; calibrate it anew, or give reward=..."
            )

    @property
    def terms(self) -> tuple[tuple[float, Reward], ...]:
        return ((1.0, self.inner),)

    @property
    def name(self) -> str:
        return f"{self.inner.name} ({self.calibration.kind})"

    @property
    def on_prefixes(self) -> bool:  # type: ignore[override]
        return self.inner.on_prefixes

    @property
    def tokens_forwarded(self) -> int:  # type: ignore[override]
        return self.inner.tokens_forwarded

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.slug, asdict(self.calibration), self.inner.fingerprint)

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
        return self.calibration.apply(self.inner.score(prompts, texts), prompts)


def preference(
    reward: Reward, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
) -> list[float | None]:
    """The probability that the first answer is better, sigmoid((r_1 - r_2) / T); None where either is not judged.

    UsageError for a reward without a temperature.
    """
    _check(reward, ("temperature",), "a probability of a preference")
    pairs = zip(reward.score(prompts, first), reward.score(prompts, second), strict=True)
    return [None if a is None or b is None else sigmoid(a - b) for a, b in pairs]


def probability(reward: Reward, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
    """The probability that an answer is good. UsageError for a reward without a Platt or isotonic calibration."""
    _check(reward, ("platt", "isotonic"), "a probability")
    return reward.score(prompts, texts)


def sigmoid(x: float) -> float:
    return math.exp(-np.logaddexp(0, -x))


def prompt_key(prompt: Prompt) -> str:
    return fingerprint_of(prompt_text(prompt))


def _check(reward: Reward, kinds: tuple[str, ...], what: str) -> None:
    kind = reward.calibration.kind if isinstance(reward, Calibrated) else "none"
    if kind not in kinds:
        raise UsageError(
            f"reward {reward.name!r} gives no {what.removeprefix('a ')}: its calibration is {kind!r} and "
            f"{' or '.join(kinds)} is needed (fit one on labelled data: trimtab measure reward-benchmark --calibrate)"
        )
