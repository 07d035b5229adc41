"""Right or wrong by a file of questions with answers or tests: `verifier:file=gsm8k.jsonl`.

1 for a right answer, 0 for a wrong one, None for a prompt that is not in the file. The prompt is the question itself, or
the question as `trimtab measure verify` puts it (`prompt`). What is compared, and how code is run: `measure.verify`,
`measure.sandbox`; code only with allow_code=true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trimtab.fingerprint import fingerprint_of
from trimtab.policy import Prompt, prompt_text
from trimtab.rewards.base import Reward


@dataclass(eq=False)
class Verifier(Reward):
    """1 where an answer is right, else 0."""

    file: Path  # questions with answers or tests: GSM8K, MATH, HumanEval, MBPP, or question and answer
    prompt: str = "Question: {question}\\nAnswer:"  # how a question is put; \n begins a line
    allow_code: bool = False  # run the code of answers, in a sandbox
    unsealed: bool = False  # run it even where the system offers no filter of system calls
    seconds: float = 5.0  # wall clock and processor seconds of one program

    slug = "verifier"
    on_prefixes = False

    def __post_init__(self) -> None:
        self._items  # noqa: B018  a broken file is refused here, not in the middle of a run

    @cached_property
    def _items(self) -> dict[str, dict[str, Any]]:
        from trimtab.measure.adapters import read_items
        from trimtab.measure.verify import VerifyConfig, ask, refuse

        VerifyConfig(prompt=self.prompt, seconds=self.seconds)  # its checks of these options
        items = read_items(self.file, "verify")
        refuse(items, self.allow_code)
        return {text: item for item in items for text in (item["question"], ask(item, [], self.prompt))}

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.slug, self.prompt, self.seconds, self._items)

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
        from trimtab.measure.verify import check, cut

        out: list[float | None] = []
        for prompt, text in zip(prompts, texts, strict=True):
            item = self._items.get(prompt_text(prompt))
            if item is None:
                out.append(None)
                continue
            out.append(float(check(item, cut(text, self.prompt), self.seconds, self.unsealed).passed))
        return out
