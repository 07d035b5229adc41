"""`Controller`: a control that was fitted, can be saved, loaded, tuned and traced. Every steering method derives from it.

On disk: `controller.json` (method, config, which model and reward it was made for, metrics, cost of the fit),
`controller.safetensors` (its tensors) and `README.md` (a model card). Nothing else is read, nothing unpickles.

A method's file holds a frozen dataclass `Config` (every option, each with a comment that is its help), the maths, and a
subclass here with `slug`, `Config`, `learn`, `edit`, `tensors` and `restore`.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from trimtab.control import Control, Steered
from trimtab.errors import UsageError
from trimtab.files import dump_json, write_atomic
from trimtab.fingerprint import fingerprint
from trimtab.policy import Cost, Policy, Prompt
from trimtab.rewards import as_reward
from trimtab.sampling import Sampling
from trimtab.spec import build

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.rewards.base import Reward
    from trimtab.steer.rollouts import Progress, Rollouts

FORMAT = 1


class StrongEdit(UserWarning):
    """An edit so strong that what the model had to say is gone."""


@dataclass
class Origin:
    """What a controller was made from and for. An empty fingerprint (built by hand) is not checked."""

    model: str = ""
    fingerprint: str = ""
    hidden_size: int = 0
    reward: str = ""
    prompts: int = 0
    rollouts: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    fit_seconds: float = 0.0
    fit_tokens: int = 0
    fit_reward_calls: int = 0


class Controller(Control):
    """A fitted control. `config` holds every option, those of the fit and those of the decoding.

    DECODE names the options that do not change a fit: policies that differ in these alone share one. DIAL is the option
    that sets the strength (None: tuned to `kl_target` nats per token), START a first guess of it for the tuner.
    """

    slug: ClassVar[str]
    Config: ClassVar[type]
    DECODE: ClassVar[tuple[str, ...]] = ()
    DIAL: ClassVar[str] = "strength"
    START: ClassVar[float] = 1.0

    config: Any
    origin: Origin
    _unseen = False  # whether the next edit is the first since `check`
    _warned = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.slug

    @classmethod
    def fit(
        cls,
        lm: LM,
        prompts: Sequence[Prompt],
        reward: Reward,
        *,
        sampling: Sampling = Sampling(),
        config: Any = None,
        drawn: Rollouts | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Self:
        """Learn from a reward and choose the strength. Options are fields of `Config` (or give `config`).

        reward: a `Reward`, a function or a spec. drawn: rollouts of the unedited model, shared between methods.
        Raises `UsageError` for bad options, sampling that does not explore, too few prompts, and a reward with nothing
        to learn.
        """
        chosen = config or build(cls.Config, options, f"method {cls.slug!r}")
        learnt = cls.learn(lm, prompts, as_reward(reward), sampling, chosen, drawn, progress)
        return learnt.ready(lm, prompts, sampling, progress)

    @classmethod
    def learn(
        cls,
        lm: LM,
        prompts: Sequence[Prompt],
        reward: Reward,
        sampling: Sampling,
        config: Any,
        rollouts: Rollouts | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """The part of a fit that decoding options (`DECODE`) do not change."""
        raise UsageError(f"{cls.slug} cannot be fitted to a reward")

    def ready(self, lm: LM, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None) -> Self:
        """This controller with a strength: its own, or where that was left open the one that spends `kl_target`."""
        from trimtab.steer.tuner import tune

        if getattr(self.config, self.DIAL) is not None:
            return self
        tuned = tune(lm, self.but(**{self.DIAL: self.START}), self.config.kl_target, prompts, sampling, progress)
        out: Self = tuned.controller
        missed = abs(tuned.kl / self.config.kl_target - 1) > 0.05
        note = f"kl_target={self.config.kl_target:g} was met only to {tuned.kl:.3g}: KL jumps with the strength there"
        out.origin = dataclasses.replace(
            self.origin,
            warnings=[*self.origin.warnings, note] if missed else self.origin.warnings,
            metrics={**self.origin.metrics, "calibration_kl_per_token": tuned.kl},
            fit_seconds=self.origin.fit_seconds + tuned.cost.seconds,
            fit_tokens=self.origin.fit_tokens + tuned.cost.tokens_forwarded,
        )
        return out

    @property
    def strength(self) -> float:
        """The dial's value; raises `UsageError` while it has not been chosen."""
        value = getattr(self.config, self.DIAL)
        if value is None:
            raise UsageError(
                f"{self.slug}: no {self.DIAL} was chosen; give one, or call ready() to tune it to kl_target"
            )
        return float(value)

    def scaled(self, factor: float) -> Self:
        """The same controller with its strength dial multiplied by `factor` >= 0; 0 is the base model bit for bit."""
        return self.but(**{self.DIAL: self.strength * factor})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything to save, by name."""
        raise UsageError(f"{self.slug} cannot be saved")

    @classmethod
    def restore(cls, config: Any, tensors: dict[str, torch.Tensor], origin: Origin) -> Self:
        """The inverse of `tensors`; raises `UsageError` for a missing or misshapen one."""
        raise UsageError(f"{cls.slug} cannot be loaded")

    def but(self, **changes: Any) -> Self:
        """The same fit with other decoding options."""
        other = object.__new__(type(self))
        other.__dict__ = {**self.__dict__, "config": dataclasses.replace(self.config, **changes)}
        return other

    def as_policy(self, lm: LM) -> Policy:
        """The policy that `lm` becomes under this controller."""
        return Steered(lm, self)

    def trace(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """Telemetry for states [T, D]: `edit_norm` [T], and where there is a value `value_before`, `value_after` [T]."""
        return {"edit_norm": (self.edit(hidden).float() - hidden.float()).norm(dim=-1)}

    def check(self, model: nn.Module) -> None:
        self._unseen = True
        made = self.origin
        width = model.get_output_embeddings().weight.shape[1]  # type: ignore[operator]
        if made.hidden_size and width != made.hidden_size:
            raise UsageError(
                f"this {self.slug} controller was made for {made.model} with hidden size {made.hidden_size}; "
                f"this model has {width}: fit a new one"
            )
        if made.fingerprint and fingerprint(model) != made.fingerprint:
            raise UsageError(
                f"this {self.slug} controller was made for {made.model} (weights {made.fingerprint}); this model's weights "
                f"are {fingerprint(model)}: fit a new one"
            )

    def examine(self, hidden: torch.Tensor, u: torch.Tensor, kl: Callable[[], torch.Tensor]) -> None:
        """Warn, once a controller and at the first edit of a call, of an edit that drowns what the model had to say.

        hidden and u [..., D]; kl() [...] is the next-token KL in nats, and beyond 2 nats is said. The edit's length alone
        tells little: what lies across the unembedding costs nothing.
        """
        if not self._unseen or not u.numel():
            return
        self._unseen = False
        share = float((u.norm(dim=-1) / hidden.norm(dim=-1).clamp(min=1e-12)).max())
        nats = float(kl().max())
        if not self._warned and nats > 2:
            self._warned = True
            said = f"the edit is {share:.1f} times as long as the state and moves the next token by {nats:.1f} nats"
            warnings.warn(f"{self.slug}: {said}: expect broken text, lower {self.DIAL}", StrongEdit, stacklevel=2)

    # on disk

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the controller; returns the folder. Each file appears whole or not at all, the JSON last."""
        where = folder_to_fill(folder)
        tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in self.tensors().items()}
        write_atomic(where / "controller.safetensors", save(tensors, metadata={"format": "pt"}))
        write_atomic(where / "README.md", model_card(self))
        write_atomic(where / "controller.json", dump_json(record_of(self, self.config)))
        return where

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a controller of this method. Raises `UsageError` for a broken folder, another method or NaN weights."""
        record, tensors = read_controller(folder)
        if record["method"] != cls.slug:
            raise UsageError(f"{str(folder)!r} holds a {record['method']} controller, not {cls.slug}")
        known = {f.name for f in dataclasses.fields(cls.Config)}
        given = {key: value for key, value in record["config"].items() if key in known}
        config: Any = build(cls.Config, given, f"the controller in {str(folder)!r}")
        try:
            origin = Origin(**record["origin"])
        except TypeError as error:
            raise UsageError(f"the controller in {str(folder)!r} is damaged: {error}") from error
        return cls.restore(config, tensors, origin)


def folder_to_fill(folder: str | Path) -> Path:
    """The folder to save a controller in, made where it is missing; refused where it holds something else."""
    where = Path(folder)
    if where.exists() and any(where.iterdir()) and not (where / "controller.json").exists():
        raise UsageError(f"{str(where)!r} holds something that is not a controller: give an empty or new folder")
    where.mkdir(parents=True, exist_ok=True)
    return where


def record_of(controller: Controller, config: Any) -> dict[str, Any]:
    """What controller.json holds; `read_record` reads it."""
    return {
        "format": FORMAT,
        "method": controller.slug,
        "config": dataclasses.asdict(config),
        "origin": dataclasses.asdict(controller.origin),
    }


def read_record(folder: str | Path) -> dict[str, Any]:
    """controller.json of a saved controller, validated: its method, config and origin."""
    path = Path(folder) / "controller.json"
    if not path.is_file():
        raise UsageError(f"{str(folder)!r} is not a controller: {path.name} is missing")
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"the controller in {str(folder)!r} is damaged: {error}") from error
    if (
        not isinstance(record, dict)
        or record.get("format") != FORMAT
        or not {"method", "config", "origin"} <= set(record)
    ):
        raise UsageError(f"{str(folder)!r}: controller.json is not of format {FORMAT}")
    return record


def read_controller(folder: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The record and the tensors of a saved controller, validated."""
    record = read_record(folder)
    path = Path(folder) / "controller.safetensors"
    if not path.is_file():
        raise UsageError(f"{str(folder)!r} is not a controller: {path.name} is missing")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"the controller in {str(folder)!r} is damaged: {error}") from error
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UsageError(f"the controller in {str(folder)!r} has values that are not finite numbers in {key!r}")
    return record, tensors


