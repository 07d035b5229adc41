"""RE-Control inside code that does not know of it: `generate`, a pipeline, batches; and its effect on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from tiny import PAD, tiny_lm
from trimtab import LM, Sampling, Steered
from trimtab.errors import UsageError
from trimtab.steer import ReControl, ValueNetwork
from trimtab.steer.re_control import ReControlConfig

pytestmark = pytest.mark.filterwarnings("ignore::trimtab.steer.controller.StrongEdit")
PROMPTS = ["ba da fa la", "ma na", "pa ra sa ta be de fe ge le me ne", "pe"]
GREEDY = Sampling(max_new_tokens=10, temperature=0)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


def control(hidden_size: int = 32) -> ReControl:
    value = ValueNetwork(hidden_size, 24)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in value.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return ReControl(value, step_size=0.3, steps=10)


def generated(lm: LM, prompts: list[str]) -> list[list[int]]:
    """Greedy tokens by transformers' own generate on one left-padded batch, cut after the end token."""
    batch = lm.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    out = lm.model.generate(**batch, max_new_tokens=10, do_sample=False, pad_token_id=PAD)
    rows = out[:, batch["input_ids"].shape[1] :].tolist()
    ends = [min([row.index(token) + 1 for token in lm.eos_ids if token in row] or [len(row)]) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def hooks(model: Any) -> int:
    return sum(
        len(getattr(module, kind))
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    )


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_generate_is_steered_like_our_own_loop(arch: str) -> None:
    lm = tiny_lm(arch)
    ours = Steered(lm, control(lm.hidden_size)).generate(PROMPTS, GREEDY)
    before = hooks(lm.model)
    with control(lm.hidden_size).attached(lm.model) as model:
        assert model is lm.model and generated(lm, PROMPTS) == ours.tokens
    assert hooks(lm.model) == before
    assert generated(lm, PROMPTS) == lm.generate(PROMPTS, GREEDY).tokens != ours.tokens


def test_hooks_go_when_the_block_raises(lm: LM) -> None:
    before = hooks(lm.model)
    with pytest.raises(RuntimeError, match="inside"), control().attached(lm.model):
        raise RuntimeError("inside")
    assert hooks(lm.model) == before


def test_a_pipeline_is_steered(lm: LM) -> None:
    pipe = tf.pipeline("text-generation", model=lm.model, tokenizer=lm.tokenizer)

    def say() -> str:
        return pipe(PROMPTS[0], max_new_tokens=10, do_sample=False, return_full_text=False)[0]["generated_text"]

    plain = say()
    with control().attached(lm.model):
        steered = say()
    assert say() == plain != steered
    assert steered.split() == Steered(lm, control()).generate([PROMPTS[0]], GREEDY).texts[0].split()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_new_tokens=10, seed=4)], ids=["greedy", "sampled"])
def test_a_batch_is_its_rows_alone(lm: LM, sampling: Sampling) -> None:
    policy = Steered(lm, control())
    together = policy.generate(PROMPTS, sampling)
    if sampling.temperature == 0:
        alone = [policy.generate([prompt], sampling) for prompt in PROMPTS]
        assert together.tokens == [one.tokens[0] for one in alone]
        for row, one in zip(together.logprobs, alone, strict=True):
            assert row == pytest.approx(one.logprobs[0], abs=1e-4)
    else:  # the random numbers belong to the row: other prompts may come and go after it
        assert together.tokens[:2] == policy.generate(PROMPTS[:2], sampling).tokens
    steered = policy.lm.score(PROMPTS, together.tokens, control=policy.control)
    for row, scored in zip(together.logprobs, steered, strict=True):
        if sampling.temperature:
            assert row == pytest.approx(scored.tolist(), abs=1e-4)


def test_a_configured_beam_search_is_refused() -> None:
    lm = tiny_lm()
    lm.model.generation_config.num_beams = 3
    with pytest.raises(UsageError, match="does not steer beam search"), control().attached(lm.model):
        pass


# a real model

FIT = [
    "Once upon a time, there was a boy named Tim. One day, he", "There was a big dog. The dog",
    "One day, a girl named Lily went to the park. She", "Mom gave Tom a box. Tom",
    "Sara and Ben were in the garden. They", "The bird was in the tree. It",
    "It was raining outside. Jim", "Dad took Sue to the farm. There",
]  # fmt: skip
TEST = [
    "Tom had a red truck. One day, the truck", "Ella saw a rainbow. She", "The frog jumped into the water. It",
    "Two cats sat on a wall. They", "Rosie lost her doll. She", "The bear was hungry. He",
    "On Sunday, Ivy went to the zoo. There she", "A tiny bug sat on a leaf. The bug", "Ken wanted to fly. So he",
    "The ball rolled down the hill. Then", "The snow fell all night. In the morning", "The moon was big and round. Kim",
]  # fmt: skip


def test_sentiment_of_stories_rises_on_openings_it_was_not_fitted_on(stories260k: Path) -> None:
    """Paired over prompts, 95 % bootstrap interval above 0. Figures at full size: docs and benchmarks."""
    pytest.importorskip("vaderSentiment", reason="needs vaderSentiment")
    from trimtab.rewards import Sentiment

    lm, reward, sampling = LM.load(stories260k, device="cpu"), Sentiment(), Sampling(max_new_tokens=32)
    fitted = ReControl.fit(
        lm, FIT, reward, sampling=sampling, config=ReControlConfig(rollouts=1024, epochs=6, step_size=2.0)
    )
    draws = sampling.but(samples=16, seed=1)

    def mean_rewards(policy: Any) -> np.ndarray:
        answers = policy.generate(TEST, draws)
        return reward(answers.prompts, answers.texts).reshape(len(TEST), -1).mean(1)

    gains = mean_rewards(Steered(lm, fitted)) - mean_rewards(lm)
    picks = np.random.default_rng(0).integers(0, len(gains), (2000, len(gains)))
    low, high = np.quantile(gains[picks].mean(1), [0.025, 0.975])
    print(f"gain {gains.mean():.3f} [{low:.3f}, {high:.3f}]")
    assert low > 0.05
