"""Length correlation: overall it sees the prompts, within prompts it sees the reward."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from trimtab.errors import UsageError
from trimtab.measure.length import length_correlation


def test_overall_is_spearman() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 20, 100)  # with ties
    scores = lengths + rng.normal(0, 5, 100)
    found = length_correlation(scores, lengths)
    assert found.overall == pytest.approx(spearmanr(scores, lengths).statistic) and found.rows == 100


def test_prompts_that_invite_long_answers_are_told_apart() -> None:
    """Longer prompts score higher, but among the answers of one prompt the shorter scores higher."""
    prompts = np.repeat(np.arange(20), 3)
    lengths = prompts * 10 + np.tile([0, 1, 2], 20)
    scores = prompts - 0.1 * np.tile([0, 1, 2], 20)
    found = length_correlation(scores, lengths, prompts)
    assert found.overall is not None and found.overall > 0.95 and found.within_prompt == pytest.approx(-1.0)


def test_undefined_is_none() -> None:
    assert length_correlation([1.0, 1.0, 1.0], [1, 2, 3]).overall is None
    assert length_correlation([1.0, 2.0], [1, 2]).overall is None
    assert length_correlation([1.0, 2.0, 3.0], [1, 2, 3]).within_prompt is None
    none = length_correlation([np.nan] * 3, [1, 2, 3], [0, 0, 0])
    assert none.overall is None and none.within_prompt is None and none.rows == 0
    assert length_correlation([1.0, None, 2.0, 3.0], [1, 9, 2, 3]).overall == pytest.approx(1.0)
    with pytest.raises(UsageError, match="are needed"):
        length_correlation([1.0], [1, 2])
