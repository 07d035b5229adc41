"""Answers that can be checked: numbers, expressions, exact words, and code that is run against its tests.

    solved    share of a question's answers that are right, averaged over questions                        higher is better
    pass@k    1 - C(n - c, k) / C(n, k) for c right of n answers: the chance that one of k is right, unbiased (2107.03374)
    answered  share of answers in which an answer was found at all (a number, a box, code that parses)

Files: the `verify` adapter (GSM8K, MATH, HumanEval, MBPP, or a question and an exact answer a row). What is taken from an
answer and what is equal: `measure.matching`. Code: `measure.sandbox`, only with --allow-code true.

Departures. Published harnesses join the answer and the tests into one program and ask whether it ends with status 0, so
that an answer that leaves early passes; here code and tests are compiled apart and the verdict is a number that the code
is not given. Numbers are compared exactly, as fractions. An answer without an end mark is cut where it begins a next
question (or, in code, a next definition). Cost: one answer a question and sample; some 40 ms a program.

What it means: the share of these questions that the model answers rightly in this format of prompt, which is printed.
What it does not mean: that it can, or cannot, do it: another prompt, more examples (--shots) or a longer answer can change
the figure by tens of points; and questions that were in its training data are not told apart.
When it misleads: "answered" far below 1 says that the format was missed, not the sum; more than a tenth of the answers cut
off at --max-new-tokens says the same (a warning is given); with no right answer in n questions the bound is 1 - 0.025^(1/n).
"""

from __future__ import annotations

import ast
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.measure.adapters import Item, read_items
from trimtab.measure.diagnostic import Diagnostic, Subject, files_digest
from trimtab.measure.matching import as_number, boxed, last_number, same_expression, same_words
from trimtab.measure.measurement import Dots, Measurement, Row
from trimtab.measure.rates import rate
from trimtab.measure.sandbox import Ran, run_python

