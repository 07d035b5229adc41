"""The surrogate classifier's oracles: heads, thresholds, chance, features; the diagnostic and its bad input."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from tiny import CHAT, tiny_lm, tiny_tokenizer
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.measure.cache import Cache
from trimtab.measure.diagnostic import Subject
from trimtab.measure.labelled_prompts import read_sets
from trimtab.measure.measurement import Measurement, Row
from trimtab.measure.states import read_states
from trimtab.measure.stats import Interval
from trimtab.measure.surrogate_classifier import SurrogateClassifier, SurrogateClassifierConfig
from trimtab.measure.surrogate_heads import (
    Head,
    auroc,
    best_threshold,
    f1_difference,
    f1_interval,
    fit_head,
    headline,
    out_of_fold,
    silhouette,
    simultaneous,
)
from trimtab.policy import Completions
from trimtab.rewards import as_reward
from trimtab.sampling import Sampling

WORDS = [f"{a}{b}" for a in "bdfglmnprst" for b in ("a", "e", "i", "o", "u")]


def sentences(count: int, seed: int, end: str = "tu") -> list[str]:
    rng = random.Random(seed)
    return [" ".join([*rng.choices(WORDS, k=rng.randrange(3, 7)), end]) for _ in range(count)]


class Scripted:
    """A tiny model whose answers are written by a rule: everything else (states, tokens) is its own."""

    def __init__(self, lm: LM, refuses: Callable[[str], bool]) -> None:
        self.lm, self.name, self.refuses = lm, "scripted", refuses

    def token_logprobs(self) -> None: ...

    def generate(self, prompts: Sequence[Any], sampling: Sampling = Sampling()) -> Completions:
        assert sampling.temperature == 0 and sampling.samples == 1
        texts = ["I cannot do that." if self.refuses(str(prompt)) else "Sure." for prompt in prompts]
        count = len(texts)
        return Completions(list(prompts), texts, [[3]] * count, [[0.0]] * count, ["stop"] * count)


def measure(
    folder: Path,
    refuses: Callable[[str], bool],
    *,
    count: int = 40,
    end: str = "tu",
    lm: LM | None = None,
    reward: Any = None,
    more: Sequence[Path] = (),
    **options: Any,
) -> Measurement:
    texts = []
    for name, seed in (("unsafe", 0), ("safe", 1)):
        texts.append(folder / f"{name}.txt")
        texts[-1].write_text("\n".join(sentences(count, seed, end)) + "\n")
    lm = lm or tiny_lm(num_hidden_layers=2)
    subject = Subject(
        Scripted(lm, refuses), "scripted", texts=[*texts, *more], cache=Cache(folder / "cache"), reward=reward
    )
    return SurrogateClassifier(SurrogateClassifierConfig(**{"repeats": 1, **options})).measure(subject)


# heads


def test_the_models_own_readout_agrees_with_it_exactly() -> None:
    """k = L: a model that refuses iff logit R > logit C is its own surrogate, w = E_R - E_C on the final-normed state."""
    lm, cache = tiny_lm(num_hidden_layers=3), Cache(None)
    rows = lm.encode(sentences(200, 3))
    refuse, comply = 7, 11
    decided = []
    for row in rows:
        with torch.no_grad():
            logits = lm.model(torch.tensor([row])).logits[0, -1]
        decided.append(bool(logits[refuse] > logits[comply]))
    weight = (lm.unembedding[refuse] - lm.unembedding[comply]).detach().numpy().astype(np.float64)
    predicted = Head(weight, 0.0)(read_states(lm, rows, cache=cache).final("last")) > 0
    assert predicted.tolist() == decided and 20 < sum(decided) < 180


def test_the_scaler_and_the_threshold_are_folded_in() -> None:
    """Against scikit-learn on standardised features; float64, so equal to 1e-8."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    generator = np.random.default_rng(0)
    z = generator.normal(size=(80, 6)) * [1, 10, 0.1, 3, 1, 1] + [0, 5, 1, 0, 0, 7]
    refused = z[:, 0] + generator.normal(size=80) > 0
    scale = StandardScaler().fit(z)
    model = LogisticRegression(max_iter=2000).fit(scale.transform(z), refused)
    expected = model.decision_function(scale.transform(z))
    threshold = best_threshold(expected, refused)
    assert np.allclose(fit_head(z, refused)(z), expected - threshold, atol=1e-8)
    values = [f1_score(refused, expected > t, zero_division=0) for t in np.sort(expected)]
    assert f1_score(refused, expected > threshold) >= max(values) - 1e-12


