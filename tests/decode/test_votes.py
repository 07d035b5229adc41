"""Majority vote and minimum Bayes risk as policies: their whole law by enumeration, their cost, and that they help."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from oracles.categorical import Categorical
from tiny import tiny_lm
from trimtab import LM, Completions, Cost, Sampling, pocket
from trimtab.decode.majority_vote import MajorityVote, MajorityVoteConfig
from trimtab.decode.mbr import MBR, MBRConfig
from trimtab.errors import UsageError
from trimtab.measure.stats import paired_difference
from trimtab.rewards import as_reward

P = [0.4, 0.3, 0.2, 0.1]
SCORES = [0.0, 1.0, -1.0, 2.0]
PLAIN = Sampling()
PROMPTS = ["ba da fa la", "ma na", "pe"]


def score(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
    return [SCORES[int(text)] for text in texts]


def never(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
    raise RuntimeError("called")


class Fixed:
    """A policy that gives the listed answers in turn, whatever is asked."""

    name = "fixed"

    def __init__(self, texts: Sequence[str], tokens: Sequence[list[int]]):
        self.texts, self.tokens = list(texts), list(tokens)

    def generate(self, prompts: Sequence[Any], sampling: Sampling = PLAIN) -> Completions:
        owners = [prompt for prompt in prompts for _ in range(sampling.samples)]
        n = len(owners)
        return Completions(owners, self.texts[:n], self.tokens[:n], [[0.0]] * n, ["stop"] * n, Cost({"fixed": n}))


def law_of_vote(n: int, beta: float | None) -> np.ndarray:
    """[4] by enumeration of all 4^n draws: the most weight wins, ties to the one drawn first."""
    out = np.zeros(4)
    for draws in itertools.product(range(4), repeat=n):
        chance = math.prod(P[x] for x in draws)
        weight = Counter[int]()
        for x in draws:
            weight[x] += 1 if beta is None else math.exp(SCORES[x] / beta)  # type: ignore[assignment]
        best = max(weight.values())
        out[next(x for x in draws if weight[x] >= best - 1e-9)] += chance
    return out


def counts(policy: Any, rows: int = 6000) -> np.ndarray:
    done = policy.generate(["x"], Sampling(samples=rows, seed=2))
    return np.bincount([int(text) for text in done.texts], minlength=4)


# what they draw


@pytest.mark.parametrize("beta", [None, 0.5, 2.0])
def test_the_vote_has_the_law_of_enumeration(beta: float | None) -> None:
    vote = MajorityVote(Categorical(P), score, n=4, weighted=beta is not None, beta=beta or 1.0)
    seen = counts(vote)
    assert chisquare(seen, law_of_vote(4, beta) * seen.sum()).pvalue > 1e-3
    assert chisquare(seen, np.array(P) * seen.sum()).pvalue < 1e-12  # the base would be seen


def test_mbr_of_words_that_share_nothing_is_the_vote() -> None:
    """Each answer is one token of its own: likeness is equality, so the law is that of the vote, weighted or not."""
    for beta in (None, 0.5):
        seen = counts(MBR(Categorical(P), score, n=4, weighted=beta is not None, beta=beta or 1.0))
        assert chisquare(seen, law_of_vote(4, beta) * seen.sum()).pvalue > 1e-3


def test_many_weighted_draws_find_the_mode_of_the_tilted_target() -> None:
    """p exp(r / beta) at beta = 1.5 is largest at outcome 1, by half; the base's own mode is 0, the reward's 3."""
    tilted = np.array(P) * np.exp(np.array(SCORES) / 1.5)
    assert int(tilted.argmax()) == 1 and tilted[1] > 1.4 * np.sort(tilted)[-2]
    for beta, mode in ((1e6, 0), (1.5, 1), (0.3, 3)):
        vote = MajorityVote(Categorical(P), score, n=400, weighted=True, beta=beta)
        assert set(vote.generate(["x"], Sampling(samples=20)).texts) == {str(mode)}


def test_mbr_by_hand() -> None:
    texts, tokens = ["a b c", "a b b", "c"], [[1, 2, 3], [1, 2, 2], [3]]
    assert MBR(Fixed(texts, tokens), n=3).generate(["x"]).texts == ["a b c"]
    last = MBR(Fixed(texts, tokens), lambda p, t: [0.0, 0.0, 9.0], n=3, weighted=True).generate(["x"])
    assert last.texts == ["c"] and last.telemetry[0]["chosen"] == 2


def test_votes_are_on_what_is_extracted() -> None:
    texts = ["4 + 3 = 7. It is 7.", "It is 8.", "I get 7", "no idea"]
    policy = Fixed(texts, [[number] for number in range(4)])
    done = MajorityVote(policy, n=4, extract="number").generate(["x"])
    assert done.texts == texts[:1]
    assert done.telemetry == [{"keys": ["7", "8", "7", None], "chosen": 0}]
    assert MajorityVote(policy, n=4, extract=r"It is (\d)").generate(["x"]).texts == texts[:1]
    assert MajorityVote(policy, n=4).generate(["x"]).texts == texts[:1]  # nothing agrees: the first
    only = MajorityVote(Fixed(["no", "idea", "3"], [[1]] * 3), n=3, extract="number").generate(["x"])
    assert only.texts == ["3"]


def test_draws_that_were_not_judged_weigh_nothing() -> None:
    texts, tokens = ["a", "a", "b"], [[1], [1], [2]]

    def judge(scores: list[float | None]) -> Any:
        return lambda prompts, given: scores

    for method in (MajorityVote, MBR):
        policy = Fixed(texts, tokens)
        done = method(policy, judge([None, None, 0.0]), n=3, weighted=True).generate(["x"])  # type: ignore[operator]
        assert done.texts == ["b"] and done.telemetry[0]["weights"] == [0, 0, 1]
        assert done.telemetry[0]["rewards"] == [None, None, 0.0]
        none = method(policy, judge([None] * 3), n=3, weighted=True).generate(["x"])  # type: ignore[operator]
        assert none.texts == ["a"] and none.telemetry[0]["chosen"] == 0  # then all weigh the same


# what they cost


@pytest.mark.parametrize("method", [MajorityVote, MBR])
def test_the_prompt_is_forwarded_once_and_the_reward_called_only_where_weighted(method: Any) -> None:
    lm, sampling = tiny_lm(), Sampling(max_new_tokens=6, samples=2)
    drawn = lm.generate(PROMPTS, sampling.but(samples=10))
    answers = sum(len(row) - 1 for row in drawn.tokens)  # an answer's last token is never forwarded
    for weighted, calls in ((False, 0), (True, 30)):
        done = method(lm, "length:target=3", n=5, weighted=weighted).generate(PROMPTS, sampling)
        assert done.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
        assert done.cost.tokens == {lm.name: sum(map(len, lm.encode(PROMPTS))) + answers}
        assert done.cost.reward_calls == calls and done.cost.seconds > 0
        for row in range(6):
            at = 5 * row + done.telemetry[row]["chosen"]
            for column in ("texts", "tokens", "logprobs", "finish_reasons", "prompts"):
                assert getattr(done, column)[row] == getattr(drawn, column)[at]


@pytest.mark.parametrize("method", [MajorityVote, MBR])
def test_one_is_the_policy_without_a_reward_call(method: Any) -> None:
    lm, sampling = tiny_lm(), Sampling(max_new_tokens=8, samples=2, seed=5)
    done, plain = method(lm, never, n=1, weighted=True).generate(PROMPTS, sampling), lm.generate(PROMPTS, sampling)
    assert (done.tokens, done.texts, done.logprobs) == (plain.tokens, plain.texts, plain.logprobs)
    assert done.cost.tokens == plain.cost.tokens and done.cost.reward_calls == 0


def test_an_unweighted_method_never_calls_the_reward() -> None:
    assert MajorityVote(Categorical(P), never, n=3).reward is None
    assert len(MBR(Categorical(P), never, n=3).generate(["x"])) == 1
    assert not MajorityVote.NEEDS_REWARD and not MBR.NEEDS_REWARD


def test_a_command_line_makes_them_with_the_reward_only_where_weighted() -> None:
    parts: Any = SimpleNamespace(policy=Categorical(P), reward=as_reward("length:target=3"))
    voted = MajorityVote.make(parts, MajorityVoteConfig(n=4, weighted=True))
    assert voted.reward is parts.reward and voted.name == "weighted-majority-vote-4"
    without: Any = SimpleNamespace(policy=Categorical(P))  # asking it for a reward would fail
    assert MBR.make(without, MBRConfig(n=4)).name == "mbr-4"


# bad input


def test_bad_options_are_refused() -> None:
    policy = Categorical(P)
    for call, said in (
        (lambda: MajorityVote(policy, n=0), "n must be 1 or more"),
        (lambda: MBR(policy, n=0), "n must be 1 or more"),
        (lambda: MajorityVote(policy, score, beta=0.0), "beta must be above 0"),
        (lambda: MBR(policy, score, beta=-1.0), "beta must be above 0"),
        (lambda: MajorityVote(policy, extract="numbers"), "has 0 groups"),
        (lambda: MajorityVote(policy, weighted=True), "majority-vote: weighted=true weighs answers by a reward"),
        (lambda: MBR(policy, weighted=True), "mbr: weighted=true weighs answers by a reward"),
    ):
        with pytest.raises(UsageError, match=said):
            call()


def test_a_policy_without_tokens_is_refused_by_mbr() -> None:
    with pytest.raises(UsageError, match="mbr compares the tokens of answers, and 'fixed' gives none"):
        MBR(Fixed(["a", "b"], [[], []]), n=2).generate(["x"])
    assert MBR(Fixed(["", ""], [[], []]), n=2).generate(["x"]).texts == [""]


# that they help


@pytest.fixture(scope="module")
def base() -> LM:
    return LM.load("pocket/base")


def correct(done: Completions) -> list[float | None]:
    return [pocket.judge(str(prompt), text).correct for prompt, text in zip(done.prompts, done.texts, strict=True)]


def test_a_vote_gets_more_sums_right_than_the_base(base: LM) -> None:
    """24 held-out sums, 3 seeds: share of right answers over the base's, paired by prompt, 95% interval above 0."""
    prompts = pocket.prompts("test", 24, 0, ("sum",))
    voted: list[float | None] = []
    plain: list[float | None] = []
    for seed in range(3):
        sampling = Sampling(max_new_tokens=48, seed=seed)
        voted += correct(MajorityVote(base, n=8, extract="number").generate(prompts, sampling))
        plain += correct(base.generate(prompts, sampling))
    gain = paired_difference(voted, plain, list(range(24)) * 3)
    assert gain.low is not None and gain.low > 0, gain


def test_weighted_mbr_is_better_by_the_judge_than_the_base_and_than_unweighted(base: LM) -> None:
    """32 held-out prompts, 2 seeds, weights from the learned reward, gold judge: both 95% intervals above 0."""
    prompts, gold = pocket.prompts("test", 32, 0), as_reward("pocket/judge")
    scores: dict[str, list[float | None]] = {"base": [], "mbr": [], "weighted": []}
    for seed in range(2):
        sampling = Sampling(max_new_tokens=48, seed=seed)
        for name, policy in (
            ("base", base),
            ("mbr", MBR(base, n=8)),
            ("weighted", MBR(base, "pocket/reward", n=8, weighted=True)),
        ):
            done = policy.generate(prompts, sampling)  # type: ignore[attr-defined]
            scores[name] += gold.score(done.prompts, done.texts)
    for baseline in ("base", "mbr"):
        gain = paired_difference(scores["weighted"], scores[baseline], list(range(32)) * 2)
        assert gain.low is not None and gain.low > 0, (baseline, gain)
