"""trimtab's attention equals transformers' sdpa, and is given only to models that trimtab loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recompute import PROMPTS, recompute
from tiny import ARCHITECTURES, tiny_lm, tiny_model, tiny_tokenizer
from trimtab import LM, Sampling, attention


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_loaded_model_answers_as_the_stock_one(arch: str, tmp_path: Path) -> None:
    """Greedy tokens, log-probabilities and states after ragged appends, forks and drops: 1e-5 in float32."""
    stock = tiny_lm(arch)
    stock.model.save_pretrained(tmp_path)
    stock.tokenizer.save_pretrained(tmp_path)
    loaded = LM(LM.load(tmp_path).model, stock.tokenizer)
    uses = loaded.model.config._attn_implementation == attention.NAME
    assert uses == (arch != "gemma2")  # its soft-capping keeps it on eager attention
    assert stock.model.config._attn_implementation != attention.NAME
    sampling = Sampling(max_new_tokens=12, seed=1)
    a, b = stock.generate(PROMPTS, sampling), loaded.generate(PROMPTS, sampling)
    assert a.tokens == b.tokens
    for ours, theirs in zip(b.logprobs, a.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=1e-5)
    for end in ([10, 11], [12]), ([13], [14]):
        session = loaded.session([[5, 6, 7], [8]])
        session.append([[9], [9, 9, 9]])
        session.append(torch.tensor([20, 21]))
        session.append([list(row) for row in end])
        rows = [[5, 6, 7, 9, 20, *end[0]], [8, 9, 9, 9, 21, *end[1]]]
        assert session.tokens == rows
        for hidden, (_, expected) in zip(session.hidden, recompute(stock, rows), strict=True):
            torch.testing.assert_close(hidden, expected[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "float", "by head"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_the_function_equals_sdpa(heads: tuple[int, int], mask: str, queries: int, scaling: float | None) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    query, key, value = normal(3, heads[0], queries, 8), normal(3, heads[1], 7, 8), normal(3, heads[1], 7, 8)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = heads[0] // heads[1], False  # type: ignore[assignment]
    seen = torch.ones(3, heads[0] if mask == "by head" else 1, queries, 7, dtype=torch.bool)
    seen[1, :, :, :4] = False
    given = {"none": None, "float": attention.additive(seen, torch.float32)}.get(mask, seen)
    ours, _ = attention.single_query_attention(module, query, key, value, given, scaling=scaling)
    keys, values = (tensor.repeat_interleave(heads[0] // heads[1], 1) for tensor in (key, value))
    exact = torch.nn.functional.scaled_dot_product_attention(query, keys, values, given, scale=scaling)
    torch.testing.assert_close(ours, exact.transpose(1, 2), atol=1e-6, rtol=1e-6)


def test_a_model_given_by_the_user_keeps_its_attention() -> None:
    model = tiny_model()
    before = model.config._attn_implementation
    LM(model, tiny_tokenizer()).generate(PROMPTS, Sampling(max_new_tokens=3))
    assert model.config._attn_implementation == before == "sdpa"


def test_a_saved_model_does_not_name_it(tmp_path: Path) -> None:
    model = tiny_model()
    attention.adopt(model)
    assert model.config._attn_implementation == attention.NAME
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(("arch", "ready"), [("llama", True), ("gpt2", True), ("mistral", False), ("gemma3", False)])
def test_sliding_windows_are_left_to_the_model(arch: str, ready: bool) -> None:
    model = tiny_model(arch)
    assert not attention.takes_ready_mask(model)
    attention.adopt(model)
    assert attention.takes_ready_mask(model) == ready
