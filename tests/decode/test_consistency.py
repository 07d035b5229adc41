"""CoRE's weights: the worked example, the limits, the anchor."""

from __future__ import annotations

import pytest
import torch

from trimtab.decode.consistency import FILTERS, average, consistent, model_weights, rbf, token_consistency

Q = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.5, 0.4, 0.1, 0.0], [0.05, 0.05, 0.1, 0.8]], dtype=torch.float64)


def test_worked_example() -> None:
    """The specification's figures, to their four digits; P is theirs divided by its sum, 0.8733."""
    s = token_consistency(Q)
    w = model_weights(Q, s)
    filtered = s * (s != 0).sum(-1, keepdim=True) / s.sum(-1, keepdim=True)
    torch.testing.assert_close(w, torch.tensor([0.5, 0.2228, 0.2772]).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(filtered[2], torch.tensor([0.7613, 1.0772, 1.7410, 0.4205]).double(), atol=1e-4, rtol=0)
    p = torch.tensor([0.4137, 0.2411, 0.1254, 0.0932]).double()
    torch.testing.assert_close(consistent(Q)[0], p / p.sum(), atol=2e-4, rtol=0)
    torch.testing.assert_close(average(Q)[0][3], torch.tensor(0.2667).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("members", [1, 2, 5])
def test_identical_members_are_the_member(name: str, members: int) -> None:
    q = torch.rand(7, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = q / q.sum(-1, keepdim=True)
    fused, weights = consistent(q.expand(members, 7, 40), name)
    torch.testing.assert_close(fused, q, atol=1e-12, rtol=0)
    torch.testing.assert_close(weights.sum(0), torch.ones(7).double(), atol=1e-12, rtol=0)


def test_a_flat_rbf_is_linear() -> None:
    d = torch.linspace(0, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(rbf(d, 1e-6), 1 - d, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FILTERS)
def test_filters_fall_from_agreement(name: str) -> None:
    d = torch.linspace(0, 1, 50, dtype=torch.float64)
    values = FILTERS[name](d)
    assert bool((values.diff() <= 1e-12).all()) and float(values[0]) > 0.9


def test_the_assistants_never_outvote_a_sure_main_model() -> None:
    """w_0 >= 1/2 over 10,000 random triples of distributions."""
    q = torch.distributions.Dirichlet(torch.full((12,), 0.2, dtype=torch.float64))
    torch.manual_seed(0)
    drawn = q.sample((3, 10_000))
    assert float(consistent(drawn)[1][0].min()) >= 0.5 - 1e-9


def test_more_disagreement_never_raises_a_token() -> None:
    d = torch.rand(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name in ("rbf", "linear", "power", "sigmoid"):
        assert bool((FILTERS[name](d + 0.1 * (1 - d)) <= FILTERS[name](d) + 1e-12).all())


def test_a_certain_member_takes_no_more_than_its_floor_allows() -> None:
    """Entropy 0 would make its weight 1e12 of the others'; the anchor and the floor leave it at most 1/2."""
    q = torch.tensor([[0.4, 0.3, 0.3], [0.0, 0.0, 1.0], [0.3, 0.4, 0.3]], dtype=torch.float64)
    _, weights = consistent(q)
    assert float(weights[0]) >= 0.5 and float(weights[1]) < 0.5
