"""Win rates by a judge: known verdicts, biased and noisy judges, what goes wrong with judges and with answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chat_server import ChatServer
from scripted import Answers, subjects
from trimtab.decode import BestOfN
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.measure.cache import Cache
from trimtab.measure.diagnostic import Subject
from trimtab.measure.duel import Duel, counted, win_interval, wins
from trimtab.measure.judged import Judged, JudgedConfig, fill_in, self_judged
from trimtab.measure.measurement import Measurement
from trimtab.measure.stats import sign_test
from trimtab.policy import Cost, Prompt
from trimtab.rewards import Function, PocketReward, parse_reward
from trimtab.rewards.judge import Judgement
from trimtab.rewards.pair_judge import PairJudge, PolicyJudge, Verdict, in_both_orders
from trimtab.sampling import Sampling


def by_number() -> Function:
    """Answers are numbers, and larger is better; "?" cannot be judged."""
    return Function(lambda prompts, texts: [None if t == "?" else float(t) for t in texts], "number")


def against(ours: Any, theirs: Any, count: int, config: JudgedConfig | None = None, **options: Any) -> Measurement:
    pair = subjects(count, Answers("ours", ours), Answers("theirs", theirs), **{"reward": by_number(), **options})
    return Judged(config).measure_together(pair)


WIN = "win rate against theirs"


@pytest.mark.parametrize(("won", "lost", "p"), [(60, 40, 0.0569), (34, 16, 0.01535)])
def test_the_sign_test(won: int, lost: int, p: float) -> None:
    """Exact binomial, to the digits given."""
    out = against(lambda i, k: "1" if i < won else "0", lambda i, k: "0.5", won + lost)
    assert out.details["against"]["theirs"]["sign_test_p"] == pytest.approx(p, abs=5e-5)
    assert out.details["against"]["theirs"]["sign_test_p"] == sign_test(won, lost)
    row = out.row(WIN)
    assert row.value == won / (won + lost) and row.n == won + lost
    alone = out.row("won of the decided prompts against theirs")
    assert alone.value == row.value and alone.n == won + lost
    if won == 60:  # Wilson: (0.6 + z^2/200 -+ z sqrt(0.24/100 + z^2/40000)) / (1 + z^2/100), z = 1.959964
        assert (alone.low, alone.high) == (pytest.approx(0.50200, abs=1e-5), pytest.approx(0.69060, abs=1e-5))
    assert row.note.startswith(f"{won} won, 0 tied, {lost} lost; sign test p = ")


def test_ties_count_half_and_equal_answers_are_ties() -> None:
    out = against(lambda i, k: ["1", "0", "0.50", "0.5"][i % 4], lambda i, k: "0.5", 40)
    assert out.row(WIN).value == 0.5 and out.details["against"]["theirs"] | {"sign_test_p": 0} == {
        "wins": 10, "ties": 20, "losses": 10, "sign_test_p": 0, "holm_p": 1.0,
        "pairs": 40, "equal": 10, "flipped": 0, "unjudged": {},
    }  # fmt: skip
    assert out.row("equal answers against theirs").value == 0.25
    assert out.samples[WIN] == [1.0, 0.0, 0.5, 0.5] * 10


def test_unjudged_pairs_are_neither_ties_nor_losses() -> None:
    out = against(lambda i, k: "?" if i % 4 == 0 else "1", lambda i, k: "0", 40)
    row = out.row(WIN)
    assert row.value == 1.0 and row.n == 30 and out.samples[WIN][:4] == [None, 1.0, 1.0, 1.0]
    assert row.low == pytest.approx(0.025 ** (1 / 30)) and row.high == 1.0  # exact: 30 of 30
    unjudged = out.row("unjudged against theirs")
    assert unjudged.value == 0.25 and unjudged.n == 40 and unjudged.note == "no score 10"
    assert any("10 of 40 pairs against theirs are unjudged, mostly: number gave no score" in w for w in out.warnings)


def test_all_unjudged_is_undefined_and_not_half() -> None:
    out = against(lambda i, k: "?", lambda i, k: "0", 5)
    assert (
        out.row(WIN).value is None and out.row(WIN).n == 0 and out.details["against"]["theirs"]["sign_test_p"] is None
    )
    assert out.row("length-controlled win rate against theirs").value is None
    assert out.row("unjudged against theirs").value == 1.0
    json.dumps(out.to_dict(), allow_nan=False)


def test_one_prompt_has_no_interval() -> None:
    row = against(lambda i, k: "1", lambda i, k: "0", 1).row(WIN)
    assert row.value == 1.0 and row.n == 1 and row.low is None and row.high is None


def test_samples_of_a_prompt_stay_together() -> None:
    """Two samples that always agree are no more than one: the same interval and test."""
    two = against(lambda i, k: str(i % 3), lambda i, k: "0.5", 30, JudgedConfig(samples=2))
    one = against(lambda i, k: str(i % 3), lambda i, k: "0.5", 30)
    a, b = two.row(WIN), one.row(WIN)
    assert (a.value, a.low, a.high, a.n) == (b.value, b.low, b.high, b.n) == (b.value, b.low, b.high, 30)
    assert two.details["against"]["theirs"]["sign_test_p"] == one.details["against"]["theirs"]["sign_test_p"]
    assert two.details["against"]["theirs"]["wins"] == 2 * one.details["against"]["theirs"]["wins"]


class Scripted(PairJudge):
    """P(first shown is better), by a function of (prompt, first, second)."""

    name, fingerprint = "scripted", "scripted"

    def __init__(self, says: Any) -> None:
        self.says = says

    def prefer(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], meter: Cost | None
    ) -> list[Judgement]:
        return [Judgement(self.says(*row)) for row in zip(prompts, first, second, strict=True)]


def duel(judge: PairJudge, ours: list[str], theirs: list[str]) -> Measurement:
    prompts: list[Prompt] = [str(i) for i in range(len(ours))]
    lengths = ([len(text) for text in ours], [len(text) for text in theirs])
    out = Measurement("judge", "ours", {}, "prompt")
    fill_in(
        out, [Duel("theirs", judge.compare(prompts, ours, theirs), list(range(len(ours))), lengths)], judge, len(ours)
    )
    return out


def test_a_judge_that_always_takes_the_first() -> None:
    """Exact: half of every pair, and every one flips."""
    out = duel(Scripted(lambda p, a, b: 1.0), [f"a{i}" for i in range(40)], [f"b{i}" for i in range(40)])
    assert out.row(WIN).value == 0.5 and out.row("position flips against theirs").value == 1.0
    assert out.details["against"]["theirs"]["flipped"] == 40 and out.details["against"]["theirs"]["sign_test_p"] is None
    assert any("changed its mind with the order in 40 of 40 pairs" in w for w in out.warnings)
    assert any("only 0 prompts were decided" in w for w in out.warnings)


def test_a_judge_that_errs_on_a_known_share() -> None:
    """w = 0.7 of 100, wrong on exactly one win in five and one loss in five: 0.8 w + 0.2 (1 - w) = 0.62, exactly."""
    wrong = {*range(14), *range(70, 76)}
    out = duel(
        Scripted(lambda p, a, b: float((a > b) != (int(p) in wrong))),
        ["1" if i < 70 else "0" for i in range(100)],
        ["0" if i < 70 else "1" for i in range(100)],
    )
    assert out.row(WIN).value == pytest.approx(0.62, abs=1e-12) and out.row("position flips against theirs").value == 0


@pytest.mark.parametrize("accuracy", [0.6, 0.8, 0.95])
def test_a_noisy_judge_shrinks_the_win_rate(accuracy: float) -> None:
    """a w + (1 - a)(1 - w), errors independent in each order: disagreements are ties, which leaves the mean.

    4,000 pairs, w = 0.7: the standard error is below 0.008; three of them.
    """
    generator = np.random.default_rng(7)
    right = iter(generator.random(8000) < accuracy)
    judge = Scripted(lambda p, a, b: float((a > b) == next(right)))
    ours = ["1" if i < 2800 else "0" for i in range(4000)]
    found = judge.compare([str(i) for i in range(4000)], ours, ["0" if x == "1" else "1" for x in ours])
    observed = np.mean([verdict.outcome for verdict in found])
    assert observed == pytest.approx(accuracy * 0.7 + (1 - accuracy) * 0.3, abs=0.024)
    flips = np.mean([verdict.flipped for verdict in found])
    assert flips == pytest.approx(2 * accuracy * (1 - accuracy), abs=0.024)


@pytest.mark.parametrize("ties", [0.2, 0.9])
def test_two_equal_systems_are_seldom_told_apart(ties: float) -> None:
    """150 comparisons of 40 prompts where nothing differs: neither the sign test nor the interval fires above 5 %.

    Bound: the 99.9 % point of Binomial(150, 0.05) is 17. Over 1,000: 2.0 % and 2.1 % (2 in 10 ties), 0.9 % and
    0.9 % (9 in 10 ties), where the bootstrap interval alone fired in 8.1 %.
    """
    fired = np.array([equal_systems(np.random.default_rng((3, run)), ties) for run in range(150)])
    assert (fired.sum(0) <= 17).all()


def equal_systems(generator: np.random.Generator, ties: float) -> tuple[bool, bool]:
    """Whether the sign test and the interval tell two systems apart that do not differ."""
    outcomes = generator.choice([0.0, 0.5, 1.0], 40, p=[(1 - ties) / 2, ties, (1 - ties) / 2])
    lengths = [1] * 40
    result = wins(Duel("b", [Verdict(float(x), x == 0.5) for x in outcomes], list(range(40)), (lengths, lengths)))
    found = win_interval(result.rate, outcomes.tolist())
    outside = found.low is not None and found.high is not None and not found.low <= 0.5 <= found.high
    return result.p_value is not None and result.p_value < 0.05, outside


def test_few_decided_prompts_need_a_wider_interval() -> None:
    """3 of 40 decided, all lost: A = 3/80, P = [0, 0.7076] (1 - 0.025^(1/3)): up to 0.5 + 0.0375 * 0.4152 = 0.51557."""
    found = against(lambda i, k: "0" if i < 3 else "0.50", lambda i, k: "0.5", 40).row(WIN)
    assert found.value == 0.4625 and found.high == pytest.approx(0.5 + 0.0375 * (1 - 2 * 0.025 ** (1 / 3)), abs=1e-9)
    assert found.low is not None and found.low <= 0.4625


def test_length_is_controlled_for() -> None:
    """A judge of length alone, equal quality: the raw win rate is the share of longer answers, the controlled about even.

    120 prompts, ours longer in about 80 % of them. The interval of the controlled rate holds 1/2, the raw one's does not.
    """
    generator = np.random.default_rng(0)
    longer = generator.normal(20, 25, 120).round().astype(int)
    ours = ["a" * int(60 + d) for d in longer]
    noisy = iter(generator.logistic(0, 12, 120))
    says = {i: float(d + next(noisy) > 0) for i, d in enumerate(longer)}
    out = duel(Scripted(lambda p, a, b: says[int(p)] if a[0] == "a" else 1 - says[int(p)]), ours, ["b" * 60] * 120)
    raw, controlled = out.row(WIN), out.row("length-controlled win rate against theirs")
    assert raw.low is not None and raw.low > 0.6
    assert controlled.low is not None and controlled.high is not None and controlled.low < 0.5 < controlled.high


def test_several_opponents_and_holm() -> None:
    policies = [Answers("ours", lambda i, k: "1"), Answers("theirs", lambda i, k: str(i % 4 * 0.75))]
    policies += [Answers("theirs", lambda i, k: str(i % 4 * 0.7)), Answers("others", lambda i, k: "0")]
    out = Judged().measure_together(subjects(24, *policies, reward=by_number()))
    labels = [WIN, "win rate against theirs #2", "win rate against others"]
    assert list(out.samples) == labels and [out.row(label).value for label in labels] == [0.5, 0.5, 1.0]
    assert (
        "Holm" in out.row(WIN).note
        and out.details["against"]["others"]["holm_p"] == 3 * out.details["against"]["others"]["sign_test_p"]
    )
    assert [dot[0] for dot in out.figures[0].dots] == ["against theirs", "against theirs #2", "against others"]  # type: ignore[union-attr]
    assert any("undecided; about" in note for note in out.notes)


def test_truncated_answers_are_named() -> None:
    pair = subjects(
        4, Answers("ours", lambda i, k: "1", "length"), Answers("theirs", lambda i, k: "0"), reward=by_number()
    )
    warnings = Judged().measure_together(pair).warnings
    assert "4 of 4 answers of ours were cut at the token limit: raise --max-new-tokens" in warnings


def test_raw_verdicts_come_back_through_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "elsewhere"))

    def reply(number: int, body: dict[str, Any]) -> Any:
        said = body["messages"][0]["content"]
        if "Question: 3\n" in said:
            return b"not json"
        if "Question: 4\n" in said:
            return "I'm sorry, I cannot compare these."
        return "A" if "Answer A: 1" in said else "B"

    with ChatServer(reply) as server:
        spec = f"judge:url={server.url},model=m,retries=0"
        pair = [Answers("ours", lambda i, k: "1"), Answers("theirs", lambda i, k: "0")]
        run = lambda: Judged().measure_together(subjects(6, *pair, judge=spec, cache=Cache(tmp_path)))  # noqa: E731
        out = run()
        asked = len(server.requests)
        again = run()
        assert asked == 12 and len(server.requests) - asked == 2  # only the malformed ones are asked again
    assert out.row(WIN).value == 1.0 and out.details["failed"] == 1
    assert out.details["against"]["theirs"]["unjudged"] == {"malformed": 1, "refusal": 1}
    assert again.row(WIN) == out.row(WIN) and again.cost.reward_calls == 2
    back = Measurement.from_dict(json.loads(json.dumps(out.to_dict(), allow_nan=False)))
    assert back.table == out.table and back.fingerprint == out.fingerprint
    pairs = back.details["pairs"]
    assert pairs[0]["raw"] == ["A", "B"] and pairs[0]["outcome"] == 1.0 and pairs[4]["raw"][0].startswith("I'm sorry")
    assert pairs[3]["p_a"] is None and pairs[3]["kind"] == "malformed"


def test_the_judge_is_a_contestant() -> None:
    lm = LM.load("pocket/base")
    best = BestOfN(lm, PocketReward(), n=2)
    prompts: list[Prompt] = ["Q: What has Anna?\nA:", "Q: Where is Ben?\nA:"]
    sampling = Sampling(max_new_tokens=8)
    pair = [
        Subject(policy, policy.name, prompts=prompts, sampling=sampling, judge="pocket/base") for policy in (best, lm)
    ]
    warnings = Judged().measure_together(pair).warnings
    for name in ("pocket/base", "best-of-2"):
        assert f"{name} answers with the judge's own model: models prefer their own answers" in warnings
    assert any("it was forced to choose" in w for w in warnings)
    for subject in pair:
        subject.judge = "pocket/reward"
    warnings = Judged().measure_together(pair).warnings
    assert "best-of-2 was chosen by the very reward that judges it: its win rate is optimistic" in warnings
    assert not any("pocket/base was chosen" in w for w in warnings)


def test_the_endpoint_has_the_name_of_a_contestant() -> None:
    judge = PolicyJudge(Answers("ours", lambda i, k: "A"))
    assert self_judged(judge, subjects(1, Answers("ours", None), Answers("theirs", None)), ["ours", "theirs"]) == [
        "ours answers with the judge's own model: models prefer their own answers"
    ]


def test_counted() -> None:
    verdicts = [
        in_both_orders(Judgement(1.0), Judgement(1.0)),
        Verdict(None, kind="timeout"),
        Verdict(0.5, True, None, True),
    ]
    assert counted(verdicts) == {"pairs": 3, "equal": 1, "flipped": 1, "unjudged": {"timeout": 1}}


def test_bad_input(tmp_path: Path) -> None:
    ours, theirs = Answers("ours", lambda i, k: "1"), Answers("theirs", lambda i, k: "0")
    with pytest.raises(UsageError, match="give --against MODEL"):
        Judged().measure(subjects(1, ours)[0])
    with pytest.raises(UsageError, match="give --against MODEL"):
        Judged().measure_together(subjects(1, ours))
    with pytest.raises(UsageError, match="somebody who judges"):
        Judged().measure_together(subjects(2, ours, theirs))
    pair = subjects(2, ours, theirs, reward=by_number())
    pair[1].prompts = ["7"]
    with pytest.raises(UsageError, match="must answer the same prompts"):
        Judged().measure_together(pair)
    pair = subjects(2, ours, theirs, reward=by_number())
    pair[1].sampling = Sampling(seed=1)
    with pytest.raises(UsageError, match="same sampling"):
        Judged().measure_together(pair)
    with pytest.raises(UsageError, match="unknown judge"):
        Judged().measure_together(subjects(2, ours, theirs, judge="nobody"))
    broken = Function(lambda prompts, texts: [float("nan")] * len(texts), "broken")
    with pytest.raises(UsageError, match="reward 'broken' gave nan"):
        Judged().measure_together(subjects(2, ours, theirs, reward=broken))
    for options in ({"samples": 0}, {"most": -1}):
        with pytest.raises(UsageError, match="samples must be 1 or more"):
            JudgedConfig(**options)


def test_a_reward_is_the_judge_where_none_is_named() -> None:
    pair = subjects(2, Answers("ours", lambda i, k: "1 1"), Answers("theirs", lambda i, k: "1"))
    for subject in pair:
        subject.reward = parse_reward("length:target=1,unit=words")
    out = Judged().measure_together(pair)
    assert out.details["judge"].startswith("length") and out.row(WIN).value == 0.0
