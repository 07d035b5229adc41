"""How sure is the number? Seeds, prompts and samples apart; few seeds; no events; noisy labels.

Scores x[s, p, k] of seed s, prompt p, sample k:

    x = mean + seed_s + prompt_p + noise_spk        (crossed: every seed answers the same prompts)

variance components (ANOVA, equal cells): with MS_seed, MS_prompt, MS_within the usual mean squares of S seeds x P prompts
x K samples,  sigma2_sample = MS_within,  sigma2_seed = (MS_seed - MS_within) / (P K),  sigma2_prompt = (MS_prompt -
MS_within) / (S K), each cut at 0. They say what to buy: more seeds, more prompts, or more samples.

two-way interval (fewer than some 20 seeds):  se^2 = var(seed means) / S + var(prompt means) / P,  mean +- t_{S-1} se.
A percentile bootstrap of few seeds is too narrow (92 % where 95 % was meant, at 10 seeds), an interval that treats every
score as independent covers next to nothing (18 %): simulated in the tests.

noisy labels: a judge wrong with probability e sees w_obs = (1 - e) w + e (1 - w), so  w = (w_obs - e) / (1 - 2 e)  for
e < 1/2; the interval widens by 1 / (1 - 2 e), and by the doubt about e where e was itself estimated (delta method).

Source: tools named by surveys of alignment (2507.19672), the established form of each; ANOVA estimators after
Searle, Casella and McCulloch (1992).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError
from trimtab.measure.stats import LEVEL, RESAMPLES, Interval

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Components:
    """Variances of a score by source; `buy` is where one more unit shrinks the error of the mean most."""

    seed: float
    prompt: float
    sample: float
    seeds: int
    prompts: int
    samples: int

    @property
    def error_variance(self) -> float:
        """Of the grand mean."""
        cells = self.seeds * self.prompts * self.samples
        return self.seed / self.seeds + self.prompt / self.prompts + self.sample / cells

    @property
    def buy(self) -> str:
        """ "seeds", "prompts" or "samples": which, half as many again, takes most off the error; ties to the first."""
        now = self.error_variance
        after = {
            "seeds": self._after(1.5, 1.0, 1.0),
            "prompts": self._after(1.0, 1.5, 1.0),
            "samples": self._after(1.0, 1.0, 1.5),
        }
        return max(after, key=lambda name: now - after[name])

    def _after(self, seeds: float, prompts: float, samples: float) -> float:
        cells = self.seeds * seeds * self.prompts * prompts * self.samples * samples
        return self.seed / (self.seeds * seeds) + self.prompt / (self.prompts * prompts) + self.sample / cells


def variance_components(scores: npt.ArrayLike) -> Components:
    """Of scores [S, P, K] without gaps; at least 2 seeds, 2 prompts, and one sample each."""
    x = _cells(scores)
    seeds, prompts, samples = x.shape
    grand, by_seed, by_prompt = x.mean(), x.mean((1, 2)), x.mean((0, 2))
    ms_seed = prompts * samples * ((by_seed - grand) ** 2).sum() / (seeds - 1)
    ms_prompt = seeds * samples * ((by_prompt - grand) ** 2).sum() / (prompts - 1)
    residual = x - by_seed[:, None, None] - by_prompt[None, :, None] + grand
    within = float((residual**2).sum() / (x.size - seeds - prompts + 1))
    seed, prompt = (ms_seed - within) / (prompts * samples), (ms_prompt - within) / (seeds * samples)
    return Components(max(0.0, float(seed)), max(0.0, float(prompt)), within, seeds, prompts, samples)


def two_way_interval(scores: npt.ArrayLike, level: float = LEVEL) -> Interval:
    """The mean of scores [S, P, K] with an interval that holds for new seeds and new prompts, even with few seeds."""
    from scipy.stats import t

    x = _cells(scores)
    seeds, prompts, _ = x.shape
    squared = x.mean((1, 2)).var(ddof=1) / seeds + x.mean((0, 2)).var(ddof=1) / prompts
    if squared <= 0:
        return Interval(float(x.mean()), None, None, x.size, prompts)
    half = float(t.ppf(0.5 + level / 2, seeds - 1) * math.sqrt(squared))
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, x.size, prompts)


def hierarchical_interval(
    scores: npt.ArrayLike, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile bootstrap of scores [S, P, K]: seeds, then prompts (the same for every seed), then samples.

    Too narrow with fewer than some 20 seeds: use `two_way_interval` there.
    """
    x = _cells(scores)
    seeds, prompts, samples = x.shape
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, 4_000_000 // x.size)
    for at in range(0, resamples, step):
        count = min(step, resamples - at)
        rows = rng.integers(0, seeds, (count, seeds, 1, 1))
        columns = rng.integers(0, prompts, (count, 1, prompts, 1))
        cells = rng.integers(0, samples, (count, seeds, prompts, samples))
        means[at : at + count] = x[rows, columns, cells].mean((1, 2, 3))
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(x.mean()), float(low), float(high), x.size, prompts)


