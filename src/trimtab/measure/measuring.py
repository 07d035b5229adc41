"""From words to measurements: what `trimtab measure` does. Models and policies by name, options by key, results cached.

A whole measurement is kept under the hash of all that it depends on (the diagnostic's options, the bytes of the model's
files and of the texts, the policy, the sampling, the judge, trimtab's version), so the same question asked again is
answered without loading anything. Below that, answers, hidden states and judgements are kept one by one.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import trimtab
from trimtab import catalogue, measure
from trimtab.checkpoint import local_folder
from trimtab.environment import environment
from trimtab.errors import UsageError, unknown
from trimtab.files import digest
from trimtab.fingerprint import fingerprint_of
from trimtab.measure.cache import Cache
from trimtab.measure.contamination import check_files
from trimtab.measure.diagnostic import Diagnostic, Progress, Subject, config_files, files_digest
from trimtab.measure.measurement import Comparison, Measurement
from trimtab.policy import Prompt
from trimtab.prompts import read_prompts
from trimtab.sampling import Sampling
from trimtab.spec import build

Template = Literal["own", "plain"]
SCHEMA = 1


@dataclass(frozen=True)
class Asked:
    """What every subject of one `trimtab measure` is measured with. texts, fit_prompts, train_texts: files.

    train_texts: what the models were trained on; texts that overlap with it are warned about.
    """

    texts: tuple[Path, ...] = ()
    reward: str | None = None
    judge: str | None = None
    template: Template = "own"
    sampling: Sampling = Sampling()
    fit_prompts: Path | None = None
    train_texts: tuple[Path, ...] = ()


@dataclass
class Measured:
    """measurements: one a subject, the first is the one asked about; comparisons: it against each of the others."""

    measurements: list[Measurement]
    comparisons: list[Comparison] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "name": self.measurements[0].name,
            "measurements": [one.to_dict() for one in self.measurements],
            "comparisons": [one.to_dict() for one in self.comparisons],
            "environment": environment(),
        }


def diagnostic(slug: str, options: dict[str, Any]) -> Diagnostic:
    """A diagnostic by name, with its options as text or values. Unknown names and keys raise `UsageError`."""
    if slug not in catalogue.slugs():
        raise unknown("diagnostic", slug, measure.METHODS)
    cls = catalogue.method(slug)
    if not issubclass(cls, Diagnostic):
        raise UsageError(f"{slug} is a method, not a diagnostic (diagnostics: {', '.join(sorted(measure.METHODS))})")
    found: Diagnostic = cls(build(cls.Config, options, f"diagnostic {slug!r}"))
    return found


def run_measure(
    tool: Diagnostic,
    subjects: Sequence[str],
    asked: Asked,
    *,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Measure the first subject, and compare it with each of the others.

    subjects: `MODEL`, or `POLICY[ over POLICY] on MODEL`. Everything that can be refused is refused before any work.
    """
    cache = cache if cache is not None else Cache.default()
    if twice := sorted({name for name in subjects if list(subjects).count(name) > 1}):
        raise UsageError(f"{twice[0]} is given twice: there would be nothing to compare")
    if tool.TOGETHER and len(subjects) < 2:
        raise UsageError(f"{tool.slug} sets models against one another: give --against MODEL, once or several times")
    trained = [*asked.train_texts, *([asked.fit_prompts] if asked.fit_prompts else [])]
    overlaps = check_files(asked.texts, trained)
    texts = files_digest([*asked.texts, *config_files(tool)])
    bench = _Bench(asked, cache, progress)
    identities = {name: bench.identity(name) for name in subjects}
    if tool.TEMPLATED and not tool.TOGETHER and asked.template == "own":
        _check_templates(tool.slug, subjects)
    about = [tool.slug, dataclasses.asdict(tool.config), texts, asked.reward, asked.judge, asked.template]
    about += [asked.sampling.to_dict(), trimtab.__version__, _inputs(asked, tool.config)]
    about.append(digest(inspect.getfile(type(tool))))  # a diagnostic that was edited measures again

    def taken(names: Sequence[str], take: Callable[[], Measurement]) -> Measurement:
        key = fingerprint_of(*about, [identities[name] for name in names], list(names))
        known = None if tool.writes else cache.load("measurements", key)
        if known is None:
            found = take()
            if not found.details.get("failed"):  # a judge's request that failed is asked again by the same command
                cache.save("measurements", key, found.to_dict())
            return found
        return Measurement.from_dict(known)

    def one(name: str) -> Measurement:
        if not tool.REFERENCE or name != subjects[0] or len(subjects) == 1:
            return taken([name], lambda: tool.measure(bench.subject(name)))

        def take() -> Measurement:
            subject = bench.subject(name)
            subject.reference = bench.subject(subjects[1])
            return tool.measure(subject)

        return taken(list(subjects[:2]), take)

    if tool.TOGETHER:
        together = taken(subjects, lambda: tool.measure_together([bench.subject(name) for name in subjects]))
        together.warnings += overlaps
        return Measured([together])
    measurements = [one(name) for name in subjects]
    measurements[0].warnings += overlaps
    return Measured(measurements, [tool.compare(measurements[0], other) for other in measurements[1:]])


