from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.errors import UsageError
from trimtab.prompts import check_prompt, read_prompts

TURN = {"role": "user", "content": "Hi"}


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_is_one_prompt_a_line_spaces_kept(tmp_path: Path) -> None:
    path = written(tmp_path, "with space é.txt", "\ufeffOnce \r\n  upon é\u2028x\n[a] time \n\n")
    assert read_prompts(path) == ["Once ", "  upon é\u2028x", "[a] time "]


def test_jsonl_holds_strings_and_messages_and_other_keys(tmp_path: Path) -> None:
    rows = '{"prompt": "a\\nb", "family": "fact"}\n{"prompt": [{"role": "user", "content": "Hi", "x": 1}]}'
    assert read_prompts(written(tmp_path, "p.jsonl", rows)) == ["a\nb", [TURN]]
    assert read_prompts(written(tmp_path, "p.txt", rows)) == ["a\nb", [TURN]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "p.txt is empty"),
        ("p.txt", b" \n\n", "p.txt is empty"),
        ("p.txt", b"a\n\nb\n", "p.txt:2: the prompt is empty"),
        ("p.txt", b"a\nb\xffc\n", r"p.txt:2: not UTF-8 \(byte 2 of the line\)"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"\n1\n{}\n', r"p.jsonl:2: not JSON .* \(2 more broken: line 3, 4\)"),
        ("p.jsonl", b"[1]\n", "this is a list"),
        ("p.jsonl", b'{"text": "a"}\n', "this is an object with text"),
        ("p.jsonl", b'{"prompt": null}\n', "the prompt is null: a string or a list of messages is needed"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "half of a surrogate pair"),
        ("p.jsonl", b'{"prompt": " "}\n', "p.jsonl:1: the prompt is empty"),
    ],
)
def test_a_broken_line_is_located(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_prompts(written(tmp_path, name, content))


def test_a_folder_or_an_absent_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UsageError, match="cannot read the prompts file"):
            read_prompts(path)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ([{"role": "user"}], "message 1 needs a 'role' and a 'content'"),
        ([{"role": "robot", "content": "x"}], "role 'robot'"),
        ([{"role": "user", "content": ["x"]}], "content of message 1 is a list"),
        ([{"role": "user", "content": ""}], "message 1 is empty"),
        ([TURN, TURN], "messages 1 and 2 are both from the user"),
        ([TURN, {"role": "system", "content": "x"}], "only the first may be"),
        ([TURN, {"role": "assistant", "content": "x"}], "must be the user's"),
    ],
)
def test_messages_that_cannot_be_answered(messages: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_prompt(messages)
