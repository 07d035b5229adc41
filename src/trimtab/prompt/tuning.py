"""`sft` and `preference`: train a small `LM` on a copy of itself, in plain torch.

    sft          loss = -sum over completion tokens of log p(token | what is before it) / their number, in a batch
    preference   loss = -mean log sigmoid(beta ((log p(y+) - log p0(y+)) - (log p(y-) - log p0(y-))))    (DPO, 2305.18290)

p is the copy in training, p0 the model as it was given; log p(y) sums over the tokens of a completion, its end token
included, and never over the prompt. Meant for helpers of up to some ten million parameters (rewriters, complement
writers); training at scale belongs to a training library.
Two things differ from common recipes: dropout stays off, so nothing touches the global generator, and weights train in
float32 whatever their type, because steps of this size round to nothing in bfloat16. AdamW, 5 % warm-up, cosine to a
twentieth, gradients clipped at norm 1. The same (model, rows, options) give the same weights on the same machine.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.policy import Cost, Prompt

Progress = Callable[[str], None]
Encoded = tuple[list[int], list[int]]  # token ids of a prompt, and of its completion with the end token


def sft(
    lm: LM,
    rows: Sequence[tuple[Prompt, str]],
    epochs: int = 3,
    lr: float = 1e-3,
    batch: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    name: str | None = None,
    meter: Cost | None = None,
) -> LM:
    """A new `LM` trained on (prompt, completion) rows; `lm` is left as it is.

    Completions are taken to the letter: begin them with a space where the model's answers begin with one.
    name: of the new model (default: the old name and "-sft"). meter: charged the tokens forwarded and the seconds.
    """
    start = time.perf_counter()
    encoded = encode(lm, [prompt for prompt, _ in rows], [text for _, text in rows])
    model = _trainable(lm)

    def loss_of(numbers: list[int]) -> torch.Tensor:
        logprobs = completion_logprobs(model, [encoded[i] for i in numbers])
        return -logprobs.sum() / sum(len(encoded[i][1]) for i in numbers)

    _optimise(model, loss_of, len(encoded), epochs, lr, batch, seed, "sft", progress)
    _charge(meter, lm, epochs * sum(map(_length, encoded)), start)
    return _finished(model, lm, name or f"{lm.name}-sft")


def preference(
    lm: LM,
    rows: Sequence[tuple[Prompt, str, str]],
    beta: float = 0.1,
    epochs: int = 1,
    lr: float = 1e-4,
    batch: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    name: str | None = None,
    meter: Cost | None = None,
) -> LM:
    """A new `LM` trained by DPO on (prompt, chosen, rejected) rows; `lm` is the reference and is left as it is.

    name: of the new model (default: the old name and "-dpo"). meter: charged the tokens forwarded and the seconds.
    """
    if not beta > 0:
        raise UsageError(f"beta must be above 0, not {beta}")
    start = time.perf_counter()
    prompts = [prompt for prompt, _, _ in rows]
    chosen = encode(lm, prompts, [good for _, good, _ in rows])
    rejected = encode(lm, prompts, [bad for _, _, bad in rows])
    model = _trainable(lm)
    with torch.no_grad():  # the copy has not moved yet: it is the reference
        reference = [
            torch.cat([completion_logprobs(model, side[i : i + batch]) for i in range(0, len(side), batch)])
            if side
            else torch.empty(0)
            for side in (chosen, rejected)
        ]

    def loss_of(numbers: list[int]) -> torch.Tensor:
        both = completion_logprobs(model, [chosen[i] for i in numbers] + [rejected[i] for i in numbers])
        good, bad = both.split(len(numbers))
        return dpo_loss(good, bad, reference[0][numbers], reference[1][numbers], beta).mean()

    _optimise(model, loss_of, len(chosen), epochs, lr, batch, seed, "preference", progress)
    _charge(meter, lm, (epochs + 1) * sum(map(_length, chosen + rejected)), start)
    return _finished(model, lm, name or f"{lm.name}-dpo")


def save(lm: LM, folder: str | Path) -> None:
    """Write the model and its tokenizer so that `LM.load(folder)` reads them (weights are safetensors)."""
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


def dpo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, chosen0: torch.Tensor, rejected0: torch.Tensor, beta: float
) -> torch.Tensor:
    """[B] from the log-probabilities [B] of whole completions: under the model, then under the reference."""
    return -F.logsigmoid(beta * ((chosen - chosen0) - (rejected - rejected0)))


def completion_logprobs(model: Any, rows: Sequence[Encoded]) -> torch.Tensor:
    """[B]: log-probability in nats of each completion after its prompt, end token included; differentiable."""
    longest = max(map(_length, rows))
    ids = torch.tensor([[*prompt, *text, *[0] * (longest - len(prompt) - len(text))] for prompt, text in rows])
    place = torch.arange(longest)
    ends = torch.tensor([_length(row) for row in rows])[:, None]
    starts = torch.tensor([len(prompt) for prompt, _ in rows])[:, None]
    ids, seen = ids.to(model.device), (place < ends).long().to(model.device)  # pads are on the right and never seen
    trained = ((place >= starts) & (place < ends)).to(model.device)
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1].float()  # [B, T-1, V]
    logprobs = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # [B, T-1]
    return logprobs.where(trained[:, 1:], 0).sum(1)


def encode(lm: LM, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Encoded]:
    """Token ids of each prompt, as the model is asked it, and of its completion, which ends with the end token."""
    if not lm.eos_ids:
        raise UsageError(f"{lm.name} has no end-of-sequence token: it could not learn where a completion ends")
    own = getattr(lm.tokenizer, "eos_token_id", None)
    end = own if own in lm.eos_ids else min(lm.eos_ids)
    rows = []
    for number, (asked, text) in enumerate(zip(lm.encode(prompts), texts, strict=True)):
        if not text:
            raise UsageError(f"row {number} has an empty completion: there is nothing to learn from it")
        row = (asked, [*lm.tokenizer(text, add_special_tokens=False)["input_ids"], end])
        if lm.context_length is not None and _length(row) > lm.context_length:
            raise UsageError(
                f"row {number} has {_length(row)} tokens with its completion; {lm.name} has a context of "
                f"{lm.context_length}: shorten it"
            )
        rows.append(row)
    return rows


def _length(row: Encoded) -> int:
    return len(row[0]) + len(row[1])


def _trainable(lm: LM) -> Any:
    return copy.deepcopy(lm.model).float().requires_grad_(True)


def _finished(model: Any, lm: LM, name: str) -> LM:
    return LM(model.to(lm.unembedding.dtype), lm.tokenizer, name, lm.batch_rows)


def _charge(meter: Cost | None, lm: LM, tokens: int, start: float) -> None:
    if meter is not None:
        meter.tokens[lm.name] = meter.tokens.get(lm.name, 0) + tokens
        meter.seconds += time.perf_counter() - start


def _optimise(
    model: Any,
    loss_of: Callable[[list[int]], torch.Tensor],
    rows: int,
    epochs: int,
    lr: float,
    batch: int,
    seed: int,
    name: str,
    progress: Progress | None,
) -> None:
    """One pass over all row numbers an epoch, in an order drawn from `seed`."""
    if not rows:
        raise UsageError(f"{name}: there are no rows to train on")
    if epochs < 1 or batch < 1 or not lr > 0:
        raise UsageError(f"{name} needs epochs and batch of 1 or more and lr above 0, not {epochs}, {batch} and {lr}")
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    steps = epochs * math.ceil(rows / batch)
    warm, step = max(1, steps // 20), 0
    for epoch in range(epochs):
        total = 0.0
        for numbers in torch.randperm(rows, generator=generator).split(batch):
            cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimiser.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / warm) * cosine
            loss = loss_of(numbers.tolist())
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            step, total = step + 1, total + loss.item() * len(numbers)
        if progress is not None:
            progress(f"{name}, epoch {epoch + 1}/{epochs}: loss {total / rows:.4f}")
