"""Format rules, on answers whose score is plain to see."""

from __future__ import annotations

import pytest

from trimtab.errors import UsageError
from trimtab.rewards import Json, Tags


def score(reward: Json | Tags, *texts: str) -> list[float | None]:
    return reward.score(["p"] * len(texts), texts)


def test_json() -> None:
    assert score(Json(), '{"a": 1}', " [1, 2] ", "3", "", "{a: 1}", '{"a": 1} and more', "NaN", "[" * 100_000) == [
        1, 1, 1, 0, 0, 0, 0, 0,
    ]  # fmt: skip
    keys = Json(keys=("name:string", "age:integer", "more"))
    whole = '{"name": "x", "age": 3, "more": null, "other": []}'
    assert score(keys, whole, '{"name": 1, "age": 3, "more": 0}', '["name"]') == [1, 0, 0]
    assert score(Json(keys=keys.keys, share=True), whole, '{"name": "x", "age": true}', "[]", "no") == [1, 1 / 3, 0, 0]
    assert score(Json(keys=("a:number",)), '{"a": 1.5}', '{"a": true}', '{"a": "1"}') == [1, 0, 0]


def test_json_in_a_fence() -> None:
    fenced = '```json\n{"a": 1}\n```'
    assert score(Json(), fenced) == [0]
    assert score(Json(fenced=True), fenced, '{"a": 1}', f"Here: {fenced}", "```\n[]\n```\n") == [1, 1, 0, 1]


def test_tags() -> None:
    tags = Tags(names=("think", "answer"))
    good = "<think>\nwhy\n</think>\n<answer>4</answer>"
    assert score(tags, good, f"So: {good} done", "<answer>4</answer><think>why</think>", "<think>why<answer>4</answer>") == [
        1, 1, 0, 0,
    ]  # fmt: skip
    assert score(tags, good + "<answer>5</answer>", "<think>a<answer>b</think></answer>", "") == [0, 0, 0]
    assert score(Tags(names=("think", "answer"), only=True), good, f"So: {good}", f" {good}\n") == [1, 0, 1]


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="NAME or NAME:TYPE"):
        Json(keys=("a:text",))
    for names in ((), ("a", "a"), ("a b",)):
        with pytest.raises(UsageError, match="different names"):
            Tags(names=names)
