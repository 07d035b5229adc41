"""Promises about the package as a whole, read from its source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab

SOURCE = Path(trimtab.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_no_file_unpickles_or_holds_two_ideas(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert not imported(tree) & PICKLERS
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not {"torch.load", "eval", "exec"} & calls
    assert text.count("\n") <= 600


def test_every_name_of_the_package_can_be_had() -> None:
    for name in trimtab.__all__:
        assert getattr(trimtab, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        trimtab.LMM  # noqa: B018


def test_compare_is_the_function_whatever_is_imported_first() -> None:
    code = "from trimtab.compare import run_compare; import trimtab; print(callable(trimtab.compare))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr
