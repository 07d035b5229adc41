"""Rewards of unfinished answers: the cached path, the text path and the whole text from scratch say the same."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import CHAT, EOS, tiny_lm, tiny_tokenizer
from tiny_reward import LIMIT, classifier
from trimtab import LM, Sampling, pocket
from trimtab.policy import Cost
from trimtab.rewards import Classifier, Function, parse_reward
from trimtab.rewards.prefix import (
    CachedScorer,
    TextScorer,
    UnfinishedText,
    kept_order,
    prefix_scorer,
    warn_unfinished,
)

PROMPTS = ["ba da fa la", "ma na", "pe"]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    return classifier(tmp_path_factory.mktemp("reward"))


def from_scratch(reward: Classifier, asked: Sequence[Any], answers: Sequence[Sequence[int]]) -> list[float]:
    """Each whole row of token ids through the reward model, one by one."""
    rows = []
    for prompt, answer in zip(asked, answers, strict=True):
        before, after = reward.frame(prompt)
        rows.append([*before, *(token for token in answer if token != EOS), *after])
    return [float(reward._forward([row])[0]) if len(row) <= reward.limit else math.nan for row in rows]


def same(a: Sequence[float] | torch.Tensor, b: Sequence[float] | torch.Tensor) -> bool:
    """Equal to 1e-4 (float32 through two layers), NaN where NaN."""
    return torch.allclose(torch.as_tensor(a).float(), torch.as_tensor(b).float(), atol=1e-4, equal_nan=True)


# the three ways agree


@pytest.mark.parametrize(
    ("family", "options", "chat"),
    [
        ("llama", {}, None),
        ("gpt2", {"append_eos": True}, None),
        ("llama", {"labels": 3, "column": 2}, None),
        ("llama", {"template": None}, CHAT),
        ("gpt2", {"template": "{prompt} sa {response} ta to"}, None),
    ],
    ids=["llama", "gpt2 + eos", "third column", "chat template", "words after the answer"],
)
@pytest.mark.parametrize("seed", range(2))
def test_cache_text_and_scratch_agree_whatever_the_rows_do(
    lm: LM, family: str, options: dict[str, Any], chat: str | None, seed: int, tmp_path: Path
) -> None:
    """Every sequence of these tokens is what its text is tokenized to, so ids and text are the same here.

    Some rows outgrow the 40 tokens that the reward model reads, and come back: NaN for as long, and only then.
    """
    reward = classifier(tmp_path, family, tiny_tokenizer(chat=chat), **options)
    cached, text = (prefix_scorer(reward, lm, PROMPTS, Cost(), cache) for cache in (True, False))
    assert isinstance(cached, CachedScorer) and isinstance(text, TextScorer)
    rng, overflowed, scored = random.Random(seed), 0, 0
    for step in range(20):
        action, rows = rng.choice(["append", "append", "ragged", "fork", "drop", "rewind"]), len(text.answers)
        action = {8: "long", 15: "rewind"}.get(step, action)
        if action == "append":
            tokens = torch.tensor([rng.randrange(4, 59) for _ in range(rows)])
            [scorer.append(tokens) for scorer in (cached, text)]
        elif action in ("ragged", "long"):
            counts = [rng.randrange(6) if action == "ragged" else 36 for _ in range(rows)]
            ragged = [[rng.randrange(4, 59) for _ in range(count)] for count in counts]
            [scorer.append(ragged) for scorer in (cached, text)]
        elif action == "fork":
            chosen = [rng.randrange(rows) for _ in range(rng.randrange(1, 5))]
            left, cached, text = cached, cached.fork(chosen), text.fork(chosen)
            left.append(torch.full((rows,), 7))
        elif action == "drop" and rows > 1:
            gone = rng.sample(range(rows), rng.randrange(1, rows))
            assert cached.drop(gone) == text.drop(gone)
        elif action == "rewind":
            removed = torch.tensor([rng.randrange(len(answer) + 1) for answer in text.answers])
            [scorer.rewind(scorer.lengths - removed) for scorer in (cached, text)]
        rows = len(text.answers)
        asking = [rng.randrange(rows) for _ in range(6)]
        more = [[rng.randrange(4, 59) for _ in range(rng.randrange(4))] for _ in asking[1:]] + [[EOS]]
        wanted = from_scratch(
            reward,
            [text.asked[row] for row in asking],
            [text.answers[row] + m for row, m in zip(asking, more, strict=True)],
        )
        assert same(cached.score(asking, more), wanted)
        fits = [i for i, value in enumerate(wanted) if not math.isnan(value)]
        assert same(
            text.score([asking[i] for i in fits], [more[i] for i in fits]) if fits else [], [wanted[i] for i in fits]
        )
        overflowed, scored = overflowed + len(wanted) - len(fits), scored + len(fits)
    assert overflowed and scored


def test_the_pocket_models_agree_on_what_they_write() -> None:
    """Answers of pocket/base, cut anywhere: equal wherever the text is tokenized as the model wrote it."""
    lm, reward = LM.load("pocket/base"), parse_reward("pocket/reward")
    prompts = pocket.prompts("test", 12, seed=0)
    drawn = lm.generate(prompts, Sampling(max_new_tokens=40, seed=1))
    for cut in (1, 5, 12, None):
        answers = [row[:cut] for row in drawn.tokens]
        canonical = [
            i
            for i, answer in enumerate(answers)
            if lm.tokenizer(lm.decode(answer))["input_ids"] == [token for token in answer if token not in lm.eos_ids]
        ]
        assert len(canonical) >= 6
        scores = []
        for cache in (True, False):
            scorer = prefix_scorer(reward, lm, prompts, Cost(), cache)
            scorer.append([answer[:-1] for answer in answers])
            scores.append(scorer.score(range(12), [answer[-1:] for answer in answers])[canonical])
        asked = [prompts[i] for i in canonical]
        whole = reward.score(asked, [lm.decode(answers[i]) for i in canonical])
        assert same(scores[0], scores[1]) and same(scores[0], [value for value in whole if value is not None])
        assert float(scores[0].std()) > 0.5


def test_where_a_word_is_spelled_otherwise_the_ids_are_what_the_model_wrote(tmp_path: Path) -> None:
    """ "b" + "a" is text that the tokenizer writes as one token "ba": the text path reads that one."""
    tokenizer = tiny_tokenizer("byte")
    lm = tiny_lm(tokenizer=tokenizer)
    reward = classifier(tmp_path, tokenizer=tokenizer, template="{prompt}{response}")
    b, a, ba = (tokenizer.convert_tokens_to_ids(token) for token in ("b", "a", "ba"))
    cached, text = (prefix_scorer(reward, lm, ["x"], Cost(), cache) for cache in (True, False))
    for scorer in (cached, text):
        scorer.append([[b]])
    apart, merged = (from_scratch(reward, ["x"], [ids])[0] for ids in ([b, a], [ba]))
    assert abs(apart - merged) > 0.01
    assert same(cached.score([0], [[a]]), [apart]) and same(text.score([0], [[a]]), [merged])


def test_a_chat_reward_reads_its_own_template(lm: LM, tmp_path: Path) -> None:
    """A plain prompt is framed as the reward was trained on it; nothing is left to the caller."""
    reward = classifier(tmp_path, tokenizer=tiny_tokenizer(chat=CHAT), template=None)
    scorer = prefix_scorer(reward, lm, ["ba da"], Cost())
    read = lm.tokenizer.convert_ids_to_tokens(scorer.session.tokens[0])
    assert read == ["<s>", "<unk>", "ba", "da", "<unk>"]  # the roles are words this vocabulary lacks
    assert same(scorer.score([0], [[5]]), [float(reward.score(["ba da"], [lm.decode([5])])[0] or 0)])


# the limits


def test_a_text_beyond_the_context_is_not_judged(lm: LM, reward: Classifier) -> None:
    """The answer may go on: its row is NaN, the others are scored, and nothing is raised."""
    scorer = prefix_scorer(reward, lm, PROMPTS, Cost())
    longest = LIMIT - len(reward.frame(PROMPTS[0])[0])
    scorer.append([[5] * (longest - 1), [6], [7]])
    assert not scorer.score([0, 1, 2], [[8]] * 3).isnan().any()
    assert scorer.score([0, 1], [[8, 8], [8, 8]]).isnan().tolist() == [True, False]
    for _ in range(3):
        scorer.append(torch.tensor([8, 8, 8]))
    scores = scorer.score([0, 1, 2], [[9]] * 3)
    assert scores.isnan().tolist() == [True, False, False]
    assert scorer.lengths.tolist()[0] == LIMIT + 2 and int(scorer.session.lengths[0]) == LIMIT
    scorer.rewind(scorer.lengths - torch.tensor([3, 0, 0]))
    wanted = from_scratch(reward, PROMPTS[:1], [[5] * (longest - 1) + [9]])
    assert same(scorer.score([0], [[9]]), wanted)


def test_a_prompt_that_does_not_fit_goes_as_text(lm: LM, reward: Classifier) -> None:
    prompts = ["ba", " ".join(["da"] * (LIMIT + 5))]
    scorer = prefix_scorer(reward, lm, prompts, Cost())
    assert isinstance(scorer, TextScorer)
    with pytest.warns(UserWarning, match="1 of 2 prompts were cut"):
        assert not scorer.score([0, 1], [[5], [5]]).isnan().any()


@pytest.mark.parametrize("why", ["tokenizer", "bert", "asked for", "function"])
def test_what_has_no_cache_to_fork_goes_as_text(lm: LM, why: str, tmp_path: Path) -> None:
    rewards: dict[str, Callable[[], Any]] = {
        "tokenizer": lambda: classifier(tmp_path, tokenizer=tiny_tokenizer("byte")),
        "bert": lambda: classifier(tmp_path, "bert"),
        "asked for": lambda: classifier(tmp_path),
        "function": lambda: Function(lambda prompts, texts: [len(text) for text in texts], name="length"),
    }
    reward = rewards[why]()
    scorer = prefix_scorer(reward, lm, PROMPTS, Cost(), cache=why != "asked for")
    assert isinstance(scorer, TextScorer)
    scorer.append([[5], [], [6, 7]])
    found = scorer.score([0, 2, 2], [[8], [], [9, EOS]])
    texts = [lm.decode(ids) for ids in ([5, 8], [6, 7], [6, 7, 9])]
    assert same(found, [value or 0 for value in reward.score([PROMPTS[0], PROMPTS[2], PROMPTS[2]], texts)])


def test_what_could_not_be_judged_is_nan(lm: LM) -> None:
    reward = Function(lambda prompts, texts: [None if "ba" in text else 1.0 for text in texts], name="shy")
    ba = lm.tokenizer.convert_tokens_to_ids("ba")
    scores = prefix_scorer(reward, lm, PROMPTS, Cost()).score([0, 1], [[ba], [ba + 1]])
    assert scores.isnan().tolist() == [True, False]


def test_a_reward_for_whole_answers_is_warned_about(reward: Classifier) -> None:
    with pytest.warns(UnfinishedText, match="args asks classifier/.* about unfinished answers"):
        warn_unfinished(reward, "args")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unfinished(parse_reward("length:target=3"), "args")


# what it costs


def test_a_candidate_costs_its_own_tokens(lm: LM, tmp_path: Path) -> None:
    """The prompt once and k (token + end) tokens a step, the chosen one among them; from text every whole text again."""
    reward = classifier(tmp_path, append_eos=True)
    k, steps = 5, 7
    meters = [Cost(), Cost()]
    for meter, cache in zip(meters, (True, False), strict=True):
        scorer = prefix_scorer(reward, lm, PROMPTS, meter, cache)
        for step in range(steps):
            rows = [row for row in range(3) for _ in range(k)]
            scorer.score(rows, [[10 + (step + i) % k] for i in range(len(rows))])
            scorer.append(torch.tensor([10, 11, 12]))
    prompt = sum(len(reward.frame(text)[0]) for text in PROMPTS)
    assert meters[0].tokens == {reward.name: prompt + 3 * steps * 2 * k}
    whole = sum(k * (prompt + 3 * (step + 2)) for step in range(steps))
    assert meters[1].tokens == {reward.name: whole}
    assert meters[0].reward_calls == meters[1].reward_calls == 3 * k * steps


def test_rows_are_kept_in_the_order_of_a_session(lm: LM) -> None:
    for dropped in ([], [0], [4], [1, 3], [0, 1, 2], [0, 2, 4], list(range(5))):
        session = lm.session([[token] for token in range(5, 10)])
        assert kept_order(5, dropped) == session.drop(dropped)
