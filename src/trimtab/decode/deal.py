"""DeAL: decoding as a search in which each next token is judged by the text it would lead to.

    c(a) = log P(y_1..t | x) + weight * h(y_1..t+l, x)        y_t = a among the k likeliest, then l greedy tokens
The best a is committed (beams = 1), or the best b of b prefixes times k tokens are kept. h is the comparison's reward,
which may be a weighted sum of objectives; the tokens looked ahead do not count in log P. Huang et al., "DeAL:
Decoding-time Alignment for Large Language Models", arXiv 2402.06147. lookahead = 0 is ARGS; weight = 0 or k = 1 is greedy
decoding or plain beam search.

Ours: `floor`, a hard constraint. A candidate whose look ahead scores less is cut away while another's does not; where all
do, nothing is cut, the answer is searched on and telemetry says whether it met the floor in the end. The roll-out of the
committed token is already the next step's greedy candidate's: where it reached its end it is taken over with its score
(`reuse`). `sure` and `every` skip looks ahead, `normalize` changes the scale of h.

There is no official code. agent=segment is what one public implementation calls DeAL, for comparison: a beam search
proposes k segments of `lookahead` tokens after each kept prefix, the reward alone keeps `beams` of them, the segments are
committed whole, and the answer is the best text seen, finished or not.

Cost an answer of T tokens: T of the model and k roll-outs of up to l tokens at each of them, times beams; k T beams
rewards. The published slow-down is 22 to 55 times. sure=0.9 saves three quarters of it on pocket/base.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from trimtab.card import Card
from trimtab.decode.beams import Prefix, beam_search, segment_search
from trimtab.decode.candidates import Candidates, check_candidates, unjudged_last
from trimtab.decode.lookahead import Trace, judge, looked_up, roll_out, room, state_of
from trimtab.errors import UsageError
from trimtab.generation import cut_at
from trimtab.policy import Completions, Cost, Policy, Prompt
from trimtab.rewards import Keyword, Reward, WeightedSum, as_reward
from trimtab.rewards.prefix import prefix_scorer, warn_unfinished
from trimtab.sampling import Sampling
from trimtab.stepping import answer, steppable

CARD = Card(
    slug="deal",
    name="DeAL",
    paper="arXiv 2402.06147",
    summary="Search token by token, judging each candidate by the greedy continuation it would lead to.",
    goal="instruction",
    stage="decode",
    mechanism="reward-guided-decoding",
    signal=("scalar reward", "verifier"),
    access="logits",
    produces="decoder",
    needs=("a local causal language model", "a reward on text: keywords, length, a classifier, or a sum of several"),
    infer_multiplier="k * lookahead * beams",
    fit_cost="none",
    benefit_metrics=("reward",),
    cost_metrics=("tokens_forwarded_per_answer", "reward_calls_per_answer", "kl_per_token"),
    limits=("slow: k continuations are written for every token", "sees no further than the look ahead"),
    risks=("text bent towards a constraint that does not fit the prompt",),
    composes_with=("natural-control", "re-control", "args"),
    choose="For constraints that a model follows badly by prompt alone: words that must appear, a length, "
    "several objectives with weights that change by request. Twenty to fifty times the cost of plain "
    "decoding.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/base --reward keyword:words=play --prompts prompts.txt --policy deal:k=5,lookahead=16",
)

LARGEST = 1e6  # a score beyond is taken for a mistake


@dataclass(frozen=True)
class DealConfig:
    # likeliest next tokens that are looked ahead from; 0: the whole vocabulary
    k: int = 5
    # greedy tokens of a look ahead, cut to what is left of the answer; 0: none, which is ARGS
    lookahead: int = 16
    # of the objective against the log-probability of the prefix
    weight: float = 1.0
    # prefixes that are kept; with more than 1 whole answers are searched, which nothing can wrap token by token
    beams: int = 1
    # what is judged and committed: a token, or a whole segment of `lookahead` tokens by the reward alone
    agent: Literal["token", "segment"] = "token"
    # least objective of a look ahead; candidates under it are cut away while another meets it; none: no constraint
    floor: float | None = None
    # take the likeliest token without a look ahead where its probability is above this; none: always look (beams=1)
    sure: float | None = None
    # tokens from one look ahead to the next; those between are the likeliest (beams=1)
    every: int = 1
    # the objective as it is, or as a z-score over the candidates of each step (beams=1)
    normalize: Literal["none", "candidates"] = "none"
    # take over the roll-out of the committed token where it reached its end; the answers are the same
    reuse: bool = True
    # fork the reward model's own cache for each candidate, where it allows that; the tokens are the same
    cache: bool = True

    def __post_init__(self) -> None:
        check_candidates(self.k, self.weight)
        if self.lookahead < 0 or self.beams < 1 or self.every < 1:
            raise UsageError("deal needs lookahead >= 0, beams >= 1 and every >= 1")
        if self.sure is not None and not 0 <= self.sure <= 1:
            raise UsageError(f"sure must be a probability, not {self.sure}")
        if self.agent == "segment" and (self.lookahead < 1 or self.k < 1):
            raise UsageError("agent=segment needs lookahead >= 1 (tokens of a segment) and k >= 1 (segments a prefix)")
        if not self.steps and (self.sure is not None or self.every > 1 or self.normalize != "none"):
            raise UsageError(
                "sure, every and normalize need beams=1 and agent=token: "
                "the prefixes of a beam are compared by objectives of one scale"
            )

    @property
    def steps(self) -> bool:
        """Whether tokens are committed one by one."""
        return self.agent == "token" and self.beams == 1


class Deal:
    """`Deal(lm, reward, k=5, lookahead=16)` is a policy; `lm` may be any policy that can be stepped."""

    slug = "deal"
    Config = DealConfig
    KNOB = "k"

    def __init__(self, policy: Policy, reward: Any, name: str | None = None, **options: Any):
        self.policy = steppable(policy, "deal")
        self.lm, self.reward, self.config = self.policy.lm, as_reward(reward), DealConfig(**options)
        self.name = name or "deal"
        if self.config.agent == "token" and self.config.k > self.lm.vocab_size:
            warnings.warn(f"deal: k={self.config.k} is cut to the {self.lm.vocab_size} tokens there are", stacklevel=2)
        if self.config.lookahead == 0:
            warnings.warn("deal without a look ahead (lookahead=0) is args", stacklevel=2)
        for word in _unspeakable(self.reward, self.lm):
            warnings.warn(f"deal: {self.lm.name} has no tokens for the keyword {word!r}", stacklevel=2)

    def open(self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost) -> DealSession:
        if not self.config.steps:
            raise UsageError(
                "deal with beams > 1 or agent=segment searches whole answers and cannot be stepped: "
                "put it inside of methods that choose among answers, or set beams=1 and agent=token"
            )
        return self._open(prompts, sampling, meter, None)

    def _open(self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost, trace: Trace | None) -> DealSession:
        companions = {}
        if self.looks:
            if self.config.agent == "segment" or self.config.lookahead < sampling.max_new_tokens - 1:
                warn_unfinished(self.reward, "deal")
            companions["scorer"] = prefix_scorer(self.reward, self.lm, prompts, meter, self.config.cache)
        inner = self.policy.open(prompts, sampling, meter)
        return DealSession(inner, prompts, self.reward, self.config, sampling, trace, **companions)

    @property
    def looks(self) -> bool:
        """Whether the objective makes a difference."""
        if self.config.agent == "segment":
            return True
        return self.config.weight > 0 and (self.config.k != 1 or self.config.beams > 1)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        """telemetry of each row: `log_p` and `objective` (of the look ahead, None without one) of each token, and with a
        floor whether the answer `met` it."""
        self.lm.encode(prompts)
        meter, trace = Cost(), Trace()
        if self.config.steps:
            done = answer(
                self.lm, lambda part: self._open(prompts[part], sampling, meter, trace), prompts, sampling, meter
            )
            for prompt, tokens in zip(done.prompts, done.tokens, strict=True):
                steps = looked_up(trace, prompt, tokens)
                looks = [step[token] for step, token in zip(steps, tokens, strict=True) if step]
                done.telemetry.append(self._told([look[0] for look in looks], [look[1] for look in looks]))
        else:
            done = self._searched(prompts, sampling, meter)
        missed = sum(told.get("met") is False for told in done.telemetry)
        if missed:
            warnings.warn(
                f"deal: {missed} of {len(done)} answers do not reach floor={self.config.floor}: "
                "raise k, lookahead or weight",
                stacklevel=2,
            )
        return done

    def _told(self, log_p: list[float], objective: list[float]) -> dict[str, Any]:
        told: dict[str, Any] = {"log_p": log_p, "objective": [h if h == h else None for h in objective]}
        if self.config.floor is not None and self.looks:
            told["met"] = bool(objective) and objective[-1] >= self.config.floor
        return told

    # whole answers

    def _searched(self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost) -> Completions:
        """One answer a prompt, whatever `sampling` says about chance; `samples` repeats it."""
        start = time.perf_counter()
        find = self._beams if self.config.agent == "token" else self._segments
        size = max(1, self.lm.batch_rows // self.config.beams)
        found: list[Prefix] = []
        for first in range(0, len(prompts), size):
            found += find(self._open(prompts[first : first + size], sampling, meter, None), sampling)
        meter.seconds = time.perf_counter() - start
        rows = [prefix for prefix in found for _ in range(sampling.samples)]
        texts = [self.lm.decode(prefix.tokens) for prefix in rows]
        ended = [
            bool(prefix.tokens) and prefix.tokens[-1] in self.lm.eos_ids or any(word in text for word in sampling.stop)
            for prefix, text in zip(rows, texts, strict=True)
        ]
        return Completions(
            prompts=[prompt for prompt in prompts for _ in range(sampling.samples)],
            texts=[cut_at(text, sampling.stop) for text in texts],
            tokens=[list(prefix.tokens) for prefix in rows],
            logprobs=[[0.0] * len(prefix.tokens) for prefix in rows],  # a certain choice
            finish_reasons=["stop" if end else "length" for end in ended],
            cost=meter,
            kl=[list(prefix.kl) for prefix in rows] if all(len(row.kl) == len(row.tokens) for row in rows) else None,
            telemetry=[self._told(prefix.logprobs, prefix.objectives) for prefix in rows],
        )

    def _rank(self, prefix: Prefix) -> Any:
        met = self.config.floor is None or not prefix.objectives or prefix.objectives[-1] >= self.config.floor
        return met, prefix.score(self.config.weight)

    def _beams(self, session: DealSession, sampling: Sampling) -> list[Prefix]:
        config, looks = self.config, self.looks
        kept = beam_search(
            session if looks else session.inner, config.beams, config.k or self.lm.vocab_size, sampling.max_new_tokens,
            self._rank, _judged if looks else None, sampling.stop, sampling.temperature or 1.0,
        )  # fmt: skip
        return [group[0] for group in kept]

    def _segments(self, session: DealSession, sampling: Sampling) -> list[Prefix]:
        config = self.config
        return segment_search(
            session, config.beams, config.k, config.lookahead, sampling.max_new_tokens,
            lambda at, rows, texts: at.judged(rows, texts).tolist(), sampling.stop, sampling.temperature or 1.0,
        )  # fmt: skip


class Path(NamedTuple):
    """A candidate's roll-out, itself first, its objective, and whether the answer ends with it."""

    tokens: list[int]
    objective: float
    whole: bool


