"""The reward benchmark on pairs whose outcome is planted: figures by hand, warnings, comparisons, and bad input."""

from __future__ import annotations

import copy
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toy_reward import Speaker
from trimtab.errors import UsageError
from trimtab.measure.cache import Cache
from trimtab.measure.diagnostic import Subject
from trimtab.measure.measurement import Measurement
from trimtab.measure.reward_benchmark import RewardBenchmark, RewardBenchmarkConfig
from trimtab.measure.reward_pairs import mean_of_sections
from trimtab.policy import Cost
from trimtab.rewards import Calibrated, Calibration, Function, Length, Reward, parse_reward, preference
from trimtab.sampling import Sampling


def write(path: Path, pairs: list[dict[str, Any]]) -> Path:
    data = "".join(json.dumps(pair) + "\n" for pair in pairs)
    path.write_bytes(gzip.compress(data.encode()) if path.suffix == ".gz" else data.encode())
    return path


def pair(chosen: str, rejected: str, subset: str | None = None, prompt: str = "") -> dict[str, Any]:
    return {"prompt": prompt or f"about {chosen} or {rejected}", "chosen": chosen, "rejected": rejected} | (
        {"subset": subset} if subset else {}
    )


def table() -> Function:
    """An answer "x7 ..." scores 7; "none" cannot be judged."""
    return Function(
        lambda prompts, texts: [None if t == "none" else float(t.split()[0].strip("x") or 0) for t in texts],
        name="table",
    )


def measure(
    reward: Any, path: Path | list[Path], policy: Any = None, cache: Path | None = None, **options: Any
) -> Measurement:
    subject = Subject(
        policy or Speaker(), "speaker", texts=path if isinstance(path, list) else [path], reward=reward,
        cache=Cache(cache), sampling=Sampling(seed=1),
    )  # fmt: skip
    return RewardBenchmark(RewardBenchmarkConfig(**{"canaries": 0, **options})).measure(subject)


def test_the_table_by_hand(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pairs.jsonl.gz",
        [
            pair("x3", "x1", "math-prm"), pair("x1", "x2", "math-prm"), pair("x5", "x5", "hep-go"),
            pair("x9 or so", "x2", "donotanswer"), pair("none", "x1", "donotanswer"),
        ],
    )  # fmt: skip
    found = measure(table(), path, calibrate="none")
    # Reasoning: (1 + 0 + 1/2) / 3 = 1/2 over pairs of both subsets; Safety: 1 of the one that was judged
    assert found.row("section: Reasoning").value == 0.5 and found.row("section: Safety").value == 1
    assert found.row("accuracy").value == 0.75
    assert found.row("subset: math-prm").value == 0.5 and found.row("subset: hep-go").value == 0.5
    assert found.row("ties").value == 0.25 and found.row("not judged").value == 0.2
    assert found.row("margin").value == pytest.approx((2 - 1 + 0 + 7) / 4)
    assert found.row("accuracy, chosen longer").value == 1 and found.row("accuracy, chosen longer").n == 1
    assert found.row("accuracy, chosen shorter").value is None
    assert found.samples["accuracy"] == [1, 0, 0.5, 1, None]
    assert any("fewer than 20 decide nothing" in warning for warning in found.warnings)
    assert sum(y for _, y in found.figures[1].lines[0].points) == pytest.approx(1)  # type: ignore[union-attr]
    assert Measurement.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))).table == found.table


def test_prompts_are_the_unit(tmp_path: Path) -> None:
    """Ten copies of each of six prompts say no more than six prompts do."""
    once = [pair(f"x{i % 3}", "x1", prompt=f"p{i}") for i in range(6)]
    one = measure(table(), write(tmp_path / "a.jsonl", once))
    ten = measure(table(), write(tmp_path / "b.jsonl", once * 10))
    assert one.row("accuracy").n == ten.row("accuracy").n == len(ten.units) == 6
    assert (one.row("accuracy").low, one.row("accuracy").high) == (ten.row("accuracy").low, ten.row("accuracy").high)


def test_files_are_subsets_and_transcripts_are_read(tmp_path: Path) -> None:
    talk = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: more?\n\nAssistant:"
    first = write(tmp_path / "talks.jsonl", [{"chosen": f"{talk} x2", "rejected": f"{talk} x1"}])
    second = write(tmp_path / "others.jsonl", [pair("x1", "x2"), pair("x1", "x3")])
    found = measure(table(), [first, second])
    assert found.units[0] == talk and found.row("subset: talks").value == 1 and found.row("subset: others").value == 0
    assert measure(table(), [first, second], most=1).row("accuracy").n == 2


def long_run(count: int, seed: int, right: float = 0.8) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    wins = generator.random(count) < right
    return [pair(*(("x2", "x1") if win else ("x1", "x2")), prompt=f"p{i}") for i, win in enumerate(wins)]


