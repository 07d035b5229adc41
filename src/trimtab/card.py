"""`Card`: what a method is, what it needs and what it costs, in words a machine can check.

The vocabularies are closed (surveys 2308.12014, 2309.15025, 2503.14504), so that a catalogue, the command line, the docs
and a planner can read the same record. `trimtab methods` prints the cards; a wrong word fails at import.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from trimtab.errors import UsageError

VOCABULARY: dict[str, frozenset[str]] = {
    "goal": frozenset({"instruction", "preference", "value", "capability", "safety"}),
    "stage": frozenset({"data", "pretrain", "sft", "preference", "merge", "decode", "steer", "prompt", "audit"}),
    "mechanism": frozenset(
        {
            "none",
            "sft",
            "reward-model",
            "policy-gradient",
            "direct-preference",
            "contrastive-decoding",
            "reward-guided-decoding",
            "mcmc/best-of-n",
            "value-function-control",
            "weight-arithmetic",
            "activation-vector",
            "data-scoring",
            "self-generation",
            "perturbation-defence",
            "probe",
            "metric",
        }
    ),
    "signal": frozenset(
        {
            "demonstrations",
            "pairs",
            "scalar reward",
            "principle text",
            "verifier",
            "weak model",
            "checkpoints",
            "own likelihood",
            "gradients",
            "none",
        }
    ),
    "access": frozenset({"black-box text", "logits", "hidden states", "weights", "gradients", "training"}),
    "modality": frozenset({"text"}),
    "dimensions": frozenset(
        {
            "factuality",
            "ethics",
            "toxicity",
            "bias",
            "helpfulness",
            "refusal",
            "robustness",
            "calibration",
            "capability",
            "diversity",
            "multilingual",
            "latent geometry",
            "reward-model quality",
            "oversight",
            "cost",
        }
    ),
    "trainable": frozenset({"none", "head", "block", "adapter", "all"}),
    "produces": frozenset({"weights", "adapter", "decoder", "data", "report"}),
}


@dataclass(frozen=True)
class Card:
    """One method's record. `needs`, `limits` and `risks` are sentences; `*_forwards` count model forwards.

    infer_multiplier is tokens forwarded per answer relative to plain decoding, as a formula in the method's own keys.
    choose: when to take this method and not another, in a sentence or two.
    dimensions: what it is meant to change, or (an audit) what it measures.
    requires: signals of which all are needed; empty: any one of `signal` is enough.
    trainable: which of the model's weights it trains; extra_models: further models of the same size that it loads.
    status: `implemented`, `verified_cpu` (every oracle test of its spec passes on a CPU), `verified_gpu`.
    """

    slug: str
    name: str
    paper: str
    summary: str
    goal: str
    stage: str
    mechanism: str
    signal: tuple[str, ...]
    access: str
    produces: str
    needs: tuple[str, ...]
    infer_multiplier: str
    fit_cost: str
    benefit_metrics: tuple[str, ...]
    cost_metrics: tuple[str, ...]
    limits: tuple[str, ...] = ()
    risks: tuple[str, ...] = ()
    composes_with: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    data_format: str = "prompts"
    modality: tuple[str, ...] = ("text",)
    status: tuple[str, ...] = ("implemented",)
    example: str = ""
    choose: str = ""
    dimensions: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    trainable: str = "none"
    extra_models: int = 0

    def __post_init__(self) -> None:
        for key in ("goal", "stage", "mechanism", "access", "produces", "trainable"):
            self._check(key, (getattr(self, key),))
        for key in ("signal", "modality", "dimensions"):
            self._check(key, getattr(self, key))
        if not {*self.requires} <= {*self.signal}:
            raise UsageError(f"card {self.slug!r}: what it requires is not among its signals")
        unknown_status = set(self.status) - {"implemented", "verified_cpu", "verified_gpu"}
        if unknown_status:
            raise UsageError(f"card {self.slug!r}: unknown status {sorted(unknown_status)}")
        if not self.benefit_metrics or not self.cost_metrics:
            raise UsageError(f"card {self.slug!r}: at least one benefit metric and one cost metric")

    def _check(self, key: str, words: tuple[str, ...]) -> None:
        for word in words:
            if word not in VOCABULARY[key]:
                raise UsageError(f"card {self.slug!r}: {key} {word!r} is not one of {sorted(VOCABULARY[key])}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
