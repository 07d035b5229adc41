"""What each parent's skills became: parents, base and merge measured on the same units, and compared unit by unit.

    SKILL = NAME:texts=FILE[|FILE],KEY=VALUE,...
    nll:texts=FILE                                 likelihood of texts, nats a byte
    reward:reward=SPEC,texts=PROMPTS               what the answers are worth
    panel, refusal, multiple-choice, ...           any diagnostic of `trimtab measure` that measures one model at a time

Besides the diagnostic's own options the keys are texts, reward, judge, template, max_new_tokens, temperature, seed (as in
`trimtab measure`), columns=A|B (which of its lines; not given: those of which more or less is good), name (what tables call
it) and weight (for `trimtab merge search`).

Of a line on which a parent is better than the base, the share of its gain that the merge kept is

    kept = (mean(merge) - mean(base)) / (mean(parent) - mean(base))         over the units all three have

with Fieller's interval for a ratio of paired means, which exists where the parent's gain is clear of 0. The parent with
the largest gain is called the specialist. It was picked by what it is measured on, so its gain is a little too large and
the share a little too small.

Parents and base are measured before the merge begins, so that a skill that cannot be measured stops it before it writes
anything. Measurements are kept in the cache of `trimtab measure`: the same command finishes what a killed one began.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trimtab import catalogue, measure
from trimtab.checkpoint import local_folder
from trimtab.errors import UsageError, unknown
from trimtab.files import write_json
from trimtab.fingerprint import fingerprint_of
from trimtab.measure.cache import Cache
from trimtab.measure.diagnostic import Diagnostic, Progress, files_digest, paired_change, said
from trimtab.measure.measurement import Measurement, check_alike
from trimtab.measure.measuring import Asked, diagnostic, run_measure
from trimtab.measure.stats import paired_difference, swap_test
from trimtab.sampling import Sampling
from trimtab.spec import build, parse_spec

SCHEMA = 1
MERGE, BASE = "merge", "base"
VIEW = ".evaluated"  # links to the merged model's own files: what lies beside them must not change what was measured
OWN = ("nll", "reward")


@dataclass(frozen=True)
class Spread:
    """The keys of a skill that are not its diagnostic's options."""

    texts: tuple[Path, ...] = ()
    reward: str | None = None
    judge: str | None = None
    template: str = "own"
    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    columns: tuple[str, ...] = ()
    weight: float = 1.0
    name: str = ""


@dataclass
class Skill:
    """One thing that models are measured on. spec: as it was given; name: what tables call it."""

    spec: str
    name: str
    tool: Diagnostic
    asked: Asked
    columns: tuple[str, ...]
    weight: float
    _known: dict[str, Measurement] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, spec: str) -> Skill:
        """UsageError for an unknown name, key, reward or file."""
        name, options = parse_spec(spec)
        if name not in OWN and name not in measure.METHODS and name not in catalogue.slugs():
            raise unknown("skill", name, [*OWN, *measure.METHODS])
        kind = _own(name)
        known = [one.name for one in dataclasses.fields(catalogue.method(name).Config if kind is None else kind.Config)]
        mine = {key: value for key, value in options.items() if key.replace("-", "_") in known}
        keys = [one.name for one in dataclasses.fields(Spread)]
        for key in options:
            if key not in mine and key.replace("-", "_") not in keys:
                raise unknown(f"key of the skill {name!r}", key, [*known, *keys])
        spread = build(Spread, {key: value for key, value in options.items() if key not in mine}, f"skill {name!r}")
        tool = diagnostic(name, mine) if kind is None else kind(build(kind.Config, mine, f"skill {name!r}"))
        if tool.TOGETHER:
            raise UsageError(f"{name} sets models against one another: as a skill, give what measures one at a time")
        if tool.TEXTS and not spread.texts:
            raise UsageError(f"the skill {spec!r} needs texts: {name}:texts=FILE ({tool.TEXTS})")
        if spread.template not in ("own", "plain"):
            raise unknown("template", spread.template, ("own", "plain"))
        files_digest(spread.texts)
        if name == "reward" and spread.reward is None:
            raise UsageError("the skill 'reward' needs to know what is good: reward:reward=SPEC,texts=FILE")
        if spread.reward is not None:
            from trimtab.rewards import parse_reward

            parse_reward(spread.reward)
        sampling = Sampling(max_new_tokens=spread.max_new_tokens, temperature=spread.temperature, seed=spread.seed)
        template: Any = spread.template
        asked = Asked(spread.texts, spread.reward, spread.judge, template, sampling)
        return cls(spec, spread.name or name, tool, asked, spread.columns, spread.weight)

    def measure(
        self, model: str, cache: Cache | None = None, progress: Progress | None = None, called: str = ""
    ) -> Measurement:
        """One model's measurement; the second time it is asked for, the first one's. called: its name in the progress."""
        if model not in self._known:
            if progress is not None:
                progress(f"{self.name} of {called or model}")
            self._known[model] = run_measure(self.tool, [model], self.asked, cache=cache).measurements[0]
        return self._known[model]

    def lines(self, one: Measurement) -> list[str]:
        """The lines of the table that are compared: those asked for, or those of which more or less is good."""
        able = [row.label for row in one.table if row.label in one.samples]
        for label in self.columns:
            if label not in able:
                raise unknown(f"line of {self.tool.slug}", label, able)
        found = list(self.columns) or [row.label for row in one.table if row.label in able and row.better]
        if not found:
            raise UsageError(
                f"{self.tool.slug} has no line of which more or less is good: give columns={'|'.join(able)}"
            )
        return found


