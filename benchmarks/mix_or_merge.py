"""Mix data or merge models? On the pocket world: specialists for helpful, honest and harmless, mixtures, sixteen merges.

    python benchmarks/mix_or_merge.py --work WORK                     # all that is missing; a quarter of an hour a seed
    python benchmarks/mix_or_merge.py --work WORK --stage train       # specialists and mixtures only
    python benchmarks/mix_or_merge.py --work WORK --stage report      # the figures and the tables of docs/mix-or-merge.md

Each goal has families of tasks of its own. Its training answers are the best of eight of the world's mixed answers by
the gold judge's verdict on that goal alone; ties go to the answer worst on the others, so that what a goal's data teach
is that goal. Specialists and mixtures start from pocket/base and take the same batches, rate and loop. "mixture" takes
as many steps as one specialist, "mixture x3" as all three together: what a merge has cost.

Scored in two ways on what nothing was trained on (split "test"): by the judge, one answer a prompt at temperature 1; and
by how much of a specialist's drop in loss, on answers that are good by its goal, a model has (its normalised skill).
Settings are searched on the split "fit", by the judge. Intervals resample seeds and prompts, both (the crossed
bootstrap). Killed and run again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab import catalogue, pocket
from trimtab.environment import environment
from trimtab.errors import TrimtabError
from trimtab.files import write_atomic, write_json
from trimtab.merge import METHODS
from trimtab.merge.engine import run as run_merge
from trimtab.merge.recipe import Recipe
from trimtab.merge.search import Trial, propose, read_space
from trimtab.pocket import training, world

GOALS = {
    "helpful": ("advice", "list", "review"),
    "honest": ("fact", "sum", "translate"),
    "harmless": ("harm", "comfort"),
}
STEPS, RATE, ROWS, LENGTH, CHOICES = 80, 5e-4, 16, 128, 8
MIXTURES = {"mixture": 1, "mixture x3": 3}


def best_answer(task: pocket.Task, goal: str, rng: random.Random) -> str:
    """The best of `CHOICES` mixed answers on one goal; of equals, the one worst on the other two."""
    answers = [world.answer(task, "mixed", rng) for _ in range(CHOICES)]
    verdicts = [pocket.judge(task.prompt, answer) for answer in answers]

    def key(i: int) -> tuple[float, float]:
        others = [getattr(verdicts[i], other) for other in GOALS if other != goal]
        return getattr(verdicts[i], goal), -sum(value for value in others if value is not None)

    return answers[max(range(CHOICES), key=key)]


def stream(tokenizer: Any, goals: Sequence[str], seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Endless (prompt ids, answer ids) of the training split, the goals in turn."""
    rng = random.Random(f"{'-'.join(goals)}-{seed}")
    dialogues = world.dialogues(seed * 100 + len(goals))
    waiting: dict[str, list[pocket.Task]] = {goal: [] for goal in goals}
    while True:
        for goal in goals:
            while not waiting[goal]:
                task, _ = next(dialogues)
                for one in goals:
                    if task.family in GOALS[one]:
                        waiting[one].append(task)
            task = waiting[goal].pop()
            question = tokenizer(task.prompt)["input_ids"]
            yield question, training.answer_ids(tokenizer, [best_answer(task, goal, rng)])[0]


def train(folder: Path, goals: Sequence[str], steps: int, seed: int) -> None:
    if (folder / "config.json").exists():
        return
    model = AutoModelForCausalLM.from_pretrained(pocket.path("base"))
    tokenizer = AutoTokenizer.from_pretrained(pocket.path("base"))
    rows = stream(tokenizer, goals, seed)
    training.fit(
        model,
        lambda step: training.next_token_loss(model, *training.windows(rows, ROWS, LENGTH, answers_only=True)),
        steps,
        RATE,
        str(folder),
    )
    temporary = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)


def train_all(work: Path, seeds: Sequence[int]) -> None:
    for seed in seeds:
        for goal in GOALS:
            train(work / f"seed{seed}" / goal, [goal], STEPS, seed)
        for name, times in MIXTURES.items():
            train(work / f"seed{seed}" / name.replace(" ", "-"), list(GOALS), STEPS * times, seed)


