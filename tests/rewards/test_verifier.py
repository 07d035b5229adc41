"""Right or wrong as a reward: `verifier:file=FILE`."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import pytest

from trimtab.errors import UsageError
from trimtab.rewards import Verifier, parse_reward


def file(folder: Path, row: dict[str, str]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path


def test_right_wrong_and_unknown(tmp_path: Path) -> None:
    path = file(tmp_path, {"question": "3 + 4?", "answer": "#### 7"})
    reward = parse_reward(f"verifier:file={path},prompt=Q: {{question}}\\nA:")
    prompts = ["3 + 4?", "Q: 3 + 4?\nA:", "3 + 4?", "3 + 5?"]
    texts = ["7.0", "It is 7.\nQ: 1 + 1?\nA: 2", "8", "8"]
    assert reward.score(prompts, texts) == [1, 1, 0, None]
    changed = Verifier(file=file(tmp_path, {"question": "3 + 4?", "answer": "#### 8"}))
    assert changed.fingerprint != Verifier(file=path, prompt="{question}").fingerprint
    with pytest.raises(UsageError, match="no {question} in it"):
        Verifier(file=path, prompt="Q:")


def test_code_is_run_only_where_it_is_allowed(tmp_path: Path) -> None:
    row = {"task_id": "t", "prompt": "def one():\n", "test": "def check(f): assert f() == 1", "entry_point": "one"}
    path = file(tmp_path, row)
    with pytest.raises(UsageError, match="--allow-code true"):
        Verifier(file=path)
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("needs the filter of system calls: Linux on x86_64 or aarch64")
    reward = Verifier(file=path, allow_code=True)
    texts = ["    return 1\n", "    return 2\n", "    import os; os._exit(0)\n"]
    assert reward.score(["def one():\n"] * 3, texts) == [1, 0, 0]
