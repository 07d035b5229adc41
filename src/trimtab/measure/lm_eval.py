"""Tasks of lm-evaluation-harness by name, where it is installed; its model is ours, with whatever steers it attached.

Nothing is reimplemented: prompts, splits, filters and metrics are the harness's own, and so are its downloads. From its
log of samples every question's metric is taken, so that the interval resamples questions and two models are compared
question by question; where a task logs none, the interval is the harness's own standard error times 1.96 and the row
cannot be compared. Cost: what the task asks; the tokens of every call of the model are counted, pads included, because the
harness does its own batching. The harness seeds the global generators of random, numpy and torch.

What it means: the figure that others report under this task's name with this version of the harness (kept in the details).
What it does not mean: more than the task does. When it misleads: a base model and a chat model under one chat setting;
--chat true asks through the model's template, and the comparison is refused where the templates differ.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.measure.diagnostic import Diagnostic, Subject
from trimtab.measure.measurement import Dots, Measurement, Row
from trimtab.measure.rates import rate
from trimtab.measure.stats import mean_interval

CARD = Card(
    slug="lm-eval",
    name="Tasks of lm-evaluation-harness",
    paper="lm-evaluation-harness (2405.14782)",
    summary="Any task of the harness by its name, with intervals, pairing and controls attached.",
    goal="capability",
    stage="audit",
    mechanism="metric",
    signal=("none",),
    access="logits",
    produces="report",
    needs=("the package lm_eval", "the task's data (downloaded by the harness, or in its cache)", "a local model"),
    infer_multiplier="as the task asks",
    fit_cost="none",
    benefit_metrics=("the task's own",),
    cost_metrics=("tokens forwarded",),
    limits=("the harness is not a dependency: pip install 'lm_eval[hf]'",),
    dimensions=("capability",),
    example="trimtab measure lm-eval pocket/base --tasks 'arc_easy|hellaswag' --limit 200",
    choose="When a figure must be the one that everybody reports under a task's name.",
)


@dataclass(frozen=True)
class LmEvalConfig:
    # names of tasks, as the harness knows them
    tasks: tuple[str, ...] = ()
    # worked examples before each question; not given: what the task says
    shots: int | None = None
    # at most this many questions of each task (0: all)
    limit: int = 0
    # ask through the model's chat template
    chat: bool = False
    # a folder with task files (YAML) of your own
    include: Path | None = None
    # rows forwarded together
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UsageError("--tasks NAME is needed, or 'NAME|NAME': tasks of lm-evaluation-harness")
        if self.limit < 0 or self.batch_size < 1 or (self.shots is not None and self.shots < 0):
            raise UsageError("limit >= 0, batch_size >= 1 and shots >= 0 are needed")


class LmEval(Diagnostic):
    """Metrics of the harness's tasks."""

    slug = "lm-eval"
    Config = LmEvalConfig
    TEMPLATED = False

    def measure(self, subject: Subject) -> Measurement:
        config, lm = self.config, subject.lm
        harness = load("lm_eval")
        if config.chat and not subject.chat:
            raise UsageError(f"{lm.name} has no chat template: leave --chat out")
        if config.include is not None and not config.include.is_dir():
            raise UsageError(f"there is no folder {config.include} with task files")
        own = {"include_path": str(config.include)} if config.include is not None else {}
        control = subject.control
        with counted(lm, subject), control.attached(lm.model) if control is not None else nullcontext():
            wrapped = load("lm_eval.models.huggingface").HFLM(
                pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=config.batch_size
            )
            try:
                found = harness.simple_evaluate(
                    model=wrapped, tasks=list(config.tasks), num_fewshot=config.shots, limit=config.limit or None,
                    apply_chat_template=config.chat, log_samples=True,
                    task_manager=load("lm_eval.tasks").TaskManager(**own),
                )  # fmt: skip
            except (KeyError, ValueError) as error:
                raise UsageError(f"lm-evaluation-harness refused {', '.join(config.tasks)}: {error}") from error
        version = str(getattr(harness, "__version__", "unknown"))
        out = Measurement(
            self.slug,
            subject.name,
            subject.measured(found.get("versions", {}), config, harness=version),
            "question",
            cost=subject.meter,
        )
        if not config.chat:
            out.measured["template"] = "none"
        fill(out, found)
        out.details |= {"harness": version, "results": found["results"], "versions": found.get("versions", {})}
        return out


def load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            "lm-eval delegates to lm-evaluation-harness, which is not here: pip install 'lm_eval[hf]'"
        ) from error


@contextmanager
def counted(lm: Any, subject: Subject) -> Iterator[None]:
    """Charge the tokens of every call of the model to the subject's meter."""

    def count(_: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        ids = named.get("input_ids", arguments[0] if arguments else None)
        if ids is not None:
            subject.meter.tokens[lm.name] = subject.meter.tokens.get(lm.name, 0) + int(ids.numel())

    handle = lm.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def fill(out: Measurement, found: Mapping[str, Any]) -> None:
    """Units, samples and rows from what the harness returns: results {task: {"metric,filter": value}}, samples."""
    columns: dict[str, dict[str, float]] = {}
    for task, metrics in found["results"].items():
        logged = (found.get("samples") or {}).get(task, [])
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or "_stderr" in metric or not filtered:
                continue
            better = "higher" if (found.get("higher_is_better") or {}).get(task, {}).get(metric, True) else "lower"
            label = f"{task} {metric}" + ("" if filtered == "none" else f" ({filtered})")
            rows = {
                f"{task} {one['doc_id']}": one[metric]
                for one in logged
                if isinstance(one.get(metric), int | float) and one.get("filter", filtered) == filtered
            }
            if rows:
                values = [float(v) for v in rows.values()]
                interval = rate(values) if all(0 <= v <= 1 for v in values) else mean_interval(values)
                out.table.append(Row.of(label, interval, better))  # type: ignore[arg-type]
                columns[label] = {unit: float(v) for unit, v in rows.items()}
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, int | float)
            low, high = (value - 1.96 * error, value + 1.96 * error) if known else (None, None)
            count = int(((found.get("n-samples") or {}).get(task) or {}).get("effective", 0))
            note = "the harness's own standard error" if known else "no interval: nothing was logged by question"
            out.table.append(Row(label, float(value), low, high, count, better, note))  # type: ignore[arg-type]
    out.units = list(dict.fromkeys(unit for column in columns.values() for unit in column))
    out.samples = {label: [column.get(unit) for unit in out.units] for label, column in columns.items()}
    if not out.table:
        out.warnings.append("the tasks gave no metric with a number")
    out.figures.append(Dots("Metrics", "value", [(r.label, r.value, r.low, r.high) for r in out.table]))
