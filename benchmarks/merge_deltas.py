"""Nine ways to add changes, at several settings: how much of three specialists' skills each keeps.

    python benchmarks/mix_or_merge.py --stage train --work WORK       # the specialists, some 3 CPU minutes a seed
    python benchmarks/merge_deltas.py --work WORK                     # half a CPU minute a seed

A goal's skill is (loss of pocket/base - loss of the merge) / (loss of pocket/base - loss of the goal's specialist), the loss
in nats a token of 50 held-out answers that are good by that goal. Means over seeds, each with specialists of its own (and
other draws, where a method draws); the interval is Student's over seeds.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from mix_or_merge import GOALS, best_answer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab import catalogue, pocket
from trimtab.files import write_json
from trimtab.merge.method import Method
from trimtab.pocket import training
from trimtab.spec import build

HELD = 50
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
RESULTS = Path(__file__).parent / "results" / "merge_deltas.json"
HALF: dict[str, Any] = {"scale": 0.5}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    *(("task-arithmetic", {"scale": scale}) for scale in (0.5, 0.7, 1.0, 1.5)),
    *(("ties", {"density": density}) for density in (0.1, 0.2, 0.5, 1.0)),
    *(("ties", {"density": density, "scale": 0.6}) for density in (0.2, 0.5)),
    *(("dare", HALF | {"density": density}) for density in (0.5, 0.3, 0.1)),
    ("dare", HALF | {"density": 0.3, "rescale": False}),
    *(("dare-ties", HALF | {"density": density}) for density in (0.9, 0.5, 0.1)),
    ("dare-ties", {"density": 0.5, "normalize": True}),
    *(("della", {"density": density, "epsilon": epsilon}) for density, epsilon in ((0.5, 0.1), (0.5, 0.4))),
    ("della", {"density": 0.5, "epsilon": 0.1, "scale": 0.6}),
    *(("della-linear", HALF | {"density": 0.3, "epsilon": epsilon}) for epsilon in (0.05, 0.25)),
    ("della-linear", HALF | {"density": 0.3, "epsilon": 0.25, "compat": "mergekit"}),
    *(("breadcrumbs", HALF | {"density": 0.85, "gamma": gamma}) for gamma in (0.0, 0.01, 0.05)),
    ("breadcrumbs", HALF | {"density": 0.5, "gamma": 0.01}),
    *(("breadcrumbs-ties", HALF | {"density": 0.85, "gamma": gamma}) for gamma in (0.0, 0.05)),
    ("breadcrumbs-ties", {"density": 0.2, "gamma": 0.05, "normalize": True}),
]


class Questions:
    """Held-out questions of each goal with answers that are good by it."""

    def __init__(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(pocket.path("base"))
        self.rows = {}
        for goal, families in GOALS.items():
            rng = random.Random(f"held-{goal}")
            tasks = pocket.tasks("test", HELD, 13, families)
            answers = training.answer_ids(tokenizer, [best_answer(task, goal, rng) for task in tasks])
            self.rows[goal] = (tokenizer([task.prompt for task in tasks])["input_ids"], answers)

    @torch.no_grad()
    def losses(self, model: Any) -> dict[str, float]:
        """Goal -> nats a token."""
        return {
            goal: -float(training.answer_logprob(model, questions, answers).sum()) / sum(map(len, answers))
            for goal, (questions, answers) in self.rows.items()
        }


def seed_rows(work: Path, seed: int, questions: Questions) -> list[dict[str, float]]:
    """Goal -> skill, for each of `SETTINGS`."""
    model = AutoModelForCausalLM.from_pretrained(pocket.path("base")).eval()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    parents, own = [], {}
    for goal in GOALS:
        specialist = AutoModelForCausalLM.from_pretrained(work / f"seed{seed}" / goal).eval()
        own[goal] = questions.losses(specialist)[goal]
        parents.append(specialist.state_dict())
    before = questions.losses(model)
    out = []
    for slug, options in SETTINGS:
        made: type[Method] = catalogue.method(slug)
        method = made(build(made.Config, options, slug))
        merged = {}
        for name, value in base.items():
            changes = [parent[name] - value if made.DELTAS else parent[name] for parent in parents]
            result = method.merged(changes, seed=seed, name=name)
            merged[name] = value + result if made.DELTAS else result
        model.load_state_dict(merged)
        after = questions.losses(model)
        out.append({goal: (before[goal] - after[goal]) / (before[goal] - own[goal]) for goal in GOALS})
        print(f"seed {seed}: {slug} {options} {mean(out[-1].values()):.3f}", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, choices=sorted(STUDENT), default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    questions = Questions()
    found = []
    for seed in range(args.seeds):
        found.append(seed_rows(args.work, seed, questions))
        if len(found) > 1:
            write_json(args.out, {"schema": 1, "seeds": len(found), "rows": summary(found)})
    for row in summary(found):
        words = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}".lower()
            for key, value in row["options"].items()
        )
        cells = [f"{row[goal]:.2f}" for goal in GOALS]
        print(f"| {row['method']} | {words} | {' | '.join(cells)} | {row['mean']:.3f} ± {row['half_width']:.3f} |")


def summary(found: list[list[dict[str, float]]]) -> list[dict[str, Any]]:
    """One row a setting: the skill of each goal and their mean, over seeds."""
    rows = []
    for number, (slug, options) in enumerate(SETTINGS):
        goals = {goal: mean(one[number][goal] for one in found) for goal in GOALS}
        means = [mean(one[number].values()) for one in found]
        half = STUDENT[len(means)] * stdev(means) / math.sqrt(len(means))
        rows.append(
            {"method": slug, "options": options, **goals, "mean": mean(means), "half_width": half, "seeds": means}
        )
    return rows


if __name__ == "__main__":
    main()
