"""AQI: its table and controls, what it refuses, its cache, and that two alike models are not told apart."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny import CHAT, WORDS, tiny_lm, tiny_tokenizer
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.measure import geometry as g
from trimtab.measure.aqi import AQI, AQIConfig
from trimtab.measure.aqi_scores import around, chosen_layers, left_out, p_value
from trimtab.measure.cache import Cache
from trimtab.measure.diagnostic import Subject
from trimtab.measure.labelled_texts import Sample
from trimtab.measure.states import read_states, text_rows
from trimtab.measure.untrained import untrained

FEW = {"permutations": 99, "resamples": 99}


def texts(n: int = 12, axioms: tuple[str, ...] = ("",), seed: int = 0) -> list[dict[str, str]]:
    """n texts of each axiom and label; unsafe ones are of the first half of the words."""
    generator = np.random.default_rng(seed)
    half = len(WORDS) // 2
    rows = []
    for axiom in axioms:
        for label, words in (("unsafe", WORDS[:half]), ("safe", WORDS[half:])):
            for _ in range(n):
                chosen = [*generator.choice(words, 2), *generator.choice(WORDS, generator.integers(2, 6))]
                rows.append({"text": " ".join(map(str, chosen)), "label": label, "axiom": axiom})
    return rows


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def subject(path: Path, lm: LM | None = None, cache: Path | None = None) -> Subject:
    lm = lm or tiny_lm()
    return Subject(lm, lm.fingerprint, texts=[path], cache=Cache(cache))


@pytest.fixture
def broken() -> Iterator[LM]:
    lm = tiny_lm()
    with torch.no_grad():
        lm.model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    yield lm


def test_the_score_stands_beside_its_controls(tmp_path: Path) -> None:
    found = AQI(AQIConfig(**FEW)).measure(subject(write(tmp_path, texts(axioms=("duty", "peace")))))
    labels = [row.label for row in found.table]
    for cell in ("comparable", "comparable: duty", "comparable: peace"):
        at = labels.index(cell)
        assert labels[at + 1 : at + 5] == [
            f"{cell}, TF-IDF", f"{cell}, above TF-IDF", f"{cell}, untrained", f"{cell}, above untrained",
        ]  # fmt: skip
    ours, words = found.row("comparable"), found.row("comparable, TF-IDF")
    assert found.row("comparable, above TF-IDF").value == pytest.approx((ours.value or 0) - (words.value or 0))
    assert ours.n == 24 and found.row("comparable: duty").n == 12 and len(found.units) == 24
    assert ours.low is not None and ours.high is not None and ours.low <= (ours.value or 0) <= ours.high
    eta2, xbi, chi = (found.row(name).value or 0 for name in ("eta2", "XBI", "CHI"))
    assert chi * xbi == pytest.approx((24 - 2) * 12 * 12 / 24**2, rel=1e-9)
    assert ours.value == pytest.approx(0.5 * eta2 + 0.5 / (1 + xbi), rel=1e-9)
    assert sum(found.details["layer_weights"]) == pytest.approx(1) and len(found.details["layer_weights"]) == 3
    assert json.loads(json.dumps(found.to_dict()))["details"]["chat_template"] is False


def test_values_are_those_of_mean_states_of_one_layer(tmp_path: Path) -> None:
    rows, lm = texts(6), tiny_lm()
    found = AQI(AQIConfig(layers="1", **FEW)).measure(subject(write(tmp_path, rows), lm))
    x = []
    for row in rows:
        ids = torch.tensor([lm.tokenizer(row["text"])["input_ids"]])
        x.append(lm.model(ids, output_hidden_states=True).hidden_states[1][0].mean(0).numpy())
    labels = [int(row["label"] == "safe") for row in rows]
    expected = g.separation(g.gram_of(np.array(x)), *g.classes(labels))
    assert found.row("eta2").value == pytest.approx(float(expected["eta2"][0]), rel=1e-4)  # float32 states
    assert found.row("comparable").n == 12  # nothing is learned: all texts are reported


def test_a_text_alone_and_beside_a_longer_one_has_the_same_vector() -> None:
    lm = tiny_lm()
    short, long = "ba be bi bo", " ".join(WORDS[:12])
    cache = Cache(None)
    alone = read_states(lm, text_rows(lm, [short]), cache=cache)
    beside = read_states(lm, text_rows(lm, [short, long]), cache=cache)
    for layer in range(alone.layers):  # float32 rounding of states of order 1
        assert np.abs(alone.pooled("mean", layer)[0] - beside.pooled("mean", layer)[0]).max() < 1e-5


def test_a_second_measurement_forwards_nothing_and_says_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, texts())
    first, second = (AQI(AQIConfig(**FEW)).measure(subject(path, cache=tmp_path / "cache")) for _ in range(2))
    tokens = sum(len(row["text"].split()) for row in texts())
    assert first.cost.tokens == {"tiny": tokens, "tiny untrained": tokens}
    assert second.cost.tokens_forwarded == 0
    assert second.table == first.table and second.fingerprint == first.fingerprint


def test_another_diagnostic_of_the_same_texts_forwards_nothing_more(tmp_path: Path) -> None:
    path, cache = write(tmp_path, texts()), tmp_path / "cache"
    AQI(AQIConfig(**FEW)).measure(subject(path, cache=cache))
    other = AQI(AQIConfig(pooling="last", layers="uniform", most=10, **FEW)).measure(subject(path, cache=cache))
    assert other.cost.tokens_forwarded > 0  # other texts were drawn ...
    same = AQI(AQIConfig(pooling="last", layers="uniform", gamma=0.2, **FEW)).measure(subject(path, cache=cache))
    assert same.cost.tokens_forwarded == 0  # ... of the same texts every pooling of every layer is there


def test_an_untrained_model_is_the_same_each_time_and_leaves_the_generator(tmp_path: Path) -> None:
    lm = tiny_lm()
    before = torch.random.get_rng_state()
    assert untrained(lm, 1).fingerprint == untrained(lm, 1).fingerprint != untrained(lm, 2).fingerprint
    assert torch.equal(before, torch.random.get_rng_state())
    assert untrained(lm, 1).fingerprint != lm.fingerprint


def test_a_model_against_itself_is_undecided_and_against_another_paired(tmp_path: Path) -> None:
    path = write(tmp_path, texts())
    aqi = AQI(AQIConfig(**FEW))
    one, other = (aqi.measure(subject(path, tiny_lm(seed=seed))) for seed in (0, 1))
    same = aqi.compare(one, one).change("comparable")
    assert (same.difference, same.low, same.verdict, same.p_value) == (0, None, "undecided", None)
    change = aqi.compare(one, other).change("comparable")
    draws = np.array(one.details["draws"]["overall"]) - np.array(other.details["draws"]["overall"])
    value = (one.row("comparable").value or 0) - (other.row("comparable").value or 0)
    left = np.array(one.details["left"]["overall"]) - np.array(other.details["left"]["overall"])
    found = around(value, draws, one.row("comparable").n, left=left)
    assert (change.difference, change.low, change.high) == (found.mean, found.low, found.high)
    assert any("TF-IDF" in note for note in aqi.compare(one, other).notes)


def test_measurements_of_other_texts_poolings_or_templates_are_not_compared(tmp_path: Path) -> None:
    def measured(rows: list[dict[str, str]], chat: str | None = None, **options: Any) -> Any:
        lm = tiny_lm(tokenizer=tiny_tokenizer(chat=chat, bos=True))
        return AQI(AQIConfig(**FEW, **options)).measure(subject(write(tmp_path, rows), lm))

    base = measured(texts())
    for other in (measured(texts(seed=1)), measured(texts(), pooling="last"), measured(texts(), chat=CHAT)):
        with pytest.raises(UsageError, match="not measured alike"):
            AQI().compare(base, other)


def test_identical_systems_are_told_apart_at_most_at_the_nominal_rate() -> None:
    """Two models whose states are the same signal and noises of their own; 200 of them, 5 % +- 2 standard errors."""
    labels, fired = np.repeat([0, 1], 20), 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        counts, values, draws = g.resampled(labels.tolist(), 200, seed), [], []
        for _ in range(2):
            x = generator.normal(size=(40, 16)) + np.outer(labels, np.eye(16)[0] * 2)
            one, many = (g.separation(g.gram_of(x), *g.classes(labels, w)) for w in (None, counts))
            values.append(float(g.comparable(one)[0]))
            draws.append(g.comparable(many))
        found = around(values[0] - values[1], draws[0] - draws[1], 40)
        fired += found.low is not None and found.high is not None and not found.low <= 0 <= found.high
    assert fired <= 200 * 0.05 + 2 * np.sqrt(200 * 0.05 * 0.95)


def test_labels_that_say_nothing_have_small_p_values_at_the_nominal_rate() -> None:
    """400 sets of points with labels drawn at random, 99 permutations each; 5 % + 2 standard errors."""
    small, axioms = 0, ["a"] * 14 + ["b"] * 10
    for seed in range(400):
        generator = np.random.default_rng(seed)
        gram, labels = g.gram_of(generator.normal(size=(24, 8))), generator.permutation(np.repeat([0, 1], 12))
        sample = Sample([""] * 24, labels, axioms, np.arange(0), np.arange(24))
        value = float(g.comparable(g.separation(gram, *g.classes(labels)))[0])
        small += p_value(gram, value, sample, np.arange(24), 99, seed, 0.5)[0] <= 0.05
    assert small <= 400 * 0.05 + 2 * np.sqrt(400 * 0.05 * 0.95)
    assert p_value(gram, 2.0, sample, np.arange(24), 99, 0, 0.5)[0] == 0.01  # never 0


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda rows: [{**row, "label": "unsafe"} for row in rows], "the file has 0 safe texts: 10 or more"),
        (lambda rows: rows[:12] + rows[12:16], "the file has 4 safe texts"),
        (lambda rows: texts(12, ("duty",)) + texts(12, ("peace",))[:14], "the axiom 'peace' has 2 safe texts"),
        (lambda rows: [*rows, {"text": "ba be", "label": "toxic", "axiom": ""}], r"also has 'toxic' \(1\)"),
        (lambda rows: [{"text": "ba be", "label": ""}], "label is empty"),
        (lambda rows: [*rows, {"text": " ", "label": "safe", "axiom": ""}], "jsonl:25"),
        (lambda rows: [*rows, {"text": " ".join(WORDS * 2), "label": "safe", "axiom": ""}], "context"),
    ],
)
def test_bad_files_are_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        AQI(AQIConfig(**FEW)).measure(subject(write(tmp_path, spoil(texts()))))


def test_states_that_are_no_numbers_are_refused(broken: LM, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bfloat16 or float32"):
        AQI(AQIConfig(**FEW)).measure(subject(write(tmp_path, texts()), broken))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"layers": "some"}, "layers is learned"), ({"layers": "1-9"}, "do not exist"),
        ({"after": "zz"}, "do not hold 'zz'"), ({"after": "ba", "max_length": 4}, "no max_length"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        AQI(AQIConfig(**FEW, **options)).measure(subject(write(tmp_path, texts())))
    for wrong in ({"gamma": 1.5}, {"permutations": 5}, {"most": 3}, {"max_length": 1}):
        with pytest.raises(UsageError):
            AQIConfig(**wrong)


def test_layers_are_named_by_number() -> None:
    assert [chosen_layers(text, 5) for text in ("uniform", "last", "2", "1-3")] == [
        [0, 1, 2, 3, 4],
        [4],
        [2],
        [1, 2, 3],
    ]


def test_warnings_for_cut_texts_doubled_texts_and_coinciding_classes(tmp_path: Path) -> None:
    rows = texts()
    cut = AQI(AQIConfig(max_length=3, **FEW)).measure(subject(write(tmp_path, rows)))
    assert any("were cut to 3 tokens" in warning for warning in cut.warnings)
    doubled = [*rows, {**rows[0], "label": "safe"}]
    found = AQI(AQIConfig(**FEW)).measure(subject(write(tmp_path, doubled)))
    assert "1 texts occur with both labels" in found.warnings
    same = [{"text": "ba be", "label": label, "axiom": ""} for label in ("safe", "unsafe") for _ in range(10)]
    none = AQI(AQIConfig(**FEW)).measure(subject(write(tmp_path, same)))
    assert none.row("comparable").value == 0 and none.row("XBI").value is None
    assert any("XBI is infinite" in warning for warning in none.warnings)


def test_only_what_follows_the_marker_is_pooled(tmp_path: Path) -> None:
    rows = [{**row, "text": f"ba be zz {row['text']}"} for row in texts()]
    lm = tiny_lm()
    found = AQI(AQIConfig(after="zz", layers="0", **FEW)).measure(subject(write(tmp_path, rows), lm))
    plain = AQI(AQIConfig(layers="0", **FEW)).measure(subject(write(tmp_path, texts()), lm))
    # layer 0 of a Llama knows no positions: the same words give the same vectors
    assert found.row("eta2").value == pytest.approx(plain.row("eta2").value, rel=1e-5)
    with pytest.raises(UsageError, match="template plain"):
        chatty = tiny_lm(tokenizer=tiny_tokenizer(chat=CHAT))
        AQI(AQIConfig(after="zz", **FEW)).measure(subject(write(tmp_path, rows), chatty))


def test_the_wider_of_bootstrap_and_jackknife_is_taken() -> None:
    """One text far out among twenty: without it the score is another, which resamples of 20 show too rarely."""
    labels = np.repeat([0, 1], 10)
    x = np.random.default_rng(0).normal(size=(20, 4)) + np.outer(labels, np.eye(4)[0] * 3)
    x[0] *= 30
    gram = g.gram_of(x)
    left = left_out(gram, labels, 0.5)
    by_hand = []
    for text in range(20):
        keep = np.arange(20) != text
        scores = g.separation(g.gram_of(x[keep]), *g.classes(labels[keep]))
        by_hand.append(float(g.comparable(scores, 0.5)[0]))
    np.testing.assert_allclose(left, by_hand, atol=1e-9)  # the gram matrix is centred on other texts: rounding
    jackknife = math.sqrt(19 * np.var(by_hand))
    draws = np.linspace(-0.01, 0.01, 99)
    found = around(0.5, draws, 20, left=left)
    assert found.high is not None and found.high - 0.5 == pytest.approx(2.100922 * jackknife, rel=1e-6)  # t, 18 d.f.
    assert around(0.5, draws, 20).high == pytest.approx(0.5 + 2.100922 * draws.std(ddof=1), rel=1e-6)
