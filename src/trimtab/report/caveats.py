"""What a careful reader would object, found by checks on the run itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.report.analysis import Row, correlation, number, pair_rows, paired_difference
from trimtab.report.figures import PolicyView

FEW_PROMPTS = 30
TRUNCATED_SHARE = 0.20
LENGTH_CORRELATION = 0.30
SATURATED = 0.90


@dataclass(frozen=True)
class Caveat:
    subject: str
    sentence: str


def caveats(
    compare: dict[str, Any], samples: Sequence[Row], policies: Sequence[PolicyView], arguments: dict[str, Any]
) -> list[Caveat]:
    """All that apply, the gravest first. `arguments`: those of run.json, empty where there are none."""
    base = policies[0].name
    found = [
        *_judge(compare, samples, policies, base),
        *_budget(compare),
        *_fit(compare, arguments),
        *_size(compare),
        *_verdicts(compare),
        *_kl(policies),
        *_answers(compare, samples, base),
    ]
    return found


def _size(compare: dict[str, Any]) -> Iterator[Caveat]:
    prompts = number(compare.get("prompts")) or 0
    if prompts < FEW_PROMPTS:
        yield Caveat(
            "Few prompts",
            f"{prompts:g} prompts (below {FEW_PROMPTS}): intervals over prompts are themselves uncertain.",
        )
    yield Caveat(
        "Single seed",
        f"All answers, and every fit, come from one seed ({compare.get('seed')}). The intervals cover the "
        "choice of prompts, not a refit or another draw.",
    )


def _budget(compare: dict[str, Any]) -> Iterator[Caveat]:
    """Rows that cannot be compared at the budget the others were sized to."""
    for policy in compare["policies"]:
        budget = policy.get("budget")
        if budget and not budget["met"]:
            unit = "tokens an answer" if budget["kind"] == "tokens" else "nats a token"
            spent = "an unknown amount" if budget["spent"] is None else f"{budget['spent']:.4g}"
            note = f" ({budget['note']})" if budget["note"] else ""
            yield Caveat("Not at the budget", f"{policy['name']} spends {spent} of {budget['amount']:g} {unit}{note}.")


def _fit(compare: dict[str, Any], arguments: dict[str, Any]) -> Iterator[Caveat]:
    fitted = [policy["name"] for policy in compare["policies"] if number((policy.get("cost") or {}).get("fit_seconds"))]
    prompts = arguments.get("prompts")
    if not fitted or not isinstance(prompts, list):
        return
    used = arguments.get("fit_prompts") or prompts
    test = {repr(prompt) for prompt in prompts}
    shared = sum(prompt in test for prompt in {repr(prompt) for prompt in used})
    if shared:
        yield Caveat(
            "Fitted on test prompts",
            f"{', '.join(fitted)}: {shared} of the {len(test)} prompts measured here were also fitted on.",
        )
    if len(used) < FEW_PROMPTS:
        yield Caveat("Few fit prompts", f"{', '.join(fitted)}: fitted on {len(used)} prompts (below {FEW_PROMPTS}).")


def _judge(
    compare: dict[str, Any], samples: Sequence[Row], policies: Sequence[PolicyView], base: str
) -> Iterator[Caveat]:
    gold = compare.get("gold")
    if not any(policy.gold for policy in policies):
        yield Caveat(
            "No gold reward",
            "Only the reward that was optimised is measured here, so over-optimisation of it cannot be seen.",
        )
    elif gold == compare.get("reward"):
        yield Caveat(
            "Gold is the proxy", f"The gold reward ({gold}) is the reward that was optimised: it confirms nothing."
        )
    for policy in policies[1:]:
        pairs = pair_rows(samples, base, policy.name)
        proxy, truth = paired_difference(pairs, "reward"), paired_difference(pairs, "gold")
        if not proxy or not truth or not proxy.interval or not truth.interval or proxy.interval[0] <= 0:
            continue
        if truth.interval[1] < 0:
            yield Caveat(
                "Proxy up, gold down",
                f"{policy.name} raises the reward and lowers gold by {-truth.mean:.3f}: it is over-optimised.",
            )
        elif truth.interval[0] <= 0:
            low, high = truth.interval
            yield Caveat(
                "Gold undecided",
                f"{policy.name} raises the reward, but its gold difference {truth.mean:+.3f} "
                f"[{low:+.3f}, {high:+.3f}] covers zero.",
            )


def _verdicts(compare: dict[str, Any]) -> Iterator[Caveat]:
    names = [policy["name"] for policy in compare["policies"] if policy.get("verdict") == "undecided"]
    if names:
        yield Caveat(
            "Undecided",
            f"The difference from the base covers zero for {', '.join(names)}: neither better nor worse is shown.",
        )


def _kl(policies: Sequence[PolicyView]) -> Iterator[Caveat]:
    bounds = [policy.name for policy in policies if policy.kl_is_bound]
    if bounds:
        yield Caveat(
            "KL is a bound",
            f"For {', '.join(bounds)} the KL is an upper bound, divided by the mean answer length; the others are "
            "estimated from their own samples.",
        )
    unknown = [policy.name for policy in policies if policy.kl is None]
    if unknown:
        yield Caveat("KL unknown", f"No KL is known for {', '.join(unknown)}: missing from pictures against KL.")


def _answers(compare: dict[str, Any], samples: Sequence[Row], base: str) -> Iterator[Caveat]:
    by_policy: dict[str, list[Row]] = {policy["name"]: [] for policy in compare["policies"]}
    for row in samples:
        by_policy.setdefault(row["policy"], []).append(row)
    shares = {
        name: sum(row.get("finish") == "length" for row in rows) / len(rows) for name, rows in by_policy.items() if rows
    }
    cut = [f"{name} {share:.0%}" for name, share in shares.items() if share > TRUNCATED_SHARE]
    if cut:
        yield Caveat(
            "Truncated answers",
            f"More than {TRUNCATED_SHARE:.0%} of answers ran into the token limit: {', '.join(cut)}.",
        )
    unjudged = sum(number(row.get("reward")) is None for row in samples)
    if unjudged:
        yield Caveat(
            "Could not judge", f"{unjudged} of {len(samples)} answers have no reward and are left out of its means."
        )
    judged = [
        (row["length"], reward)
        for row in by_policy[base]
        if number(row.get("length")) is not None and (reward := number(row.get("reward"))) is not None
    ]
    r = correlation([float(length) for length, _ in judged], [reward for _, reward in judged])
    if r is not None and abs(r) > LENGTH_CORRELATION:
        yield Caveat(
            "Reward follows length",
            f"Over the base's own answers reward and length correlate at r = {r:+.2f}: "
            "a gain may be a change of length.",
        )
    golds = [g for row in by_policy[base] if (g := number(row.get("gold"))) is not None]
    if golds and sum(g >= 0.99 for g in golds) > SATURATED * len(golds):
        yield Caveat(
            "Saturated",
            f"More than {SATURATED:.0%} of the base's answers already score full gold: little is left to gain.",
        )