def test_a_threshold_with_no_hit_is_never_the_best() -> None:
    """Where precision and recall are both 0 their F1 is 0/0: published code takes such a NaN for the largest."""
    scores, refused = np.array([0.0, 1.0, 2.0, 3.0]), np.array([True, False, False, False])
    assert (scores > best_threshold(scores, refused)).all()  # all positive: F1 = 0.4, any other cut: 0
    separable = best_threshold(np.array([-3.0, -1.0, 2.0]), np.array([False, False, True]))
    assert separable == 0.5  # half way


def test_f1_is_that_of_the_pooled_counts_and_its_bound_is_exact_where_all_is_right() -> None:
    generator = np.random.default_rng(1)
    truth = generator.random(60) < 0.5
    predicted = np.stack([truth ^ (generator.random(60) < 0.2) for _ in range(3)])
    found = f1_interval(truth, predicted)
    assert found.mean == pytest.approx(f1_score(np.tile(truth, 3), predicted.ravel()), abs=1e-12)
    assert found.low is not None and found.high is not None and found.low < (found.mean or 0) < found.high
    perfect = f1_interval(np.arange(40) % 2 == 0, (np.arange(40) % 2 == 0)[None])
    error = 1 - 0.025 ** (1 / 40)
    assert perfect.mean == 1.0 and perfect.low == pytest.approx(2 * (0.5 - error) / (2 * (0.5 - error) + error))
    assert f1_interval([False, False], np.array([[False, False]])).mean is None


def test_the_intervals_cover() -> None:
    """Nominal 95 %; 120 worlds, so at least 0.95 - 3 standard errors = 0.89. Truth: 20 % of labels wrong, F1 = 0.8 at
    p = 0.5; AUROC of shifted normals."""
    from scipy.stats import norm

    generator = np.random.default_rng(2)
    covered = np.zeros(2)
    for _ in range(120):
        truth = generator.random(80) < 0.5
        predicted = truth ^ (generator.random(80) < 0.2)
        scores = generator.normal(size=(1, 80)) + truth
        one = f1_interval(truth, predicted[None])
        area = auroc(truth, predictions(scores))
        for place, (found, true) in enumerate(((one, 0.8), (area, norm.cdf(1 / np.sqrt(2))))):
            covered[place] += found.low is not None and found.high is not None and found.low <= true <= found.high
    assert (covered / 120 > 0.89).all()


def predictions(scores: Any, fold: Any = None) -> Any:
    from trimtab.measure.surrogate_heads import Predictions

    return Predictions(scores, scores > 0, np.zeros(scores.shape, dtype=np.int64) if fold is None else fold)


