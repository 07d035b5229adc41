"""The command line's outer layer: help, exit codes, one sentence on stderr, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab import __version__, cli
from trimtab.errors import TrimtabError

HEAVY = ("torch", "transformers", "rich", "numpy", "tyro", "pydantic")
COMPARE = "compare pocket/base --reward length:target=30 --prompts prompts.txt --policy best-of-n:n=2".split()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a prompts file, to see that nothing else is written to it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("Once upon a time\nThe cat\n")
    return tmp_path


def fails(capsys: pytest.CaptureFixture[str], words: list[str], code: int = 2) -> str:
    """Runs a command that must fail with `code` and one line on stderr; returns that line."""
    before = sorted(Path.cwd().rglob("*"))
    assert cli.main(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("trimtab: ") and "Traceback" not in err
    assert sorted(Path.cwd().rglob("*")) == before, "a refused command wrote something"
    return last


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], *([verb, "--help"] for verb in cli.VERBS)])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from trimtab.cli import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        f"assert not code, code; print(sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)"
    ).replace(repr(HEAVY), f"set({HEAVY!r})")
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    if "--version" in words:
        assert done.stdout == f"trimtab {__version__}\n"
    else:
        assert "examples:" in done.stdout and "trimtab" in done.stdout


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, trimtab, trimtab.catalogue; trimtab.UsageError; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_unknown_verb_or_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown verb 'comprae'; did you mean 'compare'?" in fails(capsys, ["comprae"])
    assert "unknown option '--hlep'; did you mean '--help'?" in fails(capsys, ["--hlep"])
    assert "'--promts'; did you mean '--prompts'?" in fails(capsys, ["generate", "pocket/base", "--promts", "x"])
    assert "MODEL" in fails(capsys, ["generate"])


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--max-new-tokens", "many", "--max-new-tokens: 'many' is not a whole number of 0 or more"),
        ("--temperature", "-1", "--temperature"),
        ("--temperature", "nan", "'nan' is not 0 (greedy) or more"),
        ("--seed", "1.5", "'1.5' is not a whole number"),
        ("--samples", "0", "'0' is not a whole number of 1 or more"),
        ("--policy", "best-of-m", "unknown policy 'best-of-m'; did you mean 'best-of-n'?"),
        ("--policy", "best-of-n:n", "'n' in 'best-of-n:n' is not key=value"),
        ("--policy", "best-of-n:n=2", "given twice"),
        ("--prompts", "absent.txt", "cannot read the prompts file absent.txt"),
        ("--json", "absent/x.json", "there is no folder absent"),
    ],
)
def test_compare_refuses_before_it_starts(
    folder: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str, message: str
) -> None:
    assert message in fails(capsys, [*COMPARE, flag, value])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": "b"\n{"prompt": ""}\n', "prompts.jsonl:2: not JSON"),
        (b'{"prompt": "a"}\n\n{"prompt": "b"}\n', "prompts.jsonl:2: empty line"),
        (b"\xff\n", "prompts.jsonl:1: not UTF-8"),
        (b"\n\n", "prompts.jsonl is empty"),
    ],
)
def test_a_broken_prompts_file_is_located(
    folder: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (folder / "prompts.jsonl").write_bytes(content)
    assert message in fails(capsys, [*COMPARE, "--prompts", "prompts.jsonl"])


def test_generate_wants_one_kind_of_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give one PROMPT or --prompts FILE" in fails(capsys, ["generate", "pocket/base"])
    assert "not both" in fails(capsys, ["generate", "pocket/base", "hello", "--prompts", "prompts.txt"])
    assert "the prompt is empty" in fails(capsys, ["generate", "pocket/base", "  "])
    both = ["generate", "pocket/base", "hello", "--policy", "re-control", "--controller", "x"]
    assert "exclude each other" in fails(capsys, both)
    assert "no such folder" in fails(capsys, ["generate", "pocket/base", "hello", "--controller", "absent"])


def test_report_of_what_is_no_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no folder absent" in fails(capsys, ["report", "absent"])
    assert "no compare.json" in fails(capsys, ["report", "."])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (TrimtabError("it broke\nbadly"), 1, "trimtab: it broke badly"),
        (KeyboardInterrupt(), 130, "the same command continues"),
        (OSError(28, "No space left on device", "x.json"), 1, "trimtab: No space left on device: x.json"),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    def broken(verb: str, words: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "_dispatch", broken)
    assert cli.main(["compare"]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["compare", "--help"]])
def test_a_closed_pipe_is_quiet(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "trimtab", *words], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    # argparse itself ignores the error where output is unbuffered: then the command has ended well.
    assert done.stderr == b"" and done.returncode in (0, 141)
