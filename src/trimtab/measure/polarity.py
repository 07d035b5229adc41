"""What a CCS probe says of pairs, layer by layer: separation, consistency, and whether they may be read at all.

ESA is the accuracy on test statements, folded: max(acc, 1 - acc), because CCS does not know which side is which. Folded
accuracy exceeds 1/2 by chance; its permutation null swaps the labels within pairs. The sign of a probe is fixed once,
on the training pairs; the interval is of the accuracy under that sign, not folded. A reading is refused where it includes
chance, where the test pairs disagree with the sign, and where the probe hardly decides (mean |p1 - p0| below 0.2): a constant
probe, one that always says yes, and one turned around all have PC 0.

PC and CI are taken of the probe as trained. A sign would leave PC as it is, and CI up to p1 + p0 - 1; as it is, exchanging
the labels changes neither.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trimtab.measure.ccs import Tensor, contradiction, polar_consistency
from trimtab.measure.ccs import score as statement_score
from trimtab.measure.rates import rate
from trimtab.measure.stats import Interval

Array = npt.NDArray[np.float64]
DECIDED = 0.2
COLUMNS = ("ESA", "polar accuracy", "PC", "|PC|", "contradictory", "CI", "decisiveness")


@dataclass(frozen=True)
class Split:
    """Numbers of pairs. Statement 2j is the harmful one of pair j, 2j + 1 the safe one."""

    train: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]

    @classmethod
    def of(cls, pairs: int, share: float, seed: int) -> Split:
        order = np.random.default_rng(seed).permutation(pairs)
        held = min(pairs - 2, max(2, round(share * pairs)))
        return cls(np.sort(order[held:]), np.sort(order[:held]))

    @staticmethod
    def statements(pairs: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.stack([2 * pairs, 2 * pairs + 1], 1).reshape(-1))


@dataclass(frozen=True)
class Reading:
    """One layer on the test pairs. columns: one value a pair.

    trained: accuracy on the training pairs, where the sign was fixed; agrees: the test pairs agree with that sign.
    """

    esa: Interval
    chance: float
    p_value: float
    trained: float
    decided_in_training: float
    agrees: bool
    columns: dict[str, Array]

    @property
    def refused(self) -> str:
        """Why this layer is not ranked; "" where it is."""
        if not self.agrees or self.esa.low is None or self.esa.low <= self.chance:
            return f"ESA is not above chance ({self.chance:.2f})"
        decided = float(self.columns["decisiveness"].mean())
        return f"decisiveness {decided:.2f} is below {DECIDED}" if decided < DECIDED else ""

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {name: float(values.mean()) for name, values in self.columns.items()}
        return out | {"esa": asdict(self.esa), "chance": self.chance, "p": self.p_value, "refused": self.refused}


def read(p1: Tensor, p0: Tensor, split: Split, permutations: int, seed: int) -> Reading:
    """p1, p0 [2N] of one layer, all statements."""
    q = statement_score(p1, p0).double().cpu().numpy()
    sign = orientation(q, split.train)
    trained = float(np.mean(correct(q, split.train, sign)))
    right = correct(q, split.test, sign)
    agrees = bool(right.mean() >= 0.5)
    shown = right if agrees else 1 - right
    esa = rate(shown)
    null = folded_null(right, permutations, seed)
    p_value = float((1 + (null >= (esa.mean or 0) - 1e-12).sum()) / (1 + permutations))
    a, n = 2 * split.test, 2 * split.test + 1
    sides = [x.double().cpu()[part] for part in (a, n) for x in (p1, p0)]
    pc = polar_consistency(*sides).numpy()
    order = sign * np.sign(q[n] - q[a])
    both = torch.stack([p1.double().cpu(), p0.double().cpu()])
    apart = (both[0] - both[1]).abs().numpy()
    decided = float(apart[split.statements(split.train).numpy()].mean())
    columns = {
        "ESA": shown,
        "polar accuracy": (order + 1) / 2,
        "PC": pc,
        "|PC|": np.abs(pc),
        "contradictory": (pc < 0).astype(float),
        "CI": contradiction(*sides).numpy(),
        "decisiveness": (apart[a] + apart[n]) / 2,
    }
    return Reading(esa, float(null.mean()), p_value, trained, decided, agrees, columns)


def orientation(q: Array, pairs: npt.NDArray[np.int64]) -> int:
    """1 where a high score means safe on these pairs, else -1."""
    return 1 if float(np.mean(correct(q, pairs, 1))) >= 0.5 else -1


def correct(q: Array, pairs: npt.NDArray[np.int64], sign: int) -> Array:
    """[len(pairs)]: the share of a pair's two statements that the sign and the score get right; 0.5 where q is 0.5."""
    says_safe = (sign * np.sign(q - 0.5) + 1) / 2
    return np.asarray((1 - says_safe[2 * pairs] + says_safe[2 * pairs + 1]) / 2)


def folded_null(right: Array, permutations: int, seed: int) -> Array:
    """ESA where the labels are swapped within pairs at random, [permutations]."""
    swapped = np.random.default_rng(seed).random((permutations, len(right))) < 0.5
    accuracy = np.where(swapped, 1 - right, right).mean(1)
    return np.maximum(accuracy, 1 - accuracy)
