"""MEXA's oracles: the retrieval, the embeddings, what moves the score and what must not, and bad input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny import tiny_lm, tiny_tokenizer
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.measure.alignment import (
    aligned,
    centred,
    chance_level,
    cosines,
    subsampled,
    without_first,
)
from trimtab.measure.cache import Cache
from trimtab.measure.correlation import pearson, spearman
from trimtab.measure.diagnostic import Subject
from trimtab.measure.measurement import Measurement, Row
from trimtab.measure.mexa import Mexa, MexaConfig
from trimtab.measure.parallel_texts import distinct_lines
from trimtab.measure.rates import wilson
from trimtab.measure.states import read_states, text_rows

WORDS = [f"{a}{b}" for a in "bdfglmnprst" for b in ("a", "e", "i", "o", "u")]


def sentences(count: int, seed: int, length: tuple[int, int] = (3, 8)) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(*length))) for _ in range(count)]


def write(folder: Path, **languages: Sequence[str]) -> list[Path]:
    for name, lines in languages.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return [folder / f"{name}.txt" for name in languages]


def measure(lm: LM, paths: list[Path], cache: Cache | None = None, **options: Any) -> Measurement:
    subject = Subject(lm, lm.fingerprint, texts=paths, cache=cache or Cache(None))
    return Mexa(MexaConfig(**{"draws": 5, **options})).measure(subject)


# the retrieval


@pytest.mark.parametrize(
    ("similarity", "expected"),
    [
        (np.eye(4), [True] * 4),
        (np.ones((4, 4)), [False] * 4),  # strict: ties win nothing
        (np.fliplr(np.eye(4)), [False] * 4),
        ([[0.9, 0.1, 0.2], [0.3, 0.5, 0.6], [0.2, 0.4, 0.8]], [True, False, True]),  # row 2: 0.6 > 0.5
        ([[0.9, 0.1, 0.2], [0.1, 0.5, 0.3], [0.95, 0.4, 0.8]], [False, True, False]),  # column 1 and row 3: 0.95
    ],
)
def test_who_is_aligned_by_hand(similarity: Any, expected: list[bool]) -> None:
    assert aligned(np.array(similarity)).tolist() == expected


def test_the_matrix_form_equals_the_published_scalar_loop_exactly() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 40, 16))
    b = a + 1.5 * b
    similarity = cosines(a, b)
    loop = [[float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) for y in b] for x in a]
    assert np.allclose(similarity, loop, atol=1e-12)  # float64; only the order of summation differs
    hits = [all(loop[i][i] > loop[i][j] and loop[i][i] > loop[j][i] for j in range(40) if j != i) for i in range(40)]
    assert aligned(similarity).tolist() == hits and 0 < sum(hits) < 40


def test_chance_is_one_in_two_n_less_one() -> None:
    generator = np.random.default_rng(1)
    mu = [aligned(cosines(*generator.normal(size=(2, 50, 64)))).mean() for _ in range(500)]
    error = np.std(mu) / np.sqrt(len(mu))
    assert abs(np.mean(mu) - 1 / 99) < 3 * error and chance_level(50) == 1 / 99


def test_rotation_and_scale_change_nothing_and_an_offset_only_the_raw_score() -> None:
    generator = np.random.default_rng(2)
    a = generator.normal(size=(60, 8))
    b = a + 0.6 * generator.normal(size=a.shape)
    rotation, _ = np.linalg.qr(generator.normal(size=(8, 8)))
    before = aligned(cosines(a, b))
    assert (aligned(cosines(3 * a @ rotation, 0.2 * b @ rotation)) == before).all()
    offset = 5 * generator.normal(size=8)
    assert aligned(cosines(a, b + offset)).mean() < before.mean() - 0.1
    shifted = cosines(centred(a), centred(b + offset))
    assert np.abs(shifted - cosines(centred(a), centred(b))).max() < 1e-6


# embeddings


def test_the_first_token_is_taken_out_of_the_stored_poolings() -> None:
    generator = np.random.default_rng(3)
    counts = np.array([2, 3, 9])
    tokens = [generator.normal(size=(count, 5)) for count in counts]
    mean = np.stack([t.mean(0) for t in tokens])
    weighted = np.stack([np.arange(1, len(t) + 1) @ t / np.arange(1, len(t) + 1).sum() for t in tokens])
    first = np.stack([t[0] for t in tokens])
    ranks = [np.arange(1, len(t)) for t in tokens]
    expected = np.stack([r @ t[1:] / r.sum() for r, t in zip(ranks, tokens, strict=True)])
    assert np.allclose(without_first(mean, weighted, first, counts), expected, atol=1e-12)
    plain = np.stack([t[1:].mean(0) for t in tokens])
    assert np.allclose(without_first(mean, None, first, counts), plain, atol=1e-12)


def test_weights_are_positions_and_a_constant_state_stays_itself() -> None:
    from trimtab.measure.states import _Batch

    batch = _Batch([[1, 2, 3], [1]], [(0, 3), (0, 1)], torch.device("cpu"))
    states = torch.eye(3)[None].repeat(2, 1, 1)
    assert torch.allclose(batch.pool(states)["weighted"][0], torch.tensor([1.0, 2.0, 3.0]) / 6)
    assert torch.equal(batch.pool(torch.ones(2, 3, 4))["weighted"], torch.ones(2, 4))


def test_padding_changes_no_embedding_and_the_last_layer_is_after_the_norm() -> None:
    """Against the model's own hidden_states, one row at a time and padded on the left: 1e-5 in float32."""
    lm = tiny_lm("llama", num_hidden_layers=3)
    rows = text_rows(lm, sentences(6, 0))
    cache = Cache(None)  # the states live as long as it does
    states = read_states(lm, rows, cache=cache)
    longest = max(map(len, rows))
    for number, row in enumerate(rows):
        weight = torch.arange(1.0, len(row) + 1) / sum(range(1, len(row) + 1))
        alone = lm.model(torch.tensor([row]), output_hidden_states=True).hidden_states
        pads = longest - len(row)
        left = lm.model(
            input_ids=torch.tensor([[0] * pads + row]),
            attention_mask=torch.tensor([[0] * pads + [1] * len(row)]),
            position_ids=torch.tensor([[0] * pads + list(range(len(row)))]),
            output_hidden_states=True,
        ).hidden_states
        for layer in range(4):
            got = states.final("weighted") if layer == 3 else states.pooled("weighted", layer)
            for hidden in (alone[layer][0], left[layer][0, pads:]):
                assert np.abs(got[number] - (weight @ hidden).detach().numpy()).max() < 1e-5


