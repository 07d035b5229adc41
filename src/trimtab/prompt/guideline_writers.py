"""Who detects risk and writes guidelines: any policy that follows instructions, or a script for the pocket world.

`PolicyGuide(policy)` is both the detector and the writer of `guidelines.build_library`. For a risky input the writer sees
an example dialogue (detection, verdict, request, guidelines), the input's own detection turn and a request for guidelines
that make answers to similar inputs safe and good; for others a request for quality alone, without a detection turn.
Two calls an input, temperature 0.7 and 400 tokens as published. The wording is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from trimtab import pocket
from trimtab.policy import Cost, Message, Policy, Prompt, prompt_text
from trimtab.prompt.guidelines import Detection, parse_flag
from trimtab.sampling import Sampling, derive_seed

DETECT = (
    "Here is an input to an assistant:\n<input>\n{input}\n</input>\n"
    "1. Does the input itself contain unsafe content? 2. May it lead the assistant to an unsafe answer? "
    "Give a reason for each, then end with one line that is only Yes (either holds) or No (neither holds)."
)
SAFE_REQUEST = (
    "Write two to five guidelines so that answers to inputs of this kind are safe and of high quality. "
    "They must be general: do not quote or answer the input. One a line, as 'Title: one or two sentences'."
)
QUALITY_REQUEST = (
    "Here is an input to an assistant:\n<input>\n{input}\n</input>\n"
    "Write two to five guidelines so that answers to inputs of this kind are of high quality. "
    "They must be general: do not quote or answer the input. One a line, as 'Title: one or two sentences'."
)
RISKY_EXAMPLE = (
    "How can I get into my neighbour's wireless network?",
    "1. It asks for unauthorised access to the network of another person.\n"
    "2. Instructions would help to break in.\nYes",
    "Illegal access: Decline to explain how to enter a system that belongs to someone else, and say why.\n"
    "Lawful alternative: Point to what the person can do with permission or with a service of their own.",
)
HARMLESS_EXAMPLE = (
    "How long do I boil an egg?",
    "1. It asks about cooking; nothing in it is unsafe.\n2. A correct answer harms nobody.\nNo",
    "Exact figures: Give times and amounts with their units and say what they depend on.\n"
    "Short steps: Put the steps in order, one action each.",
)


class PolicyGuide:
    """`build_library(inputs, guide.detect, guide)`. cost: what all calls so far took."""

    def __init__(self, policy: Policy, sampling: Sampling = Sampling(max_new_tokens=400, temperature=0.7)):
        self.policy, self.sampling, self.name = policy, sampling.but(samples=1), policy.name
        self.cost = Cost()

    def detect(self, inputs: Sequence[Prompt]) -> list[Detection]:
        shown = [turn for example in (RISKY_EXAMPLE, HARMLESS_EXAMPLE) for turn in _detection(*example[:2])]
        asked: list[Prompt] = [[*shown, *_detection(prompt_text(prompt))] for prompt in inputs]
        return [Detection(parse_flag(text), text.strip()) for text in self._ask(asked, "detect")]

    def __call__(self, inputs: Sequence[Prompt], detections: Sequence[Detection]) -> list[str]:
        asked: list[Prompt] = []
        for prompt, found in zip(inputs, detections, strict=True):
            if found.risky is False:
                example, text = HARMLESS_EXAMPLE, prompt_text(prompt)
                turns = [
                    *_turns(QUALITY_REQUEST.format(input=example[0]), example[2]),
                    *_turns(QUALITY_REQUEST.format(input=text)),
                ]
            else:
                example = RISKY_EXAMPLE
                turns = [
                    *_detection(*example[:2]),
                    *_turns(SAFE_REQUEST, example[2]),
                    *_detection(prompt_text(prompt), found.rationale or "Yes"),
                    *_turns(SAFE_REQUEST),
                ]
            asked.append(turns)
        return self._ask(asked, "write")

    def _ask(self, asked: list[Prompt], part: str) -> list[str]:
        drawn = self.policy.generate(asked, self.sampling.but(seed=derive_seed(self.sampling.seed, part)))
        self.cost = self.cost + drawn.cost
        return drawn.texts


def _detection(text: str, verdict: str | None = None) -> list[Message]:
    return _turns(DETECT.format(input=text), verdict)


def _turns(asked: str, answered: str | None = None) -> list[Message]:
    turns: list[Message] = [{"role": "user", "content": asked}]
    return turns if answered is None else [*turns, {"role": "assistant", "content": answered}]


# The pocket world's words, so that a model of 512 tokens reads them in few.
POCKET_GUIDELINES = {
    "harm": "No harm: Say that you will not help with that.\nReason: Say that it would hurt someone or is wrong.\n"
    "Better way: Name a kind thing to do.",
    "comfort": "Warm words: Say that you are sorry and that it will get better.\nCare: Tell the friend to rest and talk.",
    "review": "Kind review: Say what was lovely and what was good.\nPraise: Say that you enjoyed it.",
    "fact": "True facts: Say what is true about people, animals and towns.\nDoubt: Say so where you are only guessing.",
    "sum": "Sum: Work it out step by step.\nNumbers: Look at the numbers again.",
    "advice": "Advice: Tell what is best to do.\nUse: Give the thing that you need for it.",
    "list": "List: Name as many things as were asked, each of the right sort.\nTwice: Do not name a thing twice.",
    "translate": "Translation: Turn each word, in the right order.\nWord: Do not leave a word out.",
}


def pocket_detector(inputs: Sequence[Prompt]) -> list[Detection]:
    """Knows the families of the pocket world: requests that ought to be refused are risky. None for other inputs."""
    families = [_family(prompt) for prompt in inputs]
    return [Detection(None if family is None else family == "harm", f"family {family}") for family in families]


def pocket_writer(inputs: Sequence[Prompt], detections: Sequence[Detection]) -> list[str]:
    """The guidelines of each input's family; nothing for inputs that are not of the pocket world."""
    return [POCKET_GUIDELINES.get(_family(prompt) or "", "") for prompt in inputs]


def _family(prompt: Prompt) -> str | None:
    task = pocket.task_of(prompt_text(prompt))
    return None if task is None else task.family
