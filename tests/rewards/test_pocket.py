"""The pocket world's gold and proxy, through the interface of every reward."""

from __future__ import annotations

import random

import pytest

from trimtab import pocket
from trimtab.errors import UsageError
from trimtab.rewards import PocketJudge, PocketReward, parse_reward

TASKS = pocket.tasks("test", 16, seed=0)
PROMPTS = [task.prompt for task in TASKS]
GOOD = [pocket.answer(task, "good", random.Random(i)) for i, task in enumerate(TASKS)]
ELSEWHERE = "Once upon a time, there was a boy named Tim."


def test_judge_tells_good_from_bad_and_says_when_it_cannot() -> None:
    good, bad = PocketJudge()(PROMPTS, GOOD), PocketJudge()(PROMPTS, [""] * len(PROMPTS))
    assert good.mean() > 0.6 > 0.1 >= bad.max()
    assert PocketJudge().score([ELSEWHERE, PROMPTS[0]], ["He ran.", GOOD[0]]) == [None, pytest.approx(good[0])]
    assert PocketJudge().score([[{"role": "user", "content": PROMPTS[0]}]], [GOOD[0]]) == [pytest.approx(good[0])]


@pytest.mark.parametrize("aspect", ["helpful", "honest", "harmless", "sentiment", "correct", "score"])
def test_aspects_are_the_judges_own(aspect: str) -> None:
    reward = parse_reward(f"pocket/judge:aspect={aspect}")
    expected = [getattr(pocket.judge(task.prompt, text), aspect) for task, text in zip(TASKS, GOOD, strict=True)]
    assert reward.score(PROMPTS, GOOD) == expected
    assert (None in expected) == (aspect in ("honest", "correct"))


def test_shipped_reward_prefers_good_answers() -> None:
    try:
        pocket.path("reward")
    except UsageError as error:
        pytest.skip(str(error))
    rng = random.Random(0)
    poor = [pocket.answer(task, rng.choice(pocket.kinds(task.family)), rng) for task in TASKS]
    reward = PocketReward(device="cpu")
    assert (reward(PROMPTS, GOOD) > reward(PROMPTS, poor)).mean() > 0.7
