"""CD-FUDGE: controlled decoding with a value regressed on the rewards of the model's own answers.

    L(V) = 1/2 E sum_t (V(x, y^t) - r(x, y))^2        over answers y drawn from the model

Mudgal et al., arXiv 2310.17022, after FUDGE (Yang and Klein, arXiv 2104.05218). The target is unbiased on the model's own
answers and on no others: an answer of another policy shows what that policy earns. How V is read while decoding is in
`cd`, what V looks like in `prefix_value`.

Departures: the paper's scorer is a language model of its own; ours reads the hidden states of the model that is decoded.
V of a text that ends is a network of its own, fitted to finished answers; no state follows an end token.

Cost an answer of T tokens: (k + 1) T tokens of the model with tap=after, T with tap=before; no reward call.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.card import Card
from trimtab.decode.cd import ControlledDecoding, TokenwiseConfig
from trimtab.decode.prefix_value import Tap

CARD = Card(
    slug="cd-fudge",
    name="Controlled decoding (FUDGE)",
    paper="arXiv 2310.17022, arXiv 2104.05218",
    summary="Weigh the likeliest next tokens by a learned value of the text each makes, fitted to the rewards of answers.",
    goal="preference",
    stage="decode",
    mechanism="value-function-control",
    signal=("scalar reward",),
    access="hidden states",
    produces="decoder",
    needs=("a local causal language model", "a reward on finished text", "prompts to roll out"),
    infer_multiplier="k + 1 (tap=before: 1)",
    fit_cost="rollouts x answer tokens forwarded, one reward call a rollout, a small MLP",
    benefit_metrics=("reward",),
    cost_metrics=("tokens_forwarded_per_answer", "kl_per_token", "nll_base_per_token"),
    limits=("fit at the temperature you decode at", "V is fitted to the model's own answers and right on no others"),
    risks=("over-optimisation of V, and of a proxy reward, at a high weight",),
    composes_with=("best-of-n",),
    choose="When a reward judges whole answers only, many prompts come and each answer should cost little: one "
    "fit, then a value at every token. cd-q where the fit must use answers of another model, cd-blockwise "
    "where whole blocks can be drawn.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/base --reward pocket/reward --prompts prompts.txt --policy cd-fudge:weight=1",
)


@dataclass(frozen=True)
class CdFudgeConfig(TokenwiseConfig):
    # the state V reads: after the candidate (k forwards a token), or before it (none, all candidates in one product)
    tap: Tap = "after"


class CdFudge(ControlledDecoding):
    slug = "cd-fudge"
    Config = CdFudgeConfig
    KNOB = "k"
    target = "mc"
