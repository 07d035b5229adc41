"""Roll-outs: the tokens of the model itself, at the cost of their own tokens, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from oracles.toy import Toy
from tiny import CONTEXT, EOS, tiny_lm
from trimtab import LM, Sampling, Steered
from trimtab.control import FunctionControl
from trimtab.decode.lookahead import judge, looked_up, roll_out, room, state_of, state_uniforms
from trimtab.policy import Cost

PROMPTS = ["ba da fa la", "ma na", "pe"]
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy(vocab=3, horizon=4)


def alone(lm: LM, prompt: str, tokens: list[int], steps: int) -> list[int]:
    """The greedy continuation of prompt + tokens, by a prefill of all of it."""
    text = f"{prompt} {lm.decode(tokens)}"
    assert lm.encode([text]) == [lm.encode([prompt])[0] + tokens]
    return tokens + lm.generate([text], GREEDY.but(max_new_tokens=steps)).tokens[0]


@pytest.mark.parametrize("batch_rows", [None, 2])
def test_greedy_roll_outs_are_the_model_s_own(batch_rows: int | None) -> None:
    lm = tiny_lm(batch_rows=batch_rows)
    session = lm.session(lm.encode(PROMPTS))
    rows, tokens, lengths = [2, 0, 0, 1], [9, 9, 30, 41], [5, 3, 0, 8]
    out = roll_out(session, rows, tokens, lengths)
    assert out == [
        alone(lm, PROMPTS[row], [token], steps) for row, token, steps in zip(rows, tokens, lengths, strict=True)
    ]


def test_the_session_is_left_as_it_is_and_only_new_tokens_are_forwarded(lm: LM) -> None:
    meter = Cost()
    session = lm.session(lm.encode(PROMPTS), None, meter)
    before, logits, paid = session.tokens, session.logits, meter.tokens_forwarded
    out = roll_out(session, [0, 1, 2], [9, 30, EOS], [5, 2, 5])
    assert session.tokens == before and torch.equal(session.logits, logits)
    assert out[2] == [EOS]
    assert meter.tokens_forwarded - paid == sum(len(text) - 1 for text in out[:2])  # the last token is never forwarded


def test_a_roll_out_of_a_steered_session_is_steered(lm: LM) -> None:
    push = 3 * torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(0))
    steered = Steered(lm, FunctionControl(lambda hidden: hidden + push))
    session = steered.open(PROMPTS[:1], GREEDY, Cost())
    (out,) = roll_out(session, [0], [9], [6])
    again = steered.generate([PROMPTS[0] + " " + lm.decode([9])], GREEDY.but(max_new_tokens=6))
    assert out == [9, *again.tokens[0]]
    assert out != alone(lm, PROMPTS[0], [9], 6)


def test_it_stops_at_end_tokens_stop_strings_and_a_full_context(lm: LM) -> None:
    session = lm.session(lm.encode(PROMPTS[:1]))
    (plain,) = roll_out(session, [0], [9], [8])
    word = lm.decode(plain[2:3])
    (short,) = roll_out(session, [0], [9], [8], stop=(word,))
    assert short == plain[: len(short)] and word in lm.decode(short) and word not in lm.decode(short[1:-1])
    assert roll_out(session, [0], [9], [8], ends=[9]) == [[9]]

    session.append([[9] * (CONTEXT - session.lengths[0] - 2)])  # room for 2 more
    assert len(roll_out(session, [0], [9], [8])[0]) == 2
    session.append([[9]])
    paid = session.meter.tokens_forwarded
    assert roll_out(session, [0], [9], [8]) == [[9]] and session.meter.tokens_forwarded == paid


# sampled roll-outs


def sampled(lm: LM, prompts: Sequence[str], seed: int, lengths: int = 6) -> list[list[list[int]]]:
    """Two candidates with three draws each, of every prompt."""
    session = lm.session(lm.encode(prompts))
    uniform = state_uniforms(seed, session.tokens, 3, lengths)[:, None].expand(-1, 2, -1, -1).reshape(-1, lengths)
    rows = [row for row in range(len(prompts)) for _ in range(6)]
    out = roll_out(session, rows, [9, 9, 9, 30, 30, 30] * len(prompts), [lengths] * len(rows), uniform)
    return [out[6 * row : 6 * row + 6] for row in range(len(prompts))]


def test_a_batch_equals_singles_and_the_seed_decides(lm: LM) -> None:
    batch = sampled(lm, PROMPTS, 0)
    assert batch == [sampled(lm, [prompt], 0)[0] for prompt in PROMPTS]
    assert batch == sampled(lm, PROMPTS, 0) != sampled(lm, PROMPTS, 1)
    assert len({tuple(text) for text in batch[0]}) == 6


def test_the_draws_have_the_model_s_distribution(toy: Toy) -> None:
    """The mean reward of roll-outs from (s, z) is Q(s, z): 4,000 draws, 4 standard errors."""
    draws = 4000
    session = toy.lm.session(toy.lm.encode([toy.prompt]))
    uniform = state_uniforms(3, session.tokens, draws, toy.horizon)[0]
    for token in range(toy.vocab):
        out = roll_out(session, [0] * draws, [token] * draws, [toy.horizon - 1] * draws, uniform)
        rewards = torch.tensor([toy.score(tuple(t for t in text if t)) for text in out]).double()
        error = rewards.std() / draws**0.5
        assert abs(rewards.mean() - toy.values()[0][0, token]) <= 4 * error + 1e-9


# small parts


def test_each_distinct_text_is_scored_once() -> None:
    class Scorer:
        asked: list[tuple[int, list[int]]] = []

        def score(self, rows: Sequence[int], continuations: Sequence[list[int]]) -> torch.Tensor:
            self.asked += zip(rows, continuations, strict=True)
            return torch.tensor([10.0 * row + sum(more) for row, more in zip(rows, continuations, strict=True)])

    scorer = Scorer()
    scores = judge(scorer, [0, 1, 0, 0], [[1], [1], [1], [2]])
    assert scores.tolist() == [1, 11, 1, 2]
    assert scorer.asked == [(0, [1]), (1, [1]), (0, [2])]


def test_room_and_trace() -> None:
    assert room([[], [1], [1, 2], [1, 2, 3]], budget=3, lookahead=1) == [1, 1, 0, 0]
    assert room([[]], budget=9, lookahead=0) == [0]
    trace = {state_of("p", []): {5: (1.0,)}, state_of("p", [5, 6]): {7: (2.0,)}}
    assert looked_up(trace, "p", [5, 6, 7]) == [{5: (1.0,)}, {}, {7: (2.0,)}]
