"""Natural control as one more transformer block: a plain checkpoint equal to the controller it came from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from oracles.toy import Toy, mixed_reward
from tiny import tiny_lm
from trimtab import LM, Sampling, Steered
from trimtab.errors import UsageError
from trimtab.policies import Workshop
from trimtab.rewards import Function
from trimtab.steer import NaturalControl, load_controller
from trimtab.steer.block import ANATOMY, Block
from trimtab.steer.extra_block import NaturalBlock, residuals
from trimtab.steer.natural_control import NaturalControlConfig
from trimtab.steer.rollouts import collect
from trimtab.steer.value import ValueNetwork

BLOCK_ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3"]
PROMPTS = ["ba ma", "du fe go", "la", "ta pa ra sa", "bi bo bu"]
SAMPLING = Sampling(max_new_tokens=6, seed=3)
FEW = NaturalControlConfig(rollouts=48, epochs=2, batch=16, form="block", block_strength=4.0)


def vowels(_, texts):
    return [float(text.count("a") - text.count("u")) for text in texts]


REWARD = Function(vowels, name="vowels")


def controller_of(lm: LM, strength: float = 4.0, noise: float = 0.3) -> NaturalBlock:
    """A block with every parameter at random, the last projection too: nothing here depends on a good fit."""
    block = Block.fresh(lm.model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    config = NaturalControlConfig(form="block", strength=strength, block_strength=4.0)
    return NaturalBlock(block.requires_grad_(False), config, lm=lm)


def logits_of(model, lm: LM) -> torch.Tensor:
    ids = torch.tensor([[5, 9, 14, 23, 8, 40, 11]])
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("arch", BLOCK_ARCHITECTURES)
def test_a_zero_block_is_the_base(arch):
    lm = tiny_lm(arch)
    fresh = NaturalBlock(Block.fresh(lm.model, 0), NaturalControlConfig(form="block", strength=4.0), lm=lm)
    big = fresh.extended(lm.model)
    assert big.config.num_hidden_layers == lm.model.config.num_hidden_layers + 1
    # the residual gains exact zeros; what is left is the order of the same operations
    assert torch.allclose(logits_of(big, lm), logits_of(lm.model, lm), atol=1e-6)
    dialled = controller_of(lm, strength=0.0).extended(lm.model)
    assert torch.allclose(logits_of(dialled, lm), logits_of(lm.model, lm), atol=1e-6)


@pytest.mark.parametrize("arch", BLOCK_ARCHITECTURES)
def test_a_saved_checkpoint_is_the_controller(arch, tmp_path: Path):
    """Loaded by plain transformers: the logits of the hook (1e-5: the dial is folded into the weights), its tokens."""
    lm = tiny_lm(arch)
    controller = controller_of(lm, strength=3.0)
    with controller.attached(lm.model, positions="all"):
        hooked = logits_of(lm.model, lm)
    assert float((hooked - logits_of(lm.model, lm)).abs().max()) > 1e-2, "the block does nothing here"
    controller.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is type(lm.model)
    assert torch.allclose(logits_of(plain, lm), hooked, atol=1e-5)
    drawn = Steered(lm, controller).generate(PROMPTS, SAMPLING)
    assert LM(plain, lm.tokenizer).generate(PROMPTS, SAMPLING).tokens == drawn.tokens
    assert controller.as_policy(lm).generate(PROMPTS, SAMPLING).tokens == drawn.tokens
    again = NaturalControl.from_pretrained(tmp_path)
    assert isinstance(again, NaturalBlock) and again.strength == 3.0
    assert Steered(lm, again).generate(PROMPTS, SAMPLING).tokens == drawn.tokens


def test_the_config_of_layers_is_extended():
    lm = tiny_lm("gemma3")
    config = controller_of(lm).extended(lm.model).config
    assert config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert lm.model.config.num_hidden_layers == 2 and len(lm.model.config.layer_types) == 2, "the base was changed"


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "opt"])
def test_other_architectures_are_refused_by_name(arch):
    lm = tiny_lm(arch)
    with pytest.raises(UsageError, match=rf"{type(lm.model).__name__}.*llama"):
        NaturalControl.fit(lm, PROMPTS, REWARD, sampling=SAMPLING, config=FEW)
    assert arch not in ANATOMY


@pytest.mark.parametrize("arch", ["llama", "gemma2", "phi"])
def test_residuals_are_what_the_final_norm_reads(arch):
    lm = tiny_lm(arch)
    drawn = collect(lm, PROMPTS, REWARD, SAMPLING, 20)
    found, forwarded = residuals(lm, PROMPTS, drawn)
    norm = lm.backbone.get_submodule(ANATOMY[lm.model.config.model_type].final)
    # one forward over the whole row instead of one a token: float32 sums in another order
    assert torch.allclose(norm(found), drawn.states, atol=1e-4)
    lengths = [len(lm.encode([PROMPTS[i]])[0]) for i in drawn.prompt_index.tolist()]
    assert forwarded == sum(lengths) + int(drawn.lengths.sum()) - len(drawn)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_the_dial_scales_the_edit_to_first_order(arch):
    lm = tiny_lm(arch)
    hidden = torch.randn(40, lm.hidden_size, generator=torch.Generator().manual_seed(0))
    norm = lm.backbone.norm
    block = controller_of(lm).block

    def delta(x: float) -> torch.Tensor:
        return norm(block(hidden, x)) - norm(hidden)

    # delta(x) = x d + O(x^2): twice the dial is twice the edit, up to a relative error of the order of x
    for x in (1e-2, 1e-3):
        ratio = float((delta(2 * x) - 2 * delta(x)).norm() / delta(x).norm())
        assert ratio < 20 * x


class Identity(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_with_the_identity_as_final_norm_the_block_is_the_hook():
    """Then Delta(h) = MLP(norm_b(h)) whatever the strength: an edit of the final hidden state like any other."""
    lm = tiny_lm("llama")
    controller = controller_of(lm, strength=4.0)
    block, ids = controller.block, torch.tensor([[5, 9, 14, 23]])
    lm.backbone.norm = Identity()
    with torch.no_grad():
        hidden = lm.backbone(ids).last_hidden_state
        edited = lm.head(hidden + block.mlp(block.norm(hidden)))
        with controller.attached(lm.model, positions="all"):
            assert torch.allclose(lm.model(ids).logits, edited, atol=1e-5)


def test_the_last_position_alone_can_be_edited():
    lm = tiny_lm("llama")
    controller = controller_of(lm)
    base = logits_of(lm.model, lm)
    with controller.attached(lm.model, positions="last"):
        last = logits_of(lm.model, lm)
    with controller.attached(lm.model, positions="all"):
        everywhere = logits_of(lm.model, lm)
    assert torch.equal(last[:, :-1], base[:, :-1])
    assert torch.allclose(last[:, -1], everywhere[:, -1], atol=1e-6)
    assert torch.equal(logits_of(lm.model, lm), base), "a hook was left behind"


def test_a_fit_raises_the_exact_reward():
    """On the enumerable toy: what the fitted block gains at its KL, against the best possible gain at that KL."""
    toy = Toy(mixed_reward, seed=0)
    controller = NaturalControl.learn(
        toy.lm, [toy.prompt] * 4, toy.reward, toy.sampling,
        NaturalControlConfig(form="block", block_strength=1.0, epochs=3, lr=3e-3), toy.rollouts(6000, seed=1),
    ).but(strength=1.0)  # fmt: skip
    big = LM(controller.extended(toy.lm.model), toy.lm.tokenizer)
    logprobs = big_logprobs(toy, big)
    outcome = toy.evaluate(logprobs)
    assert outcome.kl > 0.05, "the block hardly edits"
    # measured 0.94 to 0.98 for seeds 0 to 2
    assert toy.share_of_optimum(outcome) > 0.9


def big_logprobs(toy: Toy, lm: LM) -> torch.Tensor:
    """Next-token distribution of another model at every prefix of the toy, [N, V]."""
    prompt = list(map(int, toy.prompt.split()))
    states = [
        lm.backbone(torch.tensor([[*prompt, *prefix] for prefix in toy.prefixes[level]])).last_hidden_state[:, -1]
        for level in toy.levels
    ]
    return toy.logprobs(torch.cat(states))


def test_fit_writes_a_checkpoint_with_a_tuned_strength(tmp_path: Path):
    """`trimtab fit natural-control MODEL --form block --out DIR`: what the command calls."""
    lm = tiny_lm("llama")
    options = {"form": "block", "epochs": "2", "lr": "0.003", "kl_target": "0.02"}
    fitted = NaturalControl.fit(lm, PROMPTS, REWARD, sampling=SAMPLING, **options)
    fitted.save_pretrained(tmp_path / "out")
    assert abs(fitted.origin.metrics["calibration_kl_per_token"] / 0.02 - 1) <= 0.05
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config.num_hidden_layers == 3
    record = json.loads((tmp_path / "out" / "controller.json").read_text())
    assert record["method"] == "natural-control" and record["config"]["form"] == "block"
    assert record["origin"]["model"] == "tiny" and record["config"]["block_strength"] == fitted.strength
    assert load_controller(tmp_path / "out").strength == fitted.strength  # `--controller OUT`
    # a second block on top of the first: rounds, by running the command again on its own output
    second = controller_of(LM.load(tmp_path / "out")).extended(plain)
    assert second.config.num_hidden_layers == 4


def test_in_compare_it_is_the_longer_model():
    lm = tiny_lm("llama")
    workshop = Workshop(lm, REWARD, PROMPTS, SAMPLING)
    built = workshop.build("natural-control:form=block,strength=4,rollouts=64,epochs=2,batch=16")
    assert isinstance(built.policy, LM) and built.policy.model.config.num_hidden_layers == 3
    assert built.policy.tokenizer is lm.tokenizer


def test_bad_input(tmp_path: Path):
    lm = tiny_lm("llama")
    with pytest.raises(UsageError, match="form=block has one round"):
        NaturalControlConfig(form="block", rounds=2)
    with pytest.raises(UsageError, match="no kl_cap"):
        NaturalControlConfig(form="block", kl_cap=0.1)
    with pytest.raises(UsageError, match="Literal|hook"):
        NaturalControl.fit(lm, PROMPTS, REWARD, form="brick")
    controller = controller_of(lm)
    with pytest.raises(UsageError, match="before the final norm"):
        controller.edit(torch.zeros(1, lm.hidden_size))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something"):
        controller.save_pretrained(tmp_path)
    where = controller.save_pretrained(tmp_path / "block")
    loaded = NaturalControl.from_pretrained(where)
    with pytest.raises(UsageError, match="base model"):
        loaded.save_pretrained(tmp_path / "again")
    loaded.save_pretrained(tmp_path / "again", lm=lm)
    (where / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="lacks"):
        NaturalControl.from_pretrained(where)
    with pytest.raises(UsageError, match="made for"):
        foreign = dataclasses.replace(controller.origin, fingerprint="0" * 16)
        other = controller.but()
        other.origin = foreign
        other.check(lm.model)


def test_nothing_learnt_is_the_base():
    """A reward that nothing in the states predicts: a warning, strength 0, the base's tokens."""
    lm = tiny_lm("llama")
    rollouts = collect(lm, PROMPTS, REWARD, SAMPLING, 40)
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0))
    rollouts = dataclasses.replace(rollouts, rewards=noise)
    config = dataclasses.replace(FEW, lr=1.0)  # every epoch overshoots
    learnt = NaturalControl.learn(lm, PROMPTS, REWARD, SAMPLING, config, rollouts)
    ready = learnt.ready(lm, PROMPTS, SAMPLING)
    assert ready.strength == 0 and any("learnt nothing" in warning for warning in ready.origin.warnings)
    assert ready.as_policy(lm).generate(PROMPTS, SAMPLING).tokens == lm.generate(PROMPTS, SAMPLING).tokens
    assert isinstance(ready.value, ValueNetwork)