def test_auroc_is_scikit_learns_in_one_fold_and_never_across_folds() -> None:
    generator = np.random.default_rng(3)
    truth = np.arange(40) % 2 == 0
    scores = generator.normal(size=(1, 40)) + truth
    assert auroc(truth, predictions(scores)).mean == pytest.approx(roc_auc_score(truth, scores[0]), abs=1e-12)
    fold = (np.arange(40) // 2 % 2)[None]
    shifted = predictions(scores + 100 * fold, fold)  # a head of its own in each fold
    assert auroc(truth, shifted).mean == auroc(truth, predictions(scores, fold)).mean


def test_random_labels_are_at_chance_and_depth_0_is_exactly_so(tmp_path: Path) -> None:
    """25 random labelings of one set: mean AUROC within 3 standard errors of 0.5 at depths 1 and 2. At depth 0 every
    prompt has the same last token, so nothing can be told: 0.5 exactly."""
    lm, cache = tiny_lm(num_hidden_layers=2), Cache(tmp_path)
    states = read_states(lm, lm.encode(sentences(40, 4)), cache=cache)
    generator = np.random.default_rng(0)
    areas: list[list[float]] = [[], [], []]
    for _ in range(25):
        truth = generator.permutation(np.arange(40) % 2 == 0)
        for depth, out in enumerate(areas):
            found = auroc(truth, out_of_fold(states.pooled("last", depth), truth, 5, 1, 1.0, 0)).mean
            assert found is not None
            out.append(found)
    assert set(areas[0]) == {0.5}
    for out in areas[1:]:
        assert abs(np.mean(out) - 0.5) < 3 * np.std(out) / np.sqrt(len(out))


def test_features_do_not_depend_on_padding() -> None:
    """The last real token of a left-padded batch, read by transformers itself: 1e-5 in float32, at every depth."""
    lm, cache = tiny_lm(num_hidden_layers=3), Cache(None)
    rows = lm.encode(sentences(7, 5))
    states = read_states(lm, rows, cache=cache)
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    with torch.no_grad():
        hidden = lm.model(
            input_ids=torch.tensor([[0] * pad + row for pad, row in zip(pads, rows, strict=True)]),
            attention_mask=torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(pads, rows, strict=True)]),
            position_ids=torch.tensor([[0] * pad + [*range(len(row))] for pad, row in zip(pads, rows, strict=True)]),
            output_hidden_states=True,
        ).hidden_states
    for depth in range(3):
        assert np.abs(states.pooled("last", depth) - hidden[depth][:, -1].numpy()).max() < 1e-5
    norm = lm.model.base_model.norm(torch.tensor(states.pooled("last", 3)))
    assert np.abs(norm.detach().numpy() - hidden[3][:, -1].numpy()).max() < 1e-5  # theirs is normed, ours is not


def test_the_headline_depth_must_beat_always_refusing() -> None:
    found = [Interval(0.85, 0.81, 0.89), Interval(0.9, 0.87, 0.93)]
    assert headline(0.8, 0.5, found) == (0, 0)
    assert headline(0.8, 0.86, found) == (1, 0)
    assert headline(0.95, 0.5, found) == (None, None)


def test_the_headline_is_one_of_many_depths() -> None:
    """16 depths of F1 0.8, 100 prompts, errors of their own: one reaches the floor in at most 5 % plus three standard errors
    of 50 runs (0.142; with bounds for each depth alone in 0.24 of these)."""
    generator, reached = np.random.default_rng(11), 0
    for _ in range(50):
        truth = generator.random(100) < 0.5
        wrong = generator.random((16, 1, 100)) < 0.2
        reached += headline(0.8, 0.5, simultaneous(truth, list(truth ^ wrong)))[0] is not None
    assert reached / 50 <= 0.142


def test_silhouettes_are_undefined_where_nothing_varies() -> None:
    groups = np.arange(10) % 2 == 0
    assert silhouette(np.ones((10, 3)), groups) is None and silhouette(np.eye(10), np.ones(10, dtype=bool)) is None
    apart = np.where(groups[:, None], [1.0, 0.0], [0.0, 1.0])
    assert silhouette(apart, groups) == pytest.approx(1.0)


def test_two_equal_systems_differ_rarely() -> None:
    """Two predictors of equal accuracy on one truth, 20 prompts: the interval of the F1 difference excludes 0 and the test
    agrees in at most 5 % plus two standard errors of 200 draws (0.081; the interval alone: 0.085 of 600). A system against
    itself: never."""
    generator = np.random.default_rng(5)
    fired = 0
    for _ in range(200):
        truth = generator.random(20) < 0.5
        sides = [(truth, (truth ^ (generator.random(20) < 0.4))[None]) for _ in range(2)]
        found, p = f1_difference(sides, 0.95, 0, resamples=500)
        apart = found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)
        fired += apart and p is not None and p <= 0.05
    assert fired / 200 <= 0.081
    assert f1_difference([sides[0], sides[0]], 0.95, 0)[0].low is None
    good = (truth, truth[None].copy())
    assert (f1_difference([good, (truth, ~truth[None])], 0.95, 0, resamples=500)[1] or 1) < 0.01


# the diagnostic


