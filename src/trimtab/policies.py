"""From one-line specs to policies: `base`, `model:path=...`, `best-of-n:n=8 over natural-control:kl_target=0.05`, ...

A steering method is fitted where it is needed. Policies that differ only in decoding options share one fit, methods that
roll out the same model share the rollouts; each is still charged what it would have cost alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trimtab import catalogue
from trimtab.errors import UsageError, unknown
from trimtab.files import digest, dump_json
from trimtab.lm import LM, local_folder
from trimtab.measure import METHODS as DIAGNOSTICS
from trimtab.merge import METHODS as MERGES
from trimtab.merge import TOOLS
from trimtab.parts import Parts, make
from trimtab.policy import Cost, Policy, Prompt
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
    _models: dict[str, LM] = field(default_factory=dict)
    _kept: dict[str, tuple[Any, Cost]] = field(default_factory=dict)

    def build(self, spec: str, changes: Mapping[str, Any] | None = None) -> Built:
        """The policy that `NAME[:key=value,...] [over ...]` names. Unknown names and keys raise `UsageError`.

        changes: options of the outermost policy, over those in the spec.
        """
        first, *below = layers(spec)
        under = self.build(" over ".join(below)) if below else None
        slug, options = parse_spec(first)
        options |= {key: str(value) for key, value in (changes or {}).items()}
        built = self._layer(spec, slug, options, under)
        if under is not None:
            built.settings["over"] = {"policy": under.name, **under.settings}
            built.fit_seconds += under.fit_seconds
            built.fit_tokens += under.fit_tokens
        return built

    def _layer(self, spec: str, slug: str, options: dict[str, str], under: Built | None) -> Built:
        if slug in OTHERS:
            _refuse_under(slug, under)
            chosen = _plain(build(OTHERS[slug], options, f"policy {slug!r}"))
            return Built(spec, slug, self.lm if slug == "base" else self._load(chosen["path"]), chosen)
        cls = catalogue.method(slug)
        if issubclass(cls, Controller):
            _refuse_under(slug, None if under is None or under.family == "base" else under)
            controller = self._controller(cls, slug, spec, options)
            made = controller.origin
            return Built(
                spec, slug, controller.as_policy(self.lm), _plain(controller.config), controller,
                made.fit_seconds, made.fit_tokens,
            )  # fmt: skip
        config: Any = build(cls.Config, options, f"policy {slug!r}")
        parts = Parts(
            self.lm if under is None else under.policy, self.lm, self.reward, self.prompts, self.sampling,
            self._load, self._needed_rollouts, self._store, self.progress,
        )  # fmt: skip
        policy = make(cls, parts, config)
        on_base = under is None or under.family == "base"
        bound = getattr(policy, "kl_bound", None) if on_base else None
        settings = _plain(config)
        return Built(spec, slug, policy, settings, None, parts.cost.seconds, parts.cost.tokens_forwarded, bound)

    def _load(self, path: str) -> LM:
        if path not in self._models:
            self._models[path] = self.lm if path == self.lm.name else LM.load(path)
        return self._models[path]

    def _needed_rollouts(self, count: int) -> Rollouts:
        drawn = self._shared_rollouts(count)
        assert drawn is not None
        return drawn

    def _store(self, key: str, fit: Any, save: Any, load: Any) -> tuple[Any, Cost]:
        """A fit of a decoding or prompt method: made once, kept in the run directory with what it cost."""
        if key in self._kept:
            return self._kept[key]
        name = f"fits/{policy_key(key)}"
        if self.run is not None and self.run.done(name):
            where = self.run.path / name
            self._kept[key] = load(where), Cost(**json.loads((where / "cost.json").read_text()))
            return self._kept[key]
        if self.progress is not None:
            self.progress(f"fitting {key[:60]}")  # a key may hold every setting
        thing, cost = fit()
        if self.run is not None:
            with self.run.folder(name) as where:
                save(thing, where)
                (where / "cost.json").write_text(dump_json(asdict(cost)))
            self.run.event("fitted", policy=key, fit_seconds=cost.seconds)
        self._kept[key] = thing, cost
        return thing, cost

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


def layers(spec: str) -> list[str]:
    """`A over B over base` as its parts, the outermost first. Only " over " before a policy's name divides."""
    known = {*catalogue.slugs(), *OTHERS}
    parts: list[str] = []
    for piece in re.split(r"\s+over\s+", spec):
        if parts and parse_spec(piece or "?")[0] not in known and ":" in parts[-1]:
            parts[-1] += f" over {piece}"  # inside a value
        else:
            parts.append(piece)
    return parts


