"""PA-CCS: its table, layers and controls, what it refuses, its cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny import CHAT, WORDS, tiny_lm, tiny_tokenizer
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.measure.cache import Cache
from trimtab.measure.diagnostic import Subject
from trimtab.measure.measurement import Lines, Measurement
from trimtab.measure.pa_ccs import PaCcs, PaCcsConfig
from trimtab.measure.polarity import COLUMNS
from trimtab.measure.statement_pairs import check_pairs, contractions, masked

ANSWERS = {"yes": "ta", "no": "da"}  # words that the tiny tokenizer knows
FEW: dict[str, Any] = {"steps": 20, "tries": 2, "permutations": 99, **ANSWERS}


def pairs(n: int = 20, seed: int = 0) -> list[dict[str, str]]:
    generator = np.random.default_rng(seed)
    out = []
    for number in range(n):
        words = " ".join(map(str, generator.choice(WORDS[:30], 4)))
        denied = f"{words} not {WORDS[30 + number % 20]} ba"
        plain = f"{words} {WORDS[30 + number % 20]} ba"
        out.append({"harmful": denied, "safe": plain} if number % 2 else {"harmful": plain, "safe": denied})
    return out


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measured(folder: Path, rows: list[dict[str, str]], lm: LM | None = None, **options: Any) -> Measurement:
    lm, cache = lm or tiny_lm(), options.pop("cache", None)
    subject = Subject(lm, lm.fingerprint, texts=[write(folder, rows)], cache=Cache(cache))
    return PaCcs(PaCcsConfig(**{**FEW, **options})).measure(subject)


def test_the_table_has_the_controls_and_every_layer_is_kept(tmp_path: Path) -> None:
    found = measured(tmp_path, pairs(50), halves=True)
    labels = [row.label for row in found.table]
    assert labels[:5] == ["ESA", "ESA, random directions", "ESA, labels", "ESA, shuffled pairing", "ESA, word masked"]
    assert set(COLUMNS) <= set(labels) and set(found.samples) == set(COLUMNS) and found.unit == "pair"
    assert len(found.units) == len(found.samples["ESA"]) == 10 and found.row("ESA").n == 10
    layers = found.details["layers"]
    assert len(layers) == 3 and all(0 <= layer["halves"] <= 1 for layer in layers)
    assert {"random", "supervised", "shuffled", "masked", "silhouette", "refused"} <= set(layers[0])
    curves = [figure for figure in found.figures if isinstance(figure, Lines)]
    assert [line.label for line in curves[0].lines] == ["CCS", "labels", "random", "word masked"]
    assert dict(curves[1].reference) == {"|PC| by chance": 1 / 6, "CI by chance": 1 / 2}
    assert Measurement.from_dict(json.loads(json.dumps(found.to_dict()))).table == found.table


def test_a_model_that_knows_nothing_is_not_ranked_nor_its_consistency_compared(tmp_path: Path) -> None:
    one, other = (measured(tmp_path, pairs(30), tiny_lm(seed=seed)) for seed in (0, 1))
    assert one.details["refused"] and any("say nothing" in warning for warning in one.warnings)
    assert one.row("|PC|").better == "" and "chance" in one.row("|PC|").note
    change = PaCcs().compare(one, other)
    assert [row.label for row in change.changes] == ["ESA", "polar accuracy"]
    assert any("consistency is not compared" in note for note in change.notes)
    same = PaCcs().compare(one, one).change("ESA")
    assert (same.difference, same.low, same.verdict) == (0, None, "undecided")


def test_a_second_measurement_forwards_nothing_and_says_the_same(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, second = (measured(tmp_path, pairs(), cache=cache) for _ in range(2))
    words = [len(row[side].split()) + 1 for row in pairs() for side in ("harmful", "safe")]
    held = [len(row[side].split()) + 1 for row in pairs() for side in ("harmful", "safe") if "not" in row[side]]
    assert first.cost.tokens == {"tiny": 2 * (sum(words) + sum(held))}
    assert second.cost.tokens_forwarded == 0 and second.table == first.table


def test_the_state_is_that_of_the_last_token_after_the_answer(tmp_path: Path) -> None:
    rows, lm = pairs(), tiny_lm()
    found = measured(tmp_path, rows, lm, steps=1, tries=1, layer=1, unit=False, centre="mean")
    x = []
    for answer in ("ta", "da"):
        texts = [f"{row[side]} {answer}" for row in rows for side in ("harmful", "safe")]
        ids = [torch.tensor([lm.tokenizer(text)["input_ids"]]) for text in texts]
        x.append(torch.stack([lm.model(one, output_hidden_states=True).hidden_states[1][0, -1] for one in ids]))
    from sklearn.metrics import silhouette_score

    from trimtab.measure.polarity import Split

    split = Split.of(20, 0.2, 71)
    train, test = split.statements(split.train), split.statements(split.test)
    difference = ((x[0] - x[0][train].mean(0)) - (x[1] - x[1][train].mean(0)))[test]
    expected = silhouette_score(difference.numpy(), (test % 2).numpy(), metric="cosine")
    assert found.row("silhouette").value == pytest.approx(expected, abs=1e-4)  # float32 states


def test_measurements_of_other_pairs_or_templates_are_not_compared(tmp_path: Path) -> None:
    base = measured(tmp_path, pairs())
    chat = measured(tmp_path, pairs(), tiny_lm(tokenizer=tiny_tokenizer(chat=CHAT)))
    assert chat.details["chat_template"] is True and "chat template: applied" in chat.notes[-1]
    for other in (measured(tmp_path, pairs(seed=1)), chat):
        with pytest.raises(UsageError, match="not measured alike"):
            PaCcs().compare(base, other)


def test_only_whole_words_are_masked() -> None:
    text = "Not all knots: nothing, another, cannot, isn't, not-so, NOT. 'not' do not"
    said = "ttt all knots: nothing, another, cannot, isn't, ttt-so, ttt. 'not' do ttt"
    assert masked(text, "not", "ttt") == said
    assert contractions([text, "It isn't", "It is not", "You cannot", "cant"]) == 3


def test_pairs_without_the_word_have_no_masked_control(tmp_path: Path) -> None:
    found = measured(tmp_path, pairs(), word="never")
    assert "ESA, word masked" not in [row.label for row in found.table]
    assert any("no masked control" in warning for warning in found.warnings)


def test_few_pairs_are_warned_of(tmp_path: Path) -> None:
    assert any("only 20 pairs" in warning for warning in measured(tmp_path, pairs(20)).warnings)
    assert check_pairs([f"{side} {n}" for n in range(40) for side in "ab"]) == []


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda rows: rows[:9], "there are 9 pairs"),
        (lambda rows: [*rows, {"harmful": "ba be", "safe": "ba be"}], "pair 21: .* are the same"),
        (
            lambda rows: [*rows, {"harmful": rows[0]["safe"], "safe": "ba be"}],
            "harmful in one pair and safe in another",
        ),
        (lambda rows: [*rows, {"harmful": "ba be", "safe": "ba bi. Yes."}], "pair 21 ends in Yes or No"),
        (lambda rows: [*rows, {"harmful": "ba be no", "safe": "ba bi"}], "pair 21 ends in Yes or No"),
        (lambda rows: [*rows, {"harmful": "ba be"}], "jsonl:21"),
        (lambda rows: [*rows, {"harmful": "ba be", "safe": ""}], "jsonl:21"),
    ],
)
def test_bad_files_are_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        measured(tmp_path, spoil(pairs()))


@pytest.mark.parametrize("labels", [[0] * 10 + [1] * 11, [0] * 20, [0, 1] * 10])
def test_halves_that_do_not_pair_are_refused(labels: list[int], tmp_path: Path) -> None:
    path = tmp_path / "halves.csv"
    rows = [f"ba {WORDS[number]},{label}" for number, label in enumerate(labels)]
    path.write_text("\n".join(["statement,is_harmfull_opposition", *rows]) + "\n")
    lm = tiny_lm()
    with pytest.raises(UsageError, match="does not pair"):
        PaCcs(PaCcsConfig(**FEW)).measure(Subject(lm, "x", texts=[path]))


def test_answers_with_the_same_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="have the same tokens"):
        measured(tmp_path, pairs(), yes="Yes.", no="No.")  # both unknown to this tokenizer
    with pytest.raises(UsageError, match="two different answers"):
        PaCcsConfig(yes="Yes", no=" Yes ")


def test_bad_options_and_states_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    for wrong in ({"test": 0.0}, {"tries": 0}, {"permutations": 3}, {"supervision": -1.0}):
        with pytest.raises(UsageError):
            PaCcsConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="layer 9 does not exist"):
        measured(tmp_path, pairs(), layer=9)
    lm = tiny_lm()
    with torch.no_grad():
        lm.model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UsageError, match="bfloat16 or float32"):
        measured(tmp_path, pairs(), lm)
