"""Exact log-probabilities of given answers: no sampling, no parsing.

log p(option | prompt) = sum_t log p(o_t | prompt, o_<t) over the option's own tokens. A prompt is forwarded once and
forked for its options; the options' last tokens are never forwarded. An option is tokenized by itself after the prompt's
tokens: begin it with a space where the model's answers begin with one. Temperature 1, nothing cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trimtab.errors import UsageError
from trimtab.policy import Cost, Prompt


def option_ids(lm: Any, options: Sequence[str]) -> list[list[int]]:
    """Token ids of options as they follow a prompt. UsageError for an empty one, or two with the same tokens."""
    ids = [list(map(int, lm.tokenizer(option, add_special_tokens=False)["input_ids"])) for option in options]
    for option, row in zip(options, ids, strict=True):
        if not row:
            raise UsageError(f"the option {option!r} has no tokens")
    if len({tuple(row) for row in ids}) < len(ids):
        raise UsageError(f"two of the options {list(options)} have the same tokens in {lm.name}")
    return ids


@torch.no_grad()
def option_logprobs(
    policy: Any,
    prompts: Sequence[Prompt],
    options: Sequence[Sequence[str]],
    *,
    end: bool = False,
    meter: Cost | None = None,
) -> list[list[torch.Tensor]]:
    """For each prompt and option the log-probabilities in nats of the option's tokens, [T]; sum them for log p(option).

    policy: an `LM`, or an `LM` under a control (`Steered`). options[i]: those of prompts[i]. end: the end-of-sequence
    token is part of every option (needed where one option begins with another).
    """
    lm = getattr(policy, "lm", None)
    if lm is None or not hasattr(policy, "token_logprobs"):
        raise UsageError(f"{policy.name} gives no log-probabilities of given answers: a local model is needed")
    if len(options) != len(prompts):
        raise UsageError(f"there are {len(prompts)} prompts and {len(options)} lists of options")
    closing = [min(lm.eos_ids)] if end else []
    ids = [[[*row, *closing] for row in option_ids(lm, choices)] for choices in options]
    control = getattr(policy, "control", None)
    encoded = lm.encode(prompts)
    out: list[list[torch.Tensor]] = []
    rows = max(1, lm.batch_rows // max((len(choices) for choices in ids), default=1))
    for at in range(0, len(encoded), rows):
        part = ids[at : at + rows]
        owners = [row for row, choices in enumerate(part) for _ in choices]
        flat = [option for choices in part for option in choices]
        session = lm.session(encoded[at : at + rows], control, meter)
        first = session.logits.log_softmax(-1)  # [B, V]
        longer = [at for at, option in enumerate(flat) if len(option) > 1]
        if longer:  # an option of one token is read off the prompt's own distribution
            session = session.fork([owners[at] for at in longer])
            session.append([flat[at][:-1] for at in longer])
        rows_of = {at: row for row, at in enumerate(longer)}
        scored = []
        for number, option in enumerate(flat):
            picked = [first[owners[number], option[0]].cpu()]
            if number in rows_of:
                # those that the tokens after the first are drawn from
                states = session.states(rows_of[number])[-(len(option) - 1) :]
                if session.final is not None:
                    states = session.final.edit(states, torch.arange(1, len(option))).to(states.dtype)
                logprobs = lm.head(states).log_softmax(-1)
                picked += list(logprobs[torch.arange(len(states)), option[1:]].cpu())
            scored.append(torch.stack(picked))
        taken = iter(scored)
        out += [[next(taken) for _ in choices] for choices in part]
    return out


def option_probabilities(
    policy: Any,
    prompts: Sequence[Prompt],
    options: Sequence[Sequence[str]],
    *,
    end: bool = False,
    meter: Cost | None = None,
) -> list[torch.Tensor]:
    """For each prompt p(option) among its options, [K], sums to 1: softmax of the summed log-probabilities."""
    scored = option_logprobs(policy, prompts, options, end=end, meter=meter)
    return [torch.stack([one.sum() for one in choices]).softmax(0) for choices in scored]
