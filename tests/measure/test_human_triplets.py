"""Human triplets: recovery, likelihoods, Procrustes, choices, orders, noise, nulls, files."""

from __future__ import annotations

from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest, spearmanr

from taught import blank
from trimtab.errors import UsageError
from trimtab.measure import concept_files as files
from trimtab.measure import embedding_scores as scores
from trimtab.measure.diagnostic import Subject
from trimtab.measure.few_clusters import jackknife
from trimtab.measure.human_triplets import HumanTriplets, HumanTripletsConfig
from trimtab.measure.options import option_logprobs
from trimtab.measure.triplet_choices import NOTHING, by_answers, by_samples, named_in, questions
from trimtab.measure.triplets import (
    above_chance,
    agreement,
    ceiling,
    choose,
    cosine,
    draw_triplets,
    fit_embedding,
    log_probabilities,
    scores_of,
)
from trimtab.sampling import Sampling
from trimtab.spec import build

NAMES = ["ant", "bee", "cow", "dog", "elk", "fox"]
WORDING = "odd {a} {b} {c} :"


def distances(z: np.ndarray) -> np.ndarray:
    return -((z[:, None] - z[None]) ** 2).sum(-1)


def one_hot(choices: np.ndarray, options: int = 3) -> np.ndarray:
    return np.where(choices[:, None] == np.arange(options), 1.0, 0.0)


# 1. recovery


def test_recovery_of_an_embedding() -> None:
    """24 concepts in 3 dimensions, all 2,024 choices without noise (0.9988 in the specification)."""
    z = np.random.default_rng(0).normal(size=(24, 3))
    triplets = draw_triplets(24, 5000)
    assert len(triplets) == 2024
    picked = choose(scores_of(distances(z), triplets))
    fit = fit_embedding(triplets, one_hot(picked), 24, 3, held_out=0.0, restarts=2)
    assert fit.accuracy == 1.0
    assert scores.procrustes_r2(z, fit.x) > 0.995
    again = fit_embedding(triplets, one_hot(picked), 24, 3, held_out=0.0, steps=9)
    twice = fit_embedding(triplets, one_hot(picked), 24, 3, held_out=0.0, steps=9)
    assert (again.x == twice.x).all()  # the seed alone decides


def test_spose_fit_is_not_negative_and_learns() -> None:
    z = np.abs(np.random.default_rng(1).normal(size=(16, 3)))
    triplets = draw_triplets(16, 5000)
    picked = choose(scores_of(z @ z.T, triplets))
    fit = fit_embedding(triplets, one_hot(picked), 16, 3, kind="spose", penalty=0.008, steps=400, restarts=2)
    assert (fit.x >= 0).all()
    assert fit.held_out_accuracy is not None and fit.held_out_accuracy > 0.85


# 2. likelihoods


@pytest.mark.parametrize("kind", ["metric", "spose"])
@pytest.mark.parametrize("form", ["odd-one-out", "anchor"])
def test_likelihood_against_brute_force(form: Any, kind: Any) -> None:
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs()
    triplets = draw_triplets(5, 1000, form)
    assert len(triplets) == (10 if form == "odd-one-out" else 30)
    found = log_probabilities(x, torch.from_numpy(triplets), form, kind).exp()
    assert torch.allclose(found.sum(-1), torch.ones(len(triplets), dtype=torch.float64), atol=1e-12)

    def s(i: int, j: int) -> float:
        return float(x[i] @ x[j]) if kind == "spose" else -float(((x[i] - x[j]) ** 2).sum())

    for row, (a, b, c) in enumerate(triplets.tolist()):
        pairs = [(a, b), (a, c)] if form == "anchor" else [(b, c), (a, c), (a, b)]
        weights = np.exp([s(*pair) for pair in pairs])
        assert np.allclose(found[row].numpy(), weights / weights.sum(), atol=1e-12)


def test_gradient_against_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    triplets = torch.from_numpy(draw_triplets(5, 1000))
    x = torch.rand(5, 2, generator=generator, dtype=torch.float64).requires_grad_(True)
    aims = torch.rand(10, 3, generator=generator, dtype=torch.float64)

    def loss(value: torch.Tensor) -> torch.Tensor:
        return -(aims * log_probabilities(value, triplets, "odd-one-out", "metric")).sum(-1).mean()

    (gradient,) = torch.autograd.grad(loss(x), x)
    for i in range(5):
        for j in range(2):
            step = torch.zeros(5, 2, dtype=torch.float64)
            step[i, j] = 1e-5
            slope = float(loss(x.detach() + step) - loss(x.detach() - step)) / 2e-5
            assert float(gradient[i, j]) == pytest.approx(slope, abs=1e-5)


