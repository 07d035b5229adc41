"""The directions: planted ones are found, labels give the sign, and bad pairs are dropped, counted or refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tiny import CHAT, WORDS, tiny_lm, tiny_tokenizer
from trimtab.errors import UsageError
from trimtab.steer import SteeringVector
from trimtab.steer.contrast import Pair, as_pair, contrast, direction, find_directions, rank_pairs, unit
from trimtab.steer.layers import edit_output, read_blocks

torch.set_num_threads(1)
METHODS = ["mean_diff", "pca_paired", "pca_shuffled", "logistic"]
PAIRS, WIDTH, GAP = 200, 32, 2.0


def planted(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h = mu s + noise, with unit noise in the differences: states [N, D] of both classes, and mu / |mu|."""
    generator = torch.Generator().manual_seed(seed)
    mu = unit(torch.randn(WIDTH, generator=generator, dtype=torch.float64))
    noise = torch.randn(2, PAIRS, WIDTH, generator=generator, dtype=torch.float64) / 2**0.5
    return noise[0] + GAP / 2 * mu, noise[1] - GAP / 2 * mu, mu


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_direction_is_found(method):
    h, g, mu = planted()
    assert float(direction(h, g, method) @ mu) > 0.95


def test_centring_ordered_differences_loses_it():
    """Why there is no such method: the mean difference is the signal, and centring removes it."""
    h, g, mu = planted()
    d = h - g
    v = torch.linalg.svd(d - d.mean(0), full_matrices=False).Vh[0]
    assert abs(float(v @ mu)) < 0.5


def test_a_planted_direction_is_found_through_a_model():
    """Blocks that add a multiple of one direction for words in 'a': read through the hooks of a real model."""
    lm = tiny_lm(num_hidden_layers=3)
    mu = unit(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)))
    style = torch.tensor(
        [1.0 if token.endswith("a") else 0.0 for token in lm.tokenizer.convert_ids_to_tokens(range(59))]
    )
    seen: list[torch.Tensor] = []
    watch = lm.model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    plant = edit_output(lm.model.model.layers[1], lambda hidden: 10 * style[seen[-1]][..., None] * mu)
    words = torch.randint(0, 11, (30, 5), generator=torch.Generator().manual_seed(2))
    pairs = [tuple(" ".join(WORDS[5 * i + vowel] for i in row) for vowel in (0, 1)) for row in words.tolist()]
    try:
        vector = SteeringVector.from_pairs(lm, pairs)
    finally:
        watch.remove()
        plant.remove()
    assert vector.layers == (1,) and float(vector.directions.direction[1] @ mu) == pytest.approx(1, abs=1e-5)
    assert vector.directions.difference[1] == pytest.approx(10, rel=1e-4)
    assert vector.pair_accuracy[1] == 1.0


@pytest.mark.parametrize("method", METHODS)
def test_swapping_the_texts_negates_and_order_and_repetition_change_nothing(method):
    h, g, _ = planted(3)
    v = direction(h, g, method)
    tolerance = 1e-4 if method == "logistic" else 1e-6  # that one's solver is iterative
    if method == "logistic":
        assert torch.allclose(direction(g, h, method), -v, atol=tolerance)
    else:
        assert torch.equal(direction(g, h, method), -v)
    if method == "pca_shuffled":
        return  # its flips follow the order of the pairs
    order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(direction(h[order], g[order], method), v, atol=tolerance)
    assert torch.allclose(direction(torch.cat([h, h]), torch.cat([g, g]), method), v, atol=tolerance)


def test_random_directions_are_no_better_than_chance_and_have_the_same_size():
    h, g, mu = planted()
    states = h.float()[:, None], g.float()[:, None], torch.ones(1)
    found = [find_directions(*states, "random", seed) for seed in range(20)]
    learnt = find_directions(*states, "mean_diff")
    assert abs(sum(float(one.direction[0].double() @ mu) for one in found) / 20) < 0.15
    assert all(one.difference[0] == pytest.approx(float(learnt.difference[0])) for one in found)
    assert not torch.equal(found[0].direction, found[1].direction)


def test_pair_accuracy_is_held_out():
    """Without a signal in 32 dimensions and 40 pairs, a direction separates its own pairs and not held-out ones."""
    generator = torch.Generator().manual_seed(0)
    h, g = torch.randn(2, 40, 1, WIDTH, generator=generator)
    found = find_directions(h, g, torch.ones(1))
    own = float(((h - g)[:, 0] @ found.direction[0] > 0).float().mean())
    assert own >= 0.75 and float(found.accuracy[0]) < 0.7


