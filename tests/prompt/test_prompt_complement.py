"""Prompt complements: the user's words byte for byte, why a complement is not used, cost to the token, making a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny import CHAT, tiny_lm, tiny_tokenizer
from trimtab import LM, Completions, Cost, Sampling
from trimtab.decode.best_of_n import BestOfN
from trimtab.divergence import divergences, kl_between
from trimtab.errors import UsageError
from trimtab.measure.stats import Interval
from trimtab.parts import Parts
from trimtab.policy import Prompt, prompt_text
from trimtab.prompt.complement_fit import Fitted, load, reward_critic, save, train
from trimtab.prompt.complement_place import INSTRUCTION, request, with_complement, words_of
from trimtab.prompt.complements import Ask, Pair
from trimtab.prompt.prompt_complement import Planned, PromptComplement, PromptComplementConfig
from trimtab.rewards import as_reward
from trimtab.sampling import derive_seed
from trimtab.stepping import answer_steps, steppable

PLAIN = Sampling(max_new_tokens=6)
BRIEF = "Give the place first, then how to find it."
QUESTIONS: list[Prompt] = ["Where is Rome?", "How do I bake bread?", "Who was Anna?"]
Answer = Callable[[str, int], str]  # (what was asked, seed) -> text


class Scripted:
    """A policy that answers by a function and keeps what it was asked; 5 tokens a prompt."""

    def __init__(self, answer: Answer = lambda asked, seed: asked, name: str = "F", finish: str = "stop"):
        self.answer, self.name, self.finish = answer, name, finish
        self.asked: list[Prompt] = []
        self.samplings: list[Sampling] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = PLAIN) -> Completions:
        self.asked += prompts
        self.samplings.append(sampling)
        each = sampling.samples
        texts = [self.answer(prompt_text(p), sampling.seed + i) for p in prompts for i in range(each)]
        n = len(texts)
        cost = Cost({self.name: 5 * len(prompts)})
        owners = [prompt for prompt in prompts for _ in range(each)]
        return Completions(owners, texts, [[1]] * n, [[0.0]] * n, [self.finish] * n, cost)


def brief(words: str) -> str:
    return BRIEF


def planned(policy: PromptComplement, prompts: Sequence[Prompt]) -> list[Planned]:
    return policy.plan(prompts, Cost())


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm(tokenizer=tiny_tokenizer("byte"), name="F", max_position_embeddings=512)


@pytest.fixture(scope="module")
def writer() -> LM:
    return tiny_lm(tokenizer=tiny_tokenizer("byte"), name="M", seed=1, max_position_embeddings=512)


# the contract


def fuzzed(count: int) -> list[str]:
    """Texts of every plane, with frames, braces, control characters and special tokens among them."""
    rng = random.Random(0)
    odd = [
        "{prompt}",
        "\nA:",
        "Q: ",
        "\r\n",
        "\x00",
        "</s>",
        "é",
        "e\u0301",
        "\u202e",
        "👩‍👩‍👧",
        "\\n",
        "%s",
        "{}",
        " ",
    ]
    out = []
    for _ in range(count):
        letters = [chr(rng.choice([rng.randint(32, 126), rng.randint(0xA0, 0xD7FF), rng.randint(0x10000, 0x10FFFF)]))
                   for _ in range(rng.randint(1, 30))]  # fmt: skip
        letters += rng.sample(odd, rng.randint(0, 4))
        rng.shuffle(letters)
        out.append("".join(letters))
    return out


@pytest.mark.parametrize("form", ["bare", "framed", "template", "conversation"])
def test_the_users_words_are_a_byte_identical_prefix(form: str) -> None:
    """1,000 fuzzed prompts a form: nothing is changed, one piece is put in, right after the user's words."""
    template = r"<<{prompt}\n>> " if form == "template" else None
    policy = PromptComplement(Scripted(), brief, template)
    used = 0
    for text in fuzzed(1000):
        prompt: Any = {
            "bare": text,
            "framed": f"Q: {text}\nA:",
            "template": f"<<{text}\n>> ",
            "conversation": [{"role": "system", "content": "s"}, {"role": "user", "content": text}],
        }[form]
        before = prompt_text(prompt).encode()
        (one,) = planned(policy, [prompt])
        after = prompt_text(one.asked).encode()
        words = words_of(prompt, template)
        assert form != "template" or words == text
        assert form != "framed" or words == text or ("\nQ:" in text and text.endswith(words))  # the last question
        if one.complement is None:
            assert one.asked == prompt and one.skipped
            continue
        used += 1
        piece = f"\n{BRIEF}".encode()
        new = words_of(one.asked, template).encode()
        assert new == words.encode() + piece  # the user's words, byte for byte, and then the complement
        at = after.rindex(piece)
        assert after[:at] + after[at + len(piece) :] == before  # and nothing else has changed
        if form == "bare" and words == text:
            assert after.startswith(text.encode())
    assert used > 300


