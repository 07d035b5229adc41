"""One self-contained HTML file from a run directory: no request, no script needed to read it, the same bytes each time.

write_report(run_dir)   reads compare.json, samples.jsonl, and sweep.json and run.json if there; writes report.html
render(...)             the same from parsed data, as a string
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.errors import UsageError

__all__ = ["render", "write_report"]

_NEEDED = {"policy": str, "prompt_index": int, "sample": int, "prompt": str, "text": str}


def render(
    compare: dict[str, Any],
    samples: list[dict[str, Any]],
    sweep: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
) -> str:
    """The report as HTML. UsageError: compare names no policy, or is of a schema that this version does not know."""
    from trimtab.report import page

    if compare.get("schema", 1) != 1:
        raise UsageError(f"compare.json has schema {compare.get('schema')!r}; this version of trimtab reads schema 1")
    if not compare.get("policies"):
        raise UsageError("compare.json names no policies, so there is nothing to report")
    return page.render(compare, samples, sweep, run)


def write_report(run_dir: str | Path) -> Path:
    """Writes RUN_DIR/report.html atomically and returns its path. UsageError names the file, and line, at fault."""
    from trimtab.run import write_atomic

    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UsageError(f"{run_dir} is not a run directory: `trimtab compare ... --out {run_dir}` makes one")
    compare = _read_json(run_dir / "compare.json", needed=True) or {}
    html = render(
        compare,
        _read_samples(run_dir / "samples.jsonl"),
        _read_json(run_dir / "sweep.json"),
        _read_json(run_dir / "run.json"),
    )
    path = run_dir / "report.html"
    write_atomic(path, html)
    return path


def _read_json(path: Path, needed: bool = False) -> dict[str, Any] | None:
    if not path.exists():
        if needed:
            raise UsageError(
                f"{path} is missing: the comparison is not finished; run the same `trimtab compare` again to finish it"
            )
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def _read_samples(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise UsageError(
            f"{path} is missing: the comparison is not finished; run the same `trimtab compare` again to finish it"
        )
    rows = []
    for line_number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}, line {line_number}: not JSON ({error})") from error
        wrong = [
            key for key, kind in _NEEDED.items() if not isinstance(row, dict) or not isinstance(row.get(key), kind)
        ]
        if wrong:
            raise UsageError(f"{path}, line {line_number}: {', '.join(wrong)} missing or of the wrong type")
        rows.append(row)
    return rows