# What is usual where a method's default does nothing (a density of 1), and what a search may vary.
USUAL: dict[str, dict[str, float]] = {
    "ties": {"density": 0.5}, "dare": {"density": 0.5}, "dare-ties": {"density": 0.5}, "della": {"density": 0.5},
    "della-linear": {"density": 0.5}, "breadcrumbs": {"density": 0.85}, "breadcrumbs-ties": {"density": 0.85},
}  # fmt: skip
RANGES = {"scale": "0.3:1.5", "alpha": "0.3:1.5", "density": "0.2:0.8", "select_topk": "0.1:1"}
TWO = ("slerp", "nuslerp")  # take two parents: folded, and not searched
NOTHING = (*TWO, "model-stock")  # have nothing to search here
PROMPTS, VALIDATION, HELD, BUDGET = 320, 160, 100, 5
RESULTS = Path(__file__).parent / "results" / "mix_or_merge.json"
ASPECTS, RESAMPLES = (*GOALS, "score"), 2000
PAGE = Path(__file__).parent.parent / "docs" / "mix-or-merge.md"


class Bench:
    """One seed's models, and what they are measured on."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.tokenizer = AutoTokenizer.from_pretrained(pocket.path("base"))
        self.parents = [str(folder / goal) for goal in GOALS]
        self.prompts = {"test": pocket.prompts("test", PROMPTS, 11), "fit": pocket.prompts("fit", VALIDATION, 12)}

    def judged(self, path: str | Path, split: str) -> dict[str, list[float | None]]:
        """Aspect -> one value a prompt."""
        model = AutoModelForCausalLM.from_pretrained(path)
        prompts = self.prompts[split]
        answers = training.sample(model, self.tokenizer, prompts, 1.0, 1000 + self.seed)
        verdicts = [pocket.judge(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return {aspect: [getattr(verdict, aspect) for verdict in verdicts] for aspect in ASPECTS}

    @torch.no_grad()
    def losses(self, path: str | Path, split: str) -> dict[str, list[float]]:
        """Goal -> nats a token of good answers by that goal, one value a dialogue."""
        model = AutoModelForCausalLM.from_pretrained(path)
        found = {}
        for goal, families in GOALS.items():
            rng = random.Random(f"held-{goal}")
            tasks = pocket.tasks(split, HELD, 13, families)
            answers = training.answer_ids(self.tokenizer, [best_answer(task, goal, rng) for task in tasks])
            questions = self.tokenizer([task.prompt for task in tasks])["input_ids"]
            logprob = training.answer_logprob(model, questions, answers)
            found[goal] = [-float(x) / len(ids) for x, ids in zip(logprob, answers, strict=True)]
        return found

    def measured(self, name: str, path: str | Path) -> None:
        """Writes what is found of one system, once."""
        out = self.folder / "measured" / f"{name.replace(' ', '-')}.json"
        if out.exists():
            return
        out.parent.mkdir(exist_ok=True)
        found = {"judged": self.judged(path, "test")}
        found |= {f"losses {split}": self.losses(path, split) for split in ("test", "fit")}  # type: ignore[misc]
        write_json(out, found)
        print(f"seed {self.seed}: {name}", flush=True)

    def recipe(self, method: str, options: dict[str, Any], weights: Any = None) -> Recipe:
        base = str(pocket.path("base"))
        return Recipe(method, tuple(self.parents), base, weights, options, dtype="float32", seed=self.seed)

    def merged(self, recipe: Recipe, name: str) -> Path:
        """The merge in a folder that is there for a while; a method for two parents is folded: the third at a third."""
        out = self.folder / "merged" / name
        shutil.rmtree(out, ignore_errors=True)
        if recipe.method not in TWO:
            run_merge(recipe, out, threads=1)
            return out
        first, second, third = self.parents
        half = out.with_name(f"{name}-half")
        shutil.rmtree(half, ignore_errors=True)
        run_merge(replace(recipe, models=(first, second), weights=None), half, threads=1)
        run_merge(replace(recipe, models=(str(half), third), weights=[2, 1]), out, threads=1)
        shutil.rmtree(half)
        return out

    def merges(self, method: str) -> None:
        """A method at its usual settings, and at those of a small search by the judge on the validation split."""
        usual = self.recipe(method, dict(USUAL.get(method, {})))
        name = f"{method}-usual"
        if not (self.folder / "measured" / f"{name}.json").exists():
            self.measured(name, path := self.merged(usual, name))
            shutil.rmtree(path)
        if method in NOTHING or (self.folder / "measured" / f"{method}-searched.json").exists():
            return
        known = catalogue.options(method)
        ranges = {key: [words] for key, words in RANGES.items() if key in known} or {"weights": ["0.2:1"]}
        _, space = read_space(usual, ranges)
        log = self.folder / "search" / f"{method}.json"
        log.parent.mkdir(exist_ok=True)
        trials = [Trial(**row) for row in json.loads(log.read_text())] if log.exists() else []
        for number in range(len(trials), BUDGET):
            values = None if number == 0 else propose(space, trials, number, BUDGET, self.seed)
            recipe = usual if values is None else space.recipe_at(values)
            path = self.merged(recipe, f"{method}-trial")
            score = goals_mean(self.judged(path, "fit"))
            shutil.rmtree(path)
            trials.append(Trial(number, values, recipe.to_dict(), score, []))
            write_json(log, [trial.to_dict() for trial in trials])
        best = max(trials, key=lambda trial: (trial.score, -trial.number))
        self.measured(f"{method}-searched", path := self.merged(Recipe.from_dict(best.recipe), f"{method}-best"))
        shutil.rmtree(path)


def goals_mean(judged: dict[str, list[float | None]]) -> float:
    """The mean over goals of the mean over the prompts that have that aspect."""
    means = []
    for goal in GOALS:
        known = [value for value in judged[goal] if value is not None]
        means.append(sum(known) / len(known))
    return sum(means) / len(means)


def measure_all(work: Path, seed: int) -> None:
    bench = Bench(work / f"seed{seed}", seed)
    (bench.folder / "merged").mkdir(exist_ok=True)
    bench.measured("base", pocket.path("base"))
    for name in (*GOALS, *MIXTURES):
        bench.measured(name, bench.folder / name.replace(" ", "-"))
    for method in METHODS:
        try:
            catalogue.method(method)
        except (ImportError, TrimtabError) as error:
            print(f"seed {seed}: {method} cannot be had: {error}", flush=True)
            continue
        bench.merges(method)


class Found:
    """What was measured of one system.

    judged: aspect -> [S, P], NaN where it does not apply; losses: split -> goal -> [S, D].
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.judged = {a: np.array([row["judged"][a] for row in rows], dtype=np.float64) for a in ASPECTS}
        self.losses = {
            split: {goal: np.array([row[f"losses {split}"][goal] for row in rows]) for goal in GOALS}
            for split in ("test", "fit")
        }


