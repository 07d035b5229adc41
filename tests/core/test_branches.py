"""Continuations side by side in a cache: the states are those of rows forwarded alone, and the session is left as it was."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tiny import ARCHITECTURES
from trimtab import LM, branches
from trimtab.branches import keep, look, takes_masks
from trimtab.session import Session

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12]]
MASKED = {"llama", "qwen2", "qwen3", "gemma", "gpt2", "gpt_neox", "opt", "phi", "phi3"}


def alone(lm: LM, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return lm.backbone(torch.tensor([ids])).last_hidden_state[0, -1]


def grown(lm: LM) -> Session:
    """Rows of different lengths, after appends and a ragged rewind."""
    session = lm.session(PROMPTS)
    session.append([[13, 14], [15], [16, 17, 18]])
    session.rewind(session.lengths - torch.tensor([1, 0, 2]))
    return session


@pytest.mark.parametrize("seed", range(3))
def test_states_are_those_of_rows_forwarded_alone(lm: LM, seed: int) -> None:
    """Every architecture; continuations of 0 to 4 tokens, equal ones among them, rows without one."""
    rng, session = random.Random(seed), grown(lm)
    rows = [rng.randrange(3) for _ in range(9)]
    more = [[rng.randrange(4, 59) for _ in range(rng.randrange(5))] for _ in rows]
    more[1], rows[1] = list(more[0]), rows[0]
    before, tokens, spent = session.logits.clone(), session.tokens, session.meter.tokens_forwarded
    seen = look(session, rows, more)
    for state, row, continuation in zip(seen.hidden, rows, more, strict=True):
        assert torch.allclose(state, alone(lm, [*tokens[row], *continuation]), atol=1e-4)  # float32
    assert session.meter.tokens_forwarded == spent + sum(map(len, more))
    # nothing happened to the session
    assert session.tokens == tokens and torch.equal(session.logits, before)
    session.append(torch.tensor([20, 21, 22]))
    for row, ids in enumerate(tokens):
        assert torch.allclose(session.hidden[row], alone(lm, [*ids, 20 + row]), atol=1e-4)


def test_which_models_take_a_mask_of_ours(lm_of: Any) -> None:
    """All but those with sliding windows (gemma2, gemma3, mistral)."""
    assert {arch for arch in ARCHITECTURES if takes_masks(lm_of(arch).session([[5]]))} == MASKED


def test_what_was_looked_at_is_kept_without_a_forward(lm: LM) -> None:
    """Where masks are taken; elsewhere `keep` does nothing and says so. Rows may be dropped in between, in any order."""
    session = grown(lm)
    rows = [row for row in range(3) for _ in range(4)]
    seen = look(session, rows, [[30 + (i % 4), 7] for i in range(12)])
    order = session.drop([0])
    seen, tokens, spent = seen.reindex(order), session.tokens, session.meter.tokens_forwarded
    assert not keep(session, seen, [30, 40]) and session.tokens == tokens  # 40 was not looked at
    kept = keep(session, seen, [33, 31])
    assert kept == takes_masks(session)
    if not kept:
        assert session.tokens == tokens
        return
    assert session.meter.tokens_forwarded == spent
    assert session.tokens == [[*tokens[0], 33], [*tokens[1], 31]]
    for more in ([], [34], [35]):  # now, and through the cache that was kept
        if more:
            session.append(torch.tensor(more * 2))
        for state, ids in zip(session.hidden, session.tokens, strict=True):
            assert torch.allclose(state, alone(lm, ids), atol=1e-4)
    assert torch.allclose(session.states(0)[-3], alone(lm, [*tokens[0], 33]), atol=1e-4)


def test_what_was_looked_at_before_something_else_is_not_kept(llama: LM) -> None:
    session = llama.session(PROMPTS)
    seen = look(session, [0, 1, 2], [[30], [31], [32]])
    session.append(torch.tensor([40, 41, 42]))
    assert not keep(session, seen, [30, 31, 32])
    seen = look(session, [0, 1, 2], [[30], [31], [32]])
    fork = session.fork([2, 1, 0])
    assert not keep(fork, seen, [30, 31, 32]) and keep(session, seen, [30, 31, 32])


@pytest.mark.parametrize("case", ["too wide", "one row of many"])
def test_forks_where_columns_would_be_wasted(llama: LM, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same states; nothing to keep."""
    if case == "too wide":
        monkeypatch.setattr(branches, "WIDEST", 5)
        rows, more = [0, 0, 1, 1, 2, 2], [[30, 31, 32]] * 6
    else:
        rows, more = [1, 1, 1], [[30, 31], [32], []]
    session = grown(llama)
    seen = look(session, rows, more)
    assert seen.first == [{}, {}, {}]
    for state, row, continuation in zip(seen.hidden, rows, more, strict=True):
        assert torch.allclose(state, alone(llama, [*session.tokens[row], *continuation]), atol=1e-4)


def test_nothing_to_look_at_is_the_state_itself(llama: LM) -> None:
    session = grown(llama)
    assert torch.equal(look(session, [2, 0], [[], []]).hidden, session.hidden[[2, 0]])
