"""Transfer Q*: weigh the k likeliest next tokens by the reward that an aligned model would reach from each.

    score(z) = log p(z | s) + weight * TQ(s, z)                    z among the k likeliest of p, weight = 1 / alpha
    TQ(s, z) = mean_j r(tau_j)                                     direct: rho was aligned to r itself
    TQ(s, z) = sum_j w_j r(tau_j) / sum_j w_j                      indirect: rho was aligned to another reward r_BL,
               w_j = exp((r(tau_j) - r_BL(tau_j)) / beta)
with answers tau_1..tau_N that rho writes on from s and z. Chakraborty et al., "Transfer Q Star: Principled Decoding for
LLM Alignment", arXiv 2405.20495. rho is the option `aligned`; without it the policy itself is rolled out, and TQ is the
value that controlled decoding learns (CD), by Monte Carlo. lookahead = 0 rolls nothing out: ARGS.

The option is the weight and not alpha, so that 0 is the policy itself, as everywhere else. One roll-out is greedy,
several are drawn at temperature 1.

Departures from the published code: it takes candidates and their scores from the aligned model, where the equation has p;
its indirect weight is exp(.) r of one roll-out, not normalised. Self-normalising one roll-out cancels its weight, and the
normaliser depends on (s, z), so it cannot be dropped: several roll-outs are needed, and one is refused. Log-weights are
cut to within 10 nats of their mean; how many were, and the effective sample size, are reported.

Cost an answer of T tokens: T of the model, T of the aligned one, and k N roll-outs of up to `lookahead` tokens with their
rewards at each of them. Between 10 and 100 times plain decoding: for small models, or when nobody waits. `sure` (ours)
looks only where the model hesitates, which saves most of it.
Shapes: candidates [B, k], roll-outs [B, k, N].
"""

from __future__ import annotations

import dataclasses
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from trimtab.card import Card
from trimtab.decode.candidates import Candidates, check_candidates
from trimtab.decode.lookahead import Trace, judge, looked_up, roll_out, room, state_of, state_uniforms
from trimtab.divergence import same_tokens
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.parts import Parts
from trimtab.policy import Completions, Cost, Policy, Prompt
from trimtab.rewards import as_reward
from trimtab.rewards.prefix import prefix_scorer, warn_unfinished
from trimtab.sampling import Sampling
from trimtab.stepping import answer, steppable

CARD = Card(
    slug="transfer-q",
    name="Transfer Q*",
    paper="arXiv 2405.20495",
    summary="Weigh the k likeliest next tokens by the reward of the answers that an aligned model makes of each.",
    goal="preference",
    stage="decode",
    mechanism="reward-guided-decoding",
    signal=("scalar reward",),
    access="logits",
    produces="decoder",
    needs=("a local causal language model", "a reward on finished text", "an aligned model of the same tokens, if any"),
    infer_multiplier="k * rollouts * lookahead (2 with an aligned model, without roll-outs)",
    fit_cost="none",
    benefit_metrics=("reward",),
    cost_metrics=("tokens_forwarded_per_answer", "reward_calls_per_answer", "kl_per_token"),
    limits=("slow: k * rollouts answers are written for every token", "a greedy roll-out is one sample of the value"),
    risks=("over-optimisation of a proxy reward",),
    composes_with=("best-of-n", "natural-control", "re-control"),
    conflicts=("an aligned model with other tokens",),
    choose="When a target reward differs from what some aligned model was made for, compute is plenty and "
    "nothing may be trained: every candidate token is rolled out. Offline work and small models.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/base --reward pocket/reward --prompts prompts.txt "
    "--policy transfer-q:aligned=pocket/chat,k=5",
)

WHOLE = 64  # answers of up to as many tokens are rolled out to their end, longer ones by PART tokens
PART = 32
DRAWS = 8  # roll-outs of indirect transfer
CLIP = 10.0  # nats that a log-weight may lie from the mean of its roll-outs
WIDE = 20.0  # standard deviation of values under which log-probabilities still matter


class WeightWarning(UserWarning):
    """The roll-outs do not say much about the target: their weights are too uneven, or the reward's scale too wide."""


