"""Puts the page together: reads the numbers once into a context, fills the template, inlines style and script."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from trimtab.measure.measurement import decimals
from trimtab.report import answers, figures, side_effects, svg, tokens
from trimtab.report import sweep as sweeps
from trimtab.report.analysis import PICK_RULE, Estimate, GoodRule, Row, number, pair_rows, paired_difference
from trimtab.report.caveats import caveats
from trimtab.report.drawings import drawn
from trimtab.report.figures import PolicyView

STYLES = ("theme.css", "style.css", "charts.css", "tokens.css")
PLAIN_COST = 1.1  # tokens forwarded relative to the base up to which a policy counts as "at plain decoding's cost"
MOST_TRACES = 24
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, lone surrogates
POLICY_KEYS = (
    *("reward", "gold", "win_rate", "verdict", "kl_per_token", "kl_bound", "nll_base_per_token", "diversity"),
    *("coherence", "length_tokens", "settings"),
)
COST_KEYS = (
    *("tokens_forwarded_per_answer", "reward_calls_per_answer", "seconds_per_answer", "peak_memory_bytes"),
    *("fit_seconds", "fit_tokens"),
)


def render(
    compare: dict[str, Any], samples: list[Row], sweep: dict[str, Any] | None = None, run: dict[str, Any] | None = None
) -> str:
    """The report as one HTML string, from the parsed files of a run directory. The same input gives the same string."""
    compare, sweep, run = _complete(clean(compare)), clean(sweep), clean(run)
    samples = [{**dict.fromkeys(answers.COLUMNS), **clean(row)} for row in samples]
    template = environment().get_template("template.html.j2")
    return template.render(context(compare, samples, sweep, run))


def environment() -> jinja2.Environment:
    """The templates of this package, everything escaped, with the filters that they use."""
    found = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(resource),
    )
    found.filters |= {
        "figure": figure_text,
        "signed": signed,
        "interval": interval,
        "percent": percent,
        "json": pretty,
        "plain_number": plain_number,
        "two_digits": lambda value: f"{value:.2g}",
        "short": svg.shorten,
    }
    return found


def context(
    compare: dict[str, Any], samples: list[Row], sweep: dict[str, Any] | None, run: dict[str, Any] | None
) -> dict[str, Any]:
    """Everything the template names. Nothing here depends on the clock, the machine or the order of a set."""
    names = [str(policy["name"]) for policy in compare["policies"]]
    views = [PolicyView.read(policy, i == 0) for i, policy in enumerate(compare["policies"])]
    rule = GoodRule.choose(samples, names[0])
    seed = int(number(compare.get("seed")) or 0)
    methods = answers.read_methods(samples, names, rule, seed)
    table = answers.read_table(samples, names, rule)
    verdicts = [_verdict(compare, samples, i) for i in range(1, len(names))]
    return {
        "compare": compare,
        "base": compare["policies"][0],
        "names": names,
        "reward_name": str(compare.get("reward")),
        "gold_name": compare.get("gold") if any(v.gold for v in views) else None,
        "verdicts": verdicts,
        "no_plain": bool(verdicts) and not any(v["verdict"] == "better" and _plain(v) for v in verdicts),
        "leads": _leads(verdicts),
        "selected": _leads(verdicts)[-1]["index"] if verdicts else 0,
        "trade_offs": _trade_offs(views, compare),
        "cells": _cells(views),
        **_sweep(sweep, views, compare),
        "histograms": figures.histograms(_rewards(samples, names), names[0], f"reward ({compare.get('reward')})"),
        "rule": rule,
        "pick_rule": PICK_RULE,
        "methods": methods,
        "table": table,
        "cut": answers.cut,
        "longest": answers.LONGEST_IN_TABLE,
        "payload": Markup(answers.payload(table, names)),
        **_traces(samples, names),
        "caveats": caveats(compare, samples, views, (run or {}).get("arguments") or {}),
        **_reproduce(run, compare),
        "side_effects": compare.get("side_effects"),
        "side_effect_picture": Markup(side_effects.picture(compare.get("side_effects"))),
        "moved": side_effects.moved,
        "measures": compare.get("measures") or [],
        "drawn": drawn,
        "css": Markup("".join(resource(name) for name in STYLES)),
        "script": Markup(resource("script.js")),
        "Markup": Markup,
        "has_coherence": any(number(policy["coherence"]) is not None for policy in compare["policies"]),
        "has_memory": any(number(policy["cost"]["peak_memory_bytes"]) is not None for policy in compare["policies"]),
        "number": number,
    }


def _verdict(compare: dict[str, Any], samples: list[Row], i: int) -> dict[str, Any]:
    """What policy i did to the base, in numbers: paired differences, and costs relative to the base's."""
    base, policy = compare["policies"][0], compare["policies"][i]
    pairs = pair_rows(samples, base["name"], policy["name"])
    view = PolicyView.read(policy, False)
    cost, base_cost = policy.get("cost") or {}, base.get("cost") or {}
    return {
        "index": i,
        "name": policy["name"],
        "verdict": policy.get("verdict"),
        "policy": policy,
        "view": view,
        "base": base,
        "reward": paired_difference(pairs, "reward"),
        "gold": paired_difference(pairs, "gold"),
        "win_rate": Estimate.read(policy.get("win_rate")),
        "cost_ratio": _ratio(cost.get("tokens_forwarded_per_answer"), base_cost.get("tokens_forwarded_per_answer")),
        "nll_change": _change(policy, base, "nll_base_per_token"),
        "length_change": _change(policy, base, "length_tokens"),
        "truncated": _share_truncated(samples, policy["name"]),
    }


