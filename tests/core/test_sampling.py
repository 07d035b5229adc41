"""`Sampling` and `draw`: transformers' own rules, exact inverse-CDF draws, prefix-stable random numbers."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from trimtab import Sampling
from trimtab.errors import UsageError
from trimtab.sampling import derive_seed, draw, uniforms


@pytest.mark.parametrize("vocabulary", [7, 256, 1000, 5000])
def test_an_even_grid_of_uniforms_draws_every_token_its_share(vocabulary: int) -> None:
    """Exact: of N evenly spaced numbers, token v gets N p(v) of them, give or take one."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 2
    logits[3] = -torch.inf
    logprobs, count = logits.log_softmax(-1), min(20_000, 4_000_000 // vocabulary)
    drawn = draw(logprobs.expand(count, -1), (torch.arange(count, dtype=torch.float64) + 0.5) / count)
    counts = drawn.bincount(minlength=vocabulary).double()
    assert float((counts - logprobs.double().exp() * count).abs().max()) <= 1.1
    assert counts[3] == 0
    assert torch.equal(drawn, drawn.sort().values)


def test_draws_at_the_ends_have_probability() -> None:
    logprobs = torch.full((2, 600), -torch.inf)
    logprobs[:, 300:310] = torch.zeros(10).log_softmax(-1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logprobs, ends).tolist() == [300, 309]


def test_one_possible_token_is_always_drawn() -> None:
    logprobs = torch.full((64, 300), -torch.inf)
    logprobs[torch.arange(64), torch.arange(64) * 4] = 0
    assert draw(logprobs, uniforms(64, 1, 0)[:, 0]).tolist() == (torch.arange(64) * 4).tolist()


def test_draws_of_a_row_do_not_depend_on_other_rows() -> None:
    logprobs = torch.randn(50, 700, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    uniform = uniforms(50, 1, 3)[:, 0]
    together = draw(logprobs, uniform).tolist()
    assert together == [int(draw(logprobs[i : i + 1], uniform[i : i + 1])) for i in range(50)]


def test_rows_of_uniforms_do_not_depend_on_how_many_follow() -> None:
    assert torch.equal(uniforms(3, 20, seed=4), uniforms(500, 20, seed=4)[:3])
    assert not torch.equal(uniforms(3, 20, seed=4), uniforms(3, 20, seed=5))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"temperature": 1.4, "top_k": 9, "top_p": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_distributions_are_those_of_transformers(settings: dict[str, float], penalty: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, seen = torch.randn(4, 40, generator=generator), torch.randint(0, 40, (4, 6), generator=generator)
    steps = [tf.RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else []
    for key, build in (
        ("temperature", tf.TemperatureLogitsWarper),
        ("top_k", tf.TopKLogitsWarper),
        ("top_p", tf.TopPLogitsWarper),
        ("min_p", tf.MinPLogitsWarper),
    ):
        steps += [build(settings[key])] if key in settings else []
    expected = tf.LogitsProcessorList(steps)(seen, logits.clone()).log_softmax(-1)
    ours = Sampling(repetition_penalty=penalty, **settings).logprobs(logits, seen)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    assert Sampling(repetition_penalty=penalty, **settings).is_softmax == (
        set(settings) <= {"temperature"} and penalty == 1
    )  # type: ignore[arg-type]


def test_greedy_puts_all_mass_on_the_highest_logit() -> None:
    logprobs = Sampling(temperature=0).logprobs(torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]]))
    assert logprobs.exp().tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": -1}, {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"samples": 0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.0}, {"repetition_penalty": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**settings)  # type: ignore[arg-type]


def test_derived_seeds_are_stable_and_distinct() -> None:
    assert derive_seed(0, "fit", 3) == derive_seed(0, "fit", 3)
    seeds = {derive_seed(seed, name, index) for seed in range(5) for name in ("a", "b") for index in range(5)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)
