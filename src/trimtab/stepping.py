"""Stepping: what a policy needs to be wrapped token by token, and the one loop that answers prompts with it.

A policy is steppable if it can open a session (`Session` or `Guided`) that shows the next token's logits and takes the
token chosen. `LM`, `Steered` and every method that chooses tokens are steppable, so they nest in any order; methods that
choose among whole answers (best-of-n) only need `Policy` and go outside of them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from trimtab.errors import UsageError
from trimtab.generation import Drawn, Observer, cut_at, sample
from trimtab.policy import Completions, Cost, Policy, Prompt
from trimtab.sampling import Sampling, uniforms

if TYPE_CHECKING:
    from trimtab.lm import LM


@runtime_checkable
class Steppable(Protocol):
    """A policy that can be stepped.

    lm    the model whose tokens it draws (its vocabulary, end tokens and context)
    open  one prefill of the prompts -> a session of one row a prompt; what it forwards is charged to `meter`
    """

    name: str
    lm: LM

    def open(self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost) -> Any: ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions: ...


def steppable(policy: Policy, method: str) -> Steppable:
    """`policy` itself where it can be stepped; else the `UsageError` that says what would do."""
    if isinstance(policy, Steppable):
        return policy
    name = getattr(policy, "name", type(policy).__name__)
    raise UsageError(
        f"{method} chooses token by token and {name} gives whole answers only: wrap a local model (or a steered one), "
        f"and put {name} outside of {method} ({name} over {method})"
    )


def answer_steps(
    policy: Steppable, prompts: Sequence[Prompt], sampling: Sampling, observer: Observer | None = None
) -> Completions:
    """Answer prompts with a steppable policy: what its `generate` is."""
    policy.lm.encode(prompts)  # every prompt is refused, by its number, before any work
    meter = Cost()
    return answer(
        policy.lm, lambda part: policy.open(prompts[part], sampling, meter), prompts, sampling, meter, observer
    )


def answer(
    lm: LM,
    opened: Callable[[slice], Any],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    meter: Cost,
    observer: Observer | None = None,
) -> Completions:
    """Answer every prompt `sampling.samples` times; the prefill of a prompt is forwarded once for all of them.

    opened(slice of the prompts) -> a session of these. observer sees every step (`generation.Step`; its rows number the
    rows of the result). meter: what the sessions charge; it becomes the cost of the result.
    """
    start = time.perf_counter()
    each, steps = sampling.samples, sampling.max_new_tokens
    uniform = uniforms(len(prompts) * each, steps, sampling.seed)
    drawn: list[Drawn] = []
    per_prefill = max(1, lm.batch_rows // each)
    for first in range(0, len(prompts) if steps else 0, per_prefill):
        prefill = opened(slice(first, first + per_prefill))
        owners = [row for row in range(prefill.rows) for _ in range(each)]
        for at in range(0, len(owners), lm.batch_rows):
            part = owners[at : at + lm.batch_rows]
            session = prefill if each == 1 else prefill.fork(part)
            offset = first * each + at
            watch = None if observer is None else _shifted(observer, offset)
            drawn.append(sample(session, sampling, uniform[offset : offset + len(part)], watch))
    if not steps:
        drawn = [Drawn([[] for _ in uniform], [[] for _ in uniform], [False] * len(uniform))]
    tokens = [row for part in drawn for row in part.tokens]
    kl = [row for part in drawn for row in part.kl or []]
    meter.seconds = time.perf_counter() - start
    return Completions(
        prompts=[prompt for prompt in prompts for _ in range(each)],
        texts=[cut_at(lm.decode(row), sampling.stop) for row in tokens],
        tokens=tokens,
        logprobs=[row for part in drawn for row in part.logprobs],
        finish_reasons=["stop" if ended else "length" for part in drawn for ended in part.stopped],
        cost=meter,
        kl=kl if len(kl) == len(tokens) and kl else None,
    )


def _shifted(observer: Observer, offset: int) -> Observer:
    return lambda step: observer(dataclasses.replace(step, rows=step.rows + offset))