def by_word(prompt: str) -> bool:
    return any(word.startswith("b") for word in prompt.split())


def test_the_target_is_what_the_model_does_not_the_label(tmp_path: Path) -> None:
    found = measure(tmp_path, by_word)
    rows = [*sentences(40, 0), *sentences(40, 1)]
    refused = [by_word(row) for row in rows]
    assert found.details["refused"] == refused
    assert found.details["counts"]["unsafe, refused"] == sum(refused[:40])
    assert found.details["counts"]["safe, refused"] == sum(refused[40:])
    assert found.row("refused, unsafe").value == pytest.approx(np.mean(refused[:40]))
    assert found.details["f1_of_label_with_model"] == pytest.approx(f1_score(refused, [True] * 40 + [False] * 40))
    always = 2 * np.mean(refused) / (1 + np.mean(refused))
    assert found.details["always_refused_f1"] == pytest.approx(always)
    assert {figure.title for figure in found.figures} == {"F1 by depth", "AUROC by depth", "Silhouette by depth"}


def test_a_change_of_f1_needs_the_exchange_too() -> None:
    """20 prompts, 8 refused: one reader finds 4 of these, the other all 8, both with the same 2 false alarms. The interval
    excludes 0; of random exchanges of the two one in eight (the 4 that differ, all one way) differs as much."""
    truth, sides = np.arange(20) < 8, []
    for hits in (4, 8):
        one = Measurement("surrogate-classifier", "x", {}, "prompt", [str(i) for i in range(20)])
        one.table = [Row("F1, depth 0", 0.0)]
        predicted = (np.arange(20) < hits) | np.isin(np.arange(20), [8, 9])
        one.details = {"headline_depth": None, "refused": truth, "predicted": [predicted[None]]}
        sides.append(one)
    change = SurrogateClassifier().compare(*sides).change("F1, depth 0")
    assert change.difference == pytest.approx(8 / 14 - 16 / 18) and change.high is not None and change.high < 0
    assert change.verdict == "undecided"


def test_the_headline_depth_is_taken_from_the_bounds_for_all_depths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "trimtab.measure.surrogate_classifier.simultaneous"
    monkeypatch.setattr(name, lambda truth, found: [Interval(0.9, 0.1 + 0.75 * k, 1.0) for k in range(len(found))])
    assert measure(tmp_path, by_word).row("headline depth").value == 1  # 0.85: the first above 0.8


def test_a_second_run_forwards_nothing_and_equals_the_first(tmp_path: Path) -> None:
    first = measure(tmp_path, by_word)
    again = measure(tmp_path, by_word)
    assert first.cost.tokens_forwarded > 0 and again.cost.tokens_forwarded == 0
    assert again.table == first.table
    compared = SurrogateClassifier().compare(first, again)
    assert {change.verdict for change in compared.changes} <= {"", "undecided"}


def test_a_labelled_file_and_a_second_set(tmp_path: Path) -> None:
    rows = [{"prompt": text, "label": int(i % 2)} for i, text in enumerate(sentences(60, 8))]
    path = tmp_path / "second.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = measure(tmp_path, by_word, more=[path])
    assert any(row.label.startswith("F1 on the second set") for row in found.table)
    assert [line.label for line in found.figures[0].lines][-1] == "on the second set"  # type: ignore[union-attr]
    only = Subject(Scripted(tiny_lm(), by_word), "scripted", texts=[path])
    found = SurrogateClassifier(SurrogateClassifierConfig(repeats=1)).measure(only)
    assert found.details["unsafe"] == [bool(row["label"]) for row in rows]
    sides = [tmp_path / "harm.jsonl", tmp_path / "advice.jsonl"]  # two files of one kind each are one set
    for side, flag in zip(sides, (True, False), strict=True):
        side.write_text("".join(json.dumps({"prompt": t, "should_refuse": flag}) + "\n" for t in sentences(3, flag)))
    ((prompts, unsafe),) = read_sets(sides, "")
    assert len(prompts) == 6 and unsafe.tolist() == [True] * 3 + [False] * 3
    with pytest.raises(UsageError, match="hold one kind"):
        read_sets([sides[0], sides[0]], "")


