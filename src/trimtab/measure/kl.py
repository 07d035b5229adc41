"""The bound on how far best-of-n is from its base, in nats. Divergences of distributions: `trimtab.divergence`."""

from __future__ import annotations

import math

from trimtab.errors import UsageError


def best_of_n_bound(n: int) -> float:
    """log n - (n - 1) / n nats *per answer*: an upper bound on KL(best-of-n || base), tight where answers rarely tie.

    Per token, divide by the mean number of tokens of an answer. Beirami et al. 2024 (arXiv 2401.01879) prove the bound.
    """
    if n < 1:
        raise UsageError(f"best-of-n needs n >= 1, not {n}")
    return math.log(n) - (n - 1) / n
