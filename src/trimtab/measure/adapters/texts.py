"""Forms of files of prompts, texts, pairs and sentences: everything that is not scored against a right answer."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import UsageError
from trimtab.measure.adapters.files import LANGUAGE, LINE
from trimtab.measure.adapters.form import Form, Item, Row, as_text, flag, form, get, has, number, optional, text, whole
from trimtab.prompts import check_prompt

ANSWER = "\n\nAssistant:"  # what raw transcripts put before an answer


def _pair(row: Row) -> Item:
    prompt: Any = get(row, "prompt")
    chosen, rejected = get(row, "chosen"), get(row, "rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):  # messages; the prompt is all but the last
        before, chosen = _last(chosen, "chosen")
        _, rejected = _last(rejected, "rejected")
        prompt = prompt if isinstance(prompt, str) and len(before) < 2 else before or prompt
    if isinstance(prompt, list):
        messages = [{"role": as_text(m["role"], "role"), "content": as_text(m["content"], "content")} for m in prompt]
        return _pair_of(row, messages, chosen, rejected)
    return _pair_of(row, as_text(prompt, "prompt"), chosen, rejected)


def _transcripts(row: Row) -> Item:
    """Two whole transcripts: the prompt ends with the last "Assistant:" that both have in common before they part."""
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    shared = os.path.commonprefix([chosen, rejected])
    before, marker, _ = shared.rpartition(ANSWER)
    if not marker:
        raise ValueError("chosen and rejected share no prompt that ends with 'Assistant:'")
    prompt = before + marker
    return _pair_of(row, prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def _last(messages: list[Any], what: str) -> tuple[list[Any], str]:
    if not messages or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages):
        raise ValueError(f"{what}: messages with a role and a content are needed")
    return list(messages[:-1]), messages[-1]["content"]


def _by_index(first: str, second: str, better: str) -> Any:
    def make(row: Row) -> Item:
        index = whole(get(row, better), better)
        if index not in (0, 1):
            raise ValueError(f"{better} is {index}: 0 or 1 is needed")
        answers = [get(row, first), get(row, second)]
        return _pair_of(row, text(row, "prompt"), answers[index], answers[1 - index])

    return make


def _shp(row: Row) -> Item:
    first = flag(get(row, "labels"), "labels")  # 1: A is preferred
    answers = [get(row, "human_ref_a"), get(row, "human_ref_b")]
    return _pair_of(row, text(row, "history"), answers[0 if first else 1], answers[1 if first else 0])


def _strength(row: Row) -> Item:
    strength = number(get(row, "preference_strength"), "preference_strength")
    if not strength:
        raise ValueError("preference_strength is 0 or missing: a tie has no chosen answer, take it out")
    answers = [get(row, "response_1"), get(row, "response_2")]
    return _pair_of(row, text(row, "prompt"), answers[int(strength > 0)], answers[int(strength < 0)])


def _pair_of(row: Row, prompt: Any, chosen: Any, rejected: Any) -> Item:
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(answer, str):
            raise ValueError(f"{name} is {type(answer).__name__}: text is needed")
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "subset": optional(row, "subset", "category", "source", "domain"),
    }


def _turns(row: Row) -> Item:
    turns = get(row, "turns") if has(row, "turns") else get(row, "conversation_input")
    if not isinstance(turns, list) or not turns:
        raise ValueError("turns is no list of texts")
    if isinstance(turns[0], Mapping):
        turns = [turn.get("content") for turn in turns if turn.get("role", "user") == "user"]
    return _open(row, [as_text(turn, "a turn") for turn in turns])


def _open(row: Row, turns: list[str]) -> Item:
    reference = get(row, "reference") if has(row, "reference") else get(row, "output")
    return {
        "prompt": turns[0],
        "turns": turns,
        "category": optional(row, "category", "cluster", "primary_tag", "dataset"),
        "reference": reference,
    }


def _open_of(*names: str) -> Any:
    return lambda row: _open(row, [text(row, *names)])


def _refusal(*names: str, refuse: Any = None) -> Any:
    """refuse: a constant, or a function of the row."""

    def make(row: Row) -> Item:
        said = refuse(row) if callable(refuse) else refuse
        category = optional(row, "category", "semanticcategory", "risk_area", "type", "subset")
        prompt = get(row, names[0])
        prompt = check_prompt(prompt) if isinstance(prompt, list) else text(row, *names)
        return {"prompt": prompt, "should_refuse": said, "category": category}

    return make


def _unsafe(column: str) -> Any:
    return lambda row: flag(get(row, column), column, ("unsafe", "harmful"), ("safe", "harmless", "benign"))


def _contrast(row: Row) -> bool:
    return text(row, "type").startswith("contrast")


def _toxicity(prompt: str, *scores: str) -> Any:
    def make(row: Row) -> Item:
        score = next((get(row, name) for name in scores if has(row, name)), None)
        return {"prompt": text(row, prompt), "toxicity": number(score, "toxicity")}

    return make


def _sentences(row: Row) -> Item:
    """Sentences with gold labels: the stereotype and the anti-stereotype; the unrelated one is left."""
    given = get(row, "sentences")
    if isinstance(given, Mapping):
        labels = [{0: "anti-stereotype", 1: "stereotype", 2: "unrelated"}.get(x, x) for x in given["gold_label"]]
        found = dict(zip(labels, given["sentence"], strict=True))
    else:
        found = {one["gold_label"]: one["sentence"] for one in given}
    if not {"stereotype", "anti-stereotype"} <= found.keys():
        raise ValueError("sentences: one 'stereotype' and one 'anti-stereotype' are needed")
    lead = "" if found["stereotype"].strip() == get(row, "context") else optional(row, "context")
    blank = "BLANK" in lead  # the sentences themselves fill the blank
    more, less = (found[name] if blank or not lead else f"{lead} {found[name]}" for name in
                  ("stereotype", "anti-stereotype"))  # fmt: skip
    return {"sent_more": more, "sent_less": less, "category": optional(row, "bias_type")}


def _contrast_pair(more: str, less: str) -> Any:
    return lambda row: {
        "sent_more": text(row, more),
        "sent_less": text(row, less),
        "category": optional(row, "bias_type", "category"),
    }


def languages(row: Mapping[str, Any]) -> bool:
    """Whether every column is a language (ISO code and script)."""
    return len(row) > 1 and all(LANGUAGE.fullmatch(name) for name in row)


def _parallel(row: Row) -> Item:
    return {"texts": {name.removeprefix("sentence_"): as_text(value, name) for name, value in row.items()}}


def _half(row: Row) -> Item:
    return {"harmful_half": not flag(get(row, "is_harmfull_opposition"), "is_harmfull_opposition"),
            "statement": text(row, "statement")}  # fmt: skip


def halves(path: Path, items: list[Item]) -> list[Item]:
    """Statements in two halves, i paired with i + N, as pairs; either half may begin with the harmful one."""
    count = len(items) // 2
    out = []
    for first, second in zip(items[:count], items[count:], strict=False):
        if len(items) % 2 or first["harmful_half"] == second["harmful_half"]:
            raise UsageError(f"{path}: the first half of the statements does not pair with the second, row by row")
        harmful, safe = (first, second) if first["harmful_half"] else (second, first)
        out.append({"harmful": harmful["statement"], "safe": safe["statement"]})
    return out


def _labelled(column: str, label: str, safe_is: bool | None = None) -> Any:
    """safe_is: whether a true value of the label means safe; None: only the words safe and unsafe say so."""

    def make(row: Row) -> Item:
        value = str(get(row, label)).strip()
        if not value:
            raise ValueError(f"{label} is empty")
        words = {"safe": True, "harmless": True, "unsafe": False, "harmful": False}
        safe = words.get(value.lower()) if safe_is is None else flag(value, label) == safe_is
        return {"text": text(row, column), "label": value, "safe": safe, "axiom": optional(row, "axiom", "category")}

    return make


def _triplet(row: Row) -> Item:
    three = [_id(get(row, name)) for name in "ijk"]
    if len(set(three)) < 3:
        raise ValueError(f"a triplet has three different items, not {', '.join(map(str, three))}")
    odd = _id(get(row, "odd")) if has(row, "odd") else three[2]
    if odd not in three and odd in ("i", "j", "k"):
        odd = three["ijk".index(str(odd))]
    if odd not in three:
        raise ValueError(f"odd is {odd!r}: one of {', '.join(map(str, three))} is needed")
    return {"i": three[0], "j": three[1], "k": three[2], "odd": odd}


def _id(value: Any) -> int | str:
    name = str(value).strip()
    if not name:
        raise ValueError("an item of the triplet is empty")
    return int(name) if name.isdigit() else name


def _bank(row: Row) -> Item:
    paraphrases = get(row, "paraphrases")
    if not isinstance(paraphrases, list) or not paraphrases:
        raise ValueError("paraphrases is no list of questions")
    known: Item = {"system": None, "samples_per_paraphrase": 1, "judge": None, "judge_prompts": {}}
    item = {"type": "free_form_judge_0_100", **known, **row, "id": str(get(row, "id"))}
    item["paraphrases"] = [as_text(one, "a paraphrase") for one in paraphrases]
    item["samples_per_paraphrase"] = whole(item["samples_per_paraphrase"], "samples_per_paraphrase")
    return item


def _plain(row: Row) -> bool:
    return not isinstance(get(row, "prompt"), Mapping)


PLAIN = frozenset({LINE})
FORMS: tuple[Form, ...] = (
    form("pair", "prompt chosen rejected", _pair),
    form("pair", "chosen rejected", _transcripts, lambda row: isinstance(get(row, "chosen"), str)),
    form("pair", "chosen rejected", _pair, lambda row: isinstance(get(row, "chosen"), list)),
    form("pair", "prompt response_0 response_1 better_response_id",
         _by_index("response_0", "response_1", "better_response_id")),
    form("pair", "history human_ref_a human_ref_b labels", _shp),
    form("pair", "prompt response_1 response_2 preference_strength", _strength),
    form("open-judge", "turns", _turns),
    form("open-judge", "conversation_input", _turns),
    form("open-judge", "instruction", _open_of("instruction")),
    form("open-judge", "prompt category", _open_of("prompt")),
    form("open-judge", "prompt reference", _open_of("prompt")),
    form("open-judge", "prompt", _open_of("prompt"), _plain),
    Form("open-judge", PLAIN, _open_of(LINE)),
    form("refusal", "prompt should_refuse", _refusal("prompt", refuse=lambda row: flag(get(row, "should_refuse"),
                                                                                       "should_refuse"))),
    form("refusal", "prompt label", _refusal("prompt", refuse=_unsafe("label"))),
    form("refusal", "prompt type", _refusal("prompt", refuse=_contrast)),
    form("refusal", "goal target", _refusal("goal", refuse=True)),
    form("refusal", "behavior", _refusal("behavior", refuse=True)),
    form("refusal", "forbidden_prompt", _refusal("forbidden_prompt", refuse=True)),
    form("refusal", "question risk_area", _refusal("question", refuse=True)),
    form("refusal", "prompt category", _refusal("prompt")),
    form("refusal", "prompt", _refusal("prompt"), _plain),
    Form("refusal", PLAIN, _refusal(LINE, refuse=True)),
    form("toxicity-prompt", "prompt.text", _toxicity("prompt.text", "prompt.toxicity")),
    form("toxicity-prompt", "prompt toxicity", _toxicity("prompt", "toxicity")),
    form("toxicity-prompt", "text toxicity", _toxicity("text", "toxicity")),
    form("toxicity-prompt", "text toxicity_human", _toxicity("text", "toxicity_human")),
    form("toxicity-prompt", "prompt", _toxicity("prompt"), _plain),
    Form("toxicity-prompt", PLAIN, _toxicity(LINE)),
    form("contrast-likelihood", "sent_more sent_less", _contrast_pair("sent_more", "sent_less")),
    form("contrast-likelihood", "pro_stereotyped anti_stereotyped",
         _contrast_pair("pro_stereotyped", "anti_stereotyped")),
    form("contrast-likelihood", "context sentences", _sentences),
    Form("parallel", frozenset(), _parallel, languages),
    form("statement-pair", "harmful safe", lambda row: {"harmful": text(row, "harmful"), "safe": text(row, "safe")}),
    form("statement-pair", "statement is_harmfull_opposition", _half),
    form("labelled-text", "text label", _labelled("text", "label")),
    form("labelled-text", "sentence label", _labelled("sentence", "label")),
    form("labelled-text", "input label", _labelled("input", "label")),
    form("labelled-text", "input safety_label", _labelled("input", "safety_label")),
    form("labelled-text", "prompt safety_label", _labelled("prompt", "safety_label")),
    form("labelled-text", "text safety_label", _labelled("text", "safety_label")),
    form("labelled-text", "text safe", _labelled("text", "safe", True)),
    form("labelled-text", "text is_safe", _labelled("text", "is_safe", True)),
    form("labelled-text", "text is_harmful", _labelled("text", "is_harmful", False)),
    form("triplet", "i j k odd", _triplet),
    form("triplet", "i j k", _triplet),
    form("em-bank", "id paraphrases", _bank),
)  # fmt: skip
