"""Checked answers: pass@k, prompts, numbers, code in the sandbox, and what is refused."""

from __future__ import annotations

import ast
import itertools
import json
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import UsageError
from trimtab.measure.adapters import read_items
from trimtab.measure.diagnostic import Subject
from trimtab.measure.verify import Verify, VerifyConfig, ask, check, cut, pass_at, program
from trimtab.policy import Completions, Cost, Prompt
from trimtab.sampling import Sampling

FIXTURE = Path(__file__).parent / "fixtures" / "verify.jsonl"
sealed = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="needs the filter of system calls: Linux on x86_64 or aarch64",
)


class Says:
    """A policy that answers from a list, the same list for every prompt."""

    name = "says"

    def __init__(self, *texts: str, finish: str = "stop"):
        self.texts, self.finish, self.asked = texts, finish, list[Prompt]()

    def generate(self, prompts: Any, sampling: Sampling = Sampling()) -> Completions:
        self.asked += prompts
        rows = [p for p in prompts for _ in range(sampling.samples)]
        texts = list(itertools.islice(itertools.cycle(self.texts), len(rows)))
        return Completions(rows, texts, [[1]] * len(rows), [[0.0]] * len(rows), [self.finish] * len(rows), Cost())


def subject(policy: Any, *texts: Path, **more: Any) -> Subject:
    return Subject(policy, "says", texts=list(texts), **more)


def function(tmp_path: Path, **changes: str) -> Path:
    row = {
        "task_id": "toy/0",
        "prompt": 'import math\n\n\ndef helper(x):\n    return x\n\n\ndef inc(x):\n    """One more."""\n',
        "canonical_solution": "    return helper(x) + 1\n",
        "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(helper(5)) == 6\n",
        "entry_point": "inc",
    }
    path = tmp_path / "functions.jsonl"
    path.write_text(json.dumps(row | changes) + "\n")
    return path


def test_pass_at_k_is_the_average_over_all_choices_of_k() -> None:
    """The closed form against enumeration of every subset: exact up to rounding (1e-12)."""
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                picks = list(itertools.combinations(range(n), k))
                share = sum(any(i < c for i in pick) for pick in picks) / len(picks)
                assert pass_at(n, c, k) == pytest.approx(share, abs=1e-12)


def test_numbers_words_and_boxes(tmp_path: Path) -> None:
    items = read_items(FIXTURE)
    texts = ["7 pears", "It is $2,000.00", "5-8 = -3", "2.5", "Paris."]
    assert [check(item, text).outcome for item, text in zip(items, texts, strict=True)] == ["right"] * 5
    assert [check(item, "12").outcome for item in items] == ["wrong"] * 5
    assert [check(item, "\n").outcome for item in items] == ["no answer"] * 5
    assert cut("7\n\nQuestion: and 8 + 9?\nAnswer: 17", VerifyConfig.prompt) == "7\n"  # it asks itself a next question
    assert ask(items[0], [], "Q: {question}\\nA:", "Say it.") == f"Q: {items[0]['question']} Say it.\nA:"
    path = tmp_path / "boxes.jsonl"
    path.write_text(json.dumps({"problem": "Half?", "solution": "so \\boxed{\\frac{1}{2}}"}) + "\n")
    (item,) = read_items(path)
    assert check(item, "it is \\boxed{0.5}").passed and not check(item, "it is 0.5").passed


def test_rows_and_intervals() -> None:
    """Two answers a question, one right for the first alone: c = (1, 0, 0, 0, 0) of 2."""
    out = Verify(VerifyConfig(samples=2, k=(1, 2))).measure(subject(Says("7", "none"), FIXTURE))
    assert out.samples["solved"] == [0.5, 0, 0, 0, 0]
    assert out.samples["pass@2"] == [1, 0, 0, 0, 0]
    assert out.samples["answered"] == [0.5, 0.5, 0.5, 0.5, 1]
    row = out.row("solved")
    assert row.value == pytest.approx(0.1) and row.n == 5 and row.low is not None and row.better == "higher"
    assert out.unit == "question" and len(out.units) == 5
    none = Verify().measure(subject(Says("nothing", finish="length"), FIXTURE))
    assert (none.row("solved").value, none.row("solved").low) == (0, 0)
    assert none.row("solved").high == pytest.approx(1 - 0.025 ** (1 / 5))  # Clopper-Pearson at 0 of 5
    assert "100% of the answers were cut off" in none.warnings[0]
    better = Verify().measure(subject(Says("7", "2000", "-3", "2.5", "Paris"), FIXTURE))
    change = Verify().compare(better, none).change("solved")
    assert (change.first, change.second, change.difference) == (1, 0, 1)


