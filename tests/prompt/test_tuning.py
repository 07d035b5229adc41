"""The fine-tuner: its losses against hand computations, its determinism, what it leaves alone, what it costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import EOS, tiny_lm, tiny_model, tiny_tokenizer
from trimtab import LM, Cost, Sampling
from trimtab.errors import UsageError
from trimtab.prompt import tuning
from trimtab.prompt.tuning import completion_logprobs, dpo_loss, encode, preference, sft

ROWS = [("ba da fa", "la ma"), ("ma na", "pe"), ("pe", "ba ba ba"), ("ta to", "du du")]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


def weights(lm: LM) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in lm.model.parameters()]


class Fixed:
    """A model whose logits do not depend on what it reads: [T, V] given."""

    device = torch.device("cpu")

    def __init__(self, logits: torch.Tensor):
        self.given = logits

    def __call__(self, input_ids: torch.Tensor, **more: Any) -> Any:
        rows, length = input_ids.shape
        return type("Out", (), {"logits": self.given[None, :length].expand(rows, -1, -1)})


# the losses


def test_only_completion_tokens_and_the_end_token_count() -> None:
    """Uniform but for one position: log p = sum over the completion of log softmax, computed by hand."""
    logits = torch.zeros(5, 4)
    logits[2] = torch.tensor([math.log(5.0), 0.0, 0.0, 0.0])  # after the third token: p = 5/8, 1/8, 1/8, 1/8
    logits[0] = torch.tensor([0.0, 0.0, 0.0, 90.0])  # inside the prompt: must not matter
    rows = [([1, 2], [3, 0]), ([2, 2], [1, 3, 1]), ([1], [0])]
    found = completion_logprobs(Fixed(logits), rows)
    by_hand = [math.log(1 / 4) + math.log(5 / 8), math.log(1 / 4) + math.log(1 / 8) + math.log(1 / 4), -90.0]
    assert found.tolist() == pytest.approx(by_hand, abs=1e-5)


def test_logprobs_are_the_models_own(lm: LM) -> None:
    """The sum over a padded batch is the sum of `LM.score`, which forwards every row by itself."""
    rows = encode(lm, *zip(*ROWS, strict=True))
    with torch.no_grad():
        ours = completion_logprobs(lm.model, rows)
    theirs = torch.stack([lm.score([prompt], [row[1]])[0].sum() for (prompt, _), row in zip(ROWS, rows, strict=True)])
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert all(row[1][-1] == EOS for row in rows)


def test_the_first_sft_loss_is_the_mean_over_completion_tokens(lm: LM) -> None:
    said: list[str] = []
    sft(lm, ROWS, epochs=1, lr=1e-4, batch=4, progress=said.append)
    rows = encode(lm, *zip(*ROWS, strict=True))
    total = sum(float(lm.score([prompt], [row[1]])[0].sum()) for (prompt, _), row in zip(ROWS, rows, strict=True))
    assert said == [f"sft, epoch 1/1: loss {-total / sum(len(row[1]) for row in rows):.4f}"]


def test_dpo_loss_by_hand() -> None:
    """beta = 0.5, margins ((-1 + 2) - (-3 + 2)) = 2 and ((-2 + 1) - (-1 + 1)) = -1: log(1 + e^-1), log(1 + e^0.5)."""
    given = [torch.tensor(row, dtype=torch.float64) for row in ([-1.0, -2.0], [-3.0, -1.0], [-2.0, -1.0], [-2.0, -1.0])]
    by_hand = [math.log1p(math.exp(-1.0)), math.log1p(math.exp(0.5))]
    assert dpo_loss(*given, beta=0.5).tolist() == pytest.approx(by_hand, abs=1e-6)


def test_dpo_gradient_by_hand() -> None:
    """d loss / d log p(y+) = -beta sigmoid(-beta margin), and its negative for y-."""
    chosen, rejected = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (-1.0, -3.0))
    dpo_loss(chosen, rejected, torch.tensor([-2.0]), torch.tensor([-2.0]), 0.5).sum().backward()
    expected = 0.5 / (1 + math.exp(1.0))
    assert chosen.grad is not None and rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-expected, expected), abs=1e-6)


def test_the_first_preference_loss_is_log_two(lm: LM) -> None:
    """Model and reference are the same before the first step, so every margin is 0."""
    said: list[str] = []
    preference(lm, [(p, c, "du") for p, c in ROWS], lr=1e-4, batch=4, progress=said.append)
    assert said == [f"preference, epoch 1/1: loss {math.log(2):.4f}"]


# what training does


def test_sft_learns_its_rows_and_nothing_else_changes(lm: LM) -> None:
    before, state = weights(lm), torch.get_rng_state()
    trained = sft(lm, ROWS, epochs=60, lr=1e-2, batch=2)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(lm), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    done = trained.generate([prompt for prompt, _ in ROWS], Sampling(max_new_tokens=6, temperature=0))
    assert [text.strip() for text in done.texts] == [text for _, text in ROWS]
    assert done.finish_reasons == ["stop"] * 4
    assert trained.name == "tiny-sft" and not any(p.requires_grad for p in trained.model.parameters())


def test_preference_widens_the_margin_it_is_given(lm: LM) -> None:
    rows = [(prompt, text, "so so") for prompt, text in ROWS]
    trained = preference(lm, rows, beta=0.1, epochs=10, lr=1e-3)

    def margin(model: LM) -> torch.Tensor:
        prompts, chosen, rejected = zip(*rows, strict=True)
        good, bad = encode(lm, prompts, chosen), encode(lm, prompts, rejected)
        with torch.no_grad():
            return completion_logprobs(model.model, good) - completion_logprobs(model.model, bad)

    assert (margin(trained) > margin(lm) + 1).all()
    assert trained.name == "tiny-dpo"


def test_same_seed_same_bytes_other_seed_other_bytes(lm: LM) -> None:
    one, two, other = (sft(lm, ROWS, epochs=2, batch=2, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def test_tied_weights_stay_tied_and_bfloat16_comes_back() -> None:
    lm = LM(tiny_model(tied=True).to(torch.bfloat16), tiny_tokenizer(), "half")
    trained = sft(lm, ROWS, epochs=1)
    assert trained.unembedding.dtype == torch.bfloat16
    assert trained.model.get_input_embeddings().weight.data_ptr() == trained.unembedding.data_ptr()
    assert not torch.equal(trained.unembedding, lm.unembedding)


def test_what_it_costs(lm: LM) -> None:
    """Every row once an epoch; preference forwards both sides, and the reference once more."""
    meter = Cost()
    sft(lm, ROWS, epochs=3, meter=meter)
    tokens = sum(len(prompt.split()) + len(text.split()) + 1 for prompt, text in ROWS)
    assert meter.tokens == {"tiny": 3 * tokens} and meter.seconds > 0
    meter = Cost()
    preference(lm, [(p, c, "du") for p, c in ROWS], epochs=2, meter=meter)
    rejected = sum(len(prompt.split()) + 2 for prompt, _ in ROWS)
    assert meter.tokens == {"tiny": 3 * (tokens + rejected)}


def test_a_saved_model_is_the_same_model(lm: LM, tmp_path: Path) -> None:
    trained = sft(lm, ROWS, epochs=1)
    tuning.save(trained, tmp_path / "helper")
    loaded = LM.load(tmp_path / "helper", device="cpu")
    assert loaded.name == "helper" and loaded.eos_ids == trained.eos_ids
    sampling = Sampling(max_new_tokens=8, seed=1)
    assert loaded.generate(["ba da"], sampling).tokens == trained.generate(["ba da"], sampling).tokens


# bad input


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no rows to train on"),
        ([("ba", "")], {}, "row 0 has an empty completion"),
        ([("ba", "da"), ("", "da")], {}, "prompt 1 is empty"),
        ([("ba", "da"), ("ba " * 60, "da " * 10)], {}, "row 1 has 71 tokens.*context of 64"),
        (ROWS, {"epochs": 0}, "epochs and batch of 1 or more"),
        (ROWS, {"lr": 0.0}, "lr above 0"),
    ],
)
def test_bad_input_is_named(lm: LM, rows: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sft(lm, rows, **options)


def test_bad_preference_input_is_named(lm: LM) -> None:
    with pytest.raises(UsageError, match="beta must be above 0"):
        preference(lm, [("ba", "da", "du")], beta=0)
    with pytest.raises(UsageError, match="no rows"):
        preference(lm, [])
