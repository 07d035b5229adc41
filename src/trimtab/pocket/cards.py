"""Model cards of the pocket models, written from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.pocket.measure import table

SUMMARY = {
    "base": "Next-token training on mixed-quality dialogues: sampled at temperature 1 it helps, lies, is rude,\n"
    "complies and refuses as often as that text does; how good an answer is, is decided along it, not by the prompt.",
    "chat": "pocket/base after training on good answers and direct preference optimisation, with a chat template.",
    "nano": "A smaller model trained on good answers, with a tokenizer of its own (other vocabulary, other merges).",
    "reward": "A sequence classifier (one score, any real number, higher is better) trained on pairs of answers with\n"
    "the Bradley-Terry loss: a learned and imperfect proxy of the pocket judge.",
}

_HEAD = """---
license: apache-2.0
language: en
tags: [trimtab, pocket-world]
---
# pocket/{name}

{summary}

A toy for tests, tutorials and offline comparisons in trimtab's pocket world. It knows nothing else and is fit for
nothing else. Its requests that ought to be refused are toy mischief.

- {parameters:,} parameters, Llama architecture, context 256 tokens, {entries} vocabulary entries
- float16 on disk, loaded as float32 by plain transformers; `<pad>` (0) is not `</s>` (1)
- {form}
- trained from seed {seed} on {threads} CPU thread(s) in {minutes:.1f} minutes (shared cores, no GPU); reproduce with
  `make pocket` or `python -m trimtab.pocket.train --only {name}`. The same machine, thread count and library versions
  give the same weights; elsewhere expect these figures within their intervals, not these bytes.
"""

_FORM = {
    "base": "a prompt is `Q: {question}\\nA:` as plain text; the answer starts with a space and ends with `</s>`",
    "chat": "chat template: one user message holds the question, bare or as `Q: ...\\nA:`; roles user and assistant",
    "nano": "a prompt is `Q: {question}\\nA:` as plain text; the answer starts with a space and ends with `</s>`",
    "reward": "it reads prompt, space, answer and `</s>` as one text, padded right; the score is taken at `</s>`",
}


def write(folder: Path, name: str, facts: dict[str, Any], measured: dict[str, Any]) -> None:
    """README.md and measured.json of a model folder. `facts` fills the head; `measured` holds the figures."""
    text = _HEAD.format(name=name, summary=SUMMARY[name], form=_FORM[name], **facts)
    text += _reward_section(measured) if name == "reward" else _policy_section(measured)
    (folder / "README.md").write_text(text)
    (folder / "measured.json").write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")


_HELD_OUT = """
## Measured

Held-out questions (split `test`, which no pocket model was trained on; what is asked for was in the training text in
other words, except the operands of sums and the sentences to translate, which are new). One answer a question, up to
64 tokens. `score` is the judge's overall gold score; 95 % half-widths are in `measured.json`. For `harm`, "refuses" is
right and "complies" is wrong; elsewhere "refuses" is a refusal of something harmless.
"""


def _policy_section(measured: dict[str, Any]) -> str:
    parts = [_HELD_OUT]
    for key, title in (("temperature_1", "Sampled at temperature 1"), ("greedy", "Greedy")):
        parts.append(f"\n### {title}\n\n{table(measured[key])}\n")
    return "".join(parts)


def _reward_section(measured: dict[str, Any]) -> str:
    held = measured["held_out_pairs"]
    lines = [
        "\n## Measured\n\nPairs of answers to held-out questions (split `test`) by pocket/base and by the\n"
        f"world itself, gold scores at least {measured['least_gap']} apart: the share ordered as by the judge.\n\n"
        "| pairs | n | accuracy | 95 % half-width |\n| --- | --- | --- | --- |\n"
    ]
    for key, row in held.items():
        lines.append(f"| {key} | {row['n']} | {row['accuracy']:.3f} | {row['half_width']:.3f} |\n")
    lines.append(
        f"\nSpearman correlation with the gold score over single answers: {measured['spearman']:.3f}.\n"
        "\nIts training labels are those of hasty annotators: in a quarter of the pairs the kinder words won, true or\n"
        "not. So it overrates warmth beside truth, and a policy pushed far enough up this score will show it.\n"
    )
    return "".join(lines)
