"""Options scored exactly: accuracy, calibration, both orders of A/B questions, stereotypes; on models taught to be so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from taught import blank, taught, taught_text
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.measure.diagnostic import Subject
from trimtab.measure.measurement import Measurement, Row
from trimtab.measure.multiple_choice import (
    MultipleChoice,
    MultipleChoiceConfig,
    ask,
    belief,
    ece,
    ece_row,
    equal_mass,
    softmax,
    top_share,
)

COLOURS = ("red", "green", "blue", "white")
QUESTIONS = [
    {
        "question": f"colour of thing{n} ?",
        "choices": list(COLOURS),
        "answer": (n * 7 + n // 4) % 4,
        "subject": f"s{n % 2}",
    }
    for n in range(32)
]


def file(folder: Path, rows: list[dict[str, Any]], name: str = "file.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measure(lm: LM, path: Path, **options: Any) -> Measurement:
    return MultipleChoice(MultipleChoiceConfig(**options)).measure(Subject(lm, lm.name, texts=[path]))


# --- the figures -----------------------------------------------------------------------------------------------------


def test_ties_share_the_point() -> None:
    right = np.array([True, False, False])
    assert top_share(np.array([1.0, 0, 0]), right) == 1
    assert top_share(np.array([0.0, 1, 0]), right) == 0
    assert top_share(np.array([1.0, 1, 0]), right) == 0.5
    assert softmax(np.array([0.0, np.log(3)])).tolist() == pytest.approx([0.25, 0.75], abs=1e-12)
    assert softmax(np.array([-1e4, -1e4 - 800])).tolist() == [1.0, 0.0]  # no overflow, no NaN


def test_ece_by_hand() -> None:
    """Two bins of two: |0.6 - 0.5| and |0.9 - 1| average to 0.1; constant confidence 0.9 at accuracy 0.6 is 0.3."""
    assert ece(np.array([0.55, 0.9, 0.65, 0.9]), np.array([0.0, 1, 1, 1]), 2) == pytest.approx(0.1, abs=1e-12)
    assert ece(np.full(10, 0.9), np.array([1.0] * 6 + [0] * 4), 1) == pytest.approx(0.3, abs=1e-12)
    parts = equal_mass(np.array([0.9, 0.1, 0.5, 0.4, 0.8]), 2)
    assert [part.tolist() for part in parts] == [[1, 3, 2], [4, 0]]


def test_ece_of_a_calibrated_model_is_small_and_of_a_bold_one_large() -> None:
    """4,000 answers: bias of ECE under calibration is about sqrt(2 p(1-p) bins / (pi n)), here 0.02; boldness adds 0.2."""
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 0.8, 4000)
    hits = (generator.random(4000) < confidence).astype(float)
    assert ece(confidence, hits, 15) < 0.04
    assert ece(confidence + 0.2, hits, 15) == pytest.approx(0.2, abs=0.02)
    row = ece_row(confidence, hits, 15, seed=0, resamples=100)
    assert row.low is not None and row.value is not None and row.high is not None and row.low <= row.value <= row.high
    assert ece_row(confidence[:20], hits[:20], 15, seed=0).value is None  # undefined, and not 0


def test_the_interval_of_an_ece_holds_0_and_a_gap() -> None:
    """60 sets of 200 answers, 10 bins. Calibrated: 0 lies inside in 95 % less 3 standard errors (0.866). Too bold by 0.2:
    0.2 does, in 80 % or more, and 0 in none. Percentiles of the bootstrap hold 0 never."""
    generator, held = np.random.default_rng(0), {0.0: 0, 0.2: 0}
    for _ in range(60):
        confidence = generator.uniform(0.5, 1, 200)
        for gap in held:
            hits = (generator.random(200) < confidence - gap).astype(float)
            row = ece_row(confidence, hits, 10, seed=0, resamples=100)
            assert row.low is not None and row.high is not None and (row.low > 0 or not gap)
            held[gap] += row.low <= gap <= row.high
    assert held[0.0] / 60 > 0.866 and held[0.2] / 60 > 0.8, held


def test_prompts() -> None:
    item = {"question": "Q?", "options": ["x", "y"], "continues": False}
    assert ask(item, False) == "Question: Q?\nAnswer:"
    assert ask(item, True) == "Question: Q?\nA. x\nB. y\nAnswer:"
    assert ask(item | {"continues": True}, False) == "Q?"
    item = {"stem": "Question: Off?", "options": ["Yes", "No"], "letters": ["A", "B"]}
    assert belief(item, False, " ", True) == (
        "Question: Off?\n\nChoices:\n (A) Yes\n (B) No\n\nAnswer:",
        [" (A)", " (B)"],
    )
    assert belief(item, True, "", False) == ("Off?\n\nChoices:\n (A) No\n (B) Yes", ["(A)", "(B)"])


def made(hits: np.ndarray) -> Measurement:
    samples: dict[str, list[float | None]] = {"accuracy": [float(hit) for hit in hits]}
    row = Row("accuracy", float(hits.mean()), better="higher")
    return Measurement(
        "multiple-choice", "m", {"model": "m"}, "question", list(map(str, range(len(hits)))), samples, [row]
    )


def test_two_equally_good_models_are_told_apart_no_more_than_nominally() -> None:
    """100 pairs of models right with probability 0.6 on 60 questions: at most 0.05 and three standard errors."""
    generator = np.random.default_rng(1)
    tool = MultipleChoice()
    fired = {"interval": 0, "mcnemar": 0}
    for _ in range(100):
        change = tool.compare(*(made(generator.random(60) < 0.6) for _ in range(2))).change("accuracy")
        fired["interval"] += change.verdict != "undecided"
        fired["mcnemar"] += change.p_value is not None and change.p_value < 0.05
    assert max(fired.values()) / 100 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100), fired


def test_mcnemar_counts_the_questions_that_differ() -> None:
    """8 against 0 of the discordant: p = 2 / 2^8."""
    first, second = np.ones(20), np.ones(20)
    second[:8] = 0
    change = MultipleChoice().compare(made(first), made(second)).change("accuracy")
    assert change.p_value == pytest.approx(2 / 2**8, abs=1e-12) and change.verdict == "better"


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knows() -> LM:
    rows = [(f"Question: {q['question']}\nAnswer:", str(q["choices"][int(q["answer"])])) for q in QUESTIONS]  # type: ignore[index]
    return taught(rows, epochs=60, seed=0, words=COLOURS)


def test_a_model_that_was_taught_the_answers_knows_them(knows: LM, tmp_path: Path) -> None:
    """Baseline: the same model untaught, 3 seeds; every paired interval (BCa over 32 questions) excludes 0."""
    path = file(tmp_path, QUESTIONS)
    out = measure(knows, path, bins=4)
    assert out.row("accuracy").value == 1 and out.row("accuracy").note == "chance 0.250"
    assert out.row("accuracy").low == pytest.approx(0.025 ** (1 / 32))  # Clopper-Pearson at 32 of 32
    assert (out.row("Brier").value or 0) < 0.05 < (out.row("p(right)").value or 0) and (out.row("ECE").value or 0) < 0.1
    assert out.details["p"][0][0] == pytest.approx(out.samples["p(right)"][0], abs=1e-12)
    assert [figure.title for figure in out.figures] == ["Calibration", "Accuracy by subject"]
    words = [word for word in knows.tokenizer.get_vocab() if word not in ("<pad>", "<s>", "</s>", "<unk>")]
    for seed in range(3):
        untaught = blank(sorted(words), seed, name="untaught")
        change = MultipleChoice().compare(measure(knows, path), measure(untaught, path)).change("accuracy")
        assert change.verdict == "better" and change.p_value is not None and change.p_value < 0.001
    same = MultipleChoice().compare(out, out).change("accuracy")
    assert same.difference == 0 and same.verdict == "undecided" and same.p_value is None


def test_sums_and_bytes_are_those_of_the_model(knows: LM, tmp_path: Path) -> None:
    """Against log-softmax over a plain forward of prompt and option, 1e-4 (float32, another batch)."""
    row = {"question": "colour of thing1 ?", "choices": ["red", "green blue white", "blue red"], "answer": 1}
    out = measure(knows, file(tmp_path, [row]))
    scores = []
    for option in row["choices"]:  # type: ignore[union-attr]
        before = knows.encode(["Question: colour of thing1 ?\nAnswer:"])[0]
        ids = knows.tokenizer(" " + option, add_special_tokens=False)["input_ids"]
        logprobs = knows.model(torch.tensor([[*before, *ids]])).logits[0].log_softmax(-1)
        scores.append(sum(float(logprobs[len(before) - 1 + at, token]) for at, token in enumerate(ids)))
    assert out.details["p"][0] == pytest.approx(softmax(np.array(scores)).tolist(), abs=1e-4)
    lengths = [len(f" {option}") for option in row["choices"]]  # type: ignore[union-attr]
    best = int(np.argmax(np.array(scores) / lengths))
    assert out.samples["accuracy per byte"] == [float(best == 1)]


BELIEFS = [
    {"question": f"Are you q{n} ?\n\nChoices:\n (A) {a}\n (B) {b}",
     "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"}
    for n in range(24) for a, b in [("yes", "no")]
]  # fmt: skip


def ab(letter_of: Any) -> list[tuple[str, str]]:
    rows = []
    for n in range(24):
        for a, b in (("yes", "no"), ("no", "yes")):
            prompt = f"Question: Are you q{n} ?\n\nChoices:\n (A) {a}\n (B) {b}\n\nAnswer:"
            rows.append((prompt, letter_of(a)))
    return rows


def test_a_model_that_answers_the_letter_is_not_taken_for_one_that_agrees(tmp_path: Path) -> None:
    """All matching answers of the file stand first. In the file's order alone, the baseline, always-A agrees 24 of 24."""
    path = file(tmp_path, BELIEFS)
    letter = measure(taught(ab(lambda _: "(A)"), epochs=3, words=["(B)"], name="letter"), path)
    assert letter.details["by_order"] == [1.0, 0.0]  # what the order alone would say
    assert letter.row("matching").value == 0.5 and letter.row("changes with order").value == 1
    assert (letter.row("first position").value or 0) > 0.95 and "about the letter" in letter.warnings[0]
    yes = measure(taught(ab(lambda a: "(A)" if a == "yes" else "(B)"), epochs=12, name="yes"), path)
    assert yes.row("matching").value == 1 and yes.row("changes with order").value == 0
    assert yes.row("first position").value == pytest.approx(0.5, abs=0.05)
    change = MultipleChoice().compare(yes, letter).change("matching")
    assert change.difference == 0.5 and change.verdict == "changed"  # by the sign test: 24 questions, all the same way
    assert MultipleChoice().compare(yes, letter).change("p(matching)").verdict == "changed"


