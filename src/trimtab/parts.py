"""`Parts`: what a decoding or prompt method is made from when it is named on the command line.

A method's class may have (none is needed by a method that takes a policy, a reward and its options):
    make(parts, config) -> Policy    how it is made; default: cls(parts.policy, parts.reward, **options)
    KNOB          the whole-number option that its cost rises with: `--budget tokens=N` sizes it
    DIAL          the option that its distance from the base rises with, 0 the base: `--budget kl=X` sizes it
    NEEDS_REWARD  False where it is made without a reward
    MODELS        its options that name a model, checked before any work
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trimtab.errors import UsageError
from trimtab.policy import Cost, Policy, Prompt
from trimtab.rewards import as_reward
from trimtab.rewards.base import Reward
from trimtab.sampling import Sampling

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.steer.rollouts import Progress, Rollouts

T = TypeVar("T")
Fit = Callable[[], tuple[T, Cost]]


@dataclass
class Parts:
    """See the module.

    policy    what to wrap: the model, or the policy that stands under this one
    lm        the model of the comparison
    given     the reward as it was given, None where none was; `reward` insists on one
    prompts   to fit on
    sampling  how a fit draws answers
    load      a model by `pocket/NAME`, folder or Hub id; loaded once
    rollouts  that many scored answers of the model, shared by all who ask for as many
    kept      (key, fit, save, load): a fit done once, kept in the run directory, its cost charged
    cost      what the fits of this policy took
    """

    policy: Policy
    lm: LM
    given: Any
    prompts: Sequence[Prompt]
    sampling: Sampling
    load: Callable[[str], LM]
    rollouts: Callable[[int], Rollouts]
    store: Callable[..., Any]
    progress: Progress | None = None
    cost: Cost = field(default_factory=Cost)

    @property
    def reward(self) -> Reward:
        if self.given is None:
            raise UsageError("this policy needs to know what is good: give a reward (--reward)")
        return as_reward(self.given)

    def kept(self, key: str, fit: Fit[T], save: Callable[[T, Path], None], load: Callable[[Path], T]) -> T:
        """The thing that `fit() -> (thing, Cost)` makes, or made before under the same key (settings included)."""
        thing: T
        thing, cost = self.store(key, fit, save, load)
        self.cost = self.cost + cost
        return thing


def make(cls: type[Any], parts: Parts, config: Any) -> Policy:
    """A policy of a method's class."""
    policy: Policy
    if hasattr(cls, "make"):
        policy = cls.make(parts, config)
        return policy
    reward = [parts.reward] if getattr(cls, "NEEDS_REWARD", True) else []
    policy = cls(parts.policy, *reward, **dataclasses.asdict(config))
    return policy