def test_earlier_messages_and_the_messages_given_are_left_alone() -> None:
    prompt: Any = [
        {"role": "user", "content": "Where is Rome?"},
        {"role": "assistant", "content": "In Italy."},
        {"role": "user", "content": "And Oslo?"},
    ]
    kept = [dict(message) for message in prompt]
    done = PromptComplement(Scripted(), brief).generate([prompt])
    assert done.prompts == [prompt] == [kept]
    assert with_complement(prompt, BRIEF) == [*kept[:2], {"role": "user", "content": f"And Oslo?\n{BRIEF}"}]


def test_answers_are_those_of_the_complemented_prompts(lm: LM) -> None:
    sampling = Sampling(max_new_tokens=6, samples=2, seed=3)
    done = PromptComplement(lm, brief).generate(QUESTIONS, sampling)
    plain = lm.generate([f"{question}\n{BRIEF}" for question in QUESTIONS], sampling)
    assert (done.texts, done.tokens, done.logprobs) == (plain.texts, plain.tokens, plain.logprobs)
    assert done.prompts == [question for question in QUESTIONS for _ in range(2)]
    assert done.telemetry == [{"complement": BRIEF, "skipped": None}] * 6


def test_a_chat_template_sees_the_complement_in_the_users_turn() -> None:
    chat = tiny_lm(tokenizer=tiny_tokenizer("byte", chat=CHAT), max_position_embeddings=512)
    (one,) = planned(PromptComplement(chat, brief), ["Where is Rome?"])
    (tokens,) = chat.encode([one.asked])
    assert chat.tokenizer.decode(tokens) == f"<s>user Where is Rome?\n{BRIEF} assistant "


# why a complement is not used


@pytest.mark.parametrize(
    ("prompt", "complement", "reason"),
    [
        ("Where is Rome? Answer with one word.", BRIEF, "strict format"),
        ("Where is Rome?", "", "empty"),
        ("Where is Rome?", " ".join(["long"] * 41), "too long"),
        ("Where is Rome?", "请先给出位置。", "another language"),
        ("Where is Rome?", "The answer is Italy.", "answers the prompt"),
        ("Where is Rome?", "Where is Rome", "repeats the prompt"),
        ("Where is Rome?", "End it with </s> please.", "ends the user's turn"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Where"}], BRIEF, "not the user's turn"),
    ],
)  # fmt: skip
def test_a_complement_at_fault_leaves_the_prompt_alone(lm: LM, prompt: Any, complement: str, reason: str) -> None:
    assert planned(PromptComplement(lm, lambda words: complement), [prompt]) == [Planned(prompt, None, reason)]


def test_what_closes_the_template_is_not_let_in() -> None:
    policy = PromptComplement(Scripted(), lambda words: "Be kind [/INST] and brief.", "[INST] {prompt} [/INST]")
    assert planned(policy, ["[INST] Where? [/INST]"])[0].skipped == "ends the user's turn"


def test_a_complement_becomes_one_line(lm: LM) -> None:
    policy = PromptComplement(lm, lambda words: " Be kind.\n\nQ: and\tbrief ")
    assert planned(policy, ["Q: Where?\nA:"])[0].asked == "Q: Where?\nBe kind. Q: and brief\nA:"


def test_a_complement_that_leaves_no_room_is_not_used() -> None:
    """One byte a token: of 64, a quarter is kept for the answer, so 48 may be asked."""
    small = tiny_lm(tokenizer=tiny_tokenizer("byte"))
    policy = PromptComplement(small, lambda words: "To it is." + "!" * 20)
    fits, full = "W" * 18, "W" * 19  # 18 or 19 + newline + 29
    assert [one.skipped for one in planned(policy, [fits, full])] == [None, "no room in the context"]


def test_a_format_that_is_settled_costs_nothing() -> None:
    model, strict = Scripted(lambda asked, seed: BRIEF, "M"), "Where is Rome? Reply with one word."
    done = PromptComplement(Scripted(), model).generate([strict, "Where is Rome?"])
    assert model.asked == [request(INSTRUCTION, "Where is Rome?")]
    assert done.cost.tokens == {"M": 5, "F": 10}
    assert [row["skipped"] for row in done.telemetry] == ["strict format", None]


def test_a_complement_that_does_not_end_is_too_long() -> None:
    model = Scripted(lambda asked, seed: BRIEF, "M", finish="length")
    assert planned(PromptComplement(Scripted(), model), ["Where?"])[0].skipped == "too long"
    assert model.samplings[0].temperature == 0 and model.samplings[0].max_new_tokens == 160


def test_a_prompt_too_long_for_the_complement_model_is_asked_as_it_is(lm: LM) -> None:
    small = tiny_lm(tokenizer=tiny_tokenizer("byte"))  # 64 bytes
    policy = PromptComplement(lm, small, instruction="{prompt} ->")
    done = policy.generate(["x" * 100, "Where is Rome?"], PLAIN)
    assert done.telemetry[0] == {"complement": None, "skipped": "no room in the complement model"}
    assert done.telemetry[1]["skipped"] != "no room in the complement model"


def test_without_a_complement_model_it_is_the_policy(lm: LM) -> None:
    sampling = Sampling(max_new_tokens=6, samples=2, seed=5)
    done, plain = PromptComplement(lm, None).generate(QUESTIONS, sampling), lm.generate(QUESTIONS, sampling)
    assert (done.tokens, done.logprobs, done.cost.tokens) == (plain.tokens, plain.logprobs, plain.cost.tokens)
    assert done.telemetry[0] == {"complement": None, "skipped": "no complement model"}


def test_a_prompt_that_does_not_fit_the_template_is_refused() -> None:
    policy = PromptComplement(Scripted(), brief, r"User: {prompt}\nBot:")
    with pytest.raises(UsageError, match=r"'User: Hi' does not have the form template='User: \{prompt\}\\\\nBot:'"):
        policy.generate(["User: Hi"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"template": "Q: A:"}, r"template must hold \{prompt\} once"),
        ({"instruction": "{prompt} {prompt}"}, r"instruction must hold \{prompt\} once"),
        ({"rounds": 0}, "rounds must be 1 or more, not 0"),
        ({"held_out": 1.0}, r"held_out in \[0, 1\)"),
    ],
)
def test_options_that_cannot_work_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PromptComplementConfig(**option)


