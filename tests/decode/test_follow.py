"""`Follower`: at the text it was given, it is where a fresh prefill of prompt and text would be."""

from __future__ import annotations

import pytest
import torch

from trimtab import LM, Cost, Sampling
from trimtab.decode.follow import Follower, answer_tokens

PROMPTS = ["Q: Where does Anna live?\nA:", "Q: What is two plus three?\nA:", "Q: Name a pet.\nA:"]
PLAIN = Sampling()


@pytest.fixture(scope="module", params=["pocket/base", "pocket/chat", "pocket/nano"])
def lm(request: pytest.FixtureRequest) -> LM:
    return LM.load(request.param)


def check(follower: Follower, texts: list[str]) -> None:
    lm = follower.lm
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        ids = lm.encode([prompt])[0]
        fresh = lm.session([ids + answer_tokens(lm, lm.render(prompt), ids, text)])
        assert follower.session.tokens[row] == fresh.tokens[0]
        assert lm.decode(follower.session.tokens[row][len(ids) :]) == text
        torch.testing.assert_close(follower.session.logits[row], fresh.logits[0], atol=1e-4, rtol=0)  # float32


def test_following_equals_a_fresh_prefill(lm: LM) -> None:
    follower = Follower(lm, PROMPTS, PLAIN, Cost())
    for texts in (
        ["", "", ""],
        [" Anna li", " Two", " A cat"],
        [" Anna lives in", " Two plus three is 5.", " A ca"],  # longer, longer, shorter
        [" Somewhere else", "", " A dog and a cat."],  # another text altogether, nothing, another end
    ):
        follower.follow(texts)
        check(follower, texts)


def test_a_text_that_grows_costs_what_was_added(lm: LM) -> None:
    meter = Cost()
    follower = Follower(lm, PROMPTS, PLAIN, meter)
    follower.follow([" Anna lives in a house.", " It is 5.", " A cat is a pet."])
    before = meter.tokens_forwarded
    follower.follow([" Anna lives in a house. Ask", " It is 5. Ask", " A cat is a pet. Ask"])
    added = len(lm.tokenizer(" Ask", add_special_tokens=False)["input_ids"])
    assert meter.tokens_forwarded - before == 3 * added


def test_some_rows_only(lm: LM) -> None:
    follower = Follower(lm, PROMPTS, PLAIN, Cost())
    follower.follow([" Anna", " Two", " A"])
    follower.follow([" Five", " A bird."], rows=[1, 2])
    check(follower, [" Anna", " Five", " A bird."])


def test_fork_and_drop_keep_rows_together(lm: LM) -> None:
    follower = Follower(lm, PROMPTS, PLAIN, Cost())
    follower.follow([" Anna", " Two", " A"])
    twice = follower.fork([2, 0, 2])
    twice.follow([" A cat", " Anna lives", " A dog"])
    assert [lm.decode(row[start:]) for row, start in zip(twice.session.tokens, twice.starts, strict=True)] == [
        " A cat", " Anna lives", " A dog"
    ]  # fmt: skip
    check(follower, [" Anna", " Two", " A"])
    order = follower.drop([0])
    follower.follow([["", " Two is", " A pet"][old] for old in order])
    answers = [lm.decode(row[start:]) for row, start in zip(follower.session.tokens, follower.starts, strict=True)]
    assert answers == [["", " Two is", " A pet"][old] for old in order]