# 3. Procrustes


def test_procrustes_ignores_rotation_scale_and_shift() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(12, 3))
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    q[:, 0] *= -1  # a reflection as well
    assert scores.procrustes_r2(z, 3.7 * z @ q + rng.normal(size=3)) == pytest.approx(1, abs=1e-10)
    assert scores.procrustes_r2(z, np.hstack([z @ q, np.zeros((12, 2))])) == pytest.approx(1, abs=1e-10)
    x = rng.normal(size=(12, 5))
    assert scores.procrustes_r2(z, x) == pytest.approx(scores.procrustes_r2(x, z), abs=1e-12)
    from scipy.spatial import procrustes

    padded = np.hstack([z, np.zeros((12, 2))])
    assert scores.procrustes_r2(z, x) == pytest.approx(1 - procrustes(padded, x)[2], abs=1e-10)
    assert scores.procrustes_r2(z, np.ones((12, 2))) == 0


def test_random_rows_give_their_null() -> None:
    """24 concepts in 3 dimensions: 0.08 on average and 0.16 at the 95 % point, and not 0."""
    rng = np.random.default_rng(0)
    z, x = rng.normal(size=(2, 24, 3))
    null = scores.permutation_null(lambda order: scores.procrustes_r2(z, x[order]), 24)
    fresh = [scores.procrustes_r2(z, rng.normal(size=(24, 3))) for _ in range(1000)]
    assert null.mean == pytest.approx(0.08, abs=0.02) and np.mean(fresh) == pytest.approx(0.08, abs=0.02)
    assert null.high == pytest.approx(0.16, abs=0.03)


# 4. choices


def test_odd_one_out_of_every_triplet() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        s = rng.normal(size=(7, 7))
        s = s + s.T
        triplets = draw_triplets(7, 100)
        for (i, j, k), pick in zip(triplets.tolist(), choose(scores_of(s, triplets)), strict=True):
            kept = max(combinations((i, j, k), 2), key=lambda pair: s[pair])
            (odd,) = {i, j, k} - set(kept)
            assert (i, j, k)[pick] == odd


def test_ties_are_no_choice() -> None:
    assert choose(np.array([[0.5, 0.5, 0.1], [0.1, 0.1, 0.9], [0.0, 0.0, 0.0]])).tolist() == [-1, 2, -1]
    assert np.isnan(agreement(np.array([[1.0, 0, 0]]), np.array([-1]))).all()


def test_triplets_are_balanced_and_different() -> None:
    drawn = draw_triplets(40, 2000, seed=3)
    assert len(np.unique(drawn, axis=0)) == 2000 and (np.diff(drawn, axis=1) > 0).all()
    counts = np.bincount(drawn.reshape(-1), minlength=40)
    assert counts.std() < 6  # of 150 each; independent draws would spread by 12
    assert (draw_triplets(40, 2000, seed=3) == drawn).all()
    anchored = draw_triplets(8, 60, "anchor", seed=0)
    assert (anchored[:, 1] < anchored[:, 2]).all() and len(np.unique(anchored, axis=0)) == 60


# 5. orders


class FirstPlace:
    """A model that likes the first option, whatever it is."""

    name = identity = "first"


def test_liking_a_place_is_chance_after_all_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = blank([*"odd : N/A".split(), *NAMES], seed=0)

    def stub(policy: Any, prompts: Any, options: Any, **_: Any) -> Any:
        return [
            [torch.tensor([-0.1 if prompt.split()[1] == option.strip() else -5.0]) for option in row]
            for prompt, row in zip(prompts, options, strict=True)
        ]

    monkeypatch.setattr("trimtab.measure.triplet_choices.option_logprobs", stub)
    triplets = draw_triplets(6, 100)
    found = by_answers(Subject(lm, "x"), NAMES, triplets, "odd-one-out", WORDING, False, False)
    assert np.allclose(found.p, 1 / 3, atol=1e-12)
    assert (choose(found.p) == -1).all()


