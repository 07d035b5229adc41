"""KL from the base against brute force from logits, on random models and, for whole answers, by enumeration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from oracles.toy import Toy
from recompute import PROMPTS, recompute
from tiny import WORDS, tiny_lm, tiny_tokenizer
from trimtab import LM, Control, Sampling, Steered
from trimtab.control import Controls, FunctionControl
from trimtab.decode import BestOfN
from trimtab.divergence import divergences, kl_between, same_tokens
from trimtab.errors import UsageError


class BlockPush(Control):
    """Adds a vector to the output of the first block, at every position."""

    name, final = "block push", False

    def __init__(self, size: float = 0.7):
        self.vector = size * torch.randn(32, generator=torch.Generator().manual_seed(9))

    def hooks(self, model: Any, positions: str) -> Iterator[Any]:
        def push(_module: Any, _inputs: Any, output: Any) -> Any:
            return (output[0] + self.vector, *output[1:]) if isinstance(output, tuple) else output + self.vector

        yield model.base_model.layers[0].register_forward_hook(push)


def push(size: float = 0.7, width: int = 32) -> Control:
    vector = size * torch.randn(width, generator=torch.Generator().manual_seed(0))
    return FunctionControl(lambda hidden: hidden + vector * (1 + hidden.tanh()))


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


@pytest.fixture(scope="module")
def other() -> LM:
    """The same words, other weights."""
    return tiny_lm(seed=1, name="other")


@pytest.fixture(scope="module")
def answers(lm: LM) -> list[list[int]]:
    """Ragged: up to 12 tokens each."""
    done = lm.generate(PROMPTS, Sampling(max_new_tokens=12))
    return [row[: 4 + 2 * number] for number, row in enumerate(done.tokens)]


def answer_logits(lm: LM, answers: list[list[int]], control: Control | None = None) -> list[torch.Tensor]:
    """Logits [T, V] at every answer token by the model's own forward of whole rows, edited by `control`."""
    rows = [[*prompt, *answer] for prompt, answer in zip(lm.encode(PROMPTS), answers, strict=True)]
    out = []
    for (_, states), answer in zip(recompute(lm, rows), answers, strict=True):
        at = states[len(states) - len(answer) - 1 : -1]
        out.append(lm.head(at if control is None else control.edit(at)))
    return out


