"""Forms of files of questions whose answers can be checked by a rule or by running code.

`kind` says how: "number" (the last number), "boxed" (the last boxed expression), "function" (code that a test's
check(entry_point) must pass), "asserts" (code, then a list of asserts), "instructions" (constraints on the text), "exact".
"""

from __future__ import annotations

import re
from typing import Any

from trimtab.measure.adapters.form import Form, Item, Row, as_text, form, get, optional, text

FINAL = re.compile(r"####\s*(.+?)\s*$")


def _question(row: Row) -> Item:
    """`#### 42` at the end of the answer marks a worked answer with a number; anything else is to be met exactly."""
    value = get(row, "answer")
    answer = as_text(str(value) if isinstance(value, int | float) else value, "answer")
    marked = FINAL.search(answer.rstrip())
    kind, final = ("number", marked[1]) if marked else ("exact", answer.strip())
    return _item(row, kind, text(row, "question"), final, answer)


def _problem(row: Row) -> Item:
    solution = text(row, "solution")
    if "\\boxed" not in solution:
        raise ValueError("the solution has no \\boxed answer")
    return _item(row, "boxed", text(row, "problem"), optional(row, "answer") or solution, solution)


def _function(row: Row) -> Item:
    reference = optional(row, "canonical_solution")
    item = _item(row, "function", text(row, "prompt"), reference, reference)
    return item | {"tests": [text(row, "test")], "entry_point": text(row, "entry_point"), "setup": ""}


def _asserts(question: str) -> Any:
    def make(row: Row) -> Item:
        tests = get(row, "test_list")
        if not isinstance(tests, list) or not tests:
            raise ValueError("test_list is no list of asserts")
        imports = get(row, "test_imports") or []
        setup = "\n".join([optional(row, "test_setup_code"), *map(str, imports)]).strip()
        item = _item(row, "asserts", text(row, question), text(row, "code"), text(row, "code"))
        return item | {"tests": [as_text(one, "a test") for one in tests], "entry_point": "", "setup": setup}

    return make


def _instructions(row: Row) -> Item:
    return _item(row, "instructions", text(row, "prompt"), "", "") | {
        "tests": [{"id": name, "arguments": arguments}
                  for name, arguments in zip(get(row, "instruction_id_list"), get(row, "kwargs"), strict=True)]
    }  # fmt: skip


def _item(row: Row, kind: str, question: str, answer: str, reference: str) -> Item:
    """answer: what is compared with; reference: a whole right answer, for few-shot prompts and for checking."""
    return {
        "kind": kind,
        "id": optional(row, "task_id", "id", "key", "unique_id"),
        "question": question,
        "answer": answer,
        "reference": reference,
        "subject": optional(row, "subject", "type", "category", "level"),
    }


FORMS: tuple[Form, ...] = (
    form("verify", "question answer", _question),
    form("verify", "problem solution", _problem),
    form("verify", "prompt test entry_point", _function),
    form("verify", "text code test_list", _asserts("text")),
    form("verify", "prompt code test_list", _asserts("prompt")),
    form("verify", "prompt instruction_id_list kwargs", _instructions),
)
