"""A folded vector is a plain checkpoint that says the same tokens as the steered model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from recompute import PROMPTS, transformers_generate
from tiny import tiny_lm
from trimtab import LM, Sampling, Steered
from trimtab.control import FunctionControl
from trimtab.errors import UsageError
from trimtab.steer import SteeringVector
from trimtab.steer.fold import fold, fold_final, save_folded

torch.set_num_threads(1)
GREEDY = Sampling(temperature=0, max_new_tokens=12)
FOLDS = ["llama", "gpt2", "gpt_neox", "opt", "phi"]
REFUSED = {"qwen2": "Qwen2", "mistral": "Mistral", "gemma2": "Gemma2", "phi3": "Phi3"}


def vector(family: str, **options) -> SteeringVector:
    generator = torch.Generator().manual_seed(0)
    return SteeringVector.from_vectors({n: torch.randn(32, generator=generator) for n in (0, 1)}, 2, family, **options)


@pytest.mark.parametrize("arch", FOLDS)
def test_tokens_are_the_steered_models(arch, tmp_path):
    lm = tiny_lm(arch)
    before = {key: tensor.clone() for key, tensor in lm.model.state_dict().items()}
    v = vector(lm.model.config.model_type, strength=1.5)
    steered = Steered(lm, v).generate(PROMPTS, GREEDY)
    assert steered.tokens != lm.generate(PROMPTS, GREEDY).tokens
    assert fold(lm, v).generate(PROMPTS, GREEDY).tokens == steered.tokens
    assert all(torch.equal(before[key], tensor) for key, tensor in lm.model.state_dict().items())

    save_folded(lm, v, tmp_path / "plain")
    assert LM.load(tmp_path / "plain").generate(PROMPTS, GREEDY).tokens == steered.tokens
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    stock = LM(plain, lm.tokenizer)
    assert transformers_generate(stock, lm.encode(PROMPTS)[0], 12) == steered.tokens[0]


def test_tied_embeddings_stay_tied():
    lm = tiny_lm("llama", tied=True)
    folded = fold(lm, vector("llama"))
    assert folded.model.lm_head.weight is folded.model.model.embed_tokens.weight
    assert folded.generate(PROMPTS, GREEDY).tokens == Steered(lm, vector("llama")).generate(PROMPTS, GREEDY).tokens


@pytest.mark.parametrize("arch", REFUSED)
def test_architectures_without_the_bias_are_refused_by_name(arch):
    lm = tiny_lm(arch)
    with pytest.raises(UsageError, match=f"{REFUSED[arch]}ForCausalLM has no bias on its MLP's output"):
        fold(lm, vector(lm.model.config.model_type))


def test_a_bias_before_a_norm_is_noticed():
    lm = tiny_lm("opt", do_layer_norm_before=False)
    with pytest.raises(UsageError, match="OPTForCausalLM transforms what its MLP writes"):
        fold(lm, vector("opt"))


@pytest.mark.parametrize("options", [{"positions": "response"}, {"operator": "piecewise"}, {"renorm": True}])
def test_edits_that_are_no_constant_are_refused(options):
    with pytest.raises(UsageError, match="a bias acts at every position|only operator=add without renorm"):
        fold(tiny_lm("gpt2"), vector("gpt2", **options))


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "phi"])
def test_a_constant_edit_of_the_final_state_folds_into_the_final_norm(arch):
    lm = tiny_lm(arch)
    added = torch.randn(32, generator=torch.Generator().manual_seed(1))
    steered = Steered(lm, FunctionControl(lambda hidden: hidden + added)).generate(PROMPTS, GREEDY)
    assert (
        fold_final(lm, added).generate(PROMPTS, GREEDY).tokens == steered.tokens != lm.generate(PROMPTS, GREEDY).tokens
    )


def test_a_final_norm_without_a_bias_is_refused_by_name():
    with pytest.raises(UsageError, match="LlamaForCausalLM has no bias on its final norm"):
        fold_final(tiny_lm("llama"), torch.ones(32))
    with pytest.raises(UsageError, match="the edit .7,."):
        fold_final(tiny_lm("gpt2"), torch.ones(7))


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        save_folded(tiny_lm("gpt2"), vector("gpt2"), tmp_path)
