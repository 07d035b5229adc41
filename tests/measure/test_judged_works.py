"""A local model that has learnt to judge finds the better system; the same model untrained finds none.

The world: twenty words of known worth. The judge is trained on pairs of words in both orders and never sees the held-out
pairs that the two systems then answer with. Baseline: the untrained model of the same shape.
Statistic: win rate of the better system over 40 held-out pairs, exact sign test, 3 seeds.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from scripted import Answers, subjects
from taught import blank, taught
from trimtab.lm import LM
from trimtab.measure.judged import Judged
from trimtab.measure.measurement import Measurement

WORDS = [f"w{i}" for i in range(20)]
RUBRIC = "{prompt} first {a} second {b} better"
SEEDS = (0, 1, 2)


def pairs(seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(better, worse) pairs to learn from, and held-out ones."""
    every = [(i, j) for i in range(20) for j in range(i)]
    random.Random(seed).shuffle(every)
    return every[40:], every[:40]


def measured(lm: LM, seed: int, folder: Path) -> Measurement:
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    held_out = pairs(seed)[1]
    good = Answers("good", lambda i, k: WORDS[held_out[i][0]])
    bad = Answers("bad", lambda i, k: WORDS[held_out[i][1]])
    spec = f"judge:path={folder},rubric={RUBRIC}"
    return Judged().measure_together(subjects(len(held_out), good, bad, judge=spec))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_judge_that_can_judge(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", "off")
    learn = pairs(seed)[0]
    numbers = [str(i) for i in range(40)]
    rows = [
        (f"{n} first {WORDS[a]} second {WORDS[b]} better", "A" if a > b else "B")
        for n in random.Random(seed).sample(numbers, 6)
        for i, j in learn
        for a, b in ((i, j), (j, i))
    ]
    out = measured(taught(rows, epochs=4, seed=seed, words=[*numbers, *WORDS]), seed, tmp_path / "judge")
    row = out.row("win rate against bad")
    assert row.value is not None and row.low is not None and row.low > 0.5
    assert out.details["against"]["bad"]["sign_test_p"] < 0.05
    baseline = measured(
        blank([*numbers, *WORDS, "first", "second", "better", "A", "B"], seed), seed, tmp_path / "blank"
    )
    row = baseline.row("win rate against bad")
    assert row.low is None or row.low <= 0.5
