"""What a comparison measures besides its table: the side-effect panel, and the diagnostics asked for with --measure.

The panel is made from the answers that the table rests on, so it costs nothing more. A diagnostic is asked of every
policy of the comparison and each is compared with the base; one that a policy cannot be asked (hidden states of a
best-of-n), or that refuses what it finds, says so in its place: the table is not lost for it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import UsageError
from trimtab.files import dump_json
from trimtab.fingerprint import fingerprint_of
from trimtab.measure.cache import Cache
from trimtab.measure.diagnostic import Diagnostic, Progress, Subject, files_digest, said
from trimtab.measure.measurement import Change, Comparison, Measurement
from trimtab.measure.measuring import diagnostic
from trimtab.measure.panel import KL, Panel, fill, per_prompt
from trimtab.measure.stats import Interval, swap_test
from trimtab.policy import Prompt
from trimtab.run import RunDirectory
from trimtab.sampling import Sampling
from trimtab.spec import parse_spec
from trimtab.table import Measured

# column of samples.jsonl -> line of the panel, weighed by tokens
_PER_TOKEN = {"kl": KL, "nll_base": "NLL under the base", "entropy": "entropy per token"}


def panels(measured: Sequence[Measured], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `side_effects` of compare.json: a panel a policy, and each policy's against the base's.

    records: the policies' rows of the table; the win rate is the table's (over rows, not over prompts' means).
    """
    found = [_panel(one) for one in measured]
    compared = []
    for one, answered, record in zip(found[1:], measured[1:], records[1:], strict=True):
        won, judge, lines = record["win_rate"], "gold" if record["gold"] is not None else "reward", []
        if won is not None and won["mean"] is not None:
            low, high = (None if won[end] is None else won[end] - 0.5 for end in ("low", "high"))
            over = Interval(won["mean"] - 0.5, low, high)
            p_value = swap_test(np.sign(answered.column(judge) - measured[0].column(judge)), answered.clusters)
            lines = [
                Change(
                    "win rate", won["mean"], None, over.mean, over.low, over.high, len(one.units),
                    said(over, "higher", p_value), note=f"by {judge}; the difference is from one half",
                )
            ]  # fmt: skip
        compared.append(Panel().beside(one, found[0], lines))
    return _as_json(
        {"measurements": [_brief(one) for one in found], "comparisons": [one.to_dict() for one in compared]}
    )


def _panel(one: Measured) -> Measurement:
    rows = one.rows
    units = list(dict.fromkeys(row["prompt_index"] for row in rows))
    samples = len(rows) // max(1, len(units))
    shown = {
        "reward": [row["reward"] for row in rows],
        "gold": [row["gold"] for row in rows],
        "unrepeated n-grams": [row["unrepeated"] for row in rows],
        "answers that refuse": [float(row["refuses"]) for row in rows],
        "length in tokens": [float(row["length"]) for row in rows],
        "answers cut off": [float(row["finish"] == "length") for row in rows],
    }
    columns = {label: per_prompt(values, samples) for label, values in shown.items()}
    for name, label in _PER_TOKEN.items():
        if name != "kl" or one.built.family != "base":
            columns[label] = _token_means(one, units, name)
    out = Measurement("panel", one.built.name, {"model": one.built.name}, "prompt", [str(unit) for unit in units])
    fill(out, {label: values for label, values in columns.items() if any(value is not None for value in values)})
    out.figures = []
    answers = max(1, len(rows))
    out.details = {"tokens_per_answer": one.tokens_forwarded / answers, "seconds_per_answer": one.seconds / answers}
    return out


def _token_means(one: Measured, units: Sequence[int], name: str) -> list[float | None]:
    """The mean over the tokens of each prompt's answers, from the means over each answer's."""
    total = dict.fromkeys(units, 0.0)
    count = dict.fromkeys(units, 0)
    for row in one.rows:
        if row[name] is not None and row["length"]:
            total[row["prompt_index"]] += row[name] * row["length"]
            count[row["prompt_index"]] += row["length"]
    return [total[unit] / count[unit] if count[unit] else None for unit in units]


@dataclass
class Wanted:
    """A diagnostic asked for by `NAME[:texts=FILE|FILE,key=value,...]`."""

    spec: str
    tool: Diagnostic
    texts: list[Path]

    @classmethod
    def parse(cls, spec: str) -> Wanted:
        """UsageError for an unknown name or key, and for an absent file."""
        name, options = parse_spec(spec)
        texts = [Path(path) for path in options.pop("texts", "").split("|") if path]
        files_digest(texts)
        tool = diagnostic(name, dict(options))
        return cls(spec, tool, texts)