def test_an_empty_prompt_is_refused_by_its_number(lm: LM) -> None:
    with pytest.raises(UsageError, match="prompt 1 is empty"):
        PromptComplement(lm, brief).generate(["Where?", " "])


def test_keywords_reach_the_complement_model() -> None:
    model = Scripted(lambda asked, seed: BRIEF, "M")
    policy = PromptComplement(Scripted(), model, instruction="{prompt} ->", keywords=lambda prompt: ["maps", "roads"])
    policy.generate(["Where is Rome?"])
    assert model.asked == ["Where is Rome? <ask for nothing but> maps, roads ->"]


# cost, KL, nesting


def test_tokens_are_counted_for_both_models(lm: LM, writer: LM) -> None:
    """Two samples a prompt: the complement model is asked once. An answer's last token is never forwarded."""
    policy, meter = PromptComplement(lm, writer, max_words=5, instruction="{prompt} ->"), Cost()
    plans = policy.plan(QUESTIONS, meter)
    said = writer.generate([f"{question} ->" for question in QUESTIONS], Sampling(max_new_tokens=20, temperature=0))
    asked = writer.encode([f"{question} ->" for question in QUESTIONS])
    forwarded = sum(map(len, asked)) + sum(len(row) - 1 for row in said.tokens)
    assert meter.tokens == {"M": forwarded}
    done = policy.generate(QUESTIONS, Sampling(max_new_tokens=6, samples=2))
    prompts = sum(map(len, lm.encode([one.asked for one in plans])))
    assert done.cost.tokens == {"M": forwarded, "F": prompts + sum(len(row) - 1 for row in done.tokens)}
    assert done.cost.reward_calls == 0 and done.cost.seconds > 0


def test_the_kl_is_that_of_two_prompts(lm: LM) -> None:
    """Exact per token: KL(F(. | x') || F(. | x)); 1e-5 is float32 over a vocabulary of 264."""
    policy = PromptComplement(lm, brief)
    done = policy.generate(QUESTIONS, PLAIN)
    assert done.kl is None  # it is measured from the prompts as asked, not reported by what is beneath
    asked: list[Prompt] = [f"{question}\n{BRIEF}" for question in QUESTIONS]
    both = zip(lm.token_logprobs(asked, done.tokens), lm.token_logprobs(QUESTIONS, done.tokens), strict=True)
    expected = [kl_between(after, before) for after, before in both]
    found = divergences(policy, lm, QUESTIONS, done.tokens, PLAIN)
    for one, kl in zip(found, expected, strict=True):
        assert torch.allclose(one.kl, kl, atol=1e-5)
    assert float(expected[0].mean()) > 1e-3


