"""Steering vectors on tiny random models: the edit equals what it says by hand, whatever the cache and the padding do."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from recompute import PROMPTS
from tiny import tiny_lm, tiny_model
from trimtab import Sampling, Steered
from trimtab.divergence import divergences
from trimtab.errors import UsageError
from trimtab.rewards import Function
from trimtab.steer import SteeringVector, load_controller
from trimtab.steer.controller import StrongEdit
from trimtab.steer.layers import find_blocks, resolve_layers
from trimtab.steer.rollouts import collect

torch.set_num_threads(1)  # matrices this small are slower on two
GREEDY = Sampling(temperature=0, max_new_tokens=10)


def gaussian(width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def vector_at(*layers: int, count: int = 3, seed: int = 0, **options) -> SteeringVector:
    return SteeringVector.from_vectors({layer: gaussian(seed=seed + layer) for layer in layers}, count, **options)


@pytest.fixture(scope="module")
def lm():
    return tiny_lm(num_hidden_layers=3)


@pytest.fixture(scope="module")
def ids(lm):
    return torch.tensor(lm.encode(PROMPTS[2:3]))


@torch.no_grad()
def logits(lm, ids, *vectors, **arguments):
    from contextlib import ExitStack

    with ExitStack() as stack:
        for vector in vectors:
            stack.enter_context(vector.attached(lm.model))
        return lm.model(ids, **arguments).logits


@torch.no_grad()
def by_hand(lm, ids, added, mask=None):
    """A Llama forward written out block by block, without a cache: `added` [D] by block, at the positions of `mask`."""
    backbone = lm.model.model
    hidden = backbone.embed_tokens(ids)
    places = torch.arange(ids.shape[1])[None]
    rotary = backbone.rotary_emb(hidden, places)
    causal = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)[None, None]
    where = torch.ones(ids.shape[1], 1) if mask is None else mask[:, None].float()
    for number, block in enumerate(backbone.layers):
        out = block(hidden, attention_mask=causal, position_ids=places, position_embeddings=rotary)
        hidden = out if isinstance(out, torch.Tensor) else out[0]
        if number in added:
            hidden = hidden + added[number] * where
    return hidden, lm.model.lm_head(backbone.norm(hidden))


def test_any_layer_equals_a_forward_written_by_hand(lm, ids):
    assert torch.allclose(by_hand(lm, ids, {})[1], logits(lm, ids), atol=1e-5)
    for layer in range(3):
        ours = logits(lm, ids, vector_at(layer))
        assert torch.allclose(ours, by_hand(lm, ids, {layer: gaussian(seed=layer)})[1], atol=1e-5)
        assert (ours - logits(lm, ids)).abs().max() > 0.1  # and it does something


def test_last_block_is_the_pre_norm_state(lm, ids):
    hidden, _ = by_hand(lm, ids, {})
    expected = lm.model.lm_head(lm.model.model.norm(hidden + gaussian(seed=2)))
    assert torch.allclose(logits(lm, ids, vector_at(2)), expected, atol=1e-5)


def test_strength_zero_is_the_model_bit_for_bit(lm, ids):
    vector = vector_at(0, 1, 2)
    assert torch.equal(logits(lm, ids, vector.but(strength=0.0)), logits(lm, ids))
    assert torch.equal(logits(lm, ids, vector.scaled(0)), logits(lm, ids))
    for operator in ("project_out", "clamp", "piecewise"):
        assert torch.equal(logits(lm, ids, vector.but(operator=operator).scaled(0)), logits(lm, ids))


def test_vectors_add_subtract_and_scale(lm, ids):
    a, b = vector_at(0, 1), vector_at(1, 2, seed=5, strength=0.5)
    assert torch.allclose(logits(lm, ids, a, -a), logits(lm, ids), atol=1e-5)
    assert torch.allclose(logits(lm, ids, a - a), logits(lm, ids), atol=1e-6)
    assert torch.allclose(logits(lm, ids, a, b), logits(lm, ids, a + b), atol=1e-5)
    summed = (a + b).vectors()
    for layer in (0, 1, 2):
        total = sum(v.vectors()[layer] for v in (a, b) if layer in v.layers)
        assert torch.allclose(summed[layer], total, atol=1e-6)
    assert torch.allclose(logits(lm, ids, 2 * a), logits(lm, ids, a + a), atol=1e-5)


def test_hooks_are_gone_afterwards(lm, ids):
    before = logits(lm, ids)

    def count():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())

    hooks = count()
    with pytest.raises(RuntimeError, match="stop"):  # noqa: SIM117
        with vector_at(0, 1, positions="response").attached(lm.model):
            assert count() > hooks
            raise RuntimeError("stop")
    assert count() == hooks and torch.equal(logits(lm, ids), before)


@pytest.mark.parametrize("positions", ["all", "prompt", "response"])
def test_sessions_model_generate_and_recomputation_agree(lm, positions):
    vector = vector_at(0, 1, positions=positions)
    answers = Steered(lm, vector).generate(PROMPTS, GREEDY)
    for prompt, tokens in zip(lm.encode(PROMPTS), answers.tokens, strict=True):
        with vector.attached(lm.model):
            there = lm.model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=10, do_sample=False, pad_token_id=0,
            )  # fmt: skip
        assert there[0, len(prompt) :].tolist()[: len(tokens)] == tokens
        whole = torch.tensor([[*prompt, *tokens[:-1]]])
        response = torch.arange(whole.shape[1]) >= len(prompt) - 1
        mask = {"all": response | True, "prompt": ~response, "response": response}[positions]
        _, expected = by_hand(lm, whole, vector.vectors(), mask)
        assert expected[0, len(prompt) - 1 :].argmax(-1).tolist() == tokens
        (scored,) = lm.token_logprobs([_text(lm, prompt)], [tokens], control=vector)
        assert torch.allclose(scored, expected[0, len(prompt) - 1 :].log_softmax(-1), atol=1e-4)


def _text(lm, ids):
    return lm.tokenizer.decode(ids)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "opt", "phi", "gemma2", "mistral", "qwen3"])
def test_cache_on_and_off_agree_at_all_positions(arch):
    lm = tiny_lm(arch)
    vector = vector_at(0, 1, count=2, family=lm.model.config.model_type)
    ids = torch.tensor(lm.encode(PROMPTS[:1]))
    runs = []
    for use_cache in (True, False):
        with vector.attached(lm.model):
            out = lm.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0,
                use_cache=use_cache, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        runs.append(out)
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for a, b in zip(runs[0].logits, runs[1].logits, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    ours = Steered(lm, vector).generate(PROMPTS[:1], GREEDY.but(max_new_tokens=8)).tokens[0]
    assert ours == runs[0].sequences[0, ids.shape[1] :].tolist()[: len(ours)]


@pytest.mark.parametrize("positions", ["all", "prompt", "response"])
def test_padding_changes_nothing(lm, positions):
    vector = vector_at(0, 1, 2, positions=positions)
    rows = lm.encode(PROMPTS)
    width = max(map(len, rows))
    for side in ("left", "right"):
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, at], mask[i, at] = torch.tensor(row), 1
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = logits(lm, ids, vector, attention_mask=mask, position_ids=places)
        for i, row in enumerate(rows):
            alone = logits(lm, torch.tensor([row]), vector)[0, -1]
            assert torch.allclose(padded[i, -1 if side == "left" else len(row) - 1], alone, atol=1e-4)


def test_project_out_and_clamp(lm):
    hidden = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(3))
    vector = vector_at(1)
    v = vector.directions.direction[1]
    out = vector.but(operator="project_out")
    once = out.apply(hidden, 1)
    assert (once @ v).abs().max() < 1e-6
    assert torch.allclose(out.apply(once, 1), once, atol=1e-6)
    clamped = vector.but(operator="clamp", unit="absolute", strength=-1.5).apply(hidden, 1)
    assert torch.allclose(clamped @ v, torch.full((4, 6), -1.5), atol=1e-5)
    piecewise = vector.but(operator="piecewise", unit="absolute", strength=2.0).apply(hidden, 1)
    assert torch.allclose(piecewise @ v, hidden @ v + 2 * (hidden @ v).sign(), atol=1e-5)
    kept = vector.but(renorm=True, unit="absolute", strength=3.0).apply(hidden, 1)
    assert torch.allclose(kept.norm(dim=-1), hidden.norm(dim=-1), rtol=1e-5)


def test_units():
    vector = vector_at(0, 2)
    vector.directions.norm = torch.tensor([2.0, 3.0, 4.0])
    vector.directions.difference = torch.tensor([1.0, 1.0, 5.0])
    assert [vector.but(strength=3.0).amount(layer) for layer in (0, 2)] == [1.5, 7.5]  # shared by two blocks
    assert [vector.but(strength=0.5, unit="relative").amount(layer) for layer in (0, 2)] == [1.0, 2.0]
    assert vector.but(strength=-2.0, unit="absolute").amount(2) == -2.0


def test_layers_default_to_the_middle_third_and_count_from_zero(lm):
    assert resolve_layers((), 3) == (1,) and resolve_layers((), 32) == tuple(range(11, 21))
    assert resolve_layers((), 1) == (0,) and resolve_layers((), 2) == (1,)
    assert vector_at(0, 1, 2).but(layers=(-1, 0)).layers == (0, 2)
    with pytest.raises(UsageError, match="layer 3 does not exist: the model has 3 blocks, 0 to 2"):
        vector_at(0).but(layers=(3,))
    assert find_blocks(lm.model, "model.layers") is find_blocks(lm.model)
    with pytest.raises(UsageError, match="no list of blocks 'h'"):
        find_blocks(lm.model, "h")


# from a reward, on disk


def share_of_a(prompts, texts):
    return [np.mean([word.endswith("a") for word in text.split()]) if text.split() else None for text in texts]


@pytest.fixture(scope="module")
def fitted(lm):
    sampling = Sampling(max_new_tokens=8, seed=1)
    reward = Function(share_of_a)
    rollouts = collect(lm, PROMPTS, reward, sampling, 200)
    config = SteeringVector.Config(contrast=0.3)
    return SteeringVector.learn(lm, PROMPTS, reward, sampling, config, rollouts), sampling, reward


def test_learns_from_a_reward_and_steers_towards_it(lm, fitted):
    vector, sampling, reward = fitted
    assert vector.config.strength is None and vector.origin.metrics["pairs"] >= 50
    assert vector.origin.fit_tokens > 0 and vector.origin.fit_reward_calls == 200
    draws = sampling.but(samples=60, seed=9)
    means = {}
    for c in (-3.0, 0.0, 3.0):
        answers = Steered(lm, vector.but(strength=c)).generate(PROMPTS, draws)
        means[c] = np.nanmean(reward(answers.prompts, answers.texts))
    assert means[-3.0] + 0.02 < means[0.0] < means[3.0] - 0.02, means


def test_the_strength_is_tuned_to_the_kl_asked_for(lm, fitted, monkeypatch):
    monkeypatch.setattr("trimtab.steer.tuner.ANSWERS", 64)
    vector, _, _ = fitted
    sampling = Sampling(max_new_tokens=4)
    ready = vector.but(kl_target=0.05).ready(lm, PROMPTS, sampling)
    answers = Steered(lm, ready).generate(PROMPTS * 40, sampling.but(seed=77))
    found = divergences(Steered(lm, ready), lm, answers.prompts, answers.tokens, sampling)
    assert np.mean([float(kl) for one in found for kl in one.kl]) == pytest.approx(0.05, rel=0.35)  # 64 and 200 answers
    with pytest.raises(UsageError, match="no strength was chosen"):
        Steered(lm, vector).generate(PROMPTS, sampling)


def test_saves_and_loads(lm, fitted, tmp_path):
    vector = fitted[0].but(strength=2.0, layers=(0, 2), positions="response")
    vector.save_pretrained(tmp_path / "v")
    loaded = load_controller(tmp_path / "v")
    assert (
        loaded.config == vector.config and loaded.origin.metrics == vector.origin.metrics and loaded.family == "llama"
    )
    a, b = (Steered(lm, v).generate(PROMPTS, GREEDY) for v in (vector, loaded))
    assert a.tokens == b.tokens


def test_other_models_are_refused_and_other_weights_warned_of(fitted):
    vector = fitted[0].but(strength=1.0)
    for model in (tiny_model("llama", num_hidden_layers=2), tiny_model("llama", num_hidden_layers=3, hidden_size=64)):
        with pytest.raises(UsageError, match="made for tiny .llama, 3 blocks of width 32.; this model is llama with"):
            vector.check(model)
    with pytest.raises(UsageError, match="this model is mistral"):
        vector.check(tiny_model("mistral", num_hidden_layers=3))
    with pytest.warns(UserWarning, match="same shape and other weights"):
        vector.check(tiny_model("llama", num_hidden_layers=3, seed=4))


def test_an_edit_longer_than_the_states_is_warned_of(lm, fitted):
    with pytest.warns(StrongEdit, match="the edit of block 1 is 3.0 times as long as its states"):
        Steered(lm, fitted[0].but(unit="relative", strength=-3.0))
    with pytest.raises(UsageError, match="unit=relative needs the blocks' norms"):
        Steered(lm, vector_at(1, unit="relative"))


def test_prompt_and_response_need_a_cache(lm, ids):
    with pytest.raises(UsageError, match="positions=response needs the key-value cache"):
        logits(lm, ids, vector_at(0, positions="response"), use_cache=False)


def test_bad_options():
    for options in ({"strength": float("inf")}, {"contrast": 0.9}, {"share": -1.0}, {"operator": "clamp"}):
        with pytest.raises(UsageError):
            SteeringVector.Config(**options)
    with pytest.raises(UsageError, match="only operator=add"):
        vector_at(0, operator="piecewise") + vector_at(0)


def test_a_reward_that_says_nothing_within_a_prompt_is_refused(lm):
    reward = Function(lambda prompts, texts: [float(len(prompt)) for prompt in prompts])
    with pytest.raises(UsageError, match="no prompt has two answers of different reward"):
        SteeringVector.fit(
            lm, PROMPTS, reward, sampling=Sampling(max_new_tokens=2), config=SteeringVector.Config(rollouts=40)
        )


def test_no_warning_is_raised_by_steering_the_model_it_was_made_for(lm, fitted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Steered(lm, fitted[0].but(strength=1.0)).generate(PROMPTS[:1], GREEDY)