@dataclass
class Subjects:
    """The models of an evaluation, by the names they have in its tables. paths: name -> what `trimtab measure` loads."""

    parents: dict[str, str]
    base: str | None
    cache: Cache = field(default_factory=Cache.default)  # where adapters lie, folded into their base

    @classmethod
    def of(cls, models: Sequence[str], base: str | None) -> Subjects:
        """Parents under their own names; one that is given twice is measured once. A LoRA adapter is folded into its base."""
        found = cls({}, base)
        found.parents = {name: found._loadable(name) for name in dict.fromkeys(models) if name != base}
        return found

    def _loadable(self, model: str) -> str:
        from trimtab.merge.adapter import is_adapter

        if not is_adapter(model) and not ("+" in model and local_folder(model) is None):
            return model
        from trimtab.merge.engine import run
        from trimtab.merge.plan import make_plan
        from trimtab.merge.recipe import Recipe

        recipe = Recipe("linear", (model,), self.base)
        key = fingerprint_of("folded", make_plan(recipe).models[0].fingerprint)
        return str(self.cache.folder("folded", key, lambda folder: None if run(recipe, folder) else None))

    def all(self) -> dict[str, str]:
        return {**self.parents, **({} if self.base is None else {self.base: self.base})}


def measure_before(skills: Sequence[Skill], subjects: Subjects, progress: Progress | None = None) -> None:
    """Measures parents and base. UsageError where a skill cannot be measured, or not alike."""
    for skill in skills:
        found = [skill.measure(path, progress=progress, called=name) for name, path in subjects.all().items()]
        for one in found[1:]:
            check_alike(found[0], one)
        skill.lines(found[0])


def evaluate(
    skills: Sequence[Skill],
    subjects: Subjects,
    merged: str | Path,
    progress: Progress | None = None,
    others: Mapping[str, str | Path] | None = None,
) -> dict[str, Any]:
    """The table of parents, base (and `others`) x skills against the merge in the folder `merged`, as JSON values."""
    lines: list[dict[str, Any]] = []
    warned: list[str] = []
    for skill in skills:
        with view(merged) as path:
            merge = skill.measure(path, progress=progress, called="the merge")
        found = {name: skill.measure(path, progress=progress, called=name) for name, path in subjects.all().items()}
        for name, folder in (others or {}).items():
            with view(folder) as path:
                found[name] = skill.measure(path, progress=progress, called=name)
        for label in skill.lines(merge):
            lines.append(_line(skill, label, merge, found, subjects))
        warned += [f"{skill.tool.slug}: {text}" for text in merge.warnings]
    compared = sum(row["verdict"] != "" for line in lines for row in line["models"])
    notes = []
    if compared > 5:
        notes.append(f"{compared} comparisons: expect one in twenty of the verdicts to be wrong where nothing changed")
    return {
        "schema": SCHEMA,
        "merge": str(merged),
        "base": subjects.base,
        "lines": lines,
        "notes": notes,
        "warnings": warned,
    }


