"""Rewards by name, sums of them, and what a mistyped one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.errors import UsageError
from trimtab.rewards import Function, Keyword, Length, Regex, Reward, WeightedSum, as_reward, parse_reward


def one(spec: str, text: str = "a b") -> float | None:
    return parse_reward(spec).score(["p"], [text])[0]


def test_names() -> None:
    assert parse_reward("length:target=30").name == "length:target=30"
    assert parse_reward("length:target=30,unit=words").name == "length:target=30"
    assert parse_reward("keyword:words=good|great,mode=count").name == "keyword:words=good|great,mode=count"
    keyword = parse_reward("keyword:words=good|great,ignore-case=False")
    assert isinstance(keyword, Keyword) and keyword.words == ("good", "great") and keyword.ignore_case is False


def test_sums() -> None:
    assert one("0.5*length:target=4+2*keyword:words=a") == pytest.approx(0.5 * -0.5 + 2)
    assert one("length:target=4+keyword:words=a") == pytest.approx(-0.5 + 1)
    assert one("-1*length:target=4") == pytest.approx(0.5)
    assert one("1e+1*length:target=4 + .5 * keyword:words=a") == pytest.approx(-5 + 0.5)
    reward = parse_reward("0.7*length:target=4+0.3*keyword:words=a")
    assert isinstance(reward, WeightedSum) and reward.name == "0.7*length:target=4+0.3*keyword:words=a"
    assert reward.parts(["p"], ["a b"]) == {"length:target=4": [-0.5], "keyword:words=a": [1.0]}


def test_a_plus_inside_a_value_is_part_of_it() -> None:
    for pattern in ("a+b", r"a\+sentiment", "[0-9]+x", "a+"):
        reward = parse_reward(f"regex:pattern={pattern}")
        assert isinstance(reward, Regex) and reward.pattern == pattern
    reward = parse_reward("regex:pattern=a++2*length:target=3")
    assert isinstance(reward, WeightedSum) and reward.terms[0][1].pattern == "a+"  # type: ignore[attr-defined]


def test_none_in_a_part_is_none_overall() -> None:
    silent = Function(lambda prompts, texts: [None, 2.0], name="silent")
    assert WeightedSum([(1.0, silent), (0.5, Length(target=1))]).score(["p", "q"], ["a", "a"]) == [None, 2.0]


def test_parts_of_one_name_are_kept_apart() -> None:
    twice = WeightedSum([(1.0, Length(target=1)), (2.0, Length(target=1))])
    assert twice.parts(["p"], ["a b"]) == {"length:target=1": [-1.0], "length:target=1 #2": [-1.0]}
    assert twice.score(["p"], ["a b"]) == [-3.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sentimant", "unknown reward 'sentimant'; did you mean 'sentiment'?"),
        ("pocket/juge", "did you mean 'pocket/judge'?"),
        ("length:target=3+sentimant", "reward 'length': target='3\\+sentimant' is not a whole number"),
        ("2*sentimant+length:target=3", "did you mean 'sentiment'?"),
        ("length:traget=3", "unknown key of reward 'length' 'traget'; did you mean 'target'?"),
        ("length", "reward 'length' needs target"),
        ("length:target=three", "target='three' is not a whole number"),
        ("pocket/judge:aspect=kind", "aspect='kind' is not one of score, helpful"),
        ("", "has no name"),
        ("length:target=3+", "is not a whole number"),
        ("sentiment+", "has no name"),
        ("classifier:path=/no/such/folder,template={prompt}{response}", "is not a local model folder"),
        ("regex:pattern=" + "x" * 5000 + "(", "is not a regular expression"),
    ],
)
def test_mistakes(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_reward(spec)


def test_a_folder_does_not_hide_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sentiment").mkdir()
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("vaderSentiment", reason="needs the extra 'text'")
    assert parse_reward("sentiment").name == "sentiment"


def test_as_reward() -> None:
    reward: Reward = Length(target=2)
    assert as_reward(reward) is reward
    assert as_reward("length:target=2").score(["p"], ["a b"]) == [0.0]
    assert as_reward(lambda prompts, texts: [3.0]).score(["p"], ["a"]) == [3.0]
    with pytest.raises(UsageError, match="not int"):
        as_reward(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("terms", [[], [(float("nan"), Length(target=1))], [(1.0, "length")]])
def test_broken_sums(terms: list) -> None:
    with pytest.raises(UsageError):
        WeightedSum(terms)