# the diagnostic


@pytest.mark.parametrize("embedding", ["weighted", "mean", "last"])
def test_a_language_aligned_with_itself_scores_one_at_every_layer(tmp_path: Path, embedding: str) -> None:
    ends = list(np.random.default_rng(0).permutation(WORDS))  # another last word each: layer 0 tells them apart
    lines = [f"{line} {end}" for line, end in zip(sentences(55, 1), ends, strict=True)]
    paths = write(tmp_path, eng=lines, twin=lines)
    found = measure(tiny_lm(), paths, embedding=embedding)
    assert found.details["languages"]["twin"]["mu"] == [1.0, 1.0, 1.0]
    row = found.row("twin")
    assert row.value == 1.0 and row.low == pytest.approx(0.025 ** (1 / 55)) and row.n == 55
    assert found.row("twin, tokens over the pivot's").value == 1.0
    assert not [warning for warning in found.warnings if "pivot" in warning]


def test_one_pass_serves_every_option_and_a_second_run_forwards_nothing(tmp_path: Path) -> None:
    lm, cache = tiny_lm(), Cache(tmp_path / "cache")
    paths = write(tmp_path, eng=sentences(20, 1), fra=sentences(20, 2))
    first = measure(lm, paths, cache)
    assert first.cost.tokens_forwarded == sum(map(len, text_rows(lm, [*sentences(20, 1), *sentences(20, 2)])))
    for options in ({}, {"embedding": "last"}, {"pooling": "max", "skip_bos": True}, {"skip_embeddings": True}):
        assert measure(lm, paths, cache, **options).cost.tokens_forwarded == 0
    assert measure(lm, paths, cache).to_dict()["table"] == first.to_dict()["table"]
    assert len(measure(lm, paths, cache, skip_embeddings=True).details["layers"]) == len(first.details["layers"]) - 1


def test_skip_bos_equals_the_states_of_the_rest(tmp_path: Path) -> None:
    """The same indicators as pooling over tokens 2 to T in a pass of their own."""
    lm = tiny_lm(tokenizer=tiny_tokenizer(bos=True))
    languages = {"eng": sentences(40, 1), "fra": sentences(40, 2)}
    found = measure(lm, write(tmp_path, **languages), skip_bos=True)
    rows = [text_rows(lm, lines) for lines in languages.values()]
    cache = Cache(None)
    a, b = (read_states(lm, part, [(1, len(row)) for row in part], cache=cache) for part in rows)
    expected = [aligned(cosines(a.pooled("weighted", k), b.pooled("weighted", k))).mean() for k in (0, 1)]
    assert found.details["languages"]["fra"]["mu"][:2] == expected


