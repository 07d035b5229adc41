"""The measurements behind docs/natural-control.md: natural control against RE-Control, Pref-CTRL and best-of-n.

    python benchmarks/natural_control.py MODEL [--part main] [--seeds 0 1 2 3 4] [--rollouts 9600]
    python benchmarks/natural_control_report.py        # the tables and figures, from benchmarks/results

MODEL: pocket/base, or the folder of a story model (benchmarks/openings holds the prompts; the reward is sentiment).
Parts: main (every policy, a fit a seed), ablation (one option at a time), several (two rewards and a weights dial), speed.
The exact frontier is natural_control_exact.py. Resumable: every measured point is kept in runs/natural-control.
Each seed has its own rollouts, fits and answers; the prompts measured on are never fitted on. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trimtab import LM, Sampling, Steered, pocket
from trimtab.decode import BestOfN
from trimtab.divergence import divergences
from trimtab.files import dump_json, write_atomic
from trimtab.measure.diversity import distinct
from trimtab.rewards import parse_reward
from trimtab.sampling import derive_seed
from trimtab.steer.natural_control import NaturalControl, NaturalControlConfig, fit_round
from trimtab.steer.pref_ctrl import PrefCtrl, PrefCtrlConfig
from trimtab.steer.re_control import ReControl, ReControlConfig
from trimtab.steer.rollouts import Rollouts, collect
from trimtab.steer.weighted_controls import WeightedControls, learn_many

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "natural-control"
PROMPTS, ANSWERS, STEPS = 60, 8, 10
# Dials on the story model; elsewhere multiples of the strength that spends 0.05 nats a token.
STORY_DIALS = {
    "re-control": (1.0, 2.0, 3.0, 4.0, 5.0),
    "re-control mc": (0.5, 1.0, 1.5, 2.0, 3.0),
    "pref-ctrl": (0.5, 1.0, 2.0, 3.0, 4.0),
    "natural-control": (1.5, 2.5, 3.5, 4.5, 6.0),
    "extra-block": (1.5, 3.0, 4.5),
    "rounds": (1.5, 2.5, 4.0),
}
MULTIPLES = (0.5, 0.75, 1.0, 1.4, 2.0)
LOW = (0.1, 0.25)  # natural control alone: down to the rewards that the others reach
ROUND_KL = 0.03


@dataclasses.dataclass
class Study:
    """One model: what to fit on, what to measure on, by what."""

    lm: LM
    fit: list[str]
    test: list[str]
    reward: Any
    gold: Any | None
    steps: int
    dials: dict[str, tuple[float, ...]] | None

    @staticmethod
    def of(model: str) -> Study:
        lm = LM.load(model)
        if model.startswith("pocket/"):
            fit, test = pocket.prompts("fit", 256, 0), pocket.prompts("test", PROMPTS, 0)
            return Study(lm, fit, test, parse_reward("pocket/reward"), parse_reward("pocket/judge"), 48, None)
        openings = ROOT / "benchmarks" / "openings"
        fit, test = ((openings / f"{name}.txt").read_text().splitlines() for name in ("fit", "test"))
        return Study(lm, fit, test[:PROMPTS], parse_reward("sentiment"), None, 64, STORY_DIALS)

    def sampling(self, seed: int, *path: Any, samples: int = 1) -> Sampling:
        return Sampling(self.steps, samples=samples, seed=derive_seed(seed, "study", *path))

    def measure(
        self, policy: Any, seed: int, answers: int = ANSWERS, extra: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Answers of one policy to every test prompt, the same random numbers for all policies of a seed."""
        sampling = self.sampling(seed, "answers", samples=answers)
        drawn = policy.generate(self.test, sampling)
        out: dict[str, Any] = {"kl": None, "diversity": distinct(drawn.tokens)}
        tokens = sum(map(len, drawn.tokens))
        out["length"] = tokens / len(drawn)
        if policy is self.lm or not (hasattr(policy, "token_logprobs")):
            nll = -sum(float(row.sum()) for row in self.lm.score(drawn.prompts, drawn.tokens))
            if policy is self.lm:
                out["kl"] = 0.0
        else:
            found = divergences(policy, self.lm, drawn.prompts, drawn.tokens, sampling)
            out["kl"] = sum(float(one.kl.sum()) for one in found) / tokens
            nll = -sum(float(one.base_logprobs.sum()) for one in found)
        out["nll"] = nll / tokens
        for name, judge in {"reward": self.reward, "gold": self.gold, **(extra or {})}.items():
            if judge is not None:
                scores = torch.tensor(
                    [float("nan") if s is None else s for s in judge.score(drawn.prompts, drawn.texts)]
                )
                by_prompt = scores.view(len(self.test), -1).nanmean(1)
                out[name] = float(scores.nanmean())
                out[f"{name}_by_prompt"] = [round(float(value), 4) for value in by_prompt]
        return out


