"""QAlign: sample p(y|x) exp(r(x, y) / beta) / Z by Metropolis-Hastings over answers, then choose by consensus.

    i uniform on 0..|y|-1;    y' = y_<i + a new suffix drawn from p;    accept with probability
    posterior   min(1, exp((r' - r) / beta) |y| / |y'|)                     target p(y) exp(r / beta), the default
    quest       the same times p(y_>=i | y_<i) / p(y'_>=i | y_<i)           target exp(r / beta) alone

Faria & Smith, "Sample, Don't Search", arXiv 2504.03790; quest: Faria et al., arXiv 2406.00049. p is the wrapped policy as
it is really sampled (temperature, cuts, stop strings, max_new_tokens and context included); small beta is strong. With
more steps the law of the answer comes closer to the target and stays there; best-of-n follows an imperfect reward further
with every draw. Repeats of a state count in the choice. `decode/metropolis.py` has the step, `decode/chains.py` the
record and the diagnostics.

Departures. Some summaries of the paper put the length ratio into the exponent and multiply by beta; both are wrong.
From the published code: a suffix may use what i leaves of max_new_tokens (with the whole of it answers outgrow what the
reverse move can reach); quest has the sum of the suffix's log-probabilities, not the mean; tokens stay ids, so that text
which would be tokenized otherwise changes nothing; rewards and log ratios are not clipped. Ours: an answer that the
reward cannot judge has no mass in the target, and where neither beta nor strength is given beta is chosen from a few
proposals so that about a third would be accepted. The target then depends on prompts and reward: give beta where runs
are to be compared.

Cost an answer: the prompt once, one answer, and a step the new suffix (half an answer) and a reward call, which a
proposal that changes nothing does not take. Over a guided policy that keeps state of its own (`rows.can_take`) a part of
each accepted suffix is forwarded twice.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch

from trimtab.card import Card
from trimtab.decode.chains import Chain, Chains, State, diagnose
from trimtab.decode.metropolis import Walk
from trimtab.decode.selection import answer_key, check_extract, mbr, vote
from trimtab.errors import UsageError
from trimtab.files import write_json
from trimtab.parts import Parts
from trimtab.policy import Completions, Cost, Policy, Prompt
from trimtab.rewards import as_reward
from trimtab.sampling import Sampling, derive_seed
from trimtab.stepping import steppable

CARD = Card(
    slug="qalign",
    name="QAlign",
    paper="arXiv 2504.03790",
    summary="Walk among answers by re-drawing suffixes, accepting by reward, and give the answer most of the walk agrees on.",
    goal="preference",
    stage="decode",
    mechanism="mcmc/best-of-n",
    signal=("scalar reward",),
    access="logits",
    produces="decoder",
    needs=("a policy that can be stepped", "a reward on finished text, at answering time"),
    infer_multiplier="1 + steps * chains / 2 (the prompt once)",
    fit_cost="about 48 answers where beta is to be chosen, else none",
    benefit_metrics=("reward",),
    cost_metrics=("tokens_forwarded_per_answer", "reward_calls_per_answer", "kl_bound"),
    limits=("steps of one chain cannot run at the same time", "needs the reward at answering time"),
    risks=("a short chain is still near the base; a small beta hardly moves",),
    composes_with=("natural-control", "re-control", "pref-ctrl", "static-re", "steering-vector"),
    conflicts=("greedy decoding: the proposal never moves",),
    choose="When the reward is imperfect and there is much compute for one prompt: its answers follow the tilted "
    "model, and stay there, where best-of-n goes on after the reward's errors. At a few answers' cost it "
    "has hardly moved: take best-of-n.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/base --reward pocket/reward --prompts prompts.txt --policy qalign:steps=32",
)

PILOT = 32  # proposals that beta is chosen from
ACCEPTANCE = 0.35  # of proposals from the target, where beta is chosen
RARE, NEARLY_ALL, ENOUGH = 0.02, 0.95, 50  # an acceptance outside of these is warned about, over that many proposals


class PoorMixing(UserWarning):
    """A chain hardly moves, or hardly heeds the reward."""


@dataclass(frozen=True)
class QAlignConfig:
    # Metropolis-Hastings steps of each chain; 0 is the policy itself
    steps: int = 32
    # KL coefficient of the target p exp(reward / beta), small is strong; neither this nor strength: chosen by acceptance
    beta: float | None = None
    # 1 / beta; 0 is the policy itself
    strength: float | None = None
    # independent chains for each answer
    chains: int = 1
    # first states of each chain that are left out of the choice; one is always left
    burn_in: int = 0
    # every how many states of a chain one takes part in the choice
    thin: int = 1
    # mbr: most like all; vote: the commonest answer; last: one draw of the target; best: highest reward (it over-optimises)
    select: Literal["mbr", "vote", "last", "best"] = "mbr"
    # what is voted on: text, number (the last one) or a regular expression with one group
    extract: str = "text"
    # posterior: p exp(reward / beta); quest: exp(reward / beta) over all that the policy can say
    target: Literal["posterior", "quest"] = "posterior"

    def __post_init__(self) -> None:
        if self.steps < 0 or self.burn_in < 0:
            raise UsageError(f"steps and burn_in must be 0 or more, not {self.steps} and {self.burn_in}")
        if self.chains < 1 or self.thin < 1:
            raise UsageError(f"chains and thin must be 1 or more, not {self.chains} and {self.thin}")
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise UsageError(f"beta must be a finite number above 0 (small is strong), not {self.beta}")
        if self.strength is not None and not 0 <= self.strength < math.inf:
            raise UsageError(f"strength must be a finite number of 0 or more, not {self.strength}")
        if self.beta is not None and self.strength is not None:
            raise UsageError(
                f"strength is 1 / beta: give one of them, not beta={self.beta} and strength={self.strength}"
            )
        check_extract(self.extract)


def beta_for(jumps: torch.Tensor, acceptance: float = ACCEPTANCE) -> float:
    """The beta at which a chain between the two ends of each jump would accept that share; jumps [N] = |r' - r|.

    Between y and y' alone the target gives them sigmoid(+-jump / beta), and 1 - tanh(jump / (2 beta)) is accepted. Jumps
    of 0 are accepted whatever beta is and not counted; 1 where there is no other (beta does nothing then).
    """
    jumps = jumps[jumps > 0].double()
    if not len(jumps):
        return 1.0
    low, high = float(jumps.min()) * 1e-3, float(jumps.max()) * 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        share = float((1 - torch.tanh(jumps / (2 * middle))).mean())
        low, high = (low, middle) if share > acceptance else (middle, high)
    return high


class QAlign:
    """`QAlign(lm, reward, steps=32, beta=0.5)` is a policy; `lm` may be any policy that can be stepped.

    A run can be kept and gone on with; T steps and then T' are T + T':

        chains = q.run(q.start(prompts, sampling), 32)
        chains.save("chains.json")
        q.choose(q.run(Chains.load("chains.json"), 32))
    """

    slug = "qalign"
    Config = QAlignConfig
    KNOB = "steps"
    DIAL = "strength"

    def __init__(self, policy: Policy, reward: Any, name: str | None = None, **options: Any):
        self.policy = steppable(policy, "qalign")
        self.lm, self.reward, self.config = self.policy.lm, as_reward(reward), QAlignConfig(**options)
        self.name = name or f"qalign-{self.config.steps}"
        strength = self.config.strength
        self.beta = 1 / strength if strength else self.config.beta

    @classmethod
    def make(cls, parts: Parts, config: QAlignConfig) -> Self:
        """Where no beta is given it is chosen once, on the prompts to fit on."""
        made = cls(parts.policy, parts.reward, **asdict(config))
        if made.beta is None and config.strength is None:
            made.beta = parts.kept(
                f"qalign's beta over {made.policy.name} for {made.reward.name}",
                lambda: made.choose_beta(parts.prompts, parts.sampling),
                lambda beta, folder: write_json(folder / "beta.json", {"beta": beta}),
                lambda folder: float(json.loads((folder / "beta.json").read_text(encoding="utf-8"))["beta"]),
            )
        return made

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        """telemetry of each row: see `choose`."""
        start = time.perf_counter()
        if not prompts or self.config.steps == 0 or self.config.strength == 0:
            return self.policy.generate(prompts, sampling)
        done = self.choose(self.run(self.start(prompts, sampling), self.config.steps))
        done.cost.seconds = time.perf_counter() - start
        return done

    def start(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Chains:
        """Chains that have drawn nothing yet. A beta that is not given is chosen here, and charged."""
        _refuse_still(sampling)
        self.lm.encode(prompts)  # every prompt is refused, by its number, before any work
        beta, cost = (self.beta, Cost()) if self.beta is not None else self.choose_beta(prompts, sampling)
        each = self.config.chains
        chains = [Chain(row, number) for row in range(len(prompts)) for number in range(sampling.samples * each)]
        names = self.policy.name, self.reward.name
        return Chains(*names, list(prompts), sampling, beta, self.config.target, each, chains, cost)

    def run(self, chains: Chains, steps: int) -> Chains:
        """Take every chain `steps` further, in place; new ones draw their first state before."""
        start = time.perf_counter()
        own = (self.policy.name, self.reward.name, self.config.target)
        if own != (chains.policy, chains.reward, chains.target):
            raise UsageError(
                f"these chains were begun with {chains.policy}, {chains.reward} and target {chains.target}, and go on "
                f"with nothing else; this is {own[0]}, {own[1]} and target {own[2]}"
            )
        fresh, moves = chains.fresh, chains.moves
        for first in range(0, len(chains.chains), self.lm.batch_rows):
            walk = Walk(self.policy, self.reward, chains, chains.chains[first : first + self.lm.batch_rows])
            for _ in range(steps):
                walk.step()
        _warn(steps * len(chains.chains), chains.fresh - fresh, chains.moves - moves, chains.beta)
        chains.cost.seconds += time.perf_counter() - start
        return chains

    def choose(self, chains: Chains) -> Completions:
        """One answer of each group of chains, by `select`, among their states: repeats count, after burn_in, thinned.

        telemetry of each row: beta; acceptance, rewards [C][T + 1], unique, r_hat, effective_size (`chains.diagnose`);
        kl_bound, (mean reward of the states - mean of the first states) / beta. Over many rows of mixed chains that is at
        least the KL of the posterior from the policy in nats an answer, for it estimates that KL plus its reverse.
        """
        if not all(chain.path for chain in chains.chains):
            raise UsageError("these chains have drawn nothing yet: run them before choosing")
        out = Completions([], [], [], [], [], chains.cost)
        for group in chains.groups():
            draws = [chain.draws for chain in group]
            states = [
                state for own in draws for state in own[min(self.config.burn_in, len(own) - 1) :: self.config.thin]
            ]
            state = self._pick(states, group[0].state)
            out.prompts.append(chains.prompts[group[0].prompt])
            out.texts.append(state.text)
            out.tokens.append(state.tokens)
            out.logprobs.append(state.logprobs)
            out.finish_reasons.append("stop" if state.stopped else "length")
            first, later = _mean([own[0] for own in draws]), _mean(states)
            bound = None
            if first is not None and later is not None and chains.target == "posterior":
                bound = (later - first) / chains.beta
            out.telemetry.append({"beta": chains.beta, "kl_bound": bound, **diagnose(group)})
        return out

    def choose_beta(self, prompts: Sequence[Prompt], sampling: Sampling) -> tuple[float, Cost]:
        """`beta_for` of the first proposals to answers of some of the prompts, and what asking took."""
        start = time.perf_counter()
        _refuse_still(sampling)
        asked = list(prompts[:: max(1, len(prompts) // PILOT)][:PILOT])
        each = math.ceil(PILOT / len(asked))
        chains = [Chain(row, number) for row in range(len(asked)) for number in range(each)]
        own = sampling.but(seed=derive_seed(sampling.seed, "beta"))
        pilot = Chains(self.policy.name, self.reward.name, asked, own, 1.0, "posterior", 1, chains)
        jumps: list[float] = []
        for first in range(0, len(chains), self.lm.batch_rows):
            part = chains[first : first + self.lm.batch_rows]
            proposed, _ = Walk(self.policy, self.reward, pilot, part).propose()
            ends = [(chain.state.reward, new.reward) for chain, new in zip(part, proposed, strict=True)]
            jumps += [abs(a - b) for a, b in ends if a is not None and b is not None]
        pilot.cost.seconds = time.perf_counter() - start
        return beta_for(torch.tensor(jumps)), pilot.cost

    def _pick(self, states: Sequence[State], last: State) -> State:
        equal = [1 / len(states)] * len(states)
        if self.config.select == "last":
            return last
        if self.config.select == "mbr":
            return states[mbr([state.tokens for state in states], equal)]
        if self.config.select == "vote":
            return states[vote([answer_key(state.text, self.config.extract) for state in states], equal)]
        return max(states, key=lambda state: -math.inf if state.reward is None else state.reward)


def _mean(states: Sequence[State]) -> float | None:
    """Their mean reward; None where one could not be judged."""
    rewards = [state.reward for state in states if state.reward is not None]
    return math.fsum(rewards) / len(rewards) if len(rewards) == len(states) else None


def _refuse_still(sampling: Sampling) -> None:
    """Refuse sampling under which no proposal differs from its state, or no answer has a token."""
    if sampling.temperature == 0 or sampling.top_k == 1:
        raise UsageError(
            f"qalign proposes by sampling: with temperature={sampling.temperature:g} and top_k={sampling.top_k} a "
            "proposal never differs; give a temperature above 0 and a top_k other than 1"
        )
    if sampling.max_new_tokens == 0:
        raise UsageError("qalign cuts answers, and max_new_tokens=0 leaves nothing to cut: give 1 or more")


def _warn(proposals: int, fresh: int, moves: int, beta: float) -> None:
    """Say what a run's proposals (of them `fresh` differed from their state, `moves` were accepted) tell about beta."""
    if proposals >= ENOUGH and not fresh:
        said = "no proposal differed from its answer: the policy is as good as greedy, or repeats its draws"
    elif fresh >= ENOUGH and moves / fresh < RARE:
        said = f"{moves / fresh:.1%} of proposals were accepted, the chains hardly move: raise beta (now {beta:.3g})"
    elif fresh >= ENOUGH and moves / fresh > NEARLY_ALL:
        said = f"{moves / fresh:.1%} of proposals were accepted, the reward hardly counts: lower beta (now {beta:.3g})"
    else:
        return
    warnings.warn(f"qalign: {said}", PoorMixing, stacklevel=4)