CARD = Card(
    slug="verify",
    name="Answers that can be checked",
    paper="GSM8K (2110.14168), MATH (2103.03874), HumanEval and pass@k (2107.03374), MBPP (2108.07732)",
    summary="Right answers to questions with a number, an expression, exact words or unit tests.",
    goal="capability",
    stage="audit",
    mechanism="metric",
    signal=("verifier",),
    access="black-box text",
    produces="report",
    needs=("a file of questions with answers or tests",),
    infer_multiplier="samples",
    fit_cost="none",
    benefit_metrics=("solved",),
    cost_metrics=("answered",),
    limits=("code runs on Linux or macOS only; its filter of system calls on Linux only",),
    risks=("code of a model is run on this machine (only with allow_code)",),
    dimensions=("capability",),
    status=("implemented", "verified_cpu"),
    example="trimtab measure verify MODEL --texts gsm8k/test.jsonl --shots 4 --train gsm8k/train.jsonl --most 100",
    choose="To see whether a change cost the model something that can be checked: sums, expressions, code.",
)
CODE = ("function", "asserts")
NEXT = {"function": ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n```", "\nassert "), "asserts": ("\n```",)}


@dataclass(frozen=True)
class VerifyConfig:
    # answers drawn for each question
    samples: int = 1
    # the k of pass@k, each at most the number of samples
    k: tuple[int, ...] = (1,)
    # worked examples before each question, drawn from the file `train`
    shots: int = 0
    # the file that worked examples are drawn from; no question of it may be asked too
    train: Path | None = None
    # how a question is put; \n begins a line. A function to complete is put as it is
    prompt: str = "Question: {question}\\nAnswer:"
    # said after each question ("Put the final answer in \boxed{}.")
    instruction: str = ""
    # at most this many questions, the first ones (0: all)
    most: int = 0
    # run the code of the answers, in a sandbox; without it questions with tests are refused
    allow_code: bool = False
    # run it even where the system offers no filter of system calls (macOS): it can then write files and connect
    unsealed: bool = False
    # wall clock and processor seconds of one program
    seconds: float = 5.0
    # check the file's own reference answers, not the model's: do the tests and the comparison work?
    reference: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1 or self.most < 0 or self.shots < 0 or not 0 < self.seconds <= 3600:
            raise UsageError("samples >= 1, most >= 0, shots >= 0 and seconds in (0, 3600] are needed")
        if any(not 1 <= k <= self.samples for k in self.k):
            raise UsageError(f"k is 1 to the number of samples ({self.samples}), not {', '.join(map(str, self.k))}")
        if "{question}" not in self.prompt:
            raise UsageError(f"the prompt {self.prompt!r} has no {{question}} in it")
        if bool(self.shots) != (self.train is not None):
            raise UsageError("shots and train go together: the number of worked examples and the file they are in")


class Verify(Diagnostic):
    """Share of checkable questions that a policy answers rightly."""

    slug = "verify"
    Config = VerifyConfig
    TEXTS = "questions with an answer or tests on every line (GSM8K, MATH, HumanEval, MBPP, or question and answer)"

    def measure(self, subject: Subject) -> Measurement:
        config = self.config
        if max(config.k) > 1 and subject.sampling.temperature == 0 and not config.reference:
            raise UsageError("greedy answers to one question are all the same: give --temperature above 0, or --k 1")
        items = read_items(subject.file(self.TEXTS), "verify")[: config.most or None]
        refuse(items, config.allow_code)
        examples = self._examples(items, subject.sampling.seed)
        prompts = [ask(item, examples, config.prompt, config.instruction) for item in items]
        sampling = subject.sampling.but(samples=config.samples)
        drawn = None if config.reference else subject.answers(list(prompts), sampling)
        texts = [item["reference"] for item in items] if drawn is None else drawn.texts
        each = 1 if drawn is None else config.samples
        checked = []
        for row, text in enumerate(texts):
            item = items[row // each]
            if item["kind"] in CODE and row % 20 == 0:
                subject.say(f"{subject.name}: program {row + 1} of {len(texts)}")
            checked.append(check(item, cut(text, config.prompt), config.seconds, config.unsealed))
        right = np.array([one.passed for one in checked], dtype=np.float64).reshape(-1, each)  # [Q, S]
        found = np.array([one.outcome != "no answer" for one in checked], dtype=np.float64).reshape(-1, each)
        columns = {"solved": right.mean(1)}
        ks = [k for k in sorted(set(config.k)) if 1 < k <= each]
        columns |= {f"pass@{k}": np.array([pass_at(each, int(c), k) for c in right.sum(1)]) for k in ks}
        columns["answered"] = found.mean(1)
        table = [Row.of(label, rate(values), "" if label == "answered" else "higher")
                 for label, values in columns.items()]  # fmt: skip
        out = Measurement(
            self.slug,
            subject.name,
            subject.measured(
                [items, prompts], config, sampling=sampling.to_dict(),
                train=files_digest([config.train]) if config.train else [],
            ),
            "question",
            units=[item["id"] or item["question"][:80] for item in items],
            samples={label: values.tolist() for label, values in columns.items()},
            table=table,
            figures=[Dots("Questions solved", "share", [(r.label, r.value, r.low, r.high) for r in table])],
            cost=subject.meter,
        )  # fmt: skip
        outcomes = Counter(one.outcome for one in checked)
        out.notes.append("answers: " + ", ".join(f"{count} {name}" for name, count in outcomes.most_common()))
        out.details["prompt"] = prompts[0]
        out.details["answers"] = [
            {"question": row // each, "text": text, "outcome": one.outcome, "detail": one.detail}
            for row, (text, one) in enumerate(zip(texts, checked, strict=True))
        ]
        out.warnings += warn(drawn.finish_reasons if drawn else [], checked, config.reference)
        return out

    def _examples(self, items: list[Item], seed: int) -> list[Item]:
        """Worked examples, drawn without the global generator; none may be a question that is asked."""
        if self.config.train is None:
            return []
        known = read_items(self.config.train, "verify")
        asked = {" ".join(item["question"].split()).lower() for item in items}
        both = sum(" ".join(item["question"].split()).lower() in asked for item in known)
        if both:
            raise UsageError(f"{both} questions of {self.config.train} are asked too: give other worked examples")
        if len(known) < self.config.shots:
            raise UsageError(f"{self.config.train} has {len(known)} examples, not {self.config.shots}")
        return random.Random(seed).sample(known, self.config.shots)


def refuse(items: list[Item], allow_code: bool) -> None:
    """UsageError for kinds of questions that cannot, or may not, be checked."""
    kinds = {item["kind"] for item in items}
    if "instructions" in kinds:
        raise UsageError("the rules of this file (IFEval) are not implemented: measure lm-eval --tasks ifeval has them")
    if kinds & {*CODE} and not allow_code:
        raise UsageError("checking this file means running code that the model wrote: say --allow-code true to do so")
    unwritten = next((item for item in items if item["kind"] == "boxed" and boxed(item["reference"]) is None), None)
    if unwritten is not None:
        raise UsageError(f"the solution of {unwritten['question'][:60]!r} has no whole \\boxed{{}} answer")


def ask(item: Item, examples: list[Item], prompt: str = VerifyConfig.prompt, instruction: str = "") -> str:
    """The prompt: a function to complete is its own; else the question in `prompt`, after the worked examples."""
    if item["kind"] == "function":
        return "\n\n\n".join([*(one["question"] + one["reference"] for one in examples), item["question"]])
    before = "".join(f"{_put(one, prompt, instruction)} {one['reference']}\n\n" for one in examples)
    return before + _put(item, prompt, instruction)


def _put(item: Item, prompt: str, instruction: str) -> str:
    said = f"{item['question']} {instruction}".strip()
    if item["kind"] == "asserts":
        said += "\nThe code must pass these tests:\n" + "\n".join(item["tests"])
    return prompt.replace("\\n", "\n").replace("{question}", said)


def cut(text: str, prompt: str) -> str:
    """An answer up to where it begins a next question by itself."""
    mark = prompt.replace("\\n", "\n").partition("{question}")[0].strip()
    return text.partition(f"\n{mark}")[0] if mark else text


def check(item: Item, text: str, seconds: float = 5.0, unsealed: bool = False) -> Ran:
    """Whether an answer is right. outcome "no answer": nothing that could be one was found in the text."""
    if item["kind"] in CODE:
        return run_answer(item, text, seconds, unsealed)
    given: object
    if item["kind"] == "number":
        given, expected = last_number(text), as_number(item["answer"])
        right = given is not None and given == expected
    elif item["kind"] == "boxed":
        given = boxed(text)
        right = given is not None and same_expression(str(given), boxed(item["answer"]) or item["answer"])
    else:
        given = next((line.strip() for line in text.split("\n") if line.strip()), None)
        right = given is not None and same_words(str(given), item["answer"])
    outcome = "no answer" if given is None else "right" if right else "wrong"
    return Ran(right, outcome, "" if given is None else str(given), True, 0.0)


def run_answer(item: Item, text: str, seconds: float, unsealed: bool) -> Ran:
    """Run the code of an answer against the tests of its question."""
    code = program(item, text)
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Ran(False, "no answer", f"no code: {type(error).__name__}", True, 0.0)
    tests = "\n".join([item["setup"], *item["tests"]])
    if item["kind"] == "function":
        tests += f"\ncheck({item['entry_point']})\n"
    ran = run_python(code, tests, entry=item["entry_point"], seconds=seconds, unsealed=unsealed)
    if ran.outcome == "refused":
        raise UsageError(
            f"code cannot be contained here ({ran.detail}): --unsealed true runs it with limits of time and memory "
            "alone, so that it can write files and connect"
        )
    return ran


def program(item: Item, text: str) -> str:
    """The code of an answer: what is between ``` marks where there are some, cut where another thing begins."""
    fenced = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|$)", text, re.DOTALL)
    body = fenced[1] if fenced else text
    if item["kind"] == "asserts":
        return item["setup"] + "\n" + (body if fenced else _until(body, NEXT["asserts"]))
    head, definition, _ = item["question"].partition(f"def {item['entry_point']}")
    if definition and re.search(rf"^def {re.escape(item['entry_point'])}\b", body, re.MULTILINE):
        return head + body  # the whole function again
    return item["question"] + (body if fenced else _until(body, NEXT["function"]))


def _until(text: str, marks: tuple[str, ...]) -> str:
    return text[: min((at for mark in marks if (at := text.find(mark)) >= 0), default=len(text))]


def pass_at(n: int, c: int, k: int) -> float:
    """The chance that one of k answers drawn without replacement from n, of which c are right, is right."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def warn(finish_reasons: list[str], checked: list[Ran], reference: bool) -> list[str]:
    cut = sum(reason == "length" for reason in finish_reasons) / max(1, len(finish_reasons))
    out = ["these are the file's own reference answers: nothing was asked of the model"] if reference else []
    if cut > 0.1:
        out.append(f"{cut:.0%} of the answers were cut off: give more --max-new-tokens")
    if not all(one.sealed for one in checked):
        out.append("code was run without a filter of system calls")
    if late := sum(one.outcome == "timeout" for one in checked):
        out.append(f"{late} programs were stopped at the time limit and count as wrong")
    return out