def test_scores_are_those_of_the_model_less_the_option_bias() -> None:
    lm = blank([*"odd : N/A".split(), *NAMES], seed=2)
    triplets = draw_triplets(6, 100)[:3]
    plain = by_answers(Subject(lm, "x"), NAMES, triplets, "odd-one-out", WORDING, False, False)
    freed = by_answers(Subject(lm, "x"), NAMES, triplets, "odd-one-out", WORDING, True, False)

    def logp(text: str) -> torch.Tensor:
        return lm.model(torch.tensor([lm.tokenizer(text)["input_ids"]])).logits[0, -1].double().log_softmax(-1)

    empty = logp(WORDING.format(a=NOTHING, b=NOTHING, c=NOTHING))
    for row, triplet in enumerate(triplets.tolist()):
        names = [NAMES[i] for i in triplet]
        ids = lm.tokenizer.convert_tokens_to_ids(names)
        logs = [logp(WORDING.format(a=a, b=b, c=c)) for a, b, c in permutations(names)]
        assert np.allclose(plain.p[row], torch.stack([one[ids].softmax(0) for one in logs]).mean(0), atol=1e-5)
        expected = torch.stack([(one[ids] - empty[ids]).softmax(0) for one in logs]).mean(0)
        assert np.allclose(freed.p[row], expected, atol=1e-5)
        assert plain.mass[row] == pytest.approx(
            float(torch.stack([one[ids].exp().sum() for one in logs]).mean()), abs=1e-6
        )


def test_samples_agree_with_probabilities() -> None:
    """An LM whose answers are the options alone: |p scored - p sampled| < 4 s.e. in every triplet and option."""
    lm = blank([*"odd : N/A".split(), *NAMES[:3]], seed=1, context=32)
    ids = lm.tokenizer.convert_tokens_to_ids(NAMES[:3])
    head = lm.model.lm_head
    with torch.no_grad():
        head.weight.mul_(4)
        head.weight[[i for i in range(len(lm.tokenizer)) if i not in ids]] = 0
        state = lm.model(torch.tensor([lm.tokenizer("odd : :")["input_ids"]]), output_hidden_states=True).hidden_states[
            -1
        ]
        head.weight[ids] += 24 * state[0, -1] / state[0, -1].norm() ** 2  # the options hold nearly all the mass
    subject = Subject(lm, "x", sampling=Sampling(max_new_tokens=1, seed=5))
    triplets = np.array([[0, 1, 2]])
    scored = by_answers(subject, NAMES[:3], triplets, "odd-one-out", WORDING, False, False)
    assert scored.mass[0] > 0.95
    sampled = by_samples(subject, NAMES[:3], triplets, "odd-one-out", WORDING, 400)
    assert sampled.unparsed is not None and sampled.unparsed < 0.05
    spread = np.sqrt(scored.p * (1 - scored.p) / (6 * 400))
    assert (np.abs(scored.p - sampled.p) < 4 * spread + (1 - scored.mass[0])).all()


def test_answers_are_read_by_whole_words() -> None:
    options = ["ant", "elephant", "cow"]
    assert named_in("The ELEPHANT.", options) == 1 and named_in("an ant, not a cow", options) is None
    assert named_in("neither", options) is None and named_in("ants", options) is None
    assert len(questions("odd-one-out", WORDING, NAMES, [0, 1, 2])) == 6
    assert questions("anchor", "{a}: {b} or {c}", NAMES, [0, 1, 2]) == ["ant: bee or cow", "ant: cow or bee"]


# 6. noise


def test_flipped_choices_and_the_noise_ceiling() -> None:
    """Answers flipped with probability 0.2, 15 to each triplet: agreement 0.8, and of what is possible all of it."""
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 3, 2000)
    human = np.zeros((2000, 3))
    for _ in range(15):
        flipped = np.where(rng.random(2000) < 0.2, (clean + rng.integers(1, 3, 2000)) % 3, clean)
        human[np.arange(2000), flipped] += 1
    share = float(np.average(agreement(human, clean), weights=human.sum(1)))
    assert abs(share - 0.8) < 3 * np.sqrt(0.2 * 0.8 / 30000)
    top = ceiling(human)
    assert top is not None and above_chance(share, top, 1 / 3) == pytest.approx(1, abs=0.01)
    assert ceiling(one_hot(clean)) is None and above_chance(0.5, 0.3, 1 / 3) is None


# 7. nulls and false alarms


def test_permutation_p_is_uniform_without_an_effect() -> None:
    rng = np.random.default_rng(0)
    procrustes, mantel = [], []
    for seed in range(100):
        z, x = rng.normal(size=(2, 12, 3))
        procrustes.append(scores.permutation_null(lambda o, z=z, x=x: scores.procrustes_r2(z, x[o]), 12, 99, seed).p)
        a, b = scores.ranks(z @ z.T), scores.ranks(x @ x.T)
        mantel.append(scores.permutation_null(lambda o, a=a, b=b: scores.rsa(a, b[np.ix_(o, o)]), 12, 99, seed).p)
    assert kstest(procrustes, "uniform").pvalue > 0.01
    assert kstest(mantel, "uniform").pvalue > 0.01


