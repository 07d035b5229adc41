"""DeAL against brute force: a toy of 3 tokens and answers of at most 4, of which every continuation can be listed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from oracles.toy import EOS, Toy
from tiny import CONTEXT, tiny_lm
from trimtab import LM, Sampling, Steered
from trimtab.control import FunctionControl
from trimtab.decode.args import Args
from trimtab.decode.best_of_n import BestOfN
from trimtab.decode.deal import Deal, DealConfig, shaped
from trimtab.errors import UsageError
from trimtab.policy import Cost, Prompt
from trimtab.rewards import Function, Keyword, Length, PocketReward, Regex, WeightedSum, parse_reward
from trimtab.rewards.prefix import UnfinishedText

WEIGHT = 0.8
PROMPTS = ["ba da fa la", "ma na", "pe"]
GREEDY = Sampling(temperature=0.0, max_new_tokens=8)


def swinging(tokens: tuple[int, ...]) -> float:
    """A pair pays, what it begins with costs: the text so far says little about where it leads."""
    return 1.5 * sum(pair == (1, 2) for pair in zip(tokens, tokens[1:], strict=False)) - tokens.count(1)


def distinct(_: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    return [len(set(text.split())) - 0.1 * len(text) for text in texts]


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy(swinging, vocab=3, horizon=4)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


def text_of(tokens: Sequence[int]) -> tuple[int, ...]:
    return tuple(token for token in tokens if token != EOS)


def looked_ahead(toy: Toy, row: int, token: int, steps: int) -> tuple[int, ...]:
    """The answer's text after prefix `row`, `token` and up to `steps` greedy tokens."""
    answer, at = [*toy.prefixes[row], token], int(toy.child[row, token])
    while at >= 0 and steps > 0:
        token = int(toy.base[at].argmax())
        answer.append(token)
        at, steps = int(toy.child[at, token]), steps - 1
    return text_of(answer)


def choices(policy: Deal, toy: Toy) -> torch.Tensor:
    """The token committed at every prefix, [N]."""
    session = policy.open([toy.prompt], toy.sampling, Cost()).fork([0] * len(toy.prefixes))
    session.append([list(prefix) for prefix in toy.prefixes])
    assert torch.equal(session.logits.exp().sum(-1), torch.ones(len(toy.prefixes)))  # a certain choice
    return session.logits.argmax(-1)


# 1: brute force


@pytest.mark.parametrize(("k", "ahead"), [(0, 4), (0, 1), (2, 2), (2, 0)])
@pytest.mark.filterwarnings("ignore:deal without a look ahead")
def test_every_choice_is_the_best_by_the_equation(toy: Toy, k: int, ahead: int) -> None:
    best = []
    for row, logprobs in enumerate(toy.base):
        order = logprobs.argsort(descending=True).tolist()[: k or toy.vocab]
        score = {z: float(logprobs[z]) + WEIGHT * swinging(looked_ahead(toy, row, z, ahead)) for z in order}
        best.append(max(score, key=score.__getitem__))
    found = choices(Deal(toy.lm, toy.reward, k=k, lookahead=ahead, weight=WEIGHT), toy)
    assert found.tolist() == best
    assert found.tolist() != toy.base.argmax(-1).tolist()


def all_scores(toy: Toy, weight: float) -> dict[tuple[int, ...], float]:
    """log P + weight * R of every answer."""
    p = toy.answer_probabilities().log().tolist()
    return {tuple(a): p[i] + weight * swinging(text_of(a)) for i, a in enumerate(toy.answers)}


@pytest.mark.parametrize("weight", [0.3, 0.8, 3.0])
def test_a_beam_wide_enough_finds_the_best_of_all_answers(toy: Toy, weight: float) -> None:
    scores = all_scores(toy, weight)
    policy = Deal(toy.lm, toy.reward, beams=100, k=0, lookahead=4, weight=weight)
    done = policy.generate([toy.prompt], toy.sampling)
    assert tuple(done.tokens[0]) == max(scores, key=scores.__getitem__)
    (told,) = done.telemetry
    found = sum(told["log_p"]) + weight * told["objective"][-1]
    assert found == pytest.approx(max(scores.values()), abs=1e-5)
    with pytest.raises(UsageError, match="searches whole answers"):
        policy.open([toy.prompt], toy.sampling, Cost())


