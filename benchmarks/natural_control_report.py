"""From the measured points of natural_control.py to benchmarks/results, and from there to the tables and figures of the docs.

    python benchmarks/natural_control_report.py

Points found in runs/natural-control are first gathered into benchmarks/results/natural-control-*.json (committed, small);
tables are written into docs/natural-control.md between `<!-- table NAME -->` and `<!-- end -->`, figures into docs/figures.
Intervals are 95 %: over seeds with Student's t (each seed has its own rollouts, fit and answers, on the same prompts), over
prompts with the bootstrap of trimtab.measure.stats on the mean of all seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from natural_control import LOW, MULTIPLES
from natural_control_figures import ablation_figure, curves_figure, diversity_figure, exact_figure
from scipy.stats import t

from trimtab.files import dump_json, write_atomic
from trimtab.measure.stats import mean_interval

ROOT = Path(__file__).resolve().parent.parent
RUNS, RESULTS, DOC = (
    ROOT / "runs" / "natural-control",
    ROOT / "benchmarks" / "results",
    ROOT / "docs" / "natural-control.md",
)
FIGURES = ROOT / "docs" / "figures"
Seeds = dict[str, dict[str, Any]]  # seed -> name of a point -> what was measured


def gather() -> None:
    """Every part of every model in one file each; per-prompt means become intervals."""
    for folder in sorted(RUNS.glob("*/")):
        for part in ("main", "ablation", "several", "speed"):
            seeds: Seeds = {
                f.stem.rsplit("-", 1)[1]: json.loads(f.read_text()) for f in sorted(folder.glob(f"{part}-*.json"))
            }
            if not seeds:
                continue
            over_prompts: dict[str, Any] = {}
            if part == "main":
                for _, key, points in rows_of(seeds):
                    for judge in ("reward", "gold"):
                        by_prompt = [point[f"{judge}_by_prompt"] for point in points if f"{judge}_by_prompt" in point]
                        if by_prompt:
                            found = mean_interval(np.nanmean(np.array(by_prompt, dtype=float), 0))
                            over_prompts.setdefault(key, {})[judge] = [found.low, found.high]
            for points in seeds.values():
                for point in points.values():
                    for key in [key for key in point if key.endswith("_by_prompt")]:
                        del point[key]
            rounded = {
                seed: {name: _rounded(point) for name, point in points.items()} for seed, points in seeds.items()
            }
            write_atomic(
                RESULTS / f"natural-control-{folder.name}-{part}.json",
                dump_json({"seeds": rounded, "over_prompts": over_prompts}),
            )


def _rounded(point: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in point.items()}


def load(model: str, part: str) -> dict[str, Any] | None:
    file = RESULTS / f"natural-control-{model}-{part}.json"
    return json.loads(file.read_text()) if file.exists() else None


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of the t-interval; None for one seed."""
    array = np.array(values, dtype=float)
    if len(array) < 2:
        return float(array.mean()), None
    return float(array.mean()), float(t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))


def show(values: Sequence[float], digits: int = 3) -> str:
    mean, half = over_seeds(values)
    return f"{mean:.{digits}f}" if half is None else f"{mean:.{digits}f} ± {half:.{digits}f}"


def at_reward(points: dict[str, Any], family: str, reward: float, key: str, judge: str = "reward") -> float | None:
    """A family's `key` where it reaches a reward, interpolated along the dial; log-linear for KL. None: not reached."""
    chosen = [p for p in points.values() if p["family"] == family] + [
        p for p in points.values() if p["family"] == "base"
    ]
    chosen = sorted(chosen, key=lambda p: p["kl"])
    for a, b in zip(chosen, chosen[1:], strict=False):  # the first crossing
        if a[judge] <= reward <= b[judge] and b[judge] > a[judge]:
            share = (reward - a[judge]) / (b[judge] - a[judge])
            if key != "kl":
                return a[key] + share * (b[key] - a[key])
            if a["kl"] == 0:  # towards the base the gain goes with the root of KL
                return b["kl"] * share**2
            return math.exp(math.log(a["kl"]) + share * math.log(b["kl"] / a["kl"]))
    return None


def compared(
    seeds: Seeds, first: str, second: str, reward: float, key: str, join: Callable[[float, float], float], judge: str
) -> list[float | None]:
    """join(key of first, key of second) at equal reward, a seed each; None for a seed whose sweep does not reach it."""
    out: list[float | None] = []
    for points in seeds.values():
        a, b = (at_reward(points, family, reward, key, judge) for family in (first, second))
        out.append(None if a is None or b is None else join(a, b))
    return out


