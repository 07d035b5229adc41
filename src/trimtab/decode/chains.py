"""Markov chains over answers: what they visited, how well they mixed, and a file to go on from.

A chain that rejects a proposal stays, and staying counts as one more draw: `Chain.path` has one entry a step, so that
averages over `Chain.draws` are averages under the chain's law.

split R-hat and effective sample size are those of Vehtari et al. (arXiv 1903.08008) without ranks: R-hat compares the
variance between the halves of all chains with that within (1 is mixed, 1.1 is not), the effective sample size divides
the draws by 1 + 2 sum of autocorrelations, the sum cut where a pair of them turns negative (Geyer 1992).
Draws [C, T] float: C chains of T draws.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError
from trimtab.files import write_json
from trimtab.policy import Cost, Prompt
from trimtab.sampling import Sampling

Array = npt.NDArray[np.float64]
SCHEMA = 1


@dataclass
class State:
    """An answer that a chain stood at.

    tokens    ids as drawn, the end token included; never read back from the text
    logprobs  of each token, in nats, under the sampler
    stopped   whether the answer ended by itself
    reward    None: it could not be judged
    """

    tokens: list[int]
    logprobs: list[float]
    stopped: bool
    text: str
    reward: float | None


@dataclass
class Chain:
    """One chain.

    prompt   the number of its prompt; with `number` it names the chain's random stream
    visited  its states in the order they were accepted
    path     path[t] is the place in `visited` after t steps
    fresh    how many proposals differed from the state they were made from
    """

    prompt: int
    number: int
    visited: list[State] = field(default_factory=list)
    path: list[int] = field(default_factory=list)
    fresh: int = 0

    @property
    def state(self) -> State:
        return self.visited[-1]

    @property
    def steps(self) -> int:
        return max(0, len(self.path) - 1)

    @property
    def accepted(self) -> list[bool]:
        """Of every step, whether it led to another answer."""
        return [after != before for before, after in zip(self.path, self.path[1:], strict=False)]

    @property
    def draws(self) -> list[State]:
        """Where it stood after 0, 1, ..., T steps, repeats included."""
        return [self.visited[at] for at in self.path]

    def stand(self, state: State, accepted: bool) -> None:
        """One step further: at `state` if accepted (the first state always is), else where it was."""
        if accepted:
            self.visited.append(state)
        self.path.append(len(self.visited) - 1)


@dataclass
class Chains:
    """All chains of a run: enough to go on from, with the same policy and reward. `each` consecutive ones are an answer's.

    beta and target say what they sample; policy and reward are names.
    """

    policy: str
    reward: str
    prompts: list[Prompt]
    sampling: Sampling
    beta: float
    target: str
    each: int
    chains: list[Chain]
    cost: Cost = field(default_factory=Cost)

    @property
    def fresh(self) -> int:
        """Proposals so far that differed from their state."""
        return sum(chain.fresh for chain in self.chains)

    @property
    def moves(self) -> int:
        """Of these, how many were accepted."""
        return sum(map(sum, (chain.accepted for chain in self.chains)))

    def groups(self) -> list[list[Chain]]:
        """The chains of each answer."""
        return [self.chains[first : first + self.each] for first in range(0, len(self.chains), self.each)]

    def save(self, path: str | Path) -> None:
        """As JSON, whole or not at all."""
        write_json(path, {"schema": SCHEMA, **asdict(self)})

    @staticmethod
    def load(path: str | Path) -> Chains:
        """What `save` wrote. `UsageError` for anything else."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            if record.pop("schema") != SCHEMA:
                raise ValueError("of another version")
            chains = [
                Chain(**{**chain, "visited": [State(**state) for state in chain["visited"]]})
                for chain in record.pop("chains")
            ]
            sampling = record.pop("sampling")
            sampling["stop"] = tuple(sampling["stop"])
            cost = Cost(**record.pop("cost"))
            out = Chains(**record, sampling=Sampling(**sampling), chains=chains, cost=cost)
            _check(out)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path} does not hold saved chains ({error}): give a file that Chains.save wrote"
            ) from None
        return out


