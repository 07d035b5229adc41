"""Majority vote: draw n answers, give the answer most of them agree on; weighted, the one with the most exp(r / beta).

    answer = argmax over keys k of sum_i w_i [key(y_i) = k],    w = 1/n, or softmax(r / beta) over the n draws

Self-consistency (Wang et al., arXiv 2203.11171) and, weighted, self-normalised importance sampling toward
p(y|x) exp(r(x, y) / beta) / Z, the target that QAlign (Faria & Smith, arXiv 2504.03790) samples by a chain: it is that
method's i.i.d. baseline. What is given is the earliest draw that has the winning key. Keys that tie go to the one that
was drawn first; a draw without a key never wins unless none has one, and then the first draw is given; a draw that the
reward could not judge weighs nothing unless none was judged, and then all weigh the same.
Departure from published code: weights are softmax(r / beta), never raw rewards, which may be negative.
Cost an answer: the prompt once, n answers, and n reward calls where weighted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from trimtab.card import Card
from trimtab.decode.consensus import Consensus, check_consensus
from trimtab.decode.selection import Array, answer_key, check_extract, vote
from trimtab.parts import Parts
from trimtab.policy import Completions, Policy

CARD = Card(
    slug="majority-vote",
    name="Majority vote",
    paper="arXiv 2203.11171; weighted: arXiv 2504.03790",
    summary="Draws n answers and gives the one most of them agree on, each weighed by a reward if asked.",
    goal="capability",
    stage="decode",
    mechanism="mcmc/best-of-n",
    signal=("own likelihood", "scalar reward"),
    access="black-box text",
    produces="decoder",
    needs=("a policy", "answers that can be compared: a number, a choice, a short text", "a reward if weighted"),
    infer_multiplier="n (the prompt once)",
    fit_cost="none",
    benefit_metrics=("accuracy", "reward"),
    cost_metrics=("tokens_forwarded_per_answer", "reward_calls_per_answer"),
    limits=("open-ended answers rarely agree: there the first draw is given",),
    risks=("a common mistake wins",),
    composes_with=("natural-control", "re-control", "pref-ctrl", "static-re", "steering-vector"),
    choose="When answers can be compared as keys (a number, a choice, a short text) and there is no reward to "
    "trust: it costs n answers and asks for nothing. For open text, mbr.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/base --reward pocket/judge --prompts sums.txt --policy majority-vote:n=8,extract=number",
)


@dataclass(frozen=True)
class MajorityVoteConfig:
    # answers drawn for each one given
    n: int = 8
    # what is compared: text, number (the last one) or a regular expression with one group (its last match)
    extract: str = "text"
    # whether answers weigh softmax(reward / beta) instead of the same
    weighted: bool = False
    # temperature of the weights: small trusts the reward, large the count
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_consensus(self.n, self.beta)
        check_extract(self.extract)


class MajorityVote(Consensus):
    """`MajorityVote(policy, n=8, extract="number")`, or with a reward and `weighted=True`, is a policy."""

    slug = "majority-vote"
    Config = MajorityVoteConfig

    def __init__(
        self,
        policy: Policy,
        reward: Any = None,
        n: int = 8,
        extract: str = "text",
        weighted: bool = False,
        beta: float = 1.0,
        name: str | None = None,
    ):
        super().__init__(policy, reward, MajorityVoteConfig(n, extract, weighted, beta), name)

    @classmethod
    def make(cls, parts: Parts, config: MajorityVoteConfig) -> Self:
        return cls(parts.policy, parts.reward if config.weighted else None, **asdict(config))

    def choose(self, drawn: Completions, group: range, shares: Array) -> tuple[int, dict[str, Any]]:
        """Also tells the `keys` of the draws."""
        keys = [answer_key(drawn.texts[row], self.config.extract) for row in group]
        return vote(keys, shares), {"keys": keys}
