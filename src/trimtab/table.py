"""One row of the table: from a policy's scored answers to figures with intervals, against the base by prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.budget import Sized
from trimtab.measure.diversity import distinct
from trimtab.measure.stats import Interval, mean_interval, paired_difference, swap_test, verdict, win_rate
from trimtab.policies import Built


@dataclass
class Measured:
    """A policy's answers (rows as in samples.jsonl) and what answering cost in all."""

    built: Built
    rows: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    tokens_forwarded: int = 0
    reward_calls: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    coherence: float | None = None
    sized: Sized | None = None

    def add(self, chunk: dict[str, Any]) -> None:
        """One saved chunk. Token ids are kept apart: samples.jsonl has text."""
        cost = chunk["cost"]
        self.tokens_forwarded += cost["tokens_forwarded"]
        self.reward_calls += cost["reward_calls"]
        self.seconds += cost["seconds"]
        if cost["peak_memory_bytes"] is not None:
            self.peak_memory_bytes = max(self.peak_memory_bytes or 0, cost["peak_memory_bytes"])
        for row in chunk["rows"]:
            self.tokens.append(row["tokens"])
            self.rows.append({key: value for key, value in row.items() if key != "tokens"})

    def column(self, key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([np.nan if row[key] is None else row[key] for row in self.rows], dtype=np.float64)

    @property
    def clusters(self) -> list[int]:
        return [row["prompt_index"] for row in self.rows]


def policy_record(one: Measured, base: Measured, has_gold: bool) -> dict[str, Any]:
    """One entry of compare.json's `policies`.

    kl_per_token and nll_base_per_token weigh every token alike; kl_bound is the bound an answer divided by the mean
    length, in nats a token. Win rate and verdict compare with the base on gold where there is gold, else on the reward.
    """
    judge = "gold" if has_gold else "reward"
    length = one.column("length")
    is_base = one.built.family == "base"
    answers = max(1, len(one.rows))
    bound = one.built.kl_bound
    lengths = float(length.mean()) if len(length) else 0.0
    difference = None if is_base else paired_difference(one.column(judge), base.column(judge), one.clusters)
    p_value = None if is_base else swap_test(one.column(judge) - base.column(judge), one.clusters)
    wins = None if is_base else win_rate(one.column(judge), base.column(judge), one.clusters)
    return {
        "name": one.built.name,
        "reward": mean_interval(one.column("reward"), one.clusters).to_dict(),
        "gold": mean_interval(one.column("gold"), one.clusters).to_dict() if has_gold else None,
        "win_rate": None if wins is None else wins.rate.to_dict(),
        "verdict": "base" if difference is None else verdict(difference, p_value),
        "kl_per_token": {"mean": 0.0, "low": 0.0, "high": 0.0} if is_base else _per_token(one, "kl"),
        "kl_bound": None if bound is None or not lengths else bound / lengths,
        "nll_base_per_token": (_per_token(one, "nll_base") or {"mean": None})["mean"],
        "diversity": distinct(one.tokens),
        "coherence": one.coherence,
        "length_tokens": lengths,
        "cost": {
            "tokens_forwarded_per_answer": one.tokens_forwarded / answers,
            "reward_calls_per_answer": one.reward_calls / answers,
            "seconds_per_answer": one.seconds / answers,
            "peak_memory_bytes": one.peak_memory_bytes,
            "fit_seconds": one.built.fit_seconds,
            "fit_tokens": one.built.fit_tokens,
        },
        "settings": one.built.settings,
        **_budget(one),
    }


def _budget(one: Measured) -> dict[str, Any]:
    """The row's `budget`, where the comparison has one: tokens an answer, or nats a token (a bound where only that)."""
    if one.sized is None:
        return {}
    if one.sized.budget.kind == "tokens":
        return {"budget": one.sized.record(one.tokens_forwarded / max(1, len(one.rows)))}
    kl, lengths = _per_token(one, "kl"), one.column("length")
    spent = None if kl is None else kl["mean"]
    if spent is None and one.built.kl_bound is not None and lengths.sum():
        spent = one.built.kl_bound / float(lengths.mean())
    return {"budget": one.sized.record(spent)}


def _per_token(one: Measured, key: str) -> dict[str, float | None] | None:
    """Mean over tokens of a per-answer mean, with prompts as clusters; None where no answer has it."""
    values, lengths = one.column(key), one.column("length").astype(int)
    have = ~np.isnan(values) & (lengths > 0)
    if not have.any():
        return None
    repeated = np.repeat(values[have], lengths[have])
    clusters = np.repeat(np.array(one.clusters)[have], lengths[have])
    interval: Interval = mean_interval(repeated, clusters.tolist())
    return interval.to_dict()
