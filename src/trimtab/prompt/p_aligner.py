"""P-Aligner: rewrite an instruction into a form that gets better answers, then answer that (Song et al., arXiv 2508.04626).

    x' = R(x)  (greedy, parsed, guarded; x itself where that fails)        y ~ F(. | x')
    R is trained by SFT, then DPO, on the best and the worst rewrite of each instruction in a search tree (MCTS over
    principles, `trimtab.prompt.instruction_tree`), where a text u is worth (1/k) sum_j r(x, y_j), y_j ~ F(. | u)

The target F is any policy and is not changed; the reward sees the original x alone, here and in the search.
Ours, not in the paper: the intent guard (`trimtab.prompt.intent`); confirmation of the best rewrite with fresh answers
before it is learnt; `search` n > 1, the test-time baseline: n rewrites (one greedy, the others drawn), one answer to each,
the reward picks; SFT then DPO is our reading of the released pipeline, whose rewriter, rates and order are not given.
Where no model that can paraphrase is at hand, the search rewrites by fixed sentences (and in the pocket world by its own
wordings), and R learns to name the steps, which the script carries out: a model of a million parameters that writes the
text drifts to other questions, unseen by the guard. Only the last user turn of a conversation is rewritten.
Cost an answer: the rewrite (its prompt and its tokens, by the rewriter), then the answer to x'; n times both and n reward
calls at search n. The answers of a rewrite that turns out to be an answer itself are drawn again from x.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.card import Card
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.parts import Parts
from trimtab.policy import Completions, Cost, Policy, Prompt, prompt_text
from trimtab.prompt import wordings
from trimtab.prompt.instruction_tree import InstructionTree
from trimtab.prompt.intent import LONG, answered, broken_intent, language
from trimtab.prompt.principles import PrincipleLibrary, read_library
from trimtab.prompt.rewriter import (
    ActionRewriter,
    InstructionRewriter,
    as_rewriter,
    charge,
    instruction_of,
    with_instruction,
)
from trimtab.prompt.synthesis import Evaluator, Rewrite, confirm, grow, pair_rows, plant, sft_rows, write_dataset
from trimtab.prompt.tuning import Progress, preference, save, sft
from trimtab.rewards import as_reward
from trimtab.sampling import Sampling, derive_seed

CARD = Card(
    slug="p-aligner",
    name="P-Aligner",
    paper="arXiv 2508.04626",
    summary="A small trained rewriter puts the instruction into a form that gets better answers; the target answers that.",
    goal="instruction",
    stage="prompt",
    mechanism="sft",
    signal=("principle text", "scalar reward"),
    access="black-box text",
    produces="decoder",
    needs=("a policy", "a trained rewriter, or a reward and prompts to make one with"),
    infer_multiplier="search x (1 + the rewrite)",
    fit_cost="prompts x ((iterations + 1) x k + 2 x confirm) answers, then SFT and DPO of the rewriter",
    benefit_metrics=("reward",),
    cost_metrics=("tokens_forwarded_per_answer", "reward_calls_per_answer", "rejected_rewrites"),
    limits=(
        "helps only where the answers depend on how the instruction is put",
        "without a model that paraphrases the search knows fixed sentences alone",
    ),
    risks=("a rewrite that asks something else", "the best of many noisy values looks better than it is"),
    composes_with=("best-of-n", "natural-control", "re-control"),
    choose="When answers are poor because instructions are vague or lack cues, and the model itself may not be "
    "touched: one short rewrite in front. Where the user's words must stay, prompt-complement.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/base --reward pocket/reward --prompts prompts.txt --policy p-aligner",
)
ENGLISH_ONLY = ("sentiment", "pocket/judge", "pocket/reward")
ANSWERING = ("rewriter", "search")  # options that a fit does not depend on


@dataclass(frozen=True)
class PAlignerConfig:
    # a trained rewriter (folder or Hub id); empty: one is made by search and training
    rewriter: str = ""
    # rewrites tried for each answer; above 1 the reward picks among the answers to them
    search: int = 1
    # whether rewrites that lose a number, a name, quoted text, code or the language are rejected
    guard: bool = True
    # most tokens of a rewrite
    rewrite_tokens: int = 256
    # model that rewrites in the search, told a directive; empty: fixed sentences and the pocket world's wordings
    writer: str = ""
    # JSON file {domain: [{name, directive, edit}]}; empty: the principles that come with trimtab
    principles: str = ""
    # rewrites in the tree of each prompt
    iterations: int = 20
    # weight of exploration in the search
    w: float = 0.1
    # answers by which a rewrite is valued
    k: int = 3
    # fresh answers by which the best rewrite must beat the prompt as it was; 0: not asked
    confirm: int = 8
    # by how many standard errors it must
    margin: float = 1.0
    # SFT epochs of the rewriter
    epochs: int = 6
    # learning rate of SFT; preference training takes a tenth
    lr: float = 1e-3
    # DPO epochs of the rewriter; 0: none
    preference_epochs: int = 1
    # KL coefficient of DPO
    beta: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("search", 1), ("rewrite_tokens", 1), ("iterations", 1), ("k", 1), ("epochs", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be {least} or more, not {getattr(self, name)}")
        for name in ("w", "confirm", "margin", "preference_epochs"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.lr <= 0 or self.beta <= 0:
            raise UsageError(f"lr and beta must be above 0, not {self.lr} and {self.beta}")


class PAligner:
    """`PAligner(policy, reward, rewriter)` is a policy; the rewriter is a model, a policy, a function or a folder.

    reward: needed where search is above 1. With search 1 it can be stepped where `policy` can.
    """

    slug = "p-aligner"
    Config = PAlignerConfig
    KNOB = "search"
    MODELS = ("rewriter", "writer")

    def __init__(
        self,
        policy: Policy,
        reward: Any = None,
        rewriter: Any = None,
        search: int = 1,
        guard: bool = True,
        rewrite_tokens: int = 256,
        name: str | None = None,
    ):
        if rewriter is None:
            raise UsageError("p-aligner needs a rewriter: give a model trained to rewrite, its folder, or a function")
        self.config = PAlignerConfig(search=search, guard=guard, rewrite_tokens=rewrite_tokens)
        if search > 1 and reward is None:
            raise UsageError(
                f"search={search} chooses among {search} answers and needs a reward: give one, or search=1"
            )
        self.policy, self.rewriter = policy, as_rewriter(rewriter, rewrite_tokens)
        self.reward = None if reward is None else as_reward(reward)
        self.name = name or (f"p-aligner-{search}" if search > 1 else "p-aligner")

    def rewrite(
        self, prompts: Sequence[Prompt], meter: Cost, seed: int = 0
    ) -> list[list[tuple[Prompt, dict[str, Any]]]]:
        """`search` candidates of each prompt: what will be asked, and its telemetry (`rewritten`, `rejected`)."""
        texts = [instruction_of(prompt) for prompt in prompts]
        said = self.rewriter.rewrite(texts, self.config.search, derive_seed(seed, "rewrite"), meter)
        return [
            [self._candidate(prompt, text, new) for new in rewrites]
            for prompt, text, rewrites in zip(prompts, texts, said, strict=True)
        ]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        """telemetry of each row: what was asked instead (`rewritten`), why a rewrite was `rejected` (None: it was not);
        `turn` in a conversation; at search n the `rewards` of the n candidates and which was `chosen`."""
        start = time.perf_counter()
        meter, n, each = Cost(), self.config.search, sampling.samples
        candidates = [one for group in self.rewrite(prompts, meter, sampling.seed) for one in group]
        drawn = self.policy.generate([asked for asked, _ in candidates], sampling)
        charge(meter, drawn.cost)
        drawn.prompts = [prompt for prompt in prompts for _ in range(n * each)]
        told: list[dict[str, Any]] = drawn.telemetry or [{} for _ in range(len(drawn))]
        drawn.telemetry = [{**told[row], **candidates[row // each][1]} for row in range(len(drawn))]
        drawn.kl = None  # it was measured after x', not after x
        drawn = self._without_answers(drawn, sampling, meter)
        if n > 1:
            drawn = self._best(drawn, n, each, meter)
        meter.seconds = time.perf_counter() - start
        drawn.cost = meter
        return drawn

    def _candidate(self, prompt: Prompt, text: str, new: str | None) -> tuple[Prompt, dict[str, Any]]:
        rejected = "unreadable" if new is None else broken_intent(text, new) if self.config.guard else None
        kept = new if new is not None and rejected is None else text
        if len(kept) > LONG * len(text):
            warnings.warn(
                f"p-aligner: a rewrite is {len(kept) / len(text):.0f} times as long as {text[:60]!r}", stacklevel=4
            )
        telemetry = {"rewritten": kept, "rejected": rejected}
        if not isinstance(prompt, str) and len(prompt) > 1:
            telemetry["turn"] = f"last of {len(prompt)} messages"
        return (prompt if kept == text else with_instruction(prompt, kept)), telemetry

    def _without_answers(self, drawn: Completions, sampling: Sampling, meter: Cost) -> Completions:
        """Rows whose rewrite says what the answer says are answered again, from the original."""
        rows = [
            row
            for row, (prompt, text) in enumerate(zip(drawn.prompts, drawn.texts, strict=True))
            if answered(instruction_of(prompt), drawn.telemetry[row]["rewritten"], [text])
        ]
        if not rows:
            return drawn
        prompts = [drawn.prompts[row] for row in rows]
        again = self.policy.generate(prompts, sampling.but(samples=1, seed=derive_seed(sampling.seed, "again")))
        charge(meter, again.cost)
        again.prompts, again.kl = prompts, None
        again.telemetry = [
            {**drawn.telemetry[row], "rewritten": instruction_of(drawn.prompts[row]), "rejected": "answer"}
            for row in rows
        ]
        both = Completions.concatenate([drawn, again])
        place = {row: len(drawn) + at for at, row in enumerate(rows)}
        return both.select([place.get(row, row) for row in range(len(drawn))])

    def _best(self, drawn: Completions, n: int, each: int, meter: Cost) -> Completions:
        """Of the n candidates of each prompt and sample, the answer that the reward likes best; ties: the earlier."""
        assert self.reward is not None
        scores = self.reward.score(drawn.prompts, drawn.texts)
        meter.reward_calls += len(drawn)
        chosen, told = [], []
        for first in range(0, len(drawn), n * each):
            for sample in range(each):
                group = range(first + sample, first + n * each, each)
                row = max(group, key=lambda i: -float("inf") if (score := scores[i]) is None else score)
                chosen.append(row)
                told.append({"rewards": [scores[i] for i in group], "chosen": group.index(row)})
        kept = drawn.select(chosen)
        kept.telemetry = [{**mine, **more} for mine, more in zip(kept.telemetry, told, strict=True)]
        return kept

    # stepping: the session of the policy beneath, opened on the rewrites

    @property
    def lm(self) -> LM:
        """Whose tokens are drawn. AttributeError (so: not steppable) with search above 1, or over whole answers."""
        if self.config.search > 1 or not hasattr(self.policy, "open"):
            raise AttributeError(f"{self.name} gives whole answers only")
        lm: LM = self.policy.lm  # type: ignore[attr-defined]
        return lm

    def open(self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost) -> Any:
        asked = [group[0][0] for group in self.rewrite(prompts, meter, sampling.seed)]
        return self.policy.open(asked, sampling, meter)  # type: ignore[attr-defined]

    # making one

    @classmethod
    def make(cls, parts: Parts, config: PAlignerConfig) -> PAligner:
        """With the rewriter named, or with one made from the prompts: search, SFT, DPO; kept with its data."""
        reward = parts.reward if config.search > 1 or not config.rewriter else None
        library = _library(config)

        def aligner(lm: LM) -> PAligner:
            rewriter = ActionRewriter(lm, wordings.rewrite, library, config.rewrite_tokens)
            return cls(parts.policy, reward, rewriter, config.search, config.guard, config.rewrite_tokens)

        if config.rewriter:
            return aligner(parts.load(config.rewriter))
        made = {k: v for k, v in dataclasses.asdict(config).items() if k not in ANSWERING}

        def fit() -> tuple[tuple[LM, list[InstructionTree]], Cost]:
            return make_rewriter(parts, config)

        def keep(made: tuple[LM, list[InstructionTree]], folder: Path) -> None:
            save(made[0], folder)
            write_dataset(folder / "data", made[1], library, config.margin)

        def again(folder: Path) -> tuple[LM, list[InstructionTree]]:
            lm = LM.load(str(folder))
            lm.name = "rewriter"
            return lm, []

        key = f"p-aligner of {parts.policy.name} by {parts.reward.name} {made}"
        return aligner(parts.kept(key, fit, keep, again)[0])


def make_rewriter(parts: Parts, config: PAlignerConfig) -> tuple[tuple[LM, list[InstructionTree]], Cost]:
    """Search on `parts.prompts`, then train: the rewriter, the trees it learnt from, and what both took."""
    start, meter = time.perf_counter(), Cost()
    _warn_of_language(parts)
    library = _library(config)
    evaluate = Evaluator(parts.policy, parts.reward, config.k, parts.sampling, meter)
    rewrite: Rewrite = wordings.rewrite
    if config.writer:
        rewrite = InstructionRewriter(parts.load(config.writer), config.rewrite_tokens)
    seed = parts.sampling.seed
    domains = [wordings.domain_of(instruction_of(prompt)) for prompt in parts.prompts]
    trees = plant(parts.prompts, library, domains, config.w, seed)
    grow(trees, library, rewrite, evaluate, config.iterations, seed, meter, parts.progress, config.guard)
    if config.confirm:
        shrinkage = confirm(trees, dataclasses.replace(evaluate, samples=config.confirm), seed)
        if parts.progress is not None:
            changed = sum(tree.chosen(config.margin) != 0 for tree in trees)
            parts.progress(
                f"a rewrite was kept for {changed}/{len(trees)} prompts; fresh values are {shrinkage:.3f} lower"
            )
    lm = train_rewriter(parts.lm, trees, config, not config.writer, seed, parts.progress, meter)
    meter.seconds = time.perf_counter() - start
    return (lm, trees), meter


def train_rewriter(
    lm: LM,
    trees: Sequence[InstructionTree],
    config: PAlignerConfig = PAlignerConfig(),  # noqa: B008  frozen
    actions: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    meter: Cost | None = None,
) -> LM:
    """R from a copy of `lm`: SFT on each tree's chosen text, then DPO on its pairs. UsageError without a valued tree.

    actions: it learns to name the principles instead of writing the text (see `ActionRewriter`).
    """
    rows, pairs = sft_rows(trees, config.margin, actions), pair_rows(trees, config.margin, actions)
    if not rows:
        raise UsageError("no tree has a value: the reward could judge no answer, so there is nothing to learn from")
    trained = sft(lm, rows, config.epochs, config.lr, seed=seed, progress=progress, name="rewriter", meter=meter)
    if pairs and config.preference_epochs:
        trained = preference(
            trained, pairs, config.beta, config.preference_epochs, config.lr / 10,
            seed=seed, progress=progress, name="rewriter", meter=meter,
        )  # fmt: skip
    return trained


def _library(config: PAlignerConfig) -> PrincipleLibrary:
    return wordings.with_wordings(read_library(config.principles or None))


def _warn_of_language(parts: Parts) -> None:
    found = language(" ".join(prompt_text(prompt) for prompt in parts.prompts[:100]))
    if found not in (None, "English") and parts.reward.slug in ENGLISH_ONLY:
        warnings.warn(f"p-aligner: the prompts look {found} and {parts.reward.name} reads English only", stacklevel=3)
