"""Reward models trained by TRL's RewardTrainer, measured: in a world of words, on SST-2, and on what people preferred.

In the world the proxy is trained on pairs labelled by VADER, which stays the gold. Over seeds 0, 1, 2 at these sizes its
held-out pair accuracy is 0.952, 0.962, 0.950. Best of 64 of a speaker whose answers are like the training pairs raises both;
of one that says 3% denied praise ("not great happy superb ..."), which the proxy has never seen, the proxy rises at every n
and the gold falls from n = 4 on. The test runs seed 0; the baseline is the same measurement without the denied praise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toy_reward import Speaker, pairs_by, sentence, sst2, train_reward
from trimtab.measure.diagnostic import Subject
from trimtab.measure.measurement import Measurement
from trimtab.measure.reward_benchmark import RewardBenchmark, RewardBenchmarkConfig
from trimtab.rewards import Classifier, parse_reward
from trimtab.sampling import Sampling

pytest.importorskip("trl", reason="needs the extra 'train'")
pytest.importorskip("vaderSentiment", reason="needs the extra 'text'")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def measure(reward: Any, path: Path, policy: Any = None, **options: Any) -> Measurement:
    subject = Subject(policy or Speaker(), "speaker", texts=[path], reward=reward, sampling=Sampling(seed=0))
    return RewardBenchmark(RewardBenchmarkConfig(**{"canaries": 0, **options})).measure(subject)


def write(path: Path, pairs: list[dict[str, str]]) -> Path:
    rows = [{**pair, "prompt": f"Review {i} :"} for i, pair in enumerate(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Path]:
    """A reward trained on 2,000 pairs of 3,000 sentences, and 300 held-out pairs of other sentences."""
    vader, generator = parse_reward("sentiment"), np.random.default_rng(0)

    def compound(text: str) -> float:
        return vader.score([""], [text])[0] or 0.0

    train, held_out = ([sentence(generator) for _ in range(count)] for count in (3000, 1500))
    folder = tmp_path_factory.mktemp("world")
    reward = train_reward(pairs_by(train, compound, 2000, 0.01, 0), folder / "reward", width=32)
    return reward, write(folder / "pairs.jsonl", pairs_by(held_out, compound, 300, 0.01, 1))


def test_a_trained_reward_orders_held_out_pairs(world: tuple[Classifier, Path]) -> None:
    reward, path = world
    found = measure(reward, path)
    row = found.row("accuracy")
    assert row.value is not None and row.value > 0.9 and row.low is not None and row.low > 0.85
    assert found.row("ECE").value is not None and found.row("ECE").value < 0.05  # type: ignore[operator]
    baseline = measure(parse_reward("repetition:n=1"), path).row("accuracy")
    assert baseline.high is not None and baseline.high < 0.6  # a reward that does not read the words' meaning


def test_the_guard_fires_where_the_gold_turns_and_only_there(world: tuple[Classifier, Path]) -> None:
    reward, path = world
    options = {"gold": "sentiment", "best_of": 64, "gold_prompts": 40, "calibrate": "none"}
    turned, straight = (measure(reward, path, Speaker(tricky), **options) for tricky in (0.03, 0.0))
    for found in (turned, straight):
        proxy = [point[1] for point in found.figures[-1].lines[0].points]  # type: ignore[union-attr]
        assert proxy == sorted(proxy)  # the proxy rises with n in both
    assert any(warning.startswith("over-optimised") for warning in turned.warnings)
    assert not any(warning.startswith("over-optimised") for warning in straight.warnings)
    gold = [point[1] for point in turned.figures[-1].lines[1].points]  # type: ignore[union-attr]
    assert max(gold) > 0.4 and gold[-1] < -0.2 and gold[-1] < gold[0]
    assert (straight.row("gold at best of 64").low or 0) > 0.9


def test_a_reward_trained_on_sst2_orders_its_test_reviews(shared: Path, tmp_path: Path) -> None:
    """3,000 pairs of training sentences; 300 pairs of test sentences by human label. 12,000 pairs and all 909: 0.865."""
    train = {text: label for label, text in sst2(shared, "train")}
    test = {text: label for label, text in sst2(shared, "test")}
    reward = train_reward(pairs_by(list(train), lambda text: train[text], 3000, 1, 0), tmp_path / "reward", lr=2e-3)
    path = write(tmp_path / "pairs.jsonl", pairs_by(list(test), lambda text: test[text], 300, 1, 1))
    row = measure(reward, path, calibrate="none").row("accuracy")
    assert row.value is not None and row.low is not None and row.low > 0.7


def test_rules_on_what_people_preferred(shared: Path) -> None:
    """HH-RLHF, harmless, its first 600 pairs: neither brevity nor sentiment is what people asked for.

    All 2,312: shorter is better 0.559 [0.539, 0.579]; sentiment 0.473 [0.454, 0.493], and the warning to turn it round.
    """
    path = shared / "data" / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    shorter = measure(parse_reward("length:target=1"), path, most=600)
    assert shorter.row("accuracy").n > 590 and (shorter.row("accuracy").low or 0) > 0.5
    assert (shorter.row("length correlation").high or 0) < -0.95
    level = shorter.row("accuracy at equal length")
    assert level.low is not None and level.high is not None and level.low < 0.5 < level.high  # nothing but length
    sentiment = measure(parse_reward("sentiment"), path, most=600).row("accuracy")
    assert sentiment.high is not None and sentiment.high < 0.55