def test_segments_are_ranked_by_the_reward_alone(toy: Toy) -> None:
    """k is wide enough to propose every segment of 2 tokens: the best by R is kept, then the best from there."""

    def grow(prefix: tuple[int, ...]) -> list[tuple[int, ...]]:
        out = [prefix]
        for _ in range(2):
            out = [(*p, *([z] if p[-1:] != (EOS,) else [])) for p in out for z in range(toy.vocab)]
        return sorted({p[: p.index(EOS) + 1] if EOS in p else p for p in out})

    first = {p: swinging(text_of(p)) for p in grow(())}
    best = max(first.values())
    done = Deal(toy.lm, toy.reward, agent="segment", k=9, beams=1, lookahead=2).generate([toy.prompt], toy.sampling)
    told = done.telemetry[0]["objective"]
    assert first[tuple(done.tokens[0][:2])] == told[0] == pytest.approx(best)
    then = {p: swinging(text_of(p)) for p in grow(tuple(done.tokens[0][:2]))}
    assert told[1] == pytest.approx(max(then.values())) and then[tuple(done.tokens[0])] == told[1]
    all_kept = Deal(toy.lm, toy.reward, agent="segment", k=9, beams=99, lookahead=2)
    scores = {tuple(a): swinging(text_of(a)) for a in toy.answers}
    (answer,) = all_kept.generate([toy.prompt], toy.sampling).tokens
    assert scores[tuple(answer)] == max(scores.values())


# 2: limits


def test_without_weight_it_is_greedy_decoding_and_beam_search_as_transformers_do_them(lm: LM) -> None:
    """Tokens equal `generate(do_sample=False)`; the log-probability equals `num_beams` at length_penalty 0 to 1e-4."""
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8}
    for prompt in PROMPTS:
        ids = torch.tensor(lm.encode([prompt]))
        theirs = lm.model.generate(ids, **options)[0, ids.shape[1] :].tolist()
        for given in ({"weight": 0.0}, {"k": 1}, {"k": 1, "beams": 1, "weight": 5.0}):
            assert Deal(lm, distinct, **given).generate([prompt], GREEDY).tokens == [theirs]
        for beams in (2, 4):
            beam = lm.model.generate(
                ids, num_beams=beams, length_penalty=0.0, early_stopping="never", return_dict_in_generate=True,
                output_scores=True, **options,
            )  # fmt: skip
            done = Deal(lm, distinct, weight=0, beams=beams, k=0).generate([prompt], GREEDY)
            assert sum(done.telemetry[0]["log_p"]) == pytest.approx(float(beam.sequences_scores[0]), abs=1e-4)
            assert done.tokens[0] == [t for t in beam.sequences[0, ids.shape[1] :].tolist() if t]
            assert done.cost.reward_calls == 0


def test_beam_search_ends_as_transformers_do(toy: Toy) -> None:
    """The toy's answers end early, so ended and open prefixes compete; over models, still the same log-probability."""
    for seed in range(8):
        lm = Toy(vocab=4, horizon=4, seed=seed, spread=0.5).lm
        ids = torch.tensor(lm.encode(["1 2"]))
        for beams in (2, 3):
            beam = lm.model.generate(
                ids, num_beams=beams, length_penalty=0.0, early_stopping="never", do_sample=False, max_new_tokens=4,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            done = Deal(lm, "length:target=3", weight=0, beams=beams, k=0).generate(["1 2"], toy.sampling)
            assert sum(done.telemetry[0]["log_p"]) == pytest.approx(float(beam.sequences_scores[0]), abs=1e-4)


def test_without_a_look_ahead_it_is_args(lm: LM) -> None:
    with pytest.warns(UserWarning, match=r"deal without a look ahead \(lookahead=0\) is args"):
        deal = Deal(lm, distinct, k=4, lookahead=0)
    done, args = deal.generate(PROMPTS, GREEDY), Args(lm, distinct, k=4).generate(PROMPTS, GREEDY)
    assert done.tokens == args.tokens != Deal(lm, distinct, k=4).generate(PROMPTS, GREEDY).tokens
    assert done.kl == args.kl


# 3: log P


@pytest.mark.parametrize("options", [{}, {"beams": 3}, {"agent": "segment", "beams": 2, "lookahead": 3}])
def test_log_p_is_that_of_the_committed_tokens(lm: LM, options: Any) -> None:
    done = Deal(lm, distinct, k=4, **options).generate(PROMPTS, GREEDY)
    for row, exact in enumerate(lm.score(PROMPTS, done.tokens)):
        assert done.telemetry[row]["log_p"] == pytest.approx(exact.tolist(), abs=1e-4)
        assert done.kl is not None and done.kl[row] == pytest.approx((-exact).tolist(), abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"beams": 3}])
