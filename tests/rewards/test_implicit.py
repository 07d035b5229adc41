"""The reward that a tuned model implies, against log-probabilities summed token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_lm
from trimtab.errors import UsageError
from trimtab.rewards import Implicit


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    out = []
    for seed in (0, 1):
        lm: Any = tiny_lm("llama", seed=seed)
        folder = tmp_path_factory.mktemp(f"model{seed}")
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        out.append(folder)
    return out[0], out[1]


def test_it_is_the_scaled_log_ratio(folders: tuple[Path, Path]) -> None:
    reward = Implicit(model=str(folders[0]), reference=str(folders[1]), beta=0.5)
    prompts, texts = ["ba be", "di", "fa fo"], ["bo", "da de di", ""]
    expected = []
    for prompt, text in zip(prompts, texts, strict=True):
        total = 0.0
        for sign, lm in zip((1, -1), reward._models, strict=True):
            asked = lm.encode([prompt])[0]
            answer = [*lm.tokenizer(text, add_special_tokens=False)["input_ids"], min(lm.eos_ids)]
            with torch.no_grad():
                logprobs = lm.model(torch.tensor([[*asked, *answer]])).logits[0].double().log_softmax(-1)
            total += sign * sum(float(logprobs[len(asked) - 1 + i, token]) for i, token in enumerate(answer))
        expected.append(0.5 * total)
    assert reward.score(prompts, texts) == pytest.approx(expected, abs=1e-4)  # float32 log-softmax over a few tokens
    assert reward.tokens_forwarded > 0
    assert Implicit(model=str(folders[0]), reference=str(folders[1]), end=False).score(["ba"], [""]) == [None]
    assert reward.score(["ba"], ["ba " * 200]) == [None]  # outside the context


def test_a_model_against_itself_is_zero(folders: tuple[Path, Path]) -> None:
    same = Implicit(model=str(folders[0]), reference=str(folders[0]))
    assert same.score(["ba be", "di"], ["bo", "da de"]) == [0, 0]
    other = Implicit(model=str(folders[0]), reference=str(folders[1]))
    assert same.fingerprint != other.fingerprint


def test_what_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="beta above 0"):
        Implicit(model=str(folders[0]), reference=str(folders[1]), beta=0)
    with pytest.raises(UsageError, match="do not share a vocabulary"):
        Implicit(model=str(folders[0]), reference="pocket/nano")
