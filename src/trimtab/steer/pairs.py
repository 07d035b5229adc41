"""Pairs of a preferred and a rejected answer, as the hidden states a value function reads: `PairStates`.

The state of an answer is its last one, from which its end token is drawn. Pairs come from a JSONL file (`read_pairs`,
`pairs_given`) or from answers the model drew itself (`pairs_drawn`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trimtab.errors import UsageError
from trimtab.policy import Cost, Prompt
from trimtab.prompts import check_prompt
from trimtab.steer.rollouts import Rollouts

if TYPE_CHECKING:
    from trimtab.lm import LM


@dataclass
class PairStates:
    """P pairs, ready for the loss.

    preferred, rejected   [P, D] last states
    choices               for each rollout the numbers of the pairs it may be shown, an empty list where there is none
    dropped               how many pairs could not be used, by reason
    cost                  of the forwards that pairs of a file need
    """

    preferred: torch.Tensor
    rejected: torch.Tensor
    choices: list[list[int]]
    dropped: dict[str, int] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)

    def __len__(self) -> int:
        return len(self.preferred)

    def required(self) -> None:
        """Raises `UsageError` where no rollout has a pair."""
        if not any(self.choices):
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "there were none"
            raise UsageError(f"pref-ctrl has no pairs to learn from ({reasons}): give pairs, or set both weights to 0")


def pairs_drawn(rollouts: Rollouts, group: int) -> PairStates:
    """The best and the worst of every `group` answers to a prompt, in the order they were drawn.

    What is left over joins the last group. A rollout is shown its own group's pair.
    """
    last = rollouts.states[rollouts.offsets + rollouts.lengths - 1]
    best: list[int] = []
    worst: list[int] = []
    dropped: dict[str, int] = {}
    choices: list[list[int]] = [[] for _ in range(len(rollouts))]
    for rows in _groups(rollouts.prompt_index.tolist(), group):
        ordered = sorted((float(rollouts.rewards[row]), row) for row in rows)
        (low, q), (high, p) = ordered[0], ordered[-1]
        reason = "with one answer to the prompt" if len(rows) < 2 else "equal rewards" if low == high else ""
        reason = reason or _unusable(_visible(rollouts, p), _visible(rollouts, q))
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        for row in rows:
            choices[row] = [len(best)]
        best.append(p)
        worst.append(q)
    return PairStates(last[best], last[worst], choices, dropped)


def _groups(prompt_index: Sequence[int], size: int) -> Iterator[list[int]]:
    by_prompt: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompt_index):
        by_prompt.setdefault(prompt, []).append(row)
    for rows in by_prompt.values():
        count = max(1, len(rows) // size)
        bounds = [*range(0, count * size, size), len(rows)]
        yield from (rows[a:b] for a, b in zip(bounds, bounds[1:], strict=False))


def _visible(rollouts: Rollouts, row: int) -> list[int]:
    """An answer's tokens without the end token it was stopped by."""
    return rollouts.tokens[row][:-1] if rollouts.ended[row] else rollouts.tokens[row]


def _unusable(chosen: Sequence[int], rejected: Sequence[int]) -> str:
    if not chosen or not rejected:
        return "an empty answer"
    return "identical answers" if chosen == rejected else ""


@dataclass(frozen=True)
class Pair:
    prompt: Prompt
    chosen: str
    rejected: str


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a JSONL file: on every line `prompt` (a string or messages), `chosen` and `rejected`.

    An answer is a string, or a list with one message of the assistant. `UsageError` names the first broken line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"cannot read the pairs file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the pairs file {path} is not UTF-8 (byte {error.start + 1})") from error
    out = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not {"prompt", "chosen", "rejected"} <= row.keys():
                raise ValueError("an object with prompt, chosen and rejected is needed")
            out.append(Pair(check_prompt(row["prompt"]), _answer(row["chosen"]), _answer(row["rejected"])))
        except ValueError as error:
            raise UsageError(f"{path}:{number}: {error}") from error
    return out


def _answer(given: Any) -> str:
    if (
        isinstance(given, list)
        and len(given) == 1
        and isinstance(given[0], dict)
        and given[0].get("role") == "assistant"
    ):
        given = given[0].get("content")
    if not isinstance(given, str):
        raise ValueError("chosen and rejected must each be a string or one message of the assistant")
    return given


def pairs_given(lm: LM, prompts: Sequence[Prompt], pairs: Sequence[Pair], rollouts: Rollouts) -> PairStates:
    """The last states of given pairs, by teacher forcing. A rollout may be shown every pair of its own prompt.

    Dropped, with a count: pairs of a prompt that is not among `prompts`, identical or empty answers, and answers that
    do not fit in the context.
    """
    encoded = dict(zip(map(_key, prompts), lm.encode(prompts), strict=True))
    asked: list[Prompt] = []
    answers: list[list[int]] = []
    of_prompt: dict[str, list[int]] = {}
    dropped: dict[str, int] = {}
    cost = Cost({lm.name: 0})
    for pair in pairs:
        key, two = _key(pair.prompt), []
        reason = "" if key in encoded else "their prompt is not among those fitted on"
        if not reason:
            two = [answer_tokens(lm, pair.prompt, encoded[key], text) for text in (pair.chosen, pair.rejected)]
            reason = _unusable(two[0][:-1], two[1][:-1])
            longest = len(encoded[key]) + max(map(len, two)) - 1  # the end token is not forwarded
            if not reason and lm.context_length is not None and longest > lm.context_length:
                reason = "longer than the context"
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        of_prompt.setdefault(key, []).append(len(asked) // 2)
        asked += [pair.prompt] * 2
        answers += two
        cost.tokens[lm.name] += sum(len(encoded[key]) + len(answer) - 1 for answer in two)
    states = [state[-1].float().cpu() for state in lm.hidden_states(asked, answers)] if asked else []
    last = torch.stack(states) if states else torch.zeros(0, lm.hidden_size)
    choices = [of_prompt.get(_key(prompts[number]), []) for number in rollouts.prompt_index.tolist()]
    return PairStates(last[0::2], last[1::2], choices, dropped, cost)


def _key(prompt: Prompt) -> str:
    return json.dumps(prompt, sort_keys=True)


def answer_tokens(lm: LM, prompt: Prompt, encoded: Sequence[int], text: str) -> list[int]:
    """Tokens of a written answer as the model would continue the prompt, the end token last.

    A plain prompt and its answer are tokenised as one text where that leaves the prompt's own tokens as they are. Where
    no end token is known any number stands for it: the last token of an answer is never forwarded.
    """
    ids: list[int] | None = None
    if isinstance(prompt, str) and not getattr(lm.tokenizer, "chat_template", None):
        whole = lm.encode([prompt + text])[0] if _fits(lm, prompt + text) else []
        ids = whole[len(encoded) :] if whole[: len(encoded)] == list(encoded) else None
    if ids is None:
        ids = list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids if ids and ids[-1] in lm.eos_ids else [*ids, min(lm.eos_ids, default=0)]


def _fits(lm: LM, text: str) -> bool:
    return lm.context_length is None or len(lm.tokenizer(text)["input_ids"]) <= lm.context_length
