"""From the comparisons of shootout.py to benchmarks/results/shootout.json, docs/shootout.md and one HTML report.

    python benchmarks/shootout_report.py

Every figure is a mean over answers with the 95 % interval of trimtab.measure.stats, prompts as clusters. A difference is
paired by prompt with best-of-n at the same budget, by gold where there is gold. Tables go between `<!-- table NAME -->`
and `<!-- end -->` in docs/shootout.md, pictures to docs/figures, the report to runs/shootout/report.html.
"""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.files import dump_json, write_atomic
from trimtab.measure.stats import paired_difference, verdict
from trimtab.report.svg import Panel, Scale, element, figure, num, shorten, text

ROOT = Path(__file__).resolve().parent.parent
RUNS, RESULTS = ROOT / "runs" / "shootout", ROOT / "benchmarks" / "results" / "shootout.json"
DOC, FIGURES = ROOT / "docs" / "shootout.md", ROOT / "docs" / "figures"
REFERENCE = "best-of-n"
STYLE = (
    "<style>text{font:13px system-ui,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif;fill:#191b20}"
    ".tick,.axis-title{font-size:12px;fill:#5d626c}.strong{font-weight:600}.grid{stroke:#e3e3de;fill:none}"
    ".axis,.zero{stroke:#8b909a;fill:none}.ground{fill:#fff}.whisker,.line{stroke-width:1.6;fill:none}"
    ".better{stroke:#1a5fb4}.worse{stroke:#b9540a}.undecided{stroke:#8b909a}"
    ".dot.better{fill:#1a5fb4}.dot.worse{fill:#b9540a}.dot.undecided{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e9eaec}.tick,.axis-title{fill:#a4a9b3}.grid{stroke:#31363e}"
    ".ground{fill:#1b1e23}.better{stroke:#74b0f7}.worse{stroke:#f2a263}.dot.better{fill:#74b0f7}"
    ".dot.worse{fill:#f2a263}.dot.undecided{fill:#1b1e23}}</style>"
)


