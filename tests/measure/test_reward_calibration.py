"""Calibration: planted temperatures and slopes come back, closed forms, and what a probability is refused for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import UsageError
from trimtab.measure import reward_calibration as calibration
from trimtab.rewards import Calibrated, Calibration, Function, Length, parse_reward, preference, probability


def planted(seed: int, count: int = 20_000, scale: float = 3.0) -> np.ndarray:
    """Differences, preferred minus other, of a reward that is the true log-odds times `scale`."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 1.5, count)
    first = generator.random(count) < 1 / (1 + np.exp(-logits))
    return np.asarray(scale * logits * np.where(first, 1, -1))


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_temperature_comes_back(seed: int) -> None:
    """T = 3: its standard error is 0.033 with 40,000 pairs to fit on, so 0.1 is three of them. Judged on 20,000 others."""
    d = planted(seed, 60_000)
    fit, held_out = d[:40_000], d[40_000:]
    t = calibration.fit_temperature(fit)
    assert t == pytest.approx(3, abs=0.1)
    before = calibration.quality(*calibration.confidence(held_out))
    after = calibration.quality(*calibration.confidence(held_out, t))
    assert before.ece > 0.1 and after.ece < 0.02
    assert after.nll < before.nll and after.brier < before.brier and after.accuracy == before.accuracy


def test_the_temperature_of_two_numbers_is_exact() -> None:
    """Three of four pairs of distance 2 in the right order: sigmoid(2 / T) = 3/4, so T = 2 / log 3."""
    assert calibration.fit_temperature([2, 2, 2, -2]) == pytest.approx(2 / math.log(3), abs=1e-9)


def test_the_interval_of_a_temperature_covers() -> None:
    """95% +- three standard errors of 200 runs, the pairs of a prompt being copies of one another."""
    hits = 0
    for seed in range(200):
        d, prompts = np.repeat(planted(seed, 300), 3), np.repeat(np.arange(300), 3).tolist()
        low, high = calibration.temperature_interval(d, prompts, calibration.fit_temperature(d))
        hits += low is not None and low < 3 and (high is None or high > 3)
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / 200) <= hits / 200


