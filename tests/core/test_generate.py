"""`LM.generate`: the tokens of transformers, reproducible draws, exact costs, and the edges."""

from __future__ import annotations

import pytest
import torch

from recompute import PROMPTS, recompute, transformers_generate
from tiny import ARCHITECTURES, CHAT, CONTEXT, EOS, tiny_lm, tiny_tokenizer
from trimtab import LM, Sampling
from trimtab.errors import TrimtabError, UsageError

GREEDY = Sampling(max_new_tokens=16, temperature=0)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(arch: str, tied: bool, lm_of: pytest.FixtureRequest) -> None:
    lm: LM = lm_of(arch, tied)  # type: ignore[operator]
    shared = lm.model.get_input_embeddings().weight is lm.unembedding
    assert shared == tied
    expected = [transformers_generate(lm, ids, 16) for ids in lm.encode(PROMPTS)]
    assert len({tuple(row) for row in expected}) > 1
    assert lm.generate(PROMPTS, GREEDY).tokens == expected
    assert [lm.generate([prompt], GREEDY).tokens[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
@pytest.mark.parametrize("chat", [None, CHAT], ids=["plain", "chat"])
def test_padding_and_templates_do_not_change_the_answers(side: str, pad: str | None, chat: str | None) -> None:
    lm = tiny_lm(tokenizer=tiny_tokenizer(side=side, pad=pad, chat=chat))
    expected = [transformers_generate(lm, ids, 16) for ids in lm.encode(PROMPTS)]
    assert lm.generate(PROMPTS, GREEDY).tokens == expected


def test_logprobs_of_drawn_tokens_are_their_teacher_forced_scores(lm: LM) -> None:
    done = lm.generate(PROMPTS, Sampling(max_new_tokens=12, samples=2, seed=1))
    scored = lm.score(done.prompts, done.tokens)
    prompts = [ids for ids in lm.encode(PROMPTS) for _ in range(2)]
    for prompt, answer, own, score in zip(prompts, done.tokens, done.logprobs, scored, strict=True):
        logits, _ = recompute(lm, [[*prompt, *answer]])[0]
        oracle = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(own), oracle, atol=1e-4, rtol=0)
        torch.testing.assert_close(score, oracle, atol=1e-4, rtol=0)


def test_hidden_states_are_those_the_tokens_were_drawn_from(lm: LM) -> None:
    answers = [[5, 6, 7], [], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]]
    states = list(lm.hidden_states(PROMPTS, answers))
    for prompt, answer, state in zip(lm.encode(PROMPTS), answers, states, strict=True):
        _, hidden = recompute(lm, [[*prompt, *answer]])[0]
        torch.testing.assert_close(state, hidden[len(prompt) - 1 : len(prompt) - 1 + len(answer)], atol=1e-5, rtol=1e-5)


def test_reported_logprobs_are_those_of_the_cut_and_tempered_distribution(llama: LM) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=0.7, top_k=5, repetition_penalty=1.3, seed=3)
    done = llama.generate(PROMPTS, sampling)
    for prompt, answer, own in zip(llama.encode(PROMPTS), done.tokens, done.logprobs, strict=True):
        logits, _ = recompute(llama, [[*prompt, *answer]])[0]
        for at, token in enumerate(answer):
            seen = torch.tensor([[*prompt, *answer[:at]]])
            expected = sampling.logprobs(logits[len(prompt) - 1 + at][None], seen)[0, token]
            assert own[at] == pytest.approx(float(expected), abs=1e-4)


def test_the_same_seed_gives_the_same_tokens_whatever_shares_the_batch(llama: LM) -> None:
    sampling = Sampling(max_new_tokens=12, samples=5, seed=7)
    one = llama.generate(PROMPTS, sampling)
    small = LM(llama.model, llama.tokenizer, batch_rows=3).generate(PROMPTS, sampling)
    alone = LM(llama.model, llama.tokenizer, batch_rows=1).generate(PROMPTS, sampling)
    assert one.tokens == small.tokens == alone.tokens
    assert llama.generate(PROMPTS[:2], sampling).tokens == one.tokens[:10]
    assert llama.generate(PROMPTS, sampling).logprobs == one.logprobs