def test_the_last_objective_is_the_reward_of_the_answer(lm: LM, options: Any) -> None:
    done = Deal(lm, distinct, k=4, **options).generate(PROMPTS, GREEDY)
    last = [told["objective"][-1] for told in done.telemetry]
    assert last == pytest.approx(distinct(PROMPTS, done.texts))


def test_batches_are_singles(lm: LM) -> None:
    for options in ({}, {"beams": 3}, {"agent": "segment", "beams": 2, "lookahead": 3}):
        policy = Deal(lm, distinct, k=4, **options)
        done = policy.generate(PROMPTS, GREEDY.but(samples=2))
        assert done.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
        for row, prompt in enumerate(PROMPTS):
            alone = policy.generate([prompt], GREEDY)
            assert done.tokens[2 * row] == done.tokens[2 * row + 1] == alone.tokens[0]
            assert done.texts[2 * row] == alone.texts[0] and done.finish_reasons[2 * row] == alone.finish_reasons[0]


# 4: switches that change the cost alone


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"sure": 0.2}, {"lookahead": 2}, {"beams": 3}])
def test_taking_roll_outs_over_changes_nothing_but_the_cost(lm: LM, options: Any) -> None:
    on, off = (
        Deal(lm, distinct, **{"k": 4, "lookahead": 8, "reuse": reuse, **options}).generate(PROMPTS, GREEDY)
        for reuse in (True, False)
    )
    assert on.tokens == off.tokens
    for a, b in zip(on.telemetry, off.telemetry, strict=True):
        assert a["log_p"] == pytest.approx(b["log_p"], abs=1e-4)
        assert [-1 if h is None else h for h in a["objective"]] == pytest.approx(
            [-1 if h is None else h for h in b["objective"]], abs=1e-4
        )
    assert on.cost.tokens_forwarded < off.cost.tokens_forwarded
    assert on.cost.reward_calls < off.cost.reward_calls


def test_roll_outs_are_forgotten_where_a_row_is_rewound(lm: LM) -> None:
    session = Deal(lm, distinct, k=4, lookahead=8).open(PROMPTS, GREEDY, Cost())
    first = session.logits
    session.append(first.argmax(-1))
    assert all(len(paths) <= 1 for paths in session.paths)
    session.rewind(session.lengths - 1)
    assert session.paths == [{}, {}, {}] and torch.equal(session.logits, first)
    other = session.fork([2, 0])
    assert other.paths == [session.paths[2], session.paths[0]]
    session.append([[9, 10], [], [11]])
    session.drop([0])
    assert len(session.paths) == 2
    again = Deal(lm, distinct, k=4, lookahead=8).open([PROMPTS[1]], GREEDY, Cost())
    assert torch.equal(session.logits[session.asked.index(PROMPTS[1])], again.logits[0])


def test_the_reward_s_cache_changes_nothing() -> None:
    base = LM.load("pocket/base")
    prompts, sampling = ["Q: Where does Anna live?\nA:"], Sampling(max_new_tokens=12)
    on, off = (Deal(base, PocketReward(), k=3, cache=cache).generate(prompts, sampling) for cache in (True, False))
    assert on.tokens == off.tokens
    assert on.telemetry[0]["objective"] == pytest.approx(off.telemetry[0]["objective"], abs=1e-4)
    assert on.cost.tokens["pocket/reward"] < off.cost.tokens["pocket/reward"]


def test_looks_are_skipped_where_the_model_is_sure_and_between(lm: LM) -> None:
    always, never = Deal(lm, distinct, k=4, sure=1.0), Deal(lm, distinct, k=4, sure=0.0)
    plain = Deal(lm, distinct, k=4).generate(PROMPTS, GREEDY)
    assert always.generate(PROMPTS, GREEDY).tokens == plain.tokens
    skipped = never.generate(PROMPTS, GREEDY)
    assert skipped.tokens == lm.generate(PROMPTS, GREEDY).tokens and skipped.cost.reward_calls == 0
    second = Deal(lm, distinct, k=4, every=2).generate(PROMPTS, GREEDY)
    for told in second.telemetry:
        assert [h is None for h in told["objective"]] == [step % 2 == 1 for step in range(len(told["objective"]))]


# 5: objectives