def test_a_reward_with_a_threshold_replaces_the_phrases(tmp_path: Path) -> None:
    reward = as_reward(lambda prompts, texts: [float(text.startswith("I")) for text in texts])
    found = measure(tmp_path, by_word, reward=reward, refuses_above=0.5)
    assert found.details["refused"] == measure(tmp_path, by_word).details["refused"]
    with pytest.raises(UsageError, match="go together"):
        measure(tmp_path, by_word, refuses_above=0.5)
    with pytest.raises(UsageError, match="go together"):
        measure(tmp_path, by_word, reward=reward)


# bad input


def test_a_model_that_never_or_always_refuses_is_refused_with_counts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="refused 0 of 80 prompts and answered 80"):
        measure(tmp_path, lambda prompt: False)
    (tmp_path / "always").mkdir()  # a cache of its own
    with pytest.raises(UsageError, match="refused 80 of 80"):
        measure(tmp_path / "always", lambda prompt: True)


def test_few_of_a_class_is_a_warning(tmp_path: Path) -> None:
    found = measure(tmp_path, by_word, count=18)
    assert any("fewer than 20" in warning for warning in found.warnings)


def test_prompts_with_different_endings_are_refused_unless_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    rows = [{"prompt": text, "label": i % 2} for i, text in enumerate([*sentences(30, 1, "ta"), *sentences(30, 2)])]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    subject = Subject(Scripted(tiny_lm(), by_word), "scripted", texts=[path])
    with pytest.raises(UsageError, match="end in 2 different tokens"):
        SurrogateClassifier().measure(subject)
    options = SurrogateClassifierConfig(same_ending=False, repeats=1)
    assert SurrogateClassifier(options).measure(subject).row("F1, depth 0").value is not None


def test_a_detector_that_people_disagree_with_gives_no_attack_rate(tmp_path: Path) -> None:
    gold = tmp_path / "gold.jsonl"
    rows = [{"answer": "I cannot do that." if i % 2 else "Sure.", "refusal": i % 3 == 0} for i in range(60)]
    gold.write_text("\n".join(map(json.dumps, rows)) + "\n")
    attack = {"attack": True, "own_model": True, "tail": " tu"}
    with pytest.raises(UsageError, match="an attack rate would mean nothing"):
        measure(tmp_path, by_word, gold=gold, **attack)
    assert any("agrees with only" in warning for warning in measure(tmp_path, by_word, gold=gold).warnings)
    gold.write_text('{"answer": "x"}\n')
    with pytest.raises(UsageError, match=r"gold.jsonl:1: an object with answer"):
        measure(tmp_path, by_word, gold=gold)


def test_an_attack_needs_consent_a_place_for_the_suffix_and_a_real_depth(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="own_model=true"):
        SurrogateClassifierConfig(attack=True)
    mine = {"attack": True, "own_model": True}
    with pytest.raises(UsageError, match="must not come after what asks for the answer"):
        measure(tmp_path, by_word, **mine)
    with pytest.raises(UsageError, match="attack_depth must be 1 to 2, not 3"):
        measure(tmp_path, by_word, tail=" tu", attack_depth=3, **mine)
    chat = tiny_lm(tokenizer=tiny_tokenizer(chat=CHAT))
    small = {"attack_depth": 1, "suffix_tokens": 2, "steps": 1, "width": 4, "top_k": 4, "attack_prompts": 2}
    found = measure(tmp_path, by_word, lm=chat, target="ba be", **small, **mine)  # a template says where
    assert len(found.details["attack"]["prompts"]) == 2


def test_files_without_labels_and_bad_options_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("ba be tu\n")
    with pytest.raises(UsageError, match="no file of the other"):
        SurrogateClassifier().measure(Subject(Scripted(tiny_lm(), by_word), "x", texts=[path]))
    for options in ({"folds": 1}, {"repeats": 0}, {"floor": 1.0}, {"regularisation": 0.0}, {"width": 0}):
        with pytest.raises(UsageError, match=next(iter(options))):
            SurrogateClassifierConfig(**options)  # type: ignore[arg-type]
