"""Two systems that are one: how often does a comparison say otherwise? At most as often as it promises, 5 % a line.

Each path is a comparison of the diagnostic itself on measurements made up from exchangeable systems. The rate may exceed
the nominal 5 % by three binomial standard errors of the runs. In brackets: about what the interval alone gives, where
that breaks the promise; most of these fail here if a verdict forgets the exact test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from trimtab.measure import embedding_scores, geometry
from trimtab.measure.aqi_scores import _comparable, around, left_out
from trimtab.measure.branching_factor import ratio_change
from trimtab.measure.diagnostic import paired_change, said
from trimtab.measure.duel import win_interval
from trimtab.measure.emergent_misalignment import EmergentMisalignment, EmergentMisalignmentConfig
from trimtab.measure.human_triplets import HumanTriplets, HumanTripletsConfig
from trimtab.measure.measurement import Measurement, Row
from trimtab.measure.mexa import Mexa
from trimtab.measure.panel import bought
from trimtab.measure.ratings import rate as ratings
from trimtab.measure.reward_benchmark import RewardBenchmark
from trimtab.measure.reward_guards import gap_curve
from trimtab.measure.stats import mean_interval, win_rate
from trimtab.measure.surrogate_classifier import SurrogateClassifier
from trimtab.measure.triplets import choose, draw_triplets, scores_of

Draw = Callable[[np.random.Generator], bool]
NOMINAL = 0.05


def measured(values: np.ndarray, label: str = "score") -> Measurement:
    """One value a unit."""
    row = Row.of(label, mean_interval(values, resamples=2), "higher")
    return Measurement(
        "made up", "one", {}, "unit", list(map(str, range(len(values)))), {label: values.tolist()}, [row]
    )


def pair(sides: Iterable[np.ndarray], label: str = "score") -> tuple[Measurement, Measurement]:
    one, two = (measured(values, label) for values in sides)
    return one, two


def line(units: int, draw: Callable[[np.random.Generator, int], np.ndarray]) -> Draw:
    """A line of any diagnostic that keeps `Diagnostic.compare`: refusal, panel, verify, multiple-choice, pa-ccs, ..."""
    return lambda rng: paired_change(*pair(draw(rng, units) for _ in range(2)), "score").verdict != "undecided"


def right(chance: float, samples: int = 1) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Shares of right answers."""
    return lambda rng, units: rng.binomial(samples, chance, units) / samples


def skewed(rng: np.random.Generator, units: int) -> np.ndarray:
    return rng.lognormal(0, 1.5, units)


def tied(rng: np.random.Generator, units: int) -> np.ndarray:
    return rng.normal(size=units) * (rng.random(units) < 0.1)


def panel_wins(rng: np.random.Generator) -> bool:
    """20 prompts of which one in six is not tied."""
    return bought(*pair((rng.random((2, 20)) < 0.1).astype(float), "reward"))[0].verdict != "undecided"


def branching(rng: np.random.Generator) -> bool:
    sides = np.exp(np.maximum(rng.lognormal(-1, 1.5, (2, 12)), 0))
    return ratio_change(*pair(sides, "factor"), "factor").verdict != "undecided"


def reward_pairs(rng: np.random.Generator) -> bool:
    """40 pairs in two sections, on which rewards that are nearly always right seldom differ."""
    sides = []
    for margin in np.where(rng.random((2, 40)) < 0.04, -1.0, 1.0):
        one = measured(margin, "accuracy")
        one.table += [Row("subset: a", None), Row("subset: b", None)]
        subsets = ["a"] * 10 + ["b"] * 30
        one.details["pairs"] = {
            "prompt": list(range(40)), "subset": subsets, "chosen": margin.tolist(), "rejected": [0.0] * 40,
        }  # fmt: skip
        sides.append(one)
    return RewardBenchmark().compare(*sides).change("accuracy").verdict != "undecided"


def refusal_f1(rng: np.random.Generator) -> bool:
    """20 prompts, one depth, a reader that errs on four in ten."""
    truth, sides = rng.random(20) < 0.5, []
    for _ in range(2):
        one = measured(truth.astype(float), "F1, depth 0")
        one.samples = {}
        one.details = {"headline_depth": None, "refused": truth, "predicted": [(truth ^ (rng.random(20) < 0.4))[None]]}
        sides.append(one)
    return SurrogateClassifier().compare(*sides).change("F1, depth 0").verdict == "changed"


def alignment(rng: np.random.Generator) -> bool:
    """60 sentences, 3 layers that share most of their hits, one language."""
    sides = []
    for _ in range(2):
        hits = np.where(rng.random((3, 60)) < 0.7, rng.random(60) < 0.5, rng.random((3, 60)) < 0.5)
        record = {"indicators": ["".join("01"[int(x)] for x in row) for row in hits], "peak_layer": 0}
        one = measured(hits.mean(0), "deu")
        one.table += [Row(f"deu, layer {layer}", None) for layer in range(3)]
        one.details |= {"languages": {"deu": record}, "layers": [0, 1, 2], "chance": 0.01, "tokens": ""}
        sides.append(one)
    return Mexa().compare(*sides).changes[0].verdict != "undecided"