def test_objectives_are_linear(toy: Toy) -> None:
    def answers(reward: Any, weight: float) -> list[Any]:
        done = Deal(toy.lm, reward, k=0, weight=weight).generate([toy.prompt], toy.sampling)
        return [done.tokens, choices(Deal(toy.lm, reward, k=0, weight=weight), toy).tolist()]

    a, b = toy.reward, Function(lambda _, texts: [float(text.count("1")) for text in texts], name="ones")
    assert answers(WeightedSum([(0.7, a), (0.0, b)]), 1.0) == answers(WeightedSum([(0.7, a)]), 1.0)
    assert answers(WeightedSum([(0.7, a), (0.3, b)]), 1.0) == answers(WeightedSum([(0.3, b), (0.7, a)]), 1.0)
    assert answers(WeightedSum([(1.4, a)]), 0.5) == answers(WeightedSum([(0.7, a)]), 1.0)
    assert answers(WeightedSum([(0.7, a), (3.0, b)]), 1.0) != answers(WeightedSum([(0.7, a)]), 1.0)


# 6: constraints


def test_constraints_on_texts_judged_by_hand() -> None:
    def score(reward: Any, *texts: str) -> list[float | None]:
        scores: list[float | None] = reward.score(["p"] * len(texts), texts)
        return scores

    text = "The Cat sat, on a mat; not in a category."
    assert score(Keyword(words=("cat", "mat", "dog"), mode="share"), text, "category", "cat.") == [2 / 3, 0, 1 / 3]
    assert score(Keyword(words=("cat", "mat"), mode="all"), text, "category mat") == [1, 0]
    assert score(Keyword(words=("cat", "mat"), mode="share", ignore_case=False), text) == [0.5]
    assert score(Length(target=3, side="over"), "a", "a b c", "a b c, d - e f") == [0, 0, -4 / 3]
    assert score(Length(target=3, side="over", hard=True), "a b", "a b c d") == [1, 0]
    assert score(Length(target=3, hard=True, tolerance=1), "a b", "a b c d", "a") == [1, 1, 0]
    assert score(parse_reward("2*keyword:words=cat|mat,mode=share+1*length:target=3,side=over"), "a cat") == [1.0]
    assert score(Regex(pattern=r"\{.*\}", mode="all"), '{"a": 1}', "{") == [1, 0]


def test_a_floor_cuts_candidates_away_while_one_meets_it() -> None:
    config = DealConfig(floor=1.0)
    h = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.5, -3.0]])
    assert shaped(h, config).tolist() == [[-torch.inf, 1.0, 2.0], [0.0, 0.5, -3.0]]
    scored = shaped(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), DealConfig(normalize="candidates"))
    assert scored.tolist() == [[-1.0, 1.0], [0.0, 0.0]]


def test_a_floor_outranks_likelihood(toy: Toy) -> None:
    """Answers that hold a 1: with a floor every search ends in one, at no weight to speak of."""
    has = Function(lambda _, texts: [float("1" in text) for text in texts], name="has 1")
    assert "1" not in toy.lm.generate([toy.prompt], toy.sampling.but(temperature=0)).texts[0]
    for options in ({}, {"beams": 2}):
        soft = Deal(toy.lm, has, k=0, weight=1e-3, **options).generate([toy.prompt], toy.sampling)
        hard = Deal(toy.lm, has, k=0, weight=1e-3, floor=1.0, **options).generate([toy.prompt], toy.sampling)
        assert "1" not in soft.texts[0] and "1" in hard.texts[0] and hard.telemetry[0]["met"]
    never = Function(lambda _, texts: [0.0 for _ in texts], name="never")
    with pytest.warns(UserWarning, match="1 of 1 answers do not reach floor=1"):
        done = Deal(toy.lm, never, k=0, floor=1.0).generate([toy.prompt], toy.sampling)
    assert done.tokens == toy.lm.generate([toy.prompt], toy.sampling.but(temperature=0)).tokens  # nothing was cut
    assert done.telemetry[0]["met"] is False


# 7: the end token


def test_the_end_token_has_nothing_to_look_ahead_to(toy: Toy) -> None:
    session = Deal(toy.lm, toy.reward, k=0).open([toy.prompt], toy.sampling, Cost()).fork([0] * len(toy.prefixes))
    session.append([list(prefix) for prefix in toy.prefixes])
    found = session.ahead(range(session.rows), torch.tensor([[EOS]] * session.rows))
    assert found[:, 0].tolist() == pytest.approx([swinging(prefix) for prefix in toy.prefixes])
    assert all(paths[EOS].tokens == [EOS] for paths in session.paths)


