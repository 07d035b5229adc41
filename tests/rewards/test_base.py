"""What every reward promises, on function rewards that break it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab import rewards
from trimtab.errors import TrimtabError, UsageError
from trimtab.rewards.base import Reward, judged

PROMPTS, TEXTS = ["first question", "second question", "third question"], ["a", "bb", "ccc"]


def test_scores_are_floats_and_none_is_never_zero() -> None:
    reward = rewards.Function(lambda prompts, texts: [1, None, np.float32(0.5)], name="mine")
    assert reward.score(PROMPTS, TEXTS) == [1.0, None, 0.5]
    array = reward(PROMPTS, TEXTS)
    assert array.dtype == np.float32 and array.shape == (3,)
    assert judged(array).tolist() == judged(reward.score(PROMPTS, TEXTS)).tolist() == [True, False, True]
    assert np.isnan(array[1])


@pytest.mark.parametrize("make", [np.asarray, list, tuple])
def test_arrays_and_lists_serve(make: Callable[[Any], Any]) -> None:
    assert rewards.Function(lambda prompts, texts: make([len(t) for t in texts])).score(PROMPTS, TEXTS) == [1, 2, 3]


def test_tensors_serve() -> None:
    import torch

    whole = rewards.Function(lambda prompts, texts: torch.tensor([1.0, 2.0, 3.0]))
    single = rewards.Function(lambda prompt, text: torch.tensor(2.0), batched=False)
    assert whole.score(PROMPTS, TEXTS) == [1, 2, 3] and single.score(PROMPTS, TEXTS) == [2, 2, 2]


def test_row_functions() -> None:
    reward = rewards.Function(lambda prompt, text: len(prompt) - len(text), batched=False)
    assert reward.score(PROMPTS, TEXTS) == [13.0, 13.0, 11.0]


def test_no_rows_no_call() -> None:
    reward = rewards.Function(lambda prompts, texts: 1 / 0)
    assert reward.score([], []) == [] and reward([], []).shape == (0,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, float("nan"), 1.0], r"'bad' gave nan on row 1 \(prompt 'second question'\)"),
        ([1.0, 1.0, float("inf")], r"gave inf on row 2 \(prompt 'third question'\)"),
        ([1.0, 1e300, 0.0], r"1e\+300 on row 1"),
        ([1.0, "2", 0.0], r"'2', which is no number, on row 1"),
        ([[1.0], [2.0], [3.0]], r"which is no number, on row 0"),
        (np.ones((3, 1)), r"which is no number, on row 0"),
        (np.ones(4), r"gave 4 values for 3 rows, the first row 0 \(prompt 'first question'\)"),
        (1.0, r"gave float for 3 rows"),
        ("abc", r"gave .* for 3 rows"),
        (None, r"gave NoneType for 3 rows"),
    ],
)
def test_a_broken_score_is_refused(values: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rewards.Function(lambda prompts, texts: values, name="bad").score(PROMPTS, TEXTS)


@pytest.mark.parametrize("batched", [True, False])
def test_an_exception_names_reward_and_row(batched: bool) -> None:
    def one(prompt: str, text: str) -> float:
        if prompt.startswith("second"):
            raise KeyError("no such thing")
        return 0.0

    fn = (lambda ps, ts: [one(p, t) for p, t in zip(ps, ts, strict=True)]) if batched else one
    with pytest.raises(
        UsageError, match=r"'mine' raised KeyError: 'no such thing' on row 1 \(prompt 'second question'\)"
    ):
        rewards.Function(fn, name="mine", batched=batched).score(PROMPTS, TEXTS)


def test_an_exception_of_the_batch_alone() -> None:
    def fn(prompts: list[str], texts: list[str]) -> list[float]:
        if len(texts) > 1:
            raise ValueError("too many")
        return [0.0]

    with pytest.raises(UsageError, match="each alone works"):
        rewards.Function(fn).score(PROMPTS, TEXTS)


def test_our_own_rewards_fail_with_our_own_error() -> None:
    class Broken(Reward):
        slug = "broken"

        def _score(self, prompts: Any, texts: Any) -> Any:
            raise RuntimeError("out of memory")

    with pytest.raises(TrimtabError, match="'broken' raised RuntimeError: out of memory") as caught:
        Broken().score(PROMPTS, TEXTS)
    assert not isinstance(caught.value, UsageError)


def test_unequal_columns() -> None:
    with pytest.raises(UsageError, match="3 prompts but 2 texts"):
        rewards.Length(target=3).score(PROMPTS, TEXTS[:2])


def test_long_prompts_are_shown_by_their_start() -> None:
    reward = rewards.Function(lambda prompts, texts: [float("nan")])
    with pytest.raises(UsageError) as caught:
        reward.score([[{"role": "user", "content": "x" * 500}]], ["a"])
    assert "x" * 60 + "..." in str(caught.value) and "x" * 61 not in str(caught.value)


def test_trl_unwraps_messages_and_keeps_none() -> None:
    seen: list[Any] = []

    def fn(prompts: Any, texts: Any) -> list[float | None]:
        seen.append((prompts, texts))
        return [1.0, None]

    function = rewards.Function(fn, name="mine").as_trl()
    assert function.__name__ == "mine"
    prompts = ["plain", [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]]
    completions = ["text", [{"role": "assistant", "content": "hello"}]]
    scores = function(
        prompts=prompts, completions=completions, completion_ids=[[1], [2]], trainer_state=None, answer=["x"]
    )
    assert scores == [1.0, None]
    assert seen == [(["plain", [{"role": "user", "content": "hi"}]], ["text", "hello"])]


def test_fingerprints_follow_the_configuration() -> None:
    assert rewards.Length(target=3).fingerprint == rewards.Length(target=3).fingerprint
    assert rewards.Length(target=3).fingerprint != rewards.Length(target=4).fingerprint
    assert rewards.Function(lambda p, t: [1.0]).fingerprint != rewards.Function(lambda p, t: [2.0]).fingerprint


def test_python_file(tmp_path: Path) -> None:
    file = tmp_path / "my reward.py"
    file.write_text("def shout(prompts, texts):\n    return [t.count('!') for t in texts]\n", encoding="utf-8")
    reward = rewards.parse_reward(f"python:path={file},function=shout")
    assert reward.score(["p"], ["a!!"]) == [2.0] and reward.name == "python:my reward.shout"
    with pytest.raises(UsageError, match="no function 'whisper'"):
        rewards.parse_reward(f"python:path={file},function=whisper")
    with pytest.raises(UsageError, match="no file"):
        rewards.parse_reward(f"python:path={tmp_path / 'none.py'},function=f")
    file.write_text("1 / 0", encoding="utf-8")
    with pytest.raises(UsageError, match="raised ZeroDivisionError"):
        rewards.parse_reward(f"python:path={file},function=shout")
