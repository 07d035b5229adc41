"""The Metropolis-Hastings kernel over answers: by enumeration from the functions that the chain uses, and the chain itself.

A toy model with 3 tokens and answers of at most 4 has 31 answers. r = 1.5 #1 - 0.7 length, beta 0.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from oracles.toy import EOS, Toy
from tiny import tiny_lm
from trimtab import Cost, Sampling
from trimtab.decode import metropolis
from trimtab.decode.chains import Chains
from trimtab.decode.metropolis import Walk, cut_points, log_acceptance, log_gain, suffix_ratio
from trimtab.decode.qalign import QAlign
from trimtab.decode.selection import weights
from trimtab.generation import sample
from trimtab.guided import Guided
from trimtab.sampling import uniforms
from trimtab.stepping import answer_steps

BETA = 0.7
PLAIN = Sampling()
PROMPTS = ["ba da fa la", "ma na", "pe"]


def score(tokens: tuple[int, ...]) -> float:
    return 1.5 * tokens.count(1) - 0.7 * len(tokens)


@pytest.fixture(scope="module")
def toy() -> Toy:
    made = Toy(score, vocab=3, horizon=4)
    made.lm.batch_rows = 2048
    return made


def rewards(toy: Toy) -> torch.Tensor:
    """[A] float64."""
    return torch.tensor([score(tuple(token for token in answer if token != EOS)) for answer in toy.answers]).double()


def token_logprobs(toy: Toy, policy: torch.Tensor) -> list[list[float]]:
    """Of every answer the log-probability of each token under a policy [N, V]."""
    row = {prefix: number for number, prefix in enumerate(toy.prefixes)}
    return [
        [float(policy[row[tuple(answer[:at])], token]) for at, token in enumerate(answer)] for answer in toy.answers
    ]


def posterior(toy: Toy, beta: float = BETA, policy: torch.Tensor | None = None) -> torch.Tensor:
    raw = toy.answer_probabilities(policy) * ((rewards(toy) - rewards(toy).max()) / beta).exp()
    return raw / raw.sum()


def quest(toy: Toy, beta: float = BETA) -> torch.Tensor:
    return (rewards(toy) / beta).softmax(0)


Likelihood = Callable[[Sequence[float], Sequence[float], int], float]


def kernel(
    toy: Toy,
    beta: float = BETA,
    policy: torch.Tensor | None = None,
    likelihood: Likelihood | None = None,
    reward: torch.Tensor | None = None,
    lengths: Callable[[torch.Tensor], torch.Tensor] = lambda lengths: lengths,
) -> torch.Tensor:
    """K [A, A], every cut summed over, with the acceptance of `metropolis`.

    likelihood: of quest. lengths: how the acceptance sees them (for what happens when it does not).
    """
    own, answers = token_logprobs(toy, toy.base if policy is None else policy), toy.answers
    reward = rewards(toy) if reward is None else reward
    gain = log_gain(reward[:, None], reward[None], beta)  # [A, A]
    size = torch.tensor([len(answer) for answer in answers])
    out = torch.zeros(len(answers), len(answers), dtype=torch.float64)
    for i, old in enumerate(answers):
        for cut in range(len(old)):
            for j, new in enumerate(answers):
                if len(new) <= cut or new[:cut] != old[:cut]:
                    continue
                more = 0.0 if likelihood is None else likelihood(own[i], own[j], cut)
                accept = log_acceptance(gain[i, j], lengths(size[i]), lengths(size[j]), more).exp()
                out[i, j] += accept * math.exp(math.fsum(own[j][cut:])) / len(old)
    out += (1 - out.sum(1)).diag()
    return out


def imbalance(kernel: torch.Tensor, law: torch.Tensor) -> float:
    flow = law[:, None] * kernel
    return float((flow - flow.T).abs().max())


def stationary(kernel: torch.Tensor) -> torch.Tensor:
    law = torch.ones(len(kernel), dtype=torch.float64) / len(kernel)
    for _ in range(40):
        kernel = kernel @ kernel
        kernel = kernel / kernel.sum(1, keepdim=True)
    return law @ kernel


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Total variation."""
    return float((a - b).abs().sum() / 2)


# the kernel, exactly


def test_the_posterior_is_in_detailed_balance(toy: Toy) -> None:
    """1e-15: sums of 31 products below 0.3, each rounded to 1e-16 of itself."""
    law, step = posterior(toy), kernel(toy)
    assert len(law) == 31 and float((step.sum(1) - 1).abs().max()) < 1e-15 and bool((step >= 0).all())
    assert imbalance(step, law) < 1e-15
    assert float((law @ step - law).abs().max()) < 1e-15
    assert float((stationary(step) - law).abs().max()) < 1e-12


