"""Search for a merge's settings by what validation skills say, within a budget of evaluations.

    trial 0          the method's defaults, or what was fixed by hand: what the others must beat
    first half       a scrambled Halton sequence over the ranges (few points, evenly spread in every dimension)
    second half      steps from the best trial so far, normal in every dimension, width falling from 1/4 to 1/20 of a range

    objective = sum over skills of weight * mean,        less where less is better

Few evaluations of a noisy, bounded function of a handful of dimensions: no model of it is fitted, and there is nothing to
tune. Every draw depends on (seed, number of the trial, trials before it), and every trial is on disk before the next
begins, so a search that was killed ends as it would have. A candidate is merged into a temporary folder and removed.

The best of N trials is the best partly by luck (the winner's curse): its validation figure is too good. So it is called
better than the default only if the exchange test over units says so at 5 % divided by the number of trials it was picked
from, and a skill given as `test` is measured once, at the end, on the winner and the default alike.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import trimtab
from trimtab import catalogue
from trimtab.errors import UsageError
from trimtab.files import TEMPORARY
from trimtab.measure.cache import Cache
from trimtab.measure.diagnostic import files_digest
from trimtab.measure.measurement import Measurement, check_alike
from trimtab.measure.stats import mean_interval, swap_test
from trimtab.merge.card import RECIPE
from trimtab.merge.checks import refuse_inside
from trimtab.merge.engine import run as merge_into
from trimtab.merge.plan import make_plan
from trimtab.merge.recipe import Recipe
from trimtab.merge.skills import Skill, Subjects, evaluate, measure_before
from trimtab.run import RunDirectory

WIDE, NARROW = 0.25, 0.05  # of a range: the width of the first and of the last step from the best
MODEL, RESULT, DEFAULT = "model", "search", "default"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Dimension:
    """One number to find. key: the option, or "weights"; place: which parent's, None for all. whole: only whole numbers."""

    key: str
    place: int | None
    low: float
    high: float
    whole: bool = False

    @property
    def name(self) -> str:
        return self.key if self.place is None else f"{self.key}[{self.place}]"

    def at(self, share: float) -> float:
        """The value at a share of the range in [0, 1]."""
        value = self.low + min(max(share, 0.0), 1.0) * (self.high - self.low)
        return round(value) if self.whole else float(f"{value:.6g}")


@dataclass(frozen=True)
class Space:
    """What is varied, over a recipe that holds what is fixed."""

    recipe: Recipe
    dimensions: tuple[Dimension, ...]

    def recipe_at(self, values: Sequence[float]) -> Recipe:
        """The recipe with the dimensions at these values."""
        found: dict[str, Any] = {}
        for dimension, value in zip(self.dimensions, values, strict=True):
            if dimension.place is None:
                found[dimension.key] = value
            else:
                found.setdefault(dimension.key, {})[dimension.place] = value
        options, weights = dict(self.recipe.options), self.recipe.weights
        for key, value in found.items():
            if key == "weights":
                before = weights if isinstance(weights, (list, tuple)) else [weights or 1.0] * len(self.recipe.models)
                weights = [value.get(i, one) for i, one in enumerate(before)] if isinstance(value, dict) else value
                weights = weights if isinstance(weights, list) else [weights] * len(self.recipe.models)
            else:
                options[key] = {"each": [value[i] for i in sorted(value)]} if isinstance(value, dict) else value
        return replace(self.recipe, options=options, weights=weights)


