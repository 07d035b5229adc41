"""Where a suffix goes in a prompt: at the end of the user's turn, before the tokens that ask for the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.policy import Prompt

FIRST = ("x", " x", "!", " !")  # what a search starts from, where the tokenizer has it


@dataclass(frozen=True)
class Place:
    """A prompt's tokens before and after a suffix, and tokens that a search may start from."""

    prompt: Prompt
    before: list[int]
    start: list[int]
    after: list[int]


def with_suffix(lm: LM, prompt: Prompt, suffix: str, tail: str) -> Prompt:
    """The prompt with a suffix at the end of the user's turn. tail: the end of a prompt without a chat template that
    asks for the answer; UsageError where neither says where the user's turn ends."""
    gap = "" if suffix[:1].isspace() else " "
    if getattr(lm.tokenizer, "chat_template", None):
        earlier, content = ([], prompt) if isinstance(prompt, str) else (prompt[:-1], prompt[-1]["content"])
        if tail:
            content = content.removesuffix(tail)
        return [*earlier, {"role": "user", "content": f"{content}{gap}{suffix}"}]
    text = lm.render(prompt)
    if not tail or not text.endswith(tail):
        raise UsageError(
            f"{lm.name} has no chat template, and a suffix must not come after what asks for the answer: give the end "
            f"that every prompt has (such as ' ?') as tail=TEXT; this one ends with {text[-12:]!r}"
        )
    return f"{text[: -len(tail)]}{gap}{suffix}{tail}"


def encoded(lm: LM, prompt: Prompt, suffix: Sequence[int], tail: str) -> list[int]:
    """The tokens of the prompt with the suffix as text: decoded, inserted, encoded again."""
    return lm.encode([with_suffix(lm, prompt, lm.decode(suffix), tail)])[0]


def allowed_ids(lm: LM) -> torch.Tensor:
    """Ids a suffix may hold: printable, not blank, not special."""
    special = set(lm.tokenizer.all_special_ids) | set(lm.eos_ids)
    texts = lm.tokenizer.batch_decode([[number] for number in range(len(lm.tokenizer))])
    keep = [i for i, text in enumerate(texts) if i not in special and text.strip() and text.isprintable()]
    keep = [i for i in keep if i < lm.model.get_input_embeddings().weight.shape[0] and "\ufffd" not in texts[i]]
    if len(keep) < 2:
        raise UsageError(f"{lm.name} has no printable tokens to make a suffix of")
    return torch.tensor(keep)


def find_place(lm: LM, prompt: Prompt, length: int, tail: str, allowed: torch.Tensor) -> Place:
    """Where `length` suffix tokens go in a prompt. UsageError where no token repeated that often survives."""
    first = [i for text in FIRST for i in lm.tokenizer(text, add_special_tokens=False)["input_ids"]]
    inside = set(allowed.tolist())
    for token in dict.fromkeys([*(i for i in first if i in inside), *allowed.tolist()[:300]]):
        row, run = encoded(lm, prompt, [token] * length, tail), [token] * length
        for at in range(len(row) - length, -1, -1):
            if row[at : at + length] == run:
                return Place(prompt, row[:at], run, row[at + length :])
    raise UsageError(
        f"no repeated token of {lm.name} keeps its {length} tokens inside a prompt: its tokenizer does not round-trip; "
        "try fewer suffix_tokens"
    )


def survivor(lm: LM, place: Place, tail: str) -> Callable[[list[int]], bool]:
    """Whether a suffix, decoded and encoded again inside the prompt, is still the same tokens."""
    return lambda suffix: encoded(lm, place.prompt, suffix, tail) == [*place.before, *suffix, *place.after]


def random_suffix(
    place: Place, allowed: torch.Tensor, survives: Callable[[list[int]], bool] | None, generator: torch.Generator
) -> list[int]:
    """A random suffix of the same length that survives; the start where 200 draws give none."""
    for _ in range(200):
        picked = allowed[torch.randint(len(allowed), (len(place.start),), generator=generator)].tolist()
        if survives is None or survives(picked):
            return [int(token) for token in picked]
    return place.start