def test_it_is_stepped_where_the_policy_can_be(lm: LM, writer: LM) -> None:
    policy = PromptComplement(lm, writer, max_words=5, instruction="{prompt} ->")
    whole = policy.generate(QUESTIONS, PLAIN)
    stepped = answer_steps(steppable(policy, "test"), QUESTIONS, PLAIN)
    assert (stepped.tokens, stepped.prompts) == (whole.tokens, QUESTIONS)
    assert stepped.cost.tokens == whole.cost.tokens
    with pytest.raises(UsageError, match="gives whole answers only"):
        steppable(PromptComplement(Scripted(), brief), "test")
    assert not hasattr(PromptComplement(Scripted(), brief), "token_logprobs")


def test_a_reward_outside_reads_the_prompt_as_it_was(lm: LM) -> None:
    seen: list[Prompt] = []

    def reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        seen.extend(prompts)
        return [float(len(text)) for text in texts]

    done = BestOfN(PromptComplement(lm, brief), reward, 3).generate(QUESTIONS, PLAIN)
    assert seen == [question for question in QUESTIONS for _ in range(3)] and done.prompts == QUESTIONS


# the critic that is a reward


def number(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
    return [None if text == "?" else float(text) for text in texts]


def judged(answer: Answer, samples: int, count: int = 1) -> tuple[list[Any], Scripted, Cost]:
    """What the critic says of `count` drafts for a policy that answers so."""
    policy, meter = Scripted(answer), Cost()
    sampling = Sampling(samples=samples, seed=1)
    critic = reward_critic(policy, as_reward(number), lambda prompt, draft: f"{prompt} {draft}", sampling, meter)
    asks = [Ask("x", "x", "other")] * count
    return list(critic(asks, ["c"] * count, 0)), policy, meter


@pytest.mark.parametrize(
    ("having", "without", "right"),
    [
        ("1111", "0010", True),  # 0.75 against 1.64 x sqrt(0.25 / 4) = 0.41
        ("1011", "0010", False),  # 0.50 against 1.64 x sqrt((0.25 + 0.25) / 4) = 0.58
        ("0000", "0000", False),
        ("1111", "0000", True),
        ("0000", "1111", False),
        ("?111", "?000", True),
        ("???1", "0000", None),
    ],
)
def test_the_reward_must_rise_beyond_chance(having: str, without: str, right: bool | None) -> None:
    starts = {side: derive_seed(1, "critic", 0, side) for side in ("x", "x'")}

    def answer(asked: str, seed: int) -> str:
        return having[seed - starts["x'"]] if asked.endswith("c") else without[seed - starts["x"]]

    verdicts, policy, meter = judged(answer, 4)
    assert (verdicts[0].is_correct if verdicts[0] else None) is right
    assert len({sampling.seed for sampling in policy.samplings}) == 2  # answers on both sides are fresh
    assert meter.reward_calls == 8 and meter.tokens == {"F": 10}


def test_a_draft_that_changes_nothing_passes_one_time_in_twenty() -> None:
    """Two means of 8 normal rewards: t with 14 degrees of freedom exceeds 1.64 with probability 0.062; 4,000 drafts have
    a standard error of 0.004."""
    rng = np.random.default_rng(0)
    verdicts, _, _ = judged(lambda asked, seed: str(rng.normal()), 8, 4000)
    assert abs(np.mean([verdict.is_correct for verdict in verdicts]) - 0.062) < 4 * 0.004


# making one


def parts(policy: Any, reward: Any, prompts: Sequence[Prompt], lm: LM, folder: Path | None = None) -> Parts:
    """`folder`: fits are saved there and read back, as a resumed run does."""

    def store(key: str, fit: Any, keep: Any, again: Any) -> tuple[Any, Cost]:
        thing, cost = fit()
        if folder is not None:
            folder.mkdir()
            keep(thing, folder)
            thing = again(folder)
        return thing, cost

    sampling = Sampling(max_new_tokens=4, seed=2)
    return Parts(policy, lm, reward, prompts, sampling, lambda name: lm, lambda count: None, store)  # type: ignore[arg-type, return-value]


PLACES = "Rome Oslo Bonn Lima Cairo Delhi Paris Kyiv Quito Accra Dakar Seoul Tunis Riga Bern Minsk".split()


def kind_if_asked(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    return [float("Be kind." in text) for text in texts]


def test_a_model_is_made_from_what_the_reward_accepts(lm: LM, tmp_path: Path) -> None:
    """F repeats what it was asked, the reward wants to read "Be kind.": M_p learns that phrase, and only that."""
    asked: list[Prompt] = [f"Where is {place}?" for place in PLACES]
    config = PromptComplementConfig(
        phrases=("Be kind.", "Add a joke."), instruction="{prompt} ->", distance=0, epochs=30, lr=5e-3, critic_samples=2
    )
    given = parts(Scripted(), kind_if_asked, asked, lm, tmp_path / "fit")
    made = PromptComplement.make(given, config)
    done = made.generate(["Where is Minsk?", "Where is Rome?"])
    assert [row["complement"] for row in done.telemetry] == ["Be kind."] * 2
    rows = (tmp_path / "fit" / "pairs.jsonl").read_text().splitlines()
    assert len(rows) == 13 and all('"Be kind."' in row for row in rows)  # 16 less the fifth that is held back
    assert '"mean": 1.0' in (tmp_path / "fit" / "held_out.json").read_text()
    assert done.cost.tokens["F-complement"] > 0 and given.cost.tokens["F"] > 0 and given.cost.reward_calls > 0


@pytest.mark.parametrize("harm", [False, True])
def test_a_policy_that_complements_do_not_help_is_asked_as_it_was(lm: LM, harm: bool, tmp_path: Path) -> None:
    """No draft accepted; or the model trained on what was accepted lowers the held-out reward."""
    asked: list[Prompt] = [f"Where is {place}?" for place in PLACES]
    calls = iter(range(100))

    def reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        likes = 1.0 if next(calls) < 2 else -1.0  # a reward that turns round after the drafts were judged
        return [likes * ("Be" in text) + 0.01 * len(prompt_text(p)) for p, text in zip(prompts, texts, strict=True)]

    config = PromptComplementConfig(
        phrases=("Be kind.",), instruction="{prompt} ->", distance=0, epochs=30, lr=5e-3, critic_samples=2, rounds=1
    )
    policy = Scripted()
    given = parts(policy, reward if harm else lambda p, t: [0.0] * len(t), asked, lm, tmp_path / "fit")
    with pytest.warns(UserWarning, match="lower the reward" if harm else "0 complements improved answers of F"):
        made = PromptComplement.make(given, config)
    assert made.complementer is None
    assert made.generate(["Where is Rome?"]).texts == ["Where is Rome?"]


def test_a_model_that_is_named_is_loaded(lm: LM) -> None:
    given = parts(Scripted(), None, [], lm)
    made = PromptComplement.make(given, PromptComplementConfig(complementer="folder", separator=" "))
    assert made.complementer is lm and given.cost.tokens == {}


def test_models_can_draft_and_check(lm: LM) -> None:
    """No reward is needed; and the generator sorts the prompts."""
    asked: list[Prompt] = [f"Where is {place}?" for place in PLACES]
    model = Scripted(lambda text, seed: '{"is_correct": true}' if "JSON" in text else BRIEF, "big")
    given = parts(Scripted(), None, asked, lm)
    given.load = lambda name: model  # type: ignore[assignment, return-value]
    config = PromptComplementConfig(generator="big", critic="big", distance=0, instruction="{prompt} ->", epochs=1)
    made = PromptComplement.make(given, config)
    assert isinstance(made.complementer, LM) and made.complementer.name == "F-complement"
    assert given.cost.tokens["big"] == 5 * (16 + 13 + 13)  # sorted, drafted, checked; a fifth is held back


def test_too_few_prompts_or_no_reward(lm: LM) -> None:
    with pytest.raises(UsageError, match="3 different prompts are too few to make a complement model from"):
        PromptComplement.make(parts(Scripted(), kind_if_asked, QUESTIONS, lm), PromptComplementConfig())
    asked: list[Prompt] = [f"Where is {place}?" for place in PLACES]
    with pytest.raises(UsageError, match="give a reward"):
        PromptComplement.make(parts(Scripted(), None, asked, lm), PromptComplementConfig(distance=0))


def test_training_leaves_the_student_alone_and_a_folder_gives_it_back(lm: LM, tmp_path: Path) -> None:
    before = lm.fingerprint
    pairs = [Pair("Where is Rome?", "Be kind.")] * 8 + [Pair("x" * 600, "Too long for the student.")]
    model = train(lm, pairs, "{prompt} ->", epochs=1)
    assert lm.fingerprint == before != model.fingerprint
    save(Fitted(model, pairs, Interval(0.5, 0.1, 0.9, 8, 4)), tmp_path)
    again = load(tmp_path).model
    assert again is not None and (again.name, again.fingerprint) == ("F-complement", model.fingerprint)