def restored_module(module: nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> nn.Module:
    """Load `prefix.*` tensors into a module; a missing or misshapen one is a `UsageError` that names it."""
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        raise UsageError(f"the controller's tensors do not fit: {' '.join(str(error).split())}") from error
    return module.eval().requires_grad_(False)


def origin_of(
    lm: LM, reward: Reward, prompts: Sequence[Prompt], rollouts: Rollouts, sampling: Sampling, cost: Cost, metrics: Any
) -> Origin:
    """The `Origin` of a controller fitted to rollouts."""
    return Origin(
        model=lm.name,
        fingerprint=fingerprint(lm.model),
        hidden_size=lm.hidden_size,
        reward=reward.name,
        prompts=len(prompts),
        rollouts=len(rollouts),
        sampling=sampling.to_dict(),
        metrics=dict(metrics),
        warnings=list(rollouts.warnings),
        fit_seconds=cost.seconds,
        fit_tokens=cost.tokens_forwarded,
        fit_reward_calls=cost.reward_calls,
    )


def model_card(controller: Controller) -> str:
    """README.md of a saved controller."""
    made = controller.origin
    lines = [
        "---",
        "library_name: trimtab",
        f"tags: [trimtab, steering, {controller.slug}]",
        "---",
        f"# {controller.slug} controller for {made.model}",
        "",
        f"Edits hidden states (width {made.hidden_size}) of `{made.model}` (weights {made.fingerprint}) towards the reward "
        f"`{made.reward}`.",
        f"Fitted on {made.rollouts} rollouts of {made.prompts} prompts: {made.fit_tokens} tokens forwarded, "
        f"{made.fit_reward_calls} reward calls, {made.fit_seconds:.0f} s.",
        "",
        "| metric | value |",
        "|---|---|",
        *[f"| {key} | {value:.4g} |" for key, value in made.metrics.items()],
        "",
        "```python",
        f"from trimtab.steer import {type(controller).__name__}",
        f'controller = {type(controller).__name__}.from_pretrained("this folder")',
        "with controller.attached(model):",
        "    model.generate(...)",
        "```",
        "",
        *[f"- {warning}" for warning in made.warnings],
    ]
    return "\n".join(lines) + "\n"