@dataclass(frozen=True)
class TransferQConfig:
    # likeliest next tokens that are weighed; 0: the whole vocabulary
    k: int = 10
    # 1 / alpha: of the value against the log-probability; 0 is the policy itself
    weight: float = 1.0
    # take the best candidate, or draw among the candidates
    select: Literal["greedy", "sample"] = "greedy"
    # model with the same tokens that writes the roll-outs; none: the policy itself
    aligned: str | None = None
    # what the aligned model was aligned to, where that is another reward than the one asked for (indirect transfer)
    aligned_reward: str | None = None
    # roll-outs of a candidate: 1 is greedy, several are drawn at temperature 1; none: 1, or 8 for indirect transfer
    rollouts: int | None = None
    # tokens of a roll-out; 0: none, which is ARGS; none: to the end of answers of at most 64 tokens, else 32
    lookahead: int | None = None
    # leave the distribution as it is where its likeliest token has a probability above this; none: always look
    sure: float | None = None
    # KL weight that the aligned model was trained with, of which indirect transfer makes its weights
    beta: float = 2.0
    # nats a token that the KL from the model never exceeds (select=sample); none: no cap
    kl_cap: float | None = None
    # fork the reward model's own cache for each roll-out, where it allows that; the tokens are the same
    cache: bool = True

    def __post_init__(self) -> None:
        check_candidates(self.k, self.weight, self.kl_cap)
        if self.kl_cap is not None and self.select == "greedy":
            raise UsageError("kl_cap needs select=sample: the KL of a certain choice is what its token costs")
        if not self.beta > 0:
            raise UsageError(f"beta must be above 0, not {self.beta}")
        if self.lookahead is not None and self.lookahead < 0:
            raise UsageError(f"lookahead must be 0 tokens or more, not {self.lookahead}")
        if self.sure is not None and not 0 <= self.sure <= 1:
            raise UsageError(f"sure must be a probability, not {self.sure}")
        if self.draws < 1:
            raise UsageError(f"rollouts must be 1 or more, not {self.rollouts}")
        if self.aligned_reward is not None and self.draws < 2:
            raise UsageError(
                "aligned_reward needs rollouts=2 or more: normalising one roll-out by itself cancels its weight, "
                "so that the other reward would make no difference"
            )

    @property
    def draws(self) -> int:
        """N."""
        return self.rollouts if self.rollouts is not None else 1 if self.aligned_reward is None else DRAWS

    def ahead(self, budget: int) -> int:
        """L in an answer of at most `budget` tokens."""
        return self.lookahead if self.lookahead is not None else budget if budget <= WHOLE else PART


class Transferred(NamedTuple):
    """value [...]; ess [...] the effective number of roll-outs, 1 / sum of squared shares, before log-weights are clipped;
    clipped [...] how many of them were."""

    value: torch.Tensor
    ess: torch.Tensor
    clipped: torch.Tensor


def transferred(
    rewards: torch.Tensor, log_weights: torch.Tensor | None = None, mass: torch.Tensor | None = None
) -> Transferred:
    """The self-normalised mean of rewards [..., N] under log_weights [..., N] (None: all 0).

    mass [..., N]: the roll-outs' own probabilities, where all of them were enumerated; None: they were drawn. A reward
    of NaN (could not be judged) counts for nothing; where none was judged, the value is NaN.
    """
    share = torch.ones_like(rewards) if mass is None else mass
    share = torch.where(rewards.isnan(), 0, share)
    share = share / share.sum(-1, keepdim=True)
    whole, clipped = share, torch.zeros(rewards.shape[:-1])
    if log_weights is not None:
        log_weights = torch.where(share > 0, log_weights, 0)
        centred = log_weights - (share * log_weights).sum(-1, keepdim=True)
        clipped = ((centred.abs() > CLIP) & (share > 0)).sum(-1)
        whole = (share.log() + log_weights).softmax(-1)
        share = (share.log() + centred.clamp(-CLIP, CLIP)).softmax(-1)
    value = torch.where(share > 0, share * rewards, 0).sum(-1)
    return Transferred(torch.where(share.isnan().any(-1), torch.nan, value), 1 / (whole**2).sum(-1), clipped)


