"""Minimum Bayes risk: draw n answers, give the one most like all of them; weighted, like those of high reward.

    answer = argmax over i of sum_j w_j u(y_i, y_j),    u = ROUGE-1 F1 on token ids, w = 1/n or softmax(r / beta)

A vote for answers that never agree word for word (Eikema & Aziz, arXiv 2005.10283; Bertsch et al., arXiv 2310.01387).
Weighted, the expectation is that of self-normalised importance sampling toward p(y|x) exp(r(x, y) / beta) / Z: the i.i.d.
baseline of QAlign (Faria & Smith, arXiv 2504.03790). u counts repeated tokens as often as both have them, and the tokens
are those drawn, the end token included. Ties go to the earliest draw; a draw that the reward could not judge weighs
nothing (it may still be given) unless none was judged, and then all weigh the same.
Departure from published code: weights are softmax(r / beta); multiplying by raw rewards turns likeness to a bad answer
into a merit as soon as a reward is negative.
Cost an answer: the prompt once, n answers, n^2 / 2 comparisons of token counts, and n reward calls where weighted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from trimtab.card import Card
from trimtab.decode.consensus import Consensus, check_consensus
from trimtab.decode.selection import Array, mbr
from trimtab.errors import UsageError
from trimtab.parts import Parts
from trimtab.policy import Completions, Policy

CARD = Card(
    slug="mbr",
    name="Minimum Bayes risk",
    paper="arXiv 2005.10283; weighted: arXiv 2504.03790",
    summary="Draws n answers and gives the one that shares most words with all of them, each weighed by a reward if asked.",
    goal="capability",
    stage="decode",
    mechanism="mcmc/best-of-n",
    signal=("own likelihood", "scalar reward"),
    access="black-box text",
    produces="decoder",
    needs=("a policy that gives tokens", "a reward if weighted"),
    infer_multiplier="n (the prompt once)",
    fit_cost="none",
    benefit_metrics=("accuracy", "reward"),
    cost_metrics=("tokens_forwarded_per_answer", "reward_calls_per_answer"),
    limits=("likeness is shared tokens, not shared meaning",),
    risks=("prefers the typical answer: less diverse, and a common mistake wins",),
    composes_with=("natural-control", "re-control", "pref-ctrl", "static-re", "steering-vector"),
    choose="When answers are open text and the most typical of n is better than the best by an imperfect reward; "
    "weighted=true brings the reward in. With answer keys, majority-vote.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/base --reward pocket/reward --prompts prompts.txt --policy mbr:n=8",
)


@dataclass(frozen=True)
class MBRConfig:
    # answers drawn for each one given
    n: int = 8
    # whether answers weigh softmax(reward / beta) instead of the same
    weighted: bool = False
    # temperature of the weights: small trusts the reward, large the likeness alone
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_consensus(self.n, self.beta)


class MBR(Consensus):
    """`MBR(policy, n=8)`, or with a reward and `weighted=True`, is a policy; `policy` may be any that gives tokens."""

    slug = "mbr"
    Config = MBRConfig

    def __init__(
        self,
        policy: Policy,
        reward: Any = None,
        n: int = 8,
        weighted: bool = False,
        beta: float = 1.0,
        name: str | None = None,
    ):
        super().__init__(policy, reward, MBRConfig(n, weighted, beta), name)

    @classmethod
    def make(cls, parts: Parts, config: MBRConfig) -> Self:
        return cls(parts.policy, parts.reward if config.weighted else None, **asdict(config))

    def choose(self, drawn: Completions, group: range, shares: Array) -> tuple[int, dict[str, Any]]:
        tokens = [drawn.tokens[row] for row in group]
        if not any(tokens) and any(drawn.texts[row] for row in group):
            raise UsageError(
                f"mbr compares the tokens of answers, and {self.policy.name!r} gives none: use majority-vote"
            )
        return mbr(tokens, shares), {}
