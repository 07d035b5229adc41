"""`InstructionRewriter`: any policy as a rewriter of instructions, the text it is asked with and the parser of what it says.

    prompt       task sentence, then the instruction between markers (and, for one search step, the directive)
    completion   a header, then the rewritten instruction between markers; or the header "Steps:" and names of principles,
                 which a script carries out: what a model says that is too small to copy a text (`ActionRewriter`)

The markers are the defence against text in an instruction that talks to the rewriter: an instruction that holds one is
not rewritten, and anything but header, marker, text, marker is no rewrite. What cannot be parsed is None; the caller
keeps the original.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from trimtab.errors import UsageError
from trimtab.policy import Cost, Message, Policy, Prompt
from trimtab.prompt.principles import Principle, PrincipleLibrary
from trimtab.sampling import Sampling

START, END = "<<<", ">>>"
KEEP, BETWEEN = "keep", "; "  # no step; between two
HEADER, STEPS = "Better:", "Steps:"
TASK = "Rewrite this for a better answer."
STEP = (
    "Change it in one way only: {directive}. Keep what it asks and do not answer it. "
    f"Write {HEADER} {START} the rewritten instruction {END} and nothing else."
)
_COMPLETION = re.compile(rf"\s*({HEADER}|{STEPS})\s*{START}(.*?){END}", re.S)
_FRAME = re.compile(r"((?:.*\n)?Q: ?)(.*?)(\nA:\s*)", re.S)  # of several questions the last one


@runtime_checkable
class Rewriter(Protocol):
    """What P-Aligner needs at answering time: `samples` rewrites of each text, the first one greedy; None: failed."""

    def rewrite(self, texts: Sequence[str], samples: int, seed: int, meter: Cost) -> list[list[str | None]]: ...


def rewrite_prompt(instruction: str, directive: str | None = None) -> str:
    """What a rewriter is asked. ValueError for an instruction that holds a marker."""
    if START in instruction or END in instruction:
        raise ValueError(f"the instruction holds {START} or {END}, which mark where it begins and ends")
    step = f"\n{STEP.format(directive=directive)}" if directive else ""
    return f"{TASK}\n{START} {instruction.strip()} {END}{step}\n"


def rewrite_completion(rewrite: str) -> str:
    """What a rewriter should say."""
    return f"{HEADER} {START} {rewrite.strip()} {END}"


def steps_completion(path: Sequence[str]) -> str:
    """What an `ActionRewriter` should say: the principles on the way from the instruction to its rewrite."""
    return f"{STEPS} {START} {BETWEEN.join(path) or KEEP} {END}"


def parse(said: str, header: str = HEADER) -> str | None:
    """The rewritten instruction in what a rewriter said; None where it is missing, empty or not closed."""
    found = _COMPLETION.match(said)
    text = found[2].strip() if found and found[1] == header else ""
    return text if text and START not in text else None


class InstructionRewriter:
    """A policy as a rewriter: with directives for the search, without for answering.

    max_new_tokens: of a rewrite. A text that the model's context does not hold is not rewritten.
    """

    def __init__(self, policy: Policy, max_new_tokens: int = 256):
        self.policy, self.max_new_tokens = policy, max_new_tokens

    def rewrite(self, texts: Sequence[str], samples: int, seed: int, meter: Cost) -> list[list[str | None]]:
        asked = [self._prompt(text) for text in texts]
        greedy = self._said(texts, asked, 1, 0.0, seed, meter)
        if samples == 1:
            return greedy
        drawn = self._said(texts, asked, samples - 1, 1.0, seed, meter)
        return [first + others for first, others in zip(greedy, drawn, strict=True)]

    def __call__(
        self, texts: Sequence[str], principles: Sequence[Principle], seed: int, meter: Cost
    ) -> list[str | None]:
        """One step of the search: each text rewritten by its principle, drawn at temperature 1."""
        asked = [self._prompt(text, principle.directive) for text, principle in zip(texts, principles, strict=True)]
        return [row[0] for row in self._said(texts, asked, 1, 1.0, seed, meter)]

    def read(self, text: str, said: str) -> str | None:
        """The rewrite of a text in what the policy said."""
        return parse(said)

    def _prompt(self, text: str, directive: str | None = None) -> str | None:
        try:
            prompt = rewrite_prompt(text, directive)
        except ValueError:
            return None
        lm: Any = getattr(self.policy, "lm", self.policy)
        limit = getattr(lm, "context_length", None)
        if limit is None:
            return prompt
        try:
            return prompt if len(lm.encode([prompt])[0]) < limit else None
        except UsageError:
            return None

    def _said(
        self,
        texts: Sequence[str],
        asked: Sequence[str | None],
        samples: int,
        temperature: float,
        seed: int,
        meter: Cost,
    ) -> list[list[str | None]]:
        out: list[list[str | None]] = [[None] * samples for _ in asked]
        rows = [row for row, prompt in enumerate(asked) if prompt is not None]
        if rows:
            sampling = Sampling(self.max_new_tokens, temperature, samples=samples, seed=seed)
            done = self.policy.generate([str(asked[row]) for row in rows], sampling)
            charge(meter, done.cost)
            for at, said in enumerate(done.texts):
                row = rows[at // samples]
                out[row][at % samples] = self.read(texts[row], said)
        return out


class ActionRewriter(InstructionRewriter):
    """A rewriter that may name principles instead of writing: a script carries them out, one after the other.

    script: one step of a search that needs no model (`principles.phrasebook`, `wordings.rewrite`).
    """

    def __init__(self, policy: Policy, script: Any, library: PrincipleLibrary, max_new_tokens: int = 256):
        super().__init__(policy, max_new_tokens)
        self.script, self.library = script, library

    def read(self, text: str, said: str) -> str | None:
        steps = parse(said, STEPS)
        if steps is None:
            return parse(said)
        for name in () if steps == KEEP else steps.split(BETWEEN):
            principle = self.library.by_name.get(name)
            if principle is None:
                return None
            text = self.script([text], [principle], 0, Cost())[0] or text  # None: it is so already
        return text


class FunctionRewriter:
    """A function text -> rewrite (or None) as a rewriter; every sample is the same."""

    def __init__(self, function: Callable[[str], str | None]):
        self.function = function

    def rewrite(self, texts: Sequence[str], samples: int, seed: int, meter: Cost) -> list[list[str | None]]:
        return [[said if said and said.strip() else None] * samples for said in map(self.function, texts)]


def as_rewriter(thing: Any, max_new_tokens: int = 256) -> Rewriter:
    """A rewriter as it is; a policy or a model that was trained to rewrite; a function; a path to a trained one."""
    if isinstance(thing, Rewriter):
        return thing
    if isinstance(thing, str):
        from trimtab.lm import LM

        return InstructionRewriter(LM.load(thing), max_new_tokens)
    if hasattr(thing, "generate"):
        return InstructionRewriter(thing, max_new_tokens)
    if callable(thing):
        return FunctionRewriter(thing)
    raise UsageError(f"a rewriter is a model, a policy, a function or a folder, not {type(thing).__name__}")


def charge(meter: Cost, cost: Cost) -> None:
    """Add tokens and reward calls to a meter (seconds are taken by whoever holds it)."""
    for name, count in cost.tokens.items():
        meter.tokens[name] = meter.tokens.get(name, 0) + count
    meter.reward_calls += cost.reward_calls


def instruction_of(prompt: Prompt) -> str:
    """What may be rewritten: the last user message, without the "Q: ...\\nA:" that plain models are asked with."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    framed = _FRAME.fullmatch(text)
    return framed[2] if framed else text


def with_instruction(prompt: Prompt, instruction: str) -> Prompt:
    """The prompt with its instruction replaced and all else kept: earlier messages, the frame."""
    if not isinstance(prompt, str):
        last: Message = {
            "role": prompt[-1]["role"],
            "content": str(with_instruction(prompt[-1]["content"], instruction)),
        }
        return [*prompt[:-1], last]
    framed = _FRAME.fullmatch(prompt)
    return f"{framed[1]}{instruction}{framed[3]}" if framed else instruction
