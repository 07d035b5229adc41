"""Semantic entropy and opinion distances: closed forms."""

from __future__ import annotations

import math

import pytest

from trimtab.errors import UsageError
from trimtab.measure.spread import by_group, clusters, opinion_distance, semantic_entropy


def test_four_equal_clusters_and_one() -> None:
    assert semantic_entropy(["a b", "c", "d", "e"] * 3) == pytest.approx(math.log(4), abs=1e-12)
    assert semantic_entropy(["Yes.", "yes", "YES!"]) == 0.0 and semantic_entropy(["one"]) is None


def test_alike_both_ways() -> None:
    assert clusters(["The cat.", "a cat", "dog"]) == [0, 0, 1]
    # "the longer implies the shorter" holds one way only: no cluster
    assert clusters(["cats", "big cats"], lambda a, b: b in a) == [0, 1]


def test_opinions() -> None:
    assert opinion_distance([1, 0], [0, 1]) == 1.0 and opinion_distance([2, 6], [0.25, 0.75]) == 0.0
    # JS((1, 0), (1/2, 1/2)) = (log(4/3) + (log(2/3) + log 2) / 2) / 2
    expected = (math.log(4 / 3) + (math.log(2 / 3) + math.log(2)) / 2) / 2 / math.log(2)
    assert opinion_distance([1, 0], [0.5, 0.5]) == pytest.approx(math.sqrt(expected), abs=1e-12)
    assert by_group([1, 0], {"a": [1, 0], "b": [0, 1]}) == {"a": 0.0, "b": 1.0}
    with pytest.raises(UsageError, match="same options"):
        opinion_distance([1, 0], [1, 0, 0])
    with pytest.raises(UsageError, match="not negative"):
        opinion_distance([-1, 2], [1, 0])