def test_what_cannot_be_judged_is_never_preferred(toy: Toy) -> None:
    def mute(_: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
        return [None if text[:1] == "2" else float(len(text)) for text in texts]

    for options in ({"k": 3}, {"k": 3, "beams": 2}, {"k": 9, "agent": "segment", "lookahead": 2}):
        done = Deal(toy.lm, mute, weight=50.0, **options).generate([toy.prompt], toy.sampling)
        assert done.texts[0][:1] == "1"


# nesting, stopping


def test_it_nests(toy: Toy) -> None:
    push = 0.8 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    steered = Steered(toy.lm, FunctionControl(lambda hidden: hidden + push))
    edited = Toy(swinging, vocab=3, horizon=4)
    edited.base = toy.logprobs(toy.states + push)
    best = []
    for row, logprobs in enumerate(edited.base):
        score = {z: float(logprobs[z]) + WEIGHT * swinging(looked_ahead(edited, row, z, 9)) for z in range(3)}
        best.append(max(score, key=score.__getitem__))
    assert choices(Deal(steered, toy.reward, k=0, weight=WEIGHT), toy).tolist() == best
    outer = BestOfN(Deal(toy.lm, toy.reward, k=0), toy.reward, 2).generate([toy.prompt], toy.sampling)
    assert outer.tokens == Deal(toy.lm, toy.reward, k=0).generate([toy.prompt], toy.sampling).tokens
    over = Deal(Args(toy.lm, toy.reward, k=2), toy.reward, k=3).generate([toy.prompt], toy.sampling)
    assert over.tokens == Args(toy.lm, toy.reward, k=2).generate([toy.prompt], toy.sampling).tokens  # one candidate


@pytest.mark.parametrize("options", [{}, {"beams": 3}, {"agent": "segment", "beams": 2, "lookahead": 3}])
def test_it_stops(lm: LM, options: Any) -> None:
    policy = Deal(lm, distinct, k=4, **options)
    (plain,) = policy.generate(PROMPTS[:1], GREEDY).texts
    word = plain.split()[2]
    (done,) = policy.generate(PROMPTS[:1], GREEDY.but(stop=(word,))).texts
    assert word not in done
    assert policy.generate(PROMPTS[:1], GREEDY.but(max_new_tokens=0)).tokens == [[]]
    long = " ".join(["ba"] * (CONTEXT - 2))
    near = policy.generate([long], GREEDY)
    assert len(near.tokens[0]) <= 2
    full = policy.generate([long + " ba ba"], GREEDY)
    assert full.tokens == [[]] and full.finish_reasons == ["length"]


# bad input


def test_bad_input_is_refused(lm: LM, toy: Toy) -> None:
    for options, message in (
        ({"k": -1}, "k must be 1 or more"),
        ({"weight": float("inf")}, "weight must be a finite number"),
        ({"lookahead": -1}, "lookahead >= 0"),
        ({"beams": 0}, "beams >= 1"),
        ({"sure": 1.5}, "sure must be a probability"),
        ({"beams": 2, "every": 2}, "need beams=1"),
        ({"agent": "segment", "lookahead": 0}, "agent=segment needs lookahead >= 1"),
    ):
        with pytest.raises(UsageError, match=message):
            DealConfig(**options)
    for scores, message in (
        ([1.0], "'broken' gave 1 values for"),
        ([float("nan")] * 3, "'broken' gave nan"),
        ([1e7] * 3, "'broken' gave a score of 1e\\+07; deal takes up to 1e\\+06"),
    ):
        broken = Function(lambda _, texts, scores=scores: scores, name="broken")  # type: ignore[misc]
        with pytest.raises(UsageError, match=message):
            Deal(toy.lm, broken, k=3).generate([toy.prompt], toy.sampling)
    with pytest.raises(UsageError, match="chooses token by token and best-of-2 gives whole answers only"):
        Deal(BestOfN(lm, distinct, 2), distinct)


def test_what_will_not_work_well_is_warned_about(toy: Toy) -> None:
    with pytest.warns(UserWarning, match="has no tokens for the keyword 'cat'"):
        Deal(toy.lm, "2*keyword:words=2|cat+1*length:target=3")
    with pytest.warns(UserWarning, match="k=9 is cut to the 3 tokens there are"):
        Deal(toy.lm, toy.reward, k=9)
    toy.reward.on_prefixes = False
    try:
        with pytest.warns(UnfinishedText, match="deal asks toy about unfinished answers"):
            Deal(toy.lm, toy.reward, k=3, lookahead=1).generate([toy.prompt], toy.sampling)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Deal(toy.lm, toy.reward, k=3, lookahead=99).generate([toy.prompt], toy.sampling)  # clipped to what is left
    finally:
        toy.reward.on_prefixes = True
