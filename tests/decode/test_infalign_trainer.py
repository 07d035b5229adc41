"""The calibrated, transformed reward in TRL's trainers, on a bandit whose optimum is known: 6 answers of one token each.

RLOO subtracts beta log(p / ref) from the reward: its fixed point is ref exp(Phi / beta) / Z. The k3 term of GRPO's loss
has, on-policy, the gradient of the *forward* KL(ref || p); it goes where E[Phi] - beta KL(ref || p) is largest, which is
elsewhere, unless `use_bias_correction_kl` is set (the default in trl 1.16, not in older versions).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from oracles.toy import toy_lm
from trimtab.decode.calibration import Calibrated, Calibrator, Source, prompt_hash
from trimtab.measure.win_rates import Array, Transform, tilt
from trimtab.rewards import Function

PROMPT, BETA, GROUP = "1 2", 0.3, 64
SCORES = [0.3, -1.0, 2.0, 0.5, 1.0, 0.0]  # of tokens 0 (the end token, decoded to nothing) to 5


def score(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
    return [SCORES[int(text)] if text.strip() else SCORES[0] for text in texts]


def distribution(model: Any) -> Array:
    with torch.no_grad():
        return model(torch.tensor([[1, 2]])).logits[0, -1].double().softmax(-1).numpy()


def made_reward(reference: Array) -> Calibrated:
    """Best-of-4's exp transform over a table that has the reference's own shares."""
    table = np.sort(np.repeat(SCORES, np.round(reference * 100_000).astype(int)))
    source = Source("", "", Function(score).fingerprint, ("", ""))
    return Calibrated(Function(score), Calibrator({prompt_hash(PROMPT): table}, 64, source), Transform("exp"))


def forward_kl_optimum(reference: Array, phi: Array, beta: float) -> Array:
    """argmax E_p[phi] - beta KL(ref || p): p = beta ref / (lam - phi), lam such that it sums to 1."""
    lam = brentq(lambda x: (beta * reference / (x - phi)).sum() - 1, phi.max() + 1e-9, phi.max() + 100)
    return beta * reference / (lam - phi)


def tv(p: Array, q: Array) -> float:
    return float(np.abs(p - q).sum() / 2)


def trained(folder: Path, trainer: Any, config: Any, reward: Calibrated, **options: Any) -> Array:
    """The model's law after 60 steps of 512 answers."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    start = toy_lm(6, spread=0.5)
    start.model.save_pretrained(folder)  # the trainer reads its reference from here
    start.tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    arguments = config(
        output_dir=str(folder / "out"), per_device_train_batch_size=512, num_generations=GROUP, max_steps=60,
        max_completion_length=1, learning_rate=0.02, beta=BETA, max_grad_norm=1e9, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        trainer(
            model=model, reward_funcs=reward.as_trl(), args=arguments, processing_class=start.tokenizer,
            train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 512}),
        ).train()  # fmt: skip
    return distribution(model)


@pytest.mark.filterwarnings("ignore")
def test_rloo_trains_to_the_tilted_policy_and_plain_grpo_elsewhere(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    reference = distribution(toy_lm(6, spread=0.5).model)
    reward = made_reward(reference)
    phi = np.array(reward.score([PROMPT] * 6, ["", "1", "2", "3", "4", "5"]), dtype=float)
    target = tilt(reference, phi, BETA)
    rloo = trained(tmp_path / "rloo", trl.RLOOTrainer, trl.RLOOConfig, reward, normalize_advantages=False)
    assert tv(reference, target) > 0.2
    assert tv(rloo, target) < 0.03
    grpo = trained(
        tmp_path / "grpo", trl.GRPOTrainer, trl.GRPOConfig, reward, scale_rewards="none", use_bias_correction_kl=False
    )
    # the mean that GRPO subtracts holds the answer itself, which shrinks the advantage by (G - 1) / G
    other = forward_kl_optimum(reference, phi * (GROUP - 1) / GROUP, BETA)
    assert tv(grpo, target) > 0.3
    assert tv(grpo, other) < 0.05


def test_the_two_kl_terms_have_the_gradients_of_the_two_kls() -> None:
    """By summing over the 6 answers: no sampling, equal to 1e-12."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64)

    def gradient(loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        at = logits.clone().requires_grad_()
        loss(at.log_softmax(0)).backward()
        assert at.grad is not None
        return at.grad

    def k3(logp: torch.Tensor) -> torch.Tensor:
        return (reference - logp).exp() - (reference - logp) - 1

    def drawn(logp: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
        """The mean of a loss over answers drawn from p: the drawing itself has no gradient."""
        return (logp.detach().exp() * term).sum()

    forward = gradient(lambda logp: (reference.exp() * (reference - logp)).sum())
    reverse = gradient(lambda logp: (logp.exp() * (logp - reference)).sum())
    plain = gradient(lambda logp: drawn(logp, k3(logp)))
    corrected = gradient(lambda logp: drawn(logp, (logp - logp.detach()).exp() * k3(logp)))
    in_reward = gradient(lambda logp: drawn(logp, (logp - reference).detach() * logp))
    assert torch.allclose(plain, forward, atol=1e-12) and not torch.allclose(plain, reverse, atol=1e-2)
    assert torch.allclose(corrected, reverse, atol=1e-12)
    assert torch.allclose(in_reward, reverse, atol=1e-12)
