"""A local model as a judge: exact probabilities of what it may say, no sampling and no parsing.

p(v) = the sum over the spellings of v ("7" and " 7", where their tokens differ) of the probability of exactly these tokens
after the question; restricted to the options, softmax of log p(v). `mass` is sum_v p(v), what the model itself gives to
the options: near 0 where it would rather say anything else and is being forced to choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.measure.cache import Cache
from trimtab.policy import Cost

CHUNK = 32  # questions asked and cached together


@dataclass(frozen=True)
class Chosen:
    """p of each option (sums to 1), and the mass they hold together. p None: not asked, `error` says why."""

    p: list[float] | None
    mass: float | None = None
    error: str = ""


class LocalJudge:
    """A causal language model that is asked to choose. lm: an `LM`, or what `LM.load` takes."""

    def __init__(self, lm: Any, cache: Cache | None = None) -> None:
        if isinstance(lm, str):
            from trimtab.lm import LM

            lm = LM.load(lm)
        self.lm, self.cache = lm, Cache(None) if cache is None else cache
        template = getattr(lm.tokenizer, "chat_template", None)
        self.identity = str(lm.fingerprint)
        self.fingerprint = fingerprint_of("local judge", self.identity, template)

    def choose(self, questions: Sequence[str], options: Sequence[str], meter: Cost | None = None) -> list[Chosen]:
        """For each question the probabilities of the options, in their order. Each is kept in the cache."""
        spellings, owners, end = self._spellings(options)
        longest = max(len(self._ids(spelling)) for spelling in spellings) - (not end)
        keys = [fingerprint_of("chosen", self.fingerprint, question, list(options)) for question in questions]
        out: dict[str, Chosen] = {}
        wanted: dict[str, str] = {}
        for key, question in zip(keys, questions, strict=True):
            if key in out or key in wanted:
                continue
            if (known := self.cache.load("choices", key)) is not None:
                out[key] = Chosen(**known)
            elif problem := self._too_long(question, longest):
                out[key] = Chosen(None, error=problem)
            else:
                wanted[key] = question
        missing = list(wanted)
        if meter is not None:
            meter.reward_calls += len(missing)
        for first in range(0, len(missing), CHUNK):
            part = missing[first : first + CHUNK]
            logprobs = self._logprobs([wanted[key] for key in part], spellings, end, meter)
            for key, row in zip(part, logprobs, strict=True):
                out[key] = restricted(row, owners, len(options))
                self.cache.save("choices", key, {"p": out[key].p, "mass": out[key].mass})
        return [out[key] for key in keys]

    def _logprobs(
        self, questions: Sequence[str], spellings: Sequence[str], end: bool, meter: Cost | None
    ) -> list[list[float]]:
        from trimtab.measure.options import option_logprobs

        scored = option_logprobs(self.lm, questions, [spellings] * len(questions), end=end, meter=meter)
        return [[float(one.double().sum()) for one in row] for row in scored]

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.lm.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _spellings(self, options: Sequence[str]) -> tuple[list[str], list[int], bool]:
        """Every way to write the options, whose each is, and whether one begins another (then their end counts)."""
        written: dict[tuple[int, ...], tuple[str, int]] = {}
        for number, option in enumerate(options):
            for spelling in (option, f" {option}"):
                ids = self._ids(spelling)
                if written.setdefault(ids, (spelling, number))[1] != number:
                    raise UsageError(
                        f"{self.lm.name} cannot tell {option!r} from another of {list(options)}: same tokens"
                    )
        end = any(a != b and a == b[: len(a)] for a in written for b in written)
        return [spelling for spelling, _ in written.values()], [number for _, number in written.values()], end

    def _too_long(self, question: str, longest: int) -> str:
        """Why a question cannot be asked, or ""."""
        try:
            (ids,) = self.lm.encode([question])
        except UsageError as error:
            return str(error).replace("prompt 0", "the judge's question")
        limit = self.lm.context_length
        if limit is not None and len(ids) + longest > limit:
            return f"the judge's question has {len(ids)} tokens; {self.lm.name} has a context of {limit}"
        return ""


def restricted(logprobs: Sequence[float], owners: Sequence[int], options: int) -> Chosen:
    """Softmax over options of the log-probabilities of their spellings, and their mass. owners[i]: whose spelling i is."""
    import numpy as np

    values = np.asarray(logprobs, dtype=np.float64)
    top = values.max()
    masses = np.bincount(owners, weights=np.exp(values - top), minlength=options)
    return Chosen((masses / masses.sum()).tolist(), float(min(1.0, masses.sum() * np.exp(top))))