def reached(values: list[float | None], text: Callable[[list[float]], str]) -> str:
    """The text of the values, or in how many seeds there is one."""
    found = [value for value in values if value is not None]
    return text(found) if len(found) == len(values) else f"reached in {len(found)} of {len(values)} seeds"


def ratio_text(logs: list[float]) -> str:
    mean, half = over_seeds(logs)
    if half is None:
        return f"{math.exp(mean):.1f}"
    return f"{math.exp(mean):.1f} [{math.exp(mean - half):.1f}, {math.exp(mean + half):.1f}]"


def main_table(data: dict[str, Any]) -> str:
    seeds: Seeds = data["seeds"]
    has_gold = any("gold" in point for point in seeds[next(iter(seeds))].values())
    header = [
        "policy",
        "reward",
        "over prompts",
        *(["gold"] if has_gold else []),
        "KL/token",
        "NLL under base",
        "diversity",
    ]
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for label, key, points in rows_of(seeds):
        first = points[0]
        prompts = data["over_prompts"].get(key, {}).get("reward")
        if len(points) < len(seeds):
            label += f" ({len(points)} seed{'s' * (len(points) > 1)})"
        cells = [label, show([p["reward"] for p in points]), f"[{prompts[0]:.3f}, {prompts[1]:.3f}]" if prompts else ""]
        if has_gold:
            cells.append(show([p["gold"] for p in points]))
        if first["kl"] is None:
            cells.append(f"≤ {first['kl_bound'] / np.mean([p['length'] for p in points]):.3f}")
        else:
            cells.append(show([p["kl"] for p in points]))
        cells += [show([p["nll"] for p in points]), show([p["diversity"] for p in points], 4)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def places(points: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """Family and place in its sweep of every point, in order of family and dial: tuned dials differ between seeds."""
    families = list(dict.fromkeys(point["family"] for point in points.values()))
    order = sorted(points, key=lambda name: (families.index(points[name]["family"]), points[name].get("dial") or 0))
    counts: dict[str, int] = {}
    out = {}
    for name in order:
        family = points[name]["family"]
        out[name] = (family, counts.get(family, 0))
        counts[family] = out[name][1] + 1
    return out


def rows_of(seeds: Seeds) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(label, key of the place, the points there) for every row of the table."""
    rows: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for seed, points in seeds.items():
        for name, at in places(points).items():
            rows.setdefault(at, {})[seed] = points[name] | {"name": name}
    families = list(dict.fromkeys(family for family, _ in rows))
    out = []
    for family, number in sorted(rows, key=lambda at: (families.index(at[0]), at[1])):
        found = list(rows[family, number].values())
        names = {point["name"] for point in found}
        label = names.pop() if len(names) == 1 else f"{family}, x {_factors(family)[number]:g}"
        out.append((label, f"{family}#{number}", found))
    return out


def _factors(family: str) -> tuple[float, ...]:
    """What a tuned strength was multiplied by; the words of natural_control.py."""
    if family.endswith("rounds"):
        return (0.5, 1.0, 1.5)
    return (*LOW, *MULTIPLES) if family == "natural-control" else MULTIPLES


def ratio_table(seeds: Seeds, rewards: Sequence[float], judge: str = "reward") -> str:
    """KL of the others over that of natural control, at equal reward."""
    others = [
        f for f in ("re-control", "re-control mc", "pref-ctrl") if any(p["family"] == f for p in seeds["0"].values())
    ]
    header = [
        f"at {judge}",
        *(f"{other} / natural-control" for other in others),
        "diversity: natural control − RE-Control",
    ]
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for reward in rewards:
        cells = [f"{reward:g}"]
        for other in others:
            logs = compared(seeds, other, "natural-control", reward, "kl", lambda a, b: math.log(a / b), judge)
            cells.append(reached(logs, ratio_text))
        gap = compared(seeds, "natural-control", "re-control", reward, "diversity", lambda a, b: a - b, judge)
        cells.append(reached(gap, lambda found: show(found, 4)))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def ablation_table(data: dict[str, Any]) -> tuple[str, list[tuple[str, str, list[float]]]]:
    """Reward at KL 0.06 nats a token by variant, and the rows for the figure."""
    variants: dict[str, str] = {}
    rewards: dict[str, list[float]] = {}
    for points in data["seeds"].values():
        for point in points.values():
            variants[point["variant"]] = point["option"]
        for variant in variants:
            mine = sorted((p for p in points.values() if p["variant"] == variant), key=lambda p: p["kl"])
            if len(mine) == 3:
                x, y = [math.log(p["kl"]) for p in mine], [p["reward"] for p in mine]
                rewards.setdefault(variant, []).append(float(np.interp(math.log(0.06), x, y)))
    lines = ["| variant | reward at 0.06 nats a token |", "|---|---|"]
    figure = []
    for variant, option in variants.items():
        if variant in rewards:
            lines.append(f"| {variant} | {show(rewards[variant])} |")
            figure.append((variant, option, rewards[variant]))
    return "\n".join(lines), figure


def speed_table(data: dict[str, Any]) -> str:
    rows = ["| policy | time of plain sampling (wall) | (CPU) |", "|---|---|---|"]
    for name in next(iter(data["seeds"].values())):
        runs = [points[name] for points in data["seeds"].values() if name in points]
        rows.append(
            f"| {name} | {np.mean([r['wall_ratio'] for r in runs]):.3f}x | {np.mean([r['cpu_ratio'] for r in runs]):.3f}x |"
        )
    return "\n".join(rows)


def several_table(data: dict[str, Any]) -> str:
    rows = ["| weights | sentiment | stories with an animal | KL/token | diversity |", "|---|---|---|---|---|"]
    for name in next(iter(data["seeds"].values())):
        runs = [points[name] for points in data["seeds"].values() if name in points]
        cells = [
            show([r[key] for r in runs], digits)
            for key, digits in (("reward", 3), ("second", 3), ("kl", 3), ("diversity", 4))
        ]
        rows.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(rows)


def exact_table(data: dict[str, Any]) -> str:
    """Share of the largest possible gain, for KL between 0.1 and 4 nats an answer: lowest and highest over three models."""
    rows = ["| policy | d = 16 | d = 4 (< V - 1 = 5) |", "|---|---|---|"]
    for name in [key for key in next(iter(data.values())) if key not in ("base", "soft optimum")]:
        cells = []
        for size in (16, 4):
            runs = [points for key, points in data.items() if key.startswith(f"d={size} ")]
            shares = [row["share"] for run in runs for row in run[name] if 0.1 <= row["kl"] <= 4]
            cells.append(f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def fill(name: str, table: str) -> None:
    """Put a table between its marks in the docs."""
    text, start, end = DOC.read_text(), f"<!-- table {name} -->", "<!-- end -->"
    if start not in text:
        print(f"docs have no place for the table {name!r}")
        return
    before, rest = text.split(start, 1)
    after = rest.split(end, 1)[1]
    write_atomic(DOC, f"{before}{start}\n\n{table}\n\n{end}{after}")


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    FIGURES.mkdir(exist_ok=True)
    gather()
    for model, rewards in (
        ("stories260k", (0.5, 0.55, 0.6, 0.65, 0.7, 0.75)),
        ("pocket-base", (1.0, 1.5, 2.0, 2.5, 3.0)),
    ):
        data = load(model, "main")
        if data is not None:
            fill(f"main {model}", main_table(data))
            fill(f"ratio {model}", ratio_table(data["seeds"], rewards))
            write_atomic(FIGURES / f"natural-control-{model}.svg", curves_figure(data["seeds"], "reward"))
            write_atomic(FIGURES / f"natural-control-{model}-diversity.svg", diversity_figure(data["seeds"]))
            if model == "pocket-base":
                write_atomic(FIGURES / f"natural-control-{model}-gold.svg", curves_figure(data["seeds"], "gold"))
        ablation, speed, several = (load(model, part) for part in ("ablation", "speed", "several"))
        if ablation is not None:
            table, rows = ablation_table(ablation)
            fill(f"ablation {model}", table)
            write_atomic(FIGURES / f"natural-control-{model}-ablation.svg", ablation_figure(rows))
        if speed is not None:
            fill(f"speed {model}", speed_table(speed))
        if several is not None:
            fill(f"several {model}", several_table(several))
    exact = RESULTS / "natural-control-exact.json"
    if exact.exists():
        data = json.loads(exact.read_text())
        fill("exact", exact_table(data))
        write_atomic(FIGURES / "natural-control-exact.svg", exact_figure(data))


if __name__ == "__main__":
    main()
