"""Pooled hidden states: equal to transformers' own on every architecture, whatever the batch; read once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tiny import ARCHITECTURES, tiny_lm, tiny_tokenizer
from trimtab.control import FunctionControl
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.measure.cache import Cache
from trimtab.measure.states import char_spans, read_states, text_rows
from trimtab.policy import Cost

TEXTS = ["ba da fa", "ma", "pe ra sa ta be de fe ge le me ne"]
# float32 rounding of sums over at most 11 tokens in two orders, on states of size one to ten
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_layer_is_the_models_own(arch: str) -> None:
    lm = tiny_lm(arch)
    rows = text_rows(lm, TEXTS)
    states = read_states(lm, rows)
    for number, row in enumerate(rows):
        with torch.no_grad():
            own = lm.model(torch.tensor([row]), output_hidden_states=True).hidden_states
        assert states.layers == len(own)
        weights = torch.arange(1.0, len(row) + 1) / sum(range(1, len(row) + 1))
        for layer in range(states.layers - 1):  # transformers' last entry is after the final norm
            hidden = own[layer][0].float()
            expected = {"first": hidden[0], "last": hidden[-1], "mean": hidden.mean(0), "weighted": weights @ hidden}
            for name, value in expected.items():
                assert np.abs(states.pooled(name, layer)[number] - value.numpy()).max() < TOLERANCE  # type: ignore[arg-type]
            assert states.norms()[number, layer] == pytest.approx(float(hidden.norm(dim=-1).mean()), rel=1e-5)
        if arch != "opt":  # which projects after its last block
            assert np.abs(states.final("mean")[number] - own[-1][0].float().mean(0).numpy()).max() < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_alone_or_beside_a_longer_one(side: str) -> None:
    lm = tiny_lm(tokenizer=tiny_tokenizer(side=side))
    rows = text_rows(lm, TEXTS)
    together = read_states(lm, rows)
    for number, row in enumerate(rows):
        alone = read_states(lm, [row])
        for layer in range(together.layers):
            for name in ("first", "last", "mean", "weighted"):
                difference = together.pooled(name, layer)[number] - alone.pooled(name, layer)[0]  # type: ignore[arg-type]
                assert np.abs(difference).max() < TOLERANCE


def test_spans(lm: LM) -> None:
    rows = text_rows(lm, TEXTS)
    spans = char_spans(lm, TEXTS, [(3, 8), (0, 2), (6, 8)])  # "da fa", "ma", "sa"
    assert spans == [(1, 3), (0, 1), (2, 3)]
    states = read_states(lm, rows, spans)
    with torch.no_grad():
        own = lm.model(torch.tensor([rows[0]]), output_hidden_states=True).hidden_states[1][0]
    assert np.abs(states.pooled("mean", 1)[0] - own[1:3].mean(0).numpy()).max() < TOLERANCE
    assert np.abs(states.pooled("weighted", 1)[0] - ((own[1] + 2 * own[2]) / 3).numpy()).max() < TOLERANCE
    assert states.counts.tolist() == [2, 1, 1] and states.lengths.tolist() == [3, 1, 11]
    with pytest.raises(UsageError, match="no token lies in characters 99 to 100"):
        char_spans(lm, TEXTS[:1], [(99, 100)])


def test_one_pass_serves_all_and_a_second_none(lm: LM, tmp_path: Path) -> None:
    rows, cache, meter = text_rows(lm, TEXTS), Cache(tmp_path), Cost()
    first = read_states(lm, rows, cache=cache, meter=meter)
    assert meter.tokens == {"tiny": sum(map(len, rows))}
    again = read_states(lm, rows, cache=cache, meter=meter)
    assert meter.tokens == {"tiny": sum(map(len, rows))}  # nothing was forwarded
    assert np.array_equal(first.pooled("mean", 1), again.pooled("mean", 1))


def test_another_model_or_text_is_another_entry(lm: LM, tmp_path: Path) -> None:
    cache, rows = Cache(tmp_path), text_rows(lm, TEXTS)
    one = read_states(lm, rows, cache=cache)
    other = read_states(tiny_lm(seed=1), rows, cache=cache)
    assert not np.array_equal(one.pooled("mean", 1), other.pooled("mean", 1))
    assert len(read_states(lm, rows[:2], cache=cache)) == 2


def test_a_control_is_read_through_and_not_kept(lm: LM, tmp_path: Path) -> None:
    """A final edit changes what the head sees, not the states; one inside the blocks changes them. Neither is cached."""
    cache, rows = Cache(tmp_path), text_rows(lm, TEXTS)
    plain = read_states(lm, rows)
    edited = read_states(lm, rows, control=FunctionControl(lambda hidden: hidden + 1), cache=cache)
    assert np.array_equal(plain.final("mean"), edited.final("mean")) and not (tmp_path / "states").exists()


def test_bad_input(lm: LM) -> None:
    with pytest.raises(UsageError, match="text 2 is empty"):
        text_rows(lm, ["ba", " "])
    with pytest.raises(UsageError, match="no chat template"):
        text_rows(lm, ["ba"], chat=True)
    with pytest.raises(UsageError, match="has 65 tokens; tiny has a context of 64"):
        read_states(lm, [[5] * 65])
    with pytest.raises(UsageError, match="no tokens 1 to 1"):
        read_states(lm, [[5, 6]], [(1, 1)])
    with pytest.raises(UsageError, match="layer 3 does not exist"):
        read_states(lm, [[5]]).pooled("mean", 3)


def test_states_that_are_no_numbers_are_refused() -> None:
    lm = tiny_lm(seed=3)
    with torch.no_grad():
        lm.model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(UsageError, match="not numbers.*bfloat16 or float32"):
        read_states(lm, [[5, 6]])