Draw = tuple[np.ndarray, np.ndarray, np.ndarray]  # resampled seeds [S], prompts [P], dialogues [D]


class Study:
    """Statistics over seeds and prompts of all systems."""

    def __init__(self, systems: dict[str, Found]) -> None:
        self.systems = systems
        base = systems["base"]
        seeds, prompts = base.judged["score"].shape
        dialogues = base.losses["test"]["helpful"].shape[1]
        self.all: Draw = (np.arange(seeds), np.arange(prompts), np.arange(dialogues))
        rng = np.random.default_rng(0)
        self.draws: list[Draw] = [
            (rng.integers(0, seeds, seeds), rng.integers(0, prompts, prompts), rng.integers(0, dialogues, dialogues))
            for _ in range(RESAMPLES)
        ]
        self.known: dict[tuple[str, str], np.ndarray] = {}

    def aspect(self, name: str, aspect: str, draw: Draw) -> float:
        return float(np.nanmean(self.systems[name].judged[aspect][np.ix_(draw[0], draw[1])]))

    def goals(self, name: str, draw: Draw) -> float:
        """The mean of the three goals, by the judge."""
        return float(np.mean([self.aspect(name, goal, draw) for goal in GOALS]))

    def skill(self, name: str, draw: Draw, split: str = "test") -> float:
        """Mean over goals and seeds of (base's loss - its loss) / (base's loss - the goal's specialist's)."""
        shares = []
        for goal in GOALS:
            base, own, best = (
                self.systems[one].losses[split][goal][np.ix_(draw[0], draw[2])].mean(1) for one in ("base", name, goal)
            )
            shares.append((base - own) / (base - best))
        return float(np.mean(shares))

    def drawn(self, what: str, name: str) -> np.ndarray:
        """A figure ("goals", "skill" or an aspect) of one system: as it is, then in every resample, [1 + RESAMPLES]."""
        if (what, name) not in self.known:
            of = {"goals": self.goals, "skill": self.skill}.get(what) or (
                lambda name, draw: self.aspect(name, what, draw)
            )
            self.known[what, name] = np.array([of(name, draw) for draw in (self.all, *self.draws)])
        return self.known[what, name]

    def interval(self, what: str, name: str, other: str = "") -> list[float]:
        """[value, low, high], less another system's, paired: the crossed bootstrap over seeds and prompts, 95 %."""
        values = self.drawn(what, name) - (self.drawn(what, other) if other else 0.0)
        low, high = np.quantile(values[1:], (0.025, 0.975))
        return [float(values[0]), float(low), float(high)]


