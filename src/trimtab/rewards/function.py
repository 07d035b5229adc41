"""A Python function as a reward: `Function(fn)` from Python, `python:path=FILE.py,function=NAME` from a command line.

`fn(prompts, texts)` takes the whole batch and gives one number, or None for "could not judge", a row; with
`batched=False` it is `fn(prompt, text)`, called once a row. Only a file that the user names is ever run.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from trimtab.errors import TrimtabError, UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.policy import Prompt
from trimtab.rewards.base import Reward


class Function(Reward):
    """`fn(prompts, texts) -> N numbers or None`, or with `batched=False` `fn(prompt, text) -> number or None`.

    The fingerprint hashes the function's source; values it closes over are not seen.
    """

    slug = "function"
    failure: ClassVar[type[TrimtabError]] = UsageError

    def __init__(self, fn: Callable[..., Any], name: str | None = None, batched: bool = True) -> None:
        if not callable(fn):
            raise UsageError(f"a function reward needs a callable, not {type(fn).__name__}")
        self.fn, self.batched = fn, batched
        self._name = str(name or getattr(fn, "__name__", type(fn).__name__))

    @property
    def name(self) -> str:
        return self._name

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.slug, self._name, self.batched, _source(self.fn))

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Any:
        if self.batched:
            return self.fn(list(prompts), list(texts))
        return [self.fn(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


@dataclass(eq=False)
class PythonFile(Reward):
    """The function `function` of the Python file `path`, run in this process. The file is imported at construction."""

    slug = "python"
    failure: ClassVar[type[TrimtabError]] = UsageError

    path: Path  # the Python file
    function: str  # the name of the function in it
    batched: bool = True  # fn(prompts, texts) -> list; false: fn(prompt, text) -> number, once a row

    def __post_init__(self) -> None:
        self._function  # noqa: B018  a file that cannot serve is refused here, not in the middle of a run

    @cached_property
    def _function(self) -> Function:
        path = Path(self.path)
        if not path.is_file():
            raise UsageError(f"reward 'python': no file {str(path)!r}")
        spec = importlib.util.spec_from_file_location(f"trimtab_reward_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise UsageError(f"reward 'python': {str(path)!r} is not a Python file (its name must end in .py)")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the user's file raises while it is imported
            raise UsageError(f"reward 'python': {str(path)!r} raised {type(error).__name__}: {error}") from error
        fn = getattr(module, self.function, None)
        if not callable(fn):
            raise UsageError(f"reward 'python': {str(path)!r} has no function {self.function!r}")
        return Function(fn, name=self.name, batched=self.batched)

    @property
    def name(self) -> str:
        return f"python:{Path(self.path).stem}.{self.function}"

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.slug, self.function, self.batched, Path(self.path).read_text(encoding="utf-8"))

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Any:
        return self._function._score(prompts, texts)


def _source(fn: Callable[..., Any]) -> str:
    """The source text, with bytecode and constants where there are any (two lambdas may share a line)."""
    target: Any = fn if inspect.isroutine(fn) else type(fn)
    code = getattr(target, "__code__", None)
    try:
        source = inspect.getsource(target)
    except (OSError, TypeError):  # typed at a prompt, or not written in Python
        source = str(getattr(target, "__qualname__", type(fn).__qualname__))
    if code is None:
        return source
    constants = [constant for constant in code.co_consts if not inspect.iscode(constant)]
    return f"{source} {code.co_code.hex()} {constants} {code.co_names}"
