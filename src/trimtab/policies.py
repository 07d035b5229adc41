"""From one-line specs to policies: `base`, `model:path=...`, `best-of-n:n=8`, `natural-control:kl_target=0.05`, ...

A steering method is fitted where it is needed. Policies that differ only in decoding options share one fit, methods that
roll out the same model share the rollouts; each is still charged what it would have cost alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab import catalogue
from trimtab.errors import UsageError, unknown
from trimtab.files import digest
from trimtab.lm import LM, local_folder
from trimtab.policy import Policy, Prompt
from trimtab.rewards import as_reward
from trimtab.run import RunDirectory
from trimtab.sampling import Sampling
from trimtab.spec import build, parse_spec
from trimtab.steer import load_controller
from trimtab.steer.controller import Controller
from trimtab.steer.rollouts import Progress, Rollouts, collect


@dataclass(frozen=True)
class BaseConfig:
    """The model itself has no options."""


@dataclass(frozen=True)
class OtherModelConfig:
    # pocket/NAME, a folder or a Hub id
    path: str


OTHERS: dict[str, type[Any]] = {"base": BaseConfig, "model": OtherModelConfig}


@dataclass
class Built:
    """A policy ready to answer. family: its slug; settings: every option as used; fit_*: what fitting it took."""

    name: str
    family: str
    policy: Policy
    settings: dict[str, Any] = field(default_factory=dict)
    controller: Controller | None = None
    fit_seconds: float = 0.0
    fit_tokens: int = 0
    kl_bound: float | None = None  # nats an answer


@dataclass
class Workshop:
    """What building policies needs: the model, the reward, the prompts to fit on; `run` keeps fits for a resumed run."""

    lm: LM
    reward: Any
    prompts: Sequence[Prompt]
    sampling: Sampling
    run: RunDirectory | None = None
    progress: Progress | None = None
    _learnt: dict[str, Controller] = field(default_factory=dict)
    _rollouts: dict[int, Rollouts] = field(default_factory=dict)

    def build(self, spec: str) -> Built:
        """The policy that `NAME[:key=value,...]` names. Unknown names and keys raise `UsageError`."""
        slug, options = parse_spec(spec)
        if slug in OTHERS:
            chosen = _plain(build(OTHERS[slug], options, f"policy {slug!r}"))
            return Built(spec, slug, self.lm if slug == "base" else LM.load(chosen["path"]), chosen)
        cls = catalogue.method(slug)
        if not issubclass(cls, Controller):
            config: Any = build(cls.Config, options, f"policy {slug!r}")
            policy = cls(self.lm, as_reward(self.reward), **dataclasses.asdict(config))
            bound = getattr(policy, "kl_bound", None)
            return Built(spec, slug, policy, dataclasses.asdict(config), kl_bound=bound)
        controller = self._controller(cls, slug, spec, options)
        made = controller.origin
        return Built(
            spec, slug, controller.as_policy(self.lm), _plain(controller.config), controller,
            made.fit_seconds, made.fit_tokens,
        )  # fmt: skip

    def _controller(self, cls: type[Controller], slug: str, spec: str, options: dict[str, str]) -> Controller:
        folder = options.pop("controller", None)
        if folder is not None:
            return saved_controller(cls, folder, options, self.lm)
        config: Any = build(cls.Config, options, f"policy {slug!r}")
        key = f"fits/{slug}-{_hash(_plain(config))}"
        if self.run is not None and self.run.done(key):
            return cls.from_pretrained(self.run.path / key)
        controller = self._fitted(cls, config).but(**{name: getattr(config, name) for name in cls.DECODE})
        controller = controller.ready(self.lm, self.prompts, self.sampling, self.progress)
        if self.progress is not None:
            for warning in controller.origin.warnings:
                self.progress(f"{spec}: {warning}")
        if self.run is not None:
            with self.run.folder(key) as where:
                controller.save_pretrained(where)
            self.run.event("fitted", policy=spec, fit_seconds=controller.origin.fit_seconds)
        return controller

    def _fitted(self, cls: type[Controller], config: Any) -> Controller:
        """The shared part of a fit, once for all policies that differ in decoding options alone."""
        fixed = {name: value for name, value in _plain(config).items() if name not in cls.DECODE}
        key = f"{cls.slug}-{_hash(fixed)}"
        if key not in self._learnt:
            if self.progress is not None:
                self.progress(f"fitting {cls.slug}")
            rollouts = self._shared_rollouts(getattr(config, "rollouts", 0))
            self._learnt[key] = cls.learn(
                self.lm, self.prompts, as_reward(self.reward), self.sampling, config, rollouts, self.progress
            )
        return self._learnt[key]

    def _shared_rollouts(self, count: int) -> Rollouts | None:
        if count and count not in self._rollouts:
            reward = as_reward(self.reward)
            self._rollouts[count] = collect(self.lm, self.prompts, reward, self.sampling, count, progress=self.progress)
        return self._rollouts.get(count)


def saved_controller(cls: type[Controller], folder: str, options: dict[str, str], lm: LM) -> Controller:
    """The controller in a folder, with the decoding options given; refused where it is another's."""
    controller = load_controller(folder)
    if not isinstance(controller, cls):
        raise UsageError(f"{folder!r} holds a {controller.slug} controller, not {cls.slug}")
    fixed = sorted(set(options) - set(cls.DECODE))
    if fixed:
        raise unknown("decoding option of a saved controller", fixed[0], cls.DECODE)
    config: Any = build(cls.Config, options, f"policy {cls.slug!r}")
    controller = controller.but(**{name: getattr(config, name) for name in options})
    controller.check(lm.model)
    return controller


def check_policy(spec: str, lm: LM | None = None) -> None:
    """Refuse an unknown policy, key or value, and a saved controller of another model, before any work is done."""
    slug, options = parse_spec(spec)
    if slug in OTHERS:
        chosen = build(OTHERS[slug], options, f"policy {slug!r}")
        if isinstance(chosen, OtherModelConfig):
            local_folder(chosen.path)
        return
    known = [*catalogue.slugs(), *OTHERS]
    if slug not in known:
        raise unknown("policy", slug, known)
    cls = catalogue.method(slug)
    if issubclass(cls, Controller) and "controller" in options:
        if lm is not None:
            saved_controller(cls, options.pop("controller"), options, lm)
        return
    build(cls.Config, options, f"policy {slug!r}")


def input_digest(spec: str) -> str | None:
    """SHA-256 of the folder that a policy is read from, so that a resumed run notices another one; None: no folder."""
    slug, options = parse_spec(spec)
    if "controller" in options:
        return digest(options["controller"])
    folder = local_folder(options["path"]) if slug == "model" else None
    return None if folder is None else digest(folder)


def _plain(config: Any) -> dict[str, Any]:
    return dict(dataclasses.asdict(config))


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
