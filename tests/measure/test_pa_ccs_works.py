"""PA-CCS finds what a tiny model was taught to hold true, and sees it go when "not" is masked.

The world: "X is F ." and "X is not F .", where F alone decides which is true. A tiny Llama (2 layers, width 64) is
taught to say true or false, and after "Yes." or "No." whether that answer was right; half of the time it says the
subject (after Yes.) or the property (after No.) instead, for a model that says nothing but right and wrong has states
that every direction parts (random directions: ESA 0.9). Baseline: random directions. Half of the 64 pairs are looked at:
with 20 % of them, 13, the exact test behind a verdict cannot tell ESA 1.0 from an untaught model's 0.6 in each seed.

Measured with 5 seeds at 600 steps, 20 % held out: ESA 1.00 in each, random directions 0.70 to 0.76, masked 0.50 to 0.54,
lost by masking 0.46 to 0.50. Three of them run here. Not every such world works: where right and wrong were joined with one
of three groups into one word, 1 seed of 5 had ESA 0.60 with |PC| 0.000 and CI 0.03 (a direction as consistent as the
truth: CCS cannot choose); the guard refused it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from taught import blank, sft, taught
from trimtab.lm import LM
from trimtab.measure.diagnostic import Subject
from trimtab.measure.measurement import Measurement
from trimtab.measure.pa_ccs import PaCcs, PaCcsConfig

WORDS = ["Yes.", "No.", "ttt", "right", "wrong", "true", "false"]


def measured(lm: LM, path: Path) -> Measurement:
    return PaCcs(PaCcsConfig(steps=400, tries=5, test=0.5)).measure(Subject(lm, lm.fingerprint, texts=[path]))


@pytest.mark.parametrize("seed", range(3))
def test_the_truth_of_a_taught_world_is_found_and_hangs_on_the_word_not(seed: int, tmp_path: Path) -> None:
    good = np.random.default_rng(seed).permutation(8)[:4]
    world = [(f"x{x}", f"f{f}", negated, (f in good) != negated)
             for x in range(8) for f in range(8) for negated in (False, True)]  # fmt: skip
    said = [(f"{x} is {'not ' if negated else ''}{f} .", x, f, true) for x, f, negated, true in world]
    hints = [(text, "true" if true else "false") for text, _, _, true in said]
    asked = [(f"{text} {answer}", "right" if true == (answer == "Yes.") else "wrong")
             for text, _, _, true in said for answer in ("Yes.", "No.")]  # fmt: skip
    about = [row for text, x, f, _ in said for row in ((f"{text} Yes.", x), (f"{text} No.", f))]
    lm = sft(taught(hints, 16, seed, words=WORDS), hints + asked + about, 14, 3e-3, 32, seed)
    raw = blank([*WORDS, *(word for text, _ in hints for word in text.split())], seed)
    rows = []
    for (one, _, _, true), (other, _, _, _) in zip(said[::2], said[1::2], strict=True):
        rows.append({"harmful": other, "safe": one} if true else {"harmful": one, "safe": other})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    found = measured(lm, path)
    values = {row.label: row.value or 0 for row in found.table}
    assert found.details["refused"] == "" and found.details["layer"] == 2
    assert values["ESA"] >= 0.95 and values["polar accuracy"] >= 0.95
    assert values["ESA"] - values["ESA, random directions"] > 0.2
    assert values["|PC|"] < 0.05 and values["CI"] < 0.15
    assert values["ESA, word masked"] <= found.details["layers"][2]["chance"] + 0.1  # chance
    assert values["ESA lost by masking"] > 0.3 and values["|PC| gained by masking"] > 0.3

    untaught = measured(raw, path)
    assert untaught.details["refused"]
    lost = untaught.row("ESA lost by masking")
    assert lost.low is None or lost.low <= 0  # no drop
    change = PaCcs().compare(found, untaught)
    assert change.change("ESA").verdict == "better" and change.change("polar accuracy").verdict == "better"
    assert [one.label for one in change.changes] == ["ESA", "polar accuracy"]  # PC and CI may not be read of both