def test_the_estimate_subtracts_chance_and_scores_are_validated(tmp_path: Path) -> None:
    names = ["eng", "a", "b", "c", "d"]
    base = sentences(60, 1)
    noisy = {name: [*base[: 15 * rank], *sentences(60 - 15 * rank, 9 + rank)] for rank, name in enumerate(names[1:])}
    paths = write(tmp_path, eng=base, **noisy)
    scores = tmp_path / "scores.tsv"
    scores.write_text("".join(f"{name}\ttask\t{0.3 + rank / 10}\n" for rank, name in enumerate(names[1:])))
    found = measure(tiny_lm(), paths, pivot_score=0.75, chance=0.25, scores=scores)
    value = found.row("d").value
    assert value is not None
    assert found.row("d, estimated task score").value == pytest.approx(0.25 + value * 0.5, abs=1e-12)
    assert found.row("task, Spearman").value == pytest.approx(1.0) and found.row("task, Pearson").n == 4


def test_identical_systems_are_never_told_apart(tmp_path: Path) -> None:
    lm, paths = tiny_lm(), write(tmp_path, eng=sentences(30, 1), fra=sentences(30, 1)[::-1], deu=sentences(30, 2))
    for pooling in ("mean", "max"):
        first = measure(lm, paths, pooling=pooling)
        compared = Mexa(MexaConfig(pooling=pooling)).compare(first, first)  # type: ignore[arg-type]
        assert {change.verdict for change in compared.changes} <= {"undecided"}
        assert all(change.difference == 0 for change in compared.changes)
    with pytest.raises(UsageError, match="not measured alike"):
        Mexa().compare(measure(lm, paths), measure(lm, paths, sentences=20))


def aligned_with(hits: dict[str, np.ndarray]) -> Measurement:
    """A measurement of languages with these indicators [n] in its one layer."""
    out = Measurement("mexa", "x", {}, "sentence", [str(i) for i in range(len(next(iter(hits.values()))))])
    records = {
        name: {"indicators": ["".join("01"[int(x)] for x in row)], "peak_layer": 0} for name, row in hits.items()
    }
    for name, row in hits.items():
        out.table += [Row(name, float(row.mean())), Row(f"{name}, layer 0", float(row.mean()))]
    out.details = {"languages": records, "layers": [0], "chance": 0.01, "tokens": ""}
    return out


def test_a_verdict_needs_the_sign_test_corrected_for_languages() -> None:
    """Of 60 sentences 3 are newly found: the interval excludes 0, one in four such outcomes is chance. 7 are enough for one
    language (p = 0.016), not for the best of five (0.078). Equal systems, 1,000 draws by hand: 2.2 % fire."""
    none, three, seven = (np.arange(60) < found for found in (0, 3, 7))
    for hits, languages, p, verdict in ((three, 1, 0.25, "undecided"), (seven, 1, 2 / 2**7, "better"),
                                        (seven, 5, 10 / 2**7, "undecided")):  # fmt: skip
        names = [f"l{i}" for i in range(languages)]
        first = aligned_with({name: hits if name == "l0" else seven for name in names})
        second = aligned_with({name: none if name == "l0" else np.roll(seven, 20) for name in names})
        change = Mexa().compare(first, second).change("l0")
        assert change.low is not None and change.low > 0
        assert (change.p_value, change.verdict) == (pytest.approx(p), verdict)


def test_subsampling_reports_the_smaller_set_and_covers_it() -> None:
    """One similarity in truth: n noisy twins. The interval at m = 50 covers the mean over many worlds of size 50 in 95 %
    of 60 worlds, less 3 standard errors (0.866; without the jackknife's factor it is 0.68)."""
    generator = np.random.default_rng(4)

    def world(size: int) -> Any:
        a = generator.normal(size=(size, 12))
        return cosines(a, a + 0.9 * generator.normal(size=a.shape))[None]

    truth = np.mean([aligned(world(50)).mean() for _ in range(400)])
    covered = 0
    for _ in range(60):
        _, low, high = subsampled(world(60), 50, 60, "mean", generator)
        covered += low is not None and high is not None and low <= truth <= high
    assert covered / 60 > 0.866


