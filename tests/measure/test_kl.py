"""Divergence of distributions, and the bound for best-of-n."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from trimtab.divergence import kl_between
from trimtab.errors import UsageError
from trimtab.measure.kl import best_of_n_bound


def test_bound() -> None:
    assert best_of_n_bound(1) == 0.0
    assert best_of_n_bound(8) == pytest.approx(math.log(8) - 7 / 8)
    with pytest.raises(UsageError, match="n >= 1"):
        best_of_n_bound(0)


def test_bound_is_the_divergence_where_nothing_ties() -> None:
    """Best of n among m equally likely answers of distinct reward, enumerated; equal to the bound as m grows."""
    n, m = 4, 20_000
    chances = np.diff((np.arange(m + 1) / m) ** n)
    exact = float(rel_entr(chances, np.full(m, 1 / m)).sum())
    assert exact <= best_of_n_bound(n) and exact == pytest.approx(best_of_n_bound(n), abs=1e-3)


def test_kl_equals_scipy() -> None:
    p, q = (torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(s)).mul(3).log_softmax(-1) for s in (0, 1))
    expected = rel_entr(softmax(p.double().numpy(), -1), softmax(q.double().numpy(), -1)).sum(-1)
    np.testing.assert_allclose(kl_between(p, q), expected, atol=1e-5)
    assert torch.equal(kl_between(p, p), torch.zeros(3, 5))


def test_tokens_of_probability_zero_add_nothing() -> None:
    half, whole = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log()
    assert kl_between(half, whole).item() == pytest.approx(math.log(2))
    assert kl_between(whole, half).item() == math.inf
    assert kl_between(half, half).item() == 0.0