def test_the_wrong_sign_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [pair("a b c d", "a b c", prompt=f"p{i}") for i in range(30)])
    shorter = parse_reward("length:target=1")
    found = measure(shorter, path)
    row = found.row("accuracy")  # all wrong: the exact bound, 1 - 0.025^(1/30)
    assert (row.value, row.low) == (0, 0) and row.high == pytest.approx(1 - 0.025 ** (1 / 30))
    assert any("turn its sign round (--reward '-1*length:target=1')" in warning for warning in found.warnings)
    right = measure(parse_reward("-1*length:target=1"), path)
    assert right.row("accuracy").value == 1 and not any("sign round" in warning for warning in right.warnings)


def test_the_sign_of_a_blind_reward_is_left_alone(tmp_path: Path) -> None:
    """Labels by coin: said of at most 2.5% (one side) of 100 files, with three standard errors."""
    said = 0
    for seed in range(100):
        right = (np.random.default_rng(seed).random(60) < 0.5).astype(float)
        found = mean_of_sections(right, ["a"] * 60, list(range(60)), resamples=1000)
        said += found.high is not None and found.high < 0.5
    assert said / 100 <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 100)


def test_a_constant_reward_tells_nothing_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", long_run(30, 0))
    found = measure(Function(lambda p, t: [1.0] * len(t), name="one"), path, canaries=10)
    assert found.row("accuracy").value == 0.5 and found.row("ties").value == 1
    assert any("tells nothing apart" in warning for warning in found.warnings)
    assert any(warning.startswith("not calibrated") for warning in found.warnings)
    assert sum(warning.startswith("canary") for warning in found.warnings) == 7
    none = measure(Function(lambda p, t: [None] * len(t), name="none"), path, canaries=10)
    assert none.row("accuracy").value is None and none.row("not judged").value == 1
    assert any("no pair could be judged" in warning for warning in none.warnings)


def test_the_calibration_can_be_used(tmp_path: Path) -> None:
    """8 of 10 pairs of distance 1 are right: T = 1 / log 4, and a difference of 1 then means 0.8."""
    pairs = [pair(*(("x2", "x1") if i % 10 < 8 else ("x1", "x2")), prompt=f"p{i}") for i in range(200)]
    reward = Length(target=1)
    words = {"x1": "a b", "x2": "a"}  # one word is on target, the second costs 1
    path = write(
        tmp_path / "pairs.jsonl",
        [{**one, "chosen": words[one["chosen"]], "rejected": words[one["rejected"]]} for one in pairs],
    )
    found = measure(reward, path)
    row = found.row("temperature")
    assert row.value == pytest.approx(1 / math.log(4), abs=1e-9) and row.low is not None and row.low < row.value
    assert found.row("NLL").value == pytest.approx(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)), abs=0.02)
    (tmp_path / "measure.json").write_text(json.dumps({"measurements": [found.to_dict()]}), encoding="utf-8")
    calibrated = parse_reward(f"calibrated:file={tmp_path / 'measure.json'}")
    assert preference(calibrated, ["p"], ["a"], ["a b"]) == [pytest.approx(0.8, abs=1e-9)]
    for kind in ("platt", "isotonic", "affine"):
        kept = measure(reward, path, calibrate=kind).details["calibration"]
        made = Calibrated(Calibration(**kept), reward).score(["p", "p"], ["a", "a b"])
        assert made[0] is not None and made[1] is not None and made[0] > made[1]


def test_range_and_duplicates(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pairs.jsonl", [pair("x5", "x1"), pair("x5", "x2"), pair("x3", "x2", prompt="about x5 or x2")]
    )
    found = measure(table(), path, lowest=1.5, highest=4.0)
    assert found.row("out of range").value == pytest.approx(3 / 6)
    assert found.row("duplicate answers").value == pytest.approx(2 / 6)  # "x5" to two prompts; "x2" to one alone
    assert any("3 scores lie outside [1.5, 4.0]" in warning for warning in found.warnings)