def test_closed_forms_of_intervals() -> None:
    half = wilson(50, 100)
    assert (half.low, half.high) == pytest.approx((0.40383, 0.59617), abs=1e-5)  # textbook value
    r, low_r, high_r = pearson(range(20), [*range(10), *range(20, 10, -1)])
    assert r is not None and low_r == pytest.approx(np.tanh(np.arctanh(r) - 1.959964 / 17**0.5), abs=1e-6)
    assert low_r is not None and high_r is not None and low_r < r < high_r
    assert spearman([1, 2, 3, 4], [1, 4, 9, 16]) == (pytest.approx(1.0), None, None)
    assert pearson([1, 1, 1, 1], [1, 2, 3, 4]) == (None, None, None)


# bad input


def test_lines_that_repeat_are_left_out_and_said(tmp_path: Path) -> None:
    a, b = sentences(60, 1), sentences(60, 2)
    a[5], b[9] = a[2], b[1]
    found = measure(tiny_lm(), write(tmp_path, eng=a, fra=b))
    assert found.details["n"] == 58 and "line 6" not in found.units and "line 10" not in found.units
    assert "2 lines repeat" in found.warnings[0] and "(line 6, 10)" in found.warnings[0]
    assert distinct_lines({"x": ["a", "b", "c"], "y": ["1", "2", "3"]}, 2)[1] == [1, 2]


def test_warnings_of_few_sentences_and_of_lines_in_another_order(tmp_path: Path) -> None:
    lines = sentences(12, 1)
    found = measure(tiny_lm(), write(tmp_path, eng=lines, twin=[*lines[1:], lines[0]]))
    assert any("12 sentences are few" in warning for warning in found.warnings)
    assert any("in one order" in warning for warning in found.warnings)
    assert all(row.label != "twin, at n=80" for row in found.table)


def test_a_first_token_that_swamps_the_rest_is_said(tmp_path: Path) -> None:
    lm = tiny_lm(tokenizer=tiny_tokenizer(bos=True))
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[1] *= 300
    paths = write(tmp_path, eng=sentences(20, 1), fra=sentences(20, 2))
    assert any("skip_bos" in warning for warning in measure(lm, paths).warnings)
    assert not any("skip_bos" in warning for warning in measure(lm, paths, skip_bos=True).warnings)


@pytest.mark.parametrize(
    ("languages", "options", "message"),
    [
        ({"eng": ["ba be", "bi bo"]}, {}, "parallel"),
        ({"eng": ["ba be", "bi bo"], "fra": ["ba"]}, {}, "equally many lines"),
        ({"eng": ["ba be", "bi bo", "bu"], "fra": ["ba", "", "bi"]}, {}, "line 2 is empty"),
        ({"eng": ["ba be", "ba be"], "fra": ["ba", "bi"]}, {}, "2 different sentences"),
        ({"eng": ["ba be", "bi bo"], "fra": ["ba", "bi"]}, {"pivot": "deu"}, "pivot 'deu'"),
        ({"eng": ["ba be", "bi bo"], "fra": ["ba", "bi"]}, {"skip_bos": True}, "fra: line 1 is a single token"),
        ({"eng": ["ba " * 70, "bi bo"], "fra": ["ba", "bi"]}, {}, "eng: text 1 has 70 tokens"),
    ],
)
def test_bad_files_are_refused(
    tmp_path: Path, languages: dict[str, list[str]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        measure(tiny_lm(), write(tmp_path, **languages), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sentences": 1}, "sentences"),
        ({"subsample": 1}, "subsample"),
        ({"pivot_score": 0.2, "chance": 0.25}, "pivot_score"),
        ({"skip_bos": True, "embedding": "last"}, "skip_bos"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MexaConfig(**options)


def test_a_bad_score_file_names_its_line(tmp_path: Path) -> None:
    paths = write(tmp_path, eng=sentences(4, 1), fra=sentences(4, 2))
    (tmp_path / "scores.tsv").write_text("fra\ttask\tgood\n")
    with pytest.raises(UsageError, match=r"scores.tsv:1: language, task and score"):
        measure(tiny_lm(), paths, scores=tmp_path / "scores.tsv")
    (tmp_path / "scores.tsv").write_text("fra\ttask\t0.4\n")
    with pytest.raises(UsageError, match="3 are needed"):
        measure(tiny_lm(), paths, scores=tmp_path / "scores.tsv")