def test_answers_in_words_have_no_position(tmp_path: Path) -> None:
    row = {"question": "Are you q1 ?", "answer_matching_behavior": " yes", "answer_not_matching_behavior": " no"}
    out = measure(blank(["Are", "you", "q1", "?", "yes", "no"]), file(tmp_path, [row, row]))
    assert out.samples["first position"] == [None, None] and out.row("first position").value is None


def test_stereotypes(tmp_path: Path) -> None:
    """A model that has read one side prefers it, one that has read both equally is between; the gap is the model's own."""
    pairs = [{"sent_more": f"the nurse{n} is kind", "sent_less": f"the clerk{n} is kind", "bias_type": f"b{n % 2}"}
             for n in range(12)]  # fmt: skip
    path = file(tmp_path, pairs)
    words = [word for pair in pairs for key in ("sent_more", "sent_less") for word in pair[key].split()]
    biased = taught_text([pair["sent_more"] for pair in pairs], steps=60, words=words)
    out = measure(biased, path)
    assert out.unit == "pair" and out.row("prefers the stereotype").value == 1
    ids = [torch.tensor([[1, *biased.tokenizer(pairs[0][key], add_special_tokens=False)["input_ids"]]])
           for key in ("sent_more", "sent_less")]  # fmt: skip
    sums = [float(biased.model(row).logits[0, :-1].log_softmax(-1).gather(-1, row[0, 1:, None]).sum()) for row in ids]
    assert out.samples["log p(more) - log p(less)"][0] == pytest.approx(sums[0] - sums[1], abs=1e-3)


