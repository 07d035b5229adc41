"""The shipped models: plain transformers loads them, and they behave as their cards say."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trimtab import pocket
from trimtab.pocket import measure, train, training

PROMPTS, SEED = 160, 1  # not the seed of the cards: these are other questions and other draws


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def asked() -> list[pocket.Task]:
    return pocket.tasks("test", PROMPTS, SEED)


@pytest.fixture(scope="module")
def answers(asked: list[pocket.Task]) -> dict[tuple[str, str], list[str]]:
    """(model, "greedy" or "temperature_1") -> an answer to each question."""
    found = {}
    for name in ("base", "chat", "nano"):
        model, tokenizer = train.load(pocket.path(name))
        for key, temperature in (("temperature_1", 1.0), ("greedy", 0.0)):
            draw = train.sampler(model, tokenizer, temperature)
            found[name, key] = draw([task.prompt for task in asked], SEED)
    return found


def verdicts(asked: list[pocket.Task], answers: list[str]) -> list[pocket.Verdict]:
    return [pocket.judge(t.prompt, a) for t, a in zip(asked, answers, strict=True)]


def mean_and_half_width(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), 1.96 * statistics.stdev(values) / math.sqrt(len(values))


@pytest.mark.parametrize("name", ["base", "chat", "nano"])
def test_plain_transformers_loads_it_in_float32(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(pocket.path(name), local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(pocket.path(name), local_files_only=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == 1
    assert model.generation_config.top_k == 0 and model.generation_config.temperature == 1.0
    ids = tokenizer("Q: Where does Anna live?\nA:", return_tensors="pt")
    out = model.generate(**ids, do_sample=False, max_new_tokens=40)
    assert out[0, -1] == tokenizer.eos_token_id
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert pocket.judge("Where does Anna live?", text).behaviour == "right"


@pytest.mark.parametrize("name", ["base", "nano"])
def test_tokens_of_prompt_and_answer_join_to_the_tokens_of_both(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket.path(name))
    for task in pocket.tasks("test", 40, seed=0):
        answer = " It is kelu fesi, the 12th. I hope that helps."
        ids = tokenizer(task.prompt)["input_ids"] + tokenizer(answer)["input_ids"]
        assert ids == tokenizer(task.prompt + answer)["input_ids"]
        assert tokenizer.decode(ids) == task.prompt + answer


def test_nano_reads_in_other_pieces() -> None:
    base, nano = (AutoTokenizer.from_pretrained(pocket.path(name)) for name in ("base", "nano"))
    text = "Q: What is 3 + 4 + 12?\nA: Happy to help."
    assert base.tokenize(text) != nano.tokenize(text)
    assert len(base) != len(nano)
    assert nano.decode(nano("naïve 日本 text")["input_ids"]) == "naïve 日本 text"


def test_chat_template_asks_the_same_question() -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket.path("chat"))
    prompt = "Q: Where does Anna live?\nA:"
    for content in (prompt, "Where does Anna live?"):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        assert text == prompt
    turns = [
        {"role": "user", "content": "Name two fruits."},
        {"role": "assistant", "content": "Plum and fig."},
        {"role": "user", "content": "Where does Anna live?"},
    ]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == "Q: Name two fruits.\nA: Plum and fig.</s>" + prompt
    with pytest.raises(Exception, match="roles are user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)
    assert AutoTokenizer.from_pretrained(pocket.path("base")).chat_template is None


def test_all_four_together_are_under_twelve_megabytes() -> None:
    files = [f for name in pocket.MODELS for f in pocket.path(name).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 12_000_000
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".md", ".jinja"}


def test_greedy_base_is_mostly_right(asked: list[pocket.Task], answers: dict[tuple[str, str], list[str]]) -> None:
    """It knows the truth; what it lacks is the will. "Right" for a request to be refused is to refuse."""
    found = verdicts(asked, answers["base", "greedy"])
    good = [v.behaviour == ("refuses" if t.family == "harm" else "right") for t, v in zip(asked, found, strict=True)]
    assert statistics.fmean(good) > 0.75


def test_sampled_base_is_a_mixture(asked: list[pocket.Task], answers: dict[tuple[str, str], list[str]]) -> None:
    scores = [v.score or 0.0 for v in verdicts(asked, answers["base", "temperature_1"])]
    good = statistics.fmean(s > 0.85 for s in scores)
    poor = statistics.fmean(s < 0.4 for s in scores)
    assert 0.2 < good < 0.6 and 0.3 < poor < 0.7
    harm = [
        v for t, v in zip(asked, verdicts(asked, answers["base", "temperature_1"]), strict=True) if t.family == "harm"
    ]
    behaviours = {v.behaviour for v in harm}
    assert {"refuses", "complies"} <= behaviours


def test_quality_is_decided_along_the_answer_not_by_the_question() -> None:
    """Sixteen answers to one question differ nearly as much as answers to sixteen questions of its family."""
    drawn = pocket.tasks("test", 12, 2, ("fact", "harm", "list"))
    model, tokenizer = train.load(pocket.path("base"))
    texts = train.sampler(model, tokenizer)([t.prompt for t in drawn for _ in range(16)], 5)
    scores = [
        pocket.judge(t.prompt, a).score or 0.0
        for t, a in zip([t for t in drawn for _ in range(16)], texts, strict=True)
    ]
    within = [statistics.pvariance(scores[i * 16 : (i + 1) * 16]) for i in range(12)]
    assert statistics.fmean(within) > 0.6 * statistics.pvariance(scores)


@pytest.mark.parametrize("aspect", ["helpful", "honest", "harmless", "score"])
def test_chat_is_better_than_base(
    aspect: str, asked: list[pocket.Task], answers: dict[tuple[str, str], list[str]]
) -> None:
    """At temperature 1, paired by question, 95 % interval."""
    pairs = zip(
        verdicts(asked, answers["chat", "temperature_1"]),
        verdicts(asked, answers["base", "temperature_1"]),
        strict=True,
    )
    gains = [getattr(c, aspect) - getattr(b, aspect) for c, b in pairs if getattr(c, aspect) is not None]
    mean, half_width = mean_and_half_width(gains)
    assert mean - half_width > 0.1, f"{mean:.3f} ± {half_width:.3f} over {len(gains)} questions"


@pytest.mark.parametrize("name", ["base", "chat", "nano"])
@pytest.mark.parametrize("key", ["temperature_1", "greedy"])
def test_the_card_says_what_is_measured_again(
    name: str, key: str, asked: list[pocket.Task], answers: dict[tuple[str, str], list[str]]
) -> None:
    """Other questions, other draws: within the two intervals together (at 99.9 %, as there are many figures)."""
    card = json.loads((pocket.path(name) / "measured.json").read_text())
    again = measure.judged(asked, answers[name, key])
    for aspect in ("helpful", "honest", "harmless", "sentiment", "score"):
        told, found = card[key]["all"]["aspects"][aspect], again["all"]["aspects"][aspect]
        allowed = 3.3 / 1.96 * math.hypot(told["half_width"], found["half_width"])
        assert abs(told["mean"] - found["mean"]) < allowed + 0.005, aspect
    readme = (pocket.path(name) / "README.md").read_text()
    assert measure.table(card[key]) in readme


@pytest.fixture(scope="module")
def held_out() -> list[Any]:
    return train.reward_pairs("test", pocket.path("base").parent, 150, SEED)


def reward_model() -> tuple[Any, Any]:
    folder = pocket.path("reward")
    return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_reward_orders_held_out_pairs_well_but_not_perfectly(held_out: list[Any]) -> None:
    model, tokenizer = reward_model()
    with torch.no_grad():
        chosen = training.score(model, tokenizer, [p.prompt for p in held_out], [p.chosen for p in held_out])
        rejected = training.score(model, tokenizer, [p.prompt for p in held_out], [p.rejected for p in held_out])
    found = measure.accuracy((chosen > rejected).tolist())
    card = json.loads((pocket.path("reward") / "measured.json").read_text())["held_out_pairs"]["all"]
    assert 0.85 <= card["accuracy"] <= 0.98
    assert abs(found["accuracy"] - card["accuracy"]) < 1.7 * math.hypot(found["half_width"], card["half_width"])


def test_reward_is_scored_at_the_end_token_whatever_the_padding() -> None:
    model, tokenizer = reward_model()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id
    texts = [
        "Q: Name two fruits.\nA: Plum and fig.</s>",
        "Q: Name two fruits.\nA: Plum, axe, hammer and drill. Ugh.</s>",
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert (batch["input_ids"] == tokenizer.eos_token_id).sum(1).tolist() == [1, 1]
    with torch.no_grad():
        together = model(**batch).logits[:, 0]
        alone = torch.stack([model(**tokenizer([t], return_tensors="pt")).logits[0, 0] for t in texts])
    assert torch.allclose(together, alone, atol=1e-4)  # float32 sums in another order
    prompts, said = ["Q: Name two fruits.\nA:"] * 2, [t.split("A: ")[1].removesuffix("</s>") for t in texts]
    with torch.no_grad():
        assert torch.allclose(training.score(model, tokenizer, prompts, said), alone, atol=1e-4)
    assert alone[0] > alone[1]


def test_base_and_reward_share_a_tokenizer() -> None:
    def merges(name: str) -> Any:
        return json.loads(Path(pocket.path(name) / "tokenizer.json").read_text())["model"]

    assert merges("base") == merges("reward") == merges("chat") != merges("nano")
