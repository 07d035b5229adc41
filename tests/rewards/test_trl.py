"""TRL's own reward functions, used as rewards: the values that their documentation gives."""

from __future__ import annotations

import pytest

from trimtab.errors import UsageError
from trimtab.rewards import FromTrl, parse_reward

pytest.importorskip("trl", reason="needs the extra 'train'")


def test_soft_overlong_punishment() -> None:
    """Full length 100, the last 20 tokens punished: 0 up to 80, -(length - 80) / 20 up to 100, then -1."""
    from trl.rewards import get_soft_overlong_punishment

    reward = FromTrl(get_soft_overlong_punishment(100, 20))
    assert reward.score(["p"] * 3, ["word " * 70, "word " * 90, "word " * 101]) == [0, -0.5, -1]


def test_think_format() -> None:
    from trl.rewards import think_format_reward

    reward = FromTrl(think_format_reward)
    assert reward.score(["p", "p"], ["<think>\nwhy\n</think>\nfour", "<think>\nwhy\nfour"]) == [1, 0]


def test_there_and_back() -> None:
    there = parse_reward("keyword:words=good")
    back = FromTrl(there.as_trl())
    assert back.score(["p", "p"], ["good", "bad"]) == there.score(["p", "p"], ["good", "bad"]) == [1, 0]


def test_a_column_that_is_not_there() -> None:
    def needs(prompts: object, completions: object, solution: object, **columns: object) -> list[float]:
        return [0.0]

    with pytest.raises(UsageError, match="solution"):
        FromTrl(needs).score(["p"], ["a"])
    with pytest.raises(UsageError, match="reward function is needed"):
        FromTrl(3)  # type: ignore[arg-type]
