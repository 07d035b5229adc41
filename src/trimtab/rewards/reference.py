"""Against reference answers: `exact-match:file=FILE`, `token-f1:file=FILE`, `cosine:file=FILE`; the best reference counts.

FILE is JSONL with `prompt` and `reference` (a text, or a list of texts) on every line. A prompt that is not in it cannot
be judged: None. Answers are compared as SQuAD compares them (Rajpurkar et al. 2016): lower case, without punctuation,
English articles and surplus space; `as_is` compares the texts themselves, as `cosine` always does.
"""

from __future__ import annotations

import json
import re
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.policy import Prompt, prompt_text
from trimtab.rewards.base import Reward


@dataclass(eq=False)
class _Referenced(Reward):
    """What both share: the file."""

    file: Path  # JSONL: {"prompt": ..., "reference": text or list of texts} on every line
    as_is: bool = False  # compare the texts as they are, space at their ends left out

    def __post_init__(self) -> None:
        self._references  # noqa: B018  a broken file is refused here, not in the middle of a run

    @cached_property
    def _references(self) -> dict[str, list[str]]:
        try:
            lines = Path(self.file).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UsageError(f"reward {self.slug!r}: cannot read {self.file}: {error}") from error
        out: dict[str, list[str]] = {}
        for number, line in enumerate(lines, start=1):
            row = _row(line)
            given = row.get("reference")
            texts = [given] if isinstance(given, str) else given
            if "prompt" not in row or not isinstance(texts, list) or not texts or not all(map(_is_text, texts)):
                raise UsageError(
                    f'{self.file}:{number}: an object {{"prompt": ..., "reference": a text or texts}} is needed'
                )
            out.setdefault(prompt_text(row["prompt"]), []).extend(texts)
        if not out:
            raise UsageError(f"reward {self.slug!r}: {self.file} is empty")
        return out

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.slug, self.as_is, self._references)


class _Compared(_Referenced):
    """Answer and reference compared one with one; subclasses say how."""

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
        out: list[float | None] = []
        for prompt, text in zip(prompts, texts, strict=True):
            known = self._references.get(prompt_text(prompt))
            answer = self._plain(text)
            out.append(None if known is None else max(self._alike(answer, self._plain(one)) for one in known))
        return out

    def _plain(self, text: str) -> str:
        return text.strip() if self.as_is else normalised(text)

    @abstractmethod
    def _alike(self, answer: str, reference: str) -> float:
        """How like they are, 0 to 1."""


@dataclass(eq=False)
class ExactMatch(_Compared):
    """1 where the answer is a reference, else 0."""

    slug = "exact-match"
    on_prefixes = False

    def _alike(self, answer: str, reference: str) -> float:
        return float(answer == reference)


@dataclass(eq=False)
class TokenF1(_Compared):
    """The harmonic mean of precision and recall over words, those of the answer against those of a reference.

    Two texts without a word are alike (1); a text without a word and one with words are not (0).
    """

    slug = "token-f1"

    def _alike(self, answer: str, reference: str) -> float:
        return token_f1(answer.split(), reference.split())


@dataclass(eq=False)
class Cosine(_Referenced):
    """The cosine of the embeddings of answer and reference, in [-1, 1]; comparable under one embedder only."""

    slug = "cosine"

    as_is: bool = field(init=False, default=True)
    embedder: Path | None = None  # a local sentence-transformers folder; none: the packaged MiniLM

    def __post_init__(self) -> None:
        super().__post_init__()
        self._embedder  # noqa: B018  a missing package is said here, not in the middle of a run

    @cached_property
    def _embedder(self) -> Any:
        from trimtab.measure.coherence import load_embedder

        found = load_embedder(self.embedder)
        if found is None:
            raise UsageError("reward 'cosine' needs a sentence embedder; run: pip install \"trimtab[text]\"")
        return found

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.slug, self._embedder.name, self._references)

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
        known = [self._references.get(prompt_text(prompt)) for prompt in prompts]
        every = [*(text.strip() or " " for text in texts), *(one for some in known for one in some or ())]
        vectors = self._embedder.embed(every)  # [N + references, D], of length 1
        out: list[float | None] = []
        first = len(texts)
        for row, some in enumerate(known):
            count = len(some or ())
            out.append(float((vectors[first : first + count] @ vectors[row]).max()) if count else None)
            first += count
        return out


def normalised(text: str) -> str:
    """Lower case, without punctuation and the words a, an, the; single spaces."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def token_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return float(not answer and not reference)
    return 2 * (Counter(answer) & Counter(reference)).total() / (len(answer) + len(reference))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
