"""Greedy coordinate gradient: its gradient, its minima, its suffixes, and the first blocks it runs on."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tiny import ARCHITECTURES, CHAT, tiny_lm, tiny_tokenizer
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.measure.cache import Cache
from trimtab.measure.states import read_states
from trimtab.measure.suffix_places import allowed_ids, encoded, find_place, random_suffix, survivor, with_suffix
from trimtab.measure.suffix_search import (
    Search,
    Spent,
    SurrogateLoss,
    TargetLoss,
    embed,
    first_blocks,
    losses_of,
    one_hot_gradient,
    search,
)
from trimtab.policy import Cost


def head_of(lm: LM, seed: int = 0) -> torch.Tensor:
    return torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_first_blocks_give_the_states_the_head_is_trained_on(arch: str) -> None:
    """Every architecture and depth equals `read_states` to 1e-5, and stopping early leaves the model as it was."""
    lm, cache = tiny_lm(arch), Cache(None)
    rows = [[4, 9, 7, 22, 5]]
    states = read_states(lm, rows, cache=cache)
    with torch.no_grad():
        before = lm.model(torch.tensor(rows)).logits
        for depth in range(states.layers):
            got = first_blocks(lm, embed(lm, torch.tensor(rows)), depth)[:, -1]
            if arch == "opt" and depth == 0:
                continue  # its embeddings are projected on the way in; the surrogate still starts from them
            assert np.abs(got.numpy() - states.pooled("last", depth)).max() < 1e-5
        assert torch.equal(lm.model(torch.tensor(rows)).logits, before)


@pytest.mark.parametrize("whole", [False, True])
def test_the_one_hot_gradient_equals_central_differences(whole: bool) -> None:
    """float64, steps of 1e-5 in the embedding mix; relative error below 1e-3. GPT-2, whose norms stay in float64."""
    lm = tiny_lm("gpt2", n_layer=3)
    lm.model.double()
    row, span = [4, 9, 7, 22, 5, 6], (2, 4)
    loss: Any = TargetLoss(lm, [8, 12]) if whole else SurrogateLoss(lm, 2, head_of(lm), 0.3)
    if not whole:
        loss.decision = lambda x: first_blocks(lm, x, 2)[:, -1] @ loss.weight.double() + 0.3  # not through float32
    else:
        lm.head.__class__ = type("Exact", (type(lm.head),), {"__call__": lambda self, x: self.layer(x)})
    _, gradient = one_hot_gradient(lm, loss, row, span)
    table, states = embed(lm, torch.arange(59)), embed(lm, torch.tensor([row]))
    generator = np.random.default_rng(0)
    for _ in range(12):
        place, token = int(generator.integers(2)), int(generator.integers(59))
        ends = []
        for sign in (1, -1):
            moved = states.clone()
            moved[0, span[0] + place] += sign * 1e-5 * table[token]
            ends.append(float(loss(moved)[0]))
        slope = (ends[0] - ends[1]) / 2e-5
        assert abs(slope - float(gradient[place, token])) < 1e-3 * max(abs(slope), 1e-3)


def whole_search(lm: LM, seed: int, steps: int = 20, **options: Any) -> tuple[Search, Any]:
    loss = SurrogateLoss(lm, 2, head_of(lm, seed), 0.0)
    allowed = torch.arange(4, 16)
    kept = {"allowed": allowed, "width": 24, "top_k": 12, **options}
    found = search(
        lm,
        loss,
        [5, 9, 30 + seed % 20],
        [4, 4],
        [7],
        steps=steps,
        generator=torch.Generator().manual_seed(seed),
        **kept,
    )
    return found, loss


def test_with_every_swap_in_reach_the_search_ends_in_a_coordinate_wise_minimum() -> None:
    """|V| = 12, m = 2, against all 144 suffixes; 20 instances. Losses never rise; none is below the global minimum. Seen:
    the global one in 17 of 20; a majority is asked for."""
    lm = tiny_lm(num_hidden_layers=2)
    reached = 0
    for seed in range(20):
        found, loss = whole_search(lm, seed)
        assert found.minimum and all(a >= b for a, b in itertools.pairwise(found.losses))
        rows = [[5, 9, 30 + seed % 20, a, b, 7] for a in range(4, 16) for b in range(4, 16)]
        grid = losses_of(lm, loss, rows).reshape(12, 12)
        at = tuple(token - 4 for token in found.suffix)
        assert float(grid[at]) == pytest.approx(found.losses[-1], rel=1e-4)
        assert float(grid[at]) <= float(min(grid[at[0]].min(), grid[:, at[1]].min())) + 1e-6
        assert float(grid[at]) >= float(grid.min()) - 1e-6
        reached += float(grid[at]) <= float(grid.min()) + 1e-6
    assert reached > 10


def test_the_search_counts_what_it_forwards_and_keeps_to_a_budget() -> None:
    lm = tiny_lm(num_hidden_layers=3)
    spent, meter = Spent(), Cost()
    found, _ = whole_search(lm, 0, 3, spent=spent, meter=meter, width=8, top_k=6)
    assert spent.tokens == meter.tokens["tiny"] <= 3 * 6 * 9 and spent.block_tokens == 2 * spent.tokens
    assert len(found.losses) == 4
    small = Spent()
    whole_search(lm, 0, 100, spent=small, budget=2 * 6 * 9, width=8, top_k=6)
    assert 0 < small.tokens <= 2 * 6 * 9
    again, _ = whole_search(lm, 0, 3, width=8, top_k=6)
    assert again.suffix == found.suffix  # the seed decides


# where a suffix goes


@pytest.mark.parametrize("kind", ["word", "byte"])
@pytest.mark.parametrize("chat", [None, CHAT])
def test_every_suffix_found_encodes_to_itself_inside_the_prompt(kind: str, chat: str | None) -> None:
    lm = tiny_lm(tokenizer=tiny_tokenizer(kind, chat=chat))
    tail = "" if chat else " tu"
    allowed = allowed_ids(lm)
    place = find_place(lm, "ba mo tu", 3, tail, allowed)
    check = survivor(lm, place, tail)
    generator = torch.Generator().manual_seed(0)
    loss = SurrogateLoss(lm, 1, head_of(lm), 0.0)
    options: dict[str, Any] = {"allowed": allowed, "steps": 4, "width": 64, "top_k": 64, "generator": generator}
    found = search(lm, loss, place.before, place.start, place.after, survives=check, **options)
    for suffix in (found.suffix, random_suffix(place, allowed, check, generator)):
        assert encoded(lm, "ba mo tu", suffix, tail) == [*place.before, *suffix, *place.after]
        assert len(suffix) == 3 and set(suffix) <= set(allowed.tolist())
    assert found.losses[-1] < found.losses[0]


def test_a_suffix_stands_before_what_asks_for_the_answer() -> None:
    plain = tiny_lm()
    assert with_suffix(plain, "ba be tu", "mo", " tu") == "ba be mo tu"
    with pytest.raises(UsageError, match="must not come after"):
        with_suffix(plain, "ba be tu", "mo", "")
    chat = tiny_lm(tokenizer=tiny_tokenizer(chat=CHAT))
    messages = [{"role": "system", "content": "la"}, {"role": "user", "content": "ba be"}]
    assert with_suffix(chat, messages, "mo", "") == [messages[0], {"role": "user", "content": "ba be mo"}]  # type: ignore[arg-type]
    assert chat.render(with_suffix(chat, "ba", "mo", "")).endswith("user ba mo assistant ")
    special = set(plain.tokenizer.all_special_ids)
    assert not special & set(allowed_ids(plain).tolist())


# bad input


def test_a_tokenizer_that_does_not_round_trip_is_said() -> None:
    with pytest.raises(UsageError, match="retokenise=false"):
        whole_search(tiny_lm(num_hidden_layers=2), 0, survives=lambda suffix: False)


def test_quantised_embeddings_are_refused() -> None:
    lm = tiny_lm()
    layer = lm.model.get_input_embeddings()
    layer.weight = torch.nn.Parameter(torch.zeros(59, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UsageError, match="quantised"):
        embed(lm, torch.tensor([[4]]))
    with pytest.raises(UsageError, match="target=TEXT"):
        TargetLoss(tiny_lm(), [])
