"""Nudging: its state machine by hand, its limits, its rule replayed on fresh forwards, and that it helps.

Scripted models are real tokenizers and sessions whose logits are a plan: what to write next, and how surely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from trimtab import LM, Cost, Sampling, pocket
from trimtab.decode.nudging import Nudging, NudgingConfig, without_repeated_end, words_of
from trimtab.errors import UsageError
from trimtab.guided import Guided
from trimtab.measure.stats import mean_interval, paired_difference
from trimtab.policy import Prompt

GREEDY = Sampling(max_new_tokens=40, temperature=0)
PROMPT = "Q: What is two plus two?\nA:"
# text so far -> what to write next ("" ends) and the probability of its first token
Plan = Callable[[str], tuple[str, float]]


class Scripted:
    """A model that follows a plan, behind the tokenizer of a real one."""

    def __init__(self, lm: LM, plan: Plan):
        self.lm, self.plan, self.name = lm, plan, f"scripted {lm.name}"

    def open(self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost) -> Guided:
        return ScriptedSession(self.lm.open(prompts, sampling, meter), prompts, self.plan)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = GREEDY) -> Any:
        raise NotImplementedError


class ScriptedSession(Guided):
    def __init__(self, inner: Any, asked: Sequence[Prompt], plan: Plan):
        super().__init__(inner, asked)
        self.plan = plan

    def guide(self, logits: torch.Tensor) -> torch.Tensor:
        out = []
        for answer in self.answers():
            text = self.lm.decode(answer)
            ahead, sure = self.plan(text)
            tokens = self.lm.tokenizer(text + ahead, add_special_tokens=False)["input_ids"] if ahead else []
            known = self.lm.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            token = tokens[len(known)] if ahead else min(self.lm.eos_ids)
            p = torch.full((logits.shape[-1],), (1 - sure) / (logits.shape[-1] - 1))
            p[token] = sure
            out.append(p.log())
        return torch.stack(out)


def follow(text: str, *pieces: tuple[str, float], otherwise: tuple[str, float] = ("", 1.0)) -> tuple[str, float]:
    """The plan to write the pieces one after another: what is left of the one that `text` stands in, and its sureness."""
    at = ""
    for piece, sure in pieces:
        if len(text) < len(at + piece) and (at + piece).startswith(text):
            return (at + piece)[len(text) :], sure
        at += piece
    return otherwise


def nudged(base: Plan, nudger: Plan, lms: tuple[LM, LM], **options: Any) -> Any:
    method = Nudging(Scripted(lms[0], base), Scripted(lms[1], nudger), **{"gamma": 0.4, "guard": False, **options})
    return method.generate([PROMPT], GREEDY)


@pytest.fixture(scope="module")
def models() -> dict[str, LM]:
    return {name: LM.load(f"pocket/{name}") for name in ("base", "chat", "nano")}


PAIRS = [("base", "base"), ("base", "nano"), ("nano", "base")]


@pytest.fixture(params=PAIRS, ids=["same tokens", "to nano", "from nano"])
def lms(request: pytest.FixtureRequest, models: dict[str, LM]) -> tuple[LM, LM]:
    return models[request.param[0]], models[request.param[1]]


# The state machine by hand, the same whatever the tokenizers.


LONG = " thing, my dear old friend, let us see what this question was about before we say more"  # over 16 tokens


def test_hand_trace(lms: tuple[LM, LM]) -> None:
    """Nudge a word, hand back where the base is sure, base until it is unsure, nudge to the nudger's end."""

    def base(text: str) -> tuple[str, float]:
        return follow(text, (" Sure", 0.1), (" the answer is", 0.9), otherwise=(" Hm", 0.2))

    def nudger(text: str) -> tuple[str, float]:
        if text.startswith(" Sure the"):
            return follow(text, (" Sure the answer is", 1), (" four", 1))
        return follow(text, (" Sure", 1), (LONG, 1))

    answers = nudged(base, nudger, lms)
    row = answers.telemetry[0]
    assert row["segments"] == [("nudge", " Sure"), ("base", " the answer is"), ("nudge", " four")]
    assert row["rounds"] == 2 and row["stop"] == "nudger ended"
    assert answers.texts == [" Sure the answer is four"] and answers.finish_reasons == ["stop"]


def test_a_nudger_that_ends_in_its_draft_ends_the_answer(lms: tuple[LM, LM]) -> None:
    """All of the draft is written, trailing words too, though the base would be sure."""
    answers = nudged(lambda text: (" no", 0.99), lambda text: follow(text, (" Yes, four.", 1)), lms)
    assert answers.telemetry[0]["segments"] == [("nudge", " Yes, four.")]