def _leads(verdicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best policy, and the best at plain decoding's cost where that is another one.

    Best: among those judged better (all, where none is), the highest mean gold, or reward where gold was not measured.
    """

    def score(v: dict[str, Any]) -> tuple[float, float]:
        gold, reward = number(v["policy"].get("gold")), number(v["policy"].get("reward"))
        return (gold if gold is not None else -1e300 if reward is None else reward, -v["index"])

    better = [v for v in verdicts if v["verdict"] == "better"] or verdicts
    if not better:
        return []
    best = max(better, key=score)
    plain = [v for v in better if _plain(v)]
    cheap = max(plain, key=score) if plain else best
    return [best] if cheap is best else [best, cheap]


def _plain(verdict: dict[str, Any]) -> bool:
    return verdict["cost_ratio"] is not None and verdict["cost_ratio"] <= PLAIN_COST


def _trade_offs(views: Sequence[PolicyView], compare: dict[str, Any]) -> list[dict[str, Any]]:
    out = []
    for value, kind, name in (
        ("reward", "proxy reward", compare.get("reward")),
        ("gold", "gold reward", compare.get("gold")),
    ):
        kind = "reward" if value == "reward" and not any(v.gold for v in views) else kind
        for cost, words in (("kl", "what it moved the model"), ("tokens", "what it costs to run")):
            chart = figures.trade_off(views, value, cost, f"{kind} ({name})")
            if chart:
                out.append(
                    {
                        "title": f"{kind.capitalize()} against {words}",
                        "markup": Markup(chart.markup),
                        "notes": chart.notes,
                    }
                )
    return out


def _cells(views: Sequence[PolicyView]) -> list[Markup]:
    """The dot-and-interval picture of each policy's reward, on one scale."""
    extent = [v for view in views if view.reward for v in (view.reward.mean, *(view.reward.interval or ()))]
    scale = svg.Scale.nice(extent, 6.0, 104.0)
    base = views[0].reward.mean if views[0].reward else None
    return [Markup(figures.interval_cell(view.reward, scale, base)) for view in views]


def _sweep(sweep: dict[str, Any] | None, views: Sequence[PolicyView], compare: dict[str, Any]) -> dict[str, Any]:
    families = sweeps.read_families(sweep, views[0])
    gold = f"gold ({compare.get('gold')})" if compare.get("gold") else None
    charts = [sweeps.sweep_chart(family, families, f"proxy ({compare.get('reward')})", gold) for family in families]
    return {"families": [{"family": f, "markup": Markup(c.markup)} for f, c in zip(families, charts, strict=True)]}


def _rewards(samples: list[Row], names: list[str]) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {name: [] for name in names}
    for row in samples:
        reward = number(row.get("reward"))
        if reward is not None and row["policy"] in out:
            out[row["policy"]].append(reward)
    return out


def _traces(samples: list[Row], names: list[str]) -> dict[str, Any]:
    """Traced answers by policy, each policy on its own scale, at most MOST_TRACES in all (taken in turns)."""
    traced = {
        name: [row for row in samples if row["policy"] == name and (row.get("trace") or {}).get("pieces")]
        for name in names
    }
    traced = {name: rows for name, rows in traced.items() if rows}
    each = max(1, MOST_TRACES // max(1, len(traced)))
    groups = []
    for name, rows in traced.items():
        scale = tokens.TokenScale.fit([row["trace"] for row in rows[:each]])
        shown = [
            (
                row,
                Markup(tokens.coloured(row["trace"], scale, row["text"])),
                Markup(tokens.sparkline(row["trace"], scale)),
            )
            for row in rows[:each]
        ]
        groups.append({"name": name, "index": names.index(name), "scale": scale, "answers": shown, "total": len(rows)})
    return {"traces": sorted(groups, key=lambda group: not group["scale"].valued)}


def _reproduce(run: dict[str, Any] | None, compare: dict[str, Any]) -> dict[str, Any]:
    """The command (recorded, or put together from the arguments), the arguments, the hashes and the environment."""
    run = run or {}
    arguments = run.get("arguments") or {}
    command = run.get("command")
    if isinstance(command, list):
        command = shlex.join(str(part) for part in command)
    rebuilt = command is None and {"model", "reward", "policies"} <= arguments.keys()
    return {
        "command": _command(arguments) if rebuilt else command,
        "rebuilt": rebuilt,
        "arguments": {key: _brief(value) for key, value in arguments.items()},
        "inputs": run.get("inputs") or {},
        "environment": run.get("environment") or compare.get("environment") or {},
    }


def _command(arguments: dict[str, Any]) -> str:
    """`trimtab compare` with these arguments; the prompts stand for files that hold them."""
    words = ["trimtab", "compare", str(arguments["model"]), "--reward", str(arguments["reward"])]
    words += ["--prompts", "prompts.jsonl"]
    if arguments.get("fit_prompts"):
        words += ["--fit-prompts", "fit-prompts.jsonl"]
    for policy in arguments["policies"]:
        words += ["--policy", str(policy)]
    for key in ("gold", "max_new_tokens", "temperature", "seed", "samples"):
        if arguments.get(key) is not None:
            words += ["--" + key.replace("_", "-"), str(arguments[key])]
    return shlex.join(words + (["--sweep"] if arguments.get("sweep") else []))


def _brief(value: Any) -> Any:
    """A long list as its length and its first items: run.json has all of it."""
    if isinstance(value, list) and len(value) > 12:
        return [*value[:3], f"... {len(value) - 3} more in run.json"]
    return value


def _ratio(a: Any, b: Any) -> float | None:
    first, second = number(a), number(b)
    return None if first is None or not second else first / second


def _change(policy: dict[str, Any], base: dict[str, Any], key: str) -> float | None:
    a, b = number(policy.get(key)), number(base.get(key))
    return None if a is None or b is None else a - b


def _share_truncated(samples: list[Row], name: str) -> float | None:
    rows = [row.get("finish") == "length" for row in samples if row["policy"] == name]
    return sum(rows) / len(rows) if rows else None


def _complete(compare: dict[str, Any]) -> dict[str, Any]:
    """compare.json with None for every key that an older or partial file leaves out, so that the page shows a dash."""
    policies = []
    for policy in compare["policies"]:
        cost = {**dict.fromkeys(COST_KEYS), **(policy.get("cost") or {})}
        policies.append({**dict.fromkeys(POLICY_KEYS), **policy, "cost": cost})
    return {**dict.fromkeys(("model", "reward", "gold", "prompts", "samples", "seed")), **compare, "policies": policies}


def clean(value: Any) -> Any:
    """A parsed JSON value with only text that UTF-8 and HTML can hold: anything else becomes U+FFFD."""
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value.replace("\r\n", "\n").replace("\r", "\n"))
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return value


def figure_text(value: Any, digits: int = 3) -> str:
    """A number for reading; an en dash where there is none."""
    found = value.mean if isinstance(value, Estimate) else number(value)
    if found is None:
        return "–"
    return (f"{found:,.{digits}f}" if abs(found) < 1e7 else f"{found:.3g}").replace("-", "−")


def signed(value: Any, digits: int = 3) -> str:
    found = value.mean if isinstance(value, Estimate) else number(value)
    return "–" if found is None else f"{found:+,.{digits}f}".replace("-", "−")


def interval(value: Any, digits: int = 3, sign: bool = False) -> str:
    """`[low, high]`, or nothing where no interval is known."""
    found = value if isinstance(value, Estimate) else Estimate.read(value)
    if found is None or found.interval is None:
        return ""
    low, high = (signed(v, digits) if sign else figure_text(v, digits) for v in found.interval)
    return f"[{low}, {high}]"


def percent(value: Any, digits: int = 0) -> str:
    found = value.mean if isinstance(value, Estimate) else number(value)
    return "–" if found is None else f"{100 * found:.{digits}f}\u202f%"


def plain_number(value: float, sign: bool = False) -> str:
    """Three decimals; five where the number is small, one or none where it is large."""
    return (signed if sign else figure_text)(value, decimals(value))


def pretty(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=str)


def resource(name: str) -> str:
    return (files("trimtab.report") / name).read_text(encoding="utf-8")
