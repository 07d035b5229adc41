"""From one-line specs to policies: what is fitted, what is shared, what is refused before any work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_lm
from trimtab import LM, Sampling, Steered, policies
from trimtab.decode import BestOfN
from trimtab.errors import UsageError
from trimtab.policies import Workshop, check_policy, input_digest
from trimtab.run import RunDirectory
from trimtab.steer import ReControl, StaticRE

PROMPTS = ["ba da fa la", "ma na", "pe", "ra sa ta be", "de fe"]
SAMPLING = Sampling(max_new_tokens=6)
QUICK = "rollouts=64,strength=1"
VALUE = "rollouts=64,epochs=1,steps=2,width=8"


def reward(prompts: Sequence[Any], texts: Sequence[str]) -> list[int]:
    return [len(set(text.split())) + text.count("a") for text in texts]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often rollouts were drawn and each method learnt."""
    count = {"collect": 0, "static-re": 0, "re-control": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            count[name] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(policies, "collect", counted("collect", policies.collect))
    for cls in (StaticRE, ReControl):
        learn = counted(cls.slug, cls.learn.__func__)  # type: ignore[attr-defined]
        monkeypatch.setattr(cls, "learn", classmethod(learn))
    yield count


def workshop(lm: LM, run: RunDirectory | None = None, **changes: Any) -> Workshop:
    return Workshop(lm, **{"reward": reward, "prompts": PROMPTS, "sampling": SAMPLING, "run": run, **changes})


# what is built


def test_base_and_best_of_n(lm: LM) -> None:
    shop = workshop(lm)
    base, best = shop.build("base"), shop.build("best-of-n:n=3")
    assert base.policy is lm and (base.name, base.family, base.settings) == ("base", "base", {})
    assert isinstance(best.policy, BestOfN) and best.policy.policy is lm
    assert (best.name, best.family, best.settings) == ("best-of-n:n=3", "best-of-n", {"n": 3})
    assert best.kl_bound == best.policy.kl_bound > 0
    assert (best.fit_seconds, best.fit_tokens, best.controller) == (0.0, 0, None)


def test_a_steered_policy_has_all_its_settings_and_what_the_fit_took(lm: LM) -> None:
    one = workshop(lm).build(f"static-re:{QUICK},ridge=0.5")
    assert isinstance(one.policy, Steered) and one.policy.control is one.controller
    assert one.settings == {
        "rollouts": 64, "states": "prompt", "ridge": 0.5, "seed": 0, "strength": 1.0, "kl_target": 0.1
    }  # fmt: skip
    assert one.fit_seconds > 0 and one.fit_tokens >= 64 * 6


def test_another_model(lm: LM, tmp_path: Path) -> None:
    for part in (lm.model, lm.tokenizer):
        part.save_pretrained(tmp_path / "other")
    one = workshop(lm).build(f"model:path={tmp_path / 'other'}")
    assert one.family == "model" and one.settings == {"path": str(tmp_path / "other")}
    assert one.policy.generate(PROMPTS, SAMPLING).tokens == lm.generate(PROMPTS, SAMPLING).tokens


# what is shared


def test_policies_that_differ_in_decoding_alone_share_one_fit(lm: LM, calls: dict[str, int]) -> None:
    shop = workshop(lm)
    one, two = (shop.build(f"static-re:rollouts=64,strength={strength}") for strength in (1, 3))
    tuned = shop.build("static-re:rollouts=64,kl_target=0.02")
    assert calls == {"collect": 1, "static-re": 1, "re-control": 0}
    assert [c.controller.strength for c in (one, two)] == [1.0, 3.0]  # type: ignore[union-attr]
    assert all(c.controller.direction is one.controller.direction for c in (two, tuned))  # type: ignore[union-attr]
    assert tuned.settings["strength"] not in (None, 1.0, 3.0)
    assert two.fit_tokens == one.fit_tokens < tuned.fit_tokens  # the tuner's tokens are charged to it alone


def test_other_fits_share_the_rollouts_and_each_is_charged_for_them(lm: LM, calls: dict[str, int]) -> None:
    shop = workshop(lm)
    built = [shop.build(f"static-re:{QUICK}"), shop.build(f"static-re:{QUICK},ridge=0.5")]
    built += [shop.build(f"re-control:{VALUE},step_size={size}") for size in (0.1, 0.5)]
    assert calls == {"collect": 1, "static-re": 2, "re-control": 1}
    alone = workshop(lm).build(f"re-control:{VALUE},step_size=0.1")
    assert calls["collect"] == 2
    assert {one.fit_tokens for one in [*built, alone]} == {built[0].fit_tokens}
    shop.build("static-re:rollouts=32,strength=1")
    assert calls["collect"] == 3  # another number of rollouts is another draw


def test_a_shared_fit_is_the_fit_it_would_have_been_alone(lm: LM) -> None:
    shop = workshop(lm)
    shop.build(f"re-control:{VALUE},step_size=0.1")
    after = shop.build(f"static-re:{QUICK}").policy.generate(PROMPTS, SAMPLING)
    alone = workshop(lm).build(f"static-re:{QUICK}").policy.generate(PROMPTS, SAMPLING)
    assert after.tokens == alone.tokens and after.logprobs == alone.logprobs


def test_a_resumed_run_fits_nothing_again(lm: LM, tmp_path: Path, calls: dict[str, int]) -> None:
    specs = [f"static-re:{QUICK}", f"re-control:{VALUE},step_size=0.1"]

    def answers() -> list[list[list[int]]]:
        with RunDirectory.open(tmp_path / "run", "compare", {}) as run:
            built = [workshop(lm, run).build(spec) for spec in specs]
        spent.append([(one.fit_seconds, one.fit_tokens, one.settings) for one in built])
        return [one.policy.generate(PROMPTS, SAMPLING).tokens for one in built]

    spent: list[Any] = []
    first = answers()
    before = dict(calls)
    assert answers() == first and calls == before and spent[0] == spent[1]
    assert len(list((tmp_path / "run" / "fits").glob("*/controller.json"))) == 2


# saved controllers


@pytest.fixture(scope="module")
def saved(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    controller = workshop(lm).build(f"static-re:{QUICK}").controller
    assert controller is not None
    return controller.save_pretrained(folder / "mine")


def test_a_saved_controller_is_used_as_it_is(lm: LM, saved: Path, calls: dict[str, int]) -> None:
    shop = workshop(lm)
    one = shop.build(f"static-re:controller={saved}")
    louder = shop.build(f"static-re:strength=4,controller={saved}")
    assert set(calls.values()) == {0}
    assert (one.settings["strength"], louder.settings["strength"]) == (1.0, 4.0)
    assert one.fit_tokens > 0  # it was fitted once, and that is said
    fresh = workshop(lm).build(f"static-re:{QUICK}").policy.generate(PROMPTS, SAMPLING)
    assert one.policy.generate(PROMPTS, SAMPLING).tokens == fresh.tokens


def test_the_digest_of_an_input_changes_with_it(lm: LM, saved: Path, tmp_path: Path) -> None:
    spec = f"static-re:controller={saved}"
    before = input_digest(spec)
    workshop(lm).build(f"{spec},strength=2").controller.save_pretrained(tmp_path)  # type: ignore[union-attr]
    assert before == input_digest(spec) != input_digest(f"static-re:controller={tmp_path}")
    assert [input_digest(one) for one in ("base", "best-of-n", "static-re", "model:path=some/hub-id")] == [None] * 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("re-control:controller={saved}", "holds a static-re controller, not re-control"),
        ("static-re:ridge=1,controller={saved}", "unknown decoding option of a saved controller 'ridge'"),
        ("static-re:strenght=1,controller={saved}", "did you mean 'strength'"),
        ("static-re:strength=x,controller={saved}", "strength='x' is not a number"),
        ("static-re:strength=-1,controller={saved}", "strength must be 0 or more"),
        ("static-re:controller={saved}/absent", "is not a controller"),
    ],
)
def test_a_controller_that_does_not_fit_is_refused(lm: LM, saved: Path, spec: str, message: str) -> None:
    for refuse in (lambda text: check_policy(text, lm), workshop(lm).build):
        with pytest.raises(UsageError, match=message):
            refuse(spec.format(saved=saved))