class Points:
    """The measured points of one seed, on disk after each."""

    def __init__(self, study: Study, part: str, seed: int):
        self.file = RUNS / study.lm.name.replace("/", "-") / f"{part}-{seed}.json"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.seed = seed

    def add(self, name: str, make: Callable[[], dict[str, Any]], **facts: Any) -> None:
        if name not in self.known:
            start = time.process_time()
            self.known[name] = facts | make()
            write_atomic(self.file, dump_json(self.known))
            found = {key: round(v, 4) for key, v in self.known[name].items() if isinstance(v, float)}
            print(f"{self.file.stem} {name}: {found} [{time.process_time() - start:.0f} s CPU]", flush=True)


def dialled(study: Study, controller: Any, family: str, seed: int) -> Iterator[tuple[float, Any]]:
    """The controller at each of its dial's values."""
    values = study.dials[family] if study.dials else None
    if values is None:
        open_dial = controller.but(**{controller.DIAL: None, "kl_target": 0.05})
        tuned = open_dial.ready(study.lm, study.fit, study.sampling(seed, "tune"))
        factors = (*LOW, *MULTIPLES) if family == "natural-control" else MULTIPLES
        values = tuple(factor * tuned.strength for factor in factors)
    for value in values:
        yield value, controller.but(**{controller.DIAL: value})


def main_part(study: Study, seed: int, rollouts: int, most_rounds: int) -> None:
    """Every policy of the table."""
    points, lm = Points(study, "main", seed), study.lm
    points.add("base", lambda: study.measure(lm, seed), family="base")
    for n in (4, 8):
        policy = BestOfN(lm, study.reward, n)
        points.add(
            f"best-of-{n}", lambda p=policy: study.measure(p, seed), family="best-of-n", kl_bound=policy.kl_bound
        )
    draws = study.sampling(seed, "fit")
    drawn = collect(lm, study.fit, study.reward, draws, rollouts)

    def sweep(family: str, controller: Any) -> None:
        for value, at in dialled(study, controller, family, seed):
            name = f"{family} {value:.3g}"
            points.add(name, lambda at=at: study.measure(at.as_policy(lm), seed), family=family, dial=value)

    def fits(cls: Any, config: Any) -> Any:
        return cls.learn(lm, study.fit, study.reward, draws, config, drawn)

    sweep("natural-control", fits(NaturalControl, NaturalControlConfig(rollouts=rollouts, seed=seed)))
    sweep("re-control", fits(ReControl, ReControlConfig(rollouts=rollouts, steps=STEPS, seed=seed)))
    if study.dials:
        sweep("re-control mc", fits(ReControl, ReControlConfig(rollouts=rollouts, steps=STEPS, seed=seed, target="mc")))
    sweep("pref-ctrl", fits(PrefCtrl, PrefCtrlConfig(rollouts=rollouts, steps=STEPS, seed=seed)))
    block = NaturalControlConfig(rollouts=rollouts, seed=seed, form="block", block_strength=3.0)
    sweep("extra-block", fits(NaturalControl, block))
    in_rounds = NaturalControlConfig(rollouts=rollouts, seed=seed, rounds=most_rounds, round_kl=ROUND_KL)
    whole = fits(NaturalControl, in_rounds)
    for count in range(2, len(whole.networks) + 1):
        ends = whole.ends[: count - 1]
        part = NaturalControl(whole.networks[:count], ends, whole.config, whole.origin)
        steps = study.dials["rounds"] if study.dials else [factor * ends[0] for factor in (0.5, 1.0, 1.5)]
        for step in steps:
            at, name = part.but(strength=sum(ends) + step), f"{count} rounds +{step:.3g}"
            points.add(name, lambda at=at: study.measure(at.as_policy(lm), seed), family=f"{count} rounds", dial=step)


ABLATION: dict[str, tuple[Any, ...]] = {
    "lambda_advantage": (0.5, 0.9, 0.97),
    "epochs": (1, 25),
    "width": (32, 256),
    "rollouts": (1200, 2400, 4800),
}


ABLATION_KL = (0.03, 0.06, 0.12)


