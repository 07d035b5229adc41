"""Delegation to lm-evaluation-harness, against a stand-in with the harness's own shapes (0.4.13 was run by hand)."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_lm
from trimtab.errors import UsageError
from trimtab.measure.diagnostic import Subject
from trimtab.measure.lm_eval import LmEval, LmEvalConfig


class HFLM:
    def __init__(self, pretrained: Any, tokenizer: Any, batch_size: int):
        self.model, self.tokenizer = pretrained, tokenizer


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What simple_evaluate was called with; it forwards seven tokens and gives back four questions."""
    called: dict[str, Any] = {}

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        called.update(given)
        if given["tasks"] == ["absent"]:
            raise KeyError("absent")
        called["logits"] = given["model"].model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10, 11]])).logits
        rows = [{"doc_id": n, "filter": "none", "acc": float(n < 3)} for n in range(4)]
        return {
            "results": {"toy": {"alias": "toy", "acc,none": 0.75, "acc_stderr,none": 0.25, "sample_len": 4},
                        "text": {"alias": "text", "perplexity,none": 12.0, "perplexity_stderr,none": "N/A"},
                        "group": {"acc,none": 0.5, "acc_stderr,none": 0.1}},
            "samples": {"toy": rows}, "versions": {"toy": 1.0}, "n-samples": {"text": {"effective": 9}},
            "higher_is_better": {"text": {"perplexity": False}},
        }  # fmt: skip

    module, models = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.models.huggingface")
    module.simple_evaluate, module.__version__ = simple_evaluate, "0.0"  # type: ignore[attr-defined]
    models.HFLM = HFLM  # type: ignore[attr-defined]
    tasks = types.ModuleType("lm_eval.tasks")
    tasks.TaskManager = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    monkeypatch.setitem(sys.modules, "lm_eval.models", types.ModuleType("lm_eval.models"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", models)
    return called


def test_rows_samples_and_cost(harness: dict[str, Any]) -> None:
    lm = tiny_lm()
    out = LmEval(LmEvalConfig(tasks=("toy", "text"), limit=4, shots=2)).measure(Subject(lm, "tiny"))
    assert (harness["tasks"], harness["limit"], harness["num_fewshot"]) == (["toy", "text"], 4, 2)
    assert out.row("toy acc").value == 0.75 and out.row("toy acc").n == 4 and out.row("toy acc").low is not None
    assert out.samples == {"toy acc": [1, 1, 1, 0]} and out.units == [f"toy {n}" for n in range(4)]
    assert (out.row("group acc").low, out.row("group acc").high) == (pytest.approx(0.304), pytest.approx(0.696))
    assert out.row("text perplexity").low is None and out.row("text perplexity").better == "lower"
    assert out.cost.tokens == {lm.name: 7}
    assert out.measured["harness"] == "0.0"
    assert not lm.model._forward_pre_hooks  # nothing stays behind


def test_a_control_is_attached_while_the_harness_runs(harness: dict[str, Any]) -> None:
    from trimtab.control import Control, Steered

    class Push(Control):
        name, final = "push", True

        def edit(self, hidden: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
            return hidden + torch.linspace(-1, 1, hidden.shape[-1])

        def check(self, model: Any) -> None: ...

    lm = tiny_lm()
    tool = LmEval(LmEvalConfig(tasks=("toy",)))
    tool.measure(Subject(lm, "tiny"))
    plain = harness["logits"]
    tool.measure(Subject(Steered(lm, Push()), "steered"))
    assert not torch.allclose(harness["logits"], plain)
    tool.measure(Subject(lm, "tiny"))
    assert torch.equal(harness["logits"], plain)


def test_what_is_refused(harness: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    with pytest.raises(UsageError, match="--tasks NAME"):
        LmEvalConfig()
    with pytest.raises(UsageError, match="refused absent"):
        LmEval(LmEvalConfig(tasks=("absent",))).measure(Subject(lm, "tiny"))
    with pytest.raises(UsageError, match="no folder"):
        LmEval(LmEvalConfig(tasks=("toy",), include=Path("absent"))).measure(Subject(lm, "tiny"))
    with pytest.raises(UsageError, match="no chat template"):
        LmEval(LmEvalConfig(tasks=("toy",), chat=True)).measure(Subject(lm, "tiny"))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'lm_eval\[hf\]'"):
        LmEval(LmEvalConfig(tasks=("toy",))).measure(Subject(lm, "tiny"))


TASK = """
task: trimtab_toy
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def test_the_real_harness_agrees_with_multiple_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where lm-evaluation-harness is installed: the same questions, the same points, question by question."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness")
    from trimtab.measure.multiple_choice import MultipleChoice

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    rows = [
        {"question": f"da {word} ?", "choices": ["ba be", "gi", "lo lu"], "answer": 1} for word in ("fa", "me", "ro")
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.yaml").write_text(TASK.replace("QUESTIONS", str(questions)))
    lm = tiny_lm()
    theirs = LmEval(LmEvalConfig(tasks=("trimtab_toy",), include=tmp_path)).measure(Subject(lm, "tiny"))
    ours = MultipleChoice().measure(Subject(lm, "tiny", texts=[questions]))
    assert theirs.samples["trimtab_toy acc"] == ours.samples["accuracy"]
    assert theirs.cost.tokens_forwarded > 0
