"""`trimtab compare`: the table for any policies on any prompts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.cli.arguments import Parser, add_json, add_reward, add_sampling, whole
from trimtab.cli.output import check_json, progress, text_stream, write_result
from trimtab.errors import UsageError
from trimtab.files import dump_json
from trimtab.prompts import read_prompts

EXAMPLES = """\
  trimtab compare pocket/base --reward pocket/reward --gold pocket/judge --prompts prompts.jsonl \\
      --policy best-of-n:n=8 --policy re-control:step_size=3,steps=10 --policy natural-control:kl_target=0.05
  trimtab compare MODEL --reward sentiment --prompts openings.txt --policy natural-control --sweep
  trimtab compare MODEL --reward sentiment --prompts p.txt --budget tokens=400 --policy best-of-n --policy qalign
  trimtab compare MODEL --reward sentiment --prompts p.txt --policy "best-of-n:n=4 over natural-control"
  trimtab compare MODEL --reward sentiment --prompts p.txt --policy natural-control --measure branching-factor \
      --measure "refusal:texts=harmful.txt|harmless.txt"
  trimtab compare MODEL --reward length:target=30 --prompts p.txt --policy best-of-n:n=4 --json - > table.json
  trimtab compare MODEL --reward sentiment --prompts p.txt --policy re-control:controller=fits/mine"""


def run(words: list[str]) -> None:
    """Compares, prints the table, and says where the report is."""
    parser = Parser("compare", "Compares policies with the plain model: what each gains, and what it costs.", EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="pocket/NAME, a local folder or a Hub id")
    add_reward(parser, required=True)
    parser.add_argument("--prompts", required=True, metavar="FILE", help="text, one a line, or JSONL with 'prompt'")
    parser.add_argument(
        "--policy",
        required=True,
        action="append",
        metavar="NAME[:key=value,...]",
        help="a method (trimtab methods) with its options, or controller=DIR for a saved one; "
        "'A over B' puts one on another; may be repeated",
    )
    parser.add_argument("--gold", metavar="NAME", help="a second score that no method sees: is the gain real?")
    parser.add_argument("--fit-prompts", metavar="FILE", help="prompts for fitting (default: those of --prompts)")
    parser.add_argument(
        "--sweep", action="store_true", help="also measure each steered policy over a range of strengths"
    )
    parser.add_argument(
        "--budget",
        metavar="tokens=N|kl=X",
        help="size every policy to N tokens forwarded an answer (all models), or to a KL of X nats a token",
    )
    parser.add_argument(
        "--measure",
        action="append",
        default=[],
        metavar="NAME[:texts=FILE|FILE,...]",
        help="a diagnostic (trimtab methods) asked of every policy; may be repeated",
    )
    parser.add_argument("--judge", metavar="SPEC", help="who judges, for --measure judge and varco-arena")
    parser.add_argument("--no-coherence", action="store_true", help="leave out the measure that needs a text embedder")
    add_sampling(parser)
    parser.add_argument("--samples", type=whole(1), default=1, metavar="K", help="answers a prompt (1)")
    parser.add_argument("--out", metavar="DIR", help="run directory; the same command resumes (runs/compare-...)")
    add_json(parser)
    args = parser.parse(words)

    if twice := sorted({policy for policy in args.policy if args.policy.count(policy) > 1}):
        raise UsageError(f"--policy {twice[0]} is given twice")
    check_json(args.json)
    prompts = read_prompts(args.prompts)
    settings: dict[str, Any] = {
        "model": args.model,
        "reward": args.reward,
        "gold": args.gold,
        "prompts": prompts,
        "policies": args.policy,
        "fit_prompts": read_prompts(args.fit_prompts) if args.fit_prompts else None,
        "sweep": args.sweep,
        "coherence": not args.no_coherence,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
        "samples": args.samples,
        **({"budget": args.budget} if args.budget else {}),
        **({"measures": args.measure} if args.measure else {}),
        **({"judge": args.judge} if args.judge else {}),
    }
    compare_and_print(settings, Path(args.out) if args.out else default_out(settings), args.json)


def compare_and_print(settings: Mapping[str, Any], out: Path, json_to: str | None) -> None:
    """Runs a comparison, prints its table, writes its JSON, and says where the report is."""
    from trimtab.compare import run_compare

    with progress() as say:
        result = run_compare(**settings, out=out, progress=say)
    from trimtab.cli.measured import print_measured
    from trimtab.cli.table import print_table

    stream = text_stream(json_to)
    print_table(result, stream)
    for one in result.get("measures", ()):  # against the base where there is a comparison
        print(file=stream)
        print_measured({**one, "measurements": [] if one["comparisons"] else one["measurements"]}, stream)
    print(f"report: {out / 'report.html'}\nfigures: {out / 'compare.json'}", file=stream)
    write_result(json_to, result)


def default_out(settings: Mapping[str, Any]) -> Path:
    """A folder of its own for each command, so that the same command finds its run again."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(settings["model"])).strip("-.") or "model"
    return Path("runs") / f"compare-{name[-40:]}-{hashlib.sha256(dump_json(settings).encode()).hexdigest()[:8]}"