def _check(chains: Chains) -> None:
    """ValueError where the parts of a file do not fit each other."""
    for number, chain in enumerate(chains.chains):
        whole = all(0 < len(state.tokens) == len(state.logprobs) for state in chain.visited)
        steps = [after - before for before, after in zip([-1, *chain.path], chain.path, strict=False)]
        if not whole or sum(steps) != len(chain.visited) or not set(steps[1:]) <= {0, 1}:
            raise ValueError(f"chain {number} is broken")
        if not 0 <= chain.prompt < len(chains.prompts):
            raise ValueError(f"chain {number} has no prompt")


# how well chains mixed


def acceptance(chains: Sequence[Chain]) -> float | None:
    """Share accepted of the proposals that differed from their state; None where there was none."""
    proposed = sum(chain.fresh for chain in chains)
    return sum(sum(chain.accepted) for chain in chains) / proposed if proposed else None


def diagnose(chains: Sequence[Chain]) -> dict[str, Any]:
    """Of the chains of one answer, over all their draws: a record for JSON; None where a figure is undefined.

    acceptance; rewards [C][T + 1]; unique answers; r_hat and effective_size of the reward.
    """
    rewards = [[state.reward for state in chain.draws] for chain in chains]
    known = all(reward is not None for row in rewards for reward in row)
    shortest = min(map(len, rewards)) if known else 0
    draws = np.array([row[:shortest] for row in rewards], dtype=np.float64)
    return {
        "acceptance": acceptance(chains),
        "rewards": rewards,
        "unique": len({tuple(state.tokens) for chain in chains for state in chain.visited}),
        "r_hat": split_r_hat(draws),
        "effective_size": effective_size(draws),
    }


def split_r_hat(draws: npt.ArrayLike) -> float | None:
    """Split R-hat of draws [C, T]; None below 4 draws a chain, or where they do not vary within the halves."""
    halves = _split(np.asarray(draws, dtype=np.float64))
    if halves is None:
        return None
    within, total = _variances(halves)
    return float(np.sqrt(total / within)) if within > 0 else None


def effective_size(draws: npt.ArrayLike) -> float | None:
    """How many independent draws the draws [C, T] are worth in a mean; None as `split_r_hat`. At most C T log10(C T)."""
    halves = _split(np.asarray(draws, dtype=np.float64))
    if halves is None:
        return None
    within, total = _variances(halves)
    if not within > 0:
        return None
    rho = 1 - (within - _autocovariance(halves).mean(0)) / total  # [T / 2]
    rho[0] = 1
    pairs = rho[: len(rho) // 2 * 2].reshape(-1, 2).sum(1)
    negative = np.flatnonzero(pairs < 0)
    pairs = np.minimum.accumulate(pairs[: negative[0]] if len(negative) else pairs)
    size = halves.size
    return float(size / max(2 * pairs.sum() - 1, 1 / np.log10(size)))


def _split(draws: Array) -> Array | None:
    """The first and second half of every chain, [2 C, T // 2] (the middle draw of an odd number is left out)."""
    half = draws.shape[1] // 2
    return np.concatenate([draws[:, :half], draws[:, draws.shape[1] - half :]]) if half >= 2 else None


def _variances(draws: Array) -> tuple[float, float]:
    """The mean variance within a chain, and the estimate of the whole variance that counts differences between them."""
    length = draws.shape[1]
    within = float(draws.var(1, ddof=1).mean())
    between = float(draws.mean(1).var(ddof=1))
    return within, within * (length - 1) / length + between


def _autocovariance(draws: Array) -> Array:
    """Of each chain at every lag, [C, T], scaled so that lag 0 is its variance with ddof=1."""
    length = draws.shape[1]
    spectrum = np.fft.rfft(draws - draws.mean(1, keepdims=True), 2 * length)
    raw = np.fft.irfft(spectrum * spectrum.conj(), 2 * length)[:, :length]
    return np.asarray(raw / (length - 1), dtype=np.float64)
