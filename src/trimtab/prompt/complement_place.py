r"""Where a complement goes: after the user's own words, wherever these stand in the prompt; and what M_p is asked.

chat, or a bare question   Where?            ->  Where?\nBe brief.
"Q: {prompt}\nA:"           Q: Where?\nA:      ->  Q: Where?\nBe brief.\nA:
conversation               the last message, likewise
"""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.policy import Prompt
from trimtab.prompt.rewriter import instruction_of, with_instruction

INSTRUCTION = (
    "You are an expert in completing prompts. Say what the prompt leaves unsaid about style, format and what to cover, "
    "in about 30 words; never answer it. <user prompt> {prompt} <complementary information>"
)
ROOM = 4  # a complemented prompt leaves at least a quarter of the context to the answer


def words_of(prompt: Prompt, template: str | None = None) -> str:
    """The user's own words: the last message, or what stands in the frame of a plain prompt.

    UsageError for a plain prompt that does not have the form of `template`.
    """
    if template is None or not isinstance(prompt, str):
        return instruction_of(prompt)
    before, after = unescaped(template).split("{prompt}")
    if not (prompt.startswith(before) and prompt.endswith(after) and len(prompt) >= len(before) + len(after)):
        raise UsageError(f"the prompt {prompt[:60]!r} does not have the form template={template!r}")
    return prompt[len(before) : len(prompt) - len(after)]


def with_complement(prompt: Prompt, complement: str, template: str | None = None, separator: str = r"\n") -> Prompt:
    """The prompt with a complement after the user's words, everything else as it was."""
    words = words_of(prompt, template)
    new = f"{words}{unescaped(separator)}{complement}"
    if template is None or not isinstance(prompt, str):
        return with_instruction(prompt, new)
    return unescaped(template).replace("{prompt}", new)


def unescaped(text: str) -> str:
    r"""A newline for each \n, as it is written on a command line."""
    return text.replace(r"\n", "\n")


def has_room(lm: LM | None, prompt: Prompt) -> bool:
    """Whether a prompt leaves a quarter of the model's context to what follows it."""
    if lm is None or lm.context_length is None:
        return True
    try:
        (tokens,) = lm.encode([prompt])
    except UsageError:  # longer than the whole context, or nothing at all
        return False
    return len(tokens) <= lm.context_length - lm.context_length // ROOM


def request(instruction: str, words: str, keywords: Sequence[str] = ()) -> str:
    """What the complement model is asked."""
    kept = f" <ask for nothing but> {', '.join(keywords)}" if keywords else ""
    return unescaped(instruction).replace("{prompt}", words + kept)