@pytest.mark.parametrize(
    ("differences", "says"),
    [([-1, -2, 1], "wrong way round"), ([0, 0], "wrong way round"), ([1, 2], "ever more confidence"), ([], "one row"),
     ([1, math.nan], "finite")],
)  # fmt: skip
def test_no_temperature(differences: list[float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        calibration.fit_temperature(differences)


def test_platt_and_isotonic() -> None:
    generator = np.random.default_rng(0)
    r = generator.normal(2, 3, 20_000)
    labels = (generator.random(len(r)) < 1 / (1 + np.exp(-(0.7 * r - 1)))).astype(float)
    slope, intercept = calibration.fit_platt(r, labels)
    assert slope == pytest.approx(0.7, abs=0.04) and intercept == pytest.approx(-1, abs=0.09)  # three standard errors
    assert calibration.fit_platt([0, 1], [0, 1])[0] > 0  # separable: finite all the same
    x, y = calibration.fit_isotonic(r, labels)
    assert np.all(np.diff(x) > 0) and np.all(np.diff(y) >= 0)
    grid = np.linspace(-3, 7, 50)
    assert np.abs(np.interp(grid, x, y) - 1 / (1 + np.exp(-(0.7 * grid - 1)))).max() < 0.06
    # by hand: the violators 1, 0 at 2 and 3 pool to 1/2; equal scores are one point
    assert calibration.fit_isotonic([1, 2, 3, 4, 4], [0, 1, 0, 1, 1]) == ([1, 2, 3, 4], [0, 0.5, 0.5, 1])
    for broken in ([0.0, 0.0], [0.0, 2.0]):
        with pytest.raises(UsageError, match="both labels"):
            calibration.fit_platt([1, 2], broken)


def test_quality_by_hand() -> None:
    found = calibration.quality([0.6, 0.6, 0.9, 0.9], [1, 0, 1, 1], bins=2)
    assert found.accuracy == 0.75
    assert found.brier == pytest.approx((0.16 + 0.36 + 0.01 + 0.01) / 4, abs=1e-12)
    assert found.nll == pytest.approx(-(math.log(0.6) + math.log(0.4) + 2 * math.log(0.9)) / 4, abs=1e-12)
    assert found.ece == pytest.approx((0.1 + 0.1) / 2, abs=1e-12)
    assert [(round(mean, 9), share, rows) for mean, share, rows in found.bins] == [(0.6, 0.5, 2), (0.9, 1, 2)]
    assert calibration.quality(*calibration.confidence([0.0, 0.0])).accuracy == 0.5  # ties are half right


def test_each_half_is_judged_by_the_other() -> None:
    """A pair told to be right in one half and wrong in the other would look calibrated only to a fit on itself."""
    d = planted(0, 3000)
    reward = Length(target=3)
    found, p, right, prompts = calibration.fitted("temperature", reward, d, np.zeros(len(d)), list(range(len(d))))
    assert found.values["temperature"] == pytest.approx(3, abs=0.35)
    assert len(p) == len(d) == len(prompts) and right.mean() == pytest.approx((d > 0).mean())
    used = {round(float(abs(x) / math.log(q / (1 - q))), 6) for x, q in zip(d, p, strict=True) if 0.51 < q < 0.99}
    assert len(used) == 2 and round(found.values["temperature"], 6) not in used
    with pytest.raises(UsageError, match="cannot be halved"):
        calibration.fitted("temperature", reward, d[:9], np.zeros(9), [0] * 9)


def test_a_calibrated_reward(tmp_path: Path) -> None:
    reward = Length(target=4)
    found = calibration.calibrate_pairs(reward, [2, 2, 2, -2], {"nll": 0.5})
    found.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == found
    calibrated = parse_reward(f"calibrated:file={tmp_path / 'c.json'}")
    raw = reward.score(["p", "p"], ["a b c d", "a"])
    scaled = [r * math.log(3) / 2 for r in raw if r is not None]
    assert calibrated.score(["p", "p"], ["a b c d", "a"]) == pytest.approx(scaled)
    # -0 against -0.75: sigmoid(0.75 log(3) / 2)
    expected = 1 / (1 + 3 ** (-0.75 / 2))
    assert preference(calibrated, ["p"], ["a b c d"], ["a"]) == [pytest.approx(expected)]
    assert preference(calibrated, ["p"], ["a"], ["a b c d"]) == [pytest.approx(1 - expected)]
    with pytest.raises(UsageError, match="differs from it in weights or options"):
        parse_reward(f"calibrated:file={tmp_path / 'c.json'},reward=length:target=5")
    written = {"measurements": [{"details": {"calibration": json.loads((tmp_path / "c.json").read_text())}}]}
    (tmp_path / "measure.json").write_text(json.dumps(written), encoding="utf-8")
    assert parse_reward(f"calibrated:file={tmp_path / 'measure.json'}").fingerprint == calibrated.fingerprint


def test_probabilities_are_refused_without_a_calibration() -> None:
    reward = Length(target=4)
    for kind, ask in ((None, preference), ("platt", preference), (None, probability), ("temperature", probability)):
        made = {
            None: lambda: reward,
            "platt": lambda: Calibrated(calibration.calibrate_platt(reward, [0, 1], [0, 1]), reward),
            "temperature": lambda: Calibrated(calibration.calibrate_pairs(reward, [1, 1, -1]), reward),
        }[kind]()
        with pytest.raises(UsageError, match="is needed"):
            ask(made, ["p"], *([["a"], ["b"]] if ask is preference else [["a"]]))  # type: ignore[operator]


def test_platt_isotonic_and_affine_rewards() -> None:
    reward = Length(target=4)
    platt = Calibrated(calibration.calibrate_platt(reward, [-1, -0.5, 0, 0], [0, 0, 1, 1]), reward)
    bent = Calibrated(calibration.calibrate_isotonic(reward, [-1, -0.5, 0], [0, 0, 1]), reward)
    texts = ["", "a b", "a b c", "a b c d", "a " * 40]
    for made in (platt, bent):
        chances = probability(made, ["p"] * 5, texts)
        assert all(chance is not None and 0 <= chance <= 1 for chance in chances)
    assert probability(bent, ["p"] * 5, texts) == pytest.approx([0, 0, 0.5, 1, 0])
    everywhere = Calibrated(calibration.calibrate_affine(reward, [-1, 0, math.nan]), reward)
    assert everywhere.score(["p"], ["a b"]) == [pytest.approx(0)]
    own = calibration.calibrate_affine(reward, [-1, 0, -0.5, -0.5], ["p", "p", "q", "r"])
    assert Calibrated(own, reward).score(["p", "q"], ["a b c d"] * 2) == [
        pytest.approx(0.5 / np.std([-1, 0], ddof=1)), pytest.approx(0.5 / np.std([-1, 0, -0.5, -0.5], ddof=1)),
    ]  # fmt: skip
    unjudged = Function(lambda prompts, texts: [None] * len(texts), name="none")
    assert Calibrated(calibration.calibrate_affine(unjudged, [1, 2]), unjudged).score(["p"], ["a"]) == [None]
    with pytest.raises(UsageError, match="no scale"):
        calibration.calibrate_affine(reward, [1, 1])


def test_broken_calibrations(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for text in ("", "[]", '{"kind": "platt"}', '{"details": {}}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match="calibration"):
            Calibration.load(path)
    for kind, values in (("temperature", {"temperature": 0}), ("affine", {"mean": 0}), ("platt", {"slope": math.nan})):
        with pytest.raises(UsageError, match="calibration"):
            Calibration(kind, "length", "0", values)  # type: ignore[arg-type]
