"""What looking ahead is worth on pocket/base, and what it costs.

Measured when this was written; 40 held-out prompts for Transfer Q*, 60 sets of words for DeAL; tokens an answer, those of
the reward model included:

| reward: the judge itself                          | gold | tokens |
| drawn answers / greedy                            | 0.39 / 0.81 | 49 |
| ARGS k=5 weight=8, greedy / drawn                 | 0.89 / 0.37 | 50 |
| Transfer Q* k=5 weight=8 sure=0.9, greedy / drawn | 0.98 / 0.90 | 457 / 412 |
| best-of-8 / best-of-16                            | 0.92 / 0.97 | 225 / 434 |

| reward: pocket/reward                             | gold | tokens |
| ARGS k=5 weight=1, greedy                         | 0.90 | 349 |
| Transfer Q* k=5 weight=1 sure=0.9, greedy         | 0.92 | 957 |
| ... rolled out by pocket/chat                     | 0.93 | 829 |
| best-of-8 / best-of-16                            | 0.76 / 0.85 | 626 / 1,243 |

| two words asked for                               | both said | perplexity | tokens |
| drawn answers / best-of-10                        | 0.02 / 0.28 | 1.37 | 50 / 293 |
| DeAL k=10 lookahead=16 weight=10 sure=0.9         | 0.78 | 1.28 | 738 |
| ... agent=segment, k=10 lookahead=8 beams=3       | 0.73 | 1.34 | 790 |
| best-of-32 / best-of-64                           | 0.42 / 0.62 | 1.37 | 870 / 1,722 |

Without `sure` both take 4 to 5 times the tokens for the same answers or nearly so; then neither beats best-of-n at equal
tokens. Greedy choices are most of the gain on the gold score: pocket/base is good when it does not draw.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from trimtab import LM, Sampling, pocket
from trimtab.decode.args import Args
from trimtab.decode.best_of_n import BestOfN
from trimtab.decode.deal import Deal
from trimtab.decode.transfer_q import TransferQ
from trimtab.measure.stats import paired_difference, sign_test
from trimtab.policy import Completions, Prompt
from trimtab.rewards import Function, Keyword, PocketJudge, WeightedSum


@pytest.fixture(scope="module")
def base() -> LM:
    return LM.load("pocket/base")


@pytest.mark.filterwarnings("ignore:args asks pocket/judge about unfinished answers")
def test_transfer_q_sees_what_args_cannot(base: LM) -> None:
    """Gold score of answers drawn for 10 prompts from each of 2 seeds, paired; intervals by prompt. Baselines: ARGS with
    the same k and weight, and the model. The judge knows whole answers only, which ARGS has to ask too early."""
    judge = PocketJudge()
    prompts = pocket.prompts("test", 10, 1)
    options: dict[str, Any] = {"k": 5, "weight": 8.0, "select": "sample"}
    ours = TransferQ(base, judge, sure=0.9, **options)
    policies = {"ours": ours, "args": Args(base, judge, **options), "base": base}
    scores: dict[str, list[float | None]] = {name: [] for name in policies}
    costs: dict[str, float] = {}
    for seed in (0, 1):
        for name, policy in policies.items():
            done = policy.generate(prompts, Sampling(max_new_tokens=48, seed=seed))
            scores[name] += judge.score(done.prompts, done.texts)
            costs[name] = done.cost.tokens_forwarded / len(done)
    clusters = [*range(len(prompts))] * 2
    for baseline in ("args", "base"):
        difference = paired_difference(_floats(scores["ours"]), _floats(scores[baseline]), clusters)
        assert difference.low is not None and difference.low > 0, (baseline, difference)
    assert 4 < costs["ours"] / costs["base"] < 20


def _floats(scores: Sequence[float | None]) -> list[float]:
    return [math.nan if score is None else score for score in scores]


def word_sets(base: LM, count: int) -> dict[str, tuple[str, str]]:
    """Prompts and two words that one drawn answer holds (so they can be said), and neither prompt nor greedy answer does."""
    prompts, sampling = pocket.prompts("test", 3 * count, 2), Sampling(max_new_tokens=48, seed=11)
    drawn, greedy = (base.generate(prompts, sampling.but(temperature=heat)).texts for heat in (1.0, 0.0))
    out: dict[str, tuple[str, str]] = {}
    for prompt, text, likely in zip(prompts, drawn, greedy, strict=True):
        words = [word for word in re.findall(r"[a-z]{4,}", text.lower()) if word not in (prompt + likely).lower()]
        if len(set(words)) > 1 and len(out) < count:
            out[prompt] = (words[0], next(word for word in reversed(words) if word != words[0]))
    return out


def test_deal_says_the_words_it_is_asked_for(base: LM) -> None:
    """Both words said, over 30 sets; exact McNemar tests at 0.01. Baselines: the best of 32 drawn answers, which takes
    more tokens, and greedy."""
    sets = word_sets(base, 30)
    prompts: list[Prompt] = list(sets)
    wanted = {prompt: Keyword(words=words, mode="share") for prompt, words in sets.items()}

    def share(asked: Sequence[Any], texts: Sequence[str]) -> list[float | None]:
        return [wanted[prompt].score([prompt], [text])[0] for prompt, text in zip(asked, texts, strict=True)]

    reward, sampling = Function(share), Sampling(max_new_tokens=48, seed=3)
    deal = Deal(base, reward, k=10, lookahead=16, weight=10.0, sure=0.9).generate(prompts, sampling)
    plain = base.generate(prompts, sampling.but(temperature=0))
    rerank = BestOfN(base, reward, 32).generate(prompts, sampling)
    assert deal.cost.tokens_forwarded < rerank.cost.tokens_forwarded

    def said(done: Completions) -> np.ndarray:
        return np.array(share(done.prompts, done.texts)) == 1

    for baseline in (rerank, plain):
        ours, theirs = said(deal), said(baseline)
        p = sign_test(int((ours & ~theirs).sum()), int((theirs & ~ours).sum()))
        assert p is not None and p < 0.01 and ours.mean() > theirs.mean()
    assert perplexity(base, deal) < perplexity(base, rerank)


def perplexity(base: LM, done: Completions) -> float:
    """Of the answers under the model itself."""
    return math.exp(
        -sum(float(row.sum()) for row in base.score(done.prompts, done.tokens)) / sum(map(len, done.tokens))
    )


def test_deal_trades_one_objective_for_another(base: LM) -> None:
    """Kind words against unkind ones: as their weights go from (0, 1) to (1, 0) so do the answers. Decoding that does not
    look at the objectives would give the same counts at every weight, whose rank correlation is undefined."""
    kind = Keyword(words=("happy", "good", "great", "thank", "please", "nice", "help", "glad"), mode="count")
    harsh = Keyword(words=("dull", "fool", "again", "away", "lazy", "nobody", "job", "what"), mode="count")
    prompts, weights = pocket.prompts("test", 8, 5), [0.0, 0.25, 0.5, 0.75, 1.0]
    front = []
    for weight in weights:
        reward = WeightedSum([(weight, kind), (1 - weight, harsh)])
        done = Deal(base, reward, k=4, lookahead=8, weight=3.0, sure=0.9).generate(prompts, Sampling(max_new_tokens=32))
        front.append([float(np.mean(part(done.prompts, done.texts))) for part in (kind, harsh)])
    up, down = (spearmanr(weights, side).statistic for side in zip(*front, strict=True))
    assert up > 0.9 and down < -0.9, front
