"""The uses that `Session` was designed for, each as the few lines a method would write, against recomputation."""

from __future__ import annotations

import pytest
import torch

from recompute import PROMPTS, recompute
from tiny import tiny_lm, tiny_tokenizer
from trimtab import LM, Control, Sampling
from trimtab.generation import sample
from trimtab.sampling import draw, uniforms
from trimtab.session import Session


def last_logits(lm: LM, rows: list[list[int]]) -> torch.Tensor:
    return torch.stack([logits[-1] for logits, _ in recompute(lm, rows)])


def test_best_of_n_with_one_prefill(llama: LM) -> None:
    n, sampling = 4, Sampling(max_new_tokens=8, seed=3)
    prefill = llama.session(llama.encode(PROMPTS))
    candidates = prefill.fork([row for row in range(len(PROMPTS)) for _ in range(n)])
    drawn = sample(candidates, sampling, uniforms(n * len(PROMPTS), 8, 3))
    best = [max(range(row * n, row * n + n), key=lambda i: sum(drawn.logprobs[i])) for row in range(len(PROMPTS))]
    assert drawn.tokens == llama.generate(PROMPTS, sampling.but(samples=n)).tokens
    assert prefill.tokens_forwarded == sum(map(len, llama.encode(PROMPTS)))
    assert candidates.tokens_forwarded == sum(len(row) - 1 for row in drawn.tokens)
    assert len(best) == len(PROMPTS)


def test_lookahead_over_k_candidates_with_rollback(lm: LM) -> None:
    """Each step takes, of the k likeliest tokens, the one that leaves the next distribution surest."""
    k, steps = 3, 4
    rows = lm.encode(PROMPTS)
    session = lm.session(rows)
    for _ in range(steps):
        tokens = session.logits.topk(k).indices  # [B, k]
        ahead = session.fork([row for row in range(session.rows) for _ in range(k)])
        ahead.append(tokens.flatten())
        surest = ahead.logits.log_softmax(-1).amax(-1).view(-1, k)
        session.append(tokens.gather(1, surest.argmax(-1, keepdim=True))[:, 0])
    by_rewind = lm.session(rows)
    for _ in range(steps):
        tokens, sure = by_rewind.logits.topk(k).indices, []
        for candidate in tokens.unbind(1):
            by_rewind.append(candidate)
            sure.append(by_rewind.logits.log_softmax(-1).amax(-1))
            by_rewind.rewind(by_rewind.lengths - 1)
        by_rewind.append(tokens.gather(1, torch.stack(sure, 1).argmax(-1, keepdim=True))[:, 0])
    for _ in range(steps):
        tokens = last_logits(lm, rows).topk(k).indices
        ahead = [[*row, int(token)] for row, few in zip(rows, tokens, strict=True) for token in few]
        best = last_logits(lm, ahead).log_softmax(-1).amax(-1).view(-1, k).argmax(-1).tolist()
        rows = [ahead[row * k + at] for row, at in enumerate(best)]
    assert session.tokens == by_rewind.tokens == rows


def test_mcmc_resamples_a_suffix_at_another_position_in_every_row(llama: LM) -> None:
    prompts, steps = llama.encode(PROMPTS), 8
    llama.__dict__["eos_ids"], before = frozenset(), llama.eos_ids
    try:
        state = llama.session(prompts)
        sample_fixed(state, uniforms(len(prompts), steps, 0))
        old, generator = state.tokens, torch.Generator().manual_seed(1)
        for move in range(4):
            cuts = torch.randint(0, steps, (len(prompts),), generator=generator)
            keep = state.prompts + cuts
            proposal = state.fork(range(state.rows))
            proposal.rewind(keep)
            room = (state.lengths - keep).tolist()
            new, logprob = regrow(proposal, room, uniforms(len(prompts), steps, 10 + move))
            assert proposal.tokens_forwarded == sum(room)
            for row, length in enumerate(keep.tolist()):
                assert new[row][:length] == old[row][:length] and len(new[row]) == len(old[row])
                logits = recompute(llama, [new[row]])[0][0].log_softmax(-1)[length - 1 : -1]
                exact = float(logits.gather(-1, torch.tensor(new[row][length:])[:, None]).sum())
                assert logprob[row] == pytest.approx(exact, abs=1e-3)
            state, old = proposal, new
    finally:
        llama.__dict__["eos_ids"] = before


def sample_fixed(session: Session, uniform: torch.Tensor) -> None:
    for column in uniform.unbind(1):
        session.append(draw(session.logits.log_softmax(-1), column))


def regrow(session: Session, room: list[int], uniform: torch.Tensor) -> tuple[list[list[int]], list[float]]:
    """Append `room[row]` sampled tokens to each row."""
    total = [0.0] * len(room)
    for step in range(max(room)):
        logprobs = session.logits.log_softmax(-1)
        token = draw(logprobs, uniform[:, step])
        live = [step < count for count in room]
        for row in range(len(room)):
            total[row] += float(logprobs[row, token[row]]) if live[row] else 0.0
        session.append([[int(token[row])] if live[row] else [] for row in range(len(room))])
    return session.tokens, total


