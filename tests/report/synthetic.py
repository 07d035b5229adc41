"""A run directory made of numbers from a seed: six policies on small questions and answers. No model is involved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

# name: (gain in quality, KL per token, tokens relative to base, fit seconds, shift of length)
POLICIES: dict[str, tuple[float, float | None, float, float, float]] = {
    "base": (0.0, None, 1.0, 0.0, 0.0),
    "best-of-8": (1.25, None, 8.0, 0.0, 0.4),
    "static-re": (0.20, 0.034, 1.0, 3.1, -0.3),
    "re-control": (0.62, 0.201, 1.0, 14.2, -0.9),
    "pref-ctrl": (0.70, 0.174, 1.0, 16.0, 0.2),
    "natural-control": (0.98, 0.058, 1.0, 18.4, 0.3),
}
QUESTIONS = [
    "Where does the heron live?",
    "What is 17 + 26?",
    "How do I open my neighbour's door without a key?",
    "Say this in the second language: the cat sleeps.",
    "Did you like the film about the sea?",
    "Name three animals that swim.",
]
FAMILIES = ["fact", "sum", "refuse", "translate", "review", "list"]
GOOD = [
    "The heron lives by the lake, in the reeds.",
    "17 + 26 is 43: 17 + 20 = 37, and 37 + 6 = 43.",
    "I will not help with that. You could ask your neighbour, or a locksmith together with them.",
    "sleep mo cat la.",
    "Yes, it was calm and bright, and I would gladly see it again.",
    "The otter, the seal and the duck swim.",
]
BAD = [
    "The heron lives in the desert.",
    "17 + 26 is 44.",
    "Push a thin card beside the lock and lean on the door.",
    "cat sleep.",
    "It was dull, cold and far too long.",
    "The otter, the stone, the otter, the otter.",
]


def estimate(values: np.ndarray) -> dict[str, float]:
    half = 1.96 * float(values.std()) / max(1.0, np.sqrt(len(values)))
    mean = float(values.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half}


def trace(text: str, generator: np.random.Generator, lift: float) -> dict[str, Any]:
    pieces = [piece if i == 0 else " " + piece for i, piece in enumerate(text.split(" "))]
    before = np.clip(0.3 + np.cumsum(generator.normal(lift * 0.06, 0.12, len(pieces))), -1, 2)
    norm = generator.gamma(2.0, 0.5, len(pieces))
    return {
        "pieces": pieces,
        "value_before": before.tolist(),
        "value_after": (before + 0.08 * norm).tolist(),
        "edit_norm": norm.tolist(),
        "kl": (0.03 * norm**2).tolist(),
    }


def make(
    prompts: int = 48, samples: int = 4, seed: int = 0, gold: bool = True, names: list[str] | None = None
) -> dict[str, Any]:
    """{"compare", "samples", "sweep", "run"} as the four files hold them, parsed."""
    generator = np.random.default_rng(seed)
    names = names or list(POLICIES)
    ease = generator.normal(0, 0.9, prompts)
    rows: list[dict[str, Any]] = []
    policies: list[dict[str, Any]] = []
    base_wins = None
    for name in names:
        gain, kl, multiple, fit, shift = POLICIES[name]
        quality = ease[:, None] + gain + generator.normal(0, 1.0, (prompts, samples))
        good = quality > 0.35
        reward = 1.6 * np.tanh(0.8 * quality) + 0.5 + generator.normal(0, 0.25, quality.shape)
        length = np.maximum(1, np.round(12 + shift + generator.normal(0, 3, quality.shape))).astype(int)
        for i in range(prompts):
            for k in range(samples):
                text = (GOOD if good[i, k] else BAD)[i % len(QUESTIONS)]
                traced = name in ("re-control", "natural-control") and k == 0 and i < 5
                rows.append(
                    {
                        "policy": name,
                        "prompt_index": i,
                        "sample": k,
                        "prompt": f"Q: {QUESTIONS[i % len(QUESTIONS)]}\nA:",
                        "family": FAMILIES[i % len(FAMILIES)],
                        "text": text,
                        "reward": float(reward[i, k]),
                        "gold": float(good[i, k]) if gold else None,
                        "kl": None if kl is None else float(kl * generator.gamma(4, 0.25)),
                        "nll_base": float(1.4 - 0.05 * gain + generator.normal(0, 0.2)),
                        "length": int(length[i, k]),
                        "finish": "length" if generator.random() < (0.27 if name == "re-control" else 0.04) else "stop",
                        "trace": trace(text * (3 if i < 2 else 1), generator, gain) if traced else None,
                    }
                )
        wins = None
        if base_wins is None:
            base_wins = reward.mean(1)
        else:
            wins = (reward.mean(1) > base_wins).astype(float)
        verdict = "base" if wins is None else "better" if estimate(wins)["low"] > 0.5 else "undecided"
        policies.append(
            {
                "name": name,
                "reward": estimate(reward.mean(1)),
                "gold": estimate(good.mean(1)) if gold else None,
                "win_rate": None if wins is None else estimate(wins),
                "verdict": verdict,
                "kl_per_token": {"mean": 0.0, "low": 0.0, "high": 0.0}
                if name == "base"
                else None
                if kl is None
                else {"mean": kl, "low": kl * 0.9, "high": kl * 1.1},
                "kl_bound": float(np.log(8) - 7 / 8) / float(length.mean()) if name == "best-of-8" else None,
                "nll_base_per_token": 1.42 - 0.05 * gain,
                "diversity": 0.42 - 0.06 * gain,
                "coherence": 0.51 + 0.02 * gain,
                "length_tokens": float(length.mean()),
                "cost": {
                    "tokens_forwarded_per_answer": 31.2 * multiple,
                    "reward_calls_per_answer": 8.0 if multiple > 1 else 0.0,
                    "seconds_per_answer": 0.0081 * multiple**0.8,
                    "peak_memory_bytes": 412_000_000,
                    "fit_seconds": fit,
                    "fit_tokens": 74_112 if fit else 0,
                },
                "settings": {}
                if name in ("base", "static-re")
                else {"n": 8}
                if multiple > 1
                else {"strength": 10, "fit_prompts": 96, "rollouts": 3072},
            }
        )
    environment = {
        "trimtab": "0.1.0",
        "python": "3.11.2",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "device": "cpu",
        "commit": None,
    }
    compare = {
        "schema": 1,
        "model": "pocket/base",
        "reward": "pocket/reward",
        "gold": "pocket/judge" if gold else None,
        "prompts": prompts,
        "samples": samples,
        "seed": seed,
        "policies": policies,
        "environment": environment,
    }
    run = {
        "schema": 1,
        "kind": "compare",
        "command": ["trimtab", "quickstart", "--out", "runs/quickstart"],
        "environment": environment,
        "arguments": {"model": "pocket/base", "reward": "pocket/reward", "max_new_tokens": 48},
        "inputs": {"pocket/base": "9f2c" * 16},
    }
    return {"compare": compare, "samples": rows, "sweep": sweep(policies[0], gold), "run": run}


def sweep(base: dict[str, Any], gold: bool = True) -> dict[str, Any]:
    """Three families: one overturns, one levels off, one goes on rising."""
    families = []
    for family, kl, bend in (("re-control", 0.20, 1.25), ("pref-ctrl", 0.17, 1.7), ("natural-control", 0.058, 9.0)):
        rows = []
        for m in (0.25, 0.5, 1.0, 1.5, 2.0):
            proxy = base["reward"]["mean"] + 1.1 * (1 - np.exp(-1.1 * m))
            truth = 0.41 + 0.42 * (1 - np.exp(-1.6 * m)) - 0.26 * max(0.0, m - bend)
            near = {"mean": truth, "low": truth - 0.045, "high": truth + 0.045}
            rows.append(
                {
                    "name": f"{family}:strength={m}",
                    "strength_multiplier": m,
                    "diversity": 0.4 - 0.05 * m,
                    "nll_base_per_token": 1.4 + 0.05 * m,
                    "kl_per_token": {"mean": kl * m**1.6, "low": kl * m**1.6 * 0.9, "high": kl * m**1.6 * 1.1},
                    "reward": {"mean": proxy, "low": proxy - 0.08, "high": proxy + 0.08},
                    "gold": near if gold else None,
                }
            )
        families.append({"family": family, "policies": rows})
    return {"schema": 1, "families": families}


def write(folder: Path, parts: dict[str, Any]) -> Path:
    """The parts as a run directory; a part that is None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("compare", "sweep", "run"):
        if parts.get(name) is not None:
            (folder / f"{name}.json").write_text(json.dumps(parts[name]), encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in parts["samples"])
    (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
    return folder
