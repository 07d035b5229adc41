"""Exact option log-probabilities: equal to scoring each whole text, steered or not, whatever shares the batch."""

from __future__ import annotations

import pytest
import torch

from tiny import ARCHITECTURES, tiny_lm
from trimtab.control import FunctionControl, Steered
from trimtab.decode.best_of_n import BestOfN
from trimtab.errors import UsageError
from trimtab.measure.options import option_logprobs, option_probabilities
from trimtab.policy import Cost

PROMPTS = ["ba da fa", "ma", "pe ra"]
OPTIONS = [["be", "de fe", "ge le me"], ["ba", "da"], ["la", "be de", "ne"]]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_equal_to_scoring_each_alone(arch: str) -> None:
    """1e-4: float32 through a cache and through one forward."""
    lm = tiny_lm(arch)
    found = option_logprobs(lm, PROMPTS, OPTIONS)
    for prompt, options, scored in zip(PROMPTS, OPTIONS, found, strict=True):
        for option, ours in zip(options, scored, strict=True):
            tokens = lm.tokenizer(option, add_special_tokens=False)["input_ids"]
            assert torch.allclose(ours, lm.score([prompt], [tokens])[0], atol=1e-4)


def test_steered_options_are_those_of_the_steered_model() -> None:
    lm = tiny_lm()
    push = 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    policy = Steered(lm, FunctionControl(lambda hidden: hidden + push))
    ours = option_logprobs(policy, PROMPTS, OPTIONS)
    for prompt, options, scored in zip(PROMPTS, OPTIONS, ours, strict=True):
        for option, one in zip(options, scored, strict=True):
            tokens = lm.tokenizer(option, add_special_tokens=False)["input_ids"]
            assert torch.allclose(one, lm.score([prompt], [tokens], control=policy.control)[0], atol=1e-4)


def test_probabilities_sum_to_one_and_the_end_counts() -> None:
    lm = tiny_lm()
    plain = option_probabilities(lm, PROMPTS, OPTIONS)
    assert all(float(one.sum()) == pytest.approx(1, abs=1e-6) for one in plain)
    ended = option_logprobs(lm, ["ba"], [["be", "be de"]], end=True)[0]
    assert [len(one) for one in ended] == [2, 3]


def test_the_prompt_is_forwarded_once() -> None:
    lm, meter = tiny_lm(), Cost()
    option_logprobs(lm, ["ba da fa"], [["be", "de fe", "ge le me"]], meter=meter)
    assert meter.tokens == {"tiny": 3 + 0 + 1 + 2}  # the options' last tokens are never forwarded


def test_bad_input() -> None:
    lm = tiny_lm()
    with pytest.raises(UsageError, match="same tokens"):
        option_logprobs(lm, ["ba"], [["be", " be "]])
    with pytest.raises(UsageError, match="has no tokens"):
        option_logprobs(lm, ["ba"], [["be", ""]])
    with pytest.raises(UsageError, match="2 prompts and 1 lists"):
        option_logprobs(lm, ["ba", "da"], [["be"]])
    with pytest.raises(UsageError, match="no log-probabilities of given answers"):
        option_logprobs(BestOfN(lm, lambda prompts, texts: [0.0] * len(texts), 2), ["ba"], [["be"]])
