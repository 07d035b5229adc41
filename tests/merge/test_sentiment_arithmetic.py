"""Task arithmetic on a real language model: fine-tunes of stories260k for happy and for sad stories, added and negated.

Baseline: the same figures of unmerged models and of the base, drawn with the same random numbers. A method that ignored its
weights, or the base, would give equal sentiments along a path, and every check below would fail.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trimtab import LM, Sampling
from trimtab.measure.stats import paired_difference, swap_test
from trimtab.merge.engine import run
from trimtab.merge.recipe import Recipe
from trimtab.prompt.tuning import save, sft
from trimtab.rewards import parse_reward

OPENINGS = ["Once upon a time", "One day", "Lily and Tom", "There was a little boy", "The sun was", "A big dog"]
DRAWN, KEPT, MEASURED = 600, 150, 128

Sentiment = Callable[[list[str], list[float]], np.ndarray]


@pytest.fixture(scope="module")
def sentiment(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Sentiment:
    """(parents, weights) -> the sentiment of the merge's stories, one value a row; rows share their random numbers."""
    pytest.importorskip("vaderSentiment")
    folder = tmp_path_factory.mktemp("sentiment")
    lm, vader = LM.load(stories260k), parse_reward("sentiment")
    openings = (OPENINGS * (DRAWN // len(OPENINGS)))[:DRAWN]
    stories = lm.generate(openings, Sampling(max_new_tokens=48, seed=1))
    order = np.argsort(vader(openings, stories.texts), kind="stable")
    for name, rows in (("sad", order[:KEPT]), ("happy", order[-KEPT:])):
        save(sft(lm, [(openings[i], stories.texts[i]) for i in rows], epochs=2), folder / name)
    known: dict[str, np.ndarray] = {}

    def measure(parents: list[str], weights: list[float]) -> np.ndarray:
        key = f"{parents}{weights}"
        if key not in known:
            out = folder / f"merge-{len(known)}"
            run(
                Recipe("task-arithmetic", tuple(str(folder / one) for one in parents), str(stories260k), weights),
                out,
                1,
            )
            asked = (OPENINGS * (1 + MEASURED // len(OPENINGS)))[:MEASURED]
            known[key] = vader(asked, LM.load(out).generate(asked, Sampling(max_new_tokens=48, seed=7)).texts)
        return known[key]

    return measure


def check_higher(more: np.ndarray, less: np.ndarray) -> None:
    """The paired difference is above 0 with its interval, and by the exchange test (2.5 % each way)."""
    found, p_value = paired_difference(more, less), swap_test(more - less)
    assert found.low is not None and found.low > 0 and p_value is not None and p_value < 0.05, (found, p_value)


def test_from_sad_to_happy_the_sentiment_rises_all_the_way(sentiment: Sentiment) -> None:
    path = [sentiment(["happy", "sad"], [share, 1 - share]) for share in (0.0, 0.5, 1.0)]
    check_higher(path[1], path[0])
    check_higher(path[2], path[1])


def test_the_negated_vector_reverses_it(sentiment: Sentiment) -> None:
    base = sentiment(["happy"], [0.0])
    check_higher(sentiment(["happy"], [1.0]), base)
    check_higher(base, sentiment(["happy"], [-1.0]))  # less of what was never trained against


def test_happy_less_sad_goes_beyond_happy(sentiment: Sentiment) -> None:
    check_higher(sentiment(["happy", "sad"], [1.0, -1.0]), sentiment(["happy"], [1.0]))
