"""Making a complement model: pairs that a reward or a critic accepts, SFT, and a look at prompts it was not trained on.

    gain(c) = mean r(x, y') - mean r(x, y)    y' ~ F(. | x + c), y ~ F(. | x), `critic_samples` of each, drawn afresh
    c is kept where gain(c) > MARGIN standard errors (and > 0)
    M_p     = argmin -sum over kept pairs of log p(c | request(x))

The reward reads x, never x + c. Of drafts that change nothing one in twenty passes; these are spread over the drafts while
the good ones recur, and a greedy M_p writes what recurs. A policy that does not follow style cues gives no pairs, or an
M_p that does harm; then there is no M_p, which is said, and prompts are asked as they are.
Cost: prompts x rounds x 2 x critic_samples answers at most.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError
from trimtab.files import write_json
from trimtab.lm import LM
from trimtab.measure.stats import Interval, paired_difference, verdict
from trimtab.parts import Parts
from trimtab.policy import Cost, Policy, Prompt
from trimtab.prompt import tuning
from trimtab.prompt.complement_checks import demands_format
from trimtab.prompt.complement_place import INSTRUCTION, has_room, request, with_complement, words_of
from trimtab.prompt.complement_templates import category_of
from trimtab.prompt.complements import (
    Ask,
    Critic,
    Pair,
    Verdict,
    Written,
    check_with,
    draft_with,
    phrase_writer,
    pool,
    save_pairs,
    sort_with,
    write_pairs,
)
from trimtab.prompt.rewriter import charge
from trimtab.rewards.base import Reward
from trimtab.sampling import Sampling, derive_seed

if TYPE_CHECKING:
    from trimtab.prompt.prompt_complement import PromptComplementConfig

TOKENS_A_WORD = 4  # a draft still unfinished after so many tokens for each allowed word is too long
MARGIN = 1.64  # standard errors by which the reward must rise
FEWEST = 8  # prompts to make a complement model from, and pairs to train it on


@dataclass
class Fitted:
    """A complement model (None: none helps), its pairs, and what it does to the reward of prompts it was not trained on."""

    model: LM | None
    pairs: list[Pair] = field(default_factory=list)
    gain: Interval | None = None


def train(
    student: LM,
    pairs: Sequence[Pair],
    instruction: str = INSTRUCTION,
    epochs: int = 4,
    lr: float = 1e-3,
    seed: int = 0,
    progress: tuning.Progress | None = None,
    meter: Cost | None = None,
) -> LM:
    """M_p from a copy of `student`, SFT with the loss on the complement alone. Pairs it has no room for are left out."""
    asked = [request(instruction, pair.prompt) for pair in pairs]
    rows = [(text, f" {pair.complement}") for text, pair in zip(asked, pairs, strict=True) if has_room(student, text)]
    name = f"{student.name}-complement"
    return tuning.sft(student, rows, epochs, lr, seed=seed, progress=progress, name=name, meter=meter)


def reward_critic(
    policy: Policy,
    reward: Reward,
    placed: Callable[[Prompt, str], Prompt],
    sampling: Sampling,
    meter: Cost,
) -> Critic:
    """Right is what raises the mean reward of `sampling.samples` fresh answers by `MARGIN` standard errors.

    placed(prompt, draft): the complemented prompt. The reward reads the prompt as it was. An ask of which fewer than two
    answers could be judged on either side has no verdict.
    """

    def check(asks: Sequence[Ask], drafts: Sequence[str], turn: int) -> list[Verdict | None]:
        prompts = [ask.prompt for ask in asks]
        more = [placed(ask.prompt, draft) for ask, draft in zip(asks, drafts, strict=True)]
        draws = [sampling.but(seed=derive_seed(sampling.seed, "critic", turn, side)) for side in ("x", "x'")]
        without = rewards(policy, reward, prompts, prompts, draws[0], meter)
        having = rewards(policy, reward, more, prompts, draws[1], meter)
        return [_raised(*row) for row in zip(having, without, strict=True)]

    return check


def rewards(
    policy: Policy,
    reward: Reward,
    asked: Sequence[Prompt],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    meter: Cost,
) -> npt.NDArray[np.float64]:
    """[N, samples]: rewards of answers to `asked`, read as answers to `prompts`; NaN where one could not be judged."""
    done = policy.generate(asked, sampling)
    owners = [prompt for prompt in prompts for _ in range(sampling.samples)]
    charge(meter, done.cost)
    meter.reward_calls += len(owners)
    return np.asarray(reward(owners, done.texts), dtype=np.float64).reshape(len(prompts), sampling.samples)


def _raised(having: npt.NDArray[np.float64], without: npt.NDArray[np.float64]) -> Verdict | None:
    a, b = having[~np.isnan(having)], without[~np.isnan(without)]
    if min(len(a), len(b)) < 2:
        return None
    gain = float(a.mean() - b.mean())
    error = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    return Verdict(gain > MARGIN * error and gain > 0, reason=f"{gain:+.3f} with a standard error of {error:.3f}")


def fit(parts: Parts, config: PromptComplementConfig, wrap: Callable[[LM], Policy]) -> tuple[Fitted, Cost]:
    """Pairs on `parts.prompts`, M_p trained on them, and its gain on the prompts held back.

    wrap(M_p): the policy that answers with its complements.
    """
    start, meter = time.perf_counter(), Cost()
    say = parts.progress or (lambda line: None)
    words = [words_of(prompt, config.template) for prompt in parts.prompts]
    kept = [row for row in pool(words, config.distance) if not demands_format(words[row])]
    order = np.random.default_rng(config.seed).permutation(len(kept))[: config.prompts]
    if len(order) < FEWEST:
        raise UsageError(
            f"{len(order)} different prompts are too few to make a complement model from: give at least {FEWEST}, better "
            "200, or complementer=MODEL"
        )
    rows = [kept[i] for i in order]
    kinds = _kinds(parts, config, [words[row] for row in rows], meter)
    asks = [Ask(parts.prompts[row], words[row], kind) for row, kind in zip(rows, kinds, strict=True)]
    held = asks[: round(config.held_out * len(asks))]
    written = _written(parts, config, asks[len(held) :], meter)
    say(f"prompt-complement: {len(written.pairs)} pairs from {written.drafts} drafts; dropped {dict(written.dropped)}")
    fitted = Fitted(None, written.pairs)
    if len(written.pairs) >= FEWEST:
        student = parts.lm if config.student is None else parts.load(config.student)
        asked = (config.instruction, config.epochs, config.lr, config.seed)
        fitted.model = train(student, written.pairs, *asked, parts.progress, meter)
        fitted.gain = _gain(parts, config, wrap(fitted.model), held, meter)
    _announce(fitted, parts.policy.name, say)
    meter.seconds = time.perf_counter() - start
    return fitted, meter


def _announce(fitted: Fitted, name: str, say: Callable[[str], None]) -> None:
    """Says what was found; a model that does harm is given up."""
    gain, unused = fitted.gain, ""
    if fitted.model is None:
        unused = f"{len(fitted.pairs)} complements improved answers of {name}, too few to learn from"
    elif gain is not None:
        found = verdict(gain)
        said = {"better": "raise", "worse": "lower", "undecided": "do not measurably change"}[found]
        say(f"prompt-complement: complements {said} the reward of {gain.prompts} held-out prompts: {gain.to_dict()}")
        if found == "worse":
            fitted.model = None
            unused = f"the trained complements lower the reward of {name} by {-(gain.mean or 0):.3g}"
    if unused:
        warnings.warn(f"prompt-complement: {unused}; prompts are asked as they are", stacklevel=3)


def _kinds(parts: Parts, config: PromptComplementConfig, words: Sequence[str], meter: Cost) -> list[str]:
    if config.generator is None:
        return [category_of(text) for text in words]
    return sort_with(parts.load(config.generator), Sampling(max_new_tokens=16, temperature=0), meter)(words)


def _written(parts: Parts, config: PromptComplementConfig, asks: Sequence[Ask], meter: Cost) -> Written:
    draws = Sampling(TOKENS_A_WORD * config.max_words, seed=derive_seed(config.seed, "drafts"))
    writer = phrase_writer(config.phrases, config.seed)
    if config.generator is not None:
        writer = draft_with(parts.load(config.generator), draws, meter)
    if config.critic is not None:
        critic = check_with(parts.load(config.critic), draws.but(max_new_tokens=256, temperature=0), meter)
    else:
        sampling = parts.sampling.but(samples=config.critic_samples, seed=derive_seed(config.seed, "answers"))
        critic = reward_critic(
            parts.policy,
            parts.reward,
            lambda prompt, draft: with_complement(prompt, draft, config.template, config.separator),
            sampling,
            meter,
        )
    return write_pairs(asks, writer, critic, config.rounds, config.max_words)


def _gain(
    parts: Parts, config: PromptComplementConfig, wrapped: Policy, held: Sequence[Ask], meter: Cost
) -> Interval | None:
    """Reward of answers with complements less without, on held-out prompts; None without a reward or without prompts."""
    if parts.given is None or not held:
        return None
    prompts = [ask.prompt for ask in held]
    sampling = parts.sampling.but(samples=config.critic_samples, seed=derive_seed(config.seed, "held out"))
    having, without = (
        rewards(policy, parts.reward, prompts, prompts, sampling, meter) for policy in (wrapped, parts.policy)
    )
    owners = np.repeat(np.arange(len(prompts)), config.critic_samples)
    return paired_difference(having.ravel(), without.ravel(), owners.tolist())


def save(fitted: Fitted, folder: Path) -> None:
    """A model folder (where there is a model) with `pairs.jsonl` and `held_out.json` beside it."""
    if fitted.model is not None:
        tuning.save(fitted.model, folder)
    save_pairs(folder / "pairs.jsonl", fitted.pairs)
    name = None if fitted.model is None else fitted.model.name
    write_json(folder / "held_out.json", {"model": name, "gain": fitted.gain})


def load(folder: Path) -> Fitted:
    """What `save` wrote, without the pairs: answering needs none."""
    name = json.loads((folder / "held_out.json").read_text())["model"]
    if name is None:
        return Fitted(None)
    model = LM.load(str(folder))
    model.name = name
    return Fitted(model)
