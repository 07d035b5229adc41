"""Comparing two answers: both orders, equal answers, every kind of judge, and what users write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chat_server import ChatServer, completion
from tiny import tiny_lm
from trimtab import pocket
from trimtab.errors import UsageError
from trimtab.measure.cache import Cache
from trimtab.policy import Completions, Cost, Prompt
from trimtab.rewards import Calibrated, Calibration, Function, parse_reward
from trimtab.rewards.anchored import Anchored
from trimtab.rewards.judge import Judgement
from trimtab.rewards.local_judge import LocalJudge
from trimtab.rewards.pair_judge import (
    LanguageJudge,
    PairJudge,
    PolicyJudge,
    RewardJudge,
    Verdict,
    as_judge,
    in_both_orders,
    parse_judge,
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


class Stub(PairJudge):
    """P(the first shown is better) by a function of (prompt, first, second)."""

    def __init__(self, says: Any) -> None:
        self.says, self.name, self.fingerprint, self.asked = says, "stub", "stub", 0

    def prefer(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], meter: Cost | None
    ) -> list[Judgement]:
        self.asked += len(prompts)
        values = [self.says(*row) for row in zip(prompts, first, second, strict=True)]
        return [Judgement(value, kind="" if value is not None else "timeout", error="late") for value in values]


def one(judge: PairJudge, a: str = "x", b: str = "y", prompt: str = "p") -> Verdict:
    return judge.compare([prompt], [a], [b])[0]


def test_both_orders() -> None:
    """p_a = (P(a | a first) + P(a | b first)) / 2; exact binary fractions."""
    says = {("x", "y"): 0.75, ("y", "x"): 0.125}
    verdict = one(Stub(lambda p, a, b: says[a, b]))
    assert verdict == Verdict(0.8125, False, False, False, (0.75, 0.875))
    assert verdict.outcome == 1.0
    assert one(Stub(lambda p, a, b: says[a, b]), "y", "x").outcome == 0.0
    flipped = one(Stub(lambda p, a, b: 0.75 if a == "x" else 0.625))
    assert flipped.tie and flipped.flipped and flipped.p_a == 0.5625 and flipped.outcome == 0.5


def test_a_judge_that_always_takes_the_first_says_nothing() -> None:
    judge = Stub(lambda p, a, b: 1.0)
    found = judge.compare(["p"] * 20, [f"a{i}" for i in range(20)], [f"b{i}" for i in range(20)])
    assert all(v.p_a == 0.5 and v.tie and v.flipped and v.outcome == 0.5 for v in found)


def test_one_order_that_wavers_is_a_tie_but_no_flip() -> None:
    verdict = one(Stub(lambda p, a, b: 1.0 if a == "x" else 0.5))
    assert (verdict.p_a, verdict.tie, verdict.flipped, verdict.outcome) == (0.75, True, False, 0.5)


def test_half_a_verdict_is_none() -> None:
    verdict = one(Stub(lambda p, a, b: None if a == "y" else 1.0))
    assert verdict.p_a is None and verdict.outcome is None and not verdict.tie
    assert verdict.orders == (1.0, None) and (verdict.kind, verdict.error) == ("timeout", "late")


def test_equal_answers_are_a_tie_without_a_call() -> None:
    judge = Stub(lambda p, a, b: 1.0 if a > b else 0.0)
    found = judge.compare(["p", "q", "r"], ["same", "b", "a"], ["same", "a", "b"])
    assert [v.outcome for v in found] == [0.5, 1.0, 0.0] and judge.asked == 4
    assert found[0].identical and found[0].flipped is None
    assert judge.compare([], [], []) == []
    with pytest.raises(UsageError, match="one each is needed"):
        judge.compare(["p"], ["a"], [])


def test_in_both_orders_keeps_the_words() -> None:
    verdict = in_both_orders(Judgement(1.0, "A!", how="words"), Judgement(0.0, "B!", how="words"))
    assert verdict.raw == ("A!", "B!") and verdict.p_a == 1.0 and verdict.mass is None
    assert in_both_orders(Judgement(0.9, mass=0.5), Judgement(0.2, mass=0.3)).mass == pytest.approx(0.4)


# an endpoint


def _prefers_long(number: int, body: dict[str, Any]) -> str:
    said = body["messages"][0]["content"]
    a = said.split("Answer A: ")[1].split("\n\nAnswer B: ")
    return "A" if len(a[0]) > len(a[1].removesuffix("\n\nBetter:")) else "B"


def _endpoint(server: ChatServer, **options: Any) -> LanguageJudge:
    made = LanguageJudge(url=server.url, model="m", **{"concurrency": 1, "retries": 1, **options})
    made.behind._sleep = lambda _: None  # type: ignore[union-attr]
    return made


def test_an_endpoint_by_its_words() -> None:
    with ChatServer(_prefers_long) as server:
        judge = _endpoint(server)
        meter = Cost()
        found = judge.compare(["p", "p"], ["long answer", "no"], ["short", "no"], meter)
        assert [v.outcome for v in found] == [1.0, 0.5] and found[0].raw == ("A", "B")
        assert meter.reward_calls == len(server.requests) == 2 and meter.tokens == {judge.name: 20}
        again = _endpoint(server).compare(["p", "p"], ["long answer", "no"], ["short", "no"])
        assert again == found and len(server.requests) == 2


def test_an_endpoint_by_its_probabilities() -> None:
    def reply(number: int, body: dict[str, Any]) -> Any:
        return completion("A", {"A": 0.6, "B": 0.2, "I": 0.2})

    with ChatServer(reply) as server:
        verdict = one(_endpoint(server))
        assert verdict.orders == (pytest.approx(0.75), pytest.approx(0.25)) and verdict.flipped and verdict.tie
        worded = one(_endpoint(server, by="words"))
        assert worded.orders == (1.0, 0.0) and "logprobs" not in server.requests[-1]


def test_an_endpoint_that_gives_no_verdict() -> None:
    for answer, kind in (
        ("Both are lovely answers", "unparsed"),
        ("I cannot help with that", "refusal"),
        (b"{", "malformed"),
    ):
        with ChatServer(lambda n, body, answer=answer: answer) as server:  # type: ignore[misc]
            verdict = one(_endpoint(server))
            assert verdict.p_a is None and verdict.kind == kind and verdict.error
    with ChatServer(lambda n, body: "Hm." if n < 2 else "tie") as server:
        assert one(_endpoint(server)).outcome == 0.5
        assert server.requests[2]["messages"][2]["content"].startswith("That is no verdict")


def test_answers_cannot_write_slots() -> None:
    with ChatServer(lambda n, body: "A") as server:
        _endpoint(server, rubric="{prompt}: {a} or {b}").compare(["{a}"], ["{b}"], ["{prompt}"])
        assert server.requests[0]["messages"][0]["content"] == "{a}: {b} or {prompt}"


# local models, policies, rewards


def test_a_local_judge_is_read_exactly() -> None:
    judge = LanguageJudge(path="pocket/base")
    verdict = one(judge, "It is red.", "Blue.")
    (first, second) = LocalJudge("pocket/base").choose(
        [judge.question("p", "It is red.", "Blue."), judge.question("p", "Blue.", "It is red.")], ["A", "B"]
    )
    assert first.p is not None and second.p is not None and first.mass is not None and second.mass is not None
    assert verdict.p_a == pytest.approx((first.p[0] + second.p[1]) / 2, abs=1e-9)
    assert verdict.mass == pytest.approx((first.mass + second.mass) / 2) and judge.chance
    assert judge.identity == LocalJudge("pocket/base").identity
    assert one(judge, "word " * 300, "Blue.").kind == "too long"


class Speaker:
    """A policy that says what it is told to, given the prompt."""

    def __init__(self, says: Any, name: str = "speaker") -> None:
        self.says, self.name = says, name

    def generate(self, prompts: Sequence[Prompt], sampling: Any = None) -> Completions:
        assert sampling.temperature == 0
        texts = [self.says(str(prompt)) for prompt in prompts]
        none: list[Any] = [[] for _ in texts]
        return Completions(list(prompts), texts, none, none, ["stop"] * len(texts), Cost({self.name: len(texts)}))


def test_any_policy_by_its_words() -> None:
    judge = PolicyJudge(Speaker(lambda question: "A" if "Answer A: good" in question else "B"))
    meter = Cost()
    found = judge.compare(["p", "p"], ["good", "bad"], ["bad", "good"], meter)
    assert [v.outcome for v in found] == [1.0, 0.0] and meter.tokens == {"speaker": 4} and not judge.chance
    shrug = one(PolicyJudge(Speaker(lambda question: "Who knows")))
    assert shrug.p_a is None and shrug.kind == "unparsed" and shrug.raw == ("Who knows", "Who knows")


def test_a_reward_has_no_order_and_no_probability_of_its_own() -> None:
    judge = RewardJudge(Function(lambda prompts, texts: [float(len(t)) if t else None for t in texts], "length"))
    found = judge.compare(["p"] * 4, ["aaa", "b", "ab", ""], ["b", "aaa", "cd", "b"])
    assert [v.p_a for v in found] == [1.0, 0.0, 0.5, None] and [v.outcome for v in found] == [1.0, 0.0, 0.5, None]
    assert all(v.flipped is None for v in found) and found[3].kind == "no score" and not judge.chance


def test_a_reward_with_a_temperature_gives_probabilities() -> None:
    """sigmoid(2 / T): 0.731059 at T = 2 (1e-6 is the printed precision)."""
    reward = parse_reward("length:target=1")
    judge = RewardJudge(Function(lambda prompts, texts: [float(len(t)) for t in texts], "length"), 2.0)
    assert one(judge, "aaa", "b").p_a == pytest.approx(0.731059, abs=1e-6) and judge.chance
    calibrated = Calibrated(Calibration("temperature", "length:target=1", reward.fingerprint, {"temperature": 0.5}))
    (a, b) = calibrated.score(["p", "p"], ["x", "x y z"])
    assert a is not None and b is not None
    assert one(RewardJudge(calibrated), "x", "x y z").p_a == pytest.approx(1 / (1 + math.exp(b - a)), abs=1e-9)
    with pytest.raises(UsageError, match="above 0"):
        RewardJudge(reward, 0.0)


def test_a_pointwise_judge_as_a_pair_judge_keeps_its_failures() -> None:
    with ChatServer(lambda n, body: "8" if "Answer: good" in body["messages"][0]["content"] else "hm") as server:
        judge = parse_judge(f"reward:judge:url={server.url},model=m,retries=0,concurrency=1")
        verdict = one(judge, "good", "bad")
    assert verdict.p_a is None and verdict.kind == "unparsed" and verdict.raw == ("8", "hm")


def test_anchors() -> None:
    judge = Stub(lambda p, a, b: None if "?" in a + b else 1.0 if len(a) > len(b) else 0.0 if len(a) < len(b) else 0.5)
    reward = Anchored(judge, {"p": ["aa", "bbbb"], "q": ["?"]})
    assert reward.score(["p", "p", "p", "q", "r"], ["x", "xxx", "xxxxx", "xx", "x"]) == [0.0, 0.5, 1.0, None, None]
    assert reward.fingerprint != Anchored(judge, {"p": ["aa"]}).fingerprint and reward.name == "anchored/stub"


# what users write


def test_specs(tmp_path: Path) -> None:
    assert isinstance(parse_judge("pocket/judge"), RewardJudge) and isinstance(
        parse_judge("pocket/reward"), RewardJudge
    )
    assert isinstance(parse_judge("reward:length:target=3"), RewardJudge)
    assert parse_judge("0.5*sentiment+0.5*length:target=3").name == "0.5*sentiment+0.5*length:target=3"
    for spec in ("pocket/chat", "judge:path=pocket/chat"):
        judge = parse_judge(spec)
        assert isinstance(judge, LanguageJudge) and judge.name == "pocket/chat" and judge.chance
    worded = parse_judge("judge:path=pocket/chat,by=words")
    assert worded.name == "pocket/chat (words)" and not worded.chance and worded.fingerprint != judge.fingerprint
    url = parse_judge("judge:url=http://localhost:8000/v1,model=some-model")
    assert url.name == "some-model at localhost:8000" and url.identity == "some-model"
    lm = tiny_lm()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    assert isinstance(parse_judge(str(tmp_path / "model")), LanguageJudge)
    with pytest.raises(UsageError, match="reward 'classifier/reward': its tokenizer has no chat template"):
        parse_judge(str(pocket.path("reward")))  # a folder with a classifier is a reward
    assert as_judge(url) is url and isinstance(as_judge(parse_reward("sentiment")), RewardJudge)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pocket/juge", "did you mean 'judge'|unknown"),
        ("sentimant", "unknown judge 'sentimant'; did you mean 'sentiment'"),
        ("judge:path=pocket/chat,bye=words", "did you mean 'by'"),
        ("judge:path=pocket/chat,by=song", "one of auto, words"),
        ("judge:model=m", "give one"),
        ("judge", "give one"),
        ("length:taget=3", "taget"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_judge(spec)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no readable config.json"):
        parse_judge(str(tmp_path))


def test_keep_in_moves_the_cache(tmp_path: Path) -> None:
    with ChatServer(_prefers_long) as server:
        judge = _endpoint(server)
        judge.keep_in(Cache(tmp_path / "elsewhere"))
        one(judge)
    assert len(list((tmp_path / "elsewhere" / "replies").iterdir())) == 2