def corrected_rate(observed: Interval, error: float, error_deviation: float = 0.0) -> Interval:
    """A rate as it would be without label noise, from one observed with labels flipped with probability `error`.

    error_deviation: the standard error of `error`, where it was estimated. UsageError for an error of 1/2 or more: such
    labels say nothing. Values are cut to [0, 1].
    """
    if not 0 <= error < 0.5:
        raise UsageError(f"labels that are wrong with probability {error} say nothing: it must be below 1/2")
    if observed.mean is None:
        return observed
    scale = 1 - 2 * error
    mean = (observed.mean - error) / scale
    if observed.low is None or observed.high is None:
        return Interval(_share(mean), None, None, observed.rows, observed.prompts)
    # d w / d e = (2 w_obs - 1) / (1 - 2 e)^2
    extra = 1.96 * error_deviation * abs(2 * observed.mean - 1) / scale**2
    low = mean - math.hypot((observed.mean - observed.low) / scale, extra)
    high = mean + math.hypot((observed.high - observed.mean) / scale, extra)
    return Interval(_share(mean), _share(low), _share(high), observed.rows, observed.prompts)


def flip_rate(first: Sequence[int], second: Sequence[int]) -> tuple[float, float]:
    """The probability e that one label is wrong, from two labels of the same things, and its standard error.

    Two labels with independent errors disagree with probability d = 2 e (1 - e), so e = (1 - sqrt(1 - 2 d)) / 2.
    """
    if len(first) != len(second) or not first:
        raise UsageError(f"two labels of each thing are needed, not {len(first)} and {len(second)}")
    share = float(np.mean(np.asarray(first) != np.asarray(second)))
    if share >= 0.5:
        raise UsageError(f"labels that disagree with themselves {share:.0%} of the time say nothing")
    root = math.sqrt(1 - 2 * share)
    return (1 - root) / 2, math.sqrt(share * (1 - share) / len(first)) / (2 * root)


def kappa(first: Sequence[object], second: Sequence[object]) -> float | None:
    """Cohen's agreement beyond chance of two labellers; None where both gave one and the same label throughout."""
    if len(first) != len(second) or not first:
        raise UsageError(f"agreement needs two labels of each thing, not {len(first)} and {len(second)}")
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    labels = {*first, *second}
    chance = sum(list(first).count(label) * list(second).count(label) for label in labels) / len(first) ** 2
    return None if chance == 1 else (agreed - chance) / (1 - chance)


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))


def _cells(scores: npt.ArrayLike) -> Array:
    x = np.asarray(scores, dtype=np.float64)
    if x.ndim != 3 or x.shape[0] < 2 or x.shape[1] < 2 or not x.size:
        raise UsageError(
            f"scores [seeds, prompts, samples] with 2 seeds and 2 prompts at least are needed, not {x.shape}"
        )
    if not np.isfinite(x).all():
        raise UsageError("equal cells are needed: a score is missing or not finite")
    return x