@pytest.mark.parametrize(
    "lengths", [torch.ones_like, lambda lengths: lengths.reciprocal()], ids=["dropped", "inverted"]
)
def test_another_length_ratio_is_seen(toy: Toy, lengths: Callable[[torch.Tensor], torch.Tensor]) -> None:
    law, step = posterior(toy), kernel(toy, lengths=lengths)
    assert imbalance(step, law) > 1e-3
    assert distance(stationary(step), law) > 0.01


def test_the_ratio_outside_and_beta_below(toy: Toy) -> None:
    """exp(beta (r' - r) |y| / |y'|), as summaries have it, is wrong on both counts."""
    old, new = torch.tensor([[0.9, 1.0, 0.0], [0.3, -1.0, 9.0]], dtype=torch.float64)
    found = log_acceptance(log_gain(old, new, 2.0), torch.tensor([4, 4, 1]), torch.tensor([5, 2, 1]))
    assert found.tolist() == pytest.approx([-0.3 + math.log(4 / 5), -1 + math.log(2), 0], abs=1e-12)


def test_quest_is_in_detailed_balance_under_any_proposal(toy: Toy) -> None:
    """Its target has no likelihood in it; the proposal may be any policy whose log-probabilities are those it drew from."""
    law, other = quest(toy), toy.soft_optimal(-0.8)
    for policy in (toy.base, other):
        step = kernel(toy, policy=policy, likelihood=suffix_ratio)
        assert imbalance(step, law) < 1e-15
        assert float((stationary(step) - law).abs().max()) < 1e-12
    assert imbalance(kernel(toy), law) > 1e-3  # the posterior's acceptance has another target


def test_the_mean_of_log_probabilities_is_seen(toy: Toy) -> None:
    def mean_ratio(logprobs: Sequence[float], proposed: Sequence[float], cut: int) -> float:
        return float(np.mean(logprobs[cut:]) - np.mean(proposed[cut:]))

    law, step = quest(toy), kernel(toy, likelihood=mean_ratio)
    assert imbalance(step, law) > 1e-3 and distance(stationary(step), law) > 0.05


def test_without_a_reward_the_policy_is_stationary(toy: Toy) -> None:
    """beta -> infinity: acceptance min(1, |y| / |y'|), law p. At 1e12 the rewards still weigh 1e-12."""
    step = kernel(toy, beta=1e12)
    assert float((stationary(step) - toy.answer_probabilities()).abs().max()) < 1e-11
    sizes, others = torch.tensor([1, 2, 4]), torch.tensor([2, 2, 1])
    accept = log_acceptance(log_gain(torch.zeros(3), torch.ones(3), 1e15), sizes, others).exp()
    assert accept.tolist() == pytest.approx([0.5, 1, 1], abs=1e-12)


