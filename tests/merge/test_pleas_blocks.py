"""Splits and block matrices, written out."""

from __future__ import annotations

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.merge.align.permutation import Group, Place, Spec
from trimtab.merge.pleas.blocks import Units, axis_units, block_start, match_scores, padded, split

PERM = torch.tensor([2, 0, 3, 1])


def test_the_worst_matches_stay_apart_in_a_fixed_order() -> None:
    found = split(PERM, torch.tensor([0.9, 0.1, 0.8, 0.3]), 2)
    assert found.a.tolist() == [0, 2, 1, 3, -1, -1]
    assert found.b.tolist() == [2, 3, -1, -1, 0, 1]
    assert found.merged.tolist() == [True, True, False, False, False, False]
    assert found.restore("a").tolist() == [0, 2, 1, 3] and found.restore("b").tolist() == [4, 5, 0, 1]


def test_equal_scores_do_not_keep_more_or_fewer() -> None:
    for separate in range(5):
        assert len(split(PERM, torch.ones(4), separate)) == 4 + separate
    with pytest.raises(UsageError, match="between 0 and 4"):
        split(PERM, torch.ones(4), 5)


def test_nothing_apart_is_a_permutation_and_everything_is_both() -> None:
    none, every = split(PERM, torch.rand(4), 0), split(PERM, torch.rand(4), 4)
    assert none.a.tolist() == [0, 1, 2, 3] and none.b.tolist() == PERM.tolist()
    assert every.a.tolist() == [0, 1, 2, 3, -1, -1, -1, -1] and every.b.tolist() == [-1, -1, -1, -1, *PERM.tolist()]


def test_the_papers_table_of_blocks() -> None:
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    rows = split(torch.tensor([1, 2, 0]), torch.tensor([3.0, 1.0, 2.0]), 1)  # merged 0, 2; apart 1 of A, 2 of B
    columns = split(PERM, torch.tensor([0.9, 0.1, 0.8, 0.3]), 2)
    ra, rb, ca, cb = torch.tensor([0, 2]), torch.tensor([1, 0]), torch.tensor([0, 2]), torch.tensor([2, 3])
    own_a, own_b = torch.tensor([1, 3]), torch.tensor([0, 1])
    expected = torch.zeros(4, 6, dtype=torch.float64)
    expected[:2, :2] = (a[ra][:, ca] + b[rb][:, cb]) / 2
    expected[:2, 2:4], expected[:2, 4:] = a[ra][:, own_a] / 2, b[rb][:, own_b] / 2
    expected[2, :2], expected[2, 2:4] = a[1, ca], a[1, own_a]
    expected[3, :2], expected[3, 4:] = b[2, cb], b[2, own_b]
    assert torch.equal(block_start(a, b, [rows, columns]), expected)
    # A weight stored [in, out] has the same blocks the other way round.
    assert torch.equal(block_start(a.T, b.T, [columns, rows], out_axis=1), expected.T)
    vector = block_start(a[:, 0], b[:, 0], [rows])
    assert torch.equal(vector, torch.stack([(a[0, 0] + b[1, 0]) / 2, (a[2, 0] + b[0, 0]) / 2, a[1, 0], b[2, 0]]))


def test_fused_and_flattened_places() -> None:
    """[fixed, fixed, gate, gate, up, up] with blocks of two positions a unit at another place."""
    group = Group("g", 2, (Place("fused", 0, 2), Place("fused", 0, 4), Place("flat", 1, 0, 2)))
    wide = {"g": split(torch.tensor([1, 0]), torch.tensor([1.0, 2.0]), 1)}  # merged (1, 0); apart 0 of A, 1 of B
    fused = axis_units(Spec((group,)), wide, {}, "fused", 0, 6)
    assert fused.a.tolist() == [0, 1, 3, 2, -1, 5, 4, -1] and fused.b.tolist() == [0, 1, 2, -1, 3, 4, -1, 5]
    flat = axis_units(Spec((group,)), wide, {}, "flat", 1, 4)
    assert flat.a.tolist() == [2, 3, 0, 1, -1, -1] and flat.b.tolist() == [0, 1, -1, -1, 2, 3]
    assert axis_units(Spec((group,)), wide, {}, "other", 0, 3).a.tolist() == [0, 1, 2]
    kept = axis_units(Spec((group,)), {}, {"g": torch.tensor([1, 0])}, "flat", 1, 4)
    assert kept.a.tolist() == [0, 1, 2, 3] and kept.b.tolist() == [2, 3, 0, 1]


def test_a_widened_group_shares_its_places_with_nobody() -> None:
    outer, inner = Group("o", 2, (Place("t", 0, 0, 2),)), Group("i", 2, (Place("t", 0),), after="o")
    with pytest.raises(UsageError, match="group 'o' shares its units"):
        axis_units(Spec((outer, inner)), {"o": split(torch.arange(2), torch.rand(2), 1)}, {}, "t", 0, 4)


def test_zero_units_have_zero_weights() -> None:
    wide = padded(Units.fixed(2), 4)
    assert wide.a.tolist() == wide.b.tolist() == [0, 1, -1, -1] and len(padded(wide, 3)) == 4
    ones = torch.ones(2, 3)
    assert block_start(ones, ones, [wide, None]).tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3, [0.0] * 3]


def test_match_scores_are_inner_products_over_all_places() -> None:
    spec = Spec((Group("h", 2, (Place("in", 0), Place("bias", 0), Place("out", 1), Place("n.running_var", 0))),))
    draw = lambda: {  # noqa: E731
        "in": torch.randn(2, 3), "bias": torch.randn(2), "out": torch.randn(4, 2), "n.running_var": torch.rand(2),
    }  # fmt: skip
    a, b = draw(), draw()
    found = match_scores(spec, {"h": torch.tensor([1, 0])}, a, b)["h"]
    for i, j in ((0, 1), (1, 0)):
        expected = a["in"][i] @ b["in"][j] + a["bias"][i] * b["bias"][j] + a["out"][:, i] @ b["out"][:, j]
        assert float(found[i]) == pytest.approx(float(expected), abs=1e-5)