def test_rsa_is_spearman_of_the_triangles() -> None:
    rng = np.random.default_rng(0)
    z, x = rng.normal(size=(2, 9, 3)).round(1)  # with ties
    a, b = z @ z.T, x @ x.T
    i, j = np.triu_indices(9, 1)
    found = scores.rsa(scores.ranks(a), scores.ranks(b))
    assert found == pytest.approx(spearmanr(a[i, j], b[i, j]).statistic, abs=1e-12)
    times = np.array([1.0] * 8 + [0.0])  # a resample without the last: Pearson of the ranks of its pairs
    keep = (i < 8) & (j < 8)
    ranked = [scores.ranks(side)[i, j][keep] for side in (a, b)]
    assert scores.rsa(scores.ranks(a), scores.ranks(b), times) == pytest.approx(np.corrcoef(*ranked)[0, 1], abs=1e-12)


def test_a_triplet_counts_as_often_as_a_resample_can_make_it() -> None:
    """Concepts 0, 0, 1, 2: twice 0 1 2, none with 3. No concept three times over can be resampled into a triplet."""
    triplets, agreed = np.array(list(combinations(range(4), 3))), np.array([1.0, 0.0, np.nan, 0.0])
    drawn = np.array([[0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 1, 3], [0, 0, 0, 0]])
    found = scores.weighted_agreement(agreed, triplets, drawn)
    assert found[:3].tolist() == [1 / 3, 1.0, 0.0] and np.isnan(found[3])
    null = scores.permutation_null(lambda order: float((order == np.arange(9)).all()), 9, 99)
    assert null.p == 1 / 100  # never 0


def test_two_equally_good_models_are_rarely_told_apart() -> None:
    """Two models, each the truth and noise of its own at every concept: the intervals of their differences exclude 0 in at
    most 5 % of 200 pairs (plus 2 s.e., 3 points). R2 in 10 dimensions is where a bootstrap was too narrow (8 % of 800)."""
    rng = np.random.default_rng(0)
    triplets = draw_triplets(20, 5000)
    alarms = np.zeros(2)
    for seed in range(200):
        z = rng.normal(size=(20, 8))
        human = one_hot(choose(scores_of(z @ z.T, triplets)))
        one, two = (z + rng.normal(size=z.shape) for _ in range(2))
        sides = [agreement(human, choose(scores_of(x @ x.T, triplets))) for x in (one, two)]
        drawn = scores.resamples(20, 60, seed)
        a, b = (scores.weighted_agreement(side, triplets, drawn) for side in sides)
        gaps = [
            scores.interval(float(sides[0].mean() - sides[1].mean()), a - b, 20),
            jackknife(
                lambda k, z=z, one=one, two=two: (
                    scores.procrustes_r2(z[k], one[k]) - scores.procrustes_r2(z[k], two[k])
                ),
                20,
            ),
        ]
        alarms += [gap.low > 0 or gap.high < 0 for gap in gaps if gap.low is not None and gap.high is not None]
    assert (alarms / 200 <= 0.08).all()


def test_dimension_that_is_needed() -> None:
    """Choices of a world of three dimensions, a tenth of them noise: held-out accuracy plateaus at 3, 1 is far worse."""
    rng = np.random.default_rng(2)
    z = rng.normal(size=(20, 3))
    triplets = draw_triplets(20, 5000)
    picked = choose(scores_of(distances(z), triplets))
    noisy = np.where(rng.random(len(picked)) < 0.1, rng.integers(0, 3, len(picked)), picked)
    found = {
        d: fit_embedding(triplets, one_hot(noisy), 20, d, steps=200, restarts=2).held_out_accuracy or 0.0
        for d in (1, 2, 3, 5, 8)
    }
    assert found[3] - found[1] > 0.1
    assert found[3] > found[2] and found[3] >= max(found.values()) - 0.04


def test_ridge_map() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4))
    assert (scores.ridge_r2(x @ rng.normal(size=(4, 3)), x) or 0) > 0.99
    assert (scores.ridge_r2(rng.normal(size=(60, 3)), x) or 0) < 0.1
    assert scores.ridge_r2(x[:6], x[:6]) is None