def brute(p: torch.Tensor, q: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """sum_a p_a log(p_a / q_a) of the softmax of logits / temperature, in float64."""
    p, q = (x.double().div(temperature).softmax(-1) for x in (p, q))
    return (p * (p / q).log()).sum(-1)


def assert_close(policy: Any, lm: LM, answers: list[list[int]], ours: list[torch.Tensor], temperature: float) -> None:
    """kl and base_logprobs of `divergences` against logits [T, V] of the policy and of the base."""
    found = divergences(policy, lm, PROMPTS, answers, Sampling(temperature=temperature))
    assert [len(one.kl) for one in found] == [len(answer) for answer in answers]
    for one, mine, base, answer in zip(found, ours, answer_logits(lm, answers), answers, strict=True):
        assert one.kl.double() == pytest.approx(brute(mine, base, temperature), abs=1e-6, rel=2e-6)  # float32
        assert float(one.kl.max()) > 0.01
        picked = base.double().log_softmax(-1)[torch.arange(len(answer)), answer]
        assert one.base_logprobs.double() == pytest.approx(picked, abs=1e-5)  # at temperature 1 whatever the sampling


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_an_edit_of_the_final_state(lm: LM, answers: list[list[int]], temperature: float) -> None:
    control = push()
    ours = answer_logits(lm, answers, control)
    assert_close(Steered(lm, control), lm, answers, ours, temperature)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_an_edit_inside_the_blocks(lm: LM, answers: list[list[int]], temperature: float) -> None:
    control = BlockPush()
    with control.attached(lm.model, positions="all"):
        ours = answer_logits(lm, answers)
    assert_close(Steered(lm, control), lm, answers, ours, temperature)


def test_edits_inside_and_at_the_end(lm: LM, answers: list[list[int]]) -> None:
    inside, final = BlockPush(), push()
    with inside.attached(lm.model, positions="all"):
        ours = answer_logits(lm, answers, final)
    assert_close(Steered(lm, Controls([inside, final])), lm, answers, ours, 1.0)


def test_another_model(lm: LM, other: LM, answers: list[list[int]]) -> None:
    assert_close(other, lm, answers, answer_logits(other, answers), 0.8)
    control = push()
    assert_close(Steered(other, control), lm, answers, answer_logits(other, answers, control), 1.0)


def test_greedy_is_compared_at_temperature_1(lm: LM, answers: list[list[int]]) -> None:
    """A greedy policy has no distribution of its own; the figure is that of the softmax it takes the top of."""
    policy = Steered(lm, push())
    at = [divergences(policy, lm, PROMPTS, answers, Sampling(temperature=t)) for t in (0, 1)]
    assert all(torch.equal(a.kl, b.kl) for a, b in zip(*at, strict=True))


def test_the_base_is_at_0_from_itself(lm: LM, answers: list[list[int]]) -> None:
    same = tiny_lm()
    still = FunctionControl(lambda hidden: hidden)
    for policy in (lm, same, Steered(lm, still), Steered(same, still)):
        found = divergences(policy, lm, PROMPTS, answers, Sampling(temperature=0.7))
        assert all(torch.equal(one.kl, torch.zeros(len(one.kl))) for one in found)
    # forwarded in two parts, prompt and answer, so the last bits of the states differ
    for one in divergences(Steered(lm, BlockPush(0.0)), lm, PROMPTS, answers, Sampling()):
        assert float(one.kl.max()) < 1e-6


def test_summed_over_answers_it_is_the_kl_of_whole_answers() -> None:
    """E over the policy's answers of the sum over tokens is KL(policy || base) of whole answers, by enumeration."""
    toy = Toy()
    control = push(0.8, 16)
    edited = toy.logprobs(control.edit(toy.states))
    prompts = [toy.prompt] * len(toy.answers)
    found = divergences(Steered(toy.lm, control), toy.lm, prompts, toy.answers, toy.sampling)
    chances = toy.answer_probabilities(edited)
    total = sum(p * float(one.kl.sum()) for p, one in zip(chances.tolist(), found, strict=True))
    assert total == pytest.approx(toy.evaluate(edited).kl, rel=1e-4)
    below = sum(p * float(one.base_logprobs.sum()) for p, one in zip(chances.tolist(), found, strict=True))
    assert below == pytest.approx(float((chances * toy.answer_probabilities().log()).sum()), rel=1e-4)


def test_an_empty_answer_has_no_token_to_compare(lm: LM) -> None:
    for control in (push(), BlockPush()):
        one, two = divergences(Steered(lm, control), lm, PROMPTS[:2], [[], [7]], Sampling())
        assert one.kl.shape == one.base_logprobs.shape == (0,) and two.kl.shape == (1,)


def test_excluded_tokens() -> None:
    half, whole = torch.tensor([0.0, -math.inf]), torch.tensor([0.5, 0.5]).log()
    assert kl_between(half, whole).item() == pytest.approx(math.log(2))
    assert kl_between(whole, half).item() == math.inf
    assert kl_between(half, half).item() == 0.0


# which policies have one


def words_in_another_order() -> LM:
    """As many tokens as `tiny_lm`, of which each word has another number."""
    tokenizer = tiny_tokenizer()
    raw = tokenizer.backend_tokenizer
    vocab = tokenizer.get_vocab()
    turned = dict(zip(WORDS, [*WORDS[1:], WORDS[0]], strict=True))
    raw.model = type(raw.model)({turned.get(word, word): number for word, number in vocab.items()}, unk_token="<unk>")
    return tiny_lm(tokenizer=tokenizer, name="turned")


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("kind", ["another size", "the same size"])
def test_another_vocabulary_is_refused(lm: LM, answers: list[list[int]], kind: str, steered: bool) -> None:
    foreign = tiny_lm(tokenizer=tiny_tokenizer("byte")) if kind == "another size" else words_in_another_order()
    policy = Steered(foreign, push()) if steered else foreign
    assert (foreign.vocab_size == lm.vocab_size) == (kind == "the same size")
    assert not same_tokens(policy, lm)
    with pytest.raises(UsageError, match="different vocabularies"):
        divergences(policy, lm, PROMPTS, answers, Sampling())


def test_a_policy_without_a_distribution_is_refused(lm: LM, answers: list[list[int]]) -> None:
    best = BestOfN(lm, "length:target=3", 4)
    with pytest.raises(UsageError, match="best-of-4 has no next-token distribution"):
        divergences(best, lm, PROMPTS, answers, Sampling())


def test_whose_tokens_a_policy_draws(lm: LM, other: LM) -> None:
    foreign = tiny_lm(tokenizer=tiny_tokenizer("byte"))
    mine = [
        lm,
        other,
        Steered(lm, push()),
        BestOfN(other, "length:target=3"),
        BestOfN(Steered(other, push()), "sentiment"),
    ]
    assert all(same_tokens(policy, lm) for policy in mine)
    assert not same_tokens(BestOfN(Steered(foreign, push()), "length:target=3"), lm)
    assert not same_tokens(object(), lm)