def test_parts_are_logged_and_asked_once(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", long_run(5, 0))
    calls = []

    def counted(prompts: Any, texts: Any) -> list[float]:
        calls.extend(texts)
        return [float(text == "x2") for text in texts]

    from trimtab.rewards import Min, WeightedSum

    for reward in (Min((counted, "length:target=1")), WeightedSum([(1.0, Function(counted)), (2.0, Length(target=1))])):
        calls.clear()
        found = measure(reward, path)
        assert len(calls) == 10
        assert [part["reward"] for part in found.details["parts"]] == ["counted", "length:target=1"]
        kept = found.details["pairs"]
        prompts = [pair["prompt"] for pair in long_run(5, 0)]
        assert kept["chosen"] == reward.score(prompts, [pair["chosen"] for pair in long_run(5, 0)])


def test_two_rewards_are_compared_pair_by_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", long_run(200, 0))
    good, blind = measure(table(), path), measure(Function(lambda p, t: [0.0] * len(t), name="blind"), path)
    change = RewardBenchmark().compare(good, blind).change("accuracy")
    assert change.verdict == "better" and change.difference == pytest.approx(good.row("accuracy").value - 0.5)  # type: ignore[operator]
    same = RewardBenchmark().compare(good, good).change("accuracy")
    assert same.difference == 0 and same.verdict == "undecided"
    other = measure(table(), write(tmp_path / "other.jsonl", long_run(200, 1)))
    with pytest.raises(UsageError, match="not measured alike"):
        RewardBenchmark().compare(good, other)


def test_two_alike_rewards_are_told_apart_at_most_at_the_level(tmp_path: Path) -> None:
    """Two noisy copies of one reward: of 60 comparisons at most 5% plus three standard errors end in a verdict."""
    path = write(tmp_path / "pairs.jsonl", long_run(60, 0))
    tool, fired = RewardBenchmark(), 0

    plain = measure(table(), path, calibrate="none")

    def noisy(seed: int) -> Measurement:
        generator, found = np.random.default_rng(seed), copy.deepcopy(plain)
        kept = found.details["pairs"]
        for side in ("chosen", "rejected"):
            kept[side] = [score + generator.normal(0, 1) for score in kept[side]]
        return found

    for seed in range(0, 120, 2):
        fired += tool.compare(noisy(seed), noisy(seed + 1)).change("accuracy").verdict != "undecided"
    assert fired / 60 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)


def test_scores_are_kept_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    """Kept under the reward's fingerprint, in batches of 256; not those of a function, which may close over anything."""
    path = write(tmp_path / "pairs.jsonl", long_run(300, 0))
    for reward, again in ((Length(target=2), 0), (table(), 600)):
        first = measure(reward, path, cache=tmp_path / "cache", calibrate="none")
        second = measure(reward, path, cache=tmp_path / "cache", calibrate="none")
        assert first.cost.reward_calls == 600 and second.cost.reward_calls == again
        assert first.table == second.table


def test_the_cost_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", long_run(30, 0))
    assert measure(Length(target=2), path, canaries=10).cost.reward_calls == 2 * 30 + 7 * 10


class Silent(Reward):
    slug = "silent"

    def _score(self, prompts: Any, texts: Any) -> list[float]:
        return [float(len(text)) for text in texts]


def test_the_subject_may_be_the_reward(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [pair("long answer", "short")])
    found = measure(None, path, policy=Silent())
    assert found.subject == "silent" and found.row("accuracy").value == 1
    with pytest.raises(UsageError, match="gold needs a model that answers"):
        measure(None, path, policy=Silent(), gold="length:target=2")
    with pytest.raises(UsageError, match="speaker, tricky 0.0 is none: give --reward SPEC"):
        measure(None, path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"most": -1}, "most and canaries"), ({"best_of": 1}, "best_of 2 or more"), ({"gold_prompts": 0}, "gold_prompts"),
        ({"lowest": 1.0, "highest": 1.0}, "lowest must be below"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        RewardBenchmarkConfig(**options)


def test_bad_files_and_bad_rewards(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", long_run(4, 0))
    with pytest.raises(UsageError, match="--texts FILE is needed: pairs of a prompt"):
        measure(table(), [])
    with pytest.raises(UsageError, match="expected the columns"):
        measure(table(), write(tmp_path / "other.jsonl", [{"prompt": "p", "answer": "a"}]))
    with pytest.raises(UsageError, match="finite"):
        measure(Function(lambda p, t: [math.nan] * len(t), name="broken"), path)
    with pytest.raises(UsageError, match="is the reward itself"):
        measure(Length(target=2), path, gold="length:target=2")
    with pytest.raises(UsageError, match="unknown reward"):
        measure(Length(target=2), path, gold="nothing")


def test_truncated_answers_are_shown_beside_the_gap(tmp_path: Path) -> None:
    pytest.importorskip("vaderSentiment", reason="needs the extra 'text'")

    class Cut(Speaker):
        def generate(self, prompts: Any, sampling: Sampling = Sampling()) -> Any:
            found = super().generate(prompts, sampling)
            found.finish_reasons = ["length" if i % 4 == 0 else "stop" for i in range(len(found))]
            found.cost = Cost()
            return found

    path = write(tmp_path / "pairs.jsonl", long_run(12, 0))
    found = measure(parse_reward("keyword:words=great,mode=count"), path, policy=Cut(), gold="sentiment", best_of=4)
    assert found.row("answers cut at the limit").value == 0.25
    assert found.row("proxy at best of 4").value > found.row("proxy of one answer").value  # type: ignore[operator]
    assert found.row("gold at best of 4").value is not None and found.measured["policy"] == "speaker"
    other_world = measure(Length(target=2), path, gold="pocket/judge", best_of=2)
    assert any("no answer was judged by both" in warning for warning in other_world.warnings)