def test_agreement_hands_back_to_an_unsure_base(lms: tuple[LM, LM]) -> None:
    """u = 0.2 everywhere, but the base's next token begins the nudger's next word: it writes that token, no more."""
    said = " It is" + LONG

    def base(text: str) -> tuple[str, float]:
        return follow(text, (" It", 0.2), (" is", 0.2), otherwise=(" Hm", 0.2))

    def nudger(text: str) -> tuple[str, float]:
        return follow(text, (said, 1))

    answers = nudged(base, nudger, lms)
    assert answers.telemetry[0]["segments"][:2] == [("nudge", " It"), ("base", " is")]
    without = nudged(base, nudger, lms, agreement=False)
    assert {who for who, _ in without.telemetry[0]["segments"]} == {"nudge"}
    assert without.texts == answers.texts == [said]


def test_a_draft_of_one_word_is_all_nudge(lms: tuple[LM, LM]) -> None:
    answers = nudged(lambda text: (" no", 0.99), lambda text: follow(text, (" Yes it is", 1)), lms, draft=1)
    assert {who for who, _ in answers.telemetry[0]["segments"]} == {"nudge"}
    assert answers.texts == [" Yes it is"]


def test_the_end_of_the_base_is_not_the_end(lms: tuple[LM, LM]) -> None:
    """After " Yes it" the base would end, surely: that is no sureness, the nudger goes on. A line break divides no words."""

    def base(text: str) -> tuple[str, float]:
        return follow(text, (" Yes", 0.1), (" it", 0.9), otherwise=("", 1.0))

    def nudger(text: str) -> tuple[str, float]:
        if text.startswith(" Yes it"):
            return follow(text, (" Yes it is\n1.", 1), (LONG, 1))
        return follow(text, (" Yes", 1), (LONG, 1))

    segments = nudged(base, nudger, lms).telemetry[0]["segments"]
    assert segments[:2] == [("nudge", " Yes"), ("base", " it")]
    assert segments[2][0] == "nudge" and segments[2][1].startswith(" is\n1. thing,")


def test_the_same_nudge_again_and_again_ends_the_answer(models: dict[str, LM]) -> None:
    lms = models["base"], models["base"]
    answers = nudged(lambda text: (" Hm", 0.1), lambda text: (" no no", 1.0), lms, draft=2)
    assert answers.telemetry[0]["stop"] in ("repeated nudges", "length")
    assert answers.telemetry[0]["rounds"] < 40


# Parts.


def test_words() -> None:
    assert words_of("  Sure, here:\n\n1. two  spaces") == ("  ", ["Sure,", "here:\n\n1.", "two", "", "spaces"])
    assert words_of("word") == ("", ["word"])
    assert words_of("") == ("", [""])


def test_repeated_ends_are_cut() -> None:
    line = " the play was lovely, and so was the end."
    assert without_repeated_end("Yes." + line * 3) == "Yes." + line
    assert without_repeated_end("ha" * 10) == "ha" * 10  # under 30 characters
    assert without_repeated_end("") == ""


# Limits, on real models.


def test_never_sure_without_agreement_is_the_nudger(models: dict[str, LM]) -> None:
    prompts = pocket.prompts("test", 8, seed=1)
    for name in ("chat", "nano"):
        answers = Nudging(models["base"], models[name], gamma=1.01, agreement=False, guard=False).generate(
            prompts, GREEDY
        )
        alone = models[name].generate(prompts, GREEDY)
        assert answers.texts == alone.texts
        assert all(row["nudged"] == 1 for row in answers.telemetry)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.0])
def test_a_model_that_nudges_itself_is_its_greedy_self(models: dict[str, LM], gamma: float) -> None:
    prompts = pocket.prompts("test", 8, seed=2)
    for name in ("base", "nano"):
        lm = models[name]
        answers = Nudging(lm, lm, gamma=gamma, guard=False).generate(prompts, GREEDY)
        assert answers.texts == lm.generate(prompts, GREEDY).texts


def test_always_sure_is_one_word_and_then_the_base(models: dict[str, LM]) -> None:
    base, nano = models["base"], models["nano"]
    prompts = pocket.prompts("test", 8, seed=3)
    answers = Nudging(base, nano, gamma=0.0, guard=False).generate(prompts, GREEDY)
    handed = [(prompt, row) for prompt, row in zip(prompts, answers.telemetry, strict=True) if row["rounds"] > 1]
    assert len(handed) >= 4  # the nudger's draft ended the others
    for prompt, row in handed:
        (first, word), (second, rest) = row["segments"][:2]
        assert (first, second) == ("nudge", "base") and len(word.split()) == 1
        ids = base.encode([prompt])[0] + base.tokenizer(word, add_special_tokens=False)["input_ids"]
        session = base.session([ids])
        written: list[int] = []
        while (token := int(session.logits.argmax())) not in base.eos_ids and len(written) < 38:
            written.append(token)
            session.append(torch.tensor([token]))
        assert base.decode(written).startswith(rest) or rest.startswith(base.decode(written))