def check_policy(spec: str, lm: LM | None = None) -> None:
    """Refuse an unknown policy, key or value, and a saved controller of another model, before any work is done."""
    known = [slug for slug in (*catalogue.slugs(), *OTHERS) if slug not in {**DIAGNOSTICS, **MERGES, **TOOLS}]
    above = ""
    for layer in layers(spec):
        slug, options = parse_spec(layer)
        if slug in DIAGNOSTICS:
            raise UsageError(f"{slug} is a diagnostic and no policy: trimtab measure {slug} MODEL, or --measure {slug}")
        if slug in MERGES or slug in TOOLS:
            raise UsageError(f"{slug} merges models and is no policy: trimtab merge {slug} makes one model of them")
        if slug not in known:
            raise unknown("policy", slug, known)
        cls = None if slug in OTHERS else catalogue.method(slug)
        if above and (above in OTHERS or issubclass(catalogue.method(above), Controller)) and slug != "base":
            raise _cannot_wrap(above, layer)
        above = slug
        if cls is not None and issubclass(cls, Controller) and "controller" in options:
            if lm is not None:
                saved_controller(cls, options.pop("controller"), options, lm)
            continue
        chosen = build(OTHERS[slug] if cls is None else cls.Config, options, f"policy {slug!r}")
        for path in _model_paths(cls, chosen):
            local_folder(path)


def needs_reward(spec: str) -> bool:
    """Whether a policy cannot be built without a reward."""
    for layer in layers(spec):
        slug, options = parse_spec(layer)
        if slug not in OTHERS and "controller" not in options:
            if getattr(catalogue.method(slug), "NEEDS_REWARD", True):
                return True
    return False


def input_digest(spec: str) -> str | None:
    """SHA-256 of all that a policy is read from, so that a resumed run notices another one; None: nothing is read."""
    found = []
    for layer in layers(spec):
        slug, options = parse_spec(layer)
        cls = None if slug in OTHERS else catalogue.method(slug)
        if "controller" in options and cls is not None and issubclass(cls, Controller):
            found.append(digest(options["controller"]))
            continue
        chosen = build(OTHERS[slug] if cls is None else cls.Config, options, f"policy {slug!r}")
        folders = [local_folder(path) for path in _model_paths(cls, chosen)]
        named = [Path(value) for value in options.values() if cls is not None and os.path.exists(value)]
        found += [digest(path) for path in [*folders, *named] if path is not None]
    return None if not found else found[0] if len(found) == 1 else _hash({"inputs": found})


def _model_paths(cls: type[Any] | None, config: Any) -> list[str]:
    """The models that a policy's options name."""
    if isinstance(config, OtherModelConfig):
        return [config.path]
    values = [getattr(config, name) for name in getattr(cls, "MODELS", ())]
    return [path for value in values if value for path in ([value] if isinstance(value, str) else value)]


def _refuse_under(slug: str, under: Built | None) -> None:
    if under is not None:
        raise _cannot_wrap(slug, under.name)


def _cannot_wrap(slug: str, under: str) -> UsageError:
    return UsageError(f"{slug} works on the model itself: it can be wrapped, but not stand over {under!r}")


def policy_key(spec: str) -> str:
    """A name for files that belong to a spec."""
    return re.sub(r"[^A-Za-z0-9]+", "-", spec)[:40].strip("-") + "-" + _hash({"policy": spec})


def _plain(config: Any) -> dict[str, Any]:
    return dict(dataclasses.asdict(config))


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
