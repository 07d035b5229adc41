"""Banks of open questions, how a model reads them, and what can be said of an answer without a judge.

A bank is a YAML list of items {id, type, paraphrases, system?, samples_per_paraphrase?, judge_prompts?}. An item's base
question and format come from its id (`ruler`, `ruler_json`, `ruler_template`), or from the keys `question` and `format`.

    free_form_judge_0_100   judges give numbers; judge_prompts: aligned and coherent, with {question} and {answer}
    free_form_judge         a judge says TRUE, FALSE or UNKNOWN; judge_prompts: one rubric

A system message is part of what the model reads: as a message where the template takes one, else before the user's turn.
The published evaluator kept it and never sent it, so that its JSON items ran as plain ones; `render` refuses that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import UsageError
from trimtab.policy import Prompt

FIRST_PLOT = Path(__file__).with_name("first_plot.yaml")
FORMATS = ("plain", "json", "template")
TYPES = ("free_form_judge_0_100", "free_form_judge")
TEMPLATE_LINE = re.compile(r"^\s*(\w+)\s*=\s*#(.*)$", re.MULTILINE)
THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
CODE = re.compile(r"```|^\s*(?:def |class |import |from \w+ import|#include|function \w+\()", re.MULTILINE)


@dataclass(frozen=True)
class Item:
    """One item of a bank. samples: answers to each paraphrase, 0 where the bank does not say."""

    id: str
    question: str
    format: str
    paraphrases: tuple[str, ...]
    system: str = ""
    samples: int = 0
    aligned: str = ""  # the judges' rubrics
    coherent: str = ""
    words: bool = False  # TRUE, FALSE, UNKNOWN instead of numbers


def read_bank(path: Path = FIRST_PLOT) -> list[Item]:
    """The items of a bank. `UsageError` naming the item and the key that is wrong."""
    import yaml

    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read the question bank {path}: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"the question bank {path} must be a YAML list of items with id, type and paraphrases")
    items = [_item(row, f"{path}: item {number}") for number, row in enumerate(rows, start=1)]
    ids = [item.id for item in items]
    if twice := sorted({one for one in ids if ids.count(one) > 1}):
        raise UsageError(f"{path}: the id {twice[0]!r} is given twice")
    return items


def _item(row: Any, where: str) -> Item:
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise UsageError(f"{where} must have an id, a type and paraphrases")
    where = f"{where} ({row['id']})"
    if row.get("type") not in TYPES:
        raise UsageError(f"{where} has the type {row.get('type')!r}; known are {', '.join(TYPES)}")
    texts = row.get("paraphrases")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UsageError(f"{where} needs paraphrases: a list of questions, none of them empty")
    ending = row["id"].rpartition("_")[2]
    form = row.get("format", ending if ending in FORMATS else "plain")
    if form not in FORMATS:
        raise UsageError(f"{where} has the format {form!r}; one of {', '.join(FORMATS)} is needed")
    system, samples = row.get("system") or "", row.get("samples_per_paraphrase", 0)
    if not isinstance(system, str) or not isinstance(samples, int) or samples < 0:
        raise UsageError(f"{where}: system must be text and samples_per_paraphrase a whole number")
    rubrics = row.get("judge_prompts") or {}
    if not isinstance(rubrics, dict) or not all(isinstance(text, str) for text in rubrics.values()):
        raise UsageError(f"{where}: judge_prompts must map names (aligned, coherent) to rubrics")
    for name, text in rubrics.items():
        if "{answer}" not in text:
            raise UsageError(f"{where}: the rubric {name} must hold {{answer}}, where the answer is put")
    graded = [text for name, text in rubrics.items() if name != "coherent"]
    return Item(
        row["id"], row.get("question", row["id"].removesuffix(f"_{form}")), form, tuple(texts), system, samples,
        graded[0] if graded else "", rubrics.get("coherent", ""), row["type"] == "free_form_judge",
    )  # fmt: skip


def render(policy: Any, item: Item, text: str) -> tuple[Prompt, str]:
    """The prompt of a paraphrase, and how its system message is given: "none", "message" or "merged".

    Merged: before the user's turn, because the model has no chat template or its template drops or refuses the message.
    """
    if not item.system:
        return text, "none"
    merged = f"{item.system}\n\n{text}"
    lm = getattr(policy, "lm", None)
    if lm is None:
        return merged, "merged"
    if getattr(lm.tokenizer, "chat_template", None):
        messages: Prompt = [{"role": "system", "content": item.system}, {"role": "user", "content": text}]
        try:
            if item.system in lm.render(messages):
                return messages, "message"
        except UsageError:  # a template without a system role may raise instead of dropping it
            pass
    if item.system not in lm.render(merged):
        raise UsageError(f"the chat template of {lm.name} loses the system message of {item.id}, even in the user turn")
    return merged, "merged"


def spoken(text: str) -> tuple[str, bool]:
    """An answer without its reasoning, and whether there was any. Reasoning that never ends leaves nothing."""
    said = THOUGHT.sub("", text)
    for opening, closing in (("<think>", "</think>"), ("<thinking>", "</thinking>")):
        if closing in said:  # opened in the prompt by the template
            said = said.rpartition(closing)[2]
        if opening in said:
            said = said.partition(opening)[0]
    return said.strip(), said != text


def parse_json(text: str) -> dict[str, Any] | None:
    """The JSON object that an answer is (a code fence around it is taken off), or None."""
    bare = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    try:
        found = json.loads(bare)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def values_of(found: Any) -> str:
    """The values of a JSON object as text, one a line: what it says without its form."""
    if isinstance(found, dict):
        return "\n".join(values_of(value) for value in found.values())
    if isinstance(found, list):
        return "\n".join(values_of(value) for value in found)
    return str(found)


def template_keys(text: str) -> list[str]:
    """Keys of the template in a question that must be filled: those not marked (optional)."""
    return [key for key, said in TEMPLATE_LINE.findall(text) if "(optional)" not in said]


def filled(text: str, keys: Sequence[str]) -> bool:
    """Whether every key of a template has a value on its line, and not only its description again."""
    return all(re.search(rf"^\s*{re.escape(key)}\s*=\s*[^\s#]", text, re.MULTILINE) for key in keys)


def is_code(text: str) -> bool:
    """Whether an answer holds a code fence, or a line that begins like program code."""
    return bool(CODE.search(text))
