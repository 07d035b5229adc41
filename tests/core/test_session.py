"""`Session`: whatever is appended, forked, dropped or rewound, the next token's logits are those of a fresh prefill."""

from __future__ import annotations

import pytest
import torch

from recompute import random_rows, recompute
from tiny import tiny_lm, tiny_model, tiny_tokenizer
from trimtab import LM
from trimtab.errors import UsageError
from trimtab.session import Session

# float32, two layers: another order of summation moves hidden states of size 1 by a few 1e-7.
LOGITS, HIDDEN = 1e-4, 1e-5


def check(session: Session, expected: list[list[int]]) -> None:
    """The session holds exactly `expected`, and equals recomputation at every position."""
    assert session.tokens == expected
    assert session.lengths.tolist() == [len(row) for row in expected]
    assert session.rows == len(expected)
    logits, hidden = session.logits, session.hidden
    for row, (own_logits, own_hidden) in enumerate(recompute(session.lm, expected)):
        torch.testing.assert_close(logits[row], own_logits[-1], atol=LOGITS, rtol=0)
        torch.testing.assert_close(hidden[row], own_hidden[-1], atol=HIDDEN, rtol=HIDDEN)
        torch.testing.assert_close(session.states(row), own_hidden, atol=HIDDEN, rtol=HIDDEN)


def rows_of(seed: int, count: int = 4, low: int = 1, high: int = 9) -> list[list[int]]:
    return random_rows(torch.Generator().manual_seed(seed), count, low, high)


def test_ragged_prefill(lm: LM) -> None:
    check(lm.session(rows_of(0)), rows_of(0))


def test_append_one_token_a_row(lm: LM) -> None:
    rows = rows_of(1)
    session = lm.session(rows)
    for token in range(10, 20):  # further than the sliding windows
        session.append(torch.tensor([token, token + 1, token + 2, token + 3]))
        rows = [[*row, token + k] for k, row in enumerate(rows)]
    check(session, rows)


def test_ragged_append(lm: LM) -> None:
    rows, more, last = rows_of(2), [[9, 8, 7], [], [6], [5, 4, 20, 21, 22]], [[30], [31], [], [32, 33]]
    session = lm.session(rows)
    session.append(more)
    check(session, [a + b for a, b in zip(rows, more, strict=True)])
    session.append(last)
    check(session, [a + b + c for a, b, c in zip(rows, more, last, strict=True)])


def test_uniform_rewind_then_append(lm: LM) -> None:
    rows = rows_of(3, low=5, high=12)
    session = lm.session(rows)
    session.rewind(session.lengths - 3)
    check(session, [row[:-3] for row in rows])
    session.append(torch.tensor([10, 11, 12, 13]))
    check(session, [[*row[:-3], 10 + k] for k, row in enumerate(rows)])


def test_ragged_rewind_then_append(lm: LM) -> None:
    rows = rows_of(4, low=8, high=12)
    session = lm.session(rows)
    cuts = [1, 7, 4, len(rows[3])]
    session.rewind(cuts)
    rows = [row[:cut] for row, cut in zip(rows, cuts, strict=True)]
    check(session, rows)
    session.append(torch.tensor([10, 11, 12, 13]))
    session.append([[40, 41], [], [42], [43, 44, 45]])
    more = [[10, 40, 41], [11], [12, 42], [13, 43, 44, 45]]
    check(session, [a + b for a, b in zip(rows, more, strict=True)])


def test_drop_then_append(lm: LM) -> None:
    rows = rows_of(5, count=6)
    session = lm.session(rows)
    order = session.drop([0, 3])
    assert sorted(order) == [1, 2, 4, 5]
    rows = [rows[old] for old in order]
    check(session, rows)
    session.append(torch.tensor([10, 11, 12, 13]))
    check(session, [[*row, 10 + k] for k, row in enumerate(rows)])


def test_fork_shares_the_prefix_and_nothing_else(lm: LM) -> None:
    rows = rows_of(6, count=2, low=4)
    session = lm.session(rows)
    forwarded = session.tokens_forwarded
    left, right = session.fork([0, 0, 1]), session.fork([1, 0])
    left.append(torch.tensor([10, 11, 12]))
    right.rewind([2, 3])
    right.append([[20, 21], [22]])
    session.append(torch.tensor([30, 31]))
    left.append(torch.tensor([13, 14, 15]))
    check(left, [[*rows[0], 10, 13], [*rows[0], 11, 14], [*rows[1], 12, 15]])
    check(right, [[*rows[1][:2], 20, 21], [*rows[0][:3], 22]])
    check(session, [[*rows[0], 30], [*rows[1], 31]])
    assert (left.tokens_forwarded, right.tokens_forwarded) == (6, 3)
    assert session.tokens_forwarded == forwarded + 2


