"""Where guidelines go in a prompt: a header and one line each, before the user's text, which stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.policy import Message, Prompt
from trimtab.prompt.guidelines import GuidelineLibrary

HEADER = "Follow these guidelines where they apply:"


def guided_prompt(prompt: Prompt, lines: Sequence[str], in_system: bool) -> Prompt:
    """The prompt under a header and one line a guideline, in the system message or in front of the user's text."""
    if not lines:
        return prompt
    block = "\n- ".join([HEADER, *lines])
    if isinstance(prompt, str):
        if not in_system:
            return f"{block}\n\n{prompt}"
        prompt = [{"role": "user", "content": prompt}]
    messages: list[Message] = [{**message} for message in prompt]
    if not in_system:
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"] = f"{block}\n\n{first['content']}"
    elif messages[0]["role"] == "system":
        messages[0]["content"] += f"\n\n{block}"
    else:
        messages.insert(0, {"role": "system", "content": block})
    return messages


def takes_system(lm: LM) -> bool:
    """Whether the model's chat template shows a system message, before the user's turn."""
    if not getattr(lm.tokenizer, "chat_template", None):
        return False
    first, then = "guideline-7f3a", "question-7f3a"  # nothing that a template says itself
    probe = [{"role": "system", "content": first}, {"role": "user", "content": then}]
    try:
        text = lm.tokenizer.apply_chat_template(probe, add_generation_prompt=True, tokenize=False)
    except TemplateError:  # this template refuses the role
        return False
    return 0 <= text.find(first) < text.find(then)


def model_of(policy: Any) -> LM | None:
    """The local model that a policy asks, through however many wrappers; None where there is none to see."""
    while policy is not None and not isinstance(policy, LM):
        policy = getattr(policy, "lm", None) or getattr(policy, "policy", None)
    return policy


def refuse_special_tokens(library: GuidelineLibrary, lm: LM | None) -> None:
    """A special token inside a guideline would end the turn it stands in."""
    if lm is None:
        return
    for entry in library:
        token = next((token for token in lm.tokenizer.all_special_tokens if token in entry.line), None)
        if token is not None:
            raise UsageError(
                f"guideline {entry.id} ({entry.line[:40]!r}, by {entry.writer}) holds {token!r}, a special token of "
                f"{lm.name}: take it out of the library"
            )
