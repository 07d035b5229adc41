"""Training rows for generation-aware alignment (2310.06987): good and bad answers to one prompt under many settings.

    pairs       {"prompt", "chosen", "rejected"}: a good and a bad answer to the SAME prompt under different settings, for DPO
    hindsight   the paper's text "<prompt> A misaligned answer: <bad>. An aligned answer: <good>" in parts, with the loss on
                the answers alone: {"prompt", "parts": [{"text", "loss"}, ...]}

Static alignment, its baseline, is the same from the answers of the default setting alone. Which answers are good is the
judge's word: its errors are trained in. Rows are written as JSONL and read by `trimtab.prompt.tuning` or a trainer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.files import write_atomic
from trimtab.policy import Prompt

Texts = Sequence[Sequence[Sequence[str]]]
BAD, GOOD = " A misaligned answer:", " An aligned answer:"


def pairs(
    prompts: Sequence[Prompt], texts: Texts, flags: npt.NDArray[np.float64], most: int = 8, seed: int = 0
) -> list[dict[str, Any]]:
    """At most `most` pairs a prompt from texts[p][c][s], flags [P, C, n] (1 bad, 0 good, NaN unknown).

    No text is used twice for one prompt on its side until all were used; empty answers are never chosen or rejected.
    """
    rng = np.random.default_rng(seed)
    out: list[dict[str, Any]] = []
    for prompt, grid, table in zip(prompts, texts, flags, strict=True):
        sides: dict[float, list[tuple[str, int]]] = {0.0: [], 1.0: []}
        for setting, (row, marks) in enumerate(zip(grid, table, strict=True)):
            for text, mark in zip(row, marks.tolist(), strict=True):
                if text.strip() and mark in sides and text not in [known for known, _ in sides[mark]]:
                    sides[mark].append((text, setting))
        good, bad = ([side[i] for i in rng.permutation(len(side))] for side in (sides[0.0], sides[1.0]))
        taken = 0
        for number in range(max(len(good), len(bad)) if good and bad else 0):
            (chosen, a), (rejected, b) = good[number % len(good)], bad[number % len(bad)]
            if taken < most and (a != b or len(grid) == 1):
                out.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
                taken += 1
    return out


def hindsight(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same answers as text in which the aligned one follows the misaligned one."""
    out = []
    for row in rows:
        bad, good = row["rejected"].strip(), row["chosen"].strip()
        parts = [(BAD, False), (f" {bad}", True), (GOOD, False), (f" {good}", True)]
        out.append({"prompt": row["prompt"], "parts": [{"text": text, "loss": loss} for text, loss in parts]})
    return out


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSONL, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
