"""Blockwise controlled decoding: draw K blocks of M tokens, keep the one of the highest value, go on from there.

Mudgal et al., "Controlled Decoding from Language Models", arXiv 2310.17022. The value is V of the text with the block
(`value=fudge` or `q`, see `prefix_value`), or the reward of it (`value=reward`: ARGS's shortcut, by blocks). A block in
which the answer ends, by itself or at the limit, is scored with the reward of the finished text, whatever `value` is:
that is V there. With `weight` the block is drawn from softmax(weight * value) over the K instead.

K = 1 is the wrapped policy, without a reward call. A block as long as the answer makes it best-of-K, the same answers
for the same seed. Ties go to the earliest block; a block that could not be judged is kept only if none could.

KL: however one of K independent blocks is chosen, a set of blocks of probability a is chosen from with probability at
most 1 - (1 - a)^K, which best-of-K attains; so each block costs at most log K - (K - 1) / K nats, and an answer at most
that times its blocks. Telemetry has the blocks and the bound of each answer; their mean over answers bounds the KL.

Cost an answer of T tokens: the prompt once, K T tokens, K reward calls (K T / M with value=reward). The K share the cache
of what is before them; the chosen one's is kept.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch

from trimtab.card import Card
from trimtab.decode.cd import ValueConfig, kept_value
from trimtab.decode.prefix_value import Tap, Values, fit_prefix_value
from trimtab.errors import UsageError
from trimtab.generation import cut_at, sample
from trimtab.lm import LM
from trimtab.measure.kl import best_of_n_bound
from trimtab.parts import Parts
from trimtab.policy import Completions, Cost, Policy, Prompt
from trimtab.rewards import as_reward
from trimtab.rewards.prefix import warn_unfinished
from trimtab.sampling import Sampling, derive_seed, draw, uniforms
from trimtab.spec import build
from trimtab.steer.rollouts import Progress, collect
from trimtab.stepping import steppable

CARD = Card(
    slug="cd-blockwise",
    name="Blockwise controlled decoding",
    paper="arXiv 2310.17022",
    summary="Draw K blocks of M tokens, keep the one with the highest value of the text so far, and go on from there.",
    goal="preference",
    stage="decode",
    mechanism="value-function-control",
    signal=("scalar reward",),
    access="hidden states",
    produces="decoder",
    needs=("a local causal language model", "a reward on finished text", "prompts to roll out"),
    infer_multiplier="k (the prompt once)",
    fit_cost="rollouts x answer tokens forwarded, one reward call a rollout, a small MLP (value=reward: none)",
    benefit_metrics=("reward",),
    cost_metrics=("tokens_forwarded_per_answer", "reward_calls_per_answer"),
    limits=("its KL has a bound only", "fit at the temperature you decode at"),
    risks=("over-optimisation of a proxy reward at many blocks",),
    composes_with=("best-of-n", "natural-control", "re-control", "cd-fudge", "cd-q"),
    choose="When a few continuations can be drawn in parallel: it picks among blocks by value and so needs fewer "
    "whole answers than best-of-n. With K answers' budget and a good reward, best-of-n is simpler.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/base --reward pocket/reward --prompts prompts.txt --policy cd-blockwise:k=8,block=16",
)

FORMS: dict[str, tuple[Tap, Literal["mc", "td0"]]] = {"fudge": ("after", "mc"), "q": ("before", "td0")}


@dataclass(frozen=True)
class CdBlockwiseConfig(ValueConfig):
    # K, blocks drawn for each one kept
    k: int = 8
    # M, tokens of a block
    block: int = 16
    # what scores an unfinished text: V as CD-FUDGE or as CD-Q learns it, or the reward of it
    value: Literal["fudge", "q", "reward"] = "fudge"
    # draw the block from softmax(weight * value); none: the best one
    weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1 or self.block < 1:
            raise UsageError(f"k and block must be 1 or more, not {self.k} and {self.block}")
        if self.weight is not None and not 0 <= self.weight < math.inf:
            raise UsageError(f"weight must be a finite number of 0 or more, not {self.weight}")


class CdBlockwise:
    """`CdBlockwise(lm, reward, value, k=8, block=16)`, or `CdBlockwise.fit(lm, prompts, reward)`; `lm` may be any policy
    that can be stepped. value: a fitted `PrefixValue` or anything with its methods; not given for value="reward".
    """

    slug = "cd-blockwise"
    Config = CdBlockwiseConfig
    KNOB = "k"

    def __init__(
        self, policy: Policy, reward: Any, values: Values | None = None, name: str | None = None, **options: Any
    ):
        self.policy = steppable(policy, "cd-blockwise")
        self.lm, self.reward, self.values = self.policy.lm, as_reward(reward), values
        self.config = build(CdBlockwiseConfig, options, "method 'cd-blockwise'")
        self.name = name or "cd-blockwise"
        if (values is None) != (self.config.value == "reward"):
            raise UsageError(
                "cd-blockwise scores by a fitted value (CdBlockwise.fit makes one) or, with value=reward, by the reward "
                f"alone; value={self.config.value} came {'without' if values is None else 'with'} one"
            )
        if values is not None:
            values.check(self.lm)

    @classmethod
    def fit(
        cls,
        lm: LM,
        prompts: Sequence[Prompt],
        reward: Any,
        sampling: Sampling = Sampling(),
        progress: Progress | None = None,
        **options: Any,
    ) -> Self:
        """Draw answers of `lm`, fit V to their rewards, and decode `lm` with it."""
        config, judge = build(CdBlockwiseConfig, options, "method 'cd-blockwise'"), as_reward(reward)
        if config.value == "reward":
            return cls(lm, judge, **options)
        tap, target = FORMS[config.value]
        drawn = collect(lm, prompts, judge, sampling, config.rollouts, progress=progress)
        value, _ = fit_prefix_value(
            lm, drawn, tap, config.value_fit(target), judge.name, sampling.temperature, progress
        )
        return cls(lm, judge, value, **options)

    @classmethod
    def make(cls, parts: Parts, config: Any) -> Self:
        values = None if config.value == "reward" else kept_value(parts, config, *FORMS[config.value])
        return cls(parts.policy, parts.reward, values, **dataclasses.asdict(config))

    @property
    def kl_bound(self) -> float | None:
        """Nats an answer; certain before an answer is drawn only for one block at a time (see the telemetry)."""
        return 0.0 if self.config.k == 1 else None

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        """telemetry of each row: `blocks` decided, the `kl_bound` of that many, and of each the `values` of its K
        candidates (None: could not judge) and which was `chosen`.
        """
        config, start = self.config, time.perf_counter()
        if config.k == 1:
            return self.policy.generate(prompts, sampling)
        if config.value == "reward" and config.block < sampling.max_new_tokens:
            warn_unfinished(self.reward, "cd-blockwise")
        self.lm.encode(prompts)
        meter, each = Cost(), sampling.samples
        count, steps = len(prompts) * each, sampling.max_new_tokens
        uniform = uniforms(count * config.k, steps, sampling.seed).view(count, config.k, steps)
        answers = [_Answer(prompt, row) for row, prompt in enumerate(p for p in prompts for _ in range(each))]
        room = max(1, self.lm.batch_rows // config.k)  # answers that are written together
        per_prefill = max(1, room // each)
        for first in range(0, len(prompts) if steps else 0, per_prefill):
            prefill = self.policy.open(prompts[first : first + per_prefill], sampling, meter)
            owners = [row for row in range(prefill.rows) for _ in range(each)]
            for at in range(0, len(owners), room):
                part = owners[at : at + room]
                offset = first * each + at
                self._write(prefill.fork(part), answers[offset : offset + len(part)], uniform, sampling, meter)
        meter.seconds = time.perf_counter() - start
        return self._completed(answers, sampling, meter)

    @torch.no_grad()
    def _write(
        self, session: Any, answers: list[_Answer], uniform: torch.Tensor, sampling: Sampling, meter: Cost
    ) -> None:
        """Write answers to their end, block by block. session: one row an answer."""
        k, most = self.config.k, sampling.max_new_tokens
        for first in range(0, most, self.config.block):
            end = min(first + self.config.block, most)
            numbers = uniform[[answer.row for answer in answers], :, first:end].flatten(0, 1)
            forks = session.fork([row for row in range(session.rows) for _ in range(k)])
            blocks, live, session = self._blocks(forks, answers, sampling.but(max_new_tokens=end), numbers)
            for block in blocks:
                block.over |= end == most
            # the rows that go on hear their last token; `live` has the number of the block that each of them holds
            live = _kept(live, session.drop([at for at, number in enumerate(live) if blocks[number].over]))
            if live:
                session.append(torch.tensor([blocks[number].tokens[-1] for number in live]))
            values = self._values(session, live, answers, blocks, meter).view(-1, k)
            chosen = self._choose(values, answers, first, sampling.seed).tolist()
            kept = set()
            for number, (answer, at) in enumerate(zip(answers, chosen, strict=True)):
                answer.take(blocks[number * k + at], values[number].tolist(), at)
                kept.add(number * k + at)
            live = _kept(live, session.drop([at for at, number in enumerate(live) if number not in kept]))
            answers = [answers[number // k] for number in live]
            if not answers:
                return

    def _blocks(
        self, forks: Any, answers: list[_Answer], sampling: Sampling, uniform: torch.Tensor
    ) -> tuple[list[_Block], list[int], Any]:
        """K blocks an answer; the numbers of those that came last to their end, and a session that holds these."""
        begun = [answer.tokens for answer in answers for _ in range(self.config.k)]
        aside: list[tuple[list[int], Any]] = []
        drawn = sample(forks, sampling, uniform, begun=begun, aside=aside)
        live, session = aside[-1] if aside else ([], forks)
        limit = self.lm.context_length or math.inf
        going = {
            number
            for number, before in zip(live, session.lengths.tolist(), strict=True)
            if len(drawn.tokens[number]) == sampling.max_new_tokens and before + 1 < limit
        }
        blocks = []
        for number, (tokens, logprobs, stopped) in enumerate(
            zip(drawn.tokens, drawn.logprobs, drawn.stopped, strict=True)
        ):
            new = tokens[len(begun[number]) :]
            blocks.append(_Block(new, logprobs, stopped, stopped or number not in going))
        return blocks, live, session

    def _values(
        self, session: Any, live: list[int], answers: list[_Answer], blocks: list[_Block], meter: Cost
    ) -> torch.Tensor:
        """[A K] float64: the reward of texts that are finished (or, with value=reward, of all), V of the others."""
        values = torch.full((len(blocks),), math.nan, dtype=torch.float64)
        if self.values is not None and live:
            values[live] = self.values.reached(session).double().cpu()
        judged = [number for number, block in enumerate(blocks) if block.over or self.values is None]
        owners = [answers[number // self.config.k] for number in judged]
        texts = [self.lm.decode([*owner.tokens, *blocks[n].tokens]) for n, owner in zip(judged, owners, strict=True)]
        scores = self.reward.score([owner.prompt for owner in owners], texts, meter)
        values[judged] = torch.tensor([math.nan if s is None else s for s in scores], dtype=torch.float64)
        return values

    def _choose(self, values: torch.Tensor, answers: list[_Answer], begun: int, seed: int) -> torch.Tensor:
        """values [A, K] -> which block of each answer, [A]."""
        scores = values.nan_to_num(nan=-math.inf)
        if self.config.weight is None:
            return scores.argmax(-1)
        scores = torch.where(scores.isinf().all(-1, keepdim=True), 0.0, scores)
        numbers = [float(uniforms(1, 1, derive_seed(seed, "block", answer.row, begun))) for answer in answers]
        weighed = torch.where(scores.isinf(), scores, self.config.weight * scores)
        return draw(weighed.log_softmax(-1), torch.tensor(numbers, dtype=torch.float64))

    def _completed(self, answers: list[_Answer], sampling: Sampling, meter: Cost) -> Completions:
        bound = best_of_n_bound(self.config.k)
        return Completions(
            prompts=[answer.prompt for answer in answers],
            texts=[cut_at(self.lm.decode(answer.tokens), sampling.stop) for answer in answers],
            tokens=[answer.tokens for answer in answers],
            logprobs=[answer.logprobs for answer in answers],
            finish_reasons=["stop" if answer.stopped else "length" for answer in answers],
            cost=meter,
            telemetry=[
                {
                    "blocks": len(answer.chosen),
                    "kl_bound": len(answer.chosen) * bound,
                    "values": answer.values,
                    "chosen": answer.chosen,
                }
                for answer in answers
            ],
        )


@dataclass
class _Block:
    """A candidate. over: the answer is at its end with it."""

    tokens: list[int]
    logprobs: list[float]
    stopped: bool
    over: bool


@dataclass
class _Answer:
    prompt: Prompt
    row: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    values: list[list[float | None]] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)

    def take(self, block: _Block, values: list[float], chosen: int) -> None:
        self.tokens, self.logprobs = [*self.tokens, *block.tokens], [*self.logprobs, *block.logprobs]
        self.stopped = block.stopped
        self.values.append([None if math.isnan(value) else value for value in values])
        self.chosen.append(chosen)


def _kept(numbers: list[int], order: list[int]) -> list[int]:
    return [numbers[row] for row in order]
