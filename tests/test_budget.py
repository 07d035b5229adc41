"""`--budget`: knobs are sized to what answers really cost, and a row that cannot meet the budget says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tiny import tiny_lm
from trimtab import LM, Sampling
from trimtab.budget import Budget, Sized, _largest, _largest_whole, build_sized
from trimtab.errors import UsageError
from trimtab.policies import Workshop, check_policy, layers

PROMPTS = ["ba da fa la", "ma na", "pe", "ra sa ta be", "de fe"]


def reward(prompts: Sequence[Any], texts: Sequence[str]) -> list[int]:
    return [len(set(text.split())) + text.count("a") for text in texts]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


@pytest.fixture
def shop(lm: LM) -> Workshop:
    return Workshop(lm, reward, PROMPTS, Sampling(max_new_tokens=6))


@pytest.mark.parametrize(
    "text", ["tokens", "tokens=", "tokens=x", "tokens=0", "tokens=inf", "time=3", "kl=-1", "kl=nan"]
)
def test_a_broken_budget_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--budget is tokens=N"):
        Budget.parse(text)


# The search itself: spending known exactly.


@pytest.mark.parametrize("amount", [10, 11, 29, 30, 31, 100, 999.5, 5000])
@pytest.mark.parametrize("cost", [lambda n: 4 + 6 * n, lambda n: 3 * n**1.3 + 5, lambda n: 8 + n])
def test_the_largest_whole_number_within(cost: Any, amount: float) -> None:
    calls: list[int] = []

    def spent(n: int) -> float:
        calls.append(n)
        return cost(n)

    found, note = _largest_whole(spent, amount)
    if cost(1) > amount:
        assert found == 1 and "even at its least" in note
        return
    assert found is not None and cost(found) <= amount
    best = max(n for n in range(1, 1025) if cost(n) <= amount)
    assert found >= 0.97 * best - 1  # secants on a curve may stop just short of the largest
    assert len(calls) <= 12


def test_a_knob_that_costs_nothing_stays_as_it_is(shop: Workshop) -> None:
    """ARGS with a reward on text: more candidates are more reward calls, not more tokens."""
    assert _largest_whole(lambda n: 20.0, 100)[0] is None
    built, sized = build_sized(shop, "args", Budget("tokens", 100), PROMPTS)
    assert built.settings["k"] == 10 and sized.changes == {} and "does not rise" in sized.note


def test_the_largest_dial_within() -> None:
    value, note = _largest(lambda x: x**2, 0.3)
    assert 0.98 * 0.3**0.5 <= value <= 0.3**0.5 and not note
    assert _largest(lambda x: 1.0 if x else 0.0, 0.3) == (0.0, "takes more than the budget at any strength above 0")


# On policies.


def test_best_of_n_is_sized_by_what_it_forwards(shop: Workshop) -> None:
    one = shop.build("best-of-n:n=1").policy.generate(PROMPTS, shop.sampling).cost.tokens_forwarded / len(PROMPTS)
    built, sized = build_sized(shop, "best-of-n", Budget("tokens", 6 * one), PROMPTS)
    n = int(sized.changes["n"])
    assert built.settings["n"] == n and n >= 6  # the prompt is forwarded once: more than 6 answers fit
    spent = built.policy.generate(PROMPTS, shop.sampling).cost.tokens_forwarded / len(PROMPTS)
    assert spent <= 1.1 * 6 * one
    assert built.fit_tokens > 0
    record = sized.record(spent)
    assert record["met"] is True and record["changes"] == {"n": n}


def test_a_given_knob_stays_and_is_held_against_the_budget(shop: Workshop) -> None:
    built, sized = build_sized(shop, "best-of-n:n=4", Budget("tokens", 10), PROMPTS)
    assert built.settings["n"] == 4 and sized.changes == {} and sized.note == "n is given"
    assert sized.record(24.0)["met"] is False


def test_what_cannot_be_sized_says_so(shop: Workshop) -> None:
    _, sized = build_sized(shop, "static-re:rollouts=64,strength=1", Budget("tokens", 10), PROMPTS)
    assert "nothing to size" in sized.note
    _, sized = build_sized(shop, "best-of-n", Budget("tokens", 0.5), PROMPTS)
    assert sized.record(9.0) == {
        "kind": "tokens", "amount": 0.5, "changes": {"n": 1}, "spent": 9.0, "met": False,
        "note": "takes more than the budget even at its least",
    }  # fmt: skip
    assert Sized(Budget("kl", 0.1)).record(None)["note"] == "its KL from the base is not known"


def test_a_dial_is_sized_to_the_kl(shop: Workshop) -> None:
    built, sized = build_sized(shop, "args:select=sample,k=0", Budget("kl", 0.02), PROMPTS)
    assert sized.changes["weight"] > 0
    answers = built.policy.generate(PROMPTS, shop.sampling.but(samples=20))
    assert answers.kl is not None
    kl = sum(map(sum, answers.kl)) / sum(map(len, answers.kl))
    assert 0.005 < kl < 0.04  # the pilot's 5 answers and these 100 differ; unsized (weight 1) it is over 0.1


def test_best_of_n_is_sized_by_its_bound(shop: Workshop) -> None:
    built, sized = build_sized(shop, "best-of-n", Budget("kl", 0.15), PROMPTS)
    assert built.kl_bound is not None and built.kl_bound <= 0.15 * 6
    assert sized.changes["n"] > 1


# Nesting in a spec.


def test_layers() -> None:
    assert layers("best-of-n:n=2 over args:k=3 over base") == ["best-of-n:n=2", "args:k=3", "base"]
    assert layers("best-of-n:n=2") == ["best-of-n:n=2"]


def test_policies_nest_by_spec(shop: Workshop) -> None:
    built = shop.build("best-of-n:n=2 over args:k=3,weight=0.5")
    assert built.policy.policy.config.k == 3 and built.policy.config.n == 2  # type: ignore[attr-defined]
    assert built.settings == {
        "n": 2,
        "over": {"policy": "args:k=3,weight=0.5", **built.settings["over"]},
    }
    assert built.kl_bound is None  # best-of-n's bound is on the KL from ARGS
    assert len(built.policy.generate(PROMPTS[:2], shop.sampling).texts) == 2


@pytest.mark.parametrize("spec", ["base over best-of-n", "static-re over args", "model:path=pocket/chat over args"])
def test_what_works_on_the_model_itself_stands_over_nothing(spec: str) -> None:
    with pytest.raises(UsageError, match="works on the model itself"):
        check_policy(spec)


def test_a_token_level_method_refuses_whole_answers(shop: Workshop) -> None:
    with pytest.raises(UsageError, match="best-of-2 over args"):
        shop.build("args over best-of-n:n=2")