def test_a_controller_of_another_model_is_refused(saved: Path) -> None:
    for other, message in ((tiny_lm(seed=1), "made for tiny .weights"), (tiny_lm(hidden_size=16), "hidden size 32")):
        with pytest.raises(UsageError, match=message):
            check_policy(f"static-re:controller={saved}", other)


# what is refused


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("best-of-m", "unknown policy 'best-of-m'; did you mean 'best-of-n'"),
        ("natural_control", "did you mean 'natural-control'"),
        ("best-of-n:m=3", "unknown key of policy 'best-of-n' 'm'"),
        ("best-of-n:n=two", "n='two' is not a whole number"),
        ("best-of-n:n=0", "n must be 1 or more"),
        ("re-control:stepsize=1", "did you mean 'step_size'"),
        ("static-re:states=some", "states='some' is not one of prompt, all"),
        ("static-re:kl_target=0", "kl_target above 0"),
        ("static-re:strength", "is not key=value"),
        ("base:n=2", "unknown key of policy 'base' 'n'"),
        ("model", "needs path"),
        ("model:folder=x", "unknown key of policy 'model' 'folder'"),
        ("model:path=./absent", "there is no model folder './absent'"),
        ("model:path=pocket/bse", "did you mean 'base'"),
        ("", "has no name"),
    ],
)
def test_what_cannot_be_built_is_refused_without_a_model(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_policy(spec)


def test_what_can_be_built_passes(saved: Path) -> None:
    for spec in ("base", "best-of-n:n=2", "static-re", "model:path=pocket/chat", f"static-re:controller={saved}"):
        check_policy(spec)


def test_fewer_than_a_handful_of_prompts_is_refused(lm: LM) -> None:
    with pytest.raises(UsageError, match="3 prompts are too few to fit on"):
        workshop(lm, prompts=PROMPTS[:3]).build(f"static-re:{QUICK}")


def test_a_reward_with_nothing_to_learn_is_refused(lm: LM) -> None:
    with pytest.raises(UsageError, match="gives every answer 1"):
        workshop(lm, reward=lambda prompts, texts: [1.0] * len(texts)).build(f"static-re:{QUICK}")