def test_seeds_and_samples_differ(llama: LM) -> None:
    first, second = (llama.generate(PROMPTS, Sampling(samples=2, seed=seed)).tokens for seed in (0, 1))
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert all(first[row] != first[row + 1] for row in range(0, len(first), 2))


def test_generating_leaves_the_global_generator_alone(llama: LM) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    llama.generate(PROMPTS, Sampling(max_new_tokens=4))
    assert torch.equal(before, torch.random.get_rng_state())


def test_sampled_first_tokens_follow_the_model(llama: LM) -> None:
    """Chi-square of 4,000 draws against the exact distribution."""
    from scipy.stats import chisquare

    done = llama.generate([PROMPTS[0]], Sampling(max_new_tokens=1, samples=4000, temperature=1.5, seed=2))
    counts = torch.tensor([row[0] for row in done.tokens]).bincount(minlength=llama.vocab_size)
    exact = (recompute(llama, llama.encode(PROMPTS[:1]))[0][0][-1] / 1.5).softmax(-1) * 4000
    often = exact >= 5
    observed = [*counts[often].tolist(), int(counts[~often].sum())]
    expected = torch.cat([exact[often], exact[~often].sum()[None]]).double()
    assert chisquare(observed, (expected / expected.sum() * 4000).numpy()).pvalue > 1e-3


def test_tokens_forwarded_counts_each_real_token_once(llama: LM) -> None:
    prompts = sum(map(len, llama.encode(PROMPTS)))
    for samples in (1, 3):
        done = llama.generate(PROMPTS, Sampling(max_new_tokens=10, samples=samples, seed=4))
        assert "stop" in done.finish_reasons  # so that finished rows are seen to cost nothing
        assert done.cost.tokens == {"tiny": prompts + sum(len(row) - 1 for row in done.tokens)}


def test_finish_reasons_and_end_tokens(llama: LM) -> None:
    done = llama.generate(PROMPTS, Sampling(max_new_tokens=40, samples=4, seed=0))
    assert {"stop", "length"} >= set(done.finish_reasons) and "stop" in done.finish_reasons
    for tokens, reason, text in zip(done.tokens, done.finish_reasons, done.texts, strict=True):
        assert EOS not in tokens[:-1]
        assert (tokens[-1] == EOS) == (reason == "stop")
        assert "</s>" not in text


def test_end_token_first(llama: LM) -> None:
    lm = LM(llama.model, llama.tokenizer)
    lm.__dict__["eos_ids"] = frozenset(range(lm.vocab_size))
    done = lm.generate(PROMPTS, Sampling(max_new_tokens=5))
    assert [len(row) for row in done.tokens] == [1] * len(PROMPTS)
    assert done.finish_reasons == ["stop"] * len(PROMPTS)
    assert done.cost.tokens_forwarded == sum(map(len, lm.encode(PROMPTS)))


def test_no_new_tokens(llama: LM) -> None:
    done = llama.generate(PROMPTS, Sampling(max_new_tokens=0, samples=2))
    assert done.texts == [""] * 2 * len(PROMPTS)
    assert done.tokens == done.logprobs == [[] for _ in done.texts]
    assert done.finish_reasons == ["length"] * len(done.texts)
    assert done.cost.tokens_forwarded == 0


def test_no_prompts(llama: LM) -> None:
    assert len(llama.generate([], Sampling())) == 0


def test_the_context_is_never_exceeded(llama: LM) -> None:
    words = " ".join(["ba", "da"] * CONTEXT).split()
    full, nearly = " ".join(words[:CONTEXT]), " ".join(words[: CONTEXT - 3])
    done = llama.generate([full, nearly, "ba"], Sampling(max_new_tokens=10, temperature=0))
    assert done.tokens[0] == [] and done.finish_reasons[0] == "length"
    assert len(done.tokens[1]) <= 3
    assert done.tokens[2] == llama.generate(["ba"], Sampling(max_new_tokens=10, temperature=0)).tokens[0]
    with pytest.raises(UsageError, match=f"prompt 1 has {CONTEXT + 1} tokens.*context of {CONTEXT}"):
        llama.generate(["ba", " ".join(words[: CONTEXT + 1])])