class TransferQ:
    """`TransferQ(lm, reward, aligned=chat)` is a policy; `lm` and `aligned` may be any policies that can be stepped."""

    slug = "transfer-q"
    Config = TransferQConfig
    KNOB = "k"
    DIAL = "weight"
    MODELS = ("aligned",)

    def __init__(
        self,
        policy: Policy,
        reward: Any,
        aligned: Policy | str | None = None,
        aligned_reward: Any = None,
        name: str | None = None,
        **options: Any,
    ):
        self.policy, self.reward, self.name = steppable(policy, "transfer-q"), as_reward(reward), name or "transfer-q"
        self.lm = self.policy.lm
        other = LM.load(aligned) if isinstance(aligned, str) else aligned
        self.aligned = None if other is None else steppable(other, "transfer-q")
        self.aligned_reward = None if aligned_reward is None else as_reward(aligned_reward)
        if self.aligned is not None:
            options["aligned"] = self.aligned.name
            if not same_tokens(self.aligned, self.lm):
                raise UsageError(
                    f"transfer-q rolls out {self.aligned.name} from the tokens of {self.lm.name}, and their "
                    "vocabularies differ: give an aligned model of the same tokenizer"
                )
        if self.aligned_reward is not None:
            options["aligned_reward"] = self.aligned_reward.name
        self.config = TransferQConfig(**options)

    @classmethod
    def make(cls, parts: Parts, config: TransferQConfig) -> TransferQ:
        options = dataclasses.asdict(config)
        if config.aligned is not None:
            options["aligned"] = parts.load(config.aligned)
        return cls(parts.policy, parts.reward, **options)

    def open(self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost) -> TransferQSession:
        return self._open(prompts, sampling, meter, None)

    def _open(
        self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost, trace: Trace | None
    ) -> TransferQSession:
        companions: dict[str, Any] = {}
        if self.config.weight > 0 and self.config.k != 1:  # else nothing is looked at
            if self.config.ahead(sampling.max_new_tokens) < sampling.max_new_tokens - 1:
                warn_unfinished(self.reward, "transfer-q")
            companions["scorer"] = prefix_scorer(self.reward, self.lm, prompts, meter, self.config.cache)
            if self.aligned_reward is not None:
                companions["other"] = prefix_scorer(self.aligned_reward, self.lm, prompts, meter, self.config.cache)
            if self.aligned is not None and self.config.lookahead != 0:
                self._refuse_long(prompts, sampling.max_new_tokens)
                companions["aligned"] = self.aligned.open(prompts, sampling, meter)
        inner = self.policy.open(prompts, sampling, meter)
        return TransferQSession(inner, prompts, self.config, sampling, trace, **companions)

    def _refuse_long(self, prompts: Sequence[Prompt], budget: int) -> None:
        """The aligned model is kept beside every answer: a context that the answer may outgrow is refused."""
        assert self.aligned is not None
        theirs, limit, own = self.aligned.lm, self.aligned.lm.context_length, self.lm.context_length
        if limit is None:
            return
        for prompt, ours, ids in zip(prompts, self.lm.encode(prompts), theirs.encode(prompts), strict=True):
            needed = len(ids) + (budget if own is None else min(budget, own - len(ours)))
            if needed > limit:
                raise UsageError(
                    f"{theirs.name} has a context of {limit} tokens and an answer to {str(prompt)[:40]!r} may take "
                    f"{needed}: lower max_new_tokens, or shorten the prompt"
                )

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        """telemetry of each row: `candidates` (a dict of token -> value at each step); with indirect transfer also `ess`
        (median over the candidates at each step) and `clipped` (log-weights in all)."""
        self.lm.encode(prompts)
        meter, trace = Cost(), Trace()
        done = answer(self.lm, lambda part: self._open(prompts[part], sampling, meter, trace), prompts, sampling, meter)
        for prompt, tokens in zip(done.prompts, done.tokens, strict=True):
            steps = looked_up(trace, prompt, tokens)
            told: dict[str, Any] = {"candidates": [{token: look[0] for token, look in step.items()} for step in steps]}
            if self.aligned_reward is not None:
                told["ess"] = [_ess(step) for step in steps if step]
                told["clipped"] = int(sum(look[2] for step in steps for look in step.values()))
            done.telemetry.append(told)
        self._warn(trace)
        return done

    def _warn(self, trace: Trace) -> None:
        values = [look[0] for step in trace.values() for look in step.values() if look[0] == look[0]]
        if len(values) > 1 and statistics.pstdev(values) > WIDE:
            warnings.warn(
                f"transfer-q: the values of {self.reward.name} deviate by {statistics.pstdev(values):.3g}, so that "
                "log-probabilities hardly count: scale the reward down, or lower weight",
                WeightWarning,
                stacklevel=3,
            )
        few = [_ess(step) < 2 for step in trace.values()] if self.aligned_reward is not None else []
        if sum(few) > len(few) / 2:
            warnings.warn(
                f"transfer-q: at {sum(few)} of {len(few)} steps fewer than 2 of {self.config.draws} roll-outs count; "
                "the two rewards are far apart: raise beta or rollouts",
                WeightWarning,
                stacklevel=3,
            )


