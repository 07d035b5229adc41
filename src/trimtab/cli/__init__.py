"""The command line: `trimtab VERB ...`. This file imports neither torch nor a verb until one is asked for.

Exit codes: 0 done, 1 something went wrong, 2 the command cannot work as given (one sentence on stderr), 130 Ctrl-C,
141 the reader of the output went away.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from trimtab import __version__
from trimtab.errors import TrimtabError, UsageError, unknown

# verb -> what it does; its code is trimtab.cli.VERB, with `run(arguments: list[str])`
VERBS = {
    "quickstart": "compare six policies on an embedded model, offline, in a few minutes",
    "compare": "the table: policies on your model and prompts, with intervals and costs",
    "fit": "fit a controller and save it",
    "generate": "answer prompts, plainly, with a policy or with a saved controller",
    "merge": "several checkpoints into one: sixteen methods, alignment, least squares",
    "measure": "one diagnostic on a model or a policy: refusals, capability, probes, rankings, ...",
    "methods": "list the methods, show one with its options, or plan which to use",
    "report": "write report.html for a finished run",
}
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
RESUMABLE = ("quickstart", "compare", "fit", "merge", "measure")

HELP = f"""usage: trimtab VERB [options]

Align open-weight language models by moving something small, and see what it costs.

verbs:
{chr(10).join(f"  {verb:<12}{text}" for verb, text in VERBS.items())}

examples:
  trimtab quickstart
  trimtab compare pocket/base --reward pocket/reward --prompts prompts.jsonl --policy best-of-n:n=8
  trimtab compare MODEL --reward sentiment --prompts prompts.txt --policy natural-control:kl_target=0.05
  trimtab measure refusal MODEL --texts harmful.txt harmless.txt --against OTHER
  trimtab methods natural-control

MODEL is pocket/NAME (base, chat, nano), a local folder or a Hub id.
trimtab VERB --help says more; trimtab --version prints the version.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = words[0] if words else ""
    # Libraries' own bars and notes would stand between ours; whoever wants them sets these.
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn  # type: ignore[assignment]
                _dispatch(verb, words[1:])
        finally:
            sys.stdout.flush()
    except UsageError as error:
        return _end(2, str(error))
    except TrimtabError as error:
        return _end(1, str(error))
    except KeyboardInterrupt:
        again = ": the same command continues where it was" if verb in RESUMABLE else ""
        return _end(130, f"stopped{again}")
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`). Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _end(1, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    return 0


def _dispatch(verb: str, words: list[str]) -> None:
    if verb in ("", "-h", "--help", "help"):
        sys.stdout.write(HELP)
    elif verb in ("-V", "--version"):
        sys.stdout.write(f"trimtab {__version__}\n")
    elif verb in VERBS:
        importlib.import_module(f"trimtab.cli.{verb}").run(words)
    elif verb.startswith("-"):
        raise unknown("option", verb, ("--help", "--version"))
    else:
        raise unknown("verb", verb, VERBS)


def _warn(message: Warning | str, *_: object) -> None:
    """A warning as one line, without the path and the source line that Python puts around it."""
    print(f"trimtab: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _end(code: int, message: str) -> int:
    """One line on stderr, whatever the message holds."""
    print(f"trimtab: {' '.join(message.split())}", file=sys.stderr)
    return code
