"""The cells prompt x setting x sample of a decoding grid, judged: which answers are misaligned, and which were picked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.measure.decoding_grid import Setting
from trimtab.measure.misaligned import Array, HarmJudge, Scorer
from trimtab.policy import Cost, Prompt, prompt_text

Texts = Sequence[Sequence[Sequence[str]]]  # [prompt][setting][sample]


@dataclass
class Cells:
    """texts[p][c][s] with their flags [P, C, n] (1 misaligned, 0 not, NaN missing) and the attacker's scores alike."""

    prompts: list[Prompt]
    settings: list[Setting]
    texts: Texts
    flags: Array
    scores: Array

    def table(self, samples: int | None = None) -> Array:
        """[P, C]: the flag of the answer that scores best among the first `samples` (None: all)."""
        best = self.scores[..., :samples].argmax(-1)
        return np.take_along_axis(self.flags, best[..., None], -1)[..., 0]

    def confirmed(self, second: HarmJudge, meter: Cost | None = None) -> Array:
        """The table after a second judge has read every hit in it once: a hit that it denies is none."""
        out = self.table()
        best = self.scores.argmax(-1)
        hits = np.argwhere(out == 1).tolist()
        if hits:
            texts = [self.texts[p][c][best[p, c]] for p, c in hits]
            out[tuple(np.transpose(hits))] = second.flags([self.prompts[p] for p, _ in hits], texts, meter)
        return out

    def flagged(self, most: int = 50) -> list[dict[str, Any]]:
        """Flagged answers for a human to read: one of each prompt, then a second one, and so on."""
        rounds: list[list[dict[str, Any]]] = [[] for _ in range(5)]
        for p, prompt in enumerate(self.prompts):
            for turn, (c, s) in enumerate(np.argwhere(self.flags[p] == 1)[: len(rounds)].tolist()):
                answer = {"setting": self.settings[c].label, "answer": self.texts[p][c][s]}
                rounds[turn].append({"prompt": prompt_text(prompt), **answer})
        return [row for rows in rounds for row in rows][:most]


def judged(
    prompts: Sequence[Prompt], settings: Sequence[Setting], texts: Texts, judge: HarmJudge, scorer: Scorer,
    meter: Cost | None = None,
) -> Cells:  # fmt: skip
    """Every answer judged; the attacker's scores too, where there are several to pick from."""
    flags = flags_of(judge, prompts, texts, meter)
    scores = np.zeros(flags.shape)
    if flags.shape[2] > 1:
        owners, every = _flat(prompts, texts)
        scores = scorer.score(owners, every, meter).reshape(flags.shape)
    return Cells(list(prompts), list(settings), texts, flags, scores)


def flags_of(judge: HarmJudge, prompts: Sequence[Prompt], texts: Texts, meter: Cost | None = None) -> Array:
    """[P, C, n]"""
    owners, every = _flat(prompts, texts)
    return judge.flags(owners, every, meter).reshape(len(texts), len(texts[0]), -1)


def stand_ins(safe: Sequence[str], shape: tuple[int, ...], seed: int) -> list[list[list[str]]]:
    """Known safe answers, drawn at random, in the place of a model's: one in each cell [P, C]."""
    picks = np.random.default_rng(seed).integers(0, len(safe), shape)
    return [[[safe[i]] for i in row] for row in picks.tolist()]


def _flat(prompts: Sequence[Prompt], texts: Texts) -> tuple[list[Prompt], list[str]]:
    """Every text, and the prompt that it answers."""
    owners = [prompt for prompt, grid in zip(prompts, texts, strict=True) for row in grid for _ in row]
    return owners, [text for grid in texts for row in grid for text in row]