def test_stop_strings_end_a_row_and_are_cut_off(llama: LM) -> None:
    free = llama.generate(PROMPTS, Sampling(max_new_tokens=12, seed=9))
    row = max(range(len(PROMPTS)), key=lambda i: len(free.tokens[i]))
    word = free.texts[row].split()[3]
    done = llama.generate(PROMPTS, Sampling(max_new_tokens=12, seed=9, stop=(word,)))
    for before, after, text in zip(free.tokens, done.tokens, done.texts, strict=True):
        assert after == before[: len(after)]
        assert word not in text
    at = free.texts[row].split().index(word)
    assert done.texts[row].split() == free.texts[row].split()[:at]
    assert done.finish_reasons[row] == "stop"
    assert done.cost.tokens_forwarded < free.cost.tokens_forwarded


@pytest.mark.parametrize("temperature", [0, 1])
def test_weights_that_become_nan_are_refused(temperature: float) -> None:
    lm = tiny_lm()
    with torch.no_grad():
        lm.model.model.norm.weight[3] = float("nan")
    with pytest.raises(TrimtabError, match="tiny .*NaN"):
        lm.generate(PROMPTS, Sampling(temperature=temperature))
    with pytest.raises(TrimtabError, match="tiny .*NaN"):
        lm.score(PROMPTS[:1], [[5]])


@pytest.mark.parametrize("temperature", [0, 1])
def test_nan_that_appears_while_generating_is_refused(temperature: float) -> None:
    """Not in the first tokens, so only the check of every step can see it."""
    lm = tiny_lm()
    lm.generate(["ba"], Sampling(max_new_tokens=1))
    with torch.no_grad():
        lm.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrimtabError, match="tiny gave logits that are not numbers at step 0"):
        lm.generate(PROMPTS, Sampling(temperature=temperature))


def test_observers_see_each_live_row_once_a_step(llama: LM) -> None:
    seen: dict[int, list[int]] = {}
    states: dict[int, list[torch.Tensor]] = {}

    def watch(step: object) -> None:
        for row, token, hidden in zip(step.rows.tolist(), step.tokens.tolist(), step.hidden, strict=True):  # type: ignore[attr-defined]
            seen.setdefault(row, []).append(token)
            states.setdefault(row, []).append(hidden.clone())

    lm = LM(llama.model, llama.tokenizer, batch_rows=4)
    done = lm.generate(PROMPTS, Sampling(max_new_tokens=8, samples=3, seed=2), observer=watch)
    assert [seen[row] for row in range(len(done))] == done.tokens
    for row, expected in enumerate(lm.hidden_states(done.prompts, done.tokens)):
        torch.testing.assert_close(torch.stack(states[row]), expected, atol=1e-5, rtol=1e-5)


def test_observed_states_can_be_trained_on(llama: LM) -> None:
    weight = torch.zeros(llama.hidden_size, requires_grad=True)
    losses = []
    llama.generate(
        PROMPTS, Sampling(max_new_tokens=3), observer=lambda step: losses.append((step.hidden.clone(), step.edited))
    )
    sum((a @ weight).sum() + (b @ weight).sum() for a, b in losses).backward()
    assert weight.grad is not None and float(weight.grad.abs().sum()) > 0


def test_prompts_and_answers_must_pair(llama: LM) -> None:
    with pytest.raises(UsageError, match="5 prompts and 1 answers"):
        llama.score(PROMPTS, [[5]])


def test_cuts_are_refused_where_whole_distributions_are_meant(llama: LM) -> None:
    for sampling in (Sampling(temperature=0), Sampling(top_k=5), Sampling(repetition_penalty=1.2)):
        with pytest.raises(UsageError, match="temperature above 0"):
            list(llama.token_logprobs(PROMPTS[:1], [[5]], sampling))
