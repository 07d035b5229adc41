r"""Prompt complements, PAS: append what a terse prompt leaves unsaid; the user's words stay (arXiv 2407.06027, 2410.14940).

    c  = M_p(x) greedy        x' = x + newline + c        y ~ F( . | x')        x' = x where c must not be used

M_p is a small model trained by SFT on pairs (x, c), asked with a fixed text around x. x is a byte-identical prefix of x'.
c is not used, and the row's telemetry says why, where the user settles the form of the answer ("in one word": M_p is not
even asked), where c is empty, too long, in another language, an answer, or a repetition of x, or where there is no room.

What x is. In a conversation, the last user message; for a chat model asked with a string, the string. A plain model is
asked with a frame such as "Q: question\nA:", and c after "A:" would be read as the beginning of the answer: there x is
the user's words inside the frame, and the frame is put back around x + newline + c. "Q: ...\nA:" is known; `template`
names another. Rewards, `Completions.prompts` and the KL speak of the prompt as it was asked.

Without a trained M_p one is made from the prompts to fit on (`complements` writes the pairs). Ours and not in the paper:
a critic that is a reward. It keeps c only if answers to x' score higher than answers to x by `MARGIN` standard errors,
both drawn afresh for every draft; what chance lets through, M_p averages out over prompts. A part of the prompts is held
back: where M_p lowers their reward, or where too few complements were accepted, none is used, and that is said.

Measured: the shipped pocket models follow no style cue. Of 597 drafts the judge accepted none on pocket/base and none on
pocket/chat, and pocket/reward 4 on pocket/base, too few. Most complements do harm (" Be clear and organised.": a score of
0.384 falls to 0.087, one of 0.833 to 0.186). Text after "A:" is another matter: "Good question!" there raises the score of
pocket/base by 0.096 [0.041, 0.149], because it begins the answer and is no part of the prompt. On a copy of pocket/base
that follows cues, 0.00 becomes 0.98 (`tests/prompt/test_prompt_complement_effect.py`).

Departures: the released model writes 30 words and is trusted; here it is checked. With retrieval the paper lets c ask for
nothing outside the passages: `keywords` tells M_p so, and nothing can check it.
Cost an answer: M_p on its request and c once a prompt, c in the prompt of F, whatever follows from it in y.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.parts import Parts
from trimtab.policy import Completions, Cost, Policy, Prompt
from trimtab.prompt.complement_checks import MAX_WORDS, demands_format, fault
from trimtab.prompt.complement_fit import TOKENS_A_WORD, fit, load, save
from trimtab.prompt.complement_place import INSTRUCTION, has_room, request, with_complement, words_of
from trimtab.prompt.complements import one_line
from trimtab.prompt.guideline_prompt import model_of
from trimtab.prompt.rewriter import charge
from trimtab.sampling import Sampling
from trimtab.stepping import Steppable

CARD = Card(
    slug="prompt-complement",
    name="Prompt complements (PAS)",
    paper="arXiv 2407.06027, 2410.14940",
    summary="A small trained model appends what a terse prompt leaves unsaid; the user's words stay as they are.",
    goal="instruction",
    stage="prompt",
    mechanism="sft",
    signal=("demonstrations", "scalar reward"),
    access="black-box text",
    produces="decoder",
    needs=("a policy whose answers depend on how it is asked", "a trained complement model, or a reward and prompts"),
    infer_multiplier="1 + (request + 2 x complement) / (prompt and answer tokens)",
    fit_cost="prompts x rounds x 2 x critic_samples answers, then SFT of the complement model",
    benefit_metrics=("reward",),
    cost_metrics=("tokens_forwarded_per_answer", "skipped_complements"),
    limits=(
        "helps only where style cues in the prompt change the answers",
        "answers and languages are told by their surface: a complement that answers in other words passes",
        "a reward inside it reads the complement too: put policies with a reward outside",
    ),
    risks=("a complement is an instruction to the model",),
    composes_with=("best-of-n", "natural-control", "re-control", "args"),
    data_format="prompts, or pairs of prompt and complement",
    choose="When prompts are terse and the user's words must reach the model untouched: it only adds. Where they "
    "are wrong or rude rather than short, p-aligner.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/base --reward pocket/reward --prompts prompts.txt --policy prompt-complement",
)


@dataclass(frozen=True)
class PromptComplementConfig:
    # model that writes complements (pocket/NAME, a folder, a Hub id); not given: one is made from the prompts
    complementer: str | None = None
    # form of a plain prompt around the user's words, as in "User: {prompt}\nBot:"; not given: "Q: {prompt}\nA:" where a
    # prompt has it, else the whole prompt is the user's words
    template: str | None = None
    # what stands between the user's words and the complement
    separator: str = r"\n"
    # most words of a complement (characters, in Chinese and Japanese); a longer one is not used
    max_words: int = MAX_WORDS
    # what the complement model is asked, {prompt} being the user's words
    instruction: str = INSTRUCTION
    # model that the complement model is trained from; not given: the one that answers
    student: str | None = None
    # model that drafts complements from few-shot templates; not given: the phrases are the drafts
    generator: str | None = None
    # complements to choose from where there is no generator; not given: the examples of the prompt's category
    phrases: tuple[str, ...] = ()
    # model that checks drafts by written criteria; not given: the reward decides
    critic: str | None = None
    # prompts used at most; the paper has 9,000 pairs
    prompts: int = 128
    # prompts nearer to each other than this cosine distance count as one
    distance: float = 0.1
    # drafts a prompt before it is dropped
    rounds: int = 3
    # answers with and without a complement by which the reward judges it
    critic_samples: int = 8
    # share of the prompts held back to see whether the complement model helps
    held_out: float = 0.2
    # passes over the pairs
    epochs: int = 4
    # learning rate; the paper's 2e-5 is for 7 billion parameters
    lr: float = 1e-3
    # seed of drafts, answers and training
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("max_words", "prompts", "rounds", "critic_samples", "epochs"):
            if getattr(self, key) < 1:
                raise UsageError(f"{key} must be 1 or more, not {getattr(self, key)}")
        if not 0 <= self.held_out < 1 or not self.lr > 0 or not 0 <= self.distance < 2:
            raise UsageError("held_out in [0, 1), lr above 0 and distance in [0, 2) are needed")
        for key in ("template", "instruction"):
            value = getattr(self, key)
            if value is not None and value.count("{prompt}") != 1:
                raise UsageError(f"{key} must hold {{prompt}} once, where the user's words stand; it is {value!r}")


class Planned(NamedTuple):
    """What is asked in place of a prompt, with which complement, or why with none."""

    asked: Prompt
    complement: str | None
    skipped: str | None


def _untouched(prompt: Prompt, words: str) -> str | None:
    """Why nothing may be added to a prompt, whatever it is."""
    if not isinstance(prompt, str) and prompt[-1]["role"] != "user":
        return "not the user's turn"
    return "strict format" if demands_format(words) else None


class PromptComplement:
    """`PromptComplement(policy, complementer)` is a policy; it can be stepped where `policy` can.

    complementer   a trained model, any policy, a function of the user's words, a path; None: prompts are asked as they are
    keywords       prompt -> words of its retrieved passages, to which the complement is to keep
    """

    slug = "prompt-complement"
    Config = PromptComplementConfig
    NEEDS_REWARD = False
    MODELS = ("complementer", "student", "generator", "critic")

    def __init__(
        self,
        policy: Policy,
        complementer: Policy | Callable[[str], str] | str | None,
        template: str | None = None,
        separator: str = r"\n",
        max_words: int = MAX_WORDS,
        instruction: str = INSTRUCTION,
        keywords: Callable[[Prompt], Sequence[str]] | None = None,
        name: str | None = None,
    ):
        path = complementer if isinstance(complementer, str) else None
        self.config = PromptComplementConfig(path, template, separator, max_words, instruction)
        self.policy, self.keywords, self.name = policy, keywords, name or "prompt-complement"
        self.complementer = LM.load(path) if path else complementer
        self.model = model_of(policy)
        if isinstance(policy, Steppable):
            self.lm = policy.lm
        if hasattr(policy, "token_logprobs"):
            self.token_logprobs = self._token_logprobs

    def plan(self, prompts: Sequence[Prompt], meter: Cost) -> list[Planned]:
        """What will be asked; the complement model is charged to `meter`. Deterministic: nothing is drawn."""
        words = [words_of(prompt, self.config.template) for prompt in prompts]
        out = [Planned(prompt, None, _untouched(prompt, text)) for prompt, text in zip(prompts, words, strict=True)]
        rows = [row for row, one in enumerate(out) if one.skipped is None]
        said = self._complements([prompts[row] for row in rows], [words[row] for row in rows], meter)
        for row, (text, why) in zip(rows, said, strict=True):
            complement = one_line(text)
            asked = with_complement(prompts[row], complement, self.config.template, self.config.separator)
            why = why or fault(words[row], complement, self.config.max_words) or self._refused(asked, complement)
            out[row] = Planned(prompts[row], None, why) if why else Planned(asked, complement, None)
        return out

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        """telemetry of each row, besides the policy's own: the `complement` (None: not used) and why it was `skipped`."""
        start, meter = time.perf_counter(), Cost()
        if self.model is not None:
            self.model.encode(prompts)  # a prompt that is at fault itself is refused by its number
        planned = self.plan(prompts, meter)
        done = self.policy.generate([one.asked for one in planned], sampling)
        owners = [row for row in range(len(prompts)) for _ in range(sampling.samples)]
        own = done.telemetry or [{} for _ in owners]
        done.telemetry = [
            {**inner, "complement": planned[row].complement, "skipped": planned[row].skipped}
            for inner, row in zip(own, owners, strict=True)
        ]
        done.prompts = [prompts[row] for row in owners]
        done.kl = None  # of the policy beneath, from its own answers to x' and not to x
        done.cost = meter + done.cost
        done.cost.seconds = time.perf_counter() - start
        return done

    def open(self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost) -> Any:
        """The session of a steppable policy on the complemented prompts."""
        policy: Any = self.policy
        return policy.open([one.asked for one in self.plan(prompts, meter)], sampling, meter)

    def _token_logprobs(
        self, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], sampling: Sampling = Sampling()
    ) -> Iterator[torch.Tensor]:
        """The next-token distributions of the policy after x', [T_i, V] an answer: what makes its KL from F(. | x) exact."""
        policy: Any = self.policy
        found: Iterator[torch.Tensor] = policy.token_logprobs(
            [one.asked for one in self.plan(prompts, Cost())], tokens, sampling
        )
        return found

    def _complements(
        self, prompts: Sequence[Prompt], words: Sequence[str], meter: Cost
    ) -> list[tuple[str, str | None]]:
        """What the complement model says to each prompt, and what already speaks against it."""
        model: Any = self.complementer
        if model is None:
            return [("", "no complement model")] * len(words)
        if not hasattr(model, "generate"):
            return [(model(text) or "", None) for text in words]
        asked = [
            request(self.config.instruction, text, self.keywords(prompt) if self.keywords else ())
            for prompt, text in zip(prompts, words, strict=True)
        ]
        local = model_of(model)
        rows = [row for row, text in enumerate(asked) if has_room(local, text)]
        out: list[tuple[str, str | None]] = [("", "no room in the complement model")] * len(asked)
        if rows:
            sampling = Sampling(max_new_tokens=TOKENS_A_WORD * self.config.max_words, temperature=0)
            done = model.generate([asked[row] for row in rows], sampling)
            charge(meter, done.cost)
            for row, text, reason in zip(rows, done.texts, done.finish_reasons, strict=True):
                out[row] = (text, None if reason == "stop" else "too long")
        return out

    def _refused(self, asked: Prompt, complement: str) -> str | None:
        marks = [] if self.model is None else list(self.model.tokenizer.all_special_tokens)
        if self.config.template is not None:
            marks.append(self.config.template.split("{prompt}")[1].replace(r"\n", " ").strip())
        if any(mark and mark in complement for mark in marks):
            return "ends the user's turn"
        return None if has_room(self.model, asked) else "no room in the context"

    @classmethod
    def make(cls, parts: Parts, config: PromptComplementConfig) -> PromptComplement:
        """With the complement model named, or with one made from the prompts and kept with its pairs."""

        def wrap(model: LM | None) -> PromptComplement:
            asked = (config.template, config.separator, config.max_words, config.instruction)
            return cls(parts.policy, model, *asked)

        if config.complementer is not None:
            return wrap(parts.load(config.complementer))
        key = f"prompt-complement of {parts.policy.name} {dataclasses.asdict(config)}"
        return wrap(parts.kept(key, lambda: fit(parts, config, wrap), save, load).model)
