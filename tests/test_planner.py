"""The planner: a table of situations written by hand, each with what must stay, what must go, and why."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from trimtab import catalogue
from trimtab.card import Card
from trimtab.cli import main
from trimtab.errors import UsageError
from trimtab.planner import Situation, access_of, exclusions, memory_needed, memory_of, plan, signals_of, size_of

PLAIN = Card(
    slug="plain", name="", paper="", summary="", goal="preference", stage="steer", mechanism="none",
    signal=("scalar reward",), access="hidden states", produces="decoder", needs=(), infer_multiplier="1",
    fit_cost="none", benefit_metrics=("reward",), cost_metrics=("kl_per_token",),
)  # fmt: skip
CARDS = {
    "plain": PLAIN,
    "full": replace(
        PLAIN, slug="full", stage="sft", signal=("demonstrations",), access="training", trainable="all", goal="instruction"
    ),
    "dpo": replace(PLAIN, slug="dpo", stage="preference", signal=("pairs",), access="training", trainable="all"),
    "lora": replace(PLAIN, slug="lora", stage="preference", signal=("pairs",), access="training", trainable="adapter"),
    "block": replace(PLAIN, slug="block", signal=("pairs", "scalar reward"), access="gradients", trainable="block"),
    "both": replace(PLAIN, slug="both", signal=("pairs", "scalar reward"), requires=("pairs", "scalar reward")),
    "best": replace(
        PLAIN, slug="best", stage="decode", access="black-box text", infer_multiplier="n", composes_with=("plain",)
    ),
    "vote": replace(
        PLAIN, slug="vote", stage="decode", signal=("own likelihood",), access="black-box text", goal="capability"
    ),
    "pair": replace(
        PLAIN, slug="pair", stage="decode", signal=("none",), access="logits", extra_models=1, goal="capability"
    ),
    "sure": replace(PLAIN, slug="sure", status=("implemented", "verified_cpu"), infer_multiplier="1 (and a few)"),
    "merge": replace(PLAIN, slug="merge", stage="merge", signal=("checkpoints",), access="weights", extra_models=2),
    "audit": replace(PLAIN, slug="audit", stage="audit", signal=("none",)),
}  # fmt: skip
R, P, D = ("scalar reward",), ("pairs",), ("demonstrations",)
B = 1e9


@pytest.mark.parametrize(
    ("situation", "kept", "gone", "why"),
    [
        (Situation(7 * B, 8 * B, D), "", "full", "weights 14.0, optimiser 84.0"),  # a full fine-tune of 7B on 8 GB
        (Situation(7 * B, 8 * B, R), "", "plain", "at hand are 8.0"),  # not even the weights
        (Situation(7 * B, 24 * B, R), "plain best", "dpo", "needs pairs"),
        (Situation(7 * B, 24 * B, P), "lora", "dpo", "optimiser 84.0"),
        (Situation(7 * B, 24 * B, (*P, *R)), "plain lora block both", "", ""),
        (Situation(70 * B, 80 * B, R), "", "plain", "weights 140.0"),
        (Situation(70 * B, 80 * B, R, dtype="int4"), "plain", "", ""),
        (Situation(7 * B, 24 * B), "vote", "pair", "weights 28.0"),  # two models do not fit
        (Situation(7 * B, 48 * B), "pair vote", "plain", "needs scalar reward"),
        # merging streams: several models of 70B on a device of 8 GB, but it needs them
        (Situation(70 * B, 8 * B, ("checkpoints",)), "merge", "plain", "needs scalar reward"),
        (Situation(7 * B, 24 * B, R), "plain", "merge", "needs checkpoints"),
        (Situation(signals=R, access="black-box text"), "best vote", "plain", "access to hidden states"),
        (Situation(signals=R, access="logits"), "best pair", "plain", "at hand is logits"),
        (Situation(signals=(*P, *R), access="hidden states"), "plain both", "block", "access to gradients"),
        (Situation(signals=P, access="gradients"), "block", "lora", "access to training"),
        (Situation(signals=P), "dpo lora block", "both", "needs scalar reward"),
        (Situation(signals=R), "plain best", "both", "needs pairs"),
        (Situation(signals=D), "full", "dpo", "needs pairs"),
        (Situation(), "vote pair", "full", "needs demonstrations"),
        (Situation(signals=R, stage="decode"), "best", "plain", "stage steer, not decode"),
        (Situation(stage="audit"), "audit", "vote", "stage decode, not audit"),
        (Situation(260e3, 1e9, (*P, *R, *D)), "full dpo lora both pair", "", ""),
    ],
)
def test_twenty_situations(situation: Situation, kept: str, gone: str, why: str) -> None:
    found = plan(situation, CARDS.values())
    chosen = {one.slug for one in found.chosen}
    assert {*kept.split()} <= chosen and not chosen & {*gone.split()}
    assert chosen.isdisjoint(found.excluded)
    if gone:
        assert why in "; ".join(found.excluded[gone])


def test_every_reason_is_given() -> None:
    reasons = exclusions(CARDS["full"], Situation(7 * B, 8 * B, R, "logits", stage="decode"))
    assert len(reasons) == 4 and [reason.split()[1] for reason in reasons] == ["belongs", "needs", "needs", "needs"]


def test_memory_is_the_sum_it_says() -> None:
    # 7e9 x 2 bytes, 12 bytes a trained parameter, a tenth of the weights and half a GB
    assert memory_needed(CARDS["full"], Situation(7 * B)) == pytest.approx(14e9 + 84e9 + 1.4e9 + 0.5e9)
    assert memory_needed(CARDS["pair"], Situation(7 * B, dtype="float32")) == pytest.approx(56e9 + 5.6e9 + 0.5e9)
    assert memory_needed(PLAIN, Situation()) is None


def test_the_order_is_goal_then_status_then_cost() -> None:
    cards = [CARDS[name] for name in ("best", "plain", "vote", "sure")]
    order = [one.slug for one in plan(Situation(signals=R, goal="preference"), cards).chosen]
    assert order == ["sure", "plain", "best", "vote"]
    assert plan(Situation(signals=R), cards).to_dict() == plan(Situation(signals=R), cards).to_dict()


def test_pipelines_put_decoding_outside() -> None:
    assert plan(Situation(signals=R), CARDS.values()).pipelines == ["best over plain"]


def test_words() -> None:
    assert (size_of("7B"), size_of("260K"), size_of("1.5e9")) == (7e9, 260e3, 1.5e9)
    assert (memory_of("24GB"), memory_of("512MB"), memory_of("80G"), memory_of("16GiB")) == (24e9, 512e6, 80e9, 16e9)
    assert signals_of("pairs, reward") == ("pairs", "scalar reward") and access_of("hidden-states") == "hidden states"
    assert access_of("text") == "black-box text"
    for wrong in (
        lambda: size_of("big"),
        lambda: memory_of("-1GB"),
        lambda: signals_of("piars"),
        lambda: access_of("x"),
    ):
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(UsageError, match="--model-size"):
        Situation(memory=1e9)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = "methods plan --model-size 7B --memory 24GB --signals pairs,reward --access hidden-states --goal preference"
    assert main([*words.split(), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    chosen = [one["slug"] for one in found["chosen"]]
    assert "natural-control" in chosen and "best-of-n over natural-control" in found["pipelines"]
    assert {*chosen, *found["excluded"]} == {card.slug for card in catalogue.cards() if card.stage != "audit"}
    assert main(words.split()) == 0 and "left out:" in capsys.readouterr().out
    assert main(["methods", "natural-control", "--memory", "8GB"]) == 2
    assert "goes with `trimtab methods plan`" in capsys.readouterr().err
