"""R-TSVM (RESM): TSVM whose tasks have a strength by their outliers and a rank by their density.

    tau_t = mean |d_t| + outlier * std |d_t|;   a_t = sum of |d_t| above tau_t
    omega_t = T a_t / sum_s a_s                         (1 each where no change has outliers);   d_t <- omega_t d_t
    s_t = the share of |d_t| below sparse * max |d_t|
    k_t = round(floor(r / T) (1 - s_t) / mean_u (1 - s_u)), from 1 to r; the largest are lowered until sum_t k_t <= r
    then as TSVM, with omega_t d_t and k_t

Yang et al. 2025, arXiv 2502.06876 (v1 and v2 call it R-TSVM, v3 RESM), for helpfulness, honesty and harmlessness. There
is no published code, and the formulas above are our reading of "outlier weighting" and "sparsity-adaptive rank":
reasonable, in the paper's spirit, and not known to be the paper's. Both are relative to the mean over tasks, so that
tasks which are alike in both respects give TSVM. A model's own weight is applied after omega is found. std is the
population's; round is to even; of equal ranks the first is lowered. A change that is all zero is wholly sparse and
keeps none. Everything else, null directions and tensors that are no matrices included, is TSVM's.

Cost: TSVM's, and four reductions an entry. deltas T x [rows, columns].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trimtab.errors import UsageError
from trimtab.merge.method import merge_card
from trimtab.merge.methods.tsvm import Tsvm, TsvmConfig

CARD = merge_card(
    slug="r-tsvm",
    name="R-TSVM (RESM)",
    paper="Mix data or merge models, arXiv 2502.06876",
    summary="TSVM with each change scaled by its outliers and given a rank by its density, matrix by matrix.",
    needs=("two or more fine-tunes", "the base they share"),
    fit_cost="T + 2 singular value decompositions of every matrix: some two hours of one core a billion weights",
    limits=(
        "our reading of a paper without code",
        "the model that moved furthest is scaled up: tasks of unequal strength become more so",
    ),
    conflicts=("align",),
    status=("implemented", "verified_cpu"),
    example="trimtab merge r-tsvm --models helpful honest harmless --base BASE --out merged",
    choose="Where you would take TSVM and the fine-tunes differ in which layers they changed.",
)


@dataclass(frozen=True)
class RTsvmConfig(TsvmConfig):
    # standard deviations above the mean from which an entry is an outlier
    outlier: float = 3.0
    # the share of the largest entry below which an entry counts as zero
    sparse: float = 1e-3


class RTsvm(Tsvm):
    """See the module."""

    slug = "r-tsvm"
    Config = RTsvmConfig

    def check(self, parents: int) -> None:
        super().check(parents)
        for key in ("outlier", "sparse"):
            if not getattr(self.config, key) >= 0:
                raise UsageError(f"r-tsvm: {key} must be 0 or more, not {getattr(self.config, key):g}")

    def shares(self, deltas: Sequence[Tensor]) -> tuple[list[float], list[int]]:
        masses, dense = [], []
        for delta in deltas:
            sizes = delta.abs().double()
            masses.append(outlier_mass(sizes, self.config.outlier))
            dense.append(1.0 - sparsity(sizes, self.config.sparse))
        total = sum(masses)
        factors = [len(deltas) * mass / total for mass in masses] if total > 0 else [1.0] * len(deltas)
        return factors, ranks(dense, min(deltas[0].shape))


def outlier_mass(sizes: Tensor, outlier: float) -> float:
    """The sum of the sizes (0 or more) that lie more than `outlier` standard deviations above their mean."""
    return float(sizes[sizes > sizes.mean() + outlier * sizes.std(correction=0)].sum())


def sparsity(sizes: Tensor, sparse: float) -> float:
    """The share of the sizes below `sparse` times the largest; 1 where all are zero."""
    most = sizes.max()
    return float((sizes < sparse * most).double().mean()) if most > 0 else 1.0


def ranks(dense: Sequence[float], full: int) -> list[int]:
    """How many singular triples each task keeps: in proportion to its share of dense entries, `full` in all at most.

    dense: one a task, in [0, 1]; full: at least as many as there are tasks.
    """
    mean = sum(dense) / len(dense)
    if not mean:
        return [0] * len(dense)
    kept = [min(full, max(int(one > 0), round(full // len(dense) * one / mean))) for one in dense]
    while sum(kept) > full:
        kept[kept.index(max(kept))] -= 1
    return kept
