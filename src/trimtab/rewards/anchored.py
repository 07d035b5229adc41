"""A pair judge as a reward: the mean probability that an answer beats fixed answers to the same prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab.fingerprint import fingerprint_of
from trimtab.policy import Cost, Prompt, prompt_text
from trimtab.rewards.base import Reward
from trimtab.rewards.pair_judge import PairJudge


@dataclass(eq=False)
class Anchored(Reward):
    """anchors: for each prompt (as text) the answers to beat, always the same ones.

    None where a prompt has none, or where any of its comparisons gave no verdict: against fewer anchors the number would
    mean something else.
    """

    slug = "anchored"
    on_prefixes = False

    judge: PairJudge
    anchors: Mapping[str, Sequence[str]]

    @property
    def name(self) -> str:
        return f"anchored/{self.judge.name}"

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(
            self.slug, self.judge.fingerprint, {key: list(texts) for key, texts in self.anchors.items()}
        )

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
        rows = [
            (row, anchor) for row, prompt in enumerate(prompts) for anchor in self.anchors.get(prompt_text(prompt), ())
        ]
        meter = Cost()
        verdicts = self.judge.compare(
            [prompts[row] for row, _ in rows], [texts[row] for row, _ in rows], [anchor for _, anchor in rows], meter
        )
        self.tokens_forwarded += meter.tokens_forwarded
        beaten: list[list[float | None]] = [[] for _ in prompts]
        for (row, _), verdict in zip(rows, verdicts, strict=True):
            beaten[row].append(verdict.p_a)
        known = [[p for p in row if p is not None] for row in beaten]
        return [
            sum(ps) / len(ps) if ps and len(ps) == len(row) else None for ps, row in zip(known, beaten, strict=True)
        ]
