"""Two measurements of a skill that need no file but texts: how well a model predicts them, and what its answers are worth.

    nll      sum over a text's tokens of -log p(token | what is before it) / bytes of the text, nats a byte; less is better
    reward   mean reward of the answers to a prompt; more is better

Bytes, not tokens, so that models with other tokenizers can be set side by side. A text's first token is scored where the
model has a beginning-of-sequence token to put before it; elsewhere it only stands before the others. A text longer than
the context is cut into pieces that do not see one another. One value a text or prompt, so models are compared in pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from trimtab.errors import UsageError
from trimtab.measure.diagnostic import Diagnostic, Subject
from trimtab.measure.measurement import Measurement, Row
from trimtab.measure.panel import per_prompt
from trimtab.measure.stats import mean_interval
from trimtab.policy import prompt_text

NLL, REWARD = "NLL per byte", "reward"


@dataclass(frozen=True)
class TextNllConfig:
    pass


class TextNll(Diagnostic):
    """How well a model predicts texts, raw: no chat template comes between."""

    slug = "nll"
    Config = TextNllConfig
    TEXTS = "texts, one a line or JSONL with a 'prompt'"
    TEMPLATED = False

    def measure(self, subject: Subject) -> Measurement:
        texts = subject.read_prompts(self.TEXTS)
        plain = [text for text in texts if isinstance(text, str)]
        if len(plain) < len(texts):
            raise UsageError("nll reads plain texts, not dialogues: give --texts lines of text")
        found = text_nll(subject.lm, plain)
        measured = subject.measured(plain, self.config) | {"template": "none"}
        return _one_column(self.slug, subject, measured, "text", plain, NLL, found, "lower")


@dataclass(frozen=True)
class RewardedConfig:
    # answers drawn for each prompt
    samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"samples must be 1 or more, not {self.samples}")


class Rewarded(Diagnostic):
    """What the answers to prompts are worth."""

    slug = "reward"
    Config = RewardedConfig
    TEXTS = "prompts, one a line or JSONL"

    def measure(self, subject: Subject) -> Measurement:
        if subject.reward is None:
            raise UsageError("the skill 'reward' needs to know what is good: reward:reward=SPEC,texts=FILE")
        prompts = subject.read_prompts(self.TEXTS)
        sampling = subject.sampling.but(samples=self.config.samples)
        answers = subject.answers(prompts, sampling)
        scores = subject.reward.score(answers.prompts, answers.texts)
        measured = subject.measured(
            prompts, self.config, sampling=sampling.to_dict(), reward=subject.reward.fingerprint
        )
        units = [prompt_text(prompt)[:80] for prompt in prompts]
        values = per_prompt(scores, sampling.samples)
        return _one_column(self.slug, subject, measured, "prompt", units, REWARD, values, "higher")


def _one_column(
    slug: str,
    subject: Subject,
    measured: dict[str, Any],
    unit: str,
    units: list[str],
    label: str,
    values: Any,
    better: Any,
) -> Measurement:
    row = Row.of(label, mean_interval(values), better)
    units = [one[:80] for one in units]
    return Measurement(slug, subject.name, measured, unit, units, {label: list(values)}, [row], cost=subject.meter)


@torch.no_grad()
def text_nll(lm: Any, texts: list[str]) -> list[float | None]:
    """Nats a byte of each text. None: a text of which no token is predicted (one token, no beginning-of-sequence token)."""
    start = lm.tokenizer.bos_token_id
    pieces: list[tuple[int, list[int]]] = []  # which text, token ids with what stands before them
    for number, ids in enumerate(lm.tokenizer(texts, add_special_tokens=False)["input_ids"]):
        room = (lm.context_length or max(len(ids), 2)) - (start is not None)
        for first in range(0, len(ids), room):
            pieces.append((number, [*([start] if start is not None else []), *ids[first : first + room]]))
    total, scored = [0.0] * len(texts), [0] * len(texts)
    pieces.sort(key=lambda piece: (len(piece[1]), piece[0]))  # of like length together: little padding
    rows = max(1, min(lm.batch_rows, 64))
    for first in range(0, len(pieces), rows):
        part = pieces[first : first + rows]
        longest = max(len(ids) for _, ids in part)
        if longest < 2:
            continue
        ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for _, ids in part], device=lm.device)  # [B, T]
        seen = torch.arange(longest) < torch.tensor([len(ids) for _, ids in part])[:, None]
        seen = seen.to(lm.device)
        logits = lm.model(input_ids=ids, attention_mask=seen.long(), use_cache=False).logits[:, :-1].float()
        nll = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").where(seen[:, 1:], 0.0)
        for (number, _), value, count in zip(
            part, nll.double().sum(1).tolist(), seen[:, 1:].sum(1).tolist(), strict=True
        ):
            total[number] += value
            scored[number] += count
    found = [
        value / len(text.encode()) if count else None for value, count, text in zip(total, scored, texts, strict=True)
    ]
    if any(value is not None and not math.isfinite(value) for value in found):
        raise UsageError(f"{lm.name} gives texts a likelihood that is not finite: are its weights finite?")
    return found
