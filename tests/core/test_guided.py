"""A guided session: everything that is kept beside the rows stays beside them, whatever happens to the rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tiny import tiny_lm
from trimtab import LM, Sampling
from trimtab.guided import Guided, bottom
from trimtab.policy import Cost
from trimtab.rewards import Function
from trimtab.rewards.prefix import prefix_scorer
from trimtab.stepping import answer_steps

PROMPTS = ["ba da fa la", "ma na", "pe"]
PLAIN = Sampling()


class Doubled(Guided):
    """Logits times two; counts how often they were asked for, and marks rows to see them move."""

    def __init__(self, inner: Any, asked: Sequence[Any], **companions: Any):
        super().__init__(inner, asked, **companions)
        self.calls, self.marks = [0], list(range(len(asked)))

    def guide(self, logits: torch.Tensor) -> torch.Tensor:
        self.calls[0] += 1
        return 2 * logits

    def reindex(self, rows: Sequence[int]) -> None:
        self.marks = [self.marks[row] for row in rows]


class DoublePolicy:
    """`Doubled` as a policy that can be stepped."""

    name = "doubled"

    def __init__(self, policy: Any):
        self.policy, self.lm = policy, policy.lm

    def open(self, prompts: Sequence[Any], sampling: Sampling, meter: Cost) -> Doubled:
        return Doubled(self.policy.open(prompts, sampling, meter), prompts)

    def generate(self, prompts: Sequence[Any], sampling: Sampling = PLAIN) -> Any:
        return answer_steps(self, prompts, sampling)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


@pytest.fixture(scope="module")
def other() -> LM:
    return tiny_lm(seed=1, name="other")


class Unchanged(Guided):
    def guide(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


def opened(lm: LM, other: LM) -> Doubled:
    """A guided session over a guided one; beside it a text scorer and another model's session, with longer prompts."""
    reward = Function(lambda prompts, texts: [float(len(text)) for text in texts], name="letters")
    inner = Unchanged(
        lm.session(lm.encode(PROMPTS)), PROMPTS, model=other.session(other.encode(["ta ra", "lo", "du bu so"]))
    )
    return Doubled(inner, PROMPTS, scorer=prefix_scorer(reward, lm, PROMPTS, Cost()))


def check(session: Doubled, other: LM, beside: Sequence[Sequence[int]]) -> None:
    """Every companion holds what the row holds, and the logits are those of a session that had it from the start."""
    answers = session.answers()
    assert session.companions["scorer"].answers == answers
    model = session.inner.companions["model"]
    before = other.encode(["ta ra", "lo", "du bu so"])
    assert model.tokens == [
        [*before[PROMPTS.index(asked)], *row] for asked, row in zip(session.asked, answers, strict=True)
    ]
    assert session.asked == [PROMPTS[mark] for mark in session.marks] == session.inner.asked
    assert answers == [list(row) for row in beside]
    lm = session.lm
    fresh = lm.session([[*ids, *row] for ids, row in zip(lm.encode(session.asked), answers, strict=True)])
    assert torch.allclose(session.logits, 2 * fresh.logits, atol=1e-4)  # float32; logits of size 10
    assert torch.allclose(session.base_logits, fresh.logits, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_companions_stay_in_step(lm: LM, other: LM, seed: int) -> None:
    """40 random appends, forks, drops and rewinds, single tokens and ragged ones, against lists."""
    rng = random.Random(seed)
    session, expected = opened(lm, other), [[] for _ in PROMPTS]
    for _ in range(40):
        action = rng.choice(["append", "append", "ragged", "fork", "drop", "rewind"])
        rows = session.rows
        if action in ("append", "ragged") and max(map(len, expected)) < 40:
            new = [
                [rng.randrange(4, 59) for _ in range(rng.randrange(4) if action == "ragged" else 1)]
                for _ in range(rows)
            ]
            session.append(torch.tensor(new)[:, 0] if action == "append" else new)
            expected = [[*row, *more] for row, more in zip(expected, new, strict=True)]
        elif action == "fork":
            chosen = [rng.randrange(rows) for _ in range(rng.randrange(1, 6))]
            left, session = session, session.fork(chosen)
            left.append(torch.full((rows,), 5))  # what the origin does afterwards does not matter
            expected = [expected[row] for row in chosen]
        elif action == "drop" and rows > 1:
            order = session.drop(rng.sample(range(rows), rng.randrange(1, rows)))
            expected = [expected[row] for row in order]
        elif action == "rewind":
            lengths = [rng.randrange(len(row) + 1) for row in expected]
            session.rewind(session.prompts + torch.tensor(lengths))
            expected = [row[:length] for row, length in zip(expected, lengths, strict=True)]
        if rng.random() < 0.3:
            check(session, other, expected)
    check(session, other, expected)


def test_logits_are_computed_once_a_position(lm: LM, other: LM) -> None:
    session = opened(lm, other)
    first = session.logits
    assert session.logits is first and session.calls == [1]
    fork = session.fork([2, 0, 0])
    assert torch.equal(fork.logits, first[[2, 0, 0]])
    fork.drop([0])
    assert torch.equal(fork.logits, first[[0, 0]]) and session.calls == [1]
    session.append(torch.tensor([5, 6, 7]))
    assert session.logits is not first and session.calls == [2]
    session.rewind(session.lengths - 1)
    assert torch.allclose(session.logits, first, atol=1e-4) and session.calls == [3]


def test_all_rows_can_go(lm: LM, other: LM) -> None:
    session = opened(lm, other)
    assert session.drop([0, 1, 2]) == [] and session.rows == 0 and session.asked == []


def test_the_bottom_is_the_models_own_session(lm: LM, other: LM) -> None:
    session = opened(lm, other)
    assert bottom(session) is session.inner.inner and bottom(session.inner.inner) is session.inner.inner


def test_policies_nest_and_report_the_exact_kl(lm: LM) -> None:
    """Two doublings are the model at a quarter of the temperature, and the KL is from the model itself."""
    sampling = Sampling(max_new_tokens=8, samples=3, seed=4)
    twice = DoublePolicy(DoublePolicy(lm)).generate(PROMPTS, sampling)
    cold = lm.generate(PROMPTS, sampling.but(temperature=0.25))
    assert twice.tokens == cold.tokens
    ours = lm.token_logprobs(twice.prompts, twice.tokens, Sampling(temperature=0.25))
    plain = lm.token_logprobs(twice.prompts, twice.tokens)
    for row, (p, q) in enumerate(zip(ours, plain, strict=True)):
        assert twice.kl[row] == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), abs=1e-4)
        assert twice.logprobs[row] == pytest.approx(cold.logprobs[row], abs=1e-4)
    assert twice.cost.tokens == cold.cost.tokens