def _line(
    skill: Skill, label: str, merge: Measurement, found: Mapping[str, Measurement], subjects: Subjects
) -> dict[str, Any]:
    row = merge.row(label)
    models: list[dict[str, Any]] = [_model(MERGE, MERGE, row)]
    base = None if subjects.base is None else found[subjects.base]
    gains: dict[str, float] = {}
    for name, one in found.items():
        check_alike(merge, one)
        kind = BASE if name == subjects.base else "parent" if name in subjects.parents else "other"
        change = paired_change(merge, one, label)
        entry = _model(name, kind, one.row(label))
        entry |= {
            "difference": change.difference, "difference_low": change.low, "difference_high": change.high,
            "verdict": change.verdict, "p_value": change.p_value,
        }  # fmt: skip
        if base is not None and kind == "parent":
            gain = paired_change(one, base, label)
            entry["gain"] = {"value": gain.difference, "low": gain.low, "high": gain.high, "verdict": gain.verdict}
            if gain.verdict == "better":
                entry["kept"] = kept(*(np.array(side.samples[label], dtype=np.float64) for side in (merge, one, base)))
                gains[name] = abs(gain.difference or 0.0)
        models.append(entry)
    return {
        "skill": skill.spec, "name": skill.name, "label": label, "better": row.better, "unit": merge.unit,
        "n": row.n, "models": models, "specialist": max(gains, key=gains.__getitem__) if gains else None,
    }  # fmt: skip


def _model(name: str, kind: str, row: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("difference", "difference_low", "difference_high", "p_value", "gain", "kept"))
    return {"name": name, "kind": kind, "value": row.value, "low": row.low, "high": row.high, "verdict": "", **empty}


def kept(merge: Any, parent: Any, base: Any) -> dict[str, float | None] | None:
    """(mean merge - mean base) / (mean parent - mean base) with its interval, one value a unit [N] (NaN: dropped).

    None where the parent gained nothing. The bounds are None where the gain is not clear of 0: any share would then do.
    """
    rows = np.stack([merge, parent, base], 1)
    rows = rows[~np.isnan(rows).any(1)]
    if not len(rows):
        return None
    both = np.stack([rows[:, 0] - rows[:, 2], rows[:, 1] - rows[:, 2]])  # [2, N]: gained by the merge, by the parent
    gained, gain = (float(value) for value in both.mean(1))
    if not gain:
        return None
    out: dict[str, float | None] = {"share": gained / gain, "low": None, "high": None}
    if len(rows) < 2:
        return out
    from scipy.stats import t

    squared = float(t.ppf(0.975, len(rows) - 1)) ** 2
    (aa, ab), (_, bb) = np.cov(both) / len(rows)
    bottom = gain**2 - squared * bb
    if bottom <= 0:
        return out
    middle = gained * gain - squared * ab
    root = float(np.sqrt(max(0.0, middle**2 - (gained**2 - squared * aa) * bottom)))
    return {**out, "low": float((middle - root) / bottom), "high": float((middle + root) / bottom)}


@contextmanager
def view(folder: str | Path) -> Iterator[str]:
    """A folder beside a merged model's files that holds links to those that make it a model, and nothing else.

    The log, the lock and the tables around a merged model change whenever its command is given again; its measurements
    are kept under a hash of the folder they were taken from.
    """
    folder = Path(folder)
    if not (folder / "events.jsonl").exists():
        yield str(folder)
        return
    made = folder / VIEW / "model"
    shutil.rmtree(folder / VIEW, ignore_errors=True)
    made.mkdir(parents=True)
    from trimtab.merge.card import TOKENIZER_FILES

    try:
        for path in sorted(folder.iterdir()):
            if path.name in ("config.json", *TOKENIZER_FILES) or path.name.startswith("model"):
                (made / path.name).symlink_to(path.resolve())
        yield str(made)
    finally:
        shutil.rmtree(folder / VIEW, ignore_errors=True)


def write_skills(found: Mapping[str, Any], out: str | Path, command: Sequence[str] = ()) -> None:
    """Writes skills.json and skills.html into the folder `out`."""
    from trimtab.files import write_atomic
    from trimtab.report.merge_skills import render

    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out) / "skills.json", {**found, "command": list(command)})
    write_atomic(Path(out) / "skills.html", render(found, command))


def difference(first: Any, second: Any, better: str) -> tuple[Any, str, float | None]:
    """(interval of mean(first - second), verdict on the first, p-value) from one value a unit each."""
    gaps = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    interval = paired_difference(first, second)
    p_value = swap_test(gaps)
    direction: Any = better
    return interval, said(interval, direction, p_value), p_value


def _own(name: str) -> type[Diagnostic] | None:
    if name not in OWN:
        return None
    from trimtab.merge.skill_measures import Rewarded, TextNll

    return {"nll": TextNll, "reward": Rewarded}[name]