@dataclass
class Surroundings:
    """What the diagnostics of one comparison share."""

    prompts: list[Prompt]
    sampling: Sampling
    reward: Any
    judge: str | None
    base_fingerprint: str
    run: RunDirectory | None
    progress: Progress | None


def take(wanted: Sequence[Wanted], measured: Sequence[Measured], around: Surroundings) -> list[dict[str, Any]]:
    """The `measures` of compare.json: for each diagnostic a measurement a policy, comparisons with the base, refusals."""
    out = []
    for at, one in enumerate(wanted):
        key = f"measures/{at:02d}"
        found, compared, refused = (_together if one.tool.TOGETHER else _apart)(one, key, measured, around)
        out.append(
            {
                "name": one.tool.slug,
                "spec": one.spec,
                "measurements": [_brief(one) for one in found],
                "comparisons": [one.to_dict() for one in compared],
                "refused": refused,
            }
        )
    return [_as_json(one) for one in out]


Taken = tuple[list[Measurement], list[Comparison], dict[str, str]]


def _apart(one: Wanted, key: str, measured: Sequence[Measured], around: Surroundings) -> Taken:
    """Each policy by itself, and each against the base."""
    found: list[Measurement] = []
    refused: dict[str, str] = {}
    base: Subject | None = None
    for number, policy in enumerate(measured):
        subject = _subject(policy, one, around)
        base = base or subject
        if one.tool.REFERENCE and number:
            subject.reference = base
        try:
            found.append(
                _kept(f"{key}-{number:02d}", partial(one.tool.measure, subject), one, policy.built.name, around)
            )
            found[-1].subject = policy.built.name
        except UsageError as error:
            refused[policy.built.name] = _told(one, policy.built.name, error)
            if not number:  # nothing to compare the others with
                break
    return found, [one.tool.compare(other, found[0]) for other in found[1:]], refused


def _told(one: Wanted, name: str, error: UsageError) -> str:
    """A refusal is shown in the report; here it is said at once too."""
    warnings.warn(f"{one.tool.slug} of {name}: {error}", stacklevel=2)
    return str(error)


def _together(one: Wanted, key: str, measured: Sequence[Measured], around: Surroundings) -> Taken:
    """All policies at once; or, where it sets the first against the others, each policy against the base."""
    subjects = [_subject(policy, one, around) for policy in measured]
    names = [policy.built.name for policy in measured]
    groups = [(name, [subject, subjects[0]]) for name, subject in zip(names[1:], subjects[1:], strict=True)]
    found: list[Measurement] = []
    refused: dict[str, str] = {}
    for number, (name, group) in enumerate(groups if one.tool.DUELS else [("the policies", subjects)]):
        try:
            found.append(_kept(f"{key}-{number:02d}", partial(one.tool.measure_together, group), one, name, around))
            found[-1].subject = name if one.tool.DUELS else found[-1].subject
        except UsageError as error:
            refused[name] = _told(one, name, error)
    return found, [], refused


def _subject(policy: Measured, one: Wanted, around: Surroundings) -> Subject:
    cache = Cache(None) if around.run is None else Cache(around.run.path / "cache")
    return Subject(
        policy.built.policy,
        fingerprint_of(around.base_fingerprint, policy.built.name, policy.built.settings),
        texts=one.texts,
        prompts=around.prompts,
        sampling=around.sampling,
        reward=around.reward,
        judge=around.judge,
        cache=cache,
        progress=around.progress,
    )


def _kept(key: str, take: Callable[[], Measurement], one: Wanted, name: str, around: Surroundings) -> Measurement:
    """Kept in the run directory, so that a resumed comparison does not ask again."""
    known = None if around.run is None else around.run.load_json(key)
    if known is not None:
        return Measurement.from_dict(known)
    if around.progress is not None:
        around.progress(f"measuring {one.tool.slug} of {name}")
    found = take()
    if around.run is not None:
        around.run.save_json(key, found.to_dict())
    return found


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """The value as it will be read back: tuples are lists."""
    plain: dict[str, Any] = json.loads(dump_json(value))
    return plain


def _brief(one: Measurement) -> dict[str, Any]:
    """A measurement without its samples and raw record: those are in the run directory."""
    whole: Mapping[str, Any] = one.to_dict()
    return {**whole, "samples": {}, "units": [], "details": {}}