def follow(session: Session, rows: list[list[int]]) -> None:
    """Make the session hold `rows`, forwarding only what differs from what it holds."""
    shared = []
    for own, new in zip(session.tokens, rows, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(own, new, strict=False)) if a != b), min(len(own), len(new)))
        shared.append(max(1, same))
    session.rewind(shared)
    session.append([row[length:] for row, length in zip(rows, shared, strict=True)])


def test_two_models_with_different_tokenizers_write_in_turn() -> None:
    """A writes words, B bytes; B's merges reach back over the boundary, so B must rewind, not only append."""
    writer, other = tiny_lm("llama"), tiny_lm("gpt2", tokenizer=tiny_tokenizer("bytes"), seed=1, n_positions=256)
    texts = PROMPTS
    word, byte = writer.session(writer.encode(texts)), other.session(other.encode(texts))
    for turn in range(4):
        if turn % 2 == 0:
            follow(word, writer.encode(texts))
            tokens = draw(word.logits[:, 4:].log_softmax(-1), uniforms(len(texts), 1, turn)[:, 0]) + 4
            texts = [
                f"{text}{'' if text.endswith('b') else ' '}{writer.decode([t])}"
                for text, t in zip(texts, tokens, strict=True)
            ]
        follow(byte, other.encode(texts))
        assert byte.tokens == other.encode(texts)
        torch.testing.assert_close(byte.logits, last_logits(other, other.encode(texts)), atol=1e-4, rtol=0)
        letters = [token for token in range(4, 260) if other.decode([token]) in "bdfgaeiou"]
        best = [letters[int(row.argmax())] for row in byte.logits[:, letters]]
        texts = [text + other.decode([token]) for text, token in zip(texts, best, strict=True)]
    follow(word, writer.encode(texts))
    torch.testing.assert_close(word.logits, last_logits(writer, writer.encode(texts)), atol=1e-4, rtol=0)
    for ending in (" m", " mo"):  # the second is one token that replaces the first
        follow(byte, other.encode([text + ending for text in texts]))
    mended = other.encode([text + " mo" for text in texts])
    assert byte.tokens == mended and mended[0][-1] != other.encode([" m"])[0][-1]
    torch.testing.assert_close(byte.logits, last_logits(other, mended), atol=1e-4, rtol=0)


def test_the_distributions_of_several_models_are_mixed_at_every_token() -> None:
    models = [tiny_lm(arch, seed=seed) for seed, arch in enumerate(("llama", "gpt2", "mistral"))]
    rows = models[0].encode(PROMPTS)
    sessions, uniform = [lm.session(rows) for lm in models], uniforms(len(rows), 8, 0)
    for column in uniform.unbind(1):
        mixed = torch.stack([session.logits.softmax(-1) for session in sessions]).mean(0).log()
        exact = torch.stack([last_logits(lm, rows).softmax(-1) for lm in models]).mean(0).log()
        torch.testing.assert_close(mixed, exact, atol=1e-4, rtol=0)
        token = draw(mixed, column)
        for session in sessions:
            session.append(token)
        rows = [[*row, int(t)] for row, t in zip(rows, token, strict=True)]
    assert all(session.tokens == rows for session in sessions)


def test_a_value_network_reads_and_edits_the_final_state(llama: LM) -> None:
    class Climb(Control):
        """One gradient step on a small value network; its own autograd inside a no-grad loop."""

        def __init__(self) -> None:
            generator = torch.Generator().manual_seed(0)
            self.first, self.second = torch.randn(32, 16, generator=generator), torch.randn(16, generator=generator)
            self.steps: list[list[int]] = []

        def value(self, hidden: torch.Tensor) -> torch.Tensor:
            return (hidden @ self.first).relu() @ self.second

        def edit(self, hidden: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
            if step is not None:
                self.steps.append(step.tolist())
            with torch.enable_grad():
                leaf = hidden.detach().requires_grad_(True)
                (gradient,) = torch.autograd.grad(self.value(leaf).sum(), leaf)
            return hidden + 0.02 * gradient

    control = Climb()
    rows = llama.encode(PROMPTS)
    session, plain = llama.session(rows, control), llama.session(rows)
    for token in range(10, 13):
        torch.testing.assert_close(session.hidden, plain.hidden, atol=1e-5, rtol=1e-5)  # the cache is never edited
        assert bool((control.value(session.edited) > control.value(session.hidden)).all())
        torch.testing.assert_close(session.logits, llama.head(control.edit(session.hidden)), atol=1e-5, rtol=1e-5)
        for each in (session, plain):
            each.append(torch.full((len(rows),), token))
    assert control.steps == [[0] * 5, [1] * 5, [2] * 5]
    fork = session.fork([1, 1])
    assert fork.edited.shape == (2, 32) and control.steps[-1] == [3, 3]