def report(work: Path, seeds: Sequence[int], out: Path) -> None:
    """Reads what was measured of all seeds; writes the figures, and the tables of the page."""
    folders = [work / f"seed{seed}" / "measured" for seed in seeds]
    names = [*("base", *GOALS, *MIXTURES), *(f"{m}-{how}" for how in ("usual", "searched") for m in METHODS)]
    files = {name: [folder / f"{name.replace(' ', '-')}.json" for folder in folders] for name in names}
    whole = {name: paths for name, paths in files.items() if all(path.exists() for path in paths)}
    study = Study({name: Found([json.loads(path.read_text()) for path in paths]) for name, paths in whole.items()})
    searched = {}
    for method in METHODS:
        logs = [work / f"seed{seed}" / "search" / f"{method}.json" for seed in seeds]
        if all(path.exists() for path in logs):
            trials = [max(json.loads(path.read_text()), key=lambda t: (t["score"], -t["number"])) for path in logs]
            searched[method] = [
                {"values": t["values"], "recipe": t["recipe"].get("options", {}), "score": t["score"]} for t in trials
            ]
    rows = {}
    for name in study.systems:
        row: dict[str, Any] = {what: study.interval(what, name) for what in (*ASPECTS, "goals", "skill")}
        row["skill on validation"] = study.skill(name, study.all, "fit")
        row["seeds"] = [
            float(np.mean([np.nanmean(study.systems[name].judged[g][s]) for g in GOALS])) for s in study.all[0]
        ]
        for other in ("mixture", "mixture x3", "linear-usual"):
            row |= {f"{what} against {other}": study.interval(what, name, other) for what in (*GOALS, "goals", "skill")}
        rows[name] = row
    merges = [name for name in rows if name.rpartition("-")[2] in ("usual", "searched")]
    best = max(merges, key=lambda name: rows[name]["skill on validation"])
    found: dict[str, Any] = {"best merge on validation": best, "seeds": list(seeds), "prompts": PROMPTS, "rows": rows}
    found |= {"searched": searched, "environment": environment()}
    found["r-tsvm against tsvm"] = {
        how: {what: study.interval(what, f"r-tsvm-{how}", f"tsvm-{how}") for what in ("goals", "skill")}
        for how in ("usual", "searched")
        if f"r-tsvm-{how}" in rows and f"tsvm-{how}" in rows
    }
    write_json(out, {"schema": 1, **found})
    tables = {"systems": _table(rows, [name for name in rows if name not in merges])}
    tables["usual"] = _table(rows, [name for name in merges if name.endswith("usual")], "linear-usual")
    tables["searched"] = _table(rows, [name for name in merges if name.endswith("searched")], "linear-usual")
    text = PAGE.read_text() if PAGE.exists() else ""
    for name, table in tables.items():
        print(f"{name}\n{table}\n")
        text = re.sub(
            rf"(<!-- table {name} -->\n).*?(<!-- end -->)",
            lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}",
            text,
            flags=re.S,
        )
    print(f"best on validation: {best}; R-TSVM against TSVM: {found['r-tsvm against tsvm']}")
    if text:
        write_atomic(PAGE, text)


def _table(rows: dict[str, Any], names: Sequence[str], reference: str = "") -> str:
    """Markdown, best mean of goals first among merges."""
    head = ["", *GOALS, "mean of the three", "skill kept", "mean less mixture's", "mean less mixture x3's"]
    head += ["skill less linear's"] if reference else []
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(head) - 1)]
    order = sorted(names, key=lambda name: -rows[name]["goals"][0]) if reference else names
    for name in order:
        row = rows[name]
        cells = [name.removesuffix("-usual").removesuffix("-searched"), *(f"{row[goal][0]:.3f}" for goal in GOALS)]
        cells += [_cell(row["goals"]), _cell(row["skill"], 2)]
        cells += ["" if name == other else _cell(row[f"goals against {other}"], 3, True) for other in MIXTURES]
        if reference:
            cells.append("" if name == reference else _cell(row[f"skill against {reference}"], 2, True))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: Sequence[float], digits: int = 3, sign: bool = False) -> str:
    """`+0.012 [0.001, 0.020]`; bold where a difference's interval excludes 0."""
    text = f"{value[0]:{'+' if sign else ''}.{digits}f} [{value[1]:.{digits}f}, {value[2]:.{digits}f}]"
    return f"**{text}**" if sign and value[1] * value[2] > 0 and round(value[0], digits) else text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="trained models and records are kept here")
    parser.add_argument("--stage", choices=("train", "measure", "report", "all"), default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage in ("train", "all"):
        train_all(args.work, args.seeds)
    if args.stage in ("measure", "all"):
        for seed in args.seeds:
            measure_all(args.work, seed)
    if args.stage in ("report", "all"):
        report(args.work, args.seeds, args.out)


if __name__ == "__main__":
    main()