class _Bench:
    """Makes subjects, each model loaded at most once and only if something has to be measured."""

    def __init__(self, asked: Asked, cache: Cache, progress: Progress | None) -> None:
        self.asked, self.cache, self.progress = asked, cache, progress
        self.models: dict[str, Any] = {}
        self.identities: dict[str, str] = {}
        self.reward: Any | None = None
        if asked.reward is not None:
            from trimtab.rewards import parse_reward

            self.reward = parse_reward(asked.reward)

    def identity(self, name: str) -> str:
        """A hash of all that a subject is made from, worked out once."""
        if name not in self.identities:
            self.identities[name] = self._identity(name)
        return self.identities[name]

    def _identity(self, name: str) -> str:
        policy, model = split_subject(name)
        made = [] if policy is None else self._made(policy)
        folder = local_folder(model)
        weights = self.model(model).fingerprint if folder is None else self._folder_digest(folder)
        return fingerprint_of(weights, self.asked.template, made)

    def _made(self, policy: str) -> list[Any]:
        from trimtab.policies import check_policy, input_digest, needs_reward

        check_policy(policy)
        if self.asked.reward is None and needs_reward(policy):
            raise UsageError(f"{policy} needs to know what is good: give --reward")
        return [policy, input_digest(policy), self.asked.reward, _inputs(self.asked)]

    def _folder_digest(self, folder: Path) -> str:
        """SHA-256 of a folder, remembered by the names, sizes and times of its files."""
        files = sorted(child for child in folder.rglob("*") if child.is_file())
        seen = [[str(child), child.stat().st_size, child.stat().st_mtime_ns] for child in files]
        key = fingerprint_of("folder", seen)
        known = self.cache.load("digests", key)
        if known is None:
            known = digest(folder)
            self.cache.save("digests", key, known)
        return str(known)

    def model(self, path: str) -> Any:
        if path not in self.models:
            from trimtab.lm import LM

            if self.progress is not None:
                self.progress(f"loading {path}")
            if _is_reward_model(path):
                from trimtab.rewards import parse_reward

                self.models[path] = parse_reward(path)
            else:
                lm = LM.load(path)
                self.models[path] = plain(lm) if self.asked.template == "plain" else lm
        return self.models[path]

    def subject(self, name: str) -> Subject:
        spec, model = split_subject(name)
        policy = self.model(model)
        if spec is not None:
            from trimtab.policies import Workshop

            prompts: list[Prompt] = []
            for path in (self.asked.fit_prompts,) if self.asked.fit_prompts else ():
                prompts += read_prompts(path)
            fitted = self.asked.sampling.but(samples=1)
            policy = Workshop(policy, self.reward, prompts, fitted, progress=self.progress).build(spec).policy
            policy.name = name
        asked = self.asked
        return Subject(
            policy,
            self.identity(name),
            texts=list(asked.texts),
            sampling=asked.sampling,
            reward=self.reward,
            judge=asked.judge,
            cache=self.cache,
            progress=self.progress,
        )


def _check_templates(slug: str, subjects: Sequence[str]) -> None:
    """Refuse models that could not be measured alike before any of them is loaded."""
    folders = [(name, local_folder(split_subject(name)[1])) for name in subjects]
    known = [(name, _template(folder)) for name, folder in folders if folder is not None]
    for name, template in known[1:]:
        if template != known[0][1]:
            raise UsageError(
                f"{slug}: {known[0][0]} and {name} have different chat templates (or one has none), so their prompts would "
                "differ; --template plain measures both without a chat template"
            )


def _template(folder: Path) -> str | None:
    """A model folder's chat template, as text."""
    if (file := folder / "chat_template.jinja").exists():
        return file.read_text()
    if (file := folder / "tokenizer_config.json").exists():
        found = json.loads(file.read_text()).get("chat_template")
        return None if found is None else str(found)
    return None


def split_subject(name: str) -> tuple[str | None, str]:
    """`POLICY on MODEL` as its two parts; (None, MODEL) for a model."""
    policy, on, model = name.rpartition(" on ")
    return (policy.strip(), model.strip()) if on else (None, name)


def plain(lm: Any) -> Any:
    """The same model asked without its chat template."""
    out = copy.copy(lm)
    out.tokenizer = copy.deepcopy(lm.tokenizer)
    out.tokenizer.chat_template = None
    return out


def _is_reward_model(path: str) -> bool:
    """Whether a folder holds a sequence classifier: it answers no prompt, but a reward benchmark can be asked of it."""
    folder = local_folder(path)
    if folder is None:
        return False
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except ValueError:  # damaged: loading it as a model says how
        return False
    kinds = (config.get("architectures") if isinstance(config, dict) else None) or []
    return any("SequenceClassification" in kind for kind in kinds)


def _inputs(asked: Asked, config: Any = None) -> list[str]:
    """Digests of the files besides the texts that a measurement depends on: prompts to fit on, those that the specs of
    a reward or a judge name (and that the JSON they name does), in the options too."""
    specs = [asked.reward, asked.judge]
    specs += [value for value in vars(config).values() if isinstance(value, str)] if config is not None else []
    found = [asked.fit_prompts] if asked.fit_prompts else []
    for spec in specs:
        named = _named_files(spec or "")
        found += named
        for path in named:
            if path.suffix == ".json" and path.stat().st_size < 10_000_000:
                found += _named_files(path.read_text(errors="replace").replace('"', " "))
    return files_digest(list(dict.fromkeys(found)))


def _named_files(text: str) -> list[Path]:
    """The existing files and folders that a spec, or a JSON text, names."""
    words = re.split(r"[,=|+*\s\\]|:(?=[./~\w])", text)
    return [
        Path(word) for word in words if word and len(word) < 1000 and ("/" in word or "." in word) and _exists(word)
    ]


def _exists(word: str) -> bool:
    try:
        return Path(word).exists()
    except OSError:  # a name that no file can have
        return False
