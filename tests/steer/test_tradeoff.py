"""The laws against exact computations, their fits, and the recommender on curves that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recompute import PROMPTS
from tiny import WORDS, tiny_lm
from trimtab.errors import UsageError
from trimtab.steer import SteeringVector
from trimtab.steer.laws import behaviour_law, capability_law, fit_behaviour, fit_quadratic, symmetrised
from trimtab.steer.tradeoff import Choice, Curve, balance, multiple_choice, trade_off

torch.set_num_threads(1)
NONE = np.zeros(0)


# behaviour


def unembedding_only(c: float, delta: float, start: float) -> float:
    """B(c) of a model that is one unembedding W [2, 1] with logits +-x: two answers, + and -."""
    x = np.arctanh(start) + delta * c
    p = np.exp([x, -x]) / np.exp([x, -x]).sum()
    return float(p[0] - p[1])


def test_the_tanh_law_is_exact():
    exact = [unembedding_only(c, 0.7, -0.9) for c in (1, 2, 3)]
    assert behaviour_law([1, 2, 3], 0.7, -0.9) == pytest.approx(exact, abs=1e-12)
    assert exact == pytest.approx([-0.64822, -0.07209, 0.55652], abs=5e-6)


def test_the_fit_recovers_the_tanh():
    c = np.linspace(-4, 6, 21)
    fit = fit_behaviour(c, behaviour_law(c, 0.7, -0.9))
    assert fit.delta.mean == pytest.approx(0.7, abs=1e-3) and fit.start == pytest.approx(-0.9, abs=1e-3)
    assert fit.r2 > 1 - 1e-9 and fit.delta.low is None  # one prompt has no interval

    noise = np.random.default_rng(0).normal(0, 0.05, (len(c), 40))
    many = fit_behaviour(c, np.clip(behaviour_law(c, 0.7, -0.5)[:, None] + noise, -1, 1), seed=1)
    assert many.delta.low < many.delta.mean < many.delta.high < many.delta.low + 0.1
    assert many.delta.mean == pytest.approx(0.7, abs=0.05)  # clipping costs a little


def test_behaviour_must_lie_between_minus_one_and_one():
    with pytest.raises(UsageError, match=r"\[-1, 1\]"):
        fit_behaviour([-1, 0, 1], [0, 0.5, 1.2])


# capability


def vocabulary(c: float, x: np.ndarray, p0: float) -> float:
    """Exact p(c): one right answer, wrong ones of equal probability whose logits move by c x."""
    return float(p0 / (p0 + (1 - p0) * np.exp(c * x).mean()))


def test_the_quadratic_law():
    p0, sigma = 0.6, 0.8
    x = np.random.default_rng(0).normal(0, sigma, 200_000)
    assert capability_law([0.5, 2.0], p0, sigma) == pytest.approx([0.5807, 0.2943], abs=5e-5)
    assert p0 - p0 * (1 - p0) * sigma**2 * 0.5**2 / 2 == pytest.approx(0.5808, abs=5e-5)
    # the mean of e^{cx} over 200k draws has a relative deviation of 0.1 % at c = 0.5 and 0.8 % at c = 2
    assert vocabulary(0.5, x, p0) == pytest.approx(0.5801, abs=1e-3)
    assert vocabulary(2.0, x, p0) == pytest.approx(0.2905, abs=6e-3)

    c = np.linspace(-0.5, 0.5, 11)
    fit = fit_quadratic(c, [vocabulary(value, x, p0) for value in c], symmetric=True)
    assert fit.k2.mean == pytest.approx(-p0 * (1 - p0) * sigma**2 / 2, rel=0.03)
    assert fit.c_max == 0.5 and fit.k1.mean == 0 and fit.a == pytest.approx(p0, abs=1e-3)


def test_single_questions_have_a_linear_term_that_both_signs_cancel():
    generator = np.random.default_rng(1)
    c = np.linspace(-0.5, 0.5, 11)
    slopes = generator.normal(0, 0.1, 60)
    values = 0.6 + np.outer(c, slopes) - 0.08 * c[:, None] ** 2
    one = fit_quadratic(c, values[:, 0])
    assert one.k1.mean == pytest.approx(slopes[0], abs=1e-9) and one.k2.mean == pytest.approx(-0.08, abs=1e-9)
    both, averaged = symmetrised(c, values)
    assert both.min() == 0 and averaged == pytest.approx(np.repeat((0.6 - 0.08 * both**2)[:, None], 60, 1))
    noisy = fit_quadratic(c, values + generator.normal(0, 0.01, values.shape), symmetric=True)
    assert noisy.k2.low < -0.08 < noisy.k2.high < 0


def test_the_range_of_the_quadratic_is_chosen_or_given():
    c = np.linspace(-1, 1, 21)
    assert fit_quadratic(c, 1 - c**2).c_max == 1 and fit_quadratic(c, 1 - c**2, c_max=0.4).c_max == 0.4
    with pytest.raises(UsageError, match="at least 3 strengths"):
        fit_quadratic(c, 1 - c**2, c_max=0.05)
    with pytest.raises(UsageError, match="measure each strength at both"):
        symmetrised([0, 1, 2], [0, 1, 2])
    with pytest.raises(UsageError, match="must differ"):
        fit_quadratic([0, 1, 1], [0, 1, 2])


# the recommendation


def known_curve(items: int = 200, loss: float = 0.02) -> Curve:
    c = np.arange(-3, 4.0)
    noise = np.random.default_rng(0).normal(0, 1e-3, (len(c), items))
    behaviour = np.repeat(behaviour_law(c, 0.4, -0.2)[:, None], 30, 1) + noise[:, :30]
    return Curve(c, behaviour, 0.8 - loss * c[:, None] ** 2 + noise, NONE, NONE, NONE, NONE)


def test_the_largest_strength_within_the_tolerance_is_recommended():
    found = known_curve(loss=0.004).recommend(tolerance=0.02)
    assert found.strength == 2 and found.drop.high <= 0.02 and found.gain.low > 0 and not found.notes
    assert known_curve(loss=0.004).recommend(tolerance=0.02, sign=-1).strength == -2
    assert known_curve(loss=0.004).recommend(tolerance=0.005).strength == 1
    assert known_curve(loss=0.02).recommend(weight=1.0).strength == 3
    assert known_curve(loss=0.2).recommend(weight=1.0).strength == 1


def test_where_nothing_is_good_enough_the_recommendation_is_zero_and_says_so():
    found = known_curve(loss=0.1).recommend()
    assert found.strength == 0 and found.notes == (
        "no strength of the grid stays within the tolerance: try smaller ones",
    )


def test_few_items_cannot_resolve_a_small_drop():
    found = known_curve(items=30, loss=0.004).recommend()
    assert any(
        "30 capability items cannot resolve a 2-point drop (interval of the drop: 0.0" in note for note in found.notes
    )


# measurements on a model


def test_measurements_are_the_models_own_probabilities():
    lm = tiny_lm(num_hidden_layers=3)
    vector = SteeringVector.from_vectors({1: torch.randn(32, generator=torch.Generator().manual_seed(0))}, 3)
    plus, minus = lm.tokenizer.convert_tokens_to_ids(["ba", "be"])
    for control in (None, vector):
        with torch.no_grad():
            ids = torch.tensor(lm.encode(PROMPTS[:1]))
            if control is None:
                logits = lm.model(ids).logits[0, -1]
            else:
                with control.attached(lm.model):
                    logits = lm.model(ids).logits[0, -1]
        p = logits.softmax(-1)
        expected = float((p[plus] - p[minus]) / (p[plus] + p[minus]))
        assert balance(PROMPTS, "ba", "be")(lm, control)[0] == pytest.approx(expected, abs=1e-5)
        assert balance(PROMPTS, [plus], [minus])(lm, control)[0] == pytest.approx(expected, abs=1e-5)
        items = [Choice(prompt, ("ba", "be", "bi"), 1) for prompt in PROMPTS]
        shares = logits[lm.tokenizer.convert_tokens_to_ids(["ba", "be", "bi"])].softmax(-1)
        assert multiple_choice(items)(lm, control)[0] == pytest.approx(float(shares[1]), abs=1e-5)
        assert multiple_choice(items, accuracy=True)(lm, control)[0] == float(shares.argmax() == 1)
    with pytest.raises(UsageError, match="item 0: two options begin with the same token"):
        multiple_choice([Choice("ba", ("be fa", "be"), 0)])(lm, None)


def test_the_curve_runner_measures_norms_noise_and_perplexity():
    lm = tiny_lm(num_hidden_layers=3)
    vector = SteeringVector.from_vectors({2: torch.randn(32, generator=torch.Generator().manual_seed(0))}, 3)
    texts = [" ".join(WORDS[i : i + 8]) for i in range(0, 24, 4)]
    measures = balance(PROMPTS, "ba", "be"), multiple_choice([Choice(p, ("ba", "be"), 0) for p in PROMPTS])
    curve = trade_off(lm, vector, (-0.2, -0.1, 0.1, 0.2, 400), *measures, texts)
    assert curve.strengths.tolist() == [-0.2, -0.1, 0, 0.1, 0.2, 400] and curve.nll.shape == (6, len(texts))
    row = lm.encode(texts[:1])[0]
    own = lm.model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
    assert curve.nll[2, 0] == pytest.approx(-float(own.gather(-1, torch.tensor(row[1:])[:, None]).mean()), abs=1e-4)
    assert curve.change[2] == curve.noise[2] == 0 and curve.norm_ratio[2] == 1
    # linear in |c| while small, on either side
    assert curve.change[4] / curve.change[3] == pytest.approx(2, rel=0.1)
    assert curve.noise[0] / curve.noise[1] == pytest.approx(2, rel=0.1)
    assert any("strength 400" in warning for warning in curve.warnings)
    assert [row["strength"] for row in curve.table()] == curve.strengths.tolist()
