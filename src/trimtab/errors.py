"""The two errors a user meets. `UsageError` ends the command line with one sentence and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrimtabError(Exception):
    """Something went wrong that is not the user's to mend by another argument (exit code 1)."""


class UsageError(TrimtabError):
    """What was given cannot work. The message says what was given, what was expected and what to do."""


def unknown(kind: str, given: str, known: Iterable[str]) -> UsageError:
    """A `UsageError` for a name that does not exist, with the nearest match and the whole list."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UsageError(f"unknown {kind} {given!r}{hint} (known: {', '.join(names) or 'none'})")