def ablation_part(study: Study, seed: int, rollouts: int) -> None:
    """One option at a time from the defaults, each at the strengths that spend given KLs to second order."""
    points, draws = Points(study, "ablation", seed), study.sampling(seed, "fit")
    drawn = collect(study.lm, study.fit, study.reward, draws, rollouts)
    default = NaturalControlConfig(rollouts=rollouts, seed=seed)
    variants = [("default", "", default)]
    variants += [
        (f"{key}={v}", key, dataclasses.replace(default, **{key: v})) for key, vs in ABLATION.items() for v in vs
    ]
    for name, key, config in variants:
        if f"{name} {ABLATION_KL[-1]}" in points.known:
            continue
        used = first_answers(drawn, config.rollouts)
        network, value, found = fit_round(used, config)
        control = NaturalControl([network], config=config, value=value)
        for kl in ABLATION_KL:  # KL(s) = s^2 / 2 E[(c.u)^2]
            policy = control.but(strength=(2 * kl / found["curvature"]) ** 0.5).as_policy(study.lm)
            points.add(f"{name} {kl}", lambda p=policy: study.measure(p, seed), option=key, variant=name, **found)


def first_answers(rollouts: Rollouts, count: int) -> Rollouts:
    if count >= len(rollouts):
        return rollouts
    steps = int(rollouts.lengths[:count].sum())
    cut = {name: getattr(rollouts, name)[:count] for name in ("lengths", "rewards", "prompt_index", "ended", "tokens")}
    return dataclasses.replace(rollouts, states=rollouts.states[:steps], scores=rollouts.scores[:steps], **cut)


def several_part(study: Study, seed: int, rollouts: int) -> None:
    """Two rewards fitted on the same rollouts, mixed while answering."""
    second = parse_reward("keyword:words=dog|cat|bird|fish|bear|bug,mode=any")
    points = Points(study, "several", seed)
    controls = learn_many(
        study.lm, study.fit, [study.reward, second], sampling=study.sampling(seed, "fit"), rollouts=rollouts, seed=seed,
        strength=3.5,
    )  # fmt: skip
    points.add("base", lambda: study.measure(study.lm, seed, extra={"second": second}))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        policy = WeightedControls(controls, [1 - share, share])
        name = f"{1 - share:g} sentiment + {share:g} animals"
        points.add(
            name, lambda p=policy: study.measure(Steered(study.lm, p), seed, extra={"second": second}), share=share
        )


def speed_part(study: Study, seed: int, repeats: int = 15) -> None:
    """Seconds of decoding against plain sampling; runs alternate, medians of the pairwise ratios."""
    points, lm, draws = Points(study, "speed", seed), study.lm, study.sampling(seed, "fit")
    drawn = collect(lm, study.fit, study.reward, draws, 512)
    config = NaturalControlConfig(rollouts=512, epochs=1, seed=seed, strength=1.0)
    natural = NaturalControl.learn(lm, study.fit, study.reward, draws, config, drawn)
    network = natural.networks[0] if natural.networks else fit_round(drawn, config)[0]
    block = NaturalControl.learn(
        lm, study.fit, study.reward, draws, dataclasses.replace(config, form="block", epochs=3), drawn
    )
    re_config = ReControlConfig(rollouts=512, epochs=1, step_size=0.01, steps=STEPS)
    policies = {
        "natural-control": NaturalControl([network], config=config).as_policy(lm),
        "two rounds": NaturalControl([network, network], [0.5], config).as_policy(lm),
        "extra-block": block.as_policy(lm),
        "re-control": ReControl.learn(lm, study.fit, study.reward, draws, re_config, drawn).as_policy(lm),
    }
    lm.__dict__["eos_ids"] = frozenset()  # every answer as long as the others
    getattr(policies["extra-block"], "__dict__", {})["eos_ids"] = frozenset()
    prompts, sampling = (study.test * 2)[:48], Sampling(study.steps, seed=seed)

    def seconds(policy: Any) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        policy.generate(prompts, sampling)
        return time.perf_counter() - wall, time.process_time() - cpu

    for name, policy in policies.items():
        seconds(policy), seconds(lm)
        pairs = [(seconds(lm), seconds(policy)) for _ in range(repeats)]
        ratios = {
            kind: statistics.median(steered[at] / plain[at] for plain, steered in pairs)
            for at, kind in enumerate(("wall_ratio", "cpu_ratio"))
        }
        ratios["seconds"] = statistics.median(steered[0] for _, steered in pairs)
        points.add(name, lambda r=ratios: r, rows=48)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--part", choices=("main", "ablation", "several", "speed"), default="main")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rollouts", type=int, default=9600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    study = Study.of(arguments.model)
    for seed in arguments.seeds:
        if arguments.part == "main":
            main_part(study, seed, arguments.rollouts, most_rounds=4 if seed < 2 and study.dials else 2)
        elif arguments.part == "ablation":
            ablation_part(study, seed, arguments.rollouts)
        elif arguments.part == "several":
            several_part(study, seed, arguments.rollouts)
        else:
            speed_part(study, seed)


if __name__ == "__main__":
    main()