def test_fork_of_a_dropped_session_after_growth(lm: LM) -> None:
    """Buffers have more rows and columns than are live: a fork must copy only what is."""
    rows = rows_of(7, count=3)
    session = lm.session(rows)
    session.append(torch.tensor([10, 11, 12]))
    order = session.drop([1])
    rows = [[*row, 10 + k] for k, row in enumerate(rows)]
    fork = session.fork([1, 1])
    fork.append(torch.tensor([20, 21]))
    check(fork, [[*rows[order[1]], 20], [*rows[order[1]], 21]])
    check(session, [rows[old] for old in order])


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral"])
def test_fifty_random_sequences_of_operations(arch: str, lm_of: pytest.FixtureRequest) -> None:
    lm = lm_of(arch)  # type: ignore[operator]
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)

        def pick(low: int, high: int, generator: torch.Generator = generator) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=generator))

        rows = random_rows(generator, pick(1, 4))
        session, forwarded = lm.session(rows), sum(map(len, rows))
        others: list[tuple[Session, list[list[int]]]] = []
        for _ in range(pick(3, 8)):
            match pick(0, 5):
                case 0:
                    new = random_rows(generator, len(rows), 1, 1)
                    session.append(torch.tensor(new)[:, 0])
                    rows = [a + b for a, b in zip(rows, new, strict=True)]
                    forwarded += len(rows)
                case 1:
                    new = random_rows(generator, len(rows), 0, 4)
                    session.append(new)
                    rows = [a + b for a, b in zip(rows, new, strict=True)]
                    forwarded += sum(map(len, new))
                case 2:
                    cut = pick(0, min(map(len, rows)) - 1)
                    session.rewind(session.lengths - cut)
                    rows = [row[: len(row) - cut] for row in rows]
                case 3:
                    lengths = [pick(1, len(row)) for row in rows]
                    session.rewind(torch.tensor(lengths))
                    rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
                case 4 if len(rows) > 1:
                    gone = {pick(0, len(rows) - 1) for _ in range(pick(1, len(rows) - 1))}
                    order = session.drop(sorted(gone))
                    assert sorted(order) == [row for row in range(len(rows)) if row not in gone]
                    rows = [rows[old] for old in order]
                case _:
                    chosen = [pick(0, len(rows) - 1) for _ in range(pick(1, 5))]
                    assert session.tokens_forwarded == forwarded
                    others.append((session, rows))
                    session, rows, forwarded = session.fork(chosen), [rows[row] for row in chosen], 0
        assert session.tokens_forwarded == forwarded
        for each, expected in [*others[-2:], (session, rows)]:
            check(each, expected)


def test_growing_past_the_head_room_of_the_buffers() -> None:
    lm = tiny_lm("llama", max_position_embeddings=400)
    rows = [[5, 6, 7], [8]]
    session = lm.session(rows)
    for step in range(150):
        session.append(torch.tensor([4 + step % 50, 5 + step % 50]))
    rows = [[*row, *(4 + k + step % 50 for step in range(150))] for k, row in enumerate(rows)]
    check(session, rows)


def test_input_ids_are_right_aligned_and_padded_with_a_token_of_the_row(llama: LM) -> None:
    assert llama.session([[5, 6, 7], [8]]).input_ids.tolist() == [[5, 6, 7], [8, 8, 8]]


def test_dropping_every_row(llama: LM) -> None:
    session = llama.session([[5, 6], [7]])
    assert session.drop([0, 1]) == []
    assert session.rows == 0


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.append(torch.tensor([5])),
        lambda s: s.append([[5]]),
        lambda s: s.fork([2]),
        lambda s: s.fork([-1]),
        lambda s: s.fork([]),
        lambda s: s.rewind([1]),
        lambda s: s.rewind([0, 1]),
        lambda s: s.rewind([9, 1]),
        lambda s: s.append([[5] * 62, [5]]),
        lambda s: s.drop([2]),
    ],
    ids=["rows", "lists", "fork", "fork-1", "fork0", "rewind", "rewind0", "rewind9", "context", "drop"],
)
def test_misuse_is_refused_and_leaves_the_session_as_it_was(llama: LM, use: object) -> None:
    rows = [[5, 6, 7], [8]]
    session = llama.session(rows)
    with pytest.raises(UsageError):
        use(session)  # type: ignore[operator]
    check(session, rows)
    assert session.tokens_forwarded == 4


@pytest.mark.parametrize("prompts", [[], [[]], [[5], []]])
def test_prompts_without_tokens_are_refused(llama: LM, prompts: list[list[int]]) -> None:
    with pytest.raises(UsageError):
        llama.session(prompts)


def test_recurrent_models_are_refused_by_name() -> None:
    import transformers as tf

    mamba = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=59, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UsageError, match="MambaForCausalLM.*recurrent"):
        LM(mamba, tiny_tokenizer()).session([[5]])
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    gemma = tf.RecurrentGemmaConfig(vocab_size=59, num_hidden_layers=3, lru_width=16, head_dim=8, **sizes)
    with pytest.raises(UsageError, match="RecurrentGemmaForCausalLM.*recurrent"):
        LM(tf.RecurrentGemmaForCausalLM(gemma), tiny_tokenizer()).session([[5]])


def test_encoder_decoders_are_refused_by_name() -> None:
    import transformers as tf

    config = tf.T5Config(
        vocab_size=59, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(UsageError, match="T5ForConditionalGeneration is an encoder-decoder"):
        LM(tf.T5ForConditionalGeneration(config), tiny_tokenizer()).session([[5]])


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UsageError, match="LlamaModel has no output embedding"):
        LM(tiny_model().model, tiny_tokenizer())
