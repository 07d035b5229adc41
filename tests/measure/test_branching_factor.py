"""Branching factor against enumeration, closed forms and transformers' own scores."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from markov import markov
from tiny import CHAT, tiny_lm, tiny_tokenizer
from trimtab.control import FunctionControl, Steered
from trimtab.errors import TrimtabError, UsageError
from trimtab.guided import Guided
from trimtab.measure.branching_factor import BranchingFactor, BranchingFactorConfig, check_outside, ratio
from trimtab.measure.cache import Cache
from trimtab.measure.diagnostic import Subject
from trimtab.measure.entropy_rate import curve, nats_per_token, share_interval
from trimtab.measure.forced_prefix import modal_prefixes
from trimtab.measure.truncated import Scored, score_answers, scores_of
from trimtab.policy import Completions, Cost
from trimtab.sampling import Sampling
from trimtab.stepping import answer_steps

CHAIN = {
    "go": {"a": 0.45, "b": 0.3, "c": 0.15, "</s>": 0.1},
    "a": {"a": 0.05, "b": 0.5, "c": 0.35, "</s>": 0.1},
    "b": {"a": 0.07, "b": 0.2, "c": 0.03, "</s>": 0.7},
    "c": {"a": 0.6, "b": 0.06, "c": 0.3, "</s>": 0.04},
}
HORIZON = 6


def nucleus(row: dict[str, float], top_p: float) -> dict[str, float]:
    """The smallest set of likely words with this mass, renormalised."""
    kept: dict[str, float] = {}
    for word, p in sorted(row.items(), key=lambda entry: -entry[1]):
        if sum(kept.values()) < top_p - 1e-12:
            kept[word] = p
    return {word: p / sum(kept.values()) for word, p in kept.items()}


def outputs(top_p: float) -> list[tuple[float, list[float], list[float]]]:
    """Every answer of the chain: its probability, the entropies of its steps, and the surprises of its words."""
    law = {word: nucleus(row, top_p) for word, row in CHAIN.items()}
    entropy = {word: -sum(p * math.log(p) for p in row.values()) for word, row in law.items()}
    found = []
    growing: list[tuple[str, float, list[float], list[float]]] = [("go", 1.0, [], [])]
    while growing:
        last, p, entropies, surprises = growing.pop()
        for word, q in law[last].items():
            row = (p * q, [*entropies, entropy[last]], [*surprises, -math.log(q)])
            if word == "</s>" or len(row[1]) == HORIZON:
                found.append(row)
            else:
                growing.append((word, *row))
    return found


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_ratio_is_what_enumeration_gives_and_the_mean_of_means_is_not(top_p: float) -> None:
    every = outputs(top_p)
    assert sum(p for p, _, _ in every) == pytest.approx(1, abs=1e-12)
    whole = -sum(p * math.log(p) for p, _, _ in every)
    chained = sum(p * sum(h) for p, h, _ in every)
    assert whole == pytest.approx(chained, abs=1e-12)  # H = E[sum of entropies]: exact but for rounding
    length = sum(p * len(h) for p, h, _ in every)
    exact = math.exp(whole / length)
    limits = [math.exp(sum(p * np.mean(row[side]) for p, *row in every)) for side in (0, 1)]
    assert abs(limits[0] - limits[1]) > 0.02 and all(abs(limit - exact) > 0.005 for limit in limits)
    assert BranchingFactorConfig().estimator == "ratio"

    lm = markov(CHAIN)
    sampling = Sampling(max_new_tokens=HORIZON, top_p=top_p, samples=4000, seed=1)
    answers = lm.generate(["go"], sampling)
    scored = score_answers(lm, answers.prompts, answers.tokens, sampling)
    for values, limit in (([s.entropy for s in scored], limits[0]), ([s.surprise for s in scored], limits[1])):
        sums, lengths = np.array([v.sum() for v in values]), np.array([len(v) for v in values])
        found = ratio(sums, lengths)
        rate = math.log(found)
        error = (sums - rate * lengths).std() / lengths.mean() / math.sqrt(len(sums))  # delta method
        assert abs(math.log(found / exact)) < 3 * error + 1e-6
        assert found == pytest.approx(math.exp(nats_per_token(values)), rel=1e-12)
        spread = np.std([v.mean() for v in values]) / math.sqrt(len(values))
        assert abs(nats_per_token(values, "per_sequence") - math.log(limit)) < 3 * spread + 1e-6


def measured(lm: Any, prompts: list[str], sampling: Sampling, **options: Any) -> Any:
    subject = Subject(lm, "here", prompts=list(prompts), sampling=sampling)
    return BranchingFactor(BranchingFactorConfig(**options)).measure(subject)


@pytest.mark.parametrize(("words", "top_p", "expected"), [(7, 1.0, 7), (10, 0.85, 9)])
def test_a_uniform_model_branches_into_all_its_words(words: int, top_p: float, expected: int) -> None:
    law = {"*": {f"w{i}": 1 / words for i in range(words)}}
    found = measured(markov(law, ends=False), ["w0", "w1"], Sampling(max_new_tokens=8), samples=4, top_p=top_p)
    labels = (
        "branching factor",
        "branching factor, mean over prompts",
        "branching factor by surprise",
        "branching factor at the first token",
    )
    for label in labels:
        # float32 logits of a 10-word model: equal probabilities to about 1e-7
        assert found.row(label).value == pytest.approx(expected, abs=1e-5)
        assert found.row(label).low is None  # no variation: undefined, not a width of 0
    for line in found.figures[0].lines:
        assert [y for _, y in line.points] == pytest.approx([expected] * 8, abs=1e-5)
    for estimator in ("ratio", "per_sequence", "position_mean", "paper"):
        rows = [np.full(60, math.log(words))] * 5
        assert math.exp(nats_per_token(rows, estimator, rows)) == pytest.approx(words, abs=1e-6)


def test_certainty_and_temperature() -> None:
    sure = markov({"*": {"a": 1.0}}, ends=False)
    assert measured(sure, ["a"], Sampling(max_new_tokens=5), samples=4).row("branching factor").value == 1.0
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    for temperature, expected in ((1e-3, 1.0), (1e6, 4.0)):
        entropy = scores_of(logits, torch.tensor([0]), Sampling(temperature=temperature)).entropy
        assert math.exp(entropy[0]) == pytest.approx(expected, abs=1e-5)  # 1 / temperature is not quite 0


def test_a_two_token_tail() -> None:
    """(0.6, 0.3, 0.1) at top-p 0.85 keeps (2/3, 1/3)."""
    scored = scores_of(torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([1]), Sampling(top_p=0.85))
    assert math.exp(scored.entropy[0]) == pytest.approx(1.8899, abs=1e-4)
    assert scored.surprise[0] == pytest.approx(math.log(3), abs=1e-6) and not scored.outside[0]
    edge = scores_of(torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([2]), Sampling(top_p=0.85))
    assert edge.outside[0] and edge.surprise[0] == pytest.approx(-math.log(0.1), abs=1e-6)  # put back, and counted
    nothing = np.zeros(1000), np.zeros(1000), np.zeros((1000, 5), dtype=np.int64)
    check_outside([Scored(*nothing, np.arange(1000) < 1)], "m")
    with pytest.raises(TrimtabError, match="5 of 1000 tokens of m lie outside"):
        check_outside([Scored(*nothing, np.arange(1000) < 5)], "m")


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_scoring_again_equals_the_scores_of_generate(arch: str) -> None:
    """transformers' own generate on a left-padded batch of unequal prompts; float32: 1e-4 on log-probabilities."""
    lm = tiny_lm(arch, tokenizer=tiny_tokenizer())
    prompts = ["ba", "ba be bi bo bu da", "mo na"]
    ids = lm.encode(prompts)
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = lm.model.generate(
            padded, attention_mask=mask, do_sample=True, temperature=0.8, top_k=0, top_p=0.9, max_new_tokens=12,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    theirs = torch.stack(out.scores, 1).log_softmax(-1)  # [B, T, V]
    tokens = []
    for row in out.sequences[:, width:].tolist():
        end = next((at + 1 for at, token in enumerate(row) if token in lm.eos_ids), len(row))
        tokens.append(row[:end])
    scored = score_answers(lm, prompts, tokens, Sampling(temperature=0.8, top_p=0.9))
    for row, (answer, one) in enumerate(zip(tokens, scored, strict=True)):
        logprobs = theirs[row, : len(answer)].double()
        assert not one.outside.any()
        np.testing.assert_allclose(one.surprise, -logprobs[range(len(answer)), answer].numpy(), atol=1e-4)
        np.testing.assert_allclose(one.entropy, torch.special.entr(logprobs.exp()).sum(-1).numpy(), atol=1e-4)


class Sharper(Guided):
    def guide(self, logits: torch.Tensor) -> torch.Tensor:
        return 1.5 * logits


class Stepped:
    def __init__(self, lm: Any) -> None:
        self.lm, self.name = lm, "sharper"

    def open(self, prompts: Any, sampling: Sampling, meter: Cost) -> Sharper:
        return Sharper(self.lm.open(prompts, sampling, meter), prompts)

    def generate(self, prompts: Any, sampling: Sampling = Sampling()) -> Completions:
        return answer_steps(self, prompts, sampling)


@pytest.mark.parametrize("kind", ["plain", "steered", "guided", "chat"])
def test_surprises_are_those_of_the_draw(kind: str) -> None:
    """For every sort of policy the surprise equals minus the log-probability that sampling itself reported."""
    lm = tiny_lm(tokenizer=tiny_tokenizer(chat=CHAT if kind == "chat" else None))
    policy = {
        "steered": Steered(lm, FunctionControl(lambda hidden: hidden * 1.3 + 0.1)),
        "guided": Stepped(lm),
    }.get(kind, lm)
    sampling = Sampling(max_new_tokens=9, top_p=0.8, samples=5)
    answers = policy.generate(["ba be", "mo", "ta ta ti to"], sampling)
    assert len({len(row) for row in answers.tokens}) > 1
    scored = score_answers(policy, answers.prompts, answers.tokens, sampling)
    for one, logprobs in zip(scored, answers.logprobs, strict=True):
        np.testing.assert_allclose(one.surprise, -np.array(logprobs), atol=1e-5)  # float32, another batch
    assert measured(policy, ["ba be", "mo"], sampling, samples=4, top_p=0.8).row("branching factor").n == 2


def test_the_mean_surprise_settles_as_one_over_n() -> None:
    """i.i.d. tokens: the variance of the mean surprise over N tokens falls as 1/N."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    rng = np.random.default_rng(0)
    sizes = np.array([4, 8, 16, 32, 64, 128])
    variances = [(-np.log(p[rng.choice(4, (4000, n), p=p)])).mean(1).var() for n in sizes]
    assert np.polyfit(np.log(sizes), np.log(variances), 1)[0] == pytest.approx(-1, abs=0.1)


def test_estimators_and_curves() -> None:
    """By hand. The first answer is short: it must not cut the others (the published code's slip)."""
    rows = [np.array(row) for row in ([1.0], [1.0, 3.0], [2.0, 4.0], [2.0, 5.0], [4.0, 4.0])]
    assert nats_per_token(rows) == pytest.approx(26 / 9) and ratio(
        [r.sum() for r in rows], [1, 2, 2, 2, 2]
    ) == pytest.approx(math.exp(26 / 9))
    assert nats_per_token(rows, "per_sequence") == pytest.approx(np.mean([1, 2, 3, 3.5, 4]))
    assert nats_per_token(rows, "position_mean") == pytest.approx((2 + 4) / 2)
    found = curve(rows)
    assert found.alive.tolist() == [5, 4] and found.nats.tolist() == [2, 4] and found.cumulative.tolist() == [2, 3]
    assert len(curve(rows[:4]).nats) == 1  # three answers are too few for a second position
    long, short = np.full(60, 1.0), np.full(10, 2.0)
    assert nats_per_token([long, short], "paper", [long * 5, short * 7]) == pytest.approx((5 + 2) / 2)
    assert math.isnan(nats_per_token([np.empty(0)]))
    with pytest.raises(UsageError, match="a token"):
        ratio([0.0], [0])


def test_modal_prefixes() -> None:
    answers = [[5, 6, 7], [5, 6, 8], [5, 6], [5, 9, 9], [9, 2], [2]]
    assert modal_prefixes(answers, 2, 0.5) == [((5, 6), 3)]
    assert modal_prefixes(answers, 1, 0.5) == [((5,), 4)]
    assert modal_prefixes(answers, 5, 1 / 6, ends=[2]) == [((5, 6, 7), 1), ((5, 6, 8), 1), ((5, 9, 9), 1), ((9,), 1)]
    assert modal_prefixes(answers, 3, 0.9) == []


def test_shares_of_nothing_are_undefined() -> None:
    rng = np.random.default_rng(0)
    whole = rng.normal(2, 0.5, 20)
    found = share_interval(whole / 2 + rng.normal(0, 0.1, 20), whole)
    assert found.low is not None and found.high is not None and found.low < 0.5 < found.high
    assert share_interval(whole, rng.normal(0, 1, 20)).mean is None and share_interval([1.0], [1.0]).mean is None


def test_identical_models_are_seldom_called_changed() -> None:
    """Per-prompt log factors of the same model twice: at most the nominal 5 % (and 3 s.e. of 150 trials) fire."""
    rng = np.random.default_rng(0)
    lm = markov({"*": {"a": 0.5, "b": 0.3, "</s>": 0.2}})
    blank = measured(lm, ["a", "b"], Sampling(max_new_tokens=4), samples=4)
    fired = 0
    for _ in range(150):
        centre = rng.normal(1, 0.5, 10)
        sides = []
        for _ in range(2):
            blank.units = [str(i) for i in range(10)]
            column = np.exp(centre + rng.normal(0, 0.2, 10)).tolist()
            blank.samples = dict.fromkeys(blank.samples, column)
            sides.append(type(blank).from_dict(blank.to_dict()))
        fired += BranchingFactor().compare(*sides).changes[0].verdict == "changed"
    assert fired / 150 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)


def test_comparisons() -> None:
    one = markov({"*": {"a": 0.5, "b": 0.3, "c": 0.1, "</s>": 0.1}}, "one")
    two = markov({"*": {"a": 0.88, "b": 0.01, "c": 0.01, "</s>": 0.1}}, "two")
    sampling = Sampling(max_new_tokens=12)
    prompts = ["a", "b", "c", "a b", "b c", "c a"]
    first, second = (measured(lm, prompts, sampling, samples=8, top_p=1.0) for lm in (two, one))
    change = BranchingFactor().compare(first, second).change("branching factor, ratio")
    exact = [math.exp(-sum(p * math.log(p) for p in row)) for row in ((0.88, 0.01, 0.01, 0.1), (0.5, 0.3, 0.1, 0.1))]
    # every step has the same law, so entropies have no error: float32 alone
    assert first.row("branching factor").value == pytest.approx(exact[0], rel=1e-5)
    assert change.difference == pytest.approx(exact[0] / exact[1], rel=1e-5)
    by_surprise = BranchingFactor().compare(first, second).change("branching factor by surprise, ratio")
    assert by_surprise.verdict == "changed" and by_surprise.high is not None and by_surprise.high < 1
    other = markov({"*": {"a": 0.9, "z": 0.05, "</s>": 0.05}}, "three")
    third = measured(other, prompts[:1] + ["a a", "a a a", "z", "z z", "a z"], sampling, samples=8, top_p=1.0)
    with pytest.raises(UsageError, match="were not measured alike"):
        BranchingFactor().compare(first, third)
    third.measured, third.units = first.measured, first.units
    labels = [c.label for c in BranchingFactor().compare(first, third).changes]
    assert labels == ["nats per character"]  # other tokens: no ratio of branching factors


def test_bad_input(tmp_path: Path) -> None:
    lm = markov({"*": {"a": 0.6, "</s>": 0.4}})
    for sampling, message in (
        (Sampling(temperature=0), "greedy answers have a branching factor of 1"),
        (Sampling(repetition_penalty=1.2), "repetition penalty"),
        (Sampling(max_new_tokens=0), "0 tokens"),
    ):
        with pytest.raises(UsageError, match=message):
            measured(lm, ["a"], sampling)
    with pytest.raises(UsageError, match="samples of 4 or more"):
        BranchingFactorConfig(samples=3)
    with pytest.raises(UsageError, match="top_p"):
        BranchingFactorConfig(top_p=0.0)
    with pytest.raises(UsageError, match="--texts FILE is needed"):
        measured(lm, [], Sampling())

    class Words:
        name = "words"

        def generate(self, prompts: Any, sampling: Sampling = Sampling()) -> Completions:
            raise NotImplementedError

    with pytest.raises(UsageError, match="words gives whole answers only"):
        measured(Words(), ["a"], Sampling())
    cut = measured(lm, ["a"], Sampling(max_new_tokens=1), samples=8)
    assert "were cut at 1 tokens" in cut.warnings[0]
    with pytest.raises(UsageError, match="greedy"):
        score_answers(lm, ["a"], [[2]], Sampling(temperature=0))
    from trimtab.prompt.tuning import save

    save(markov({"*": {"q": 0.6, "</s>": 0.4}}), tmp_path / "other")
    with pytest.raises(UsageError, match="different tokens"):
        measured(lm, ["a"], Sampling(), nudge=str(tmp_path / "other"))


def test_the_same_seed_gives_the_same_measurement_and_answers_are_drawn_once(tmp_path: Path) -> None:
    lm = markov({"*": {"a": 0.5, "b": 0.3, "</s>": 0.2}})
    runs = []
    for _ in range(2):
        subject = Subject(lm, "here", prompts=["a", "b"], sampling=Sampling(max_new_tokens=6), cache=Cache(tmp_path))
        runs.append(BranchingFactor(BranchingFactorConfig(samples=4)).measure(subject))
    assert runs[0].samples == runs[1].samples and runs[0].cost.tokens_forwarded > runs[1].cost.tokens_forwarded
    assert all(len(column) == 2 for column in runs[0].samples.values())


def test_answers_of_no_length_are_left_out() -> None:
    rows = list(itertools.chain([np.empty(0)], [np.array([1.0, 2.0])]))
    assert nats_per_token(rows) == 1.5 and nats_per_token(rows, "per_sequence") == 1.5


def test_stories260k(stories260k: Path) -> None:
    """A model that nobody here trained: both estimators agree within 3 s.e. over prompts."""
    from trimtab.lm import LM

    lm = LM.load(stories260k)
    prompts = ["Once upon a time", "Tom had a red", "The dog", "One day Lily"]
    found = measured(lm, prompts, Sampling(max_new_tokens=40), samples=8)
    assert found.row("branching factor").value == pytest.approx(
        found.row("branching factor by surprise").value, rel=0.15
    )
    assert 1.3 < found.row("branching factor").value < 10
