"""`trimtab report`: the HTML of a finished run, written again."""

from __future__ import annotations

from pathlib import Path

from trimtab.cli.arguments import Parser
from trimtab.errors import UsageError

EXAMPLES = "  trimtab report runs/quickstart"


def run(words: list[str]) -> None:
    """Writes report.html and says where."""
    parser = Parser(
        "report", "Writes report.html, one self-contained file, from the figures of a finished run.", EXAMPLES
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the --out of a comparison")
    folder = Path(parser.parse(words).run_dir)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    if not (folder / "compare.json").is_file():
        raise UsageError(f"{folder} has no compare.json: finish the comparison first (the same command continues it)")

    from trimtab.report import write_report

    print(f"report: {write_report(folder)}")
