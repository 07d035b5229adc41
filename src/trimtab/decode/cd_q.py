"""CD-Q: controlled decoding with a value that satisfies the model's Bellman equation.

    L(V) = 1/2 E sum_t (V(x, y^t) - v_t)^2
    v_t  = sum_z p(z | x, y^t) V'([x, y^t, z])  where y_t does not end the answer, else r(x, y)

Mudgal et al., arXiv 2310.17022. V' is a trailing copy of V without gradient. The sum over the vocabulary is exact (see
`prefix_value`, whose `before` form this is), and only the model's next-token distribution enters it: the answers may come
from anywhere, where CD-FUDGE needs the model's own. The price is a target one step away: what is known of the reward
moves back by a token at a time, and on the model's own answers the fit is worse than CD-FUDGE's for the same effort.

Cost an answer of T tokens: T tokens of the model and one product with the output embedding a token; no reward call.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.card import Card
from trimtab.decode.cd import ControlledDecoding, TokenwiseConfig

CARD = Card(
    slug="cd-q",
    name="Controlled decoding (Q)",
    paper="arXiv 2310.17022",
    summary="Weigh next tokens by a learned value of every one of them, fitted by expected temporal differences.",
    goal="preference",
    stage="decode",
    mechanism="value-function-control",
    signal=("scalar reward",),
    access="hidden states",
    produces="decoder",
    needs=("a local causal language model", "a reward on finished text", "prompts to roll out"),
    infer_multiplier="1",
    fit_cost="rollouts x answer tokens forwarded, one reward call a rollout, a small MLP",
    benefit_metrics=("reward",),
    cost_metrics=("tokens_forwarded_per_answer", "kl_per_token", "nll_base_per_token"),
    limits=("fit at the temperature you decode at", "needs many epochs: the reward moves back a token at a time"),
    risks=("over-optimisation of V, and of a proxy reward, at a high weight",),
    composes_with=("best-of-n",),
    choose="As cd-fudge, at the cost of plain decoding and one product a token; and where the answers to fit on "
    "come from another model than the one that is steered.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/base --reward pocket/reward --prompts prompts.txt --policy cd-q:weight=1",
)


@dataclass(frozen=True)
class CdQConfig(TokenwiseConfig):
    # likeliest next tokens that are weighed; 0: the whole vocabulary
    k: int = 0


class CdQ(ControlledDecoding):
    slug = "cd-q"
    Config = CdQConfig
    target = "td0"
