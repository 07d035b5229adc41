"""Measurements, their comparison, cached answers; the refusal diagnostic end to end; verdicts where nothing differs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taught import taught
from tiny import CHAT, tiny_lm, tiny_tokenizer
from trimtab import Sampling
from trimtab.errors import UsageError
from trimtab.files import dump_json
from trimtab.lm import LM
from trimtab.measure.cache import Cache
from trimtab.measure.diagnostic import Diagnostic, Subject, said
from trimtab.measure.measurement import Bracket, Dots, Heat, Line, Lines, Measurement, Row, check_alike
from trimtab.measure.rates import rate
from trimtab.measure.refusal import is_refusal
from trimtab.measure.refusal_rate import RefusalRate, RefusalRateConfig
from trimtab.measure.stats import Interval, mean_interval

PROMPTS = ["ba da fa", "ma na", "pe ra"]


@dataclass(frozen=True)
class Settings:
    """None."""


class Plain(Diagnostic):
    slug, Config = "plain", Settings

    def measure(self, subject: Subject) -> Measurement:
        raise NotImplementedError


def measured(values: list[float | None], **about: Any) -> Measurement:
    row = Row.of("score", mean_interval([np.nan if v is None else v for v in values]), about.pop("better", "higher"))
    taken = {"model": "m", "texts": "t", "template": "none", **about}
    return Measurement("plain", "x", taken, "prompt", list(map(str, range(len(values)))), {"score": values}, [row])


def test_a_measurement_is_json_and_back() -> None:
    one = measured([1.0, None, 3.0])
    one.figures = [
        Lines("a", "x", "y", [Line("l", [(0, 1.0), (1, None), (2, 1.0, 0.5, 1.5)])], [("chance", 0.5)]),
        Heat("b", ["r"], ["c", "d"], [[0.5, None]]),
        Dots("c", "x", [("p", 1.0, None, None)]),
        Bracket("d", [[("a", "b", "a"), ("c", None, "c")], [("a", "c", "c")]]),
    ]
    again = Measurement.from_dict(json.loads(dump_json(one.to_dict())))
    assert again.to_dict() == json.loads(dump_json(one.to_dict())) and again.fingerprint == one.fingerprint
    with pytest.raises(UsageError, match="schema 9"):
        Measurement.from_dict({**one.to_dict(), "schema": 9})


def test_comparison_is_paired_and_judged_by_direction() -> None:
    ours, theirs = [1.0, 2.0, 3.1, 4.0, 5.0, 6.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    change = Plain().compare(measured(ours), measured(theirs)).change("score")
    assert change.difference == pytest.approx(6.1 / 6) and change.verdict == "better" and change.n == 6
    for better, verdict in (("lower", "worse"), ("", "changed")):
        a, b = (measured(values, better=better) for values in (ours, theirs))
        assert Plain().compare(a, b).change("score").verdict == verdict
    five = Plain().compare(measured(ours[:5]), measured(theirs[:5])).change("score")
    assert five.verdict == "undecided" and five.p_value == 2 / 32 and "at random" in five.note
    assert said(Interval(0.1, -0.1, 0.3), "lower") == "undecided"


def test_a_unit_that_one_side_lacks_is_left_out_of_both() -> None:
    change = Plain().compare(measured([1.0, None, 3.0]), measured([0.0, 5.0, 2.5])).change("score")
    assert change.n == 2 and change.difference == pytest.approx(0.75)


@pytest.mark.parametrize("key", ["texts", "template", "settings"])
def test_other_fingerprints_are_refused(key: str) -> None:
    with pytest.raises(UsageError, match=f"not measured alike \\({key}: .* against other"):
        check_alike(measured([1.0]), measured([1.0], **{key: "other"}))
    check_alike(measured([1.0]), measured([2.0], model="another model is what one compares"))


def test_one_from_the_cache_is_alike() -> None:
    """A tuple that became a list on its way through JSON is no difference."""
    fresh = measured([1.0], sampling={"stop": ()})
    check_alike(fresh, Measurement.from_dict(json.loads(dump_json(fresh.to_dict()))))


def test_other_units_are_refused() -> None:
    other = measured([1.0])
    other.units = ["7"]
    with pytest.raises(UsageError, match="different prompts"):
        check_alike(measured([1.0]), other)


def test_identical_systems_differ_at_most_at_the_nominal_rate() -> None:
    """Two systems of one distribution, 40 prompts, 1,000 comparisons: 5 % nominal, 3 standard errors above it."""
    rng = np.random.default_rng(0)
    false = 0
    for number in range(1000):
        quality = rng.standard_normal(40)
        a, b = (quality + rng.standard_normal(40) for _ in range(2))
        from trimtab.measure.stats import paired_difference

        false += said(paired_difference(a, b, resamples=400, seed=number), "higher") != "undecided"
    assert false / 1000 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)


def test_answers_are_drawn_once(tmp_path: Path) -> None:
    lm, prompts = tiny_lm(), [f"{a} {b}" for a in ("ba", "da", "fa", "ga") for b in ("be", "de", "fe", "ge", "le")]
    sampling = Sampling(max_new_tokens=5, samples=2, seed=3)
    first = Subject(lm, lm.fingerprint, sampling=sampling, cache=Cache(tmp_path))
    drawn = first.answers(prompts)
    again = Subject(lm, lm.fingerprint, sampling=sampling, cache=Cache(tmp_path))
    known = again.answers(prompts)
    assert (known.texts, known.tokens, known.logprobs) == (drawn.texts, drawn.tokens, drawn.logprobs)
    assert first.meter.tokens_forwarded == drawn.cost.tokens_forwarded == known.cost.tokens_forwarded > 0
    assert again.meter.tokens_forwarded == 0
    # a run that was killed after its first chunk draws the rest, and the same
    [*chunks] = sorted((tmp_path / "answers").iterdir(), key=lambda path: path.stat().st_size)
    chunks[0].unlink()
    killed = Subject(lm, lm.fingerprint, sampling=sampling, cache=Cache(tmp_path))
    assert killed.answers(prompts).texts == drawn.texts and killed.meter.tokens_forwarded > 0


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but no.", True), ("I\u2019m sorry.", True), ("I CANNOT do that", True), ("Sure, here it is.", False),
        ("", False), ("Sure. " * 60 + "I'm sorry for the length.", False), ("As an AI, I", True),
    ],
)  # fmt: skip
def test_refusals(text: str, refuses: bool) -> None:
    assert is_refusal(text) is refuses


def test_rates_of_nothing_are_not_certain() -> None:
    assert (rate([0.0] * 20).low, rate([0.0] * 20).high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert rate([1.0] * 20).high == 1.0 and rate([0.5] * 20).low is None
    assert rate([]).mean is None


@pytest.fixture(scope="module")
def models() -> tuple[LM, LM]:
    """Two models: one refuses what begins with "harm", one nothing. Both answer "ask" alike."""
    rows = [(f"{verb} {thing}", "sure fine") for verb in ("ask", "harm") for thing in ("a", "b", "c", "d", "e")]
    polite = [(asked, "i cannot" if asked.startswith("harm") else told) for asked, told in rows]
    words = ["i", "cannot", "sure", "fine"]
    return taught(polite * 20, 4, words=words, name="polite"), taught(rows * 20, 4, words=words, name="frank")


def test_refusal_is_found_where_it_was_taught(models: tuple[LM, LM], tmp_path: Path) -> None:
    things = [f"{a} {b}" for a in "abcde" for b in "abcde"]
    harmful, harmless = tmp_path / "harmful.txt", tmp_path / "harmless.txt"
    harmful.write_text("\n".join(f"harm {thing}" for thing in things))
    harmless.write_text("\n".join(f"ask {thing}" for thing in things))
    tool = RefusalRate(RefusalRateConfig(samples=2))
    found = [
        tool.measure(Subject(lm, lm.fingerprint, [harmful, harmless], sampling=Sampling(max_new_tokens=4)))
        for lm in models
    ]
    refusal, over = found[0].row("refusal"), found[0].row("over-refusal")
    assert refusal.value is not None and refusal.value > 0.9 and over.value is not None and over.value < 0.1
    assert found[1].row("refusal").value == 0.0 and found[1].row("refusal").high == pytest.approx(1 - 0.025 ** (1 / 25))
    comparison = tool.compare(*found)
    assert comparison.change("refusal").verdict == "better"
    assert comparison.change("over-refusal").verdict == "undecided"
    # the same model against itself, another seed: nothing
    other = Subject(models[0], "again", [harmful, harmless], sampling=Sampling(max_new_tokens=4, seed=0))
    assert {change.verdict for change in tool.compare(found[0], tool.measure(other)).changes} == {"undecided"}
    with pytest.raises(UsageError, match="two files at most"):
        tool.measure(Subject(models[0], "x", [harmful] * 3))
    with pytest.raises(UsageError, match="--texts FILE is needed"):
        tool.measure(Subject(models[0], "x"))


def test_only_harmful_prompts_is_warned_about(models: tuple[LM, LM], tmp_path: Path) -> None:
    (tmp_path / "h.txt").write_text("harm a\nharm b\n")
    found = RefusalRate().measure(Subject(models[0], "x", [tmp_path / "h.txt"], sampling=Sampling(max_new_tokens=4)))
    assert "refuses everything" in found.warnings[0]


def test_another_template_is_refused_with_the_way_out() -> None:
    plain, chat = tiny_lm(), tiny_lm(tokenizer=tiny_tokenizer(chat=CHAT))
    a, b = (Subject(lm, lm.fingerprint).measured(PROMPTS, Settings()) for lm in (plain, chat))
    with pytest.raises(UsageError, match="--template plain"):
        check_alike(Measurement("plain", "a", a, "prompt"), Measurement("plain", "b", b, "prompt"))
