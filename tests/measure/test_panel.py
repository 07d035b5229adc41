"""The side-effect panel: its columns by hand, its verdicts on a planted change, and on none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tiny import tiny_lm
from trimtab import Sampling
from trimtab.control import FunctionControl, Steered
from trimtab.decode.best_of_n import BestOfN
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.measure.diagnostic import Subject
from trimtab.measure.measurement import Measurement, Row
from trimtab.measure.panel import KL, Panel, PanelConfig, bought, join, per_prompt
from trimtab.rewards import as_reward

PROMPTS = [f"{a} {b}" for a in ("ba", "da", "fa", "ga", "la") for b in ("be", "de", "fe", "ge", "le")]
SAMPLING = Sampling(max_new_tokens=8)


def count_a(prompts: list[str], texts: list[str]) -> list[float]:
    return [float(text.count("a")) for text in texts]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


def towards_a(lm: LM) -> Steered:
    """Pushed towards words in "a": one thing is planted, the rest is a side effect."""
    ids = [number for word, number in lm.tokenizer.get_vocab().items() if word.endswith("a")]
    direction = lm.unembedding[ids].mean(0) - lm.unembedding.mean(0)
    push = 3.0 * direction / direction.norm() ** 2
    return Steered(lm, FunctionControl(lambda hidden: hidden + push), "towards-a")


def subject(policy: object, **more: object) -> Subject:
    return Subject(policy, repr(policy), prompts=list(PROMPTS), sampling=SAMPLING, reward=as_reward(count_a), **more)  # type: ignore[arg-type]


def test_what_was_planted_is_found_and_paid_for(lm: LM) -> None:
    tool = Panel(PanelConfig(samples=4))
    base, steered = subject(lm), subject(towards_a(lm))
    steered.reference = base
    first, second = tool.measure(steered), tool.measure(base)
    found = tool.compare(first, second)
    assert found.change("reward").verdict == found.change("win rate").verdict == "better"
    paid = found.change(KL)
    assert paid.difference is not None and paid.difference > 0 and paid.low is not None and paid.low > 0
    assert KL not in second.samples


def test_nothing_changed_is_undecided(lm: LM) -> None:
    """Another seed of the same model: about one in twenty verdicts may be wrong; over these six lines none is."""
    tool = Panel(PanelConfig(samples=4))
    one = tool.measure(subject(lm))
    other = subject(lm)
    other.sampling = SAMPLING.but(seed=7)
    two = tool.measure(other)
    two.measured["sampling"] = one.measured["sampling"]
    assert {change.verdict for change in tool.compare(one, two).changes} <= {"undecided", ""}


def test_three_wins_among_ties_are_no_win() -> None:
    """The interval of 3 wins in 75 excludes one half; the sign test of three (p = 0.25) has to agree."""
    rewards = [[1.0] * 3 + [0.0] * 72, [0.0] * 75]
    sides = [Measurement("panel", "x", {}, "prompt", samples={"reward": list(column)}) for column in rewards]
    won = bought(*sides)[0]
    assert won.low is not None and won.low > 0 and won.p_value == 0.25 and won.verdict == "undecided"


def test_entropy_is_the_models_own(lm: LM) -> None:
    """One prompt's value by hand: the mean over its answer's positions of -sum p log p."""
    one = subject(lm)
    found = Panel().measure(one)
    answers = one.answers(PROMPTS, SAMPLING.but(samples=1))
    logprobs = next(iter(lm.token_logprobs(answers.prompts[:1], answers.tokens[:1])))
    by_hand = float(-(logprobs.exp() * logprobs).sum(-1).mean())
    assert found.samples["entropy per token"][0] == pytest.approx(by_hand, abs=1e-5)
    row = found.row("entropy per token")
    assert row.value is not None and f"{math.exp(row.value):.2f}" in row.note


def test_policies_without_a_distribution_leave_lines_out(lm: LM) -> None:
    best = subject(BestOfN(lm, count_a, 2))
    best.reference = subject(lm)
    assert not {KL, "entropy per token"} & {*Panel().measure(best).samples}
    greedy = subject(lm)
    greedy.sampling = SAMPLING.but(temperature=0.0)
    assert "entropy per token" not in Panel().measure(greedy).samples


def test_means_over_samples_and_what_could_not_be_judged() -> None:
    assert per_prompt([1.0, 3.0, None, 5.0, None, None], 2) == [2.0, 5.0, None]


def test_parts_keep_to_their_own_units() -> None:
    whole = Measurement("panel", "x", {}, "prompt", ["p"], {"a": [1.0]}, [Row("a", 1.0)])
    part = Measurement("y", "x", {"model": "m", "texts": "t"}, "q", ["q1", "q2"], {"a": [0.0, None]}, [Row("a", 0.0)])
    join(whole, part, "y")
    assert whole.units == ["p", "y: q1", "y: q2"] and whole.measured == {"y": {"texts": "t"}}
    assert whole.samples == {"a": [1.0, None, None], "y: a": [None, 0.0, None]}
    assert [row.label for row in whole.table] == ["a", "y: a"]


def test_files_of_their_own(lm: LM, tmp_path: Path) -> None:
    (tmp_path / "h.txt").write_text("ba\nda\n")
    found = Panel(PanelConfig(harmful=tmp_path / "h.txt")).measure(subject(lm))
    assert found.row("refusal").n == 2 and len(found.units) == len(PROMPTS) + 2
    with pytest.raises(UsageError, match="goes with harmful"):
        PanelConfig(harmless=tmp_path / "h.txt")
    with pytest.raises(UsageError, match="there is no file"):
        PanelConfig(tasks=(tmp_path / "absent",))


def test_torch_is_left_alone(lm: LM) -> None:
    before = torch.random.get_rng_state()
    Panel().measure(subject(lm))
    assert torch.equal(before, torch.random.get_rng_state())
