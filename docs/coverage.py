"""The coverage matrix: which evaluation dimension each method's figures speak of, and which diagnostic measures it.

measured   a figure of it is in `benchmarks/results` (the shoot-out's rows)
claimed    the method's card names a metric or a dimension of it
(empty)    nothing speaks of it
"""

from __future__ import annotations

import json
from pathlib import Path

from trimtab.card import VOCABULARY, Card
from trimtab.policies import layers
from trimtab.spec import parse_spec

# A card's metric -> the dimension it speaks of. What is not here (kl_per_token, ...) is a price, under "cost".
METRICS = {
    "reward": "helpfulness",
    "gold": "helpfulness",
    "best_of_n_win_rate": "helpfulness",
    "win rate": "helpfulness",
    "accuracy": "capability",
    "nll_per_byte": "capability",
    "unsafe_rate": "refusal",
    "over_refusal": "refusal",
    "diversity": "diversity",
}
DIMENSIONS = sorted(VOCABULARY["dimensions"])


def claimed(card: Card) -> set[str]:
    """What a card speaks of."""
    return {*card.dimensions} | {METRICS.get(metric, "cost") for metric in (*card.benefit_metrics, *card.cost_metrics)}


def measured(results: Path) -> dict[str, set[str]]:
    """slug -> the dimensions of which the shoot-out holds a figure of it."""
    found: dict[str, set[str]] = {}
    for world in json.loads(results.read_text()).values():
        for policies in world["budgets"].values():
            for name, row in policies.items():
                speaks = {"cost"} | {METRICS[key] for key in METRICS if row.get(key) is not None}
                for layer in layers(name):
                    found.setdefault(parse_spec(layer)[0], set()).update(speaks)
    return found


def page(cards: list[Card], results: Path) -> str:
    """The page as Markdown."""
    known = measured(results) if results.exists() else {}
    methods = [card for card in cards if card.stage != "audit"]
    audits = [card for card in cards if card.stage == "audit"]
    out = ["# What is measured, and what is not", (__doc__ or "").split("\n\n", 1)[1].strip().replace("    ", "- ")]
    out.append("## Methods\n\n" + _matrix(methods, {card.slug: claimed(card) for card in methods}, known))
    out.append(
        "## Diagnostics\n\nWhich dimension each measures. `trimtab measure NAME`, or `--measure NAME` in a comparison.\n\n"
        + _matrix(audits, {card.slug: {*card.dimensions} for card in audits}, {}, "yes")
    )
    covered = {dimension for card in audits for dimension in card.dimensions}
    gaps = [dimension for dimension in DIMENSIONS if dimension not in covered]
    only = [card.slug for card in methods if not known.get(card.slug)]
    out.append(
        "## Gaps\n\n"
        f"- No diagnostic measures: {', '.join(gaps) or 'none'}. Load such a benchmark's file with an adapter, or delegate "
        "to an evaluation harness (`lm-eval`).\n"
        f"- No stored figure at all: {', '.join(only) or 'none'}.\n"
        "- What a comparison measures by default (the side-effect panel) is not stored for every method: run it on your "
        "model.\n"
        "- Toxicity, factuality and ethics are measured as well as the file you bring; none is shipped."
    )
    return "\n\n".join(out) + "\n"


def _matrix(cards: list[Card], claims: dict[str, set[str]], known: dict[str, set[str]], word: str = "claimed") -> str:
    columns = [dimension for dimension in DIMENSIONS if any(dimension in claims[card.slug] for card in cards)]
    rows = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for card in cards:
        cells = [
            "measured" if column in known.get(card.slug, ()) else word if column in claims[card.slug] else ""
            for column in columns
        ]
        rows.append(f"| [{card.slug}](methods/{card.slug}.md) | " + " | ".join(cells) + " |")
    return "\n".join(rows)