@dataclass
class Trial:
    """One recipe and what it scored. samples: skill number -> one value a unit, of the line that counts."""

    number: int
    values: list[float] | None  # None: the default
    recipe: dict[str, Any]
    score: float
    samples: list[list[float | None]]

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def read_space(recipe: Recipe, ranges: Mapping[str, Sequence[str]]) -> tuple[Recipe, Space]:
    """(the default recipe, the space) from words such as {"density": ["0.1:0.9"], "weights": ["0:1"]}.

    LOW:HIGH is a dimension; a number is fixed. One word for an option is one value for all parents; several are one a
    parent. For weights, one range is a dimension for every parent. UsageError for a broken range, for a range of what is
    no number, and for another number of ranges than models.
    """
    from trimtab.merge.schedule import parse_words

    parents = len(recipe.models)
    fixed, dimensions = dict(recipe.options), []
    weights = recipe.weights
    for key, words in ranges.items():
        flag = f"--{key.replace('_', '-')}"
        if not any(":" in word for word in words):
            if key == "weights":
                weights = [parse_words([word], flag) for word in words]
                weights = weights * parents if len(weights) == 1 else weights
            else:
                fixed[key] = parse_words(words, flag)
            continue
        whole = key != "weights" and _is_whole(recipe.method, key)
        if key == "weights" and len(words) == 1:
            words = [*words] * parents
        if len(words) not in (1, parents):
            raise UsageError(f"{flag} has {len(words)} ranges for {parents} models: give one, or one a model")
        places = [None] if len(words) == 1 and key != "weights" else range(len(words))
        for place, word in zip(places, words, strict=True):
            low, high = _range(word, flag)
            dimensions.append(Dimension(key, place, low, high, whole))
    default = replace(recipe, options=fixed, weights=weights)
    return default, Space(default, tuple(dimensions))


def _range(word: str, flag: str) -> tuple[float, float]:
    low, colon, high = word.partition(":")
    try:
        found = (float(low), float(high if colon else low))
    except ValueError:
        found = (math.nan, math.nan)
    if not (math.isfinite(found[0]) and math.isfinite(found[1]) and found[0] <= found[1]):
        raise UsageError(f"{flag} {word!r} is no range: write LOW:HIGH, such as 0.1:0.9, or one number")
    return found


def _is_whole(method: str, key: str) -> bool:
    annotation = str(catalogue.method(method).Config.__dataclass_fields__[key].type)
    if "int" not in annotation and "float" not in annotation:
        raise UsageError(
            f"--{key.replace('_', '-')} of {method} is no number: only numbers have a range; give one value"
        )
    return "float" not in annotation