def test_worked_examples_come_from_another_file_and_are_drawn_by_the_seed(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(20)]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tool = Verify(VerifyConfig(shots=2, train=train, most=1))
    asked = []
    for seed in (0, 0, 1):
        policy = Says("7")
        tool.measure(subject(policy, FIXTURE, sampling=Sampling(seed=seed)))
        asked.append(policy.asked[0])
    assert asked[0] == asked[1] != asked[2]
    assert asked[0].count("Question:") == 3 and asked[0].count("####") == 2
    assert asked[0].endswith("Question: Ann has 3 pears and buys 4 more. How many has she?\nAnswer:")
    with pytest.raises(UsageError, match="5 questions of .* are asked too"):
        Verify(VerifyConfig(shots=1, train=FIXTURE)).measure(subject(Says("7"), FIXTURE))
    with pytest.raises(UsageError, match="has 20 examples, not 21"):
        Verify(VerifyConfig(shots=21, train=train)).measure(subject(Says("7"), FIXTURE))


def test_code_is_not_run_unless_it_is_allowed(tmp_path: Path) -> None:
    policy = Says("    return 1\n")
    with pytest.raises(UsageError, match="--allow-code true"):
        Verify().measure(subject(policy, function(tmp_path)))
    assert not policy.asked


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("    return x + 1\n", "passed"),
        ("    return x + 1\n\ndef other():\n    return (", "passed"),  # cut where another definition begins
        ("Here it is:\n```python\ndef inc(x):\n    return helper(x) + 1\n```\nDone.", "passed"),
        ("```python\n    return math.floor(x) + 1\n```", "passed"),
        ("    return x\n", "failed"),
        ("    import sys; sys.exit(0)\n", "failed"),
        ("    return (\n", "no answer"),
        ("I cannot do that.", "no answer"),
    ],
)
@sealed
def test_functions(text: str, outcome: str, tmp_path: Path) -> None:
    (item,) = read_items(function(tmp_path))
    assert check(item, text).outcome == outcome, program(item, text)


@sealed
def test_asserts(tmp_path: Path) -> None:
    path = tmp_path / "asserts.jsonl"
    row = {"text": "Write add.", "code": "def add(a, b): return a + b", "test_list": ["assert add(1, 2) == TWO + 1"],
           "test_setup_code": "TWO = 2"}  # fmt: skip
    path.write_text(json.dumps(row) + "\n")
    (item,) = read_items(path)
    assert ask(item, []).endswith("assert add(1, 2) == TWO + 1\nAnswer:")
    assert check(item, row["code"]).passed
    assert not check(item, row["code"] + " + 1").passed
    # what the answer says about the names of the tests does not count: the setup is run again before them
    assert not check(item, "TWO = 3\ndef add(a, b): return 4").passed


@sealed
def test_a_file_can_be_checked_with_its_own_answers(tmp_path: Path) -> None:
    policy = Says("unasked")
    out = Verify(VerifyConfig(reference=True, allow_code=True)).measure(subject(policy, function(tmp_path)))
    assert out.row("solved").value == 1 and not policy.asked and "own reference answers" in out.warnings[0]
    broken = function(tmp_path, canonical_solution="    return 0\n")
    out = Verify(VerifyConfig(reference=True, allow_code=True)).measure(subject(policy, broken))
    assert out.row("solved").value == 0
    assert Verify(VerifyConfig(reference=True)).measure(subject(policy, FIXTURE)).row("solved").value == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 0}, "samples >= 1"),
        ({"samples": 2, "k": (3,)}, "k is 1 to the number of samples"),
        ({"prompt": "Q:"}, "no {question} in it"),
        ({"shots": 2}, "shots and train go together"),
        ({"seconds": 0}, "seconds in"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        VerifyConfig(**options)


def test_files_that_cannot_be_checked(tmp_path: Path) -> None:
    path = tmp_path / "rules.jsonl"
    path.write_text('{"key": 1, "prompt": "Say hello.", "instruction_id_list": ["a:b"], "kwargs": [{}]}\n')
    with pytest.raises(UsageError, match="IFEval.* not implemented"):
        Verify().measure(subject(Says(""), path))
    with pytest.raises(UsageError, match="--texts FILE is needed"):
        Verify().measure(subject(Says("")))


SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add,
}  # fmt: skip


def mutated(item: dict[str, Any]) -> str | None:
    """The reference with its first comparison or sum turned round; None where it has neither."""
    tree = ast.parse(item["question"] + item["reference"])
    (target,) = [node for node in tree.body if getattr(node, "name", "") == item["entry_point"]]
    for node in ast.walk(target):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
            node.ops[0] = SWAPPED[type(node.ops[0])]()  # type: ignore[call-overload]
            return ast.unparse(tree)
        if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
            node.op = SWAPPED[type(node.op)]()  # type: ignore[assignment]
            return ast.unparse(tree)
    return None


@sealed
def test_reference_functions_pass_and_mutants_fail(shared: Path) -> None:
    """Every eighth task of HumanEval here (21). All 164, by hand: 164 references pass, 164 of 164 answers that return
    None fail, 161 of 164 mutants fail; the three that pass change nothing that the tests look at."""
    items = read_items(shared / "data" / "humaneval" / "HumanEval.jsonl.gz")[::8]
    ran = [check(item, item["reference"], 20) for item in items]
    assert [one.outcome for one in ran] == ["passed"] * len(items)
    mutants = [(item, code) for item in items if (code := mutated(item)) is not None]
    assert len(mutants) > 15
    assert [item["id"] for item, code in mutants if check(item, code).passed] in ([], ["HumanEval/40"])
