"""`trimtab quickstart`: the table on an embedded model, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.cli.arguments import Parser, add_json
from trimtab.cli.compare import compare_and_print
from trimtab.cli.output import check_json

POLICIES = ("best-of-n:n=8", "static-re", "re-control", "pref-ctrl", "natural-control")
TEST_PROMPTS, FIT_PROMPTS, SAMPLES = 64, 256, 2
EXAMPLES = """\
  trimtab quickstart
  trimtab quickstart --out runs/first --json first.json"""


def run(words: list[str]) -> None:
    """Compares plain pocket/base with five ways to improve it; gold comes from a judge that knows the truth."""
    parser = Parser(
        "quickstart",
        "Compares six policies on pocket/base, a tiny model inside this package: no download, no GPU, a few minutes.",
        EXAMPLES,
    )
    parser.add_argument("--out", default="runs/quickstart", metavar="DIR", help="run directory (runs/quickstart)")
    add_json(parser)
    args = parser.parse(words)
    check_json(args.json)
    compare_and_print(settings(), Path(args.out), args.json)


def settings() -> dict[str, Any]:
    """The comparison that quickstart runs."""
    from trimtab import pocket

    return {
        "model": "pocket/base",
        "reward": "pocket/reward",
        "gold": "pocket/judge",
        "prompts": pocket.prompts("test", TEST_PROMPTS, 0),
        "policies": list(POLICIES),
        "fit_prompts": pocket.prompts("fit", FIT_PROMPTS, 0),
        "sweep": True,
        "coherence": False,  # its embedder takes longer to load than the comparison of one policy
        "max_new_tokens": 48,
        "temperature": 1.0,
        "seed": 0,
        "samples": SAMPLES,
    }
