"""Questions with options, by the exact log-probability of every option: nothing is drawn, nothing is parsed.

    s_k = sum_t log p(o_kt | prompt, o_k<t)                the prompt forwarded once, forked for its options
    p_k = exp(s_k) / sum_j exp(s_j)                        among the options
    accuracy             argmax s_k is a right option (ties share the point)
    accuracy per byte    argmax s_k / bytes(o_k): without it short options win; bytes do not depend on the tokenizer
    p(right)             the p of all right options together (one right option, or several as in mc2)
    Brier                sum_k (p_k - y_k)^2, from 0 to 2; y_k: 1 for the right option (1/m for each of m right ones)
    ECE                  |mean confidence - accuracy| averaged over bins of equal mass, confidence = max p_k

Three kinds of files. `mc`: the above. `belief-mc` (A/B questions about behaviour): every question is asked in the given
order of its choices and in the reverse order and the two are averaged; "first position" is the probability of whatever
choice stands first (1/K if position does not matter), and "changes with order" the share of questions whose most probable
choice is another in the other order. `contrast-likelihood`: share of pairs whose stereotyped sentence is the more
probable one, whole sentences from the beginning of a text; half is neutral.

Departures. Published harnesses ask A/B questions in the file's order alone, so that a model that always says A scores the
share of A; here both orders count. ECE is biased upward (it is positive for a perfect model of few questions): its interval
is a percentile bootstrap over questions, stretched to hold the figure itself, and it is not compared. Cost: one forward
of each prompt and of all options but their last tokens; A/B questions twice.

What it means: which option the model finds most probable after this very prompt. What it does not mean: what it would
write if it were asked and could answer freely, or what it believes.
When it misleads: a difference from chance in A/B questions when "first position" is far from 1/K: the model answers a
letter, not the question. Accuracy by sums when options differ in length. Confidence of letters and of texts are different
things: compare like with like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.measure.adapters import Item, read_items, sniff
from trimtab.measure.diagnostic import Diagnostic, Subject
from trimtab.measure.measurement import Comparison, Dots, Line, Lines, Measurement, Row
from trimtab.measure.options import option_logprobs
from trimtab.measure.rates import rate
from trimtab.measure.stats import Interval, mean_interval, sign_test

CARD = Card(
    slug="multiple-choice",
    name="Multiple choice and its calibration",
    paper="MMLU (2009.03300), ARC, TruthfulQA (2109.07958), model-written evaluations (2212.09251), CrowS-Pairs (2010.00133)",
    summary="Accuracy, calibration, answers matching a behaviour, preferred sentences, by exact option probabilities.",
    goal="capability",
    stage="audit",
    mechanism="metric",
    signal=("own likelihood",),
    access="logits",
    produces="report",
    needs=("a file of questions with options, of A/B questions, or of pairs of sentences", "a local model"),
    infer_multiplier="options",
    fit_cost="none",
    benefit_metrics=("accuracy",),
    cost_metrics=("Brier", "ECE"),
    limits=("the options are scored after one form of prompt",),
    dimensions=("capability", "calibration", "factuality", "bias", "ethics"),
    status=("implemented", "verified_cpu"),
    example="trimtab measure multiple-choice pocket/chat --texts questions.jsonl --against pocket/base --template plain",
    choose="To see what a change cost in knowledge and calibration without drawing a single answer.",
)
KINDS = ("mc", "belief-mc", "contrast-likelihood")
CHUNK = 64  # questions between two lines of progress
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MultipleChoiceConfig:
    # which kind of file it is; not given: found from its columns
    adapter: Literal["mc", "belief-mc", "contrast-likelihood"] | None = None
    # score the text of the options, or list them in the prompt and score their letters (mc)
    form: Literal["text", "letter"] = "text"
    # how a question of an mc file is put; \n begins a line
    prompt: str = "Question: {question}\\nAnswer:"
    # at most this many questions, the first ones (0: all)
    most: int = 0
    # bins of the calibration curve, each with as many questions
    bins: int = 15
    # put a space before each option; not given: yes, unless the model has a chat template
    space: bool | None = None
    # seed of the bootstrap of ECE
    seed: int = 0

    def __post_init__(self) -> None:
        if "{question}" not in self.prompt:
            raise UsageError(f"the prompt {self.prompt!r} has no {{question}} in it")
        if self.most < 0 or self.bins < 2:
            raise UsageError(f"most >= 0 and bins >= 2 are needed, not {self.most} and {self.bins}")


class MultipleChoice(Diagnostic):
    """What a model's option probabilities say about questions with options."""

    slug = "multiple-choice"
    Config = MultipleChoiceConfig
    TEXTS = "questions with options (mc), A/B questions about behaviour (belief-mc) or pairs of sentences"

    def measure(self, subject: Subject) -> Measurement:
        path = subject.file(self.TEXTS)
        adapter = self.config.adapter or sniff(path, KINDS)
        if adapter not in KINDS:
            raise UsageError(f"{path} is a {adapter} file: multiple-choice reads {', '.join(KINDS)}")
        items = read_items(path, adapter)[: self.config.most or None]
        chat = subject.chat  # refuses what has no logits, before anything is forwarded
        space = not chat if self.config.space is None else self.config.space
        out = Measurement(
            self.slug,
            subject.name,
            subject.measured(items, self.config, kind=adapter, space=space),
            "pair" if adapter == "contrast-likelihood" else "question",
            units=[f"{number}: {_name(item)[:70]}" for number, item in enumerate(items, 1)],
            cost=subject.meter,
        )
        {"mc": self._mc, "belief-mc": self._belief, "contrast-likelihood": self._contrast}[adapter](
            subject, items, " " if space else "", out
        )
        return out

    def compare(self, first: Measurement, second: Measurement) -> Comparison:
        """Paired differences; where a column is right or wrong, also McNemar's exact test."""
        out = super().compare(first, second)
        for place, change in enumerate(out.changes):
            pairs = [(a, b) for a, b in zip(first.samples[change.label], second.samples[change.label], strict=True)
                     if a is not None and b is not None]  # fmt: skip
            if all(a in (0, 1) and b in (0, 1) for a, b in pairs):
                p_value = sign_test(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs))
                out.changes[place] = replace(change, p_value=p_value)
        return out

    def _score(self, subject: Subject, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> list[Array]:
        """Summed log-probabilities in nats, [K] a question."""
        out: list[Array] = []
        for at in range(0, len(prompts), CHUNK):
            subject.say(f"{subject.name}: prompts {at + 1} to {min(at + CHUNK, len(prompts))} of {len(prompts)}")
            scored = option_logprobs(
                subject.policy, prompts[at : at + CHUNK], options[at : at + CHUNK], meter=subject.meter
            )
            out += [np.array([float(one.double().sum()) for one in choices]) for choices in scored]
        return out

    def _mc(self, subject: Subject, items: list[Item], lead: str, out: Measurement) -> None:
        letters = self.config.form == "letter"
        prompts = [ask(item, letters, self.config.prompt) for item in items]
        options = [[lead + _letter(k) if letters else lead + text for k, text in enumerate(item["options"])]
                   for item in items]  # fmt: skip
        scores = self._score(subject, prompts, options)
        per_byte = [s / [len(o.encode()) for o in given] for s, given in zip(scores, options, strict=True)]
        p = [softmax(s) for s in scores]
        right = [np.isin(np.arange(len(s)), item["answers"]) for s, item in zip(scores, items, strict=True)]
        columns = {
            "accuracy": [top_share(s, r) for s, r in zip(scores, right, strict=True)],
            "accuracy per byte": [top_share(s, r) for s, r in zip(per_byte, right, strict=True)],
            "p(right)": [float(q[r].sum()) for q, r in zip(p, right, strict=True)],
            "Brier": [float(((q - r / r.sum()) ** 2).sum()) for q, r in zip(p, right, strict=True)],
        }
        chance = float(np.mean([r.mean() for r in right]))
        notes = {"accuracy": f"chance {chance:.3f}", "accuracy per byte": f"chance {chance:.3f}"}
        for label, values in columns.items():
            interval = mean_interval(values) if label in ("p(right)", "Brier") else rate(values)
            better: Literal["higher", "lower"] = "lower" if label == "Brier" else "higher"
            out.table.append(Row.of(label, interval, better, notes.get(label, "")))
        confidence, hits = np.array([q.max() for q in p]), np.array(columns["accuracy"])
        out.table.append(ece_row(confidence, hits, self.config.bins, self.config.seed))
        out.samples |= {label: list(values) for label, values in columns.items()}
        out.figures.append(reliability(confidence, hits, self.config.bins))
        _by(out, [item["subject"] for item in items], columns["accuracy"], "Accuracy by subject", chance)
        out.details |= {"prompt": prompts[0], "p": [q.tolist() for q in p], "chance": chance}
        if subject.chat and not letters and any(item["continues"] for item in items):
            out.warnings.append("sentences to continue are asked through a chat template: --template plain goes on")

    def _belief(self, subject: Subject, items: list[Item], lead: str, out: Measurement) -> None:
        wrap = not subject.chat
        orders = [(item, reverse) for item in items for reverse in (False, True)]
        asked = [belief(item, reverse, lead, wrap) for item, reverse in orders]
        scores = self._score(subject, [one[0] for one in asked], [one[1] for one in asked])
        p = []  # of the choices as the file lists them
        for (item, reverse), s in zip(orders, scores, strict=True):
            p.append(softmax(s)[::-1] if reverse and item["letters"] else softmax(s))
        columns: dict[str, list[float | None]] = {"matching": [], "p(matching)": [], "first position": []}
        columns["changes with order"] = []
        for number, item in enumerate(items):
            given, turned = p[2 * number], p[2 * number + 1]
            lettered = bool(item["letters"])
            hits = [top_share(q, np.arange(len(q)) == item["matching"]) for q in (given, turned)]
            columns["matching"].append(float(np.mean(hits)))
            columns["p(matching)"].append(float((given + turned)[item["matching"]] / 2))
            columns["first position"].append(float(given[0] + turned[-1]) / 2 if lettered else None)
            columns["changes with order"].append(float(given.argmax() != turned.argmax()) if lettered else None)
        by_order = [
            float(np.mean([top_share(p[2 * n + turn], np.arange(len(p[2 * n + turn])) == item["matching"])
                           for n, item in enumerate(items)])) for turn in (0, 1)
        ]  # fmt: skip
        chance = float(np.mean([1 / len(item["options"]) for item in items]))
        for label, values in columns.items():
            numbers = np.array(values, dtype=np.float64)
            known = numbers[~np.isnan(numbers)]
            interval = rate(known) if len(known) else Interval(None, None, None)
            note = {
                "matching": f"chance {chance:.3f}; given order {by_order[0]:.3f}, reversed {by_order[1]:.3f}",
                "p(matching)": f"chance {chance:.3f}",
                "first position": f"no bias {chance:.3f}",
            }.get(label, "")
            out.table.append(Row.of(label, interval, "", note))
        out.samples |= columns
        out.figures.append(
            Dots(
                "Answers matching the behaviour, both orders averaged",
                "share",
                [(r.label, r.value, r.low, r.high) for r in out.table],
                [("chance", chance)],
            )
        )
        out.details |= {"prompt": asked[0][0], "p": [q.tolist() for q in p], "chance": chance, "by_order": by_order}
        bias = out.row("first position")
        if bias.low is not None and bias.high is not None and not bias.low <= chance <= bias.high:
            out.warnings.append(
                f"the place of a choice moves its probability (first position {bias.value:.3f}, {chance:.3f} without "
                "bias): part of every answer is about the letter"
            )  # fmt: skip

    def _contrast(self, subject: Subject, items: list[Item], lead: str, out: Measurement) -> None:
        lm = subject.lm
        start = getattr(lm.tokenizer, "bos_token", None)
        if start is None:
            raise UsageError(f"{lm.name} has no token that begins a text: whole sentences have no probability there")
        if subject.chat:
            raise UsageError("sentences are scored from the beginning of a text: --template plain leaves the chat out")
        pairs = [[item["sent_more"], item["sent_less"]] for item in items]
        scores = self._score(subject, [start] * len(items), pairs)
        prefers = [float(s[0] > s[1]) if s[0] != s[1] else 0.5 for s in scores]
        out.table.append(Row.of("prefers the stereotype", rate(prefers), "", "neutral 0.500"))
        gap = [float(s[0] - s[1]) for s in scores]
        out.table.append(Row.of("log p(more) - log p(less)", mean_interval(gap), "", "nats; neutral 0"))
        out.samples |= {"prefers the stereotype": list(prefers), "log p(more) - log p(less)": list(gap)}
        _by(out, [item["category"] for item in items], prefers, "Prefers the stereotype, by category", 0.5)


def ask(item: Item, letters: bool, prompt: str = MultipleChoiceConfig.prompt) -> str:
    """The prompt of an mc item: text to go on from, or a question, with its options listed where letters are scored."""
    if item["continues"] and not letters:
        return str(item["question"])
    listed = [f"\n{_letter(k)}. {text.strip()}" for k, text in enumerate(item["options"])] if letters else []
    return prompt.replace("\\n", "\n").replace("{question}", item["question"] + "".join(listed))


def belief(item: Item, reverse: bool, lead: str, wrap: bool) -> tuple[str, list[str]]:
    """The prompt and the options of an A/B question; reverse: the choices in the other order under the same letters."""
    stem = item["stem"].removeprefix("Question:").strip()
    choices = list(reversed(item["options"])) if reverse else item["options"]
    if item["letters"]:
        stem += "\n\nChoices:\n" + "\n".join(f" ({_letter(k)}) {text}" for k, text in enumerate(choices))
        options = [f"{lead}({_letter(k)})" for k in range(len(choices))]
    else:
        options = [lead + text for text in item["options"]]
    return (f"Question: {stem}\n\nAnswer:" if wrap else stem), options


def softmax(scores: Array) -> Array:
    shifted = np.exp(scores - scores.max())
    out: Array = shifted / shifted.sum()
    return out


def top_share(scores: Array, right: npt.NDArray[np.bool_]) -> float:
    """1 if the highest score is a right option's, 0 if not; the share of right ones among several highest."""
    highest = scores == scores.max()
    return float((highest & right).sum() / highest.sum())


def equal_mass(confidence: Array, bins: int) -> list[npt.NDArray[np.int64]]:
    """The questions of each bin, in order of confidence; bins differ by one question at most, none is empty."""
    order = np.argsort(confidence, kind="stable")
    return [part for part in np.array_split(order, min(bins, len(order))) if len(part)]


def ece(confidence: Array, hits: Array, bins: int) -> float:
    """sum over bins of (n_b / n) |mean confidence - mean accuracy|."""
    parts = equal_mass(confidence, bins)
    gaps = [len(part) * abs(float(confidence[part].mean() - hits[part].mean())) for part in parts]
    return float(sum(gaps) / len(confidence))


def ece_row(confidence: Array, hits: Array, bins: int, seed: int, resamples: int = 1000) -> Row:
    """ECE with an interval over questions; undefined below two questions a bin.

    ECE is biased upward, and that of a resample twice as much: percentiles would always leave out the 0 of a calibrated
    model. So they are reflected about the value, and the lower end is 0 where calibrated answers with these confidences
    reach the value in 5 % of draws. In simulations of 40 to 400 questions that covers 0 in 95 %, 0.05 to 0.3 in 80 to 93 %.
    """
    if len(hits) < 2 * bins:
        return Row("ECE", None, n=len(hits), better="lower", note=f"undefined: fewer than 2 questions in {bins} bins")
    generator = np.random.default_rng(seed)
    draws, calibrated = [], []
    for _ in range(resamples):
        picks = generator.integers(0, len(hits), len(hits))
        draws.append(ece(confidence[picks], hits[picks], bins))
        calibrated.append(ece(confidence, (generator.random(len(hits)) < confidence).astype(np.float64), bins))
    value, chance = ece(confidence, hits, bins), float(np.quantile(calibrated, 0.95))
    low, high = (2 * value - float(end) for end in np.quantile(draws, [0.975, 0.025]))
    note = f"{bins} bins of equal mass; biased upward: up to {chance:.3f} if calibrated"
    return Row("ECE", value, 0.0 if value <= chance else max(0.0, low), max(high, value), len(hits), "lower", note)


def reliability(confidence: Array, hits: Array, bins: int) -> Lines:
    points = []
    for part in equal_mass(confidence, bins):
        found = rate(hits[part])
        points.append((float(confidence[part].mean()), found.mean, found.low, found.high))
    return Lines("Calibration", "probability of the chosen option", "share right",
                 [Line("measured", points), Line("perfect", [(0.0, 0.0), (1.0, 1.0)])])  # fmt: skip


def _by(out: Measurement, groups: Sequence[str], values: Sequence[float], title: str, reference: float) -> None:
    """A figure of one rate a group, where there are several groups."""
    names = sorted({group for group in groups if group})
    if len(names) > 1:
        found = {name: rate([v for v, group in zip(values, groups, strict=True) if group == name]) for name in names}
        dots = [(f"{name} (n={one.rows})", one.mean, one.low, one.high) for name, one in found.items()]
        out.figures.append(Dots(title, "share", dots, [("chance", reference)]))


def _letter(place: int) -> str:
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[place]


def _name(item: dict[str, Any]) -> str:
    return str(item.get("stem") or item.get("question") or item.get("sent_more"))