# files


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_files_in_any_order_give_the_same_measurement(tmp_path: Path) -> None:
    lm = blank([*"odd : N/A".split(), *NAMES], seed=2)
    config = HumanTripletsConfig(wording=WORDING, dimensions=(2,), steps=20, permutations=20, bootstraps=20)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(6, 3))
    found = []
    for turn in range(2):
        order = rng.permutation(6) if turn else np.arange(6)
        names = written(tmp_path / f"names{turn}.txt", "\n".join(NAMES[i] for i in order))
        rows = written(tmp_path / f"rows{turn}.txt", "\n".join(" ".join(map(str, vectors[i])) for i in order))
        found.append(HumanTriplets(config).measure(Subject(lm, lm.fingerprint, texts=[names, rows])))
    assert found[0].fingerprint == found[1].fingerprint and found[0].table == found[1].table
    triplets = [rng.permutation(6)[:3].tolist() for _ in range(60)]
    found = []
    for turn in range(2):
        lines = [triplets[i] for i in (rng.permutation(60) if turn else range(60))]
        lines = [[b, a, c] if turn else [a, b, c] for a, b, c in lines]  # the two that are kept may change places
        names = written(tmp_path / "names.txt", "\n".join(NAMES))
        rows = written(tmp_path / f"t{turn}.csv", "\n".join(",".join(map(str, row)) for row in lines))
        tool = HumanTriplets(HumanTripletsConfig(wording=WORDING, dimensions=(2,), steps=20, permutations=20,
                                                 bootstraps=20, index_base="0"))  # fmt: skip
        found.append(tool.measure(Subject(lm, lm.fingerprint, texts=[names, rows])))
    assert found[0].fingerprint == found[1].fingerprint and found[0].table == found[1].table


def test_the_odd_one_is_the_last_of_a_row(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "0,2,1\n0,1,2\n2,0,1\n5,4,3\n")
    found = files.read_reference(path, NAMES, NAMES, "detect")
    assert found.triplets is not None and found.human is not None
    assert found.triplets.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found.human.tolist() == [[0, 2, 1], [1, 0, 0]]
    by_name = written(tmp_path / "n.csv", "ant,cow,bee\nant,bee,cow\ncow,ant,bee\nfox,elk,dog\n")
    named = files.read_reference(by_name, NAMES, NAMES, "detect")
    assert named.human is not None and (named.human == found.human).all()