def test_rows_are_read_at_the_right_tokens_whatever_their_neighbours():
    lm = tiny_lm(num_hidden_layers=3, batch_rows=2)
    rows = [lm.encode([text])[0] for text in ("ba be bi bo bu", "da de", "fa fe fi")]
    with torch.no_grad():
        whole = [lm.model(torch.tensor([row]), output_hidden_states=True).hidden_states for row in rows]
    last, norms = read_blocks(lm, rows, [0, 0, 0], "last")
    mean, _ = read_blocks(lm, rows, [2, 1, 0], "mean")
    for i, states in enumerate(whole):
        for layer in (0, 1):  # the last entry is after the final norm
            assert torch.allclose(last[i, layer], states[layer + 1][0, -1], atol=1e-5)
            assert torch.allclose(mean[i, layer], states[layer + 1][0, [2, 1, 0][i] :].mean(0), atol=1e-5)
            assert norms[i, layer] == pytest.approx(float(states[layer + 1][0, -1].norm()), rel=1e-5)


# pairs from text and from rewards


def word_pairs(count: int) -> list[tuple[str, str]]:
    return [
        (f"{WORDS[i % 50]} {WORDS[(i * 7 + 3) % 50]} ba", f"{WORDS[i % 50]} {WORDS[(i * 7 + 3) % 50]} bu")
        for i in range(count)
    ]


def test_pairs_and_their_number():
    lm = tiny_lm(num_hidden_layers=3)
    with pytest.raises(UsageError, match="7 usable pairs are too few"):
        SteeringVector.from_pairs(lm, word_pairs(7))
    few = SteeringVector.from_pairs(lm, word_pairs(10))
    assert few.origin.warnings == ["only 10 pairs: 50 or more make a steadier direction"]
    vector = SteeringVector.from_pairs(lm, [*word_pairs(60), ("ba", "ba"), ("be bi", "be bi")])
    assert vector.origin.metrics["pairs"] == 60 and vector.origin.metrics["pairs_dropped"] == 2
    assert vector.origin.warnings == ["2 pairs were dropped: their texts, or all their states, are the same"]
    swapped = SteeringVector.from_pairs(lm, [(b, a) for a, b in word_pairs(60)])
    assert torch.equal(swapped.directions.direction, -vector.directions.direction)


def test_prompts_with_two_answers_are_read_in_the_answer_only():
    lm = tiny_lm(num_hidden_layers=3, tokenizer=tiny_tokenizer(chat=CHAT))
    pairs = [(f"{WORDS[i]} {WORDS[i + 1]}", "ba bi", "bu bo") for i in range(12)]
    vector = SteeringVector.from_pairs(lm, pairs, read="mean", layers=(0,))
    rows = [[*lm.encode([p])[0], *lm.tokenizer(a, add_special_tokens=False)["input_ids"]] for p, a, _ in pairs]
    starts = [len(row) - 2 for row in rows]
    expected, norms = read_blocks(lm, rows, starts, "mean")
    others = [[*lm.encode([p])[0], *lm.tokenizer(b, add_special_tokens=False)["input_ids"]] for p, _, b in pairs]
    against, more = read_blocks(lm, others, starts, "mean")
    mean = (expected - against).mean(0)[0]
    assert torch.allclose(vector.directions.direction[0], mean / mean.norm(), atol=1e-5)
    assert vector.directions.norm[0] == pytest.approx(float(torch.cat([norms, more])[:, 0].mean()), rel=1e-5)


def test_a_constant_read_token_is_warned_of():
    lm = tiny_lm(num_hidden_layers=3)
    vector = SteeringVector.from_pairs(
        lm, [(f"{a} da", f"{b} da") for a, b in zip(WORDS[:10], WORDS[20:30], strict=True)]
    )
    assert "the read token is constant: 'da' (read=mean averages over the text)" in vector.origin.warnings


def test_a_block_without_a_difference_is_named():
    """Opposite pairs cancel: their mean difference is 0 at block 0, where a token's state depends on nothing else."""
    lm = tiny_lm(num_hidden_layers=3)
    pairs = [("ba", "be"), ("be", "ba")] * 5
    with pytest.raises(UsageError, match="block 1 shows no difference between the two classes"):
        SteeringVector.from_pairs(lm, pairs)


def test_states_that_overflow_are_refused():
    lm = tiny_lm(num_hidden_layers=3)
    nn.init.constant_(lm.model.model.layers[2].mlp.down_proj.weight, float("inf"))
    ids = lm.encode(["ba be"])
    with pytest.raises(UsageError, match="block 2 of tiny gives states that are not finite"):
        contrast(lm, [[]] * 8, ids * 8, [[5, 6]] * 8)


def test_best_against_worst_within_each_prompt():
    rewards = torch.tensor([0.1, 0.9, 0.5, 0.2, 1.0, 1.0, 3.0])
    prompt = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    assert rank_pairs(rewards, prompt, 0.25) == [(1, 0)]  # prompt 1 has a tie, prompt 2 one answer
    assert rank_pairs(rewards, prompt, 0.5) == [(1, 0), (2, 3)]


def test_broken_pairs_are_named():
    assert as_pair(("p", "a", "b"), 0) == Pair("a", "b", "p")
    for wrong in ("text", ("a",), ("a", " ")):
        with pytest.raises(UsageError, match="pair 3"):
            as_pair(wrong, 3)
