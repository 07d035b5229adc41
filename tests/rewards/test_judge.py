"""A language model that scores: token probabilities, words, failures by kind, and a local model read exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chat_server import ChatServer, completion
from taught import taught
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.measure.cache import Cache
from trimtab.policy import Cost
from trimtab.rewards import Judge, parse_reward
from trimtab.rewards.local_judge import LocalJudge, restricted


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


def judge(server: ChatServer, **options: Any) -> Judge:
    made = Judge(url=server.url, model="m", **{"concurrency": 1, "retries": 1, **options})
    made.behind._sleep = lambda _: None  # type: ignore[union-attr]
    return made


def test_expected_score_and_the_request() -> None:
    with ChatServer(lambda n, body: completion("7", {"7": 0.5, "5": 0.3, "I": 0.2})) as server:
        made = judge(server)
        assert made.score(["p"], ["a"]) == [pytest.approx((3.5 + 1.5) / 0.8, abs=1e-9)]
        (request,) = server.requests
    assert request["temperature"] == 0 and request["logprobs"] is True and request["top_logprobs"] == 20
    said = request["messages"][0]["content"]
    assert "Question: p\n\nAnswer: a" in said and "from 1 (useless) to 9" in said
    assert made.last[0].how == "log-probabilities" and made.last_raw == ["7"]


def test_little_mass_is_none_and_not_zero() -> None:
    with ChatServer(lambda n, body: completion("7", {"7": 0.15, "I": 0.05, "The": 0.1, "9": 0.05})) as server:
        made = judge(server)
        assert made.score(["p"], ["a"]) == [None] and made.last[0].kind == "small mass"
        assert len(server.requests) == 1
    with ChatServer(lambda n, body: completion("CODE", {"CODE": 0.4, "3": 0.3, "7": 0.3})) as server:
        assert judge(server).score(["p"], ["a"]) == [5.0]  # numbers hold 0.6, whatever the likeliest token is


def test_a_tokenizer_that_splits_numbers_is_read_by_its_words() -> None:
    split = completion("10", {"1": 0.6, "7": 0.4})
    split["choices"][0]["logprobs"]["content"][0]["token"] = "1"
    with ChatServer(lambda n, body: split) as server:
        made = judge(server, high=10)
        assert made.score(["p"], ["a"]) == [10.0] and made.last[0].how == "words"
    with ChatServer(lambda n, body: completion("1", {"1": 0.6, "7": 0.4})) as server:
        made = judge(server, high=10)
        assert made.score(["p"], ["a"]) == [1.0] and made.last[0].how == "words"


def test_prose_is_asked_again_and_then_none() -> None:
    with ChatServer(lambda n, body: "What a lovely answer!") as server:
        made = judge(server, retries=2)
        assert made.score(["p"], ["a"]) == [None]
        assert made.last[0].kind == "unparsed" and made.last_raw == ["What a lovely answer!"]
        assert [len(body["messages"]) for body in server.requests] == [1, 3, 5]
        assert "one whole number from 1 to 9" in server.requests[1]["messages"][2]["content"]
    with ChatServer(lambda n, body: "Lovely!" if n == 0 else "8") as server:
        assert judge(server).score(["p"], ["a"]) == [8.0]


def test_garbage_refusals_and_timeouts_are_told_apart() -> None:
    answers = ["I'm sorry, I cannot judge that.", completion(None, refusal="no"), b"{", 500, "6", completion("")]

    def reply(number: int, body: dict[str, Any]) -> Any:
        return answers[int(body["messages"][0]["content"].rsplit("Answer: ", 1)[1][0])]

    with ChatServer(reply) as server:
        made = judge(server)
        assert made.score(["p"] * 6, [str(i) for i in range(6)]) == [None, None, None, None, 6.0, None]
    kinds = ["refusal", "refusal", "malformed", "server error", "", "empty"]
    assert [one.kind for one in made.last] == kinds and all(one.error for one in made.last if one.kind)


def test_a_second_run_asks_nothing_and_failures_are_asked_again() -> None:
    with ChatServer(lambda n, body: 500 if n == 1 else str(n + 1)) as server:
        assert judge(server, retries=0).score(["p", "q"], ["a", "b"]) == [1.0, None]
        meter = Cost()
        again = judge(server, retries=0)
        assert again.score(["p", "q"], ["a", "b"], meter) == [1.0, 3.0]
        assert len(server.requests) == 3 and meter.tokens == {again.name: 10}
        assert judge(server).score(["p", "q"], ["a", "b"]) == [1.0, 3.0] and len(server.requests) == 3


def test_samples_are_averaged() -> None:
    with ChatServer(lambda n, body: ["2", "5", "prose, alas"][n % 3]) as server:
        made = judge(server, samples=3, temperature=1.0, retries=0, logprobs=False)
        assert made.score(["p"], ["a"]) == [3.5] and made.last_raw == ["2\n---\n5\n---\nprose, alas"]
        assert "logprobs" not in server.requests[0] and server.requests[0]["temperature"] == 1.0


def test_rubrics(tmp_path: Path) -> None:
    file = tmp_path / "rubric.txt"
    file.write_text("Only politeness counts.\n")
    with ChatServer(lambda n, body: "6") as server:
        judge(server, rubric=str(file)).score(["p"], ["{prompt}"])
        judge(server, rubric="From {low} to {high}: {response} to {prompt}?").score(["p"], ["{prompt}"])
        first, second = (body["messages"][0]["content"] for body in server.requests)
    assert "Only politeness counts." in first and "Answer: {prompt}" in first
    assert second == "From 1 to 9: {prompt} to p?"


def test_fingerprints_and_names() -> None:
    with ChatServer(lambda n, body: "6") as server:
        plain = judge(server)
        assert plain.fingerprint == judge(server, timeout=1.0, retries=3, key_env=None).fingerprint
        others = [judge(server, rubric="x"), judge(server, high=7), judge(server, logprobs=False)]
        assert len({plain.fingerprint, *(other.fingerprint for other in others)}) == 4
        spec = parse_reward(f"judge:url={server.url},model=m,low=0,high=5")
        assert isinstance(spec, Judge) and spec.name == f"judge/m at {server.url[7:-3]}" and spec.high == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one"),
        ({"url": "http://localhost/v1", "path": "pocket/chat"}, "give one"),
        ({"url": "http://localhost/v1"}, "model=NAME"),
        ({"path": "pocket/chat", "low": 5, "high": 5}, "low < high"),
        ({"path": "pocket/chat", "samples": 3}, "copies of one reply"),
        ({"path": "pocket/chat", "samples": 3, "temperature": 1.0}, "exact"),
        ({"path": "pocket/chat", "least_mass": 2.0}, "least_mass"),
        ({"path": "/nowhere/at/all"}, "no model folder"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Judge(**options)


# local models


@pytest.fixture(scope="module")
def lm() -> LM:
    words = [str(i) for i in range(12)] + "is x y good score :".split()
    return taught([("x is good score :", "9"), ("y is good score :", "2")], epochs=1, words=words)


@torch.no_grad()
def brute_force(lm: LM, question: str, continuations: list[list[int]]) -> list[float]:
    """log p of each continuation, from whole forwards of the plain model."""
    (prompt,) = lm.encode([question])
    out = []
    for ids in continuations:
        logits = lm.model(torch.tensor([[*prompt, *ids]])).logits[0].double()
        logprobs = logits.log_softmax(-1)
        out.append(sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(ids)))
    return out


def test_a_local_judge_equals_brute_force(lm: LM) -> None:
    """Softmax over the options of log p from whole forwards; 1e-6 allows for float32 in another order."""
    question = "x is good score :"
    options = [str(i) for i in range(1, 10)]
    (chosen,) = LocalJudge(lm).choose([question], options)
    logprobs = torch.tensor(brute_force(lm, question, [[lm.tokenizer.convert_tokens_to_ids(o)] for o in options]))
    assert chosen.p == pytest.approx(logprobs.softmax(0).tolist(), abs=1e-6)
    assert chosen.mass == pytest.approx(float(logprobs.exp().sum()), abs=1e-6)


def test_options_of_several_tokens_and_spellings() -> None:
    """pocket/base splits 10 in two, so every option carries its end; "7" and " 7" are both ways to say 7."""
    lm = LM.load("pocket/base")
    question, options = "Q: How many?\nA:", [str(i) for i in range(1, 11)]
    (chosen,) = LocalJudge(lm).choose([question], options)
    spelled = [[option, f" {option}"] for option in options]
    (end,) = lm.eos_ids
    ids = [[[*lm.tokenizer(t, add_special_tokens=False)["input_ids"], end] for t in texts] for texts in spelled]
    assert any(len(row) == 3 for texts in ids for row in texts)
    masses = torch.tensor([brute_force(lm, question, texts) for texts in ids]).exp().sum(1)
    assert chosen.p == pytest.approx((masses / masses.sum()).tolist(), abs=1e-6)
    made = Judge(path="pocket/base", high=10, rubric=question.replace("many", "many {prompt}{response}"))
    made.behind = LocalJudge(lm)
    (score,) = made.score([""], [""])
    (again,) = LocalJudge(lm).choose(["Q: How many ?\nA:"], options)
    assert again.p is not None and score == pytest.approx(sum((i + 1) * p for i, p in enumerate(again.p)), abs=1e-6)
    assert made.last[0].mass == again.mass and made.tokens_forwarded > 0


def test_restricted() -> None:
    chosen = restricted([-1.0, -2.0, -3.0], [0, 0, 1], 2)
    assert chosen.p == pytest.approx([(0.36788 + 0.13534) / 0.55300, 0.04979 / 0.55300], abs=1e-4)
    far = restricted([-2000.0, -2001.0], [0, 1], 2)
    assert far.p == pytest.approx([0.731059, 0.268941], abs=1e-6) and far.mass == 0.0


def test_batches_do_not_matter_and_choices_are_kept(lm: LM, tmp_path: Path) -> None:
    questions = ["x is good score :", "y score :", "x is good score :", "y is good score : x x x"]
    options = [str(i) for i in range(1, 10)]
    together = LocalJudge(lm, Cache(tmp_path)).choose(questions, options)
    alone = [LocalJudge(lm).choose([question], options)[0] for question in questions]
    for a, b in zip(together, alone, strict=True):
        assert a.p == pytest.approx(b.p, abs=1e-5)
    meter = Cost()
    assert LocalJudge(lm, Cache(tmp_path)).choose(questions, options, meter) == together and not meter.tokens
    assert LocalJudge(lm, Cache(tmp_path)).choose(questions, options[:5]) != together


def test_a_question_over_the_context_is_not_judged(lm: LM) -> None:
    long, short = LocalJudge(lm).choose(["x " * 65, "x is good score :"], ["1", "2"])
    assert long.p is None and "65 tokens" in long.error and short.p is not None
    made = Judge(path="pocket/chat")
    scores = made.score(["p", "p"], ["word " * 300, "a word"])
    assert scores[0] is None and scores[1] is not None and made.last[0].kind == "too long"


def test_options_that_are_one_token_are_refused(lm: LM) -> None:
    with pytest.raises(UsageError, match="same tokens"):
        LocalJudge(lm).choose(["x"], ["unseen", "unknown"])  # both are <unk>