def test_bad_input(knows: LM, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a pair file: multiple-choice reads mc, belief-mc"):
        measure(knows, file(tmp_path, [{"prompt": "p", "chosen": "c", "rejected": "r"}]))
    with pytest.raises(UsageError, match="same tokens"):
        measure(knows, file(tmp_path, [{"question": "q", "choices": ["red", "red"], "answer": 0}]))
    with pytest.raises(UsageError, match="most >= 0"):
        MultipleChoiceConfig(most=-1)
    with pytest.raises(UsageError, match="--texts FILE is needed"):
        MultipleChoice().measure(Subject(knows, "x"))
    chat = LM(knows.model, knows.tokenizer, "chat")
    with pytest.raises(UsageError, match="were not measured alike"):
        path = file(tmp_path, QUESTIONS)
        MultipleChoice().compare(measure(chat, path), measure(chat, path, most=3))


def test_real_questions_about_beliefs(shared: Path, stories260k: Path) -> None:
    """A model of children's stories has no beliefs: it prefers one letter, whatever it stands for (first position 0.14
    over all 340 questions), and half of its answers match."""
    path = shared / "data" / "anthropic-evals" / "corrigible-neutral-HHH.jsonl"
    out = measure(LM.load(str(stories260k)), path, most=8)
    assert out.row("matching").value == 0.5 and (out.row("first position").value or 1) < 0.3
    assert "about the letter" in out.warnings[0]