def search(
    default: Recipe,
    space: Space,
    skills: Sequence[Skill],
    budget: int,
    seed: int,
    out: str | Path,
    test: Sequence[Skill] = (),
    threads: int | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Finds the best recipe, merges it into `out`/model, and says how it compares with the default; resumable.

    Returns what `out`/search.json holds. UsageError for bad settings, before anything is written.
    """
    if not space.dimensions:
        raise UsageError(
            "there is nothing to search: give a range LOW:HIGH, such as --scale 0.3:1.5 (a..b is a gradient)"
        )
    if budget < 2:
        raise UsageError(f"a search needs --budget 2 or more (the default is one of them), not {budget}")
    plan = make_plan(default)
    for corner in (0.0, 1.0):
        make_plan(space.recipe_at([dimension.at(corner) for dimension in space.dimensions]))
    sources = plan.parents
    refuse_inside([source.name for source in sources], out)
    inputs = {f"model {i}": source.fingerprint for i, source in enumerate(sources)}
    texts = {str(path): files_digest([path])[0] for skill in [*skills, *test] for path in skill.asked.texts}
    arguments = {
        "recipe": default.to_dict(), "dimensions": [vars(one) for one in space.dimensions], "budget": budget, "seed": seed,
        "validate": [skill.spec for skill in skills], "test": [skill.spec for skill in test], "trimtab": trimtab.__version__,
    }  # fmt: skip
    RunDirectory.check(out, "merge-search", arguments, {**inputs, **texts})  # before minutes of measuring
    subjects = Subjects.of(default.models, default.base)
    measure_before([*skills, *test], subjects, progress)
    for skill in skills:
        shown = skill.measure(next(iter(subjects.all().values())))
        if not shown.row(label := skill.lines(shown)[0]).better:
            raise UsageError(
                f"the skill {skill.spec!r}: neither more nor less of {label!r} is good, so it cannot be searched by"
            )
    with RunDirectory.open(out, "merge-search", arguments, {**inputs, **texts}) as run:
        if run.events("finished") and (known := run.load_json(RESULT)) is not None:
            return dict(known)
        trials: list[Trial] = []
        for number in range(budget):
            values = None if number == 0 else propose(space, trials, number, budget, seed)
            trials.append(_trial(number, values, default, space, skills, subjects, run, threads, progress))
        best = max(trials, key=lambda trial: (trial.score, -trial.number))
        recipe = Recipe.from_dict(best.recipe)
        run.save(RECIPE, yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True))
        merge_into(recipe, run.path / MODEL, threads, progress, command)
        found = _result(trials, best, skills, space, subjects)
        if test:
            found["test"] = _tested(default, best, test, subjects, run, threads, progress)
        run.save_json(RESULT, found)
        run.event("finished")
    return found


def propose(space: Space, trials: Sequence[Trial], number: int, budget: int, seed: int) -> list[float]:
    """The values of trial `number`, from those before it."""
    dimensions = space.dimensions
    spread = 1 + max(1, budget // 2)  # trials up to here, the default among them, do not look at the others
    if number < spread or all(trial.values is None for trial in trials):
        from scipy.stats import qmc

        shares = qmc.Halton(len(dimensions), scramble=True, seed=np.random.default_rng(seed)).random(number)[-1]
        return [dimension.at(float(share)) for dimension, share in zip(dimensions, shares, strict=True)]
    # From the best trial that has coordinates: the default's need not lie within the ranges.
    best = max((t for t in trials if t.values is not None), key=lambda trial: (trial.score, -trial.number))
    assert best.values is not None
    done = (number - spread) / max(1, budget - 1 - spread)
    width = WIDE * (NARROW / WIDE) ** done
    generator = np.random.default_rng([seed, number])
    out = []
    for dimension, value in zip(dimensions, best.values, strict=True):
        size = dimension.high - dimension.low
        share = (value - dimension.low) / size if size else 0.0
        share += width * float(generator.standard_normal())
        share = abs(share)  # reflected at the ends: clipping would pile trials up there
        out.append(dimension.at(share if share <= 1 else max(0.0, 2 - share)))
    return out


def _trial(
    number: int, values: list[float] | None, default: Recipe, space: Space, skills: Sequence[Skill], subjects: Subjects,
    run: RunDirectory, threads: int | None, progress: Progress | None,
) -> Trial:  # fmt: skip
    key = f"trials/{number:04d}"
    recipe = default if values is None else space.recipe_at(values)
    known = run.load_json(key)
    if known is not None:
        return Trial(**known)
    if progress is not None:
        said = "the default" if values is None else _said(space, values)
        progress(f"trial {number}: {said}")
    folder = run.path / f"{TEMPORARY}trial-{number:04d}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        merge_into(recipe, folder, threads)
        measured = [skill.measure(str(folder), Cache(None)) for skill in skills]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    samples = []
    for skill, one in zip(skills, measured, strict=True):
        check_alike(skill.measure(next(iter(subjects.all().values()))), one)
        samples.append(_directed(skill, one))
    trial = Trial(number, values, recipe.to_dict(), _score(skills, samples), samples)
    run.save_json(key, trial.to_dict())
    run.event("trial", number=number, values=values, score=trial.score)
    return trial


def _directed(skill: Skill, one: Measurement) -> list[float | None]:
    """The values of the line that counts (the first), turned so that more is better."""
    label = skill.lines(one)[0]
    sign = -1.0 if one.row(label).better == "lower" else 1.0
    return [None if value is None else sign * value for value in one.samples[label]]


def _score(skills: Sequence[Skill], samples: Sequence[Sequence[float | None]]) -> float:
    total = 0.0
    for skill, values in zip(skills, samples, strict=True):
        known = [value for value in values if value is not None]
        if not known:
            raise UsageError(f"the skill {skill.spec!r} could not be judged on any unit: there is nothing to search by")
        total += skill.weight * sum(known) / len(known)
    return total


def _result(
    trials: Sequence[Trial], best: Trial, skills: Sequence[Skill], space: Space, subjects: Subjects
) -> dict[str, Any]:
    plain = trials[0]
    rows = []
    for trial in sorted(trials, key=lambda trial: (-trial.score, trial.number)):
        value, low, high, _ = _interval(skills, trial.samples)
        row: dict[str, Any] = {
            "trial": trial.number, "settings": _settings(space, trial), "score": value, "low": low, "high": high,
            "difference": None, "difference_low": None, "difference_high": None, "p_value": None, "verdict": "",
        }  # fmt: skip
        if trial.number:
            gaps = [[None if a is None or b is None else a - b for a, b in zip(one, two, strict=True)]
                    for one, two in zip(trial.samples, plain.samples, strict=True)]  # fmt: skip
            mean, low, high, p_value = _interval(skills, gaps)
            row |= {"difference": mean, "difference_low": low, "difference_high": high, "p_value": p_value}
            row["verdict"] = _verdict(mean, low, high, p_value, len(trials) - 1)
        rows.append(row)
    won = next(row for row in rows if row["trial"] == best.number)
    notes = []
    if best.number == 0:
        notes.append("no trial scored more than the default settings: they are what was merged")
    elif won["verdict"] == "better":
        notes.append(
            f"trial {best.number} is better than the default settings: {won['difference']:+.4g}, p {won['p_value']:.2g} by "
            f"exchange, counted against {len(trials) - 1} trials"
        )
    else:
        notes.append(
            "the best trial cannot be told from the default settings on these validation texts "
            f"({won['difference']:+.4g}, p {won['p_value']:.2g} by exchange, before counting {len(trials) - 1} trials): "
            "prefer the default, or validate on more"
        )
    notes.append(
        f"the score of the best of {len(trials)} was selected on these texts and is too good on others (the winner's curse): "
        "measure it on texts of their own (--test)"
    )
    return {
        "schema": 1, "method": plain.recipe["method"], "best": best.number, "recipe": best.recipe, "trials": rows,
        "skills": [skill.spec for skill in skills], "notes": notes, "distinguishable": won["verdict"] == "better",
        "parents": {name: _parent(skills, path) for name, path in subjects.all().items()}, "test": None,
    }  # fmt: skip


def _parent(skills: Sequence[Skill], path: str) -> float:
    return _score(skills, [_directed(skill, skill.measure(path)) for skill in skills])


def _interval(
    skills: Sequence[Skill], samples: Sequence[Sequence[float | None]]
) -> tuple[float | None, float | None, float | None, float | None]:
    """(value, low, high, p-value by exchange) of sum_k weight_k * mean_k.

    A unit (a text, a prompt) weighs with the sum of its shares in all skills that are measured on it: two skills of the same
    texts are no two independent witnesses. The exchange test is over units; the interval is BCa over them where all skills
    have the same, and Welch's t over the sums of the different ones otherwise.
    """
    groups: dict[Any, list[list[float | None]]] = {}  # skills of the same units -> one row a skill, one share a unit
    for skill, one in zip(skills, samples, strict=True):
        known = max(1, sum(value is not None for value in one))
        row = [None if value is None else skill.weight * value / known for value in one]
        groups.setdefault((skill.asked.texts, len(one)), []).append(row)
    parts = [
        np.array([sum(one for one in unit if one is not None) for unit in zip(*rows, strict=True) if {*unit} != {None}])
        for rows in groups.values()
    ]
    total = sum(float(part.sum()) for part in parts)
    p_value = swap_test(np.concatenate(parts))
    if len(parts) == 1:
        found = mean_interval(len(parts[0]) * parts[0])
        return found.mean, found.low, found.high, p_value
    from scipy.stats import t

    if any(len(part) < 2 for part in parts):
        return total, None, None, p_value
    variances = [len(part) * float(part.var(ddof=1)) for part in parts]
    error = sum(variances)
    if not error:
        return total, None, None, p_value
    freedom = error**2 / sum(one**2 / (len(part) - 1) for one, part in zip(variances, parts, strict=True))
    half = float(t.ppf(0.975, freedom)) * math.sqrt(error)
    return total, total - half, total + half, p_value


def _verdict(mean: Any, low: Any, high: Any, p_value: float | None, trials: int) -> str:
    if mean is None or p_value is None or p_value * trials > 0.05 or (low is not None and low <= 0 <= high):
        return "undecided"
    return "better" if mean > 0 else "worse"


def _tested(
    default: Recipe, best: Trial, test: Sequence[Skill], subjects: Subjects, run: RunDirectory, threads: int | None,
    progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    """The winner, the default, parents and base on texts that chose nothing."""
    others: dict[str, str | Path] = {}
    folder = run.path / f"{TEMPORARY}{DEFAULT}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        if best.number:
            merge_into(default, folder, threads)
            others["default settings"] = folder
        found = evaluate(test, subjects, run.path / MODEL, progress, others)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found["merge"] = MODEL  # wherever the run lies
    return found


def _settings(space: Space, trial: Trial) -> str:
    return "default" if trial.values is None else _said(space, trial.values)


def _said(space: Space, values: Sequence[float]) -> str:
    return ", ".join(f"{one.name} {value:g}" for one, value in zip(space.dimensions, values, strict=True))
