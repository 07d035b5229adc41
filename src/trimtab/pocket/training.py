"""Plain training loops for the pocket models: next-token, direct preference, and Bradley-Terry for the reward model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, EOS = 0, 1
IGNORE = -100  # label of a position that is not trained on


def fit(
    model: PreTrainedModel,
    loss_of_step: Callable[[int], torch.Tensor],
    steps: int,
    learning_rate: float,
    name: str,
    save_at: Sequence[int] = (),
    on_save: Callable[[], None] | None = None,
) -> None:
    """AdamW, 5 % warm-up, cosine to a twentieth, clipped at norm 1; prints loss and time left every hundredth step."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    kept = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": kept, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    model.train()
    started, running = time.perf_counter(), 0.0
    for step in range(steps):
        warm = max(1, steps // 20)
        share = min(1.0, (step + 1) / warm) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * share
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            took = time.perf_counter() - started
            left = took / (step + 1) * (steps - step - 1)
            print(f"{name}: step {step + 1}/{steps} loss {running:.4f} {took:.0f} s, {left:.0f} s left", flush=True)
        if step + 1 in save_at and on_save is not None:
            on_save()
    model.eval()


def windows(
    dialogues: Iterator[tuple[list[int], list[int]]], rows: int, length: int, answers_only: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input ids, labels), both [rows, length]: whole dialogues end to end, each row starting with the start of one.

    `dialogues` yields (prompt ids, answer ids). The last dialogue of a row is cut. With `answers_only` the labels of
    prompts are `IGNORE`.
    """
    ids = torch.full((rows, length), PAD)
    labels = torch.full((rows, length), IGNORE)
    for row in range(rows):
        at = 0
        while at < length:
            prompt, answer = next(dialogues)
            tokens = (prompt + answer)[: length - at]
            ids[row, at : at + len(tokens)] = torch.tensor(tokens)
            trained = min(len(prompt), len(tokens)) if answers_only else 0
            labels[row, at + trained : at + len(tokens)] = torch.tensor(tokens[trained:], dtype=torch.long)
            at += len(tokens)
    return ids, labels


def next_token_loss(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats over the labelled positions."""
    logits = model(input_ids=ids, use_cache=False).logits  # [B, T, V]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def answer_ids(tokenizer: PreTrainedTokenizerFast, answers: Sequence[str]) -> list[list[int]]:
    """Token ids of answers as they follow a prompt: a space, the text, `</s>`."""
    return [ids + [EOS] for ids in tokenizer([" " + a.strip() for a in answers])["input_ids"]]


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], answers: Sequence[str]
) -> torch.Tensor:
    """[B]: what a reward model says of each answer, read as prompt, space, answer, `</s>`."""
    texts = [f"{p} {a.strip()}" for p, a in zip(prompts, answers, strict=True)]
    ids, mask = right_padded([row + [EOS] for row in tokenizer(texts)["input_ids"]])
    return model(input_ids=ids, attention_mask=mask).logits[:, 0]


def right_padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both [B, T]."""
    longest = max(map(len, rows))
    ids = torch.tensor([list(r) + [PAD] * (longest - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
    return ids, mask


def answer_logprob(model: PreTrainedModel, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> torch.Tensor:
    """[B]: log-probability in nats of each answer (its `</s>` included) after its prompt."""
    ids, mask = right_padded([p + a for p, a in zip(prompts, answers, strict=True)])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # [B, T-1, V]
    logprobs = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # [B, T-1]
    place = torch.arange(ids.shape[1] - 1)[None, :]
    first = torch.tensor([len(p) - 1 for p in prompts])[:, None]
    last = torch.tensor([len(p) + len(a) - 1 for p, a in zip(prompts, answers, strict=True)])[:, None]
    return (logprobs * ((place >= first) & (place < last))).sum(1)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    temperature: float,
    seed: int,
    max_new_tokens: int = 64,
    rows: int = 256,
) -> list[str]:
    """Answers as text, one a prompt; temperature 0 is greedy. Draws come from a generator seeded for each chunk."""
    texts: list[str] = []
    for start in range(0, len(prompts), rows):
        generator = torch.Generator().manual_seed(seed * 100_003 + start)
        batch = tokenizer(list(prompts[start : start + rows]), padding=True, padding_side="left", return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
        drawn = torch.full((len(ids), max_new_tokens), EOS)
        alive = torch.ones(len(ids), dtype=torch.bool)
        for step in range(max_new_tokens):
            logits = out.logits[:, -1].float()
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            token = torch.where(alive, token, EOS)
            drawn[:, step] = token
            alive &= token != EOS
            if not alive.any():
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            positions = positions[:, -1:] + 1
            out = model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
        texts += [t.strip() for t in tokenizer.batch_decode(drawn, skip_special_tokens=True)]
    return texts