def test_one_forward_of_the_draft_equals_one_a_word(models: dict[str, LM]) -> None:
    prompts = pocket.prompts("test", 24, seed=4)
    for gamma in (0.3, 0.6, 0.9):
        fast, slow = (
            Nudging(models["base"], models["chat"], gamma=gamma, fast=fast).generate(prompts, GREEDY)
            for fast in (True, False)
        )
        assert fast.texts == slow.texts
        assert [row["segments"] for row in fast.telemetry] == [row["segments"] for row in slow.telemetry]


def test_a_batch_equals_singles(models: dict[str, LM]) -> None:
    prompts = pocket.prompts("test", 6, seed=5)
    method = Nudging(models["base"], models["nano"], gamma=0.5)
    together = method.generate(prompts, GREEDY)
    assert together.texts == [method.generate([prompt], GREEDY).texts[0] for prompt in prompts]


def test_the_rule_holds_on_fresh_forwards(models: dict[str, LM]) -> None:
    """Replayed without a cache: every base token is sure or an agreement; every later nudge begins where it is not."""
    base, gamma = models["base"], 0.5
    prompts = pocket.prompts("test", 24, seed=6)
    answers = Nudging(base, models["nano"], gamma=gamma, guard=False).generate(prompts, GREEDY)
    checked = {"base": 0, "nudge": 0}
    for prompt, row in zip(prompts, answers.telemetry, strict=True):
        text, before = "", ""
        for number, (who, segment) in enumerate(row["segments"]):
            start = base.encode([prompt])[0] + base.tokenizer(text, add_special_tokens=False)["input_ids"]
            whole = base.encode([prompt])[0] + base.tokenizer(text + segment, add_special_tokens=False)["input_ids"]
            if whole[: len(start)] == start:
                p = base.model(torch.tensor([whole])).logits[0].softmax(-1).max(-1)
                tops = p.values[len(start) - 1 : -1].tolist()
                if who == "base":  # the first may be an agreement
                    assert all(top >= gamma - 1e-5 for top in tops[1:])
                    checked["base"] += len(tops)
                elif number and before == "base" and int(p.indices[len(start) - 1]) not in base.eos_ids:
                    assert tops[0] < gamma + 1e-5
                    checked["nudge"] += 1
            text, before = text + segment, who
        assert text == answers.texts[prompts.index(prompt)] or row["stop"] == "length"
    assert checked["base"] > 100 and checked["nudge"] > 10


# What it costs, what it refuses.


def test_cost_and_horizon(models: dict[str, LM]) -> None:
    prompts = pocket.prompts("test", 4, seed=8)
    answers = Nudging(models["base"], models["nano"]).generate(prompts, GREEDY.but(max_new_tokens=5, samples=2))
    assert len(answers) == 8 and all(len(row) <= 5 for row in answers.tokens)
    assert set(answers.cost.tokens) == {"pocket/base", "pocket/nano"}
    none = Nudging(models["base"], models["nano"]).generate(prompts, GREEDY.but(max_new_tokens=0))
    assert none.texts == [""] * 4


def test_drawn_answers_repeat_with_their_seed(models: dict[str, LM]) -> None:
    prompts = pocket.prompts("test", 4, seed=9)
    method = Nudging(models["base"], models["nano"], select="sample")
    one, two, other = (method.generate(prompts, Sampling(40, 1.0, seed=seed)).texts for seed in (1, 1, 2))
    assert one == two != other


@pytest.mark.parametrize(
    "options", [{"gamma": -0.1}, {"gamma": float("nan")}, {"gamma": 1.5}, {"draft": 0}, {"random_handback": 2.0}]
)
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        NudgingConfig(**options)  # type: ignore[arg-type]


def test_the_nudged_base_is_better_than_the_base(models: dict[str, LM]) -> None:
    """96 questions, greedy, gold judge, paired by prompt."""
    prompts = pocket.prompts("test", 96, seed=10)

    def gold(answers: Any) -> list[float | None]:
        return [pocket.judge(str(p), t).score for p, t in zip(answers.prompts, answers.texts, strict=True)]

    base = gold(models["base"].generate(prompts, GREEDY))
    answers = Nudging(models["base"], models["nano"], gamma=0.3).generate(prompts, GREEDY)
    better = paired_difference(gold(answers), base)
    assert better.low is not None and better.low > 0
    share = mean_interval([row["nudged"] for row in answers.telemetry]).mean
    assert share is not None and 0.1 < share < 0.8