def _ess(step: dict[int, tuple[float, ...]]) -> float:
    return statistics.median_low(look[1] for look in step.values())


class TransferQSession(Candidates):
    """companions: `scorer`; `other`, the scorer of r_BL (indirect transfer); `aligned`, the session that is rolled out."""

    def __init__(
        self,
        inner: Any,
        asked: Sequence[Prompt],
        config: TransferQConfig,
        sampling: Sampling,
        trace: Trace | None,
        **companions: Any,
    ):
        greedy = config.select == "greedy"
        super().__init__(
            inner, asked, config.k, config.weight, greedy, config.kl_cap, sampling.temperature, **companions
        )
        self.config, self.sampling, self.trace = config, sampling, trace

    def bonus(self, tokens: torch.Tensor) -> torch.Tensor:
        bonus, sure = torch.zeros(tokens.shape), self.config.sure
        if "scorer" not in self.companions:
            return bonus  # there is one candidate
        rows = list(range(len(tokens)))
        if sure is not None:
            likeliest = self.inner.logits.softmax(-1).max(-1).values  # [B]
            rows = [row for row in rows if float(likeliest[row]) <= sure]
        if not rows:
            return bonus
        found = self.values(rows, tokens[rows])
        if self.trace is not None:
            answers = self.answers()
            for row, candidates, *looks in zip(
                rows, tokens[rows].tolist(), *(part.tolist() for part in found), strict=True
            ):
                state = state_of(self.asked[row], answers[row])
                self.trace[state] = dict(zip(candidates, zip(*looks, strict=True), strict=True))
        bonus[rows] = found.value.to(bonus)
        return bonus

    def values(self, rows: Sequence[int], tokens: torch.Tensor) -> Transferred:
        """TQ of each candidate [n, k] of the given rows."""
        draws, budget = self.config.draws, self.sampling.max_new_tokens
        shape = (*tokens.shape, draws)
        roller, ends = self.companions.get("aligned", self.inner), self.lm.eos_ids
        steps = self.config.ahead(budget)
        left = room(self.answers(), budget, steps)
        owners = [row for row in rows for _ in range(tokens.shape[1] * draws)]
        firsts = tokens[..., None].expand(shape).flatten().tolist()
        uniform = None
        if draws > 1:
            written = self.tokens
            uniform = state_uniforms(self.sampling.seed, [written[row] for row in rows], draws, steps)  # [n, N, L]
            uniform = uniform[:, None].expand(*shape, steps).reshape(len(owners), steps)
        texts = roll_out(roller, owners, firsts, [left[row] for row in owners], uniform, self.sampling.stop, ends)
        if roller.lm.eos_ids - ends:  # the aligned model may end an answer by a token of its own
            texts = [text[:-1] if text[-1] in roller.lm.eos_ids - ends else text for text in texts]
        rewards = judge(self.companions["scorer"], owners, texts).double().view(shape)
        if "other" not in self.companions:
            return transferred(rewards)
        other = judge(self.companions["other"], owners, texts).double().view(shape)
        return transferred(torch.where(other.isnan(), torch.nan, rewards), (rewards - other) / self.config.beta)