def misaligned(rng: np.random.Generator) -> bool:
    """8 questions of their own rates, 20 answers each."""
    share, sides = rng.beta(1, 3, 8), []
    for _ in range(2):
        bad = rng.binomial(20, share)
        one = measured(bad / 20, "misaligned, of all answers")
        for label in ("misaligned, of coherent answers", "coherent"):
            one.samples[label] = (bad / 20).tolist()
            one.table.append(Row(label, None))
        one.details["cells"] = [
            {"question": str(q), "misaligned": int(b), "aligned": 20 - int(b), "incoherent": 0}
            for q, b in enumerate(bad)
        ]  # fmt: skip
        sides.append(one)
    tool = EmergentMisalignment(EmergentMisalignmentConfig(permutations=200))
    return tool.compare(*sides).change("misaligned, of all answers").verdict != "undecided"


def concepts(label: str) -> Draw:
    """Two noisy copies of a reference of 12 concepts, all triplets."""
    triplets = draw_triplets(12, 5000)

    def draw(rng: np.random.Generator) -> bool:
        z = rng.normal(size=(12, 2))
        spread = -((z[:, None] - z[None]) ** 2).sum(-1)
        human = np.eye(3)[choose(scores_of(spread, triplets))]
        sides = []
        for _ in range(2):
            x = z + 0.7 * rng.normal(size=z.shape)
            p = np.eye(3)[choose(scores_of(-((x[:, None] - x[None]) ** 2).sum(-1), triplets))]
            one = measured(z[:, 0])
            seen = {
                "agreement": 3 * (p * human).mean(),
                "RSA": 0.0,
                "Procrustes R2": embedding_scores.procrustes_r2(z, x),
            }
            one.table = [Row(name, float(value), better="higher") for name, value in seen.items()]
            one.details |= {
                "triplets": triplets, "human": human, "p": p, "embedding": x, "fit": {"kind": "metric"},
                "reference": z, "reference similarity": spread,
            }  # fmt: skip
            sides.append(one)
        tool = HumanTriplets(HumanTripletsConfig(bootstraps=60))
        return tool.compare(*sides).change(label).verdict != "undecided"

    return draw


def latent(rng: np.random.Generator) -> bool:
    """AQI of two representations of 20 texts a class that differ by their noise alone."""
    labels = np.repeat([0, 1], 20)
    counts = geometry.resampled(labels.tolist(), 200, 0)
    shared = rng.normal(size=(40, 8)) + 2.0 * labels[:, None] * np.eye(8)[0]
    grams = [geometry.gram_of(shared + rng.normal(size=(40, 8))) for _ in range(2)]
    sides = [_comparable(gram, labels, counts, 0.5) for gram in grams]
    left = left_out(grams[0], labels, 0.5) - left_out(grams[1], labels, 0.5)
    return said(around(sides[0][0] - sides[1][0], sides[0][1] - sides[1][1], 40, left=left), "higher") != "undecided"


def judged(rng: np.random.Generator) -> bool:
    """100 prompts of which the judge decides one in four."""
    outcomes = np.where(rng.random(100) < 0.25, rng.integers(0, 2, 100), 0.5)
    found = win_interval(win_rate(outcomes, np.full(100, 0.5), resamples=2000).rate, outcomes.tolist())
    return found.low is not None and found.high is not None and not found.low <= 0.5 <= found.high


def ranked(rng: np.random.Generator) -> bool:
    """Three equal players, each pair once on each of 12 prompts: any two told apart."""
    wins = np.zeros((12, 3, 3))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        won = rng.integers(0, 2, 12)
        wins[:, i, j], wins[:, j, i] = won, 1 - won
    return ratings(wins, ["a", "b", "c"], resamples=100).separable


def over_optimised(rng: np.random.Generator) -> bool:
    """A gold reward that has nothing to do with the proxy, with a long tail, on 8 prompts of 8 answers."""
    return gap_curve(rng.normal(size=(8, 8)), rng.lognormal(0, 1.5, (8, 8)), resamples=500).fires


PATHS: dict[str, tuple[int, Draw]] = {
    "binary, 2 %, 75 units [0.09]": (150, line(75, right(0.02))),
    "binary, 10 %, 20 units [0.10]": (300, line(20, right(0.1))),
    "binary, 50 %, 10 units": (200, line(10, right(0.5))),
    "binary, 98 %, 20 units": (200, line(20, right(0.98))),
    "4 samples a prompt, 5 %, 20 units [0.07]": (200, line(20, right(0.05, 4))),
    "long tails, 20 units [0.17]": (300, line(20, skewed)),
    "long tails, 5 units [0.12]": (300, line(5, skewed)),
    "most units tied, 40 units [0.14]": (300, line(40, tied)),
    "panel, win rate [0.10]": (300, panel_wins),
    "branching-factor, ratio [0.16]": (200, branching),
    "reward-benchmark, accuracy [0.15]": (100, reward_pairs),
    "surrogate-classifier, F1 [0.085]": (600, refusal_f1),
    "mexa, score": (60, alignment),
    "emergent-misalignment, rate": (200, misaligned),
    "human-triplets, R2": (100, concepts("Procrustes R2")),
    "human-triplets, agreement": (100, concepts("agreement")),
    "aqi, comparable": (300, latent),
    "judge, win rate": (200, judged),
    "varco-arena, any two": (100, ranked),
    "reward-benchmark, over-optimised [0.17]": (100, over_optimised),
}


@pytest.mark.parametrize("path", PATHS)
def test_one_system_is_told_apart_from_itself_at_most_at_the_nominal_rate(path: str) -> None:
    runs, draw = PATHS[path]
    rng = np.random.default_rng(20)
    rate = sum(draw(rng) for _ in range(runs)) / runs
    allowed = NOMINAL + 3 * math.sqrt(NOMINAL * (1 - NOMINAL) / runs)
    assert rate <= allowed, f"{rate:.3f} of {runs} runs say that one system differs from itself; {allowed:.3f} may"