def test_counting_from_0_or_from_1(tmp_path: Path) -> None:
    one = written(tmp_path / "one.csv", "1,3,2\n1,2,3\n6,5,4\n")
    found = files.read_reference(one, NAMES, NAMES, "detect")
    assert found.triplets is not None and found.triplets.tolist() == [[0, 1, 2], [3, 4, 5]]
    unclear = written(tmp_path / "unclear.csv", "1,3,2\n")
    with pytest.raises(UsageError, match="index-base"):
        files.read_reference(unclear, NAMES, NAMES, "detect")
    given = files.read_reference(unclear, NAMES, NAMES, "1")
    assert given.triplets is not None and given.triplets.tolist() == [[0, 1, 2]]
    with pytest.raises(UsageError, match="numbers from 0 to 6"):
        files.read_reference(written(tmp_path / "both.csv", "0,3,6\n"), NAMES, NAMES, "detect")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty"),
        ("1 2\n1 2 3\n", "row 2 has 3 columns"),
        ("1 2\n3 4\n", "shape"),
        ("a b c d\ne f g h\n", "neither an embedding"),
        ("ant,bee,eel\n", "no such name, spelt exactly so: eel"),
        ("\n".join(f"{name} 1 2" for name in [*NAMES[:5], "Fox"]), "spelt exactly so: fox"),
        ("ant,bee,bee\n", "one concept twice"),
        ("a b\nc d\n", "neither an embedding"),
    ],
)
def test_bad_references(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        files.read_reference(written(tmp_path / "r.txt", text), NAMES, NAMES, "detect")


def test_a_reference_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "r.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="cannot read the embedding"):
        files.read_reference(tmp_path / "r.npy", NAMES, NAMES, "detect")
    np.save(tmp_path / "good.npy", np.eye(6))
    found = files.read_reference(tmp_path / "good.npy", NAMES[::-1], NAMES, "detect").embedding
    assert found is not None and (found == np.eye(6)[::-1]).all()


@pytest.mark.parametrize(
    ("text", "match"),
    [("ant\nbee\ncow", "four concepts"), ("ant\nbee\nant\ncow", "'ant' is given twice"), ("ant\n:x\nbee\ncow", "four")],
)
def test_bad_concepts(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        files.read_concepts(written(tmp_path / "c.txt", text))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"triplets": "0"}, "triplets"),
        ({"dimensions": "0"}, "dimensions"),
        ({"ceiling": "0.2"}, "ceiling"),
        ({"wording": "{a} {b}"}, "must hold"),
        ({"wording": "{a} {b} {c"}, "cannot be filled"),
        ({"carrier": "a thing"}, "carrier"),
    ],
)
def test_bad_options(options: dict[str, str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        build(HumanTripletsConfig, options, "diagnostic")


def test_bad_requests(tmp_path: Path) -> None:
    lm = blank([*"odd : N/A".split(), *NAMES], seed=2)
    names = written(tmp_path / "names.txt", "\n".join(NAMES))
    rows = written(tmp_path / "rows.txt", "\n".join(f"{n}.0 {n * n} 1" for n in range(6)))
    ours = Subject(lm, "x", texts=[names, rows])
    with pytest.raises(UsageError, match="fewer than 6 dimensions"):
        HumanTriplets(HumanTripletsConfig(dimensions=(6,))).measure(ours)
    with pytest.raises(UsageError, match="cannot place 6 concepts"):
        HumanTriplets(HumanTripletsConfig(dimensions=(5,))).measure(ours)
    with pytest.raises(UsageError, match="no reference"):
        HumanTriplets().measure(Subject(lm, "x", texts=[names]))
    with pytest.raises(UsageError, match="three files at most"):
        HumanTriplets().measure(Subject(lm, "x", texts=[names] * 4))
    triplets = written(tmp_path / "t.csv", "0,1,2\n3,4,5\n")
    with pytest.raises(UsageError, match="anchor form"):
        HumanTriplets(HumanTripletsConfig(form="anchor")).measure(Subject(lm, "x", texts=[names, triplets]))
    with pytest.raises(UsageError, match="the same tokens"):  # two names that are unknown to the tokenizer
        strange = written(tmp_path / "strange.txt", "\n".join([*NAMES[:4], "yak", "zebu"]))
        tool = HumanTriplets(HumanTripletsConfig(wording=WORDING, dimensions=(2,)))
        tool.measure(Subject(lm, "x", texts=[strange, rows]))
    with pytest.raises(UsageError, match="layer 9 does not exist"):
        tool = HumanTriplets(HumanTripletsConfig(mode="states", layer=9, dimensions=(2,), carrier="{concept}"))
        tool.measure(ours)


def test_what_limits_the_answer_is_said(tmp_path: Path) -> None:
    lm = blank([*"odd : N/A bat".split(), *NAMES, *map(str, range(200))], seed=2)
    names = written(tmp_path / "names.txt", "\n".join(f"{name}: {tag}" for name, tag in zip(
        [*NAMES, "bat"], "ab ab cd cd cd ef ef".split(), strict=True)))  # fmt: skip
    config = HumanTripletsConfig(wording=WORDING, dimensions=(2,), steps=20, permutations=20, bootstraps=20)
    out = HumanTriplets(config).measure(Subject(lm, "x", texts=[names]))
    said = " ".join(out.warnings)
    assert "unrelated meanings" in said and "bat" in said and "are few" in said and "made to choose" in said
    assert out.unit == "concept" and out.row("agreement").n == 7


def test_names_that_begin_other_names_are_told_apart() -> None:
    lm = blank(["odd", ":", "N/A", "car", "pet", "ant", "bee"], seed=0)
    names = ["ant", "car", "car pet"]
    found = by_answers(Subject(lm, "x"), names, np.array([[0, 1, 2]]), "odd-one-out", WORDING, False, False)
    logs = option_logprobs(lm, [WORDING.format(a="ant", b="car", c="car pet")], [names], end=True)
    assert all(len(one) == 1 + len(name.split()) for one, name in zip(logs[0], names, strict=True))
    assert found.p.sum() == pytest.approx(1)


def test_the_built_in_list_is_sound() -> None:
    concepts = files.read_concepts(files.OWN)
    assert len(concepts.names) == 32 and not set(concepts.names) & files.HOMOGRAPHS
    z = files.tag_embedding(concepts)
    assert cosine(z).shape == (32, 32)
    picked = choose(scores_of(z @ z.T, draw_triplets(32, 5000)))
    assert (picked >= 0).mean() > 0.5  # most triplets have an odd one by their tags