class DealSession(Candidates):
    """companions: `scorer`, where there is anything to look ahead for. paths: of each row its candidates' roll-outs."""

    def __init__(
        self,
        inner: Any,
        asked: Sequence[Prompt],
        reward: Reward,
        config: DealConfig,
        sampling: Sampling,
        trace: Trace | None,
        **companions: Any,
    ):
        super().__init__(inner, asked, config.k, config.weight, True, None, sampling.temperature, **companions)
        self.reward, self.config, self.sampling, self.trace = reward, config, sampling, trace
        self.paths: list[dict[int, Path]] = [{} for _ in self.asked]

    def bonus(self, tokens: torch.Tensor) -> torch.Tensor:
        logprobs = self.inner.logits.log_softmax(-1).gather(-1, tokens)  # [B, k]
        answers, sure = self.answers(), self.config.sure
        found = torch.full(tokens.shape, torch.nan)
        bonus = torch.full(tokens.shape, -torch.inf)
        bonus[:, 0] = 0  # without a look ahead: the likeliest
        look = [
            row
            for row, so_far in enumerate(answers)
            if "scorer" in self.companions
            and len(so_far) % self.config.every == 0
            and (sure is None or float(logprobs[row, 0].exp()) <= sure)
        ]
        if look:
            found[look] = self.ahead(look, tokens[look])
            bonus[look] = shaped(unjudged_last(found[look]), self.config)
        if self.trace is not None:
            columns = zip(self.asked, answers, tokens.tolist(), logprobs.tolist(), found.tolist(), strict=True)
            for prompt, so_far, candidates, *looks in columns:
                self.trace[state_of(prompt, so_far)] = dict(zip(candidates, zip(*looks, strict=True), strict=True))
        return bonus

    def ahead(self, rows: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        """h of each candidate [n, k] of the given rows."""
        answers, budget = self.answers(), self.sampling.max_new_tokens
        left = room(answers, budget, self.config.lookahead)
        pairs = [(row, token) for row, some in zip(rows, tokens.tolist(), strict=True) for token in some]
        new = [(row, token) for row, token in pairs if not self.config.reuse or token not in self.paths[row]]
        owners = [row for row, _ in new]
        texts = roll_out(
            self.inner, owners, [token for _, token in new], [left[row] for row in owners], stop=self.sampling.stop
        )
        paths: dict[int, dict[int, Path]] = {row: {} for row in rows}
        for row, token in set(pairs) - set(new):
            paths[row][token] = self.paths[row][token]
        for (row, token), text, objective in zip(new, texts, self.judged(owners, texts).tolist(), strict=True):
            whole = len(text) <= left[row] or text[-1] in self.lm.eos_ids or len(answers[row]) + len(text) >= budget
            paths[row][token] = Path(text, objective, whole)
        self.paths = [paths.get(row, before) for row, before in enumerate(self.paths)]
        return torch.tensor([paths[row][token].objective for row, token in pairs]).view(tokens.shape)

    def judged(self, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """The objective of each row continued, [n]."""
        if not rows:
            return torch.zeros(0)
        scores = judge(self.companions["scorer"], rows, texts)
        if bool((scores.abs() > LARGEST).any()):
            largest = float(scores[~scores.isnan()].abs().max())
            raise UsageError(f"reward {self.reward.name!r} gave a score of {largest:g}; deal takes up to {LARGEST:g}")
        return scores

    def append(self, tokens: torch.Tensor | Sequence[Sequence[int]]) -> None:
        super().append(tokens)
        new = tokens[:, None].tolist() if isinstance(tokens, torch.Tensor) else tokens
        self.paths = [_followed(paths, more) for paths, more in zip(self.paths, new, strict=True)]

    def rewind(self, lengths: torch.Tensor | Sequence[int]) -> None:
        super().rewind(lengths)
        self.paths = [{} for _ in self.asked]

    def reindex(self, rows: Sequence[int]) -> None:
        self.paths = [self.paths[row] for row in rows]


def shaped(objective: torch.Tensor, config: DealConfig) -> torch.Tensor:
    """What h [n, k] adds to the score: normalised, and -inf under the floor where another candidate meets it."""
    out = objective
    if config.normalize == "candidates":
        centred = objective - objective.mean(-1, keepdim=True)
        deviation = centred.square().mean(-1, keepdim=True).sqrt()
        out = torch.where(deviation > 0, centred / deviation, 0)
    if config.floor is not None:
        under = objective < config.floor
        out = torch.where(under & ~under.all(-1, keepdim=True), -torch.inf, out)
    return out


def _followed(paths: dict[int, Path], tokens: Sequence[int]) -> dict[int, Path]:
    """The roll-outs that are still known after a row went on by `tokens`."""
    for token in tokens:
        path = paths.get(token)
        if path is None or not path.whole or len(path.tokens) < 2:
            return {}
        paths = {path.tokens[1]: Path(path.tokens[1:], path.objective, True)}
    return paths


def _judged(session: DealSession, tokens: torch.Tensor) -> torch.Tensor:
    return unjudged_last(session.ahead(range(session.rows), tokens))


def _unspeakable(reward: Reward, lm: Any) -> list[str]:
    """Keywords that no tokens of the model spell."""
    parts = [part for _, part in reward.terms] if isinstance(reward, WeightedSum) else [reward]
    words = [word.strip() for part in parts if isinstance(part, Keyword) for word in part.words]
    spelt = [lm.decode(lm.tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words]
    return [word for word, text in zip(words, spelt, strict=True) if word.casefold() not in text.casefold()]