def gather(runs: Path) -> dict[str, Any]:
    """world -> budget (0: no budget) -> policy -> figures, and the difference from best-of-n at each budget."""
    worlds: dict[str, Any] = {}
    scores: dict[str, dict[int, dict[str, list[dict[str, Any]]]]] = {}
    for folder in sorted(runs.glob("*-*/")):
        if not (folder / "compare.json").exists():
            continue
        world, _, rest = folder.name.partition("-")
        budget = 0 if rest == "fixed" else int(rest.removeprefix("tokens-"))
        compare = json.loads((folder / "compare.json").read_text())
        rows: dict[str, list[dict[str, Any]]] = {}
        for line in (folder / "samples.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row["policy"], []).append(row)
        scores.setdefault(world, {})[budget] = rows
        entry = worlds.setdefault(
            world, {key: compare[key] for key in ("model", "reward", "gold", "prompts", "samples")}
        )
        entry.setdefault("environment", compare["environment"])
        entry.setdefault("budgets", {})[str(budget)] = {one["name"]: figures(one) for one in compare["policies"]}
    for entry in worlds.values():
        entry["budgets"] = dict(sorted(entry["budgets"].items(), key=lambda item: int(item[0])))
    for world, by_budget in scores.items():
        judge = "gold" if worlds[world]["gold"] else "reward"
        for budget, rows in by_budget.items():
            for name in rows:
                found = worlds[world]["budgets"][str(budget)][name]
                found["difference"] = {
                    str(at): difference(rows[name], others[REFERENCE], judge)
                    for at, others in sorted(by_budget.items())
                    if at and budget in (0, at) and name != REFERENCE
                }
    return worlds


def figures(one: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a policy's record."""
    cost = one["cost"]
    return {
        "reward": one["reward"],
        "gold": one["gold"],
        "kl_per_token": one["kl_per_token"],
        "diversity": one["diversity"],
        "length": one["length_tokens"],
        "tokens": cost["tokens_forwarded_per_answer"],
        "reward_calls": cost["reward_calls_per_answer"],
        "seconds": cost["seconds_per_answer"],
        "fit_seconds": cost["fit_seconds"],
        "fit_tokens": cost["fit_tokens"],
        "budget": one.get("budget"),
    }


def difference(rows: list[dict[str, Any]], others: list[dict[str, Any]], judge: str) -> dict[str, Any]:
    """Mean paired difference by prompt and sample, its interval, and what it decides."""
    pair = [[np.nan if row[judge] is None else row[judge] for row in side] for side in (rows, others)]
    found = paired_difference(pair[0], pair[1], [row["prompt_index"] for row in rows])
    return {**found.to_dict(), "verdict": verdict(found)}


def tables(worlds: dict[str, Any]) -> dict[str, str]:
    """Markdown by name: for each world one table a budget and one of what no budget sizes."""
    out = {}
    for world, entry in worlds.items():
        judge = "gold" if entry["gold"] else "reward"
        for budget, policies in entry["budgets"].items():
            head = [
                "policy",
                "reward",
                *(["gold"] if judge == "gold" else []),
                "KL/token",
                "tokens",
                "reward calls",
                "s/answer",
            ]
            ats = [at for at in entry["budgets"] if at != "0"] if budget == "0" else [budget]
            head += [f"{judge} less best-of-n's at {at}" for at in ats]
            lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
            for name, one in sorted(policies.items(), key=lambda item: -(item[1][judge]["mean"] or 0)):
                sized = one["budget"]["changes"] if one["budget"] else {}
                shown = f"{name} ({', '.join(f'{k}={v:.3g}' for k, v in sized.items())})" if sized else name
                over = " **over budget**" if one["budget"] and one["budget"]["met"] is False else ""
                cells = [shown + over, plus(one["reward"])]
                cells += [plus(one["gold"])] if judge == "gold" else []
                kl = one["kl_per_token"]
                cells += ["-" if not kl or kl["mean"] is None else f"{kl['mean']:.3f}", f"{one['tokens']:.0f}"]
                cells += [f"{one['reward_calls']:.0f}", f"{one['seconds']:.3f}"]
                cells += [said(one["difference"].get(at)) for at in ats]
                lines.append("| " + " | ".join(cells) + " |")
            out[f"{world}-{budget}"] = "\n".join(lines)
        out[f"{world}-optimism"] = optimism(entry)
    return out


def optimism(entry: dict[str, Any]) -> str:
    """Per method the change of proxy and of gold from the smallest to the largest budget."""
    if not entry["gold"]:
        return "no gold"
    small, large = (str(at(int(b) for b in entry["budgets"] if b != "0")) for at in (min, max))
    lines = [f"| policy | reward at {small} | at {large} | gold at {small} | at {large} |", "|---|---|---|---|---|"]
    for name, one in entry["budgets"][small].items():
        other = entry["budgets"][large].get(name)
        if other and name != "base":
            lines.append(
                "| " + " | ".join([name, *(plus(x[k]) for k in ("reward", "gold") for x in (one, other))]) + " |"
            )
    return "\n".join(lines)


def plus(interval: dict[str, Any] | None) -> str:
    if interval is None or interval["mean"] is None:
        return "-"
    half = "?" if interval["low"] is None else f"{(interval['high'] - interval['low']) / 2:.2f}"
    return f"{interval['mean']:.2f} ±{half}"


def said(found: dict[str, Any] | None) -> str:
    if found is None or found["mean"] is None:
        return "-"
    if found["low"] is None:
        return f"{found['mean']:+.2f}"
    mark = {"better": "**", "worse": "", "undecided": ""}[found["verdict"]]
    tail = " undecided" if found["verdict"] == "undecided" else ""
    return f"{mark}{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]{mark}{tail}"


def forest(world: str, entry: dict[str, Any]) -> str:
    """One panel a budget: the difference from best-of-n at that budget, a row a method, 95 % intervals."""
    budgets = [b for b in entry["budgets"] if b != "0"]
    names = list(dict.fromkeys(n for b in [*budgets, "0"] for n in entry["budgets"].get(b, {}) if n != REFERENCE))

    def found(name: str, budget: str) -> dict[str, Any] | None:
        for at in (budget, "0"):
            one = entry["budgets"].get(at, {}).get(name)
            if one and one["difference"].get(budget, {}).get("mean") is not None:
                return dict(one["difference"][budget])
        return None

    last = budgets[-1]
    names.sort(key=lambda name: -((found(name, last) or {}).get("mean") or -9))
    left, wide, gap, row = 330.0, 240.0, 26.0, 21.0
    top, height = 46.0, 46.0 + 21.0 * len(names) + 56.0
    values = [
        v
        for n in names
        for b in budgets
        if (d := found(n, b))
        for v in (d["low"], d["high"], d["mean"])
        if v is not None
    ]
    parts = [
        element("rect", x=0.0, y=0.0, width=left + len(budgets) * (wide + gap), height=height, class_="ground"),
        STYLE,
    ]
    for i, name in enumerate(names):
        parts.append(text(left - 14, top + row * (i + 0.7), shorten(name, 44), "", "end"))
    for p, budget in enumerate(budgets):
        start = left + p * (wide + gap)
        x = Scale.nice([*values, 0.0], start, start + wide, count=4)
        panel = Panel(x, Scale(0, 1, top + row * len(names), top))
        for tick in x.ticks():
            panel.parts.append(
                element("path", d=f"M{num(x.at(tick))} {num(top)}V{num(top + row * len(names))}", class_="grid")
            )
            panel.parts.append(text(x.at(tick), top + row * len(names) + 18, x.tick_label(tick), "tick", "middle"))
        panel.parts.append(
            element("path", d=f"M{num(x.at(0))} {num(top)}V{num(top + row * len(names))}", class_="axis")
        )
        panel.parts.append(text(start, 22, f"{int(budget):,} tokens an answer", "strong"))
        for i, name in enumerate(names):
            d = found(name, budget)
            if d is None:
                continue
            y = top + row * (i + 0.5)
            if d["low"] is not None:
                panel.parts.append(
                    element(
                        "path",
                        d=f"M{num(x.at(d['low']))} {num(y)}H{num(x.at(d['high']))}",
                        class_=f"whisker {d['verdict']}",
                    )
                )
            panel.parts.append(element("circle", cx=x.at(d["mean"]), cy=y, r=4.0, class_=f"dot {d['verdict']}"))
        parts.append(panel.markup)
    judge = "gold" if entry["gold"] else "reward"
    parts.append(
        text(
            left,
            height - 12,
            f"mean {judge} less that of best-of-n at the same budget; filled: the interval excludes 0",
            "axis-title",
        )
    )
    label = f"{world}: difference from best-of-n by method and budget"
    return figure(left + len(budgets) * (wide + gap), height, label, *parts)


def page(worlds: dict[str, Any], made: dict[str, str], pictures: dict[str, str]) -> str:
    """The report: one HTML file that asks for nothing from outside."""
    body = ["<h1>The shoot-out: test-time methods at equal cost</h1>"]
    for world, entry in worlds.items():
        what = f"{entry['model']} on {entry['prompts']} prompts x {entry['samples']}: reward {entry['reward']}, "
        what += f"gold {entry['gold'] or 'none'}"
        body += [f"<h2>{escape(world)}</h2><p>{escape(what)}</p>", pictures[world]]
        for budget in entry["budgets"]:
            title = f"{int(budget):,} tokens an answer" if budget != "0" else "Nothing to size"
            folder = f"{world}-{'fixed' if budget == '0' else f'tokens-{budget}'}/report.html"
            body += [
                f"<h3>{title}</h3>",
                html_table(made[f"{world}-{budget}"]),
                f'<p><a href="{folder}">its answers, one by one</a></p>',
            ]
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem;color:#191b20;"
        "background:#fff}table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}"
        "td,th{padding:3px 9px;text-align:left;border-bottom:1px solid #e3e3de;white-space:nowrap}"
        "svg{width:100%;height:auto}@media(prefers-color-scheme:dark){body{color:#e9eaec;background:#1b1e23}"
        "td,th{border-color:#31363e}a{color:#74b0f7}}"
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width"><title>The shoot-out</title>'
        f"<style>{style}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def html_table(markdown: str) -> str:
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if not line.startswith("|---")]
    cells = [["<b>" + c.replace("**", "") + "</b>" if "**" in c else c for c in map(escape, row)] for row in rows]
    head, *rest = cells
    lines = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rest)
    return f"<table><tr>{''.join(f'<th>{c}</th>' for c in head)}</tr>{lines}</table>"


def main() -> None:
    worlds = gather(RUNS) or json.loads(RESULTS.read_text())
    write_atomic(RESULTS, dump_json(worlds))
    made = tables(worlds)
    pictures = {world: forest(world, entry) for world, entry in worlds.items()}
    for world, picture in pictures.items():
        write_atomic(
            FIGURES / f"shootout-{world}.svg",
            picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n",
        )
    if RUNS.is_dir():
        write_atomic(RUNS / "report.html", page(worlds, made, pictures))
    if DOC.exists():
        document = DOC.read_text()
        for name, table in made.items():
            document = re.sub(
                rf"(<!-- table {name} -->\n).*?(<!-- end -->)",
                lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}",
                document,
                flags=re.DOTALL,
            )  # type: ignore[misc]
        write_atomic(DOC, document)
    print(f"{RESULTS}\n{RUNS / 'report.html'}")


if __name__ == "__main__":
    main()