def test_cuts_are_uniform_and_inside() -> None:
    lengths = torch.tensor([1, 3, 7])
    grid = (torch.arange(21 * 100).double() + 0.5) / 2100
    for column, length in enumerate(lengths.tolist()):
        cuts = torch.stack([cut_points(u.expand(3), lengths) for u in grid])[:, column]
        assert torch.bincount(cuts, minlength=length).tolist() == [2100 // length] * length
    highest = torch.full((3,), 1 - 2**-53, dtype=torch.float64)
    assert cut_points(highest, lengths).tolist() == [0, 2, 6]


# the chain itself


def counts(toy: Toy, chains: Chains, burn_in: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each answer was held after `burn_in` steps, [A], and the mean reward of each chain [C]."""
    number = {tuple(answer): at for at, answer in enumerate(toy.answers)}
    held = [[number[tuple(state.tokens)] for state in chain.draws[burn_in:]] for chain in chains.chains]
    found = torch.tensor(held)
    return torch.bincount(found.flatten(), minlength=len(number)).double(), rewards(toy)[found].mean(1)


def last(toy: Toy, chains: Chains) -> torch.Tensor:
    """How many chains stand at each answer [A]."""
    return counts(toy, chains, chains.chains[0].steps)[0]


def after(start: torch.Tensor, kernel: torch.Tensor, steps: int) -> torch.Tensor:
    return start @ torch.linalg.matrix_power(kernel, steps)


def p_value(found: torch.Tensor, law: torch.Tensor) -> float:
    """Chi-squared test of counts [A]; answers expected fewer than 5 times are counted together."""
    expected = law / law.sum() * found.sum()
    often = expected >= 5
    groups = [torch.cat([column[often], column[~often].sum()[None]]) for column in (found, expected)]
    observed, predicted = (group[groups[1] > 0].numpy() for group in groups)
    assert float(found[law <= 0].sum()) == 0
    return float(chisquare(observed, predicted * observed.sum() / predicted.sum()).pvalue)


class Sharper(Guided):
    """Twice the logits: a guided policy whose law is known."""

    def guide(self, logits: torch.Tensor) -> torch.Tensor:
        return 2 * logits


class Sharpened:
    """The policy of such a session."""

    name = "sharpened"

    def __init__(self, lm: Any):
        self.lm = lm

    def open(self, prompts: Sequence[Any], sampling: Sampling, meter: Cost) -> Guided:
        return Sharper(self.lm.open(prompts, sampling, meter), prompts)

    def generate(self, prompts: Sequence[Any], sampling: Sampling = PLAIN) -> Any:
        return answer_steps(self, prompts, sampling)


def walk(
    toy: Toy, steps: int, count: int = 512, sampling: Sampling | None = None, policy: Any = None, **options: Any
) -> Chains:
    """`count` chains of one prompt."""
    method = QAlign(policy or toy.lm, toy.reward, **{"beta": BETA, **options})
    return method.run(method.start([toy.prompt], (sampling or toy.sampling).but(samples=count, seed=2)), steps)


def test_the_sampled_chain_has_the_target(toy: Toy) -> None:
    """100k steps: 512 chains x 200, the first 60 left out. Every chain is a batch: its mean has the autocorrelation in it."""
    law = posterior(toy)
    found, means = counts(toy, walk(toy, 200), 60)
    assert distance(found / found.sum(), law) < 0.03
    expected = float(law @ rewards(toy))
    assert abs(float(means.mean()) - expected) < 3 * float(means.std()) / len(means) ** 0.5
    assert expected > float(toy.answer_probabilities() @ rewards(toy)) + 2


def test_every_step_is_a_step_of_the_kernel(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,048 chains begin at draws of p and take 8 steps: independent draws of p K^8. Without |y| / |y'| that is seen."""
    start, step = toy.answer_probabilities(), kernel(toy)
    assert p_value(last(toy, walk(toy, 8, 2048)), after(start, step, 8)) > 1e-3

    def dropped(gain: torch.Tensor, a: torch.Tensor, b: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        return (gain + more).clamp(max=0)

    monkeypatch.setattr(metropolis, "log_acceptance", dropped)
    found = last(toy, walk(toy, 8, 2048))
    assert p_value(found, after(start, step, 8)) < 1e-6
    assert p_value(found, after(start, kernel(toy, lengths=torch.ones_like), 8)) > 1e-3


def test_quest_takes_the_steps_of_its_kernel(toy: Toy) -> None:
    start, step = toy.answer_probabilities(), kernel(toy, likelihood=suffix_ratio)
    found = last(toy, walk(toy, 8, 2048, target="quest"))
    assert p_value(found, after(start, step, 8)) > 1e-3
    assert p_value(found, after(start, kernel(toy), 8)) < 1e-6


def test_p_is_the_sampler_as_it_is(toy: Toy) -> None:
    """A guided policy, at a temperature, cut to two tokens: all of that is p."""
    scaled = 2 * toy.base / 1.6
    best = scaled.topk(2)
    p = torch.full_like(scaled, -torch.inf).scatter(-1, best.indices, best.values).log_softmax(-1)
    sampling = toy.sampling.but(temperature=1.6, top_k=2)
    found = last(toy, walk(toy, 8, 2048, sampling=sampling, policy=Sharpened(toy.lm)))
    assert p_value(found, after(toy.answer_probabilities(p), kernel(toy, policy=p), 8)) > 1e-3
    assert p_value(found, after(toy.answer_probabilities(), kernel(toy), 8)) < 1e-6


def test_a_constant_reward_leads_back_to_the_policy(toy: Toy) -> None:
    """All chains are put at one answer; 30 steps later their states are independent draws of p (and p K^n = p)."""
    method = QAlign(toy.lm, lambda prompts, texts: [3.0] * len(texts), beta=0.1)
    chains = method.run(method.start([toy.prompt], toy.sampling.but(samples=512, seed=5)), 0)
    first = next(chain.state for chain in chains.chains if chain.state.tokens == [EOS])
    for chain in chains.chains:
        chain.visited, chain.path = [first], [0]
    p = toy.answer_probabilities()
    assert p_value(last(toy, method.run(chains, 30)), p) > 1e-3
    assert distance(after(torch.eye(31).double()[toy.answers.index([EOS])], kernel(toy, beta=1e12), 30), p) < 1e-3


def test_answers_that_cannot_be_judged_have_no_mass(toy: Toy) -> None:
    """None wherever the answer has a 2: from such a state only another, or a way out, is accepted."""

    def partial(prompts: Sequence[Any], texts: Sequence[str]) -> list[float | None]:
        return [None if "2" in text else float(text.count("1")) for text in texts]

    method = QAlign(toy.lm, partial, beta=1.0)
    chains = method.run(method.start([toy.prompt], toy.sampling.but(samples=2048, seed=8)), 8)
    assert any(chain.visited[0].reward is None for chain in chains.chains)
    for chain in chains.chains:
        known = [state.reward is not None for state in chain.visited]
        assert known == sorted(known)  # once judged, never again not
    reward = torch.tensor([-math.inf if 2 in row else row.count(1) for row in toy.answers]).double()
    step = kernel(toy, beta=1.0, reward=reward)
    assert p_value(last(toy, chains), after(toy.answer_probabilities(), step, 8)) > 1e-3
    assert float(stationary(step)[reward.isinf()].sum()) < 1e-12


def test_a_beta_near_0_never_goes_down(toy: Toy) -> None:
    chains = walk(toy, 15, beta=1e-9)
    for chain in chains.chains:
        visited = [state.reward for state in chain.visited]
        assert visited == sorted(visited)
    assert chains.moves > 300


def test_importance_sampling_of_the_base_has_the_same_target(toy: Toy) -> None:
    """Self-normalised weights softmax(r / beta) on independent draws, with the delta method's standard error."""
    drawn = toy.lm.generate([toy.prompt], toy.sampling.but(samples=4000, seed=9))
    reward = np.array(toy.reward.score(drawn.prompts, drawn.texts), dtype=np.float64)
    share = weights(reward.tolist(), BETA)
    mean = float(share @ reward)
    expected = float(posterior(toy) @ rewards(toy))
    assert abs(mean - expected) < 3 * float(np.sqrt((share**2 * (reward - mean) ** 2).sum()))


# the horizon


def test_no_answer_outgrows_the_horizon(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suffix with a horizon of its own reaches answers that the policy cannot give, and that nothing leads back from."""
    kept = walk(toy, 20)
    assert max(len(state.tokens) for chain in kept.chains for state in chain.visited) == toy.horizon

    def unbounded(self: Walk, branch: Any, begun: Sequence[Sequence[int]]) -> Any:
        self.ended = []
        drawn = sample(branch, self.run.sampling, self.uniform[:, 2:])
        drawn.tokens = [[*before, *new] for before, new in zip(begun, drawn.tokens, strict=True)]
        return drawn

    monkeypatch.setattr(Walk, "_sample", unbounded)
    monkeypatch.setattr(metropolis, "can_take", lambda session: False)
    outgrown = walk(toy, 20)
    outside = {tuple(state.tokens) for chain in outgrown.chains for state in chain.visited} - set(
        map(tuple, toy.answers)
    )
    assert outside and max(map(len, outside)) > toy.horizon


def test_what_was_begun_counts_in_a_continuation() -> None:
    """Toward the limit, the stop string across the cut, and the context; the rest of the answer is what it was."""
    lm = tiny_lm()
    (prompt,) = lm.encode(["ba da fa"])
    whole = lm.generate(["ba da fa"], Sampling(max_new_tokens=12, seed=4))
    (tokens,) = whole.tokens
    uniform = uniforms(1, 12, 4)
    session = lm.session([[*prompt, *tokens[:5]]])
    ends: list[tuple[list[int], Any]] = []
    drawn = sample(session.fork([0]), Sampling(max_new_tokens=12), uniform[:, 5:], None, [tokens[:5]], ends)
    assert drawn.tokens == [tokens] and len(drawn.logprobs[0]) == len(tokens) - 5
    assert drawn.logprobs[0] == pytest.approx(whole.logprobs[0][5:], abs=1e-5)
    assert [rows for rows, _ in ends] == [[0]]
    assert ends[0][1].tokens == [[*prompt, *tokens[:-1]]]  # the last token is never forwarded
    stop = lm.decode(tokens[4:7])
    stopped = sample(session.fork([0]), Sampling(max_new_tokens=12, stop=(stop,)), uniform[:, 5:], None, [tokens[:5]])
    assert stopped.tokens == [tokens[:7]] and stopped.stopped == [True]
    full = sample(session, Sampling(max_new_tokens=5), uniform, None, [tokens[:5]])
    assert full.tokens == [tokens[:5]] and full.logprobs == [[]] and full.stopped == [False]
