"""Reading a prompts file: text, one prompt a line, or JSONL with a `prompt` (a string, or messages) on every line.

A file whose name ends in .jsonl, or whose first line is a JSON object, is read as JSONL. Every broken line is counted
and the first is named as file:line; nothing is skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.errors import UsageError
from trimtab.policy import Prompt

ROLES = ("system", "user", "assistant")


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file, in order. UsageError for an absent or empty file, a broken line, an empty prompt."""
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UsageError(f"cannot read the prompts file {path}: {error.strerror}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise UsageError(f"the prompts file {path} is empty: one prompt a line, or JSONL with a 'prompt' on every line")
    parse = _parse_row if path.suffix == ".jsonl" or lines[0].startswith(b"{") else check_prompt
    prompts: list[Prompt] = []
    broken: list[tuple[int, str]] = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(parse(line.removesuffix(b"\r").decode()))
        except UnicodeDecodeError as error:
            broken.append((number, f"not UTF-8 (byte {error.start + 1} of the line)"))
        except ValueError as error:
            broken.append((number, str(error)))
    if broken:
        number, reason = broken[0]
        more = ", ".join(str(other) for other, _ in broken[1:6]) + (", ..." if len(broken) > 6 else "")
        rest = f" ({len(broken) - 1} more broken: line {more})" if more else ""
        raise UsageError(f"{path}:{number}: {reason}{rest}")
    return prompts


def check_prompt(prompt: Any) -> Prompt:
    """The prompt itself if it is one: a string that is not blank, or messages that end with the user's turn.

    ValueError otherwise, saying what is wrong.
    """
    if isinstance(prompt, str):
        _check_text(prompt, "the prompt")
        return prompt
    if not isinstance(prompt, list):
        raise ValueError(f"the prompt is {_kind(prompt)}: a string or a list of messages is needed")
    if not prompt:
        raise ValueError("the prompt has no messages")
    for turn, message in enumerate(prompt, start=1):
        _check_message(turn, message, prompt[turn - 2] if turn > 1 else None)
    if prompt[-1]["role"] != "user":
        raise ValueError(f"the last message is from the {prompt[-1]['role']}: it must be the user's")
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def _parse_row(line: str) -> Prompt:
    if not line.strip():
        raise ValueError("empty line")
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(row, dict) or "prompt" not in row:
        found = f"an object with {', '.join(sorted(row)) or 'no keys'}" if isinstance(row, dict) else _kind(row)
        raise ValueError(f"an object with a 'prompt' is needed, this is {found}")
    return check_prompt(row["prompt"])


def _check_message(turn: int, message: Any, before: dict[str, Any] | None) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"message {turn} needs a 'role' and a 'content'")
    role = message["role"]
    if role not in ROLES:
        raise ValueError(f"message {turn} has the role {role!r}: one of {', '.join(ROLES)} is needed")
    if role == "system" and before is not None:
        raise ValueError(f"message {turn} is from the system: only the first may be")
    if before is not None and before["role"] == role:
        raise ValueError(f"messages {turn - 1} and {turn} are both from the {role}: turns alternate")
    if not isinstance(message["content"], str):
        raise ValueError(f"the content of message {turn} is {_kind(message['content'])}: text is needed")
    _check_text(message["content"], f"message {turn}")


def _check_text(text: str, what: str) -> None:
    if not text.strip():
        raise ValueError(f"{what} is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{what} holds half of a surrogate pair, which is no character")


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")
