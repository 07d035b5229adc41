"""Does it help? Over plain and permuted averaging, and more with every size.

Two nets (64-96-96) that know other digits and keep their heads, or all digits from other images and share one. Five seeds,
every difference paired by test image.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from trimtab.measure.stats import Interval, paired_difference
from trimtab.merge.align.module_specs import module_spec
from trimtab.merge.pleas.modules import Merged
from trimtab.merge.pleas.pair import Pair
from trimtab.merge.pleas.pleas import PleasConfig

SEEDS = 5


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order]
    return images[:1000], labels[:1000], images[1000:], labels[1000:]


def trained(seed: int, first: int) -> nn.Module:
    """A net that knows the digits first, ..., first + 4, as classes 0 to 4."""
    x, y, *_ = digits()
    chosen = (y >= first) & (y < first + 5)
    return fitted(seed, x[chosen], y[chosen] - first, 5)


def fitted(seed: int, x: Tensor, y: Tensor, classes: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, classes))
        adam = torch.optim.Adam(model.parameters(), 3e-3, fused=True)
        for _ in range(12):
            for rows in torch.randperm(len(x)).split(50):
                adam.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                adam.step()
    return model.eval().requires_grad_(False)


def right(merged: Merged) -> np.ndarray:
    """1 for every test image whose task's head says the right digit. [N]"""
    *_, x, y = digits()
    said = torch.where(y < 5, merged.task("a")(x).argmax(1), merged.task("b")(x).argmax(1) + 5)
    return (said == y).double().numpy()


@pytest.fixture(scope="module")
def arms() -> dict[str, np.ndarray]:
    """Correct or not, [seeds, images] an arm."""
    found: dict[str, list[np.ndarray]] = {}
    x = digits()[0]
    for seed in range(SEEDS):
        a, b = trained(2 * seed, 0), trained(2 * seed + 1, 5)
        spec = module_spec(a, x[:8])
        config = PleasConfig(heads="separate", match="am", scheme="uniform")
        pair = Pair(a, b, spec, x, config)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) * x.std(0) + x.mean(0)
        free = Pair(a, b, spec, noise, config)
        parts = {
            "re-basin": pair.build({}, refit=False),
            "re-basin on noise": free.build({}, refit=False),
            "pleas on noise": free.merge(1.0),
            **{f"pleas {budget}": pair.merge(budget) for budget in (1.0, 1.5, 2.0)},
            "block average 1.5": pair.build(pair.merge(1.5).separate, refit=False),
        }
        for name, merged in parts.items():
            found.setdefault(name, []).append(right(merged))
        own = torch.where(digits()[3] < 5, a(digits()[2]).argmax(1), b(digits()[2]).argmax(1) + 5)
        found.setdefault("parents", []).append((own == digits()[3]).double().numpy())
    return {name: np.stack(rows) for name, rows in found.items()}


@pytest.fixture(scope="module")
def same_labels() -> dict[str, np.ndarray]:
    """Correct or not, [seeds, images] an arm; both nets know all digits, from disjoint halves of the images."""
    found: dict[str, list[np.ndarray]] = {}
    x, y, *test = digits()
    for seed in range(SEEDS):
        a, b = fitted(2 * seed, x[:500], y[:500], 10), fitted(2 * seed + 1, x[500:], y[500:], 10)
        pair = Pair(a, b, module_spec(a, x[:8]), x, PleasConfig(match="am", scheme="uniform"))
        parts = {
            "average": Pair(a, b, pair.spec, x, PleasConfig(), permutations={}).build({}, refit=False).model,
            "re-basin": pair.build({}, refit=False).model,
            "pleas 1.0": pair.merge(1.0).model,
            "pleas 2.0": pair.merge(2.0).model,
            "ensemble": lambda images, a=a, b=b: a(images) + b(images),
        }
        for name, merged in parts.items():
            found.setdefault(name, []).append((merged(test[0]).argmax(1) == test[1]).double().numpy())
    return {name: np.stack(rows) for name, rows in found.items()}


def gain(arms: dict[str, np.ndarray], first: str, second: str) -> Interval:
    """Paired by image, each image's mean over the seeds."""
    return paired_difference(arms[first].mean(0), arms[second].mean(0))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("pleas 1.0", "re-basin"),
        ("pleas on noise", "re-basin on noise"),
        ("pleas 1.5", "block average 1.5"),
        ("pleas 1.5", "pleas 1.0"),
        ("pleas 2.0", "pleas 1.0"),
        ("pleas 2.0", "re-basin"),
    ],
)
def test_it_is_better(arms: dict[str, np.ndarray], first: str, second: str) -> None:
    found = gain(arms, first, second)
    assert found.low is not None and found.low > 0, f"{first} - {second}: {found}"


def test_twice_the_size_is_both_parents(arms: dict[str, np.ndarray]) -> None:
    assert np.array_equal(arms["pleas 2.0"], arms["parents"])


@pytest.mark.parametrize(
    ("first", "second"), [("re-basin", "average"), ("pleas 1.0", "re-basin"), ("pleas 2.0", "re-basin")]
)
def test_it_is_better_where_both_know_the_same(same_labels: dict[str, np.ndarray], first: str, second: str) -> None:
    found = gain(same_labels, first, second)
    assert found.low is not None and found.low > 0, f"{first} - {second}: {found}"


def test_twice_the_size_is_the_ensemble(same_labels: dict[str, np.ndarray]) -> None:
    assert np.array_equal(same_labels["pleas 2.0"], same_labels["ensemble"])
